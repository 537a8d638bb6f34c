"""Clients in turn, in this process, over one backbone: the reference every other engine must equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from federated.engines.base import Engine
from federated.message import Message


class SerialEngine(Engine):
    """Runs client halves one after the other on one worker."""

    def run(
        self, call: str, message: Message, ids: Iterable[int], task: int, round_: int
    ) -> Iterator[tuple[int, Message | None]]:
        """Yield (client id, reply) in client order."""
        self.worker.enter_task(task)
        for i in ids:
            yield i, self.answer(call, message, self.client(i, task, round_, call))
