"""seq-smnist: MNIST in 5 tasks of 2 digits for spiking networks (STAER's protocol: one epoch, batches of 10)."""

from __future__ import annotations

from datasets.utils.mnist import MNISTDataset


class SequentialSpikingMNIST(MNISTDataset):
    """The network sees the same image at each of its --T steps (direct coding)."""

    NAME = "seq-smnist"
    SETTING = "class-il"
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    DEFAULTS = {"backbone": "sresnet19", "n_epochs": 1, "batch_size": 10}
