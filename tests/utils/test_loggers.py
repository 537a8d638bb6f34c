"""The files of a run."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import yaml

from datasets.utils.partition import Partition
from tests.helpers import Mortal, folders, only_folder, rows, run, small_args
from utils import loggers
from utils.args import parse_args
from utils.errors import RunError, UserError
from utils.loggers import Run, is_finished, write_csv, write_text

HEAD = ["run", "model", "dataset", "backbone", "setting", "seed", "model_config", "settings_hash", "status"]
FEDERATED = ["num_clients", "partition_mode", "distribution_alpha", "num_comm_rounds", "participation_rate"]
REST = ["n_epochs", "batch_size", "optimizer", "lr", "tasks_done", "n_tasks", "faa", "faa_micro", "avg_inc_acc"]
REST += ["forgetting", "bwt", "faa_task_il", "uplink_mb", "downlink_mb", "train_seconds", "total_seconds"]
REST += ["peak_memory_mb", "trainable_params", "command", "git_commit", "version_python", "version_torch"]


@pytest.fixture(scope="module")
def central(tmp_path_factory):
    results = tmp_path_factory.mktemp("central")
    assert run([*small_args("er", False), "--seed=3", "--lr=0.03", "--notes=ü: x"], results) == 0
    return only_folder(results)


@pytest.fixture(scope="module")
def fl(tmp_path_factory):
    results = tmp_path_factory.mktemp("fl")
    assert run([*small_args("er", True), "--eval_every=1", "--lr=0.03"], results) == 0
    return only_folder(results)


def test_where_a_run_is(central, fl):
    assert re.fullmatch(r"\d{8}-\d{6}-s3-[0-9a-f]{10}", central.name)
    assert central.parent.parts[-2:] == ("seq-digits", "er")
    files = {"args.yaml", "log.txt", "rounds.csv", "accuracy.csv", "summary.csv", ".lock"}
    assert {f.name for f in central.iterdir()} == files
    assert {f.name for f in fl.iterdir()} == files | {"partition.npz", "traffic.csv"}


def test_summary(central, fl):
    for folder, setting in ((central, "central"), (fl, "federated")):
        (row,) = rows(folder / "summary.csv")
        assert list(row)[: len(HEAD)] == HEAD
        assert not {*FEDERATED, *REST} - row.keys()
        assert (row["run"], row["setting"], row["status"]) == (folder.name, setting, "finished")
        assert row["tasks_done"] == row["n_tasks"] == "5"
        assert float(row["total_seconds"]) >= float(row["train_seconds"]) > 0 and float(row["peak_memory_mb"]) > 50
        assert row["trainable_params"] == "89610" and row["version_torch"] == torch.__version__
        assert row["command"].startswith("python main.py --model=er ")
        last = rows(folder / "accuracy.csv")[-2:]
        means = [sum(float(v) for k, v in r.items() if k.startswith("task_")) / 5 for r in last]
        assert float(row["faa"]) == pytest.approx(means[0], abs=1e-12)
        assert float(row["faa_task_il"]) == pytest.approx(means[1], abs=1e-12)
    (a,), (b,) = rows(central / "summary.csv"), rows(fl / "summary.csv")
    assert all(a[k] == "" for k in [*FEDERATED, "uplink_mb", "downlink_mb"])
    assert all(b[k] != "" for k in [*FEDERATED, "uplink_mb", "downlink_mb"])


def test_accuracy(central):
    table = rows(central / "accuracy.csv")
    assert [(r["after_task"], r["setting"]) for r in table] == [
        (str(t), s) for t in range(5) for s in ("class-il", "task-il")
    ]
    for r in table:
        values = [r[f"task_{j}"] for j in range(5)]
        seen = int(r["after_task"]) + 1
        assert all(0 <= float(v) <= 100 for v in values[:seen]) and values[seen:] == [""] * (5 - seen)


def test_rounds(central, fl):
    table = rows(central / "rounds.csv")
    assert list(table[0]) == [
        "task",
        "round",
        "faa",
        "faa_task_il",
        "incremental_bias",
        "prediction_kl",
        "loss",
        "train_seconds",
    ]
    assert [(r["task"], r["round"]) for r in table] == [(str(t), "-1") for t in range(5)]
    table = rows(fl / "rounds.csv")
    assert [(r["task"], r["round"]) for r in table] == [(str(t), r) for t in range(5) for r in ("0", "-1")]
    for column in ("train_seconds", "uplink_mb", "downlink_mb"):
        values = [float(r[column]) for r in table]
        assert values == sorted(values)
    assert all(math.isfinite(float(r["loss"])) for r in table)


def test_numbers_keep_full_precision(central, tmp_path):
    value = 0.1 + 0.2
    write_csv(tmp_path / "x.csv", [{"a": value, "b": 1e-17, "c": None}, {"a": float("nan"), "d": 2}])
    assert (tmp_path / "x.csv").read_text().split() == ["a,b,c,d", f"{value!r},1e-17,,", ",,,2"]
    digits = [len(v.split(".")[1]) for r in rows(central / "accuracy.csv") for v in r.values() if "." in v]
    assert max(digits) > 8


def test_args(central, fl):
    for folder, federated in ((central, False), (fl, True)):
        stored = yaml.safe_load((folder / "args.yaml").read_text())
        assert list(stored) == sorted(stored)
        assert (stored["model"], stored["fl"], stored["device"], stored["lr"]) == ("er", federated, "cpu", 0.03)
        assert "given" not in stored and stored["command"].startswith("python main.py ")
    assert yaml.safe_load((central / "args.yaml").read_text())["notes"] == "ü: x"


def test_the_log_tells_the_story(central):
    lines = (central / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert str(central) in lines[0] and sum("done | loss" in line for line in lines) == 5


def test_the_partition_is_kept(fl):
    partition = Partition.load(fl / "partition.npz")
    assert (partition.n_tasks, partition.n_clients) == (5, 3)
    assert all(min(partition.sizes(t)) > 0 for t in range(5))


def test_a_run_tells_how_far_it_got(tmp_path, monkeypatch):
    """An error in the middle: what was finished is there, marked as interrupted."""
    from models.er import Er

    begin = Er.begin_task

    def fail(self, dataset):
        if self.current_task == 2:
            raise RunError("no more")
        begin(self, dataset)

    monkeypatch.setattr(Er, "begin_task", fail)
    assert run(small_args("er", False), tmp_path) == 1
    folder = only_folder(tmp_path)
    (row,) = rows(folder / "summary.csv")
    assert (row["status"], row["tasks_done"]) == ("interrupted", "2") and row["faa"]
    assert len(rows(folder / "accuracy.csv")) == 4 and len(rows(folder / "rounds.csv")) == 2
    assert not is_finished(folder, parse_args(small_args("er", False)))


# ---- folders


def frozen_time(monkeypatch):
    import datetime

    class Now(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(loggers, "datetime", Now)


def test_runs_of_the_same_second_do_not_collide(tmp_path, monkeypatch):
    frozen_time(monkeypatch)
    args = parse_args([*small_args("sgd", False), f"--results_path={tmp_path}"])
    made = [Run.create(args) for _ in range(12)]
    for r in made:
        r.close()
    names = [r.path.name for r in made]
    assert len(set(names)) == 12 and names[0].startswith("20300102-030405-s0-") and names[2] == names[0] + "-2"
    assert [p.name for p in Run.candidates(args)] == names[::-1]  # newest first


def test_whole_runs_of_the_same_second(tmp_path, monkeypatch):
    frozen_time(monkeypatch)
    for _ in range(2):
        assert run([*small_args("sgd", False), "--stop_after=1"], tmp_path) == 0
    a, b = folders(tmp_path)
    assert (a / "accuracy.csv").read_bytes() == (b / "accuracy.csv").read_bytes()


def test_candidates_have_the_same_settings(tmp_path):
    args = parse_args([*small_args("sgd", False), f"--results_path={tmp_path}"])
    mine = Run.create(args)
    for more in ("--seed=1", "--lr=0.2", "--joint"):
        Run.create(parse_args([*small_args("sgd", False), f"--results_path={tmp_path}", more])).close()
    mine.close()
    assert Run.candidates(args) == [mine.path]


def test_a_folder_has_one_writer(tmp_path):
    args = parse_args([*small_args("sgd", False), f"--results_path={tmp_path}"])
    mine = Run.create(args)
    with pytest.raises(UserError, match="another process is working in"):
        Run(mine.path, args)
    mine.close()
    Run(mine.path, args).close()


def test_files_are_renamed_into_place(tmp_path, monkeypatch):
    file = tmp_path / "f.csv"
    write_text(file, "old")
    renamed = []

    def replace(source, target):
        assert file.read_text() == "old" and source.read_text() == "new"
        renamed.append(target)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        with pytest.raises(RunError, match="cannot write .*f.csv: No space left on device"):
            write_text(file, "new")
    assert renamed == [file] and file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["f.csv"]


@pytest.mark.parametrize(
    "status, done, stop_after, finished",
    [
        ("finished", 5, None, True),
        ("finished", 5, 2, True),
        ("stopped", 2, 2, True),
        ("stopped", 3, 2, True),
        ("stopped", 2, 3, False),
        ("stopped", 2, None, False),
        ("interrupted", 5, None, False),
    ],
)
def test_what_counts_as_finished(tmp_path, status, done, stop_after, finished):
    write_csv(tmp_path / "summary.csv", [{"status": status, "tasks_done": done, "n_tasks": 5}])
    args = parse_args([*small_args("sgd", False), *([f"--stop_after={stop_after}"] if stop_after else [])])
    assert is_finished(tmp_path, args) is finished


@pytest.mark.parametrize("text", ["", "status\n", "a,b\n1,2\n", "status,tasks_done,n_tasks\nfinished,x,5\n"])
def test_a_broken_summary_is_not_a_finished_run(tmp_path, text):
    args = parse_args(small_args("sgd", False))
    assert not is_finished(tmp_path, args)
    (tmp_path / "summary.csv").write_text(text)
    assert not is_finished(tmp_path, args)


def test_settings_are_plain_data():
    settings = loggers.settings_of(parse_args(small_args("dolfin", True)))
    assert json.loads(json.dumps(settings)) == settings


# ---- elsewhere than in CSV files


EVALUATED = ["--savecheck=task", "--n_epochs=2", "--eval_every=1", "--stop_after=3"]


class Recorder:
    """Stands for a wandb run and for a SummaryWriter: keeps what it is told."""

    made: list[Recorder] = []

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.logged, self.summary, self.closed = args, kwargs, [], {}, 0
        Recorder.made.append(self)

    def log(self, row, step):
        self.logged.append((step, row))

    def add_scalar(self, name, value, step):
        self.logged.append((step, name, value))

    def flush(self):
        self.flushed = len(self.logged)

    def finish(self):
        self.closed += 1

    close = finish


@pytest.fixture
def recorder(monkeypatch):
    """wandb and tensorboard as modules that record; each made object in the list."""
    monkeypatch.setattr(Recorder, "made", [])
    for name, at in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        for module in {name, at}:
            stub = ModuleType(module)
            stub.__spec__ = ModuleSpec(module, None)
            stub.init = stub.SummaryWriter = Recorder
            monkeypatch.setitem(sys.modules, module, stub)
    return Recorder.made


def die_in_the_second_task(mortal, argv, results):
    """A row is written and logged after the checkpoint, then the process dies; the same command goes on."""
    assert mortal.run(argv, results, die_at=(1, 1, "before the boundary", 1)) is None
    assert len(rows(only_folder(results) / "rounds.csv")) == 3
    assert mortal.run(argv, results, "--loadcheck=auto") == 0
    table = rows(only_folder(results) / "rounds.csv")
    assert len(table) == 6
    return table


def test_wandb_and_tensorboard_are_told_every_row_once(tmp_path, monkeypatch, recorder):
    argv = [*small_args("sgd", False), *EVALUATED, "--nowand=0", "--tensorboard", "--wandb_entity=us"]
    table = die_in_the_second_task(Mortal(monkeypatch), [*argv, "--wandb_mode=offline"], tmp_path)
    board, wandb, board2, wandb2 = recorder
    folder = only_folder(tmp_path)
    assert (board.args, board.kwargs) == ((folder / "tensorboard",), {"purge_step": None})
    assert board2.kwargs == {"purge_step": 2}  # what was logged after the checkpoint is taken back
    for w in (wandb, wandb2):  # one run, whose steps are counted by us
        wanted = {"project": "herd", "entity": "us", "mode": "offline", "id": folder.name, "resume": "allow"}
        assert wanted.items() <= w.kwargs.items() and w.kwargs["config"]["model"] == "sgd" and w.closed == 1
    assert [s for s, _ in wandb.logged] == [0, 1, 2] and [s for s, _ in wandb2.logged] == [2, 3, 4, 5]
    for step, row in [*wandb.logged[:2], *wandb2.logged]:
        assert row.keys() == {k for k, v in table[step].items() if v != ""}
        assert row["faa"] == float(table[step]["faa"]) and row["task"] == int(table[step]["task"])
    (summary,) = rows(folder / "summary.csv")
    assert wandb2.summary["status"] == summary["status"] == "stopped" and wandb2.summary["faa"] == float(summary["faa"])
    for b, first in ((board, 0), (board2, 2)):
        scalars = [x for x in b.logged if not x[1].startswith("summary/")]
        assert sorted({s for s, *_ in scalars}) == list(range(first, 3 if b is board else 6))
        assert len({x[:2] for x in b.logged}) == len(b.logged) and b.closed == 1 and b.flushed == len(scalars)
    assert {n: v for s, n, v in board2.logged if s == 6}["summary/faa"] == float(summary["faa"])


def test_tensorboard_reads_every_step_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = [*small_args("sgd", False), *EVALUATED, "--tensorboard=1"]
    table = die_in_the_second_task(Mortal(monkeypatch), argv, tmp_path)
    folder = only_folder(tmp_path)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("faa", "faa_task_il", "train_seconds", "task"):
        read = events.Scalars(name)
        assert [e.step for e in read] == list(range(6))
        assert [e.value for e in read] == pytest.approx([float(r[name]) for r in table], rel=1e-6)
    (last,) = events.Scalars("summary/faa")
    assert (last.step, last.value) == (6, pytest.approx(float(rows(folder / "summary.csv")[0]["faa"]), rel=1e-6))


def test_nothing_is_imported_unless_asked(tmp_path, monkeypatch):
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    assert run([*small_args("sgd", False), "--stop_after=1"], tmp_path) == 0


@pytest.mark.parametrize("flag", ["--nowand=0", "--tensorboard=1"])
def test_a_logger_that_cannot_start_is_one_line(tmp_path, monkeypatch, capsys, recorder, flag):
    def refuse(*args, **kwargs):
        raise RuntimeError("no key:\nwandb login")

    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setattr(sys.modules[module], "init", refuse)
        monkeypatch.setattr(sys.modules[module], "SummaryWriter", refuse)
    argv = [*small_args("sgd", False), flag]
    assert run(argv, tmp_path) == 2
    name = flag.replace("=", " ")
    assert capsys.readouterr().err == f"error: {name}: RuntimeError: no key: wandb login\n"
    folder = only_folder(tmp_path)
    assert not (folder / "summary.csv").exists()  # before any training
    Run(folder, parse_args(argv[:-1])).close()  # and the folder is free again


def test_where_it_is_logged_does_not_name_a_run(recorder):
    plain = parse_args(small_args("sgd", False))
    logged = ["--nowand=0", "--tensorboard=1", "--wandb_entity=us", "--wandb_mode=online", "--wandb_project=x"]
    assert loggers.settings_hash(plain) == loggers.settings_hash(parse_args([*small_args("sgd", False), *logged]))
