"""seq-cifar100: CIFAR-100 in 10 tasks of 10 classes (Mammoth: ResNet-18 at 32 pixels, 50 epochs, batches of 32)."""

from __future__ import annotations

from datasets.utils.cifar import CIFARDataset


class SequentialCIFAR100(CIFARDataset):
    """With a ViT or CLIP backbone, and so by default under ``--fl``, images are fed at 224 pixels."""

    NAME = "seq-cifar100"
    SOURCE = "CIFAR100"
    N_TASKS = 10
    N_CLASSES_PER_TASK = 10
    MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    DEFAULTS = {"backbone": "resnet18", "n_epochs": 50, "batch_size": 32}
