"""The server's loop, its two verbs and the bytes they count."""

from __future__ import annotations

import random
from argparse import Namespace
from collections import Counter, defaultdict
from functools import reduce

import numpy as np
import pytest
import torch

import federated.simulator as simulator
import main
from backbones.vit_pocket import NAME as VIT
from datasets.utils.partition import Partition
from federated.clients import Clients, Ledger
from federated.engines.base import SUM_CHUNK, Engine, finite
from federated.engines.serial import SerialEngine
from federated.message import Message
from federated.simulator import participants
from models.fedavg import FedAvg
from models.utils.federated_model import FederatedModel
from tests.helpers import FEDERATED, SMALL, only_folder, rows, run, small_args
from utils.args import parse_args
from utils.checkpoints import digest
from utils.errors import RunError

LORA = [f"--backbone={VIT}", "--pretrained=0", "--stop_after=2"]
DOLFIN = ["--model=dolfin", *SMALL, *LORA, *FEDERATED]


def content(message: Message | None) -> dict:
    """What a message says, to compare by value."""
    return {n: digest(v) if isinstance(v, torch.Tensor) else v for n, v in (message or {}).items()}


# ---- who takes part


def test_number_of_participants():
    for rate, n, k in [(1, 10, 10), (0.5, 10, 5), (0.55, 10, 5), (0.01, 10, 1), (0.99, 3, 2), (0.3, 1, 1), (0.7, 3, 2)]:
        drawn = participants(Namespace(participation_rate=rate, seed=0), list(range(100, 100 + n)), 0, 0)
        assert len(drawn) == k and drawn == sorted(set(drawn)) and set(drawn) <= set(range(100, 100 + n))


def test_participants_differ_by_round_task_and_seed_and_nothing_else():
    ids = list(range(3, 43))

    def draw(seed, task, round_):
        return tuple(participants(Namespace(participation_rate=0.25, seed=seed), ids, task, round_))

    draws = {key: draw(*key) for key in [(s, t, r) for s in (0, 1) for t in range(3) for r in range(5)]}
    assert len(set(draws.values())) == len(draws)
    torch.manual_seed(99)  # the global generator has no part in it
    assert all(draw(*key) == value for key, value in draws.items())
    often = Counter(i for r in range(400) for i in draw(0, 0, r))
    assert set(often) == set(ids) and max(often.values()) < 2 * min(often.values())


def test_only_clients_with_samples_are_asked(tmp_path, monkeypatch):
    """A client without samples of a task is skipped there, and drawn where it has some."""
    seen, make, plain = defaultdict(set), Partition.make.__func__, SerialEngine.run

    def uneven(cls, dataset, args):
        tasks = make(cls, dataset, args).tasks
        empty = tasks[0][1][:0]
        tasks[0][1], tasks[1][0] = empty, empty
        return cls(tasks)

    def spy(self, call, message, ids, task, round_):
        for i, reply in plain(self, call, message, ids, task, round_):
            seen[task, call].add(i)
            yield i, reply

    monkeypatch.setattr(Partition, "make", classmethod(uneven))
    monkeypatch.setattr(SerialEngine, "run", spy)
    assert run([*small_args("ewc_on", True), "--stop_after=2"], tmp_path) == 0
    assert seen[0, "local_update"] == seen[0, "finish_task"] == {0, 2}
    assert seen[1, "local_update"] == seen[1, "finish_task"] == {1, 2}


# ---- call and sum


class Echo(Engine):
    """An engine whose clients answer what a function says, in any order."""

    def __init__(self, answer, order=None) -> None:
        self.answer, self.order = answer, order

    def run(self, call, message, ids, task, round_):
        for i in self.order or ids:
            yield i, self.answer(i)


def clients(answer, n=20, order=None, ledger=None) -> Clients:
    return Clients(range(n), Echo(answer, order), ledger or Ledger(), 2, 5)


def test_call_gives_replies_in_client_order():
    replies = clients(lambda i: Message(i=i), order=[3, 0, 4, 1, 2], n=5).call("f", Message())
    assert [r.client for r in replies] == [r["i"] for r in replies] == [0, 1, 2, 3, 4]
    assert [len(r) for r in clients(lambda i: None, n=2).call("f", Message())] == [0, 0]


