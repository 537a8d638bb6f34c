"""Dark Experience Replay++ (Buzzega et al. 2020, arXiv 2004.07211), Eq. 6.

    L = CE(f(x), y) + alpha * |h(x') - z'|^2 + beta * CE(f(x''), y'')

with (x', z') and (x'', y'') two independent draws from a reservoir of images, labels and logits.
"""

import torch.nn.functional as F

from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args, number
from utils.buffer import Buffer


class Derpp(ContinualModel):
    """Rehearsal of samples and of the logits they had when they entered the buffer."""

    NAME = "derpp"
    COMPATIBILITY = ["class-il", "domain-il", "task-il", "general-continual"]

    @staticmethod
    def get_parser(parser):
        add_rehearsal_args(parser)
        parser.add_argument("--alpha", type=number(float, 0), default=0.5, help="weight of the logits' term (Eq. 6)")
        parser.add_argument("--beta", type=number(float, 0), default=0.5, help="weight of the replayed labels (Eq. 6)")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(args.buffer_size)

    def _replay(self):
        return self.buffer.get_data(self.args.minibatch_size, transform=self.transform, device=self.device)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        outputs = self.net(inputs)
        loss = self.loss(outputs, labels)
        if not self.buffer.is_empty():
            x, _, z = self._replay()
            loss = loss + self.args.alpha * F.mse_loss(self.net(x), z)
            x, y, _ = self._replay()
            loss = loss + self.args.beta * self.loss(self.net(x), y)
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=labels, logits=outputs.detach())
        return loss.detach()
