"""Many runs from one file: ``python -m utils.sweep grid.yaml --jobs 2 --devices cpu``.

    base: {dataset: seq-digits, fl: true, num_clients: 5}       # flags of every run
    runs:                                                       # one by one, each with the whole grid
      - {model: fedavg, model_config: lora}
      - {model: dolfin}
    grid: {distribution_alpha: [0.5, 0.1], seed: [0, 1, 2]}     # every combination
    exclude:                                                    # but not these
      - {model: dolfin, distribution_alpha: 0.1}

A flag that takes several values has a list (under ``grid`` a list of lists), a switch ``true``; ``null`` takes back
what ``base`` gives. ``grid`` overrides ``base``, and what a run of ``runs`` fixes is not varied for it. All command
lines are checked before the first one starts.

Runs are processes of their own, ``python main.py ... --loadcheck auto --savecheck task``: what is finished is skipped,
what was interrupted goes on, and no run is carried out twice, also by sweeps side by side. One that fails does not
stop the others. Ctrl-C lets the runs save and stop; once more kills them. ``<results>/sweeps/<grid>-<time>/`` holds
sweep.csv and a log for each run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from utils.args import HerdParser, number, parse_args
from utils.errors import Busy, UserError, nearest
from utils.loggers import claimed, find_checkpoint, settings_hash, write_csv, write_text
from utils.registry import ROOT

PROGRAM = [sys.executable, str(ROOT / "main.py")]
SECTIONS = ("base", "runs", "grid", "exclude")
BUSY = 75  # main.py's exit code where another process is at the same run
PATIENCE = 2.0  # seconds between looks at a run that another process carries out
TAIL = 5  # lines of a failed run's log that are shown


# ---------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Setting:
    """A flag, its value, and the line of the grid that says so."""

    flag: str
    value: object
    line: int


class Grid:
    """A grid file, read.

    Attributes:
        base: settings. runs, exclude: lists of settings. axes: for each flag of ``grid`` its settings.

    Raises:
        UserError: it is not such a file; the message names the line.
    """

    def __init__(self, file: Path) -> None:
        import yaml

        self.file, self.base, self.runs, self.axes, self.exclude = file, [], [], [], []
        try:
            self._yaml = yaml.SafeLoader(file.read_text())
            root = self._yaml.get_single_node()
            self._refuse_doubles(root)
            for key, node in self._pairs(root, "the file"):
                self._read(key, node)
        except OSError as e:
            raise UserError(f"{file}: {e.strerror or e}; give a grid file (python -m utils.sweep --help)") from None
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise UserError(f"{file} is not valid YAML: {e}") from None

    def _read(self, key: str, node) -> None:
        """A section of the file."""
        if key == "base":
            self.base = self._settings(node, key)
        elif key == "grid":
            for flag, values in self._pairs(node, key):
                items = self._items(values, f"grid: {flag}")
                self.axes.append([Setting(flag, self._value(v), v.start_mark.line + 1) for v in items])
        elif key in SECTIONS:
            setattr(self, key, [self._settings(item, f"an entry of {key}") for item in self._items(node, key)])
        else:
            raise self.error(node, f"unknown section {key!r}: {nearest(key, SECTIONS)}")

    def error(self, node, message: str) -> UserError:
        return UserError(f"{self.file} line {node.start_mark.line + 1}: {message}")

    def _value(self, node) -> object:
        return self._yaml.construct_object(node, deep=True)

    def _refuse_doubles(self, node) -> None:
        """YAML readers take the last of two equal keys; here that is a mistake. Before merge keys are resolved."""
        below = getattr(node, "value", None)
        if not isinstance(below, list):
            return
        keys: set[str] = set()
        for child in below:
            if isinstance(child, tuple):
                key, child = child
                if str(key.value) in keys:
                    raise self.error(key, f"{key.value} stands there twice")
                keys.add(str(key.value))
            self._refuse_doubles(child)

    def _pairs(self, node, what: str) -> list[tuple]:
        """(key, node of the value) of a mapping."""
        if getattr(node, "id", None) != "mapping":
            where = "" if node is None else f" line {node.start_mark.line + 1}"
            raise UserError(f"{self.file}{where}: {what} must be a mapping (flag: value)")
        self._yaml.flatten_mapping(node)  # <<: merge keys, which come first
        return list({str(self._value(k)): (str(self._value(k)), v) for k, v in node.value}.values())

    def _items(self, node, what: str) -> list:
        if node.id != "sequence" or not node.value:
            raise self.error(node, f"{what} must be a list with something in it")
        return node.value

    def _settings(self, node, what: str) -> list[Setting]:
        return [Setting(k, self._value(v), v.start_mark.line + 1) for k, v in self._pairs(node, what)]

    def combinations(self) -> list[dict[str, Setting]]:
        """The settings of every run, by flag; runs vary slowest, the last flag of ``grid`` fastest.

        Raises:
            UserError: an entry of ``exclude`` that nothing matches.
        """
        made = []
        for run in self.runs or [[]]:
            fixed = {s.flag for s in run}
            axes = [axis for axis in self.axes if axis[0].flag not in fixed]
            for choice in itertools.product(*axes):
                made.append({s.flag: s for s in (*self.base, *run, *choice)})
        for entry in self.exclude:
            left = [c for c in made if not all(_matches(c.get(s.flag), s.value) for s in entry)]
            if len(left) == len(made):
                line = entry[0].line if entry else 1
                raise UserError(f"{self.file} line {line}: this entry of exclude fits no run of the grid")
            made = left
        return made

    def check(self, settings: dict[str, Setting], more: dict) -> Namespace:
        """The settings of a run, parsed; ``more`` are the sweep's own.

        Raises:
            UserError: something is wrong with them; the message names the line that says so.
        """
        for s in settings.values():
            if s.flag in more:
                raise UserError(f"{self.file} line {s.line}: --{s.flag} is set by the sweep: drop it here")
        try:
            return parse_args({"savecheck": "task", **{s.flag: s.value for s in settings.values()}, **more})
        except UserError as e:
            text = str(e)

        def blame(s: Setting) -> int:
            """How clearly the message speaks of a setting."""
            flag = re.escape(s.flag)
            named, spoken = re.search(rf"--{flag}(?!\w)", text), re.search(rf"(?<![\w-]){flag}(?!\w)", text)
            return 4 * bool(named) + 2 * (f"'{s.value}'" in text) + bool(spoken)

        s = max(settings.values(), key=blame, default=None)
        if s is None or not blame(s):
            said = " ".join(f"{s.flag}={s.value}" for s in settings.values())
            raise UserError(f"{self.file}, the run {said or 'without flags'}: {text}")
        raise UserError(f"{self.file} line {s.line} ({s.flag}: {s.value}): {text}")


def _matches(setting: Setting | None, value: object) -> bool:
    """Whether a run's setting is what ``exclude`` says: the value, or one of a list of them."""
    mine = None if setting is None else setting.value
    return mine == value or (isinstance(value, list) and mine in value)


