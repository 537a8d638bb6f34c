"""Experience replay for spiking networks, snn-ER in the comparison of STAER (arXiv 2601.20870).

Cross-entropy over the batch joined with a minibatch of the buffer, of mean logits or at every time step.
"""

from __future__ import annotations

import torch

from models.utils.spiking import SpikingModel
from utils.args import add_rehearsal_args
from utils.buffer import Buffer


class Ser(SpikingModel):
    """Rehearsal of images."""

    NAME = "ser"

    @staticmethod
    def get_parser(parser):
        SpikingModel.get_parser(parser)
        add_rehearsal_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(args.buffer_size)

    def replay(self, inputs, labels) -> torch.Tensor:
        """The classification loss of the batch and of as much of the buffer."""
        if not self.buffer.is_empty():
            x, y, *_ = self.buffer.get_data(self.args.minibatch_size, transform=self.transform, device=self.device)
            inputs, labels = torch.cat((inputs, x)), torch.cat((labels, y))
        return self.classification(self.net.sequence(inputs), labels)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        loss = self.replay(inputs, labels)
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=labels)
        return loss.detach()
