"""seq-mnist: MNIST in 5 tasks of 2 digits (Mammoth's protocol: one epoch, batches of 64)."""

from __future__ import annotations

from datasets.utils.mnist import MNISTDataset


class SequentialMNIST(MNISTDataset):
    NAME = "seq-mnist"
    SETTING = "class-il"
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    DEFAULTS = {"backbone": "mnistmlp", "n_epochs": 1, "batch_size": 64}
