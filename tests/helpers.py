"""What several test files share: small runs in this process, and runs that die at a chosen moment."""

from __future__ import annotations

import copy
import csv
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

import main
from datasets.utils.loaders import BatchLoader
from federated.client import Client
from models import get_model_class, get_model_names
from models.utils.federated_model import FederatedModel
from utils import checkpoints
from utils.args import parse_args
from utils.errors import UserError
from utils.training import Session

SMALL = ["--dataset=seq-digits", "--debug_mode=1", "--n_epochs=1", "--batch_size=32", "--device=cpu"]
FEDERATED = ["--fl", "--num_clients=3", "--num_comm_rounds=2", "--partition_mode=iid"]
BACKBONES = (["--backbone=mnistmlp"], ["--backbone=vit-pocket", "--pretrained=0"], ["--backbone=sresnet-pocket"])
SMALLER = dict.fromkeys(("coda_prompt", "coda_lwf"), ["--pool_size=20"])  # orthonormal rows of a small network
SMALLER |= dict.fromkeys(("spiking-sgd", "ser", "sderpp", "staer"), ["--T=2", "--batch_size=8"])
TIMES = {"train_seconds", "train_cpu_seconds", "total_seconds", "peak_memory_mb", "kfac_seconds"}


def federated_names() -> list[str]:
    """All methods that run under --fl."""
    return [m for m in get_model_names() if not get_model_class(m).CENTRAL_ONLY]


@cache
def small_args(model: str, fl: bool) -> list[str] | None:
    """Arguments of a small run of a method, with the smallest network it takes; None if it has no such setting."""
    setting = FEDERATED if fl else []
    cls = get_model_class(model)
    if getattr(cls, "CENTRAL_ONLY" if fl else "FEDERATED_ONLY", False):
        return None
    for backbone in BACKBONES:
        argv = [f"--model={model}", *SMALL, *backbone, *setting, *SMALLER.get(model, ())]
        try:
            main.build(parse_args(argv))
            return argv
        except UserError as e:
            refused = e
    raise refused


def run(argv: list[str], results: Path, *more: str) -> int:
    """``main`` with the results somewhere temporary. Returns the exit code."""
    return main.main([*argv, f"--results_path={results}", *more])


def folders(results: Path) -> list[Path]:
    """The folders of runs under a results folder, oldest first."""
    return sorted({f.parent for f in Path(results).rglob("args.yaml")}, key=lambda p: p.stat().st_ctime_ns)


def finished(results: Path) -> list[Path]:
    """Those of the folders whose run has come to its end."""
    summaries = {f: f / "summary.csv" for f in folders(results)}
    return [f for f, s in summaries.items() if s.exists() and rows(s)[0]["status"] in ("finished", "stopped")]


def only_folder(results: Path) -> Path:
    """The folder of the one run under ``results``."""
    (folder,) = folders(results)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    """A CSV file as dicts."""
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def without(table: list[dict], columns) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in columns} for row in table]


def assert_same_run(a: Path, b: Path) -> None:
    """Two run folders hold the same numbers; only clocks, memory, names and command lines may differ."""
    assert (a / "accuracy.csv").read_bytes() == (b / "accuracy.csv").read_bytes()
    assert without(rows(a / "rounds.csv"), TIMES) == without(rows(b / "rounds.csv"), TIMES)
    for name in ("traffic.csv", "partition.npz"):
        assert (a / name).exists() == (b / name).exists()
    if (a / "traffic.csv").exists():
        assert (a / "traffic.csv").read_bytes() == (b / "traffic.csv").read_bytes()
    assert without(rows(a / "summary.csv"), TIMES | {"run", "command"}) == without(
        rows(b / "summary.csv"), TIMES | {"run", "command"}
    )


