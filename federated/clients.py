"""The server's only way to its clients: two verbs, counted, checked and independent of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from federated.engines.base import LOST, checked, chunks, in_order
from federated.message import Message, Reply
from utils.conf import make_generator, set_random_seed
from utils.errors import RunError

COLUMNS = ("task", "round", "client", "call", "uplink_bytes", "downlink_bytes")


class Ledger:
    """Bytes by direction, task, round and client.

    A row has the ``COLUMNS``; the call is an index into ``calls``. ``held`` is what each client already keeps.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held: dict[int, dict[str, int]] = {}
        self.uplink = self.downlink = 0
        self._blocks: list[torch.Tensor] = []  # (n, 6) int64: there may be a million rows
        self._latest: list[tuple] = []

    def down(self, client: int, message: Message, sizes: dict[tuple, int]) -> int:
        """Bytes of ``message`` for ``client`` less what it holds; ``sizes`` caches sizes by what is left out."""
        held = self.held.setdefault(client, {}) if message.keep else {}
        skip = tuple(n for n, v in message.keep.items() if held.get(n) == v)
        if skip not in sizes:
            sizes[skip] = (message.without(skip) if skip else message).nbytes
        held.update(message.keep)
        return sizes[skip]

    def add(self, task: int, round_: int, client: int, call: str, uplink: int, downlink: int) -> None:
        if call not in self.calls:
            self.calls.append(call)
        self.uplink += uplink
        self.downlink += downlink
        self._latest.append((task, round_, client, self.calls.index(call), uplink, downlink))

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) + len(self._latest)

    def rows(self, start: int = 0) -> list[dict]:
        """The rows from ``start`` on, as dicts."""
        rows = [dict(zip(COLUMNS, row)) for row in self._table()[start:].tolist()]
        for row in rows:
            row["call"] = self.calls[row["call"]]
        return rows

    def _table(self) -> torch.Tensor:
        """All rows as one table of integers."""
        if self._latest:
            self._blocks.append(torch.tensor(self._latest, dtype=torch.int64))
            self._latest = []
        if len(self._blocks) != 1:
            self._blocks = [torch.cat(self._blocks) if self._blocks else torch.empty(0, 6, dtype=torch.int64)]
        return self._blocks[0]

    def state(self) -> dict:
        """For the checkpoint."""
        return {
            "rows": self._table(),
            "calls": self.calls,
            "held": self.held,
            "uplink": self.uplink,
            "downlink": self.downlink,
        }

    def load(self, state: dict) -> None:
        self._blocks, self._latest, self.calls = [state["rows"].cpu()], [], list(state["calls"])
        self.held = state["held"]
        self.uplink, self.downlink = state["uplink"], state["downlink"]


def participants(args, ids: list[int], task: int, round_: int) -> list[int]:
    """The clients drawn for a round: ``max(1, int(rate * len(ids)))`` of those that own samples of the task."""
    k = max(1, int(args.participation_rate * len(ids)))
    if k == len(ids):
        return list(ids)
    order = torch.randperm(len(ids), generator=make_generator(args.seed, "participants", task, round_))
    return sorted(ids[i] for i in order[:k].tolist())


def _draw_seed() -> int:
    """What the server's global generators go on from after a call, wherever clients have drawn from them meanwhile."""
    return int(torch.randint(2**62, ()))


class Clients:
    """Clients that take part in a phase.

    Args:
        ids: their numbers.
        engine: where the client code runs. ledger: counts the bytes. task, round_: for seeds and the ledger.
        watch: sees the name and the replies of every call.
    """

    def __init__(
        self,
        ids: Iterable[int],
        engine,
        ledger: Ledger,
        task: int,
        round_: int = -1,
        progress=None,
        watch=None,
    ) -> None:
        self.ids = sorted(ids)
        self._engine, self._ledger, self._task, self._round, self._progress = engine, ledger, task, round_, progress
        self._watch = watch

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, ids: Iterable[int]) -> Clients:
        """Those of the clients that are in ``ids``."""
        return self._group(set(ids) & set(self.ids), self._task)

    def of_task(self, task: int) -> Clients:
        """All clients that own samples of another task, for a method whose workers can be brought to any task."""
        ids = [i for i, n in enumerate(self._engine.partition.sizes(task)) if n > 0]
        return self._group(ids, task)

    def at(self, round_: int) -> Clients:
        """The same clients in a round, whose number seeds their draws."""
        group = self._group(self.ids, self._task)
        group._round = round_
        return group

    def _group(self, ids: Iterable[int], task: int) -> Clients:
        return Clients(ids, self._engine, self._ledger, task, self._round, self._progress, self._watch)

    def _watched(self, done: Iterator, total: int, call: str) -> Iterator:
        return done if self._progress is None else self._progress(done, total, call)

    def _where(self, call: str) -> str:
        return f"(task {self._task}, round {self._round}, {call})"

    def call(self, call: str, message: Message) -> list[Reply]:
        """Run the client half ``call`` on every client with ``message``; replies in client order.

        Raises:
            RunError: a reply with a value that is not finite (named by client and tensor), or no reply at all.
        """
        sizes: dict[tuple, int] = {}
        replies, server = [], _draw_seed()
        done = self._engine.run(call, message, self.ids, self._task, self._round)
        for client, answer in in_order(self._watched(done, len(self.ids), call), self.ids):
            if answer is LOST:
                continue
            reply = Reply(checked(answer, client, call, self._task, self._round), client)
            down = self._ledger.down(client, message, sizes)
            self._ledger.add(self._task, self._round, client, call, reply.nbytes, down)
            replies.append(reply)
        set_random_seed(server)
        if self._watch is not None:
            self._watch(call, replies)
        if self.ids and not replies:
            raise RunError(f"no client is left {self._where(call)}")
        return replies

    def sum(self, call: str, message: Message) -> Message:
        """Run ``call`` on every client and add the replies up, entry by entry, in client order.

        Replies are added within chunks of consecutive clients first, where they arise, then chunk by chunk: the result
        is the same to the bit on every engine, and memory holds one running sum instead of all replies.

        Raises:
            RunError: as for :meth:`call`.
        """
        sizes: dict[tuple, int] = {}
        total: dict = {}
        n, answered, server = len(chunks(self.ids)), 0, _draw_seed()
        done = self._engine.reduce(call, message, self.ids, self._task, self._round)
        for _, partial in in_order(self._watched(done, n, call), list(range(n))):
            for client, uplink in partial.sizes.items():
                down = self._ledger.down(client, message, sizes)
                self._ledger.add(self._task, self._round, client, call, uplink, down)
            for name, value in partial.total.items():
                total[name] = total[name] + value if name in total else value
            answered += len(partial.sizes)
        set_random_seed(server)
        if self.ids and not answered:
            raise RunError(f"no client is left {self._where(call)}")
        return Message(total)
