"""Task arithmetic as a federated aggregator: theta <- theta + lambda sum_c (theta_c - theta).

fed-mammoth's ``fedsum`` adds the raw weights, theta <- sum_c theta_c, which multiplies the network by the number of
clients; ``--fedsum_raw 1`` does that too. With lambda = 1 / #clients this is FedAvg with equal weights. Task arithmetic
is Ilharco et al. 2023 (arXiv 2212.04089); 0.3 is the usual lambda for eight tasks.
"""

from __future__ import annotations

import torch

from models.fedavg import FedAvg
from models.utils.merging import task_arithmetic
from utils.args import add_switch, number


class FedSum(FedAvg):
    """Sums of what the clients changed."""

    NAME = "fedsum"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        FedAvg.get_parser(parser)
        parser.add_argument("--fedsum_lambda", type=number(float), default=0.3, help="scale of the sum of the changes")
        add_switch(parser, "--fedsum_raw", help="add raw weights, as fed-mammoth does")
        return parser

    @torch.no_grad()
    def merged(self, current, replies, weights):
        merged = super().merged(self.shared_buffers(), replies, weights)  # running statistics are averaged
        for name, start in self.trainable().items():
            if self.args.fedsum_raw:
                merged[name] = sum(r[name] for r in replies)
            else:
                changes = [r[name] - start for r in replies]
                merged[name] = task_arithmetic(start, changes, self.args.fedsum_lambda)
        return merged
