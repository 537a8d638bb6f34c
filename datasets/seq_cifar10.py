"""seq-cifar10: CIFAR-10 in 5 tasks of 2 classes (Mammoth: ResNet-18 at 32 pixels, 50 epochs, batches of 32)."""

from __future__ import annotations

from datasets.utils.cifar import CIFARDataset


class SequentialCIFAR10(CIFARDataset):
    """With a ViT or CLIP backbone, and so by default under ``--fl``, images are fed at 224 pixels."""

    NAME = "seq-cifar10"
    SOURCE = "CIFAR10"
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)
    DEFAULTS = {"backbone": "resnet18", "n_epochs": 50, "batch_size": 32}
