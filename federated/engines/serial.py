"""Clients in turn, in this process, over one backbone: the reference every other engine must equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from federated.client import Client
from federated.message import Message
from utils.conf import set_random_seed


class SerialEngine:
    """Runs client halves one after the other on one worker.

    Args:
        worker: the method's instance for the client side. Its frozen tensors are the server's own.
        partition: who owns which samples. states: private state by client id (shared with the simulator).
    """

    def __init__(self, worker, partition, states: dict[int, dict], args) -> None:
        self.worker, self.partition, self.states, self.args = worker, partition, states, args

    def run(
        self, call: str, message: Message, ids: Iterable[int], task: int, round_: int
    ) -> Iterator[tuple[int, Message]]:
        """Yield (client id, reply) in client order."""
        self.worker.enter_task(task)
        for i in ids:
            client = Client(
                i,
                self.worker.dataset,
                self.partition.indices(task, i),
                self.states.setdefault(i, {}),
                self.args,
                task,
                round_,
                call,
            )
            set_random_seed(client.seed)
            reply = getattr(self.worker, call)(message, client)
            yield i, reply
