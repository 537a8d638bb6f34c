"""What the methods for spiking networks share: logits in time, their losses, replay of sequences.

A spiking backbone gives logits at every time step, ``net.sequence(x, T)`` (T, B, K); its prediction is their mean. Any
other method (``joint``, ``er``, the federated ones) trains on that mean without knowing of time.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from models.utils.continual_model import ContinualModel
from utils.args import add_switch
from utils.errors import UserError


class SpikingModel(ContinualModel):
    """A central method over logits in time; under --fl each client's buffers are its own."""

    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        add_switch(
            parser, "--temp_sep", help="1: cross-entropy at every time step, averaged (TSCE); 0: of the mean logits"
        )
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if not hasattr(backbone, "sequence"):
            raise UserError(
                f"--backbone {args.backbone} does not spike: {self.NAME} needs logits in time; use sresnet19, "
                "sresnet18 or sresnet-pocket"
            )
        super().__init__(backbone, loss, args, transform, dataset=dataset)

    def classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (T, B, K): of their mean over time, or at every step (``--temp_sep 1``)."""
        if self.args.temp_sep:
            return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
        return F.cross_entropy(logits.mean(0), labels)


def mean_squares(a: Tensor, b: Tensor) -> Tensor:
    """MSE of the means over time of two sequences (T, B, K): DER's term; what differs in time averages out."""
    return F.mse_loss(a.mean(0), b.mean(0))
