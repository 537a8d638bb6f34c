"""seq-cifar100-224: seq-cifar100 with a ViT by default (Mammoth: 20 epochs, batches of 128)."""

from __future__ import annotations

from datasets.seq_cifar100 import SequentialCIFAR100


class SequentialCIFAR100224(SequentialCIFAR100):
    NAME = "seq-cifar100-224"
    DEFAULTS = {"backbone": "vit", "n_epochs": 20, "batch_size": 128}
