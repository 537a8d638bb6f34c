"""Grids, and the runs they make."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.helpers import finished, folders, only_folder, rows
from utils import sweep
from utils.args import parse_args
from utils.errors import UserError
from utils.loggers import Run, claimed, settings_hash, write_csv
from utils.registry import ROOT

TINY = "base: {dataset: seq-digits, backbone: mnistmlp, debug_mode: 1, n_epochs: 1}\n"


@pytest.fixture
def grid(tmp_path):
    """``grid(text)`` writes a grid file."""

    def write(text: str) -> Path:
        file = tmp_path / "grid.yaml"
        file.write_text(textwrap.dedent(text))
        return file

    return write


def settings(file: Path) -> list[dict]:
    return [{s.flag: s.value for s in c.values()} for c in sweep.Grid(file).combinations()]


# ---------------------------------------------------------------- what a grid says


def test_a_grid_is_the_product(grid):
    file = grid("""
        base: {model: sgd, dataset: seq-digits, lr: 7}
        grid:
          lr: [0.1, 0.2]
          lr_milestones: [[1, 2], [3]]
          seed: [0, 1, 2]
    """)
    wanted = [
        {"model": "sgd", "dataset": "seq-digits", "lr": lr, "lr_milestones": m, "seed": seed}
        for lr, m, seed in itertools.product([0.1, 0.2], [[1, 2], [3]], [0, 1, 2])
    ]
    assert settings(file) == wanted


def test_every_run_is_multiplied_by_the_grid(grid):
    file = grid("""
        base: {dataset: seq-digits, fl: true}
        runs:
          - {model: fedavg}
          - {model: joint, fl: null, beta: null}
          - {model: dolfin, seed: 9}
        grid: {beta: [0.5, 0.1], seed: [0, 1]}
        exclude:
          - {model: fedavg, beta: 0.1, seed: [1, 5]}
    """)
    base = {"dataset": "seq-digits"}
    wanted = [{**base, "fl": True, "model": "fedavg", "beta": b, "seed": s} for b in (0.5, 0.1) for s in (0, 1)]
    assert wanted.pop() == {**base, "fl": True, "model": "fedavg", "beta": 0.1, "seed": 1}
    wanted += [{**base, "fl": None, "model": "joint", "beta": None, "seed": s} for s in (0, 1)]
    wanted += [{**base, "fl": True, "model": "dolfin", "seed": 9, "beta": b} for b in (0.5, 0.1)]
    assert settings(file) == wanted


def test_command_lines(grid, capsys):
    file = grid("""
        base: {dataset: seq-digits, backbone: mnistmlp, model: er, joint: true, notes: "two words", clip_grad: null}
        runs: [{fl: true}, {fl: false, lr_milestones: [3, 5]}]
        grid: {lr: [1e-3], seed: [0, 1]}
    """)
    assert sweep.main([str(file), "--dry-run", "--results_path", "r"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("python main.py ") for line in lines)
    typed = (
        "--model er --dataset seq-digits --backbone mnistmlp --joint --notes 'two words' --lr 0.001 --results_path r"
    )
    typed += " --savecheck task --loadcheck auto"
    for line, more in zip(lines, ("--fl", "--fl --seed 1", "--lr_milestones 3 5", "--lr_milestones 3 5 --seed 1")):
        a, b = parse_args(shlex.split(line)[2:]), parse_args(shlex.split(f"{typed} {more}"))
        differ = {k for k in vars(a) if getattr(a, k) != getattr(b, k)}
        assert differ <= {"command", "given", "asked"} and settings_hash(a) == settings_hash(b)


def test_the_same_run_is_made_once(grid, capsys):
    file = grid(f"""
        {TINY.strip()}
        runs: [{{model: sgd}}, {{model: sgd, notes: again}}, {{model: sgd, lr: 0.03}}, {{model: sgd, lr: 0.02}}]
    """)
    assert len(sweep.jobs_of(sweep.Grid(file), None)) == 2
    assert capsys.readouterr().out == "4 combinations, 2 different runs\n"


def test_merge_keys_and_anchors(grid):
    file = grid("""
        base: {model: sgd}
        runs:
          - &a {lr: 1, seed: 3}
          - &b {<<: *a, lr: 2}
          - *b
    """)
    two = {"model": "sgd", "lr": 2, "seed": 3}
    assert settings(file) == [{"model": "sgd", "lr": 1, "seed": 3}, two, two]


GOOD = "base: {dataset: seq-digits, model: er, backbone: mnistmlp}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD + "grid:\n  lr: [0.1, fast]", "line 3 (lr: fast): --lr: 'fast' is not a number at least 0"),
        (GOOD + "grid:\n  lr: [0.1,\n       -1]", "line 4 (lr: -1): --lr: '-1' is out of range"),
        (GOOD + "grid:\n  bufer_size: [3]", "line 3 (bufer_size: 3): unknown flag '--bufer_size' for model 'er': did "),
        (
            GOOD + "runs:\n  - {seed: 1}\n  - {model: err}",
            "line 4 (model: err): unknown model 'err': did you mean",
        ),
        (GOOD + "runs:\n  - {num_clients: 3}", "line 3 (num_clients: 3): --num_clients only make sense with --fl"),
        (GOOD + "grid: {dataset: [seq-digit]}", "line 2 (dataset: seq-digit): unknown dataset 'seq-digit': did you"),
        ("grid: {seed: [0]}", "the run seed=0: --model is missing"),
        (GOOD + "grids: {seed: [0]}", "line 2: unknown section 'grids': did you mean 'grid'?"),
        (GOOD + "grid: {seed: 0}", "line 2: grid: seed must be a list with something in it"),
        (GOOD + "grid: {seed: []}", "line 2: grid: seed must be a list"),
        (GOOD + "grid: [seed]", "line 2: grid must be a mapping"),
        (GOOD + "runs:\n  - er", "line 3: an entry of runs must be a mapping"),
        (GOOD + "grid: {seed: [0, 1]}\nexclude:\n  - {seed: 3}", "line 4: this entry of exclude fits no run"),
        (GOOD + "exclude:\n  - {model: er}", "no run is left"),
        (GOOD + "grid:\n  seed: [0]\n  seed: [1]", "line 4: seed stands there twice"),
        (GOOD + "runs: [{loadcheck: auto}]", "line 2: --loadcheck is set by the sweep"),
        (GOOD + "grid: {seed: [0", "is not valid YAML"),
        (GOOD + "grid: {seed: [!!python/none 0]}", "is not valid YAML"),
        ("", "the file must be a mapping"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(grid, tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert sweep.main([str(grid(text)), "--results_path", str(tmp_path / "r")]) == 2
    out = capsys.readouterr()
    assert out.err.startswith(f"error: {tmp_path}/grid.yaml") and out.err.count("\n") == 1 and message in out.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("nowhere.yaml", "nowhere.yaml: No such file or directory; give a grid file"),
        ("", "the following arguments are required: grid"),
        ("GRID --jobs 0", "--jobs: '0' is out of range"),
        ("GRID --devices cuda:99", "--device 'cuda:99' is not available: this machine has "),
        ("GRID --device cpu", "unrecognized arguments: --device cpu"),
    ],
)
def test_a_mistake_on_the_command_line(grid, tmp_path, capsys, argv, message):
    file = grid(GOOD)
    argv = argv.replace("GRID", f"{file} --results_path {tmp_path / 'r'}").split()
    assert sweep.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_help_needs_no_torch():
    code = "import sys, utils.sweep\ntry: utils.sweep.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--slurm" in done.stdout and "exclude:" in done.stdout, done.stderr


# ---------------------------------------------------------------- what becomes of the runs, with a small program

STUB = """
import os, pathlib, signal, sys, time
asked = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
seed, results = int(asked["--seed"]), pathlib.Path(asked["--results_path"])
with open(results / "started.txt", "a") as f:
    f.write(f"{seed} {asked.get('--device')} {asked.get('--num_threads')}\\n")
