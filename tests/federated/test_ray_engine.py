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

import main
import models
from federated.clients import Clients, Ledger
from federated.engines import ray as module
from federated.engines.base import LOST, SUM_CHUNK, add_up, chunks
from federated.engines.ray import MAX_TRIES, RayEngine, check_address
from federated.engines.ray_actor import CPU, Actor, Indices, pack, pack_state, unpack
from federated.engines.serial import SerialEngine
from federated.message import Message
from models import get_model_class
from models.utils.federated_model import FederatedModel
from tests.helpers import SMALL, assert_same_run, finished, only_folder, run, small_args
from tests.rig import MLP, Rig
from utils import registry
from utils.checkpoints import Writer, digest
from utils.conf import derive_seed
from utils.errors import ClientError, RunError, UserError

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
        return super().local_update(message, client)

    def count(self, message, client):
        if client.id == 1 and "killer" in message:
            os.kill(os.getpid(), signal.SIGKILL)
        client.state["calls"] = client.state.get("calls", 0) + 1
        return Message(x=torch.randn(50, generator=client.generator), calls=client.state["calls"], pid=os.getpid())


class Keeper(Sgd):
    """A central method that keeps everything a checkpoint can hold, its network's past and present among it."""

    NAME = "zz-keeper-{pid}"

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.teacher = None
        self.buffer = Buffer(20)
        self.trained = list(self.net.parameters())
        self.layer = nn.Linear(3, 2)
        self.memory = {{}}

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        outputs = self.net(inputs)
        loss = self.loss(outputs, labels)
        if self.teacher is not None:
            loss = loss + (outputs - self.teacher(inputs)).square().mean()
        loss = loss + sum(p.square().sum() for p in self.trained) * 1e-4 + self.layer.weight.sum() * 0
        loss.backward()
        self.opt.step()
        self.buffer.add_data(examples=not_aug_inputs, labels=labels)
        self.memory[self.current_task, "half"] = self.trained[0].detach()[:1].bfloat16()
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
        *(m for m in sorted(registry.scan("models")) if issubclass(get_model_class(m), FederatedModel)),
        *("er", "lwf", "derpp", "ewc_on"),
    ],
)
def test_every_method_gives_the_same_bits(both, model):
    """Server, replies, private states and traffic of two tasks of two rounds, with answers in any order."""
    serial, other = both(" ".join([*small_args(model, True), "--stop_after=2"]))
    for a, b in zip(serial, other, strict=True):
        assert a == b


@pytest.mark.parametrize(
    "flags",
    [
        f"{MLP} --model {KEEPER} --num_clients 3 --participation_rate 0.7",
        "--model dolfin --dolfin_basis local --dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu",
        "--model dolfin --dolfin_basis topk --dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu",
        f"{MLP} --model {FRAGILE} --num_clients 21 --partition_mode distribution",
        "--model fedavg --dataset perm-mnist --base_path none"
        if False
        else f"{MLP} --model fedavg --permute_classes 1",
    ],
    ids=["keeper", "dolfin local", "dolfin topk", "many clients", "permuted"],
)
def test_so_do_harder_ones(both, flags):
    serial, other = both(f"{flags.replace('--num_clients', '--num_clients')} {SHORT}")
    for a, b in zip(serial, other, strict=True):
        assert a == b
