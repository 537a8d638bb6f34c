"""seq-scifar10: CIFAR-10 in 5 tasks of 2 classes for spiking networks (STAER's protocol: 50 epochs, batches of 32)."""

from __future__ import annotations

from datasets.utils.cifar import CIFARDataset


class SequentialSpikingCIFAR10(CIFARDataset):
    """The network sees the same image at each of its --T steps (direct coding)."""

    NAME = "seq-scifar10"
    SOURCE = "CIFAR10"
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)
    DEFAULTS = {"backbone": "sresnet19", "n_epochs": 50, "batch_size": 32}
