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

    @torch.no_grad()
    def merged(self, current, replies, weights):
        merged, trained = super().merged(self.shared_buffers(), replies, weights), self.trainable()
        deltas = [torch.cat([(r[n] - p).flatten() for n, p in trained.items()]) for r in replies]
        change = ties_merge(deltas, self.args.ties_keep, reduce="mean", undecided="zero")
        parts = change.split([p.numel() for p in trained.values()])
        for (name, p), part in zip(trained.items(), parts, strict=True):
            merged[name] = p + self.args.ties_lambda * part.view_as(p)
        return merged
