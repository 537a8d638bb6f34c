"""seq-gtsrb: German traffic signs in 4 tasks of 10 and one of 3 (Mammoth: ViT, 20 epochs, batches of 128)."""

from __future__ import annotations

from datasets.utils.image_files import JitteredDataset
from datasets.utils.readers import GTSRB


class SequentialGTSRB(JitteredDataset):
    NAME = "seq-gtsrb"
    PART = GTSRB
    N_TASKS = 5
    N_CLASSES_PER_TASK = [10] * 4 + [3]
