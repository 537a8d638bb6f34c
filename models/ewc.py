"""Federated online EWC, as fed-mammoth has it: one Fisher matrix and one anchor for all clients.

    L_c = CE(f(x), y) + e_lambda * sum_j F_j (theta_j - theta*_j)^2
    F  <- gamma * F + sum_c F_c / sum_c n_c,   F_c = sum_x p(y|x) * (grad log p(y|x))^2 over the data of client c

theta*: the server's weights at the end of the last task, under which every client of it takes F_c. Softmax and loss are
over the current task's classes. EWC: Kirkpatrick et al. 2017, arXiv 1612.00796; online: Schwarz et al. 2018, arXiv
1805.06370. F and theta* travel to a client once per task. ``ewc_on`` is the central method; under --fl its F and theta*
are each client's own.

fed-mammoth leaves out the last round of a task (clients reply without having trained, so as to hold the server's
weights for the pass) and, in mixed precision, scales the penalty's gradient away; neither is reproduced.
"""

from __future__ import annotations

from federated.message import Message
from models.fedavg import FedAvg
from models.utils.fisher import FisherPass, add_fisher_args
from utils.args import number


class Ewc(FisherPass, FedAvg):
    """FedAvg whose clients are held where the tasks before were learnt."""

    NAME = "ewc"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        FedAvg.get_parser(parser)
        parser.add_argument("--e_lambda", type=number(float, 0), default=1.0, help="weight of the penalty")
        parser.add_argument("--gamma", type=number(float, 0, 1), default=0.9, help="decay of the old Fisher matrix")
        add_fisher_args(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.fish, self.checkpoint = {}, {}  # F and theta* by name

    # ---------------------------------------------------------------- server

    def broadcast(self) -> Message:
        held = {f"{kind}.{n}": t for kind in ("fish", "checkpoint") for n, t in getattr(self, kind).items()}
        return Message({**super().broadcast(), **held}, keep=dict.fromkeys(held, self.current_task))

    def end_rounds(self, clients) -> None:
        total = clients.sum("fisher_sum", self.broadcast())
        old, gamma, n = self.fish, self.args.gamma, total["n_samples"]
        self.fish = {name: f / n + (gamma * old[name] if old else 0) for name, f in total.tensors().items()}
        mine = self.trainable()
        self.checkpoint = {name: mine[name].detach().clone() for name in self.fish}

    # ---------------------------------------------------------------- client

    def fisher_sum(self, message: Message, client) -> Message:
        """F_c; rows of the head that only this task trains cannot move later and are left out."""
        self.load(message)
        fisher = {n: f for n, f in self.fisher(client).items() if not n.startswith("head.")}
        return Message(fisher, n_samples=client.n_samples)

    def before_local(self, message, client) -> None:
        self._own_held = [
            (n, f.to(self.device), message[f"checkpoint.{n}"].to(self.device))
            for n, f in message.tensors("fish.").items()
        ]

    def local_penalty(self, trained, client):
        far = [(f * (trained[n] - start).square()).sum() for n, f, start in self._own_held]
        return self.args.e_lambda * sum(far) if far else None
