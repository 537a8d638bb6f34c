"""DER++ for spiking networks, snn-DER++ in the comparison of STAER (arXiv 2601.20870); ``--beta 0`` is snn-DER.

    L = CE(z(x), y) + alpha |mean_t z(x') - mean_t z'|^2 + beta CE(z(x''), y'')

with (x', z') and (x'', y'') two independent draws from a reservoir of images, labels and logits in time.
"""

from __future__ import annotations

import torch

from models.derpp import Derpp
from models.utils.spiking import SpikingModel, mean_squares
from utils.buffer import Buffer


class Sderpp(SpikingModel):
    """Rehearsal of images and of the logits that they had."""

    NAME = "sderpp"

    @staticmethod
    def get_parser(parser):
        return Derpp.get_parser(SpikingModel.get_parser(parser))

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(args.buffer_size)

    def _replay(self):
        """Images, labels, logits (T, B, K)."""
        x, y, z, _ = self.buffer.get_data(self.args.minibatch_size, transform=self.transform, device=self.device)
        return x, y, z.transpose(0, 1)

    def kept_traces(self):
        """Images of the buffer as in a test, what the network said of them (n, T, K), and their tasks."""
        if self.buffer.is_empty():
            return None
        images, _, traces, tasks = self.buffer.get_all_data(transform=self.normalization_transform, device=self.device)
        return images, traces, tasks

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        outputs = self.net.sequence(inputs)
        loss = self.classification(outputs, labels)
        if not self.buffer.is_empty():
            x, _, z = self._replay()
            loss = loss + self.args.alpha * mean_squares(self.net.sequence(x), z)
            if self.args.beta:  # snn-DER draws and runs nothing more
                x, y, _ = self._replay()
                loss = loss + self.args.beta * self.classification(self.net.sequence(x), y)
        loss.backward()
        self.opt.step()
        self.buffer.add_data(
            examples=not_aug_inputs,
            labels=labels,
            logits=outputs.detach().transpose(0, 1),
            task_labels=torch.full_like(labels, self.current_task),  # for logit_drift
        )
        return loss.detach()
