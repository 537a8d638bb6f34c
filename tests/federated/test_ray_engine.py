"""The Ray engine against clients in turn: the same server, replies, states and sums, whoever finishes or dies."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ray = pytest.importorskip("ray", reason="the Ray engine needs requirements-ray.txt")

import main  # noqa: E402
import models  # noqa: E402
from federated.clients import Clients, Ledger  # noqa: E402
from federated.engines import ray as module  # noqa: E402
from federated.engines.base import LOST, SUM_CHUNK, add_up, chunks  # noqa: E402
from federated.engines.ray import MAX_TRIES, RayEngine, check_address  # noqa: E402
from federated.engines.ray_actor import CPU, Actor, Indices, pack, pack_state, unpack  # noqa: E402
from federated.engines.serial import SerialEngine  # noqa: E402
from federated.message import Message  # noqa: E402
from models import get_model_class  # noqa: E402
from models.utils.federated_model import FederatedModel  # noqa: E402
from tests.helpers import SMALL, assert_same_run, federated_names, finished, only_folder, run, small_args  # noqa: E402
from tests.rig import MLP, POCKET, Rig  # noqa: E402
from utils import registry  # noqa: E402
from utils.checkpoints import Writer, digest  # noqa: E402
from utils.conf import derive_seed  # noqa: E402
from utils.errors import ClientError, RunError, UserError  # noqa: E402

FILE = Path(models.__file__).parent / f"zz_test_ray_{os.getpid()}.py"
METHODS = '''
import copy
import os
import signal

import torch
from torch import nn

from federated.message import Message
from models.fedavg import FedAvg
from models.sgd import Sgd
from utils.buffer import Buffer
from utils.errors import UserError


class Fragile(FedAvg):
    """FedAvg whose clients get into trouble."""

    NAME = "zz-fragile-{pid}"
    trouble = ()

    def begin_rounds(self, clients):
        self.total = dict(clients.sum("count", Message(self.broadcast(), **dict.fromkeys(self.trouble, 1))))

    def local_update(self, message, client):
        if client.id == 1 and "killer" in message:
            os.kill(os.getpid(), signal.SIGKILL)
        if client.id == 2 and "raiser" in message:
            return {{}}["what it looks for"]
        if client.id == 2 and "user" in message:
            raise UserError("--lr is too blue")
        return Message(super().local_update(message, client), first=self.dataset.get_offsets()[0])

    def count(self, message, client):
        if client.id == 1 and "killer" in message:
            os.kill(os.getpid(), signal.SIGKILL)
        client.state["calls"] = client.state.get("calls", 0) + 1
        return Message(x=torch.randn(50, generator=client.generator), calls=client.state["calls"])


class Keeper(Sgd):
    """A central method that keeps everything a checkpoint can hold, its network's past and present among it."""

    NAME = "zz-keeper-{pid}"

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.teacher = None
        self.buffer = Buffer(20)
        self.weights = list(self.net.parameters())
        self.layer = nn.Linear(3, 2)
        self.memory = {{}}

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        outputs = self.net(inputs)
        loss = self.loss(outputs, labels)
        if self.teacher is not None:
            loss = loss + (outputs - self.teacher(inputs)).square().mean()
        loss = loss + sum(p.square().sum() for p in self.weights) * 1e-4 + self.layer.weight.sum() * 0
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=labels)
        self.memory[self.current_task, "half"] = self.weights[0].detach()[:1].bfloat16()
        with torch.no_grad():
            self.layer.weight += 1
        return loss.detach()

    def end_task(self, dataset):
        self.teacher = copy.deepcopy(self.net).eval().requires_grad_(False)
