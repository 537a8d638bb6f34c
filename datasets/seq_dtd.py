"""seq-dtd: textures in 4 tasks of 10 and one of 7 (Mammoth: ViT, 20 epochs, batches of 128).

Training and validation images are trained on and the test images tested on, as in seq-8vision; Mammoth trains on the
first and tests on the second.
"""

from __future__ import annotations

from datasets.utils.image_files import JitteredDataset
from datasets.utils.readers import DTD


class SequentialDTD(JitteredDataset):
    NAME = "seq-dtd"
    PART = DTD
    N_TASKS = 5
    N_CLASSES_PER_TASK = [10] * 4 + [7]
