"""SIFU: back to the last model that the client has hardly touched, noise, and the others train on (Fraboni et al. 2024,
"SIFU: Sequential informed federated unlearning").

    Psi_{t+1}(u) = (1 - eta mu)^n Psi_t(u) + p_u / (1 - p_u) |theta_{t+1} - theta_u,{t+1}|      |theta_T - theta_T^-u|
    psi*         = eps sigma / sqrt(2 log(1.25 / delta)),   delta = 1 / K                        is at most Psi_T(u)

for convex losses and small steps; for others Psi is a number to compare by, no certificate. ``--sifu_mu`` is the strong
convexity, 0 without any. Rounds are counted over all tasks. Up to the last with Psi <= psi* they are taken as they
were; then comes noise N(0, sigma^2), and the others train the rounds that are left.
"""

from __future__ import annotations

import math

import torch

from models.utils.unlearner import Unlearner
from utils.args import number
from utils.unlearning_metrics import distance


def sensitivity(rounds: list[dict], who: list[int], contraction: float = 1.0) -> list[float]:
    """[Psi_0 = 0, Psi_1, ..., Psi_T] of clients (their sum) from what is kept of rounds.

    Args:
        rounds: in order ("updates", "weights"). contraction: (1 - eta mu)^n of a round.
    """
    psi = [0.0]
    for kept in rounds:
        grown, (updates, p) = contraction * psi[-1], (kept["updates"], kept["weights"])
        gone = [u for u in who if u in updates]
        if gone:
            mean = {n: sum(p[k] * u[n] for k, u in updates.items()) for n in updates[gone[0]]}
            grown += sum(p[u] / max(1 - p[u], 1e-12) * distance(mean, updates[u]) for u in gone)
        psi.append(grown)
    return psi


class SIFU(Unlearner):
    NAME = "sifu"
    REPLAYS = True

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--sifu_eps", type=number(float, 0, open_low=True), default=10.0, help="epsilon of the guarantee")
        add("--sifu_sigma", type=number(float, 0), default=0.05, help="deviation of the noise")
        add("--sifu_mu", type=number(float, 0), default=0.0, help="strong convexity of the loss")
        return parser

    def plan(self, who: list[int]) -> None:
        super().plan(who)
        a, samples = self.args, len(self.dataset.task_indices(0))
        steps = self.local_epochs() * max(samples / a.num_clients / a.batch_size, 1.0)  # of a client in a round
        rounds = [kept for _, kept in sorted(self.history.items())]
        psi = sensitivity(rounds, who, max(1 - a.lr * a.sifu_mu, 0.0) ** steps)
        limit = a.sifu_eps * a.sifu_sigma / math.sqrt(2 * math.log(1.25 * a.num_clients))
        self._own_back = max(t for t, p in enumerate(psi) if p <= limit)  # rounds that stay as they were

    def replayed_round(self, clients, r: int, kept: dict) -> None:
        before = sum(key < (self.current_task, r) for key in self.history)  # rounds before this one
        if before == self._own_back == 0:
            self.add_noise()
        if before >= self._own_back:
            return self.method_round(clients, r)
        start = {n: kept["start"][n].to(t) for n, t in self.trained().items()}
        self.add_updates(start, kept["updates"], kept["weights"], kept["running"])
        if before + 1 == self._own_back:
            self.add_noise()

    def add_noise(self) -> None:
        sigma = self.args.sifu_sigma
        self.set_trained({n: t + sigma * torch.randn(t.shape).to(t) for n, t in self.trained().items()})
