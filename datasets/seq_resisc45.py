"""seq-resisc45: NWPU-RESISC45 in 9 tasks of 5 scenes from above (Mammoth: ViT, 30 epochs, batches of 128).

Images have 256 pixels. resisc45_train.yaml and resisc45_test.yaml of Mammoth's copy divide them if they lie in the
folder NWPU-RESISC45; else a fixed fifth of each class is for testing.
"""

from __future__ import annotations

from datasets.utils.cifar import FEDERATED, IMAGENET
from datasets.utils.image_files import FileDataset
from datasets.utils.readers import RESISC45
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, CenterCrop, RandomHorizontalFlip, RandomResizedCrop, Resize


class SequentialRESISC45(FileDataset):
    """Random resized crops and flips; the central 224 pixels for testing."""

    NAME = "seq-resisc45"
    PART = RESISC45
    N_TASKS = 9
    N_CLASSES_PER_TASK = 5
    MEAN, STD = IMAGENET
    KEEP_TRAIN = KEEP_TEST = (256, whole)
    TRAIN_AUGMENT = [RandomResizedCrop(224, interpolation=BICUBIC), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(256, BICUBIC), CenterCrop(224)]
    DEFAULTS = {"backbone": "vit", "n_epochs": 30, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}