def inputs_of(net, loader):
    """Inputs (n x d, float64) of every linear layer but the head in a copy of a network, and the features as 'head'."""
    net, seen = copy.deepcopy(net).eval(), {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "classifier":
            module.register_forward_pre_hook(
                lambda m, args, n=name: seen.setdefault(n, []).append(args[0].reshape(-1, args[0].shape[-1]).double())
            )
    with torch.no_grad():
        for x, *_ in loader:
            seen.setdefault("head", []).append(net(x, returnt="features").double())
    return {n: torch.cat(x) for n, x in seen.items()}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing is tidied up after it."""


class Mortal:
    """Numbers the moments of a run, and lets the process "die" at one of them.

    A moment is (task, step, kind, n): the n-th event of its kind since the cursor came to (task, step). It has the same
    name in a run from the start and in one resumed before it.

    Attributes:
        moments: those that passed in the last run, in order. die_at: the moment to die at; None to live.
    """

    def __init__(self, monkeypatch) -> None:
        self.die_at, self.dead = None, False
        self.moments: list[tuple] = []
        self.session: Session | None = None
        self._wrap(monkeypatch)

    def moment(self, kind: str) -> None:
        if self.session is None:
            return
        where = (self.session.cursor["task"], self.session.cursor["step"], kind)
        self._count[where] += 1
        self.moments.append((*where, self._count[where]))
        if self.moments[-1] == self.die_at:
            self.dead = True
            raise Killed

    def _wrap(self, monkeypatch) -> None:
        mortal = self

        def around(cls, name: str, before: str | None, after: str | None = None) -> None:
            original = getattr(cls, name)

            def wrapped(*args, **kwargs):
                if before:
                    mortal.moment(before)
                result = original(*args, **kwargs)
                if after:
                    mortal.moment(after)
                return result

            monkeypatch.setattr(cls, name, wrapped)

        born, files, iterate = Session.__init__, Session.write_files, BatchLoader.__iter__

        def begin(session, args, dataset, model, *rest):
            born(session, args, dataset, model, *rest)
            mortal.session, mortal.dead, mortal._count, mortal.moments = session, False, Counter(), []
            around(model, "meta_end_task", "end of task")

        def batches(loader):
            for i, batch in enumerate(iterate(loader)):
                if i == 1 and loader.dataset.train:
                    mortal.moment("second batch")
                yield batch

        monkeypatch.setattr(Session, "__init__", begin)
        monkeypatch.setattr(BatchLoader, "__iter__", batches)
        # a process that was killed writes nothing more
        monkeypatch.setattr(Session, "write_files", lambda s, *a, **k: None if mortal.dead else files(s, *a, **k))
        around(Client, "__init__", None, "client")
        around(Session, "measure", "before the test", "after the test")
        around(Session, "boundary", "before the boundary", "after the boundary")
        around(checkpoints.os, "fsync", "checkpoint half written")

    def run(self, argv: list[str], results: Path, *more: str, die_at=None) -> int | None:
        """Like :func:`run`; None if the run died."""
        self.die_at, self.session, self.dead = die_at, None, False
        try:
            return run(argv, results, *more)
        except Killed:
            return None

    def some_moments(self, seed: str, each: int = 1, kinds=None) -> list[tuple]:
        """The first moment of the last run, the last of a client or a batch, and ``each`` random ones of every kind."""
        rng, kinds = random.Random(seed), kinds or list(dict.fromkeys(m[2] for m in self.moments))
        chosen = {self.moments[0], [m for m in self.moments if m[2] in ("client", "second batch", "end of task")][-1]}
        for kind in kinds:
            of_kind = [m for m in self.moments if m[2] == kind]
            chosen.update(rng.sample(of_kind, min(each, len(of_kind))))
        return sorted(chosen, key=self.moments.index)


def die_and_go_on(mortal: Mortal, argv: list[str], tmp_path: Path, each: int = 1, kinds=None) -> None:
    """Run once undisturbed and once dying at many moments; compare."""
    calm, hard = tmp_path / "calm", tmp_path / "hard"
    assert mortal.run(argv, calm) == 0
    for moment in mortal.some_moments(" ".join(argv), each, kinds):
        code = mortal.run(argv, hard, "--loadcheck=auto", die_at=moment)
        assert code is None, f"{moment} never came"
    assert mortal.run(argv, hard, "--loadcheck=auto") == 0
    (done,) = finished(hard)
    assert [f for f in folders(hard) if (f / "checkpoint" / "last.safetensors").exists()] == [done], "it began anew"
    assert_same_run(only_folder(calm), done)


def stands_for_central(cls) -> bool:
    return cls.NAME == "dolfin" or cls.CENTRAL_ONLY or not issubclass(cls, FederatedModel)


# Without --fl a federated method is the same simulation with one client: DOLFIN stands for all of them.
CASES = [
    pytest.param(model, fl, id=f"{model}{'-fl' if fl else ''}")
    for model in get_model_names()
    for fl in (False, True)
    if (not get_model_class(model).CENTRAL_ONLY if fl else stands_for_central(get_model_class(model)))
]
