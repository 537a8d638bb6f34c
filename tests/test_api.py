"""``from main import run``: the command line as a function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import main
from tests.helpers import assert_same_run, only_folder, rows, run
from utils.args import parse_args
from utils.errors import Busy, Interrupted, RunError, UserError
from utils.loggers import claimed, settings_hash

ROOT = Path(__file__).resolve().parent.parent
SGD = {"model": "sgd", "dataset": "seq-digits", "backbone": "mnistmlp", "debug_mode": True, "n_epochs": 1}
FL = {**SGD, "fl": True, "num_clients": 3, "num_comm_rounds": 2, "partition_mode": "iid"}


@pytest.mark.parametrize("settings", [SGD, FL], ids=["central", "fl"])
def test_the_same_run_as_the_command_line(tmp_path, settings):
    given = {**settings, "lr": 0.05, "device": "cpu", "lr_milestones": [3, 5], "notes": None}
    found = main.run(**given, results_path=tmp_path / "api", quiet=True)
    flags = "--model sgd --dataset seq-digits --backbone mnistmlp --debug_mode 1 --n_epochs 1 --lr 0.05 --device cpu"
    fl = "--fl --num_clients 3 --num_comm_rounds 2 --partition_mode iid" if "fl" in settings else ""
    assert run([*flags.split(), "--lr_milestones", "3", "5", *fl.split()], tmp_path / "cli") == 0
    folder = only_folder(tmp_path / "cli")
    assert found["path"] == only_folder(tmp_path / "api")
    assert_same_run(found["path"], folder)
    (row,) = rows(folder / "summary.csv")
    assert found.keys() == row.keys() | {"path", "accuracy"}
    assert found["faa"] == float(row["faa"]) and (found["seed"], found["n_tasks"], found["lr"]) == (0, 5, 0.05)
    assert type(found["seed"]) is int and found["settings_hash"] == row["settings_hash"]
    assert found["num_clients"] == (3 if "fl" in settings else None) and found["status"] == "finished"
    for name, matrix in found["accuracy"].items():
        table = [r for r in rows(folder / "accuracy.csv") if r["setting"] == name]
        text = [[r[f"task_{j}"] for j in range(5)] for r in table]
        want = np.array([[float(x) if x else np.nan for x in r] for r in text])
        np.testing.assert_array_equal(matrix, want)
    assert set(found["accuracy"]) == {"class-il", "task-il"}
    assert found["faa"] == pytest.approx(found["accuracy"]["class-il"][-1].mean())


def test_switches_lists_and_what_is_not_given():
    args = parse_args({**FL, "fl": False, "num_clients": None, "num_comm_rounds": None, "partition_mode": None})
    assert (args.fl, args.debug_mode, args.lr_milestones) == (False, 1, [35, 45])
    assert settings_hash(args) == settings_hash(parse_args(SGD))
    assert parse_args({**FL, "fl": 1}).batch_size == parse_args(FL).batch_size == 16  # the federated default
    argv = ["--model=sgd", "--dataset=seq-digits", "--backbone=mnistmlp", "--debug_mode=1", "--n_epochs=1", "--fl"]
    argv += ["--num_clients=3", "--num_comm_rounds=2", "--partition_mode=iid"]
    assert parse_args(FL).command == parse_args(argv).command  # what is written to the log can be typed
    assert vars(parse_args(FL)) == vars(parse_args(argv))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "sgdd"},
        {"dataset": "seq-digit"},
        {"backbone": "mnistml"},
        {"bufer_size": 3},
        {"lr": "fast"},
        {"lr": -1},
        {"optimizer": "lion"},
        {"num_clients": 3},
        {"lr_milestones": [3, "x"]},
        {"model": None},
    ],
    ids=str,
)
def test_a_mistake_says_what_the_command_line_says(tmp_path, capsys, change):
    settings = {**SGD, **change}
    with pytest.raises(ValueError) as caught:
        main.run(**settings, results_path=tmp_path)
    assert type(caught.value) is UserError
    argv = []
    for k, v in settings.items():
        argv += [] if v is None else [f"--{k}", *map(str, v)] if isinstance(v, list) else [f"--{k}={v}"]
    assert main.main([*argv, f"--results_path={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n" and list(tmp_path.iterdir()) == []


def test_quiet_means_quiet(tmp_path, capsys):
    main.run(**SGD, stop_after=1, results_path=tmp_path / "a", quiet=True)
    out = capsys.readouterr()
    assert out.out == out.err == ""
    main.run(**SGD, stop_after=1, results_path=tmp_path / "b")
    assert "task 1/5 done" in capsys.readouterr().out


def test_a_finished_run_is_not_repeated_and_errors_come_through(tmp_path, monkeypatch):
    settings = {**SGD, "results_path": tmp_path, "quiet": True, "loadcheck": "auto"}
    first = main.run(**settings)
    for error, seen in ((RunError("broken"), RunError), (Interrupted(), KeyboardInterrupt)):
        with monkeypatch.context() as m:

            def fail(args, error=error):
                raise error

            m.setattr(main, "build", fail)
            again = main.run(**settings)
            np.testing.assert_equal(again, first)
            with pytest.raises(seen):
                main.run(**settings, seed=1)


def test_another_working_directory(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom main import run\n"
    code += f"found = run(**{ {**SGD, 'stop_after': 1, 'quiet': True}!r})\nprint(found['path'], found['tasks_done'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    path, tasks = done.stdout.split()
    assert tasks == "1" and (tmp_path / path / "accuracy.csv").exists() and path.startswith("results/seq-digits/sgd/")


def test_two_processes_do_not_start_the_same_run(tmp_path, capsys):
    """The folder's lock comes too late for that: each would make a folder of its own."""
    argv = ["--model=sgd", "--dataset=seq-digits", "--backbone=mnistmlp", "--debug_mode=1", "--stop_after=1"]
    args = parse_args([*argv, f"--results_path={tmp_path}", "--loadcheck=auto"])
    with claimed(args):
        with pytest.raises(Busy), claimed(args):
            pass
        assert run(argv, tmp_path, "--loadcheck=auto") == 75
        assert capsys.readouterr().err.startswith("error: another process is at this run (it holds ")
        assert not list(tmp_path.rglob("args.yaml"))
        assert run(argv, tmp_path, "--loadcheck=auto", "--seed=1") == 0  # another run
        assert run(argv, tmp_path) == 0  # asked for afresh
    assert run(argv, tmp_path, "--loadcheck=auto") == 0
    assert len(list(tmp_path.rglob("args.yaml"))) == 2
