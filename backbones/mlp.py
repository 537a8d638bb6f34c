"""Mammoth's perceptron for MNIST: two hidden layers of 100 units; 89,610 parameters for 784 inputs and ten classes."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from backbones.utils.base import Backbone, num_flat_features, xavier

NAMES = ("mnistmlp",)


class MNISTMLP(Backbone):
    """Inputs of any shape (B, ...) with ``input_size`` values each -> ``hidden`` features. Xavier initialisation."""

    def __init__(self, input_size: int, num_classes: int, hidden: int = 100) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self._attach_head(hidden, num_classes)
        self.apply(xavier)

    def reset_classifier(self, num_classes: int) -> None:
        """As in the base class, drawn like the other layers."""
        super().reset_classifier(num_classes)
        xavier(self.classifier)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, num_flat_features(x))
        return torch.relu(self.fc2(torch.relu(self.fc1(x))))


def build(args: argparse.Namespace, dataset: Any) -> MNISTMLP:
    """A network for images of ``dataset.SIZE`` with ``dataset.CHANNELS`` channels and ``dataset.N_CLASSES`` classes."""
    height, width = dataset.SIZE
    return MNISTMLP(height * width * dataset.CHANNELS, dataset.N_CLASSES)
