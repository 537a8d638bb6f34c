"""Experience Replay with a reservoir buffer (Ratcliff 1990; Chaudhry et al. 2019, "On tiny episodic memories").

The loss is the cross-entropy over the batch joined with a minibatch of the buffer.
"""

import torch

from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.buffer import Buffer


class Er(ContinualModel):
    """Rehearsal of raw samples."""

    NAME = "er"
    COMPATIBILITY = ["class-il", "domain-il", "task-il", "general-continual"]

    @staticmethod
    def get_parser(parser):
        add_rehearsal_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(args.buffer_size)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        new_labels = labels
        if not self.buffer.is_empty():
            buf_inputs, buf_labels = self.buffer.get_data(
                self.args.minibatch_size, transform=self.transform, device=self.device
            )
            inputs, labels = torch.cat((inputs, buf_inputs)), torch.cat((labels, buf_labels))
        self.opt.zero_grad()
        loss = self.loss(self.net(inputs), labels)
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=new_labels)
        return loss.detach()