# ---------------------------------------------------------------- its runs


@dataclass
class Job:
    """A run of the sweep: waiting, running, then finished, skipped (it was finished before), failed or interrupted."""

    args: Namespace
    log: Path | None = None
    status: str = "waiting"
    seconds: float | None = None
    folder: Path | None = None
    faa: float | None = None
    code: int | None = None  # exit code
    after: float = 0.0  # when to look at it again
    began: float = 0.0
    process: subprocess.Popen | None = None

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.args.command)[2:]

    def is_finished(self) -> bool:
        """Whether its run is; then ``folder`` and ``faa`` are known."""
        from utils.compare import read_run

        folder, _, finished = find_checkpoint(self.args)
        if finished:
            self.folder, self.faa = folder, read_run(folder).get("faa")
        return finished


def jobs_of(grid: Grid, results_path: str | None) -> list[Job]:
    """The runs of a grid, all of them checked, each once."""
    more = {"loadcheck": "auto"} | ({} if results_path is None else {"results_path": results_path})
    found: dict[tuple, Job] = {}
    combinations = grid.combinations()
    for settings in combinations:
        args = grid.check(settings, more)
        beside = (args.stop_after, args.results_path, *(str(getattr(args, k, None)) for k in args.unlearning_flags))
        found.setdefault((settings_hash(args), args.seed, *beside), Job(args))
    if not found:
        raise UserError(f"{grid.file}: no run is left; say less under exclude")
    if len(found) < len(combinations):
        print(f"{len(combinations)} combinations, {len(found)} different runs")
    return list(found.values())


