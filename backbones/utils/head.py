"""The rows of a classifier that a task trains, as parameters of their own."""

from __future__ import annotations

import torch
from torch import nn

from backbones.utils import client_batch
from utils.errors import UserError


def need_bias(classifier: nn.Linear) -> None:
    """UserError for a classifier without bias, as spiking networks and their twins have."""
    if classifier.bias is None:
        raise UserError(
            "this method needs a classifier with a bias, which spiking networks and resnet19 lack: train "
            "the whole network (--tuning full, where there is the choice) or use another --backbone"
        )


class HeadRows(nn.Module):
    """Rows ``start:end`` of a linear classifier, copied out for training and put back.

    A task trains, sends and averages its own rows; the others cannot move, not even by weight decay or momentum.

    Attributes:
        weight: (end - start, d). bias: (end - start,). Either may get a leading client dimension (client_batch.py).
    """

    STACKS = True

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
        self.start = self.end = 0

    def take(self, classifier: nn.Linear, start: int, end: int) -> None:
        """Begin with the classifier's rows ``start:end`` as they are. UserError for a classifier without bias."""
        need_bias(classifier)
        self.start, self.end = start, end
        self.weight.data = classifier.weight.data[start:end].clone()
        self.bias.data = classifier.bias.data[start:end].clone()
        self.weight.grad = self.bias.grad = None

    def put(self, classifier: nn.Linear) -> None:
        """Write the rows into the classifier, which gets new tensors (the old ones may be shared)."""
        for mine, name in ((self.weight, "weight"), (self.bias, "bias")):
            whole = getattr(classifier, name).data.clone()
            whole[self.start : self.end] = mine.data
            getattr(classifier, name).data = whole

    def get_extra_state(self) -> list[int]:
        return [self.start, self.end]

    def set_extra_state(self, state: list[int]) -> None:
        self.start, self.end = state

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, end - start) of the task's classes for features (B, d)."""
        return client_batch.linear(features, self.weight, self.bias)
