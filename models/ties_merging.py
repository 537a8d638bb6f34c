"""TIES-Merging (Yadav et al. 2023, arXiv 2306.01708) as a federated aggregator, with fed-mammoth's constants.

    Delta_c = theta_c - theta, of which the largest 30 % by size are kept over the whole vector
    s       = sign(sum_c Delta_c)
    theta   <- theta + 0.4 * mean of the Delta_c whose sign is s      (entry by entry, clients count alike)

Entries without a sign do not move.
"""

from __future__ import annotations

import torch

from models.fedavg import FedAvg
from models.utils.merging import ties_merge
from utils.args import number


class TiesMerging(FedAvg):
    """Trim, elect signs, merge: on what the clients changed in a round."""

    NAME = "ties_merging"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        FedAvg.get_parser(parser)
        parser.add_argument(
            "--ties_keep", type=number(float, 0, 1, open_low=True), default=0.3, help="share of entries kept per client"
        )
        parser.add_argument("--ties_lambda", type=number(float), default=0.4, help="scale of the merged change")
        return parser

    def aggregate(self, replies) -> None:
        trained = self.trainable()
        deltas = [torch.cat([(r[n] - p.data).flatten() for n, p in trained.items()]) for r in replies]
        merged = ties_merge(deltas, self.args.ties_keep, reduce="mean", undecided="zero")
        parts = merged.split([p.numel() for p in trained.values()])
        self._own_change = {n: d.view_as(p) for (n, p), d in zip(trained.items(), parts, strict=True)}
        super().aggregate(replies)

    def merged(self, name, current, replies, weights):
        if name not in self._own_change:  # running statistics are averaged
            return super().merged(name, current, replies, weights)
        return current.data + self.args.ties_lambda * self._own_change[name]
