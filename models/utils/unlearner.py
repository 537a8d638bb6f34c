"""The contract of a way to unlearn: a class that is mixed into the method that has trained the model.

``unlearn(clients, who)`` is the server's half: ``self`` is the server as it was when the clients asked, ``clients`` all
that own samples of the current task, those in ``who`` among them. It brings the server to a model without them, by
calling client halves (methods of the same class, as everywhere) and, where it trains, by ``more_rounds`` of the
``rest``.
Afterwards the leaving clients are gone. What the simulator keeps of past rounds (``--unlearn_history``) is
``self.history``: {(task, round): {"start", "updates", "weights", "running"}}, tensors by the names of ``trainable``,
the last those of ``shared_buffers`` as each client sent them.

A way with ``REPLAYS`` goes through the training again instead, from its beginning and without the leaving clients:
after ``plan(who)`` the simulator runs all tasks up to the moment of the request, with ``replayed_round`` in place of
``round`` wherever a round is known.

These are ways for methods whose server learns by averaging what clients train, and nothing else. Those that act on the
model as it is act on the tensors trained in the current task and, where they ask a client for its images, on those of
the current task, as clients keep none of tasks that are over; ``history`` acts on all tasks, and so do replays.
"""

from __future__ import annotations

import torch

from federated.message import Message
from models.utils.federated_model import FederatedModel
from utils.errors import UserError


class Unlearner(FederatedModel):
    """Base class of mix-ins; defines what they share."""

    UPDATES = ("for_epochs",)
    TRAINING = ("local_update", "for_epochs")  # client halves that count as rounds
    REPLAYS = False
    NEEDS_HISTORY = False  # whether it reads ``history``
    ON_TASK_VECTORS = True  # whether it can act on vectors that are added to a frozen network

    @staticmethod
    def get_parser(parser):
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        """Make the server forget the clients ``who``."""
        raise NotImplementedError

    def plan(self, who: list[int]) -> None:
        """What a way with ``REPLAYS`` decides before training is gone through again; ``history`` is whole."""
        self._own_left = set(who)

    def replayed_round(self, clients, r: int, kept: dict) -> None:
        """A round of a way with ``REPLAYS``; ``clients`` without those who left, ``kept`` what is known of it."""
        raise NotImplementedError

    def round(self, clients, r: int) -> None:
        kept = None if getattr(self, "_own_left", None) is None else self.history.get((self.current_task, r))
        if kept is None:
            self.method_round(clients, r)
        else:
            self.replayed_round(clients, r, kept)

    def method_round(self, clients, r: int) -> None:
        """A round of the method that has trained the model."""
        super().round(clients, r)

    # ---------------------------------------------------------------- for those who write one

    @property
    def history(self) -> dict:
        """Past rounds.

        Raises:
            UserError: there are none, as clients train nothing that is averaged.
        """
        kept = self.__dict__.get("_own_history")
        if not kept:
            raise UserError(f"--unlearn {self.UNLEARNER}: clients of {self.NAME} send no updates that are averaged")
        return kept

    def rounds_of(self, task: int) -> list[tuple[int, dict]]:
        """The rounds of a task that are known, in order."""
        return [(r, kept) for (t, r), kept in sorted(self.history.items()) if t == task]

    def add_updates(self, start, updates: dict, weights: dict, running: dict) -> None:
        """theta = start + sum_k p_k u_k over the clients of ``updates``, with the mean of their running statistics.

        Args:
            start: {name: tensor}. updates, running: {client: {name: tensor}}. weights: p_k by client, of any sum.
        """
        p = {k: weights[k] / sum(weights[j] for j in updates) for k in updates}
        theta = {n: t + sum(p[k] * u[n].to(t) for k, u in updates.items()) for n, t in start.items()}
        self.set_trained(theta)
        for n, b in self.shared_buffers().items():
            b.data = sum(p[k] * running[k][n].to(b) for k in updates)

    @staticmethod
    def rest(clients, who: list[int]):
        """The clients that stay."""
        return clients.only(set(clients.ids) - set(who))

    @torch.no_grad()
    def set_trained(self, tensors: dict[str, torch.Tensor]) -> None:
        """Give what is trained new values, by name, and put them where the method puts what it has aggregated."""
        mine = self.trainable()
        for name, value in tensors.items():
            mine[name].data = value.to(mine[name]).clone()
        head = getattr(self, "head", None)
        if head is not None:
            head.put(self.net.classifier)

    def trained(self) -> dict[str, torch.Tensor]:
        """Copies of what is trained, by name."""
        return {n: p.detach().clone() for n, p in self.trainable().items()}

    def for_epochs(self, message: Message, client) -> Message:
        """Client half: ``local_update`` for the number of epochs that the message says."""
        return self.local_update(message, client)

    def load(self, message: Message) -> None:
        self._own_local_epochs = message.get("epochs")
        super().load(message)

    def local_epochs(self) -> int:
        return self.__dict__.get("_own_local_epochs") or super().local_epochs()
