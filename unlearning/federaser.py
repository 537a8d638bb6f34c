"""FedEraser: rounds are replayed without the client, in the directions of fresh updates as long as the old ones
(Liu et al. 2021, "FedEraser: Enabling efficient client-level data removal from federated learning models").

    U~_k = |U_k| / |u_k| u_k        U_k: the client's stored update, u_k: a few epochs from where the replay stands

Of every task each ``--federaser_interval``-th round is replayed; the first of all takes the stored updates as they are.
Norms are of a client's whole update (``vector``) or of each tensor (``layer``).
"""

from __future__ import annotations

import torch

from federated.message import Message
from models.utils.unlearner import Unlearner
from utils.args import number


class FedEraser(Unlearner):
    NAME = "federaser"
    REPLAYS = True

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--federaser_interval", type=number(int, 1), default=2, help="every so many rounds are replayed")
        add("--federaser_epochs", type=number(int, 1), default=1, help="epochs of a fresh update")
        add("--federaser_norm", choices=("vector", "layer"), default="vector", help="what is made as long as it was")
        return parser

    def replayed_round(self, clients, r: int, kept: dict) -> None:
        stored = {k: u for k, u in kept["updates"].items() if k not in self._own_left}
        if r % self.args.federaser_interval or not stored:
            return
        theta, updates, running = self.trained(), stored, kept["running"]
        if (self.current_task, r) != min(self.history):
            message = Message({**self.broadcast()}, epochs=self.args.federaser_epochs)
            group = clients.of_task(self.current_task).only(stored)  # whoever would be drawn now
            replies = [self.expanded(reply) for reply in group.call("for_epochs", message)]
            updates = {
                reply.client: self.as_long({n: reply[n].to(t) - t for n, t in theta.items()}, stored[reply.client])
                for reply in replies
            }
            running = {reply.client: {n: reply[n] for n in self.shared_buffers()} for reply in replies}
        self.add_updates(theta, updates, kept["weights"], running)

    def as_long(self, fresh: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A fresh update with the length of the stored one."""

        def ratio(names):
            old, new = (torch.stack([u[n].double().norm() for n in names]).norm() for u in (stored, fresh))
            return float(old.cpu() / new.cpu().clamp(min=1e-30))

        if self.args.federaser_norm == "layer":
            return {n: ratio([n]) * t for n, t in fresh.items()}
        whole = ratio(list(fresh))
        return {n: whole * t for n, t in fresh.items()}
