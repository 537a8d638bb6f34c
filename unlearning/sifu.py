"""SIFU: back to the last model that the client has hardly touched, noise, and the others train on (Fraboni et al. 2024,
"SIFU: Sequential informed federated unlearning").

    Psi_{t+1}(u) = (1 - eta mu)^n Psi_t(u) + p_u / (1 - p_u) |theta_{t+1} - theta_u,{t+1}|      |theta_T - theta_T^-u|
    psi*         = eps sigma / sqrt(2 log(1.25 / delta)),   delta = 1 / K                        is at most Psi_T(u)

for convex losses and small steps; for others Psi is a number to compare by, no certificate. ``--sifu_mu`` is the strong
convexity, 0 without any. The last model of the task with Psi <= psi* gets noise N(0, sigma^2) and is trained by the
others for as many rounds as came after it.
"""

from __future__ import annotations

import math

import torch

from models.utils.unlearner import Unlearner
from utils.args import number
from utils.unlearning_metrics import distance


def sensitivity(rounds: list[dict], last: dict[str, torch.Tensor], who: list[int], contraction: float = 1.0) -> list:
    """[Psi_0 = 0, Psi_1, ..., Psi_T] of clients (their sum) from what is kept of rounds.

    Args:
        rounds: of a task, in order ("start", "updates", "weights"). last: the model after the last of them.
        contraction: (1 - eta mu)^n of a round.
    """
    psi, starts = [0.0], [kept["start"] for kept in rounds[1:]] + [last]
    for kept, after in zip(rounds, starts):
        grown = contraction * psi[-1]
        for u in who:
            if u in kept["updates"]:
                p, update = kept["weights"][u], kept["updates"][u]
                grown += p / max(1 - p, 1e-12) * distance({n: kept["start"][n] + d for n, d in update.items()}, after)
        psi.append(grown)
    return psi


class SIFU(Unlearner):
    NAME = "sifu"

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--sifu_eps", type=number(float, 0, open_low=True), default=10.0, help="epsilon of the guarantee")
        add("--sifu_sigma", type=number(float, 0), default=0.05, help="deviation of the noise")
        add("--sifu_mu", type=number(float, 0), default=0.0, help="strong convexity of the loss")
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        a, kept = self.args, [k for _, k in self.rounds_of(self.current_task)]
        share = len(self.dataset.task_indices(self.current_task)) / len(clients)
        steps = self.local_epochs() * max(share / a.batch_size, 1.0)  # of a client in a round, on average
        psi = sensitivity(kept, self.trained(), who, max(1 - a.lr * a.sifu_mu, 0.0) ** steps)
        limit = a.sifu_eps * a.sifu_sigma / math.sqrt(2 * math.log(1.25 * len(clients)))
        back = max(t for t, p in enumerate(psi) if p <= limit)
        theta = self.trained() if back == len(kept) else kept[back]["start"]
        self.set_trained({n: t + a.sifu_sigma * torch.randn(t.shape).to(t) for n, t in theta.items()})
        self.more_rounds(self.rest(clients, who), len(kept) - back, "sifu")
