"""The contract of a way to unlearn: a class that is mixed into the method that has trained the model.

``unlearn(clients, who)`` is the server's half: ``self`` is the server as it was when the clients asked, ``clients`` all
that own samples of the current task, those in ``who`` among them. It brings the server to a model without them, by
calling client halves (methods of the same class, as everywhere) and, where it trains, by ``more_rounds`` of the
``rest``.
Afterwards the leaving clients are gone. What the simulator keeps of past rounds (``--unlearn_history``) is
``self.history``: {(task, round): {"start", "updates", "weights"}}, tensors by the names of ``trainable``.

These are ways for methods whose server learns by averaging what clients train, and nothing else; they act on the
tensors trained in the current task, ``history`` on those of tasks before as well.
"""

from __future__ import annotations

import torch

from federated.message import Message
from models.utils.federated_model import FederatedModel
from utils.errors import UserError


class Unlearner(FederatedModel):
    """Base class of mix-ins; defines what they share."""

    TRAINING = ("local_update", "for_epochs")  # client halves that count as rounds

    @staticmethod
    def get_parser(parser):
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        """Make the server forget the clients ``who``."""
        raise NotImplementedError

    # ---------------------------------------------------------------- for those who write one

    @property
    def history(self) -> dict:
        """Past rounds.

        Raises:
            UserError: they were not kept.
        """
        kept = self.__dict__.get("_own_history")
        if not kept:
            raise UserError(
                f"--unlearn {self.UNLEARNER} needs every client's past updates, which this run has not kept: train it "
                "with --unlearn_history 1"
            )
        return kept

    def rounds_of(self, task: int) -> list[tuple[int, dict]]:
        """The rounds of a task that are known, in order."""
        return [(r, kept) for (t, r), kept in sorted(self.history.items()) if t == task]

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

    def local_epochs(self) -> int:
        own = self.__dict__.get("_own_local_epochs")
        return super().local_epochs() if own is None else own

    def for_epochs(self, message: Message, client) -> Message:
        """Client half: ``local_update`` for the number of epochs that the message says."""
        self._own_local_epochs = message["epochs"]
        try:
            return self.local_update(message, client)
        finally:
            self._own_local_epochs = None
