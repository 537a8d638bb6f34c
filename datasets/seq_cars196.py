"""seq-cars196: Stanford Cars in 9 tasks of 20 models and one of 16 (Mammoth: ViT, 50 epochs, batches of 128)."""

from __future__ import annotations

from datasets.utils.cifar import FEDERATED
from datasets.utils.image_files import FileDataset
from datasets.utils.readers import CARS
from datasets.utils.stacked import square
from datasets.utils.transforms import RandomHorizontalFlip


class SequentialCars196(FileDataset):
    """The middle of each image at 224 pixels, flips, values in [0, 1], as in Mammoth and fed-mammoth."""

    NAME = "seq-cars196"
    PART = CARS
    FOLDER = "8vision"  # the arrays of seq-8vision
    N_TASKS = 10
    N_CLASSES_PER_TASK = [20] * 9 + [16]
    KEEP_TRAIN = KEEP_TEST = (224, square)
    TRAIN_AUGMENT = [RandomHorizontalFlip()]
    DEFAULTS = {"backbone": "vit", "n_epochs": 50, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "num_comm_rounds": 10, "distribution_alpha": 0.2}