print("line one\\nline two of", seed, flush=True)
"""
FINISH = """
summary = f"model,status,n_tasks,tasks_done,faa\\nsgd,finished,5,5,{50 + seed}\\n"
(results / f"folder-{seed}" / "summary.csv").write_text(summary)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """``stub(code)`` puts a small program in the place of main.py; FINISH leaves a finished run. Gives the results."""
    (tmp_path / "r").mkdir()

    def use(code: str) -> Path:
        (tmp_path / "stub.py").write_text(STUB + code)
        monkeypatch.setattr(sweep, "PROGRAM", [sys.executable, str(tmp_path / "stub.py")])
        return tmp_path / "r"

    return use


def job_args(results: Path, seed: int):
    flags = "--model=sgd --dataset=seq-digits --backbone=mnistmlp --debug_mode=1 --n_epochs=1 --loadcheck=auto"
    return parse_args([*flags.split(), f"--seed={seed}", f"--results_path={results}"])


@pytest.fixture
def seeds(grid, tmp_path):
    """``seeds(n)`` is a grid of so many runs; each has a folder, which the stub knows as folder-<seed>."""

    def make(n: int) -> Path:
        for seed in range(n):
            args = job_args(tmp_path / "r", seed)
            folder = Run.folder(args) / f"20300101-000000-s{seed}-{settings_hash(args)}"
            folder.mkdir(parents=True)
            (tmp_path / "r" / f"folder-{seed}").symlink_to(folder)
        return grid(TINY + f"grid: {{model: [sgd], seed: {list(range(n))}}}\n")

    return make


