"""Nothing is done: the model as it is, and with --recover_rounds what the others make of it."""

from __future__ import annotations

from models.utils.unlearner import Unlearner


class NoOp(Unlearner):
    NAME = "noop"

    def unlearn(self, clients, who: list[int]) -> None:
        pass