class Sweep:
    """Runs in progress.

    Args:
        folder: where sweep.csv and the logs go. devices: slot i runs on device i modulo their number. slots: runs at a
            time. threads: CPU threads of a run that does not say.
    """

    def __init__(self, jobs: list[Job], folder: Path, devices: Sequence[str], slots: int, threads: int) -> None:
        self.jobs, self.folder, self.devices, self.threads = jobs, folder, devices, threads
        self.running: dict[int, Job | None] = dict.fromkeys(range(slots))
        self.waiting, self.signals, self.done, self.patient = deque(jobs), 0, 0, False
        for i, job in enumerate(jobs):
            job.log = folder / f"{i:0{len(str(len(jobs) - 1))}}-{job.args.model}-s{job.args.seed}.log"

    def run(self) -> int:
        """Carry them out. Returns the exit code: 0; 1 where a run did not finish; 130 after Ctrl-C."""
        from tqdm import tqdm

        def stop(signum, frame):
            self.signals += 1

        heard = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        old = {s: signal.signal(s, stop) for s in heard}  # nohup stays nohup
        told = 0
        try:
            with tqdm(total=len(self.jobs), unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
                while self.waiting or any(self.running.values()):
                    if self.signals > told:
                        told = self.signals
                        self.interrupt(kill=told > 1)
                    for slot, job in self.running.items():
                        if job is not None and job.process.poll() is not None:
                            self.running[slot] = None
                            self.collect(job)
                        if self.running[slot] is None:
                            self.running[slot] = self.start(slot)
                    bar.update(self.done - bar.n)
                    time.sleep(0.05)
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
        return self.report()

    def interrupt(self, kill: bool) -> None:
        """Nothing more is started; what runs saves and stops, or is killed."""
        for job in self.waiting:
            job.status = "interrupted"
        self.waiting.clear()
        running = [job for job in self.running.values() if job is not None]
        self.say("killed" if kill else f"stopping {len(running)} runs once they have saved (Ctrl-C again to kill them)")
        for job in running:
            if kill:
                with suppress(ProcessLookupError):
                    os.killpg(job.process.pid, signal.SIGKILL)
            else:
                job.process.send_signal(signal.SIGINT)

    def start(self, slot: int) -> Job | None:
        """Start the next run that is neither finished nor in the hands of another process."""
        for _ in range(len(self.waiting)):
            job = self.waiting.popleft()
            if time.monotonic() < job.after:
                self.waiting.append(job)
                continue
            if job.is_finished() and not job.args.unlearn_client:
                self.settle(job, "skipped")
                continue
            try:
                with claimed(job.args):
                    pass
            except Busy:
                self.postpone(job)
                continue
            given, argv = set(job.args.given), list(job.argv)
            device = job.args.device if "device" in given else self.devices[slot % len(self.devices)]
            argv += [] if "device" in given else [f"--device={device}"]
            argv += [] if "num_threads" in given or device != "cpu" else [f"--num_threads={self.threads}"]
            with open(job.log, "ab") as log:  # a session of its own: Ctrl-C in the terminal is for the sweep alone
                job.process = subprocess.Popen(
                    [*PROGRAM, *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            job.status, job.began = "running", time.monotonic()
            self.write()
            return job
        return None

    def postpone(self, job: Job) -> None:
        """Another process is at it: look again later, when it is finished, or was given up."""
        job.status, job.after = "waiting", time.monotonic() + PATIENCE
        self.waiting.append(job)
        if not self.patient:
            self.say(f"another process carries out {shlex.join(job.argv)}; this sweep waits for it at the end")
            self.patient = True

    def collect(self, job: Job) -> None:
        """A process has ended."""
        code, job.process = job.process.returncode, None
        if code == BUSY and not self.signals:
            self.postpone(job)
            return
        job.seconds, job.code = round(time.monotonic() - job.began, 1), code
        if code == 0:
            job.is_finished()
            self.settle(job, "finished")
        else:
            self.settle(job, "interrupted" if self.signals or code == 130 else "failed")

    def settle(self, job: Job, status: str) -> None:
        job.status = status
        self.done += 1
        spent = "" if job.seconds is None else f" {job.seconds:.1f} s"
        faa = "" if job.faa is None else f" faa {job.faa:.2f}"
        self.say(f"[{self.done}/{len(self.jobs)}] {status}{spent}{faa}: {shlex.join(job.argv)}")
        self.write()

    def say(self, text: str) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads on, the sweep does
            mute()

    def write(self) -> None:
        """Bring sweep.csv up to date."""
        columns = ("status", "seconds", "folder", "faa", "log")
        rows = [{"command": j.args.command} | {c: getattr(j, c) for c in columns} for j in self.jobs]
        write_csv(self.folder / "sweep.csv", rows)

    def report(self) -> int:
        """What came of it, with the end of the log of each run that failed. Returns the exit code."""
        self.write()
        for job in (j for j in self.jobs if j.status == "failed"):
            print(f"\nfailed (exit code {job.code}): {job.args.command}\n  {job.log} ends:")
            for line in job.log.read_text(errors="replace").splitlines()[-TAIL:]:
                print(f"  | {line}")
        counts = Counter(j.status for j in self.jobs)
        print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())) + f": {self.folder / 'sweep.csv'}")
        return 130 if self.signals else int(any(j.status not in ("finished", "skipped") for j in self.jobs))