def table(results: Path) -> list[dict]:
    (file,) = sorted(results.glob("sweeps/*/sweep.csv"))[-1:]
    return rows(file)


def started(results: Path) -> list[list[str]]:
    return [line.split() for line in (results / "started.txt").read_text().splitlines()]


def test_finished_runs_are_skipped_and_the_rest_is_run(seeds, stub, capsys):
    results, file = stub(FINISH), seeds(4)
    done = Run.candidates(job_args(results, 1))[0]
    write_csv(
        done / "summary.csv", [{"model": "sgd", "status": "finished", "n_tasks": 5, "tasks_done": 5, "faa": 99.5}]
    )
    argv = [str(file), "--results_path", str(results), "--jobs", "3", "--devices", "cpu"]
    assert sweep.main(argv) == 0
    assert sorted(s for s, *_ in started(results)) == ["0", "2", "3"]
    found = table(results)
    assert [r["status"] for r in found] == ["finished", "skipped", "finished", "finished"]
    assert [float(r["faa"]) for r in found] == [50, 99.5, 52, 53]
    assert found[1]["seconds"] == "" and all(float(found[i]["seconds"]) >= 0 for i in (0, 2, 3))
    for seed, row in enumerate(found):
        assert Path(row["folder"]).resolve() == Run.candidates(job_args(results, seed))[0].resolve()
        assert f"--seed={seed} " in row["command"] and row["command"].startswith("python main.py ")
    assert Path(found[0]["log"]).read_text() == "line one\nline two of 0\n" and not Path(found[1]["log"]).exists()
    assert "3 finished, 1 skipped" in capsys.readouterr().out
    assert sweep.main(argv) == 0 and len(started(results)) == 3  # nothing is left to do
    assert {r["status"] for r in table(results)} == {"skipped"}


def test_devices_and_threads_are_shared_out(seeds, stub, monkeypatch):
    results, file = stub("time.sleep(0.3)" + FINISH), seeds(4)
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(sweep, "_devices", lambda given: given)
    argv = [str(file), "--results_path", str(results), "--jobs", "4", "--devices"]
    assert sweep.main([*argv, "cuda:0", "cuda:1"]) == 0
    assert sorted(started(results)) == sorted([[str(s), f"cuda:{s % 2}", "None"] for s in range(4)])
    for summary in results.rglob("summary.csv"):
        summary.unlink()
    (results / "started.txt").unlink()
    assert sweep.main([*argv, "cpu"]) == 0
    assert sorted(started(results)) == [[str(s), "cpu", "2"] for s in range(4)]


