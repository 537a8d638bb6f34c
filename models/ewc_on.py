"""Online EWC (Schwarz et al. 2018, arXiv 1805.06370; EWC: Kirkpatrick et al. 2017, arXiv 1612.00796).

    L = CE(f(x), y) + e_lambda * sum_j F_j (theta_j - theta*_j)^2
    F <- gamma * F + F_task,   F_task = mean_x p(y|x) * (grad log p(y|x))^2

theta*: the weights at the end of the previous task. The Fisher diagonal is taken sample by sample, as in Mammoth and
fed-mammoth, here with per-sample gradients by vmap. The penalty is part of the loss: gradient scaling cannot lose it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call

from backbones.utils.base import plain_attention
from models.utils.continual_model import ContinualModel
from models.utils.fisher import chunk_size, fisher_diagonal
from utils.args import number
from utils.evaluate import evaluating


class EwcOn(ContinualModel):
    """A quadratic penalty that holds the weights old tasks need. Under --fl, F and theta* are each client's own."""

    NAME = "ewc_on"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        parser.add_argument("--e_lambda", type=number(float, 0), default=1.0, help="weight of the penalty")
        parser.add_argument("--gamma", type=number(float, 0, 1), default=0.9, help="decay of the old Fisher matrix")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.checkpoint: dict[str, torch.Tensor] = {}
        self.fish: dict[str, torch.Tensor] = {}

    def penalty(self) -> torch.Tensor:
        """e_lambda * sum_j F_j (theta_j - theta*_j)^2; zero before the first task has ended."""
        named = dict(self.net.named_parameters())
        total = torch.zeros((), device=self.device)
        for name, fisher in self.fish.items():
            total = total + (fisher * (named[name] - self.checkpoint[name]).square()).sum()
        return self.args.e_lambda * total

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        loss = self.loss(self.net(inputs), labels) + self.penalty()
        loss.backward()
        self.opt.step()
        return loss.detach()

    def end_task(self, dataset) -> None:
        fisher = self.fisher(dataset.train_loader.dataset)
        self.fish = {n: self.args.gamma * self.fish[n] + f if n in self.fish else f for n, f in fisher.items()}
        self.checkpoint = {n: p.detach().clone() for n, p in self.net.named_parameters() if p.requires_grad}

    def fisher(self, view) -> dict[str, torch.Tensor]:
        """mean_x p(y|x) (grad log p(y|x))^2 over the samples of ``view``, without augmentation."""
        params = {n: p for n, p in self.net.named_parameters() if p.requires_grad}

        def log_likelihood(params, x, y):
            return -F.cross_entropy(functional_call(self.net, params, (x,)), y)

        def batches():
            for positions in torch.arange(len(view)).split(chunk_size(params)):
                _, labels, not_aug_inputs, *_ = view.batch(positions)
                yield self.normalization_transform(not_aug_inputs), labels

        with evaluating(self.net), plain_attention(self.net):
            total = fisher_diagonal(log_likelihood, params, batches())
        return {n: t / len(view) for n, t in total.items()}
