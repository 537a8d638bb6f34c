"""A run killed at any moment and resumed ends with the same numbers as one that was never killed."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import main
import models
from models.er import Er
from models.utils.continual_model import ContinualModel
from tests.helpers import (
    CASES,
    FEDERATED,
    SMALL,
    Mortal,
    assert_same_run,
    die_and_go_on,
    finished,
    only_folder,
    rows,
    run,
    small_args,
)
from utils.args import parse_args
from utils.loggers import Run

ROOT = Path(__file__).resolve().parent.parent
CHECK = ["--savecheck=round"]


@pytest.fixture
def mortal(monkeypatch):
    return Mortal(monkeypatch)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("model, fl", CASES)
def test_every_method_resumes_exactly(mortal, tmp_path, model, fl):
    more = ["--participation_rate=0.7"] if fl else ["--n_epochs=2"]
    die_and_go_on(mortal, [*small_args(model, fl), *more, "--stop_after=2", *CHECK], tmp_path)


@pytest.mark.parametrize(
    "model, fl, more",
    [
        ("er", False, "--optimizer=adam --savecheck=task"),
        (
            "sgd",
            False,
            "--optimizer=sgd --optim_mom=0.9 --lr_scheduler=multisteplr --lr_milestones 1 --eval_every=1 --n_epochs=3",
        ),
        ("derpp", False, "--optimizer=adamw --lr_scheduler=cosine --n_epochs=3 --permute_classes=1"),
        ("lwf", False, "--enable_other_metrics=1 --validation=30 --optimizer=sgd --optim_mom=0.5 --optim_nesterov=1"),
        ("joint", False, "--n_epochs=3 --optimizer=adam --lr_scheduler=cosine"),
        ("er", True, "--eval_every=1 --enable_other_metrics=1 --num_comm_rounds=3 --savecheck=task"),
        ("derpp", True, "--partition_mode=quantity --participation_rate=0.4 --permute_classes=1 --seed=7"),
        ("fedavg", True, "--partition_mode=distribution --distribution_alpha=5 --avg_type=uniform --optimizer=adam"),
        ("lwf", True, "--lr_scheduler=cosine --n_epochs=2 --validation=20"),
    ],
)
def test_every_setting_resumes_exactly(mortal, tmp_path, model, fl, more):
    argv = [*small_args(model, fl), "--stop_after=2", "--savecheck=round", *more.split()]
    die_and_go_on(mortal, argv, tmp_path)


@pytest.mark.slow
def test_running_statistics_resume_exactly(mortal, tmp_path):
    small = [*FEDERATED, "--num_clients=2", "--stop_after=1", "--batch_size=4", "--savecheck=round"]
    die_and_go_on(mortal, ["--model=fedavg", *SMALL, "--backbone=resnet-pocket", *small], tmp_path, kinds=["client"])


class Hoarder(Er):
    """Keeps state as a file written for another framework might: anywhere, in any container, made at any time."""

    NAME = "er"

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.per_class = defaultdict(float)
        self.rng, self.sign = torch.Generator().manual_seed(3), torch.sign
        self.also_sign = self.sign
        self.means = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def begin_task(self, dataset):
        self.watched = [p for n, p in self.net.named_parameters() if "bias" in n]
        self.tasks = {*getattr(self, "tasks", ()), (self.current_task, "task")}
        self.free = torch.zeros(self.N_CLASSES, requires_grad=True)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        loss = super().observe(inputs, labels, not_aug_inputs)
        if hasattr(self, "teacher"):
            loss = loss + (self.teacher(inputs) - self.net(inputs)).abs().mean()
        (loss + (self.net(inputs) * self.free).sum()).backward()
        with torch.no_grad():
            self.free -= 0.1 * self.free.grad
            self.free.grad = None
            for p in self.watched:  # by another name, the network's own weights
                p += 0.01 * self.sign(p) * torch.rand((), generator=self.rng) - 0.1 * p.grad
            self.means += self.watched[0].mean()
            self.steps += 1
        for label in labels.tolist():
            self.per_class[label] += float(loss.detach())
        assert len(self.tasks) == self.current_task + 1
        return loss.detach() + self.means.sum() + self.per_class[0] / self.steps

    def end_task(self, dataset):
        self.teacher = copy.deepcopy(self.net).eval()
        self.history = {**getattr(self, "history", {}), self.current_task: np.array([float("nan"), self.steps.item()])}


@pytest.mark.parametrize("fl", [False, True])
def test_state_of_any_shape_resumes_exactly(mortal, tmp_path, monkeypatch, fl):
    monkeypatch.setattr(models, "get_model_class", lambda name: Hoarder)
    argv = [
        *small_args("er", fl),
        "--savecheck=round",
        "--optimizer=sgd",
        "--lr=0.01",
        *([] if fl else ["--n_epochs=2"]),
    ]
    die_and_go_on(mortal, [*argv, "--stop_after=3"], tmp_path, each=2)


@pytest.mark.parametrize("fl", [False, True])
def test_stop_after_then_on(tmp_path, capsys, fl):
    argv = [*small_args("er", fl), "--savecheck=task"]
    assert run([*argv, "--stop_after=3"], tmp_path / "whole") == 0
    assert run([*argv, "--stop_after=1"], tmp_path / "parts") == 0
    folder = only_folder(tmp_path / "parts")
    assert rows(folder / "summary.csv")[0]["status"] == "stopped"
    assert run([*argv, "--stop_after=1"], tmp_path / "parts", "--loadcheck=auto") == 0
    assert "already finished" in capsys.readouterr().out
    assert run([*argv, "--stop_after=2"], tmp_path / "parts", f"--loadcheck={folder}") == 0
    file = folder / "checkpoint" / "last.safetensors"
    assert run([*argv, "--stop_after=3"], tmp_path / "parts", f"--loadcheck={file}") == 0
    assert_same_run(only_folder(tmp_path / "whole"), only_folder(tmp_path / "parts"))


def test_auto_runs_what_is_missing_and_nothing_twice(tmp_path, capsys, monkeypatch):
    argv = small_args("sgd", False)
    assert run(argv, tmp_path, "--loadcheck=auto") == 0  # nothing there: from the start
    folder = only_folder(tmp_path)
    assert rows(folder / "summary.csv")[0]["status"] == "finished"
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    capsys.readouterr()
    monkeypatch.setattr(main, "build", lambda args: pytest.fail("a finished run was built again"))
    assert run(argv, tmp_path, "--loadcheck=auto", "--notes=again", "--savecheck=task") == 0
    assert capsys.readouterr().out.startswith(f"already finished: {folder}")
    assert before == {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    monkeypatch.undo()
    assert run(argv, tmp_path, "--loadcheck=auto", "--seed=1") == 0
    assert run(argv, tmp_path, "--loadcheck=auto", "--lr=0.02") == 0
    assert len(finished(tmp_path)) == 3


def test_a_checkpoint_elsewhere_starts_a_folder_of_its_own(tmp_path):
    argv = [*small_args("er", False), "--savecheck=task"]
    assert run([*argv, "--stop_after=1"], tmp_path / "a") == 0
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes((only_folder(tmp_path / "a") / "checkpoint" / "last.safetensors").read_bytes())
    assert run([*argv, "--stop_after=2"], tmp_path / "b", f"--loadcheck={copied}") == 0
    assert run([*argv, "--stop_after=2"], tmp_path / "c") == 0
    assert_same_run(only_folder(tmp_path / "c"), only_folder(tmp_path / "b"))


def test_a_run_is_not_harmed_by_a_wrong_attempt_to_resume_it(tmp_path, capsys):
    argv = [*small_args("er", False), "--savecheck=task", "--stop_after=1", "--lr=0.03"]
    assert run(argv, tmp_path) == 0
    folder = only_folder(tmp_path)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert run(argv, tmp_path, f"--loadcheck={folder}", "--lr=0.5", "--buffer_size=9") == 2
    error = capsys.readouterr().err
    assert "--buffer_size 200 there and 9 here" in error and "--lr 0.03 there and 0.5 here" in error
    assert before == {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_other_pretrained_weights_are_noticed(tmp_path, capsys):
    argv = [*small_args("dolfin", True), "--savecheck=task", "--dolfin_basis=random", "--stop_after=1"]
    weights = []
    for scale in (1, 2):
        net = main.build(parse_args(argv))[1].net
        state = {k: scale * v for k, v in net.state_dict().items() if not k.startswith("classifier")}
        weights.append(tmp_path / f"{scale}.safetensors")
        save_file(state, weights[-1])
    live = tmp_path / "weights.safetensors"
    argv = [a for a in argv if not a.startswith("--pretrained")] + [f"--backbone_weights={live}"]
    live.write_bytes(weights[0].read_bytes())
    assert run(argv, tmp_path / "r") == 0
    folder = only_folder(tmp_path / "r")
    live.write_bytes(weights[1].read_bytes())
    kept = {f: f.read_bytes() for f in folder.glob("*.csv")}
    assert run([*argv[:-2], "--stop_after=2", argv[-1]], tmp_path / "r", f"--loadcheck={folder}") == 2
    assert "made over other pretrained weights" in capsys.readouterr().err
    assert kept == {f: f.read_bytes() for f in folder.glob("*.csv")}


def test_two_processes_do_not_share_a_folder(tmp_path, capsys):
    argv = [*small_args("sgd", False), "--savecheck=task", "--stop_after=1"]
    assert run(argv, tmp_path) == 0
    folder = only_folder(tmp_path)
    busy = Run(folder, parse_args(argv))  # another sitting holds it
    try:
        before = (folder / "args.yaml").read_bytes()
        assert run([*argv, "--stop_after=2"], tmp_path, "--loadcheck=auto") == 2
        assert capsys.readouterr().err == (
            f"error: another process is working in {folder}: wait for it or start a run of its own\n"
        )
        assert (folder / "args.yaml").read_bytes() == before
    finally:
        busy.close()
    assert run([*argv, "--stop_after=2"], tmp_path, "--loadcheck=auto") == 0


# ---- Ctrl-C


def interrupt_at(monkeypatch, n: int, times: int = 1) -> None:
    """Ctrl-C in the middle of the n-th batch of training."""
    count, original = Counter(), ContinualModel.meta_observe

    def meta_observe(self, *args, **kwargs):
        count["batches"] += 1
        if count["batches"] == n:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ContinualModel, "meta_observe", meta_observe)


@pytest.mark.parametrize("fl, batch", [(False, 3), (False, 12), (True, 14), (True, 30)])
@pytest.mark.parametrize("savecheck", ["none", "round"])
def test_ctrl_c_saves_and_resumes_exactly(tmp_path, monkeypatch, capsys, fl, batch, savecheck):
    argv = [*small_args("derpp", fl), "--stop_after=2", f"--savecheck={savecheck}"]
    argv += [] if fl else ["--n_epochs=2"]
    assert run(argv, tmp_path / "calm") == 0
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        interrupt_at(m, batch)
        assert run(argv, tmp_path / "hard") == 130
    out = capsys.readouterr()
    folder = only_folder(tmp_path / "hard")
    assert f"--loadcheck {folder}" in out.out and "finishing this round or epoch" in out.err
    assert rows(folder / "summary.csv")[0]["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert run(argv, tmp_path / "hard", "--loadcheck=auto") == 0
    assert_same_run(only_folder(tmp_path / "calm"), only_folder(tmp_path / "hard"))


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capsys):
    argv = [*small_args("sgd", False), "--savecheck=task", "--stop_after=3"]
    with monkeypatch.context() as m:
        interrupt_at(m, 8, times=2)
        assert run(argv, tmp_path / "hard") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert run(argv, tmp_path / "hard", "--loadcheck=auto") == 0
    assert run(argv, tmp_path / "calm") == 0
    assert_same_run(only_folder(tmp_path / "calm"), only_folder(tmp_path / "hard"))


# ---- the real thing


@pytest.mark.slow
@pytest.mark.parametrize("model, fl, size", [("derpp", False, "--n_epochs=6"), ("dolfin", True, "--num_comm_rounds=3")])
def test_sigkill_at_a_random_moment(tmp_path, model, fl, size):
    argv = [*small_args(model, fl), size, "--savecheck=round", "--stop_after=3"]
    assert run(argv, tmp_path / "calm") == 0
    moment = random.Random(model).uniform(0.05, 0.5) * float(  # the first checkpoint may come late in a short run
        rows(only_folder(tmp_path / "calm") / "summary.csv")[0]["total_seconds"]
    )
    hard = tmp_path / "hard"
    process = subprocess.Popen(
        [sys.executable, "main.py", *argv, f"--results_path={hard}", "--num_threads=1"],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(hard.rglob("last.safetensors")):
        time.sleep(0.02)
    time.sleep(moment)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    assert not finished(hard)
    assert run(argv, hard, "--loadcheck=auto") == 0
    assert_same_run(only_folder(tmp_path / "calm"), only_folder(hard))