@pytest.mark.parametrize("n", [1, SUM_CHUNK - 1, SUM_CHUNK, SUM_CHUNK + 1, 3 * SUM_CHUNK, 21])
def test_sum_adds_in_chunks_of_client_order(n):
    g = torch.Generator().manual_seed(n)
    values = [torch.randn(50, generator=g) * 10 ** float(torch.randn((), generator=g)) for _ in range(n)]

    def answer(i):  # not every client sends everything
        return Message({"t": values[i], **({"odd": values[i][:3]} if i % 2 else {})}, n=i)

    total = clients(answer, n).sum("f", Message())
    chunks = [reduce(torch.add, values[i : i + SUM_CHUNK]) for i in range(0, n, SUM_CHUNK)]
    assert torch.equal(total["t"], reduce(torch.add, chunks))
    torch.testing.assert_close(total["t"].double(), torch.stack(values).double().sum(0), rtol=1e-5, atol=1e-4)
    assert total["n"] == n * (n - 1) // 2
    assert ("odd" in total) == (n > 1)
    if n > 1:
        torch.testing.assert_close(total["odd"], torch.stack(values[1::2]).sum(0)[:3], rtol=1e-5, atol=1e-4)


def test_sum_does_not_depend_on_who_finishes_first():
    values = [torch.randn(200, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    in_turn = clients(lambda i: Message(t=values[i])).sum("f", Message())
    assert torch.equal(in_turn["t"], clients(lambda i: Message(t=values[i]), order=order).sum("f", Message())["t"])


def test_sum_leaves_replies_alone():
    values = [torch.ones(3) * i for i in range(10)]
    clients(lambda i: Message(t=values[i]), 10).sum("f", Message())
    assert all(torch.equal(v, torch.ones(3) * i) for i, v in enumerate(values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("verb", ["call", "sum"])
def test_updates_that_are_not_finite_are_refused(verb, bad):
    def answer(i):
        return Message({"fine": torch.ones(3), "blocks.1.B": torch.tensor([1.0, bad if i == 7 else 2.0])})

    ledger = Ledger()
    with pytest.raises(RunError, match=r"^client 7 sent a non-finite 'blocks.1.B' \(task 2, round 5, f\)"):
        getattr(clients(answer, ledger=ledger), verb)("f", Message())


@pytest.mark.parametrize("verb", ["call", "sum"])
def test_what_the_server_draws_does_not_depend_on_the_engine(verb):
    """Clients draw from the global generators of whichever process they are in."""

    def draws(of_a_client):
        torch.manual_seed(5)
        getattr(clients(lambda i: torch.rand(of_a_client) is None or Message(i=i)), verb)("f", Message())
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    assert draws(0) == draws(1) == draws(7)
    torch.manual_seed(6)
    clients(lambda i: Message(i=i)).call("f", Message())
    assert torch.rand(3).tolist() != draws(0)[0]


def test_an_engine_that_loses_a_client_is_noticed():
    with pytest.raises(RunError, match="no answer of client 2"):
        clients(lambda i: Message(), 4, order=[3, 0, 1]).call("f", Message())


def test_only_keeps_those_that_are_there():
    group = clients(lambda i: Message(), 6)
    assert group.only([5, 1, 9]).ids == [1, 5] and len(group) == 6


def test_a_diverged_run_says_who_and_ends_with_code_1(tmp_path, capsys):
    assert (
        run(["--model=fedavg", *SMALL, *FEDERATED, "--backbone=mnistmlp", "--optimizer=sgd", "--lr=1e38"], tmp_path)
        == 1
    )
    error = capsys.readouterr().err
    assert error.startswith("run failed: client 0 sent a non-finite 'fc1.weight' (task 0, round 0, local_update)")
    assert error.count("\n") == 1


# ---- bytes


@pytest.fixture
def wire(monkeypatch):
    """(call, task, round, client, message, reply) of everything that crosses the wire, as serialised."""
    record, plain = [], SerialEngine.run

    def spy(self, call, message, ids, task, round_):
        for client, reply in plain(self, call, message, ids, task, round_):
            record.append((call, task, round_, client, message, (reply or Message()).to_bytes()))
            yield client, reply

    monkeypatch.setattr(SerialEngine, "run", spy)
    return record


@pytest.mark.parametrize(
    "argv",
    [
        ["--model=fedavg", *SMALL, *FEDERATED, "--backbone=mnistmlp", "--stop_after=2", "--num_comm_rounds=3"],
        ["--model=derpp", *SMALL, *FEDERATED, "--backbone=mnistmlp", "--stop_after=2"],
        ["--model=ffa_lora", *SMALL, *LORA, *FEDERATED],
        DOLFIN,
    ],
    ids=lambda a: a[0],
)
def test_traffic_is_what_was_sent(tmp_path, wire, argv):
    """traffic.csv, rounds.csv and summary.csv against the serialised messages themselves."""
    assert run([*argv, "--participation_rate=0.7"], tmp_path) == 0
    folder = only_folder(tmp_path)
    held: dict[tuple, int] = {}
    expected = []
    for call, task, round_, client, message, reply in wire:
        sent = [n for n in message if n not in message.keep or held.get((client, n)) != message.keep[n]]
        held.update({(client, n): version for n, version in message.keep.items()})
        down = len(Message({n: message[n] for n in sent}).to_bytes())
        expected.append([task, round_, client, call, len(reply), down])
    table = [list(row.values()) for row in rows(folder / "traffic.csv")]
    assert table == [[str(v) for v in row] for row in expected]
    up, down = sum(e[4] for e in expected), sum(e[5] for e in expected)
    assert up > 0 and down > 0
    for row in (rows(folder / "summary.csv")[0], rows(folder / "rounds.csv")[-1]):
        assert float(row["uplink_mb"]) == up / 1e6 and float(row["downlink_mb"]) == down / 1e6
    # so far, not in all, after the first task
    first = [e for e in expected if e[0] == 0]
    assert float(rows(folder / "rounds.csv")[0]["uplink_mb"]) == sum(e[4] for e in first) / 1e6


def test_kept_tensors_are_counted_once_for_each_client_and_version():
    big, small = torch.zeros(1000), torch.zeros(3)
    ledger = Ledger()
    whole, rest = Message(big=big, small=small).nbytes, Message(small=small).nbytes

    def down(client, version, cache):
        return ledger.down(client, Message({"big": big, "small": small}, keep={"big": version}), cache)

    cache: dict = {}
    assert [down(0, 0, cache), down(0, 0, cache), down(1, 0, cache), down(1, 0, cache)] == [whole, rest, whole, rest]
    assert [down(0, 1, {}), down(0, 1, {}), down(2, 1, {})] == [whole, rest, whole]
    assert down(1, 0, {}) == rest  # client 1 has not seen version 1
    restored = Ledger()
    restored.load(ledger.state())
    ledger = restored
    assert down(1, 1, {}) == whole and down(2, 1, {}) == rest


def test_a_ledger_is_stored_as_a_table():
    """Rows of all rounds and clients: as JSON they would outgrow the header of a checkpoint."""
    ledger = Ledger()
    for i in range(7):
        ledger.add(i, -1, 2 * i, "fg"[i % 2], 2**40 + i, i)
    state = ledger.state()
    assert state["rows"].dtype == torch.int64 and state["rows"].shape == (7, 6)
    again = Ledger()
    again.load(state)
    assert again.rows() == ledger.rows() and (again.uplink, again.downlink) == (ledger.uplink, ledger.downlink)
    again.load(Ledger().state())
    assert again.rows() == []


# ---- what must not be written to


@pytest.mark.parametrize(
    "argv",
    [
        *[[*DOLFIN, f"--dolfin_basis={b}"] for b in ("cov", "topk", "local")],
        ["--model=ffa_lora", *SMALL, *LORA, *FEDERATED],
        ["--model=fedavg", *SMALL, *LORA, *FEDERATED, "--tuning=lora"],
        ["--model=fedavg", *SMALL, *FEDERATED, "--backbone=mnistmlp", "--stop_after=2"],
        ["--model=lwf", *SMALL, *FEDERATED, "--backbone=mnistmlp", "--stop_after=2"],
    ],
    ids=lambda a: f"{a[0]} {a[-1]}",
)
def test_clients_do_not_write_into_messages(tmp_path, monkeypatch, argv):
    plain = SerialEngine.run

    def spy(self, call, message, ids, task, round_):
        before = content(message)
        for client, reply in plain(self, call, message, ids, task, round_):
            assert content(message) == before, (call, client)
            replies.append((client, reply, content(reply)))
            yield client, reply
        for client, reply, sent in replies:  # nor into what an earlier client has sent
            assert content(reply) == sent, (call, client)
        replies.clear()

    replies: list = []
    monkeypatch.setattr(SerialEngine, "run", spy)
    assert run(argv, tmp_path) == 0


def test_the_worker_shares_the_frozen_weights_of_the_server():
    _, server, worker, _ = main.build(parse_args(DOLFIN))
    mine, theirs = dict(server.net.named_parameters()), dict(worker.net.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[n].data_ptr() == theirs[n].data_ptr() and mine[n] is not theirs[n] for n in mine)
    worker.enter_task(0)
    assert all(mine[n].data_ptr() == theirs[n].data_ptr() for n in mine)
    own = {p.data_ptr() for p in worker.trainable().values()}
    assert not own & {p.data_ptr() for p in [*server.net.parameters(), *server.parameters()]}


@pytest.mark.parametrize("argv", [["--model=ffa_lora", *SMALL, *LORA, *FEDERATED], DOLFIN], ids=lambda a: a[0])
def test_frozen_weights_are_shared_and_never_written(tmp_path, monkeypatch, argv):
    """Through a whole run: the tensors that the network began with keep their bits, used or replaced."""
    kept: list = []
    plain = simulator.simulate

    def spy(session, worker, partition, checkpoint=None):
        began = {n: p.data for n, p in session.model.net.named_parameters() if not p.requires_grad}
        before = {n: digest(t) for n, t in began.items()}
        plain(session, worker, partition, checkpoint)
        assert {n: digest(t) for n, t in began.items()} == before
        server, client = dict(session.model.net.named_parameters()), dict(worker.net.named_parameters())
        kept.extend(n for n in began if server[n].data_ptr() == began[n].data_ptr() == client[n].data_ptr())

    monkeypatch.setattr(simulator, "simulate", spy)
    assert run(argv, tmp_path) == 0
    assert sum("mlp" in n for n in kept) >= 8 and any("patch_embed" in n for n in kept)


def test_clients_train_alone(tmp_path, monkeypatch):
    """A reply depends on the message and the client, not on who came before."""
    replies: list = []
    plain = SerialEngine.run

    def backwards(self, call, message, ids, task, round_):
        return plain(self, call, message, list(ids)[::-1], task, round_)

    def record(self, replied):
        replies.append({r.client: content(r) for r in replied})
        return aggregate(self, replied)

    for model in ("fedavg", "derpp"):
        aggregate = FederatedModel.aggregate
        with monkeypatch.context() as m:
            m.setattr(FederatedModel, "aggregate", record)
            assert run([*small_args(model, True), "--stop_after=2"], tmp_path / model / "a") == 0
            m.setattr(SerialEngine, "run", backwards)
            assert run([*small_args(model, True), "--stop_after=2"], tmp_path / model / "b") == 0
        half = len(replies) // 2
        assert half and replies[:half] == replies[half:]
        replies.clear()


# ---- the loop


def test_phases_in_order(tmp_path, monkeypatch):
    log: list = []

    class Loud(FedAvg):
        def begin_rounds(self, group):
            log.append(("begin", self.current_task, group.ids))

        def round(self, group, r):
            log.append(("round", self.current_task, r))
            super().round(group, r)

        def end_rounds(self, group):
            log.append(("end", self.current_task, group.ids))

    monkeypatch.setattr("models.get_model_class", lambda name: Loud)
    assert run([*small_args("fedavg", True), "--stop_after=2"], tmp_path) == 0
    everyone = [0, 1, 2]
    assert log == [
        step
        for t in (0, 1)
        for step in [("begin", t, everyone), ("round", t, 0), ("round", t, 1), ("end", t, everyone)]
    ]


def test_evaluation_between_rounds_changes_nothing(tmp_path):
    argv = [*small_args("derpp", True), "--num_comm_rounds=3", "--stop_after=2"]
    assert run(argv, tmp_path / "a") == 0
    assert run([*argv, "--eval_every=1", "--enable_other_metrics=1"], tmp_path / "b") == 0
    a, b = only_folder(tmp_path / "a"), only_folder(tmp_path / "b")
    ours, theirs = rows(a / "rounds.csv"), rows(b / "rounds.csv")
    assert [r["round"] for r in ours] == ["-1"] * 2 and [r["round"] for r in theirs] == ["0", "1", "-1"] * 2
    assert [r["faa"] for r in ours] == [r["faa"] for r in theirs if r["round"] == "-1"]
    assert (a / "traffic.csv").read_bytes() == (b / "traffic.csv").read_bytes()


@pytest.mark.parametrize(
    "value, good", [(1.5, True), (float("nan"), False), (float("inf"), False), (3, True), ("a", True)]
)
def test_plain_numbers_are_checked_too(value, good):
    assert finite(value) is good
    assert finite(torch.tensor([1e38, 1e38, 1e38, 1e38]))  # the sum overflows, the values are finite
    assert not finite(torch.tensor([1.0, float("nan")]))
