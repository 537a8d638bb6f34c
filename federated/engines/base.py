"""What every engine does: make clients, run a client half on each, add up what is additive."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import torch

from federated.client import Client
from federated.message import Message
from utils.conf import set_random_seed
from utils.errors import ClientError, RunError, UserError

SUM_CHUNK = 8  # replies are added in chunks of this many consecutive clients, whoever computes them


class Partial(NamedTuple):
    """The sum of the replies of one chunk of clients.

    Attributes:
        total: entries added up. sizes: bytes of each client's own reply, by client; a client that is missing was lost.
    """

    total: dict
    sizes: dict[int, int]


def finite(value) -> bool:
    """Whether a message entry holds no nan and no infinity."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)


def in_order(done: Iterable[tuple[int, object]], ids: list[int]) -> Iterator[tuple[int, object]]:
    """Pairs (client, answer) in the order of ``ids``, however the engine finished them."""
    waiting, early = list(reversed(ids)), {}
    for client, answer in done:
        early[client] = answer
        while waiting and waiting[-1] in early:
            yield waiting[-1], early.pop(waiting.pop())
    if waiting:
        raise RunError(f"the engine has no answer of client {waiting[-1]}")


def checked(answer: Message | None, client: int, call: str, task: int, round_: int) -> Message:
    """The reply of a client, an empty one for None.

    Raises:
        RunError: a value in it is not finite.
    """
    reply = answer if answer is not None else Message()
    # a sum shows every nan and inf at a fraction of the price; it may also overflow by itself
    sums = [t.sum().double() for t in reply.tensors().values() if t.is_floating_point()]
    if sums and torch.stack(sums).isfinite().all():  # a device is asked once, not for each tensor
        suspects: Iterable = reply.numbers().items()
    else:
        suspects = reply.items()
    for name, value in suspects:
        if not finite(value):
            raise RunError(
                f"client {client} sent a non-finite {name!r} (task {task}, round {round_}, {call}): its update is "
                "refused; a smaller --lr or --clip_grad usually helps"
            )
    return reply


def chunks(ids: list[int], size: int = SUM_CHUNK) -> list[list[int]]:
    """Consecutive runs of at most ``size`` clients."""
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def add_up(answers: Iterable[tuple[int, object]], call: str, task: int, round_: int) -> Partial:
    """The sum of some clients' answers, in the order in which they come.

    Raises:
        RunError: a reply that is not finite, by client and entry.
    """
    total: dict = {}
    sizes: dict[int, int] = {}
    for client, answer in answers:
        if answer is LOST:
            continue
        reply = checked(answer, client, call, task, round_)
        sizes[client] = reply.nbytes
        for name, value in reply.items():
            total[name] = total[name] + value if name in total else value
    return Partial(total, sizes)


class Lost:
    """The answer of a client that no worker could carry to the end (``--allow_missing_clients``)."""


LOST = Lost()


class Engine:
    """Where client code runs. A subclass writes :meth:`run`, and may write :meth:`reduce` and :meth:`close`.

    Args:
        worker: the method's instance for the client side. Its frozen tensors are the server's own.
        partition: who owns which samples. states: private state by client id (shared with the simulator).
    """

    def __init__(self, worker, partition, states: dict[int, dict], args) -> None:
        self.worker, self.partition, self.states, self.args = worker, partition, states, args

    def run(
        self, call: str, message: Message, ids: Iterable[int], task: int, round_: int
    ) -> Iterator[tuple[int, Message | None | Lost]]:
        """Yield (client id, reply) of every client, in any order."""
        raise NotImplementedError

    def reduce(
        self, call: str, message: Message, ids: list[int], task: int, round_: int
    ) -> Iterator[tuple[int, Partial]]:
        """Yield (index of the chunk, its sum) for the chunks of ``ids``, in any order.

        Replies are added in client order within a chunk, so a sum is the same to the bit wherever it was made.

        Raises:
            RunError: a reply that is not finite, by client and entry.
        """
        answers = in_order(self.run(call, message, ids, task, round_), ids)
        for n, chunk in enumerate(chunks(ids)):
            yield n, add_up(islice(answers, len(chunk)), call, task, round_)

    def close(self) -> None:
        """Give back what the engine holds (processes)."""

    def largest_first(self, ids: Iterable[int], task: int) -> list[int]:
        """The clients by falling number of samples of a task, then by number."""
        return sorted(ids, key=lambda i: (-len(self.partition.indices(task, i)), i))

    # ---- for engines that run client code in this process

    def client(self, i: int, task: int, round_: int, call: str) -> Client:
        """A client at the start of a call: its data, its private state, its generators."""
        indices, state = self.partition.indices(task, i), self.states.setdefault(i, {})
        return Client(i, self.worker.dataset, indices, state, self.args, task, round_, call)

    def answer(self, call: str, message: Message, client: Client) -> Message | None:
        """One client's reply.

        Raises:
            ClientError: the method's own code failed.
        """
        set_random_seed(client.seed)
        with blaming(call, f"client {client.id}", client.task, client.round):
            return getattr(self.worker, call)(message, client)


@contextmanager
def blaming(call: str, who: str, task: int, round_: int) -> Iterator[None]:
    """Within the block, an exception of the method's code becomes a ClientError that says where it happened."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as e:
        message = f"{who} failed in {call} (task {task}, round {round_}): {type(e).__name__}: {e}"
        raise ClientError(message, traceback.format_exc()) from e
