"""seq-cifar10-224: seq-cifar10 with a ViT by default (Mammoth: 50 epochs, batches of 32)."""

from __future__ import annotations

from datasets.seq_cifar10 import SequentialCIFAR10


class SequentialCIFAR10224(SequentialCIFAR10):
    NAME = "seq-cifar10-224"
    DEFAULTS = {"backbone": "vit", "n_epochs": 50, "batch_size": 32}
