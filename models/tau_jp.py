"""tau-Jp regularisation (Yoshida et al. 2025), the baseline of TAK (arXiv 2602.17385) that needs other tasks' data.

    min_tau  CE(f_lin(x, tau), y) + p mean_{t' != t} E_{x' of t'} |J(x') tau|

One step takes a batch of one other task, in turn (``--jp_strict 1``: of every other task). The norm is not squared.
Reference batches come from the training images of the other tasks, so the method is central.
"""

from __future__ import annotations

import torch

from models.task_arithmetic import TaskArithmetic
from utils.args import add_switch, number
from utils.conf import make_generator
from utils.errors import UserError


class TauJp(TaskArithmetic):
    """Task vectors that are kept from moving what the network says of images of other tasks."""

    NAME = "tau_jp"
    CENTRAL_ONLY = True

    @staticmethod
    def get_parser(parser):
        TaskArithmetic.get_parser(parser)
        add = parser.add_argument
        add("--jp_weight", type=number(float, 0), default=0.1, help="p, the weight of the penalty")
        add("--jp_batch", type=number(int, 1), default=16, help="images of another task in a step")
        add_switch(parser, "--jp_strict", help="1: a batch of every other task, each step")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if args.regime != "linear":
            raise UserError(f"tau_jp needs --regime linear: --regime {args.regime} has no J tau")
        super().__init__(backbone, loss, args, transform, dataset)

    def before_local(self, message, client) -> None:
        super().before_local(message, client)
        generator = make_generator(self.args.seed, "references", client.task)
        self._own_turn.references = [
            self._batches(t, generator) for t in range(self.dataset.n_train_tasks) if t != client.task
        ]

    def _batches(self, task: int, generator: torch.Generator):
        """Batches of another task's training images as in a test, without end."""
        indices = self.dataset.task_indices(task)
        while True:
            for some in indices[torch.randperm(len(indices), generator=generator)].split(self.args.jp_batch):
                loader = self.dataset.loader(some, task, len(some), False, device=self.device, split="train")
                yield next(iter(loader))[0]

    def add_penalty(self, turn, step):
        chosen = turn.references
        if not chosen or not self.args.jp_weight:
            return None
        if not self.args.jp_strict:
            chosen = [chosen[step % len(chosen)]]
        now, total = {n: p.detach() for n, p in turn.tau.items()}, 0.0
        for batches in chosen:
            value, grads = self._own_lin.step(next(batches), now, lambda _, product: length(product))
            total = total + value / len(chosen)
            for n, g in grads.items():
                turn.tau[n].grad.add_(g, alpha=self.args.jp_weight / len(chosen))
        return self.args.jp_weight * total


def length(product: torch.Tensor) -> torch.Tensor:
    """Mean of |J tau| over a batch (B, d); its gradient at 0 is 0."""
    return product.square().sum(1).clamp(min=1e-12).sqrt().mean()
