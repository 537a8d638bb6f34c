"""seq-sun397: SUN397 in 7 tasks of 50 scenes and one of 47 (Mammoth: ViT, 20 epochs, batches of 128).

The division is that of seq-8vision: the folder Partitions (Training_01.txt, Testing_01.txt) where it is there, else
half of each class for testing. Mammoth holds out a fifth, drawn by another library.
"""

from __future__ import annotations

from datasets.utils.image_files import JitteredDataset
from datasets.utils.readers import SUN397


class SequentialSUN397(JitteredDataset):
    NAME = "seq-sun397"
    PART = SUN397
    N_TASKS = 8
    N_CLASSES_PER_TASK = [50] * 7 + [47]
