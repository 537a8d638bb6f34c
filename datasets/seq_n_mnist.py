"""seq-n-mnist: N-MNIST in 5 tasks of 2 digits, MNIST as an event camera saw it on a screen (Orchard et al., 2015)."""

from __future__ import annotations

from datasets.utils.events import EventDataset


class SequentialNMNIST(EventDataset):
    """34x34 pixels, two polarities, 300 ms in three saccades. No augmentation.

    No protocol for continual learning is published: the tasks and the single epoch are those of seq-smnist.
    """

    NAME = "seq-n-mnist"
    READER = "NMNIST"
    SIZE = (34, 34)
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    DEFAULTS = {"backbone": "sresnet19", "T": 10, "n_epochs": 1, "batch_size": 32}
    FED_DEFAULTS = {"num_comm_rounds": 5, "num_clients": 10, "distribution_alpha": 0.5}
