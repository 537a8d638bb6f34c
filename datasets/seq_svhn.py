"""seq-svhn: SVHN in 5 tasks of 2 digits (Mammoth: ViT, 20 epochs, batches of 128)."""

from __future__ import annotations

from datasets.utils.image_files import JitteredDataset
from datasets.utils.readers import SVHN
from datasets.utils.stacked import square


class SequentialSVHN(JitteredDataset):
    NAME = "seq-svhn"
    PART = SVHN
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    KEEP_TRAIN = KEEP_TEST = (32, square)
