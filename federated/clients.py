"""The server's only way to its clients: two verbs, counted, checked and independent of the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from federated.message import Message, Reply
from utils.errors import RunError

SUM_CHUNK = 8  # replies are added in chunks of this many consecutive clients, whoever computes them


def finite(value) -> bool:
    """Whether a message entry holds no nan and no infinity."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        # a sum shows every nan and inf at a fraction of the price; it may also overflow by itself
        return math.isfinite(value.sum()) or bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)


class Ledger:
    """Bytes by direction, task, round and client.

    ``rows`` holds dicts (task, round, client, call, uplink, downlink); ``held`` what each client already keeps.
    """

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.held: dict[int, dict[str, int]] = {}
        self.uplink = self.downlink = 0

    def down(self, client: int, message: Message, sizes: dict[tuple, int]) -> int:
        """Bytes of ``message`` for ``client`` less what it holds; ``sizes`` caches sizes by what is left out."""
        held = self.held.setdefault(client, {})
        skip = tuple(n for n, v in message.keep.items() if held.get(n) == v)
        if skip not in sizes:
            sizes[skip] = (message.without(skip) if skip else message).nbytes
        held.update(message.keep)
        return sizes[skip]

    def add(self, task: int, round_: int, client: int, call: str, uplink: int, downlink: int) -> None:
        self.uplink += uplink
        self.downlink += downlink
        self.rows.append(
            {
                "task": task,
                "round": round_,
                "client": client,
                "call": call,
                "uplink_bytes": uplink,
                "downlink_bytes": downlink,
            }
        )

    def state(self) -> dict:
        """For the checkpoint; the rows as one table of integers, since there may be a million of them."""
        calls = sorted({row["call"] for row in self.rows})
        table = [[calls.index(v) if k == "call" else v for k, v in row.items()] for row in self.rows]
        rows = torch.tensor(table, dtype=torch.int64).reshape(-1, 6)
        return {"rows": rows, "calls": calls, "held": self.held, "uplink": self.uplink, "downlink": self.downlink}

    def load(self, state: dict) -> None:
        names = ("task", "round", "client", "call", "uplink_bytes", "downlink_bytes")
        self.rows = [dict(zip(names, row, strict=True)) for row in state["rows"].tolist()]
        for row in self.rows:
            row["call"] = state["calls"][row["call"]]
        self.held = state["held"]
        self.uplink, self.downlink = state["uplink"], state["downlink"]


def in_order(done: Iterable[tuple[int, object]], ids: list[int]) -> Iterator[tuple[int, object]]:
    """Pairs (client, answer) in the order of ``ids``, however the engine finished them."""
    waiting, early = list(reversed(ids)), {}
    for client, answer in done:
        early[client] = answer
        while waiting and waiting[-1] in early:
            yield waiting[-1], early.pop(waiting.pop())
    if waiting:
        raise RunError(f"the engine has no answer of client {waiting[-1]}")


class Clients:
    """Clients that take part in a phase.

    Args:
        ids: their numbers.
        engine: where the client code runs. ledger: counts the bytes. task, round_: for seeds and the ledger.
    """

    def __init__(
        self,
        ids: Iterable[int],
        engine,
        ledger: Ledger,
        task: int,
        round_: int = -1,
        progress=None,
    ) -> None:
        self.ids = sorted(ids)
        self._engine, self._ledger, self._task, self._round, self._progress = engine, ledger, task, round_, progress

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, ids: Iterable[int]) -> Clients:
        """Those of the clients that are in ``ids``."""
        return Clients(set(ids) & set(self.ids), self._engine, self._ledger, self._task, self._round, self._progress)

    def _replies(self, call: str, message: Message) -> Iterator[Reply]:
        sizes: dict[tuple, int] = {}
        done = self._engine.run(call, message, self.ids, self._task, self._round)
        if self._progress is not None:
            done = self._progress(done, len(self.ids), call)
        for client, answer in in_order(done, self.ids):
            reply = Reply(answer if answer is not None else {}, client)
            for name, value in reply.items():
                if not finite(value):
                    raise RunError(
                        f"client {client} sent a non-finite {name!r} (task {self._task}, round {self._round}, "
                        f"{call}): its update is refused; a smaller --lr or --clip_grad usually helps"
                    )
            self._ledger.add(
                self._task, self._round, client, call, reply.nbytes, self._ledger.down(client, message, sizes)
            )
            yield reply

    def call(self, call: str, message: Message) -> list[Reply]:
        """Run the client half ``call`` on every client with ``message``; replies in client order.

        Raises:
            RunError: a reply with a value that is not finite (named by client and tensor).
        """
        return list(self._replies(call, message))

    def sum(self, call: str, message: Message) -> Message:
        """Run ``call`` on every client and add the replies up, entry by entry, in client order.

        Replies are added within chunks of consecutive clients first, then chunk by chunk, so that the result is the
        same to the bit on every engine, and memory holds one running sum instead of all replies.
        """
        total: dict = {}
        chunk: dict = {}
        for i, reply in enumerate(self._replies(call, message)):
            for name, value in reply.items():
                chunk[name] = chunk[name] + value if name in chunk else value
            if i % SUM_CHUNK == SUM_CHUNK - 1 or i == len(self.ids) - 1:
                for name, value in chunk.items():
                    total[name] = total[name] + value if name in total else value
                chunk = {}
        return Message(total)
