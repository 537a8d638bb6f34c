"""seq-dvs-cifar10: CIFAR10-DVS in 5 tasks of 2 classes, CIFAR-10 moved before an event camera (Li et al., 2017)."""

from __future__ import annotations

from datasets.utils.events import EventDataset
from datasets.utils.transforms import RandomCrop, RandomHorizontalFlip


class SequentialDVSCIFAR10(EventDataset):
    """128x128 pixels, counted into 48x48, two polarities; 9000 recordings to train on and 1000 to test on.

    The data set has no division of its own: a tenth of each class is held out, the same in every run. Crops and flips
    are the same for all frames. No protocol for continual learning is published: epochs are those of seq-scifar10.
    """

    NAME = "seq-dvs-cifar10"
    READER = "CIFAR10DVS"
    SPLIT = False
    SIZE = (48, 48)
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    TRAIN_AUGMENT = [RandomCrop(48, padding=4), RandomHorizontalFlip()]
    DEFAULTS = {"backbone": "sresnet19", "T": 10, "n_epochs": 50, "batch_size": 32}
    FED_DEFAULTS = {"n_epochs": 5, "num_comm_rounds": 5, "num_clients": 10, "distribution_alpha": 0.5}