def test_what_the_grid_says_of_devices_stands(grid, stub):
    results = stub("")
    file = grid(TINY + "runs: [{model: sgd, seed: 0, device: cpu, num_threads: 3}]")
    assert sweep.main([str(file), "--results_path", str(results), "--devices", "cpu"]) == 0
    assert started(results) == [["0", "cpu", "3"]]
    (row,) = table(results)
    assert "--device=cpu" in row["command"]


def test_a_failing_run_does_not_stop_the_others(seeds, stub, capsys):
    results, file = stub("if seed == 1: sys.exit('no luck\\nat all')" + FINISH), seeds(3)
    assert sweep.main([str(file), "--results_path", str(results), "--jobs", "1", "--devices", "cpu"]) == 1
    assert [r["status"] for r in table(results)] == ["finished", "failed", "finished"]
    out = capsys.readouterr().out
    assert re.search(r"failed \(exit code 1\): python main.py .*--seed=1 .*\n.*1-sgd-s1.log ends:\n", out)
    assert "  | line two of 1\n  | no luck\n  | at all\n1 failed, 2 finished: " in out


def test_a_run_that_another_process_carries_out_is_waited_for(seeds, stub, monkeypatch):
    """One is finished by the other process, one given up by it, one found out by the run itself (exit code 75)."""
    monkeypatch.setattr(sweep, "PATIENCE", 0.1)
    code = (
        "if seed == 2 and not (results / 'once').exists():\n    (results / 'once').touch()\n    sys.exit(75)" + FINISH
    )
    results, file = stub(code), seeds(4)
    held = contextlib.ExitStack()
    for seed in (0, 1):
        held.enter_context(claimed(job_args(results, seed)))
    wait = time.sleep

    def sleep(seconds):
        (file,) = results.glob("sweeps/*/sweep.csv")
        if [r["status"] for r in rows(file)][2:] == ["finished", "finished"]:
            done = Run.candidates(job_args(results, 0))[0]
            write_csv(done / "summary.csv", [{"model": "sgd", "status": "finished", "n_tasks": 5, "tasks_done": 5}])
            held.close()
        wait(seconds)

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    assert sweep.main([str(file), "--results_path", str(results), "--jobs", "2", "--devices", "cpu"]) == 0
    assert [r["status"] for r in table(results)] == ["skipped", "finished", "finished", "finished"]
    order = [s for s, *_ in started(results)]
    assert order[-1] == "1" and sorted(order) == ["1", "2", "2", "3"]


