"""Methods that train the network's body and, of the classifier, the rows of the current task."""

from __future__ import annotations

from torch import nn

from backbones.utils.head import HeadRows
from models.utils.federated_model import FederatedModel


class HeadRowsModel(FederatedModel):
    """Trained, sent and averaged: whatever of the body requires a gradient, and ``head``; other rows cannot move."""

    def __init__(self, backbone, loss, args, transform, dataset=None):
        backbone.classifier.requires_grad_(False)
        super().__init__(backbone, loss, args, transform, dataset)
        self.head = HeadRows()

    def begin_task(self, dataset) -> None:
        self.head.take(self.net.classifier, self.n_past_classes, self.n_seen_classes)

    def trainable(self) -> dict[str, nn.Parameter]:
        head = getattr(self, "head", None)
        rows = {f"head.{n}": p for n, p in head.named_parameters()} if head is not None else {}
        return {**super().trainable(), **rows}

    def aggregate(self, replies) -> None:
        super().aggregate(replies)
        self.head.put(self.net.classifier)