'''
FRAGILE, KEEPER = (f"zz-{kind}-{os.getpid()}" for kind in ("fragile", "keeper"))
SHORT = "--fl --num_comm_rounds 2 --n_epochs 1 --batch_size 32 --debug_mode 1 --partition_mode iid --stop_after 2"
ON_RAY = "--engine ray --workers 2 --num_threads 1"


def processes(*words: str) -> list[int]:
    """Processes that have all of the words in their command lines."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_text() if folder.name.isdigit() else ""
        except OSError:
            continue
        if line and all(w in line for w in words):
            found.append(int(folder.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Ray, started by an engine, and methods that its workers find; in the end nothing of it is left."""
    FILE.write_text(METHODS.format(pid=os.getpid()))
    registry.scan.cache_clear()
    r = Rig(f"{MLP} --model fedavg {SHORT} --num_clients 3 {ON_RAY}", tmp_path_factory.mktemp("ray"))
    engine = RayEngine(r.worker, r.partition, r.states, r.args)
    pids, folder = [w.pid for w in engine.workers], engine._folder
    pids += processes(folder)
    assert len(set(pids)) > 4 and all(map(alive, pids))
    Pooled.pool, engine.workers = [w.actor for w in engine.workers], []
    try:
        yield engine
    finally:
        FILE.unlink()
        registry.scan.cache_clear()
        engine.close()
        assert wait_until(lambda: not any(map(alive, pids)))
        assert not os.path.exists(folder) and not processes(folder)
        assert not ray.is_initialized()


class Pooled(RayEngine):
    """Takes processes that an earlier engine has used: they start again with other settings in no time.

    Answers are taken in any order, by a draw from those under way.
    """

    pool: list = []
    draws = random.Random(0)

    def _spawn(self):
        actor = self.pool.pop() if self.pool else self._actor.remote()
        return module.Worker(actor, actor.start.remote(*self._start))

    def _first(self, refs):
        ray.wait(refs, num_returns=len(refs))
        return self.draws.choice(refs)

    def close(self):
        Pooled.pool += [w.actor for w in self.workers]
        self.workers = []


@pytest.fixture
def pooled(monkeypatch):
    monkeypatch.setattr(module, "RayEngine", Pooled)
    return Pooled


def written(value, *nets) -> tuple:
    """A value by what a checkpoint would hold of it, with fingerprints for tensors."""
    writer = Writer(nets=nets)
    spec = writer.encode(value, "")
    return spec, {n: (t.dtype, t.shape, digest(t)) for n, t in writer.tensors.items()}


def content(message) -> dict:
    return {n: digest(v) if isinstance(v, torch.Tensor) else v for n, v in message.items()}


@pytest.fixture
def both(tmp_path, monkeypatch, pooled):
    """``both(flags)``: the same run in turn and on Ray, with everything that was called."""
    call, add = Clients.call, Clients.sum

    def go(flags: str, *more: str):
        results = []
        for engine in ("--engine serial", ON_RAY, *more):
            seen: list = []

            def spy_call(self, name, message, seen=seen):
                replies = call(self, name, message)
                seen.append((name, content(message), [(r.client, list(r), content(r)) for r in replies]))
                return replies

            def spy_sum(self, name, message, seen=seen):
                total = add(self, name, message)
                seen.append((name, content(message), list(total), content(total)))
                return total

            monkeypatch.setattr(Clients, "call", spy_call)
            monkeypatch.setattr(Clients, "sum", spy_sum)
            r = Rig(f"{flags} {engine}", tmp_path)
            r.run()
            nets = r.model.net, r.worker.net
            states = {i: written(s, *nets) for i, s in sorted(r.states.items())}
            results.append((seen, written(r.model, *nets), states, r.ledger.rows()))
        assert results[0][0]
        return results

    return go


# ---- the same numbers


@pytest.mark.parametrize(
    "model",
    [
        *(m for m in federated_names() if issubclass(get_model_class(m), FederatedModel)),
        *("er", "lwf", "derpp", "ewc_on"),
    ],
)
def test_every_method_gives_the_same_bits(both, model):
    """Server, replies, private states and traffic of two tasks of a round, with answers in any order."""
    serial, other = both(" ".join([*small_args(model, True), "--num_comm_rounds=1", "--stop_after=2"]))
    for a, b in zip(serial, other, strict=True):
        assert a == b


@pytest.mark.parametrize(
    "flags",
    [
        f"{POCKET} --model dolfin --dolfin_basis local",
        f"{MLP} --model {FRAGILE} --num_clients 21 --distribution_alpha 5",
        f"{MLP} --model fedavg --permute_classes 1 --validation 20",
    ],
    ids=["replies that follow on a call", "many clients", "data set with options"],
)
def test_other_settings_give_the_same_bits(both, flags):
    serial, other = both(f"{flags} {SHORT.replace('--partition_mode iid', '')}")
    for a, b in zip(serial, other, strict=True):
        assert a == b


def test_states_may_hold_whatever_a_checkpoint_holds(both):
    """A teacher, a list of the network's own weights, a buffer, a layer, tensors in half; not all clients each time."""
    serial, other = both(f"{MLP} --model {KEEPER} --num_clients 4 --participation_rate 0.5 {SHORT}")
    for a, b in zip(serial, other, strict=True):
        assert a == b
    for spec, tensors in serial[2].values():
        assert "of_net" in str(spec) and "torch.bfloat16" in str(tensors)
    assert sum("teacher.fc1" in str(tensors) for _, tensors in serial[2].values()) >= 2


def test_workers_may_stack_clients(tmp_path, pooled, monkeypatch):
    """``--clients_per_batch`` means the batched engine in the workers; what it has to say is heard once."""
    said: list = []
    monkeypatch.setattr("utils.loggers.Run.say", lambda self, line: said.append(line))
    flags = f"{MLP} --model fedavg --num_clients 5 --optimizer sgd --lr 0.01 {SHORT}"
    serial = Rig(flags, tmp_path).run().weights
    other = Rig(f"{flags} {ON_RAY} --clients_per_batch 2", tmp_path).run().weights
    far = max(float((serial[n] - other[n]).abs().max()) for n in serial)
    assert 0 < far < 1e-5  # equal but for the order of additions
    Rig(f"{MLP} --model derpp --num_clients 5 {SHORT} {ON_RAY} --clients_per_batch 2", tmp_path).run()
    assert sum("derpp trains its clients one at a time" in line for line in said) == 1


@pytest.mark.parametrize("first, then", [("serial", ON_RAY), (ON_RAY, "serial")], ids=["to ray", "from ray"])
@pytest.mark.parametrize("model", [KEEPER, "ffa_lora"], ids=["keeper", "ffa_lora"])
def test_a_run_may_change_its_engine(tmp_path, pooled, model, first, then):
    base = MLP if model == KEEPER else POCKET
    flags = f"{base} --model {model} --num_clients 3 --participation_rate 0.7 {SHORT} --stop_after 3".split()
    engine = {"serial": ["--engine", "serial"], ON_RAY: ON_RAY.split()}
    assert run(flags, tmp_path / "whole", *engine["serial"]) == 0
    assert run(flags, tmp_path / "a", *engine[first], "--savecheck", "round", "--stop_after", "1") == 0
    (folder,) = finished(tmp_path / "a")
    assert run(flags, tmp_path / "a", *engine[then], "--loadcheck", str(folder)) == 0
    assert_same_run(folder, only_folder(tmp_path / "whole"))


# ---- deaths and errors


class Prompt(Pooled):
    """Goes on with whoever is first."""

    _first = RayEngine._first


def begun(flags: str, folder) -> Rig:
    """A rig in its first task."""
    r = Rig(f"{MLP} {flags} {SHORT} {ON_RAY}", folder)
    r.dataset.get_data_loaders()
    r.model.meta_begin_task(r.dataset)
    return r


@pytest.fixture
def engine_of(tmp_path):
    """``engine_of(flags)``: a rig in its first task, an engine, and what the engine says."""
    engines = []

    def make(flags: str, cls=Pooled):
        r, said = begun(flags, tmp_path), []
        engines.append(cls(r.worker, r.partition, r.states, r.args, said.append))
        return r, engines[-1], said

    yield make
    for engine in engines:
        engine.close()


def test_a_worker_killed_in_the_middle_of_a_round_is_replaced(engine_of, tmp_path, monkeypatch):
    """Its clients are done again: same replies, and every private state has moved on once."""
    r, engine, said = engine_of(f"--model {FRAGILE} --num_clients 20", Prompt)
    other = begun(f"--model {FRAGILE} --num_clients 20", tmp_path)
    reference = SerialEngine(other.worker, other.partition, other.states, other.args)
    received, killed = RayEngine._received, []

    def kill_another(self, job, done):
        if not killed:
            killed.append(next(w.pid for w in self.workers if w.pid is not None))
            os.kill(killed[0], signal.SIGKILL)
        return received(self, job, done)

    monkeypatch.setattr(RayEngine, "_received", kill_another)
    for verb, call in (("call", "local_update"), ("sum", "count")):
        killed.clear()
        said.clear()
        replies = []
        for one in (engine, reference):
            reply = getattr(Clients(range(20), one, Ledger(), 0, 0), verb)(call, r.model.broadcast())
            replies.append([content(x) for x in (reply if verb == "call" else [reply])])
        (line,) = said
        assert line.startswith(f"engine ray: a worker died in {call} (task 0, round 0), with client")
        assert "Worker unexpectedly exits" in line and len(line) < 250
        assert replies[0] == replies[1]
        assert killed[0] not in {w.pid for w in engine.workers} and wait_until(lambda: not alive(killed[0]))
    assert [s["calls"] for _, s in sorted(r.states.items())] == [1] * 20


def test_a_client_that_kills_its_worker_is_named_and_may_be_left_out(engine_of, monkeypatch):
    r, engine, said = engine_of(f"--model {FRAGILE} --num_clients 4", Prompt)
    bomb, ledger = Message(r.model.broadcast(), killer=1), Ledger()
    monkeypatch.setattr(module, "MAX_TRIES", 1)  # it takes a while to start a worker
    with pytest.raises(RunError) as e:
        Clients(range(4), engine, Ledger(), 0, 1).call("local_update", bomb)
    text = "client 1 is lost in local_update (task 0, round 1): its worker died 1 times, at last: Worker unexpectedly"
    assert str(e.value).startswith(text) and "--allow_missing_clients goes on" in str(e.value)
    engine.args.allow_missing_clients = 1
    total = Clients(range(4), engine, ledger, 0, 1).sum("count", bomb)
    assert total["calls"] == 3 and sorted(r.states) == [0, 2, 3]
    assert [row["client"] for row in ledger.rows()] == [0, 2, 3]
    serial = SerialEngine(r.worker, r.partition, {}, r.args)
    replies = Clients([0, 2, 3], serial, Ledger(), 0, 1).call("count", bomb)
    assert torch.equal(total["x"], replies[0]["x"] + replies[1]["x"] + replies[2]["x"])
    assert "client 1 is lost" in said[-1] and "the round goes on without it" in said[-1]


def test_errors_of_a_method_arrive_as_they_were(engine_of):
    r, engine, _ = engine_of(f"--model {FRAGILE} --num_clients 4")
    group = Clients(range(4), engine, Ledger(), 0, 1)
    with pytest.raises(ClientError) as e:
        group.call("local_update", Message(r.model.broadcast(), raiser=1))
    assert str(e.value) == "client 2 failed in local_update (task 0, round 1): KeyError: 'what it looks for'"
    assert f'{FILE.name}", line' in e.value.trace and "return {}[" in e.value.trace
    with pytest.raises(UserError, match="^--lr is too blue$"):
        group.call("local_update", Message(r.model.broadcast(), user=1))
    with pytest.raises(ClientError, match="client 0 failed in nothing .*AttributeError"):
        group.only([0]).call("nothing", r.model.broadcast())
    assert len(group.call("local_update", r.model.broadcast())) == 4  # and the engine is none the worse


def test_a_worker_that_cannot_start_ends_the_run(tmp_path, monkeypatch):
    r = Rig(f"{MLP} --model fedavg {SHORT} {ON_RAY}", tmp_path)
    wrong = {"seed": None, "model": "no-such-method"}
    monkeypatch.setattr(module, "vars", lambda args: {**args.__dict__, **wrong}, raising=False)
    with pytest.raises(UserError, match="unknown model 'no-such-method'"):
        Pooled(r.worker, r.partition, {}, r.args)
    wrong.update(model="fedavg", num_clients=None, lr="much")
    with pytest.raises(ClientError, match="a worker of Ray could not start: TypeError: ") as e:
        Pooled(r.worker, r.partition, {}, r.args)
    assert "get_optimizer" in e.value.trace


# ---- any schedule


class Ref:
    def __init__(self, make, job=None) -> None:
        self.make, self.job = make, job


class Stub:
    """What an engine needs of a method, in next to no time; the reply depends on client, message and state."""

    NAME, device = "stub", CPU

    def __init__(self) -> None:
        self.net, self.dataset = torch.nn.Linear(1, 1), SimpleNamespace(c_task=0, arrays=dict)

    def enter_task(self, task) -> None:
        pass

    def fresh_state(self) -> dict:
        return {}

    def count(self, message, client) -> Message:
        calls = client.state["calls"] = client.state.get("calls", 0) + 1
        x = torch.randn(9, generator=torch.Generator().manual_seed(derive_seed(client.id, calls, message["m"])))
        return Message({"x": x, **({"odd": x[:2] * 1e6} if client.id % 2 else {})}, n=1)


@pytest.fixture
def stage(monkeypatch):
    """``stage(rng, workers, deaths)``: an engine whose workers live in this process and die of clients as told."""
    exceptions = ray.exceptions

    def make(rng, workers: int, deaths: Counter, allow: int = 1):
        log = SimpleNamespace(begun=[], open=[], most=0, said=[], reducing=False, started=1, slow=0)

        class Handle:
            def __init__(self) -> None:
                actor = self.actor = Actor()
                actor.args, actor.device, actor.key = args, CPU, -1
                actor.dataset, actor.worker, actor.partition, actor.said = Stub().dataset, Stub(), Indices(), []
                actor.engine = SerialEngine(actor.worker, actor.partition, {}, args)
                actor.fresh_net = None
                self.start = SimpleNamespace(remote=lambda *a: Ref(lambda: log.started))
                self.work = SimpleNamespace(remote=self.begin)

            def begin(self, job, *rest):
                log.begun.append(job)
                log.open.append(job)
                log.most = max(log.most, len(log.open))
                if log.reducing:
                    assert job.part - min(j.part for j in log.open) < 2 * workers

                def outcome():
                    log.open.remove(job)
                    for i in job.ids:
                        if deaths[i] > 0:
                            deaths[i] -= 1
                            raise exceptions.ActorDiedError
                    return ray.cloudpickle.loads(ray.cloudpickle.dumps(self.actor.work(job, *rest)))

                return Ref(outcome, job)

        def wait(refs, **_):
            log.slow -= 1
            if log.slow >= 0:
                return [], refs
            chosen = rng.choice(refs)
            return [chosen], [r for r in refs if r is not chosen]

        args = SimpleNamespace(
            seed=0,
            num_gpus=None,
            workers=workers,
            num_threads=1,
            ray_address=None,
            clients_per_batch=None,
            device="cpu",
        )
        args.allow_missing_clients = allow
        fake = {
            "is_initialized": lambda: True,
            "cluster_resources": lambda: {"CPU": 8.0},
            "put": lambda x: Ref(lambda: x),
            "get": lambda ref: ref.make(),
            "wait": wait,
            "kill": lambda actor: None,
            "remote": lambda cls: SimpleNamespace(options=lambda **o: SimpleNamespace(remote=Handle)),
        }
        for name, value in fake.items():
            monkeypatch.setattr(ray, name, value)
        monkeypatch.setattr(main, "build_network", lambda args, dataset: None)
        partition = SimpleNamespace(indices=lambda task, i: torch.arange(1 + i * 7 % 5))
        return RayEngine(Stub(), partition, {}, args, log.said.append), partition, args, log

    return make


@pytest.mark.parametrize("seed", range(40))
def test_any_schedule_with_any_deaths(stage, seed):
    """Random orders and deaths: what arrives is what a serial engine gives for those that are not lost."""
    rng = random.Random(seed)
    n, workers = rng.choice([1, 2, 5, 8, 9, 30, 100]), rng.choice([1, 2, 3])
    ids = sorted(rng.sample(range(200), n))
    deaths: Counter = Counter()
    engine, partition, args, log = stage(rng, workers, deaths)
    serial = SerialEngine(Stub(), partition, {}, args)
    for step in range(3):
        message = Message(m=step)
        for verb in ("run", "reduce"):
            deaths.update({i: rng.choice([1, 2, 3, 4, 5]) for i in rng.sample(ids, rng.randint(0, min(n, 3)))})
            before = {i: dict(s) for i, s in engine.states.items()}
            expected, log.reducing = dict(serial.run("count", message, ids, 0, step)), verb == "reduce"
            got = dict(getattr(engine, verb)("count", message, ids, 0, step))
            if verb == "run":
                lost = [i for i in ids if got[i] is LOST]
                assert sorted(got) == ids
                assert all(content(got[i]) == content(expected[i]) for i in ids if i not in lost)
            else:
                lost = [i for part, some in enumerate(chunks(ids)) for i in some if i not in got[part].sizes]
                expected.update(dict.fromkeys(lost, LOST))
                for part, some in enumerate(chunks(ids)):
                    right = add_up([(i, expected[i]) for i in some], "count", 0, step)
                    assert content(got[part].total) == content(right.total) and got[part].sizes == right.sizes
            for i in lost:  # as if it had not been asked
                serial.states[i] = before.get(i, {})
                assert engine.states.get(i, {}) == serial.states[i]
            assert {i: s for i, s in engine.states.items() if s} == {i: s for i, s in serial.states.items() if s}
            assert set(lost) == {int(s.split("client ")[1].split()[0]) for s in log.said if "is lost" in s}
            deaths.clear()
            log.said.clear()
    assert log.most <= workers and not log.open


def test_who_is_blamed(stage):
    """Of a chunk nobody; alone, a client after the third death."""
    engine, *_, log = stage(random.Random(0), 2, Counter({3: MAX_TRIES + 1}))
    assert dict(engine.reduce("count", Message(m=0), list(range(SUM_CHUNK)), 0, 0))[0].sizes.keys() == {
        *range(SUM_CHUNK)
    } - {3}
    assert [j.ids for j in log.begun if 3 in j.ids] == [list(range(SUM_CHUNK)), [3], [3], [3]]
    engine, *_ = stage(random.Random(0), 2, Counter({3: MAX_TRIES}), allow=0)
    with pytest.raises(RunError, match=r"^client 3 is lost in count \(task 0, round 0\): its worker died 3 times"):
        dict(engine.run("count", Message(m=0), [2, 3], 0, 0))


def test_a_worker_that_cannot_be_replaced_ends_the_run(stage):
    engine, *_, log = stage(random.Random(0), 1, Counter({3: 1}))
    log.started = ClientError("a worker of Ray could not start: OSError: no space", "trace")
    with pytest.raises(ClientError, match="no space"):
        dict(engine.run("count", Message(m=0), [3], 0, 0))


def test_waiting_for_workers_is_announced_once(stage):
    engine, *_, log = stage(random.Random(0), 1, Counter({3: 2}))
    log.slow = 2  # while a client is at work: that may take as long as it likes
    assert not log.said and dict(engine.run("count", Message(m=0), [2], 0, 0)) and not log.said
    calls, engine._after_death = engine._after_death, lambda *a: (setattr(log, "slow", 2), calls(*a))[1]
    dict(engine.run("count", Message(m=0), [3], 0, 0))
    assert sum("waiting for 1 workers; is the cluster busy?" in line for line in log.said) == 1


def test_large_clients_go_first(stage):
    engine, partition, *_, log = stage(random.Random(0), 2, Counter())
    dict(engine.run("count", Message(m=0), list(range(10)), 0, 0))
    sizes = [len(partition.indices(0, i)) for j in log.begun for i in j.ids]
    assert sizes == sorted(sizes, reverse=True) and all(len(j.ids) == 1 for j in log.begun)
    engine.args.clients_per_batch, engine.worker.local_update = 4, None
    assert [len(j.ids) for j in log.begun[-10:]] == [1] * 10


# ---- what travels


def test_what_is_packed_comes_back_to_the_bit():
    g = torch.Generator().manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
    entries = {f"{d}{s}": (torch.randn(s, generator=g) * 9).to(d) for d in kinds for s in ((), (0,), (3, 0), (2, 3))}
    entries |= {"strided": torch.arange(12.0).view(3, 4).T, "n": 3, "s": "ü", "big": 10**30, "yes": True, "x": 0.1}
    sent = ray.cloudpickle.loads(ray.cloudpickle.dumps(pack(entries, CPU)))
    back = unpack(sent, CPU)
    assert list(back) == list(entries)
    for name, value in entries.items():
        if isinstance(value, torch.Tensor):
            assert back[name].dtype == value.dtype and back[name].shape == value.shape
            assert digest(back[name]) == digest(value) and back[name].is_contiguous()
            assert back[name].numel() == 0 or back[name].data_ptr() % 64 == 0
        else:
            assert back[name] == value and type(back[name]) is type(value)


def test_tensors_find_the_device_they_had(monkeypatch):
    """What was on the sender's accelerator goes to the receiver's, what was on its CPU stays there."""
    there = torch.device("meta")
    packed = [(n, (v[0], v[1], v[2], n == "a")) for n, v in pack({"a": torch.ones(2), "b": torch.ones(2)}, CPU)]
    back = unpack(packed, there)
    assert back["a"].device == there and back["b"].device == CPU
    assert unpack(packed, CPU)["a"].device == CPU


def test_states_that_cannot_travel_are_named(stage):
    assert pack_state({}, torch.nn.Linear(1, 1)) is None
    engine, _, args, _ = stage(random.Random(0), 1, Counter())
    actor = engine.workers[0].actor.actor
    actor.engine.states[5] = {"f": open(os.devnull)}  # noqa: SIM115
    with pytest.raises(RunError, match="^client 5 keeps what cannot leave its process; use --engine serial"):
        actor.leaving(5)


# ---- what is asked of Ray


def test_a_gpu_is_divided_so_that_all_workers_fit():
    def plan(cpus, gpus, device="cuda", **flags):
        args = SimpleNamespace(**{"num_gpus": None, "workers": None, "num_threads": None, **flags})
        return RayEngine._plan(
            SimpleNamespace(args=args, worker=SimpleNamespace(device=torch.device(device))), cpus, gpus
        )

    assert plan(8, 0, "cpu") == (4, 0, 2) and plan(1, 0, "cpu") == (1, 0, 1) and plan(8, 2, "cpu") == (4, 0, 2)
    assert plan(8, 2) == (2, 1, 4) and plan(8, 2, workers=1) == (1, 1, 8) and plan(8, 2, num_gpus=0) == (4, 0, 2)
    assert plan(8, 2, workers=4, num_threads=3) == (4, 0.5, 3) and plan(8, 1, num_gpus=0.5, workers=2) == (2, 0.25, 4)
    for gpus in range(1, 9):
        for workers in range(1, 30):
            share = plan(8, gpus, workers=workers)[1]
            assert gpus * int(1 / share + 1e-3) >= workers  # whole workers on each GPU


def test_what_ray_cannot_do_is_refused(tmp_path, monkeypatch):
    def refused(flags: str, pattern: str):
        r = Rig(f"{MLP} --model fedavg {SHORT} --engine ray {flags}", tmp_path)
        with pytest.raises(UserError, match=pattern) as e:
            RayEngine(r.worker, r.partition, {}, r.args)
        assert "\n" not in str(e.value)

    refused("--workers 64", "^--workers 64: the cluster has 2 CPUs")
    refused("--num_gpus 3", "^--num_gpus 3: Ray sees 0 here; give at most that")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    refused("--num_gpus 3", "^--num_gpus 3: Ray sees 0 here")
    monkeypatch.setattr(module, "KNOCK", 0.5)
    refused("--ray_address 127.0.0.1:1", "^--ray_address 127.0.0.1:1: no Ray cluster answers .*refused")
    refused("--ray_address ray://127.0.0.1:10001", "that is no host:port")
    refused("--ray_address localhost", "that is no host:port")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        refused(f"--ray_address 127.0.0.1:{port}", "timed out")  # listens and never answers
    monkeypatch.setitem(sys.modules, "ray", None)
    refused("", r"^--engine ray needs the package ray .*pip install -r requirements-ray.txt")


def test_a_running_cluster_passes_the_check(here):
    check_address(ray.get_runtime_context().gcs_address)


# ---- the command


def test_the_command_alone_and_after_ctrl_c(tmp_path):
    """Ctrl-C at the terminal reaches every process: the round is finished all the same, and saved."""
    flags = [*SMALL, "--model=derpp", "--backbone=mnistmlp", "--fl", "--num_clients=3", "--num_comm_rounds=8"]
    flags += ["--num_threads=1", "--stop_after=2", "--buffer_size=20"]
    command = [sys.executable, "main.py", *flags, *ON_RAY.split(), f"--results_path={tmp_path / 'a'}"]
    p = subprocess.Popen(
        command, cwd=registry.ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in p.stdout:
        lines.append(line)
        if "round 2/8" in line:
            started = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and session(int(pid)) == p.pid]
            os.killpg(p.pid, signal.SIGINT)
    output = "".join(lines)
    assert p.wait() == 130 and "stopped by Ctrl-C" in output and "Traceback" not in output, output
    assert len(started) > 5 and wait_until(lambda: not any(alive(pid) for pid in started))
    folder = only_folder(tmp_path / "a")
    assert run(flags, tmp_path / "a", f"--loadcheck={folder}") == 0
    assert run(flags, tmp_path / "b") == 0
    assert_same_run(folder, only_folder(tmp_path / "b"))


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1
