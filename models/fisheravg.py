"""Fisher-weighted averaging (Matena and Raffel 2022, arXiv 2111.09832) as a federated aggregator.

    theta_j <- sum_c w_cj theta_cj,   w_cj = (F_cj + eps) / sum_c (F_cj + eps)
    F_c     = sum_x p(y|x) (d log p(y|x) / d theta)^2     after local training, softmax over the task's classes

F is a sum, so clients count by their data. fed-mammoth takes it image by image on inputs in [0, 1] without
normalisation; here per-sample gradients are vectorised, and the inputs are those of a test (``--fisher_inputs raw``:
as in fed-mammoth).
"""

from __future__ import annotations

from federated.message import Message
from models.fedavg import FedAvg
from models.utils.fisher import FisherPass, add_fisher_args
from models.utils.merging import fisher_mean


class FisherAvg(FisherPass, FedAvg):
    """Every entry is averaged by how much the client's loss depends on it: twice the bytes of FedAvg up."""

    NAME = "fisheravg"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        FedAvg.get_parser(parser)
        add_fisher_args(parser)
        return parser

    def merged(self, current, replies, weights):
        merged = super().merged(self.shared_buffers(), replies, weights)  # running statistics are averaged
        for name in self.trainable():
            merged[name] = fisher_mean([r[name] for r in replies], [r[f"fisher.{name}"] for r in replies])
        return merged

    def after_local(self, client) -> Message:
        fisher = {f"fisher.{n}": f for n, f in self.fisher(client).items()}
        return Message({**super().after_local(client), **fisher})