GRACEFUL = """
def stop(*_):
    with open(results / "signals.txt", "a") as f: f.write(f"{seed}\\n")
    if seed == 0: sys.exit(130)  # the other one does not listen
signal.signal(signal.SIGINT, stop)
(results / f"up-{seed}").touch()
for _ in range(600): time.sleep(0.1)
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_reaches_every_run_once_and_twice_kills(seeds, stub, monkeypatch, presses):
    code = GRACEFUL if presses == 2 else GRACEFUL.replace("if seed == 0: ", "")
    results, file = stub(code), seeds(4)
    wait, pressed = time.sleep, []

    def lines(name: str) -> list[str]:
        return (results / name).read_text().split() if (results / name).exists() else []

    def sleep(seconds):
        up = [len(list(results.glob("up-*"))), len(lines("signals.txt"))]  # before the first, before the second
        if len(pressed) < presses and up[len(pressed)] == 2:
            pressed.append(signal.raise_signal(signal.SIGINT))
        wait(seconds)

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    before = signal.getsignal(signal.SIGINT)
    assert sweep.main([str(file), "--results_path", str(results), "--jobs", "2", "--devices", "cpu"]) == 130
    assert signal.getsignal(signal.SIGINT) is before and len(pressed) == presses
    assert sorted((results / "signals.txt").read_text().split()) == ["0", "1"]
    assert [r["status"] for r in table(results)] == ["interrupted"] * 4 and len(started(results)) == 2


def test_sweeps_of_the_same_second_have_folders_of_their_own(tmp_path):
    made = {sweep.new_folder(tmp_path, Path("x/grid.yaml")) for _ in range(5)}
    assert len(made) == 5 and all(p.is_dir() and p.parent == tmp_path / "sweeps" for p in made)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another --results_path"):
        sweep.new_folder(tmp_path / "file", Path("grid.yaml"))


# ---------------------------------------------------------------- with main.py


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(p) for p, parent in map(str.split, listed.splitlines()) if int(parent) == pid]


@pytest.mark.slow
def test_a_sweep_killed_midway_and_started_again_twice(grid, tmp_path):
    """SIGKILL for everything while a run is under way; then two sweeps side by side do the rest, and nothing twice."""
    file = grid(
        "base: {model: sgd, dataset: seq-digits, backbone: mnistmlp, n_epochs: 1}\n"
        "runs:\n  - {seed: 0, n_epochs: 10, batch_size: 16}\n  - {fl: true, num_clients: 3, num_comm_rounds: 1}\n"
    )
    results = tmp_path / "r"
    argv = [str(file), "--results_path", str(results), "--jobs", "1", "--devices", "cpu"]
    program = [sys.executable, "-m", "utils.sweep", *argv]
    first = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(results.rglob("last.safetensors")):
        assert first.poll() is None
        time.sleep(0.02)
    runs = children(first.pid)
    for pid in (first.pid, *runs):
        os.killpg(pid, signal.SIGKILL)
    first.wait()
    (broken,) = folders(results)
    assert finished(results) == [] and len(runs) == 1

    other = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert sweep.main(argv) == 0
    said = other.communicate()[0]
    assert other.returncode == 0, said
    tables = [rows(file) for file in sorted(results.glob("sweeps/*/sweep.csv"))[1:]]
    for statuses in zip(*([r["status"] for r in t] for t in tables)):
        assert "finished" in statuses and {*statuses} <= {"finished", "skipped"}
    assert len(folders(results)) == len(finished(results)) == 2 and broken in folders(results)
    for folder in folders(results):
        log = (folder / "log.txt").read_text()
        sittings = 2 if folder == broken else 1
        assert log.count(" sgd on seq-digits, ") == sittings
        done = [log.count(f"task {t}/5 done") for t in range(1, 6)]
        assert min(done) == 1 and sum(done) < 5 + sittings  # the kill may cut a task off from its save
    for t in tables:
        assert {Path(r["folder"]).resolve() for r in t} == {f.resolve() for f in folders(results)}


def test_a_slurm_script_runs(grid, tmp_path, capsys):
    file = grid(TINY + "grid: {model: [sgd, er], seed: [0, 1], stop_after: [1]}\n")
    results, script = tmp_path / "r", tmp_path / "out.sbatch"
    argv = [str(file), "--results_path", str(results), "--slurm", str(script)]
    assert sweep.main([*argv, "--jobs", "3"]) == 0 and folders(results) == []
    text = script.read_text()
    assert "#SBATCH --array=0-3%3\n" in text and "4 of 4 runs" in capsys.readouterr().out
    (logs,) = re.findall(r"--output=(.*)/%a.log", text)
    assert Path(logs).is_dir()
    at = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run(["bash", str(script)], env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"}, **at)
    assert done.returncode == 0 and "task 1/5 done" in done.stdout, done.stderr
    folder = only_folder(results)
    assert (folder.parent.name, rows(folder / "summary.csv")[0]["seed"]) == ("sgd", "0")
    beyond = subprocess.run(["bash", str(script)], env={**os.environ, "SLURM_ARRAY_TASK_ID": "4"}, **at)
    assert beyond.returncode == 2 and beyond.stderr == "no run 4: 0 to 3\n"
    assert sweep.main(argv) == 0  # what is finished is left out, without --jobs all run at once
    assert "#SBATCH --array=0-2%3\n" in script.read_text() and "--seed=0" in script.read_text()


@pytest.mark.parametrize("file", sorted((ROOT / "scripts" / "grids").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_grids_that_ship_are_right(file, capsys):
    assert sweep.main([str(file), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
