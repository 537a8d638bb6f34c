"""FedEraser: rounds are replayed without the client, in the directions of fresh updates as long as the old ones
(Liu et al. 2021, "FedEraser: Enabling efficient client-level data removal from federated learning models").

    U~_k = |U_k| / |u_k| u_k        U_k: the client's stored update, u_k: a few epochs from where the replay stands

Every ``--federaser_interval``-th round of the task is replayed from where it began; the first takes the stored updates
as they are. Norms are of a client's whole update (``vector``) or of each tensor (``layer``).
"""

from __future__ import annotations

import torch

from federated.message import Message
from models.utils.unlearner import Unlearner
from utils.args import number


class FedEraser(Unlearner):
    NAME = "federaser"

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--federaser_interval", type=number(int, 1), default=2, help="every so many rounds are replayed")
        add("--federaser_epochs", type=number(int, 1), default=1, help="epochs of a fresh update")
        add("--federaser_norm", choices=("vector", "layer"), default="vector", help="what is made as long as it was")
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        rounds = self.rounds_of(self.current_task)
        theta = {n: t.to(p) for (n, t), p in zip(rounds[0][1]["start"].items(), self.trainable().values())}
        for i, (_, kept) in enumerate(rounds[:: self.args.federaser_interval]):
            stay = {k: u for k, u in kept["updates"].items() if k not in who}
            total = sum(kept["weights"][k] for k in stay)
            if not stay:
                continue
            self.set_trained(theta)
            updates = stay
            if i > 0:
                message = Message({**self.broadcast()}, epochs=self.args.federaser_epochs)
                replies = [self.expanded(r) for r in clients.only(stay).call("for_epochs", message)]
                updates = {
                    r.client: self.as_long({n: r[n].to(t) - t for n, t in theta.items()}, stay[r.client])
                    for r in replies
                }
            theta = {
                n: t + sum(kept["weights"][k] / total * u[n].to(t) for k, u in updates.items())
                for n, t in theta.items()
            }
        self.set_trained(theta)

    def as_long(self, fresh: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A fresh update with the length of the stored one."""

        def ratio(names):
            old, new = (torch.stack([u[n].double().norm() for n in names]).norm() for u in (stored, fresh))
            return float(old.cpu() / new.cpu().clamp(min=1e-30))

        if self.args.federaser_norm == "layer":
            return {n: ratio([n]) * t for n, t in fresh.items()}
        whole = ratio(list(fresh))
        return {n: whole * t for n, t in fresh.items()}