def mute() -> None:
    """Write to nowhere from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_slurm(file: Path, jobs: list[Job], folder: Path, at_a_time: int | None, grid: Path) -> None:
    """A SLURM array script with one of the jobs for each index, logs in ``folder``."""
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={re.sub(r'[^A-Za-z0-9._-]', '_', grid.stem)}",
        f"#SBATCH --array=0-{len(jobs) - 1}%{at_a_time or len(jobs)}",
        f"#SBATCH --output={folder.resolve()}/%a.log",
        "#SBATCH --open-mode=append",
        "# before time is up the run saves and stops; submitted again, it goes on",
        "#SBATCH --signal=B:INT@120",
        "# add what your cluster wants: #SBATCH --partition=... --time=... --gres=gpu:1 --cpus-per-task=...",
        f"# made by: python -m utils.sweep {shlex.quote(str(grid))} --slurm {shlex.quote(str(file))}",
        "set -euo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        'case "$SLURM_ARRAY_TASK_ID" in',
        *(f"{i}) exec {shlex.join([*PROGRAM, *job.argv])} ;;" for i, job in enumerate(jobs)),
        "esac",
        f'echo "no run $SLURM_ARRAY_TASK_ID: 0 to {len(jobs) - 1}" >&2',
        "exit 2",
    ]
    write_text(file, "\n".join(lines) + "\n")


def new_folder(results: Path, grid: Path) -> Path:
    """``<results>/sweeps/<grid>-<time>``, which no other sweep has."""
    for k in itertools.count():
        path = results / "sweeps" / (f"{grid.stem}-{datetime.now():%Y%m%d-%H%M%S}" + (f"-{k}" if k else ""))
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.is_dir():
                raise UserError(f"{path} is in the way; give another --results_path") from None
        except OSError as e:
            raise UserError(f"cannot create {path}: {e.strerror or e}; give another --results_path") from None


def _devices(given: Sequence[str] | None) -> list[str]:
    """The devices to use: those given, all GPUs, or the best there is."""
    from utils.conf import get_device

    if given:
        return [str(get_device(name)) for name in given]
    if (best := get_device()).type != "cuda":
        return [str(best)]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def sweep(options: Namespace) -> int:
    """Carry out the command line. Returns the exit code."""
    jobs = jobs_of(Grid(options.grid), options.results_path)
    if options.dry_run:
        print("\n".join(job.args.command for job in jobs))
        return 0
    results = Path(options.results_path or jobs[0].args.results_path)
    if options.slurm is not None:
        left = [job for job in jobs if job.args.unlearn_client or not job.is_finished()]
        if not left:
            print(f"all {len(jobs)} runs are finished: {options.slurm} was not written")
            return 0
        write_slurm(options.slurm, left, new_folder(results, options.grid), options.jobs, options.grid)
        print(f"{options.slurm}: {len(left)} of {len(jobs)} runs, the others are finished; sbatch {options.slurm}")
        return 0
    devices = _devices(options.devices)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slots = min(options.jobs or (cpus if devices == ["cpu"] else len(devices)), len(jobs))
    folder = new_folder(results, options.grid)
    print(f"{len(jobs)} runs, {slots} at a time on {', '.join(devices)} -> {folder}")
    return Sweep(jobs, folder, devices, slots, max(1, cpus // slots)).run()


def main(argv: list[str] | None = None) -> int:
    parser = HerdParser(
        prog="python -m utils.sweep",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("grid", type=Path, help="a YAML file, see above")
    add("--jobs", type=number(int, 1), help="runs at a time; default: one per device, on a CPU one per core")
    add("--devices", nargs="+", help="cuda:0 cuda:1, cpu, ...; default: all GPUs, or the best there is")
    add("--dry-run", "--dry_run", action="store_true", help="print the command lines, run nothing")
    add("--slurm", type=Path, metavar="FILE", help="write a SLURM array script of the runs that are left, run nothing")
    add("--results_path", help="folder of the results; default: ./results/")
    try:
        return sweep(parser.parse_args(argv))
    except UserError as e:
        print("error:", e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        mute()
        return 0


if __name__ == "__main__":
    sys.exit(main())
