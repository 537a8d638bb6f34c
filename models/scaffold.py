"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, Alg. 1): control variates against the drift of clients.

    y    <- y - eta_l (g_i(y) - c_i + c)                       local steps (eq. 3)
    c_i+ <- c_i - c + (x - y_i) / (K eta_l)                    option II of eq. 4
    x    <- x + eta_g mean_S(y_i - x),   c <- c + |S|/N mean_S(c_i+ - c_i)           (eq. 5)

The correction c - c_i enters as a penalty <c - c_i, y>, whose gradient it is, so any ``--optimizer`` may take the
steps. With plain SGD (x - y_i) / (K eta_l) is the mean of the corrected gradients; here that mean is what is kept,
which is the same under SGD and still the client's mean gradient under others: c_i+ = mean_k g_i(y_k).

Control variates describe the loss of one task; they start at zero in every task. A client keeps c_i as private state.
"""

from __future__ import annotations

import torch

from federated.message import Message
from models.fedavg import FedAvg
from utils.args import number


class Scaffold(FedAvg):
    """FedAvg with control variates: twice the bytes of FedAvg each way."""

    NAME = "scaffold"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    STEP_NEEDS_BEFORE = False

    @staticmethod
    def get_parser(parser):
        FedAvg.get_parser(parser)
        parser.add_argument("--scaffold_lr", type=number(float, 0), default=1.0, help="eta_g, step of the server")
        return parser

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        self.control: dict[str, torch.Tensor] = {}  # c; empty while zero
        self.n_clients = len(clients)

    def broadcast(self) -> Message:
        return Message({**super().broadcast(), **{f"c.{n}": c for n, c in self.control.items()}})

    @torch.no_grad()
    def merged(self, current, replies, weights):
        means = super().merged(current, replies, weights)
        return {n: current[n] + self.args.scaffold_lr * (mean - current[n]) for n, mean in means.items()}

    def aggregate(self, replies) -> None:
        super().aggregate(replies)
        for name in self.trainable():
            change = sum(r[f"dc.{name}"] for r in replies) / self.n_clients
            self.control[name] = self.control[name] + change if name in self.control else change

    # ---------------------------------------------------------------- client

    def before_local(self, message: Message, client) -> None:
        self._own_control = message.tensors("c.")
        if client.state.get("task") != client.task:
            client.state.clear()
            client.state.update(task=client.task, control={})
        client.state.update(total={}, steps=0)

    def local_penalty(self, trained, client):
        """<c - c_i, y>, whose gradient is the correction."""
        own, penalty = client.state["control"], None
        for name, p in trained.items():
            if name in self._own_control or name in own:
                c = self._own_control.get(name, 0) - own.get(name, 0)
                term = (c * p).sum()
                penalty = term if penalty is None else penalty + term
        return penalty

    def on_step(self, client, before, after) -> None:
        total = client.state["total"]
        for name, p in after.items():
            if p.grad is not None:
                total[name] = total[name] + p.grad if name in total else p.grad.detach().clone()
        client.state["steps"] += 1

    def after_local(self, client) -> Message:
        state, changes = client.state, {}
        total, steps, own = state.pop("total"), state.pop("steps"), state["control"]
        for name, p in self.trainable().items():
            c, old = self._own_control.get(name, 0), own.get(name, 0)
            mean = total[name] / steps if name in total else torch.zeros_like(p)
            new = old - c + mean  # the gradients of the steps held c - c_i
            changes[f"dc.{name}"] = new - old
            own[name] = new
        return Message({**super().after_local(client), **changes})
