"""The folder of a run: results/<dataset>/<model>/<run>/, written as it happens, each file renamed into place."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path

from utils.errors import Busy, RunError, UserError
from utils.files import replacing
from utils.registry import ROOT

# settings that say where and how a run is carried out, not what it computes
NOT_IDENTITY = {
    "given",
    "asked",
    "command",
    "results_path",
    "base_path",
    "data_dir",  # what lies there counts (data_fingerprint)
    "savecheck",
    "loadcheck",
    "stop_after",
    "nowand",
    "wandb_project",
    "wandb_entity",
    "wandb_mode",
    "tensorboard",
    "notes",
    "export_adapter",
    "device",
    "num_threads",
    "engine",
    "clients_per_batch",
    "num_gpus",
    "workers",
    "ray_address",
    "allow_missing_clients",
    "compile",
    "model_config",
    "dataset_config",
    "unlearning_flags",
}
# evaluation settings change what is reported on the way, so they stay part of the identity


def settings_of(args: Namespace) -> dict:
    """The resolved settings as plain data, in alphabetical order."""
    return {k: v for k, v in sorted(vars(args).items()) if k not in ("given", "asked", "unlearning_flags")}


def identity(args: Namespace, seed: bool = True) -> dict:
    """The settings that the numbers of a run depend on, as they were asked for (``parse_args``)."""
    drop = NOT_IDENTITY | (set() if seed else {"seed"})
    if not args.fl:
        from utils.args import FEDERATED_FLAGS

        drop = drop | set(FEDERATED_FLAGS)
    asked = Namespace(**args.asked) if "asked" in args else args
    drop = drop | set(getattr(args, "unlearning_flags", ()))
    return {k: v for k, v in settings_of(asked).items() if k not in drop}


def settings_hash(args: Namespace, seed: bool = True) -> str:
    """Ten hexadecimal digits that name the settings; without the seed, the group a run belongs to."""
    return hashlib.blake2b(json.dumps(identity(args, seed), sort_keys=True).encode(), digest_size=5).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Git commit of the code and versions of what it runs on."""
    import torch

    git, commit = ["git", "-C", str(ROOT)], ""
    if (ROOT / ".git").exists():  # else it is a copy, or installed: a repository around it is another one
        with suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(
                [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip()
            if subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip():
                commit += "+changes"
    return {
        "git_commit": commit,
        "version_python": platform.python_version(),
        "version_torch": str(torch.__version__),
        "platform": platform.machine(),
    }


def peak_memory_mb() -> float:
    """Peak resident memory of this process, or peak allocated on the GPU where there is one, in MB (2^20 bytes)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write_text(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    with replacing(file) as temporary:
        temporary.write_text(text)


def write_csv(file: Path, rows: list[dict]) -> None:
    """Write rows as CSV; the columns are those of all rows, in order of appearance. Floats keep full precision."""
    write_text(file, _csv(rows))


def _csv(rows: list[dict], header: bool = True) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="")
    if header:
        writer.writeheader()
    writer.writerows([{k: "" if v is None or v != v else v for k, v in row.items()} for row in rows])
    return buffer.getvalue()


class Table:
    """A CSV file that grows at its end; the first update writes it anew, so nothing is left of a sitting that died.

    Args:
        rows: rows(start) gives the rows from ``start`` on, all with the same columns.
    """

    def __init__(self, file: Path, rows: Callable[[int], list[dict]]) -> None:
        self.file, self.rows, self.written = file, rows, 0

    def update(self) -> None:
        """Write what has come since the last time."""
        new = self.rows(self.written)
        if self.written == 0:
            write_csv(self.file, new)
        elif new:
            try:
                with open(self.file, "a", newline="") as f:
                    f.write(_csv(new, header=False))
            except OSError as e:
                raise RunError(f"cannot write {self.file}: {e.strerror or e}") from e
        self.written += len(new)


class TensorBoard:
    """``--tensorboard 1``: rows as scalars, one event file for each sitting, in the run's folder.

    This class and :class:`Wandb` are what a logger is besides the CSV files. Steps are the rows of rounds.csv.

    Args:
        run: the run. start: rows that are there already, when it goes on; what was logged from there on is repeated.
    """

    def __init__(self, run: Run, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run.path / "tensorboard", purge_step=start or None)

    def log(self, row: dict, step: int) -> None:
        """A row of rounds.csv."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed goes on after this row

    def summary(self, row: dict, step: int) -> None:
        """The row of summary.csv, at the end of a sitting, after ``step`` rows."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(f"summary/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """``--nowand 0``: Weights & Biases. A run that goes on is the same run there; steps it has already are not taken
    again."""

    def __init__(self, run: Run, start: int) -> None:
        import wandb

        args = run.args
        self._run = wandb.init(
            project=args.wandb_project,
            entity=args.wandb_entity,
            mode=args.wandb_mode,
            id=run.path.name,
            name=run.path.name,
            resume="allow",
            config=settings_of(args),
            dir=str(run.path),
        )

    def log(self, row: dict, step: int) -> None:
        self._run.log(_numbers(row), step=step)

    def summary(self, row: dict, step: int) -> None:
        self._run.summary.update({k: v for k, v in row.items() if v is not None})

    def close(self) -> None:
        self._run.finish()


def _numbers(row: dict) -> dict:
    return {k: v for k, v in row.items() if isinstance(v, int | float)}


class Run:
    """One run's folder and what is written there.

    Attributes:
        path: the folder. rounds: rows of rounds.csv so far. clock: seconds spent, over all sittings.
    """

    def __init__(self, path: Path, args: Namespace) -> None:
        self.path, self.args = path, args
        self.rounds: list[dict] = []
        self.clock = {"train": 0.0, "train_cpu": 0.0, "total": 0.0}
        self._started = time.perf_counter()
        self.loggers: list[TensorBoard | Wandb] = []
        self._summary: dict | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115 - held for as long as the run lives
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working in {path}: wait for it or start a run of its own") from None
        except OSError as e:
            raise UserError(f"cannot write to {path}: {e.strerror or e}; give another --results_path") from None
        self._log = open(path / "log.txt", "a")  # noqa: SIM115

    # ---- finding and opening

    @staticmethod
    def folder(args: Namespace) -> Path:
        return Path(args.results_path) / args.dataset / args.model

    @classmethod
    def create(cls, args: Namespace) -> Run:
        """A new folder ``<date>-<time>-s<seed>-<hash>``; sweeps that start in the same second get different ones."""
        name = f"{datetime.now():%Y%m%d-%H%M%S}-s{args.seed}-{settings_hash(args)}"
        for k in range(1000):
            path = cls.folder(args) / (name if k == 0 else f"{name}-{k}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as e:
                raise UserError(f"cannot create {path}: {e.strerror or e}; give another --results_path") from None
            run = cls(path, args)
            run.write_args()
            return run
        raise UserError(f"no free folder for {name} under {cls.folder(args)}")

    @classmethod
    def candidates(cls, args: Namespace) -> list[Path]:
        """Folders of runs with the same settings, newest first."""
        found = cls.folder(args).glob(f"*-s{args.seed}-{settings_hash(args)}*")
        return sorted((p for p in found if p.is_dir()), key=lambda p: (p.name[:15], len(p.name), p.name), reverse=True)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint" / "last.safetensors"

    @property
    def request(self) -> Path:
        """The state when clients asked to be forgotten."""
        return self.path / "checkpoint" / "request.safetensors"

    # ---- writing

    def write_args(self) -> None:
        import yaml

        write_text(self.path / "args.yaml", yaml.safe_dump({**settings_of(self.args), **versions()}, sort_keys=True))

    def say(self, text: str = "", screen: bool = True) -> None:
        """A line for the reader: on the screen (past any progress bar) and, with the time, in log.txt."""
        if screen:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        self._log.write(f"{datetime.now():%H:%M:%S} {text}\n")
        self._log.flush()

    def add_round(self, row: dict) -> None:
        """Append a row to rounds.csv."""
        self.rounds.append(row)
        write_csv(self.path / "rounds.csv", self.rounds)
        for logger in self.loggers:
            logger.log(row, len(self.rounds) - 1)

    def write_accuracy(self, class_il, task_il) -> None:
        """accuracy.csv: for every finished task the accuracy in % on each task, class-IL and task-IL."""
        rows = []
        for name, matrix in (("class-il", class_il), ("task-il", task_il)):
            for i, row in enumerate(matrix):
                rows.append({"after_task": i, "setting": name, **{f"task_{j}": v for j, v in enumerate(row)}})
        write_csv(self.path / "accuracy.csv", sorted(rows, key=lambda r: r["after_task"]))

    def write_summary(self, row: dict) -> None:
        """summary.csv: one row, identity and settings first."""
        a = self.args
        fed = (lambda k: getattr(a, k)) if a.fl else (lambda k: None)
        head = {
            "run": self.path.name,
            "model": a.model,
            "dataset": a.dataset,
            "backbone": a.backbone,
            "setting": "federated" if a.fl else "central",
            "seed": a.seed,
            "model_config": a.model_config,
            "settings_hash": settings_hash(a, seed=False),
            "status": row.pop("status"),
            **{
                k: fed(k)
                for k in (
                    "num_clients",
                    "partition_mode",
                    "distribution_alpha",
                    "num_comm_rounds",
                    "participation_rate",
                )
            },
            "n_epochs": a.n_epochs,
            "batch_size": a.batch_size,
            "optimizer": a.optimizer,
            "lr": a.lr,
        }
        self._summary = {**head, **row, "command": a.command, **versions()}
        write_csv(self.path / "summary.csv", [self._summary])

    def start_loggers(self, start: int) -> None:
        """Log elsewhere too, where that is asked for; ``start`` rows of rounds.csv are there already.

        Raises:
            UserError: what a logger says that cannot start (no key, no network).
        """
        for flag, wanted, logger in (
            ("--tensorboard 1", self.args.tensorboard, TensorBoard),
            ("--nowand 0", not self.args.nowand, Wandb),
        ):
            if wanted:
                try:
                    self.loggers.append(logger(self, start))
                except Exception as e:
                    raise UserError(f"{flag}: {type(e).__name__}: {e}") from e

    def seconds(self) -> float:
        """Seconds of all sittings of this run."""
        return self.clock["total"] + time.perf_counter() - self._started

    def close(self) -> None:
        try:
            for logger in self.loggers:
                if self._summary is not None:
                    logger.summary(self._summary, len(self.rounds))
                logger.close()
        finally:
            self._log.close()
            self._lock.close()


def is_finished(path: Path, args: Namespace) -> bool:
    """Whether the run in a folder has done all the tasks that ``args`` asks for."""
    try:
        with open(path / "summary.csv", newline="") as f:
            row = next(csv.DictReader(f))
        wanted = int(row["n_tasks"]) if args.stop_after is None else min(args.stop_after, int(row["n_tasks"]))
        return row["status"] in ("finished", "stopped") and int(row["tasks_done"]) >= wanted
    except (OSError, StopIteration, KeyError, ValueError):
        return False


def find_checkpoint(args: Namespace) -> tuple[Path | None, Path | None, bool]:
    """What ``--loadcheck`` points to: (run folder or None, checkpoint file or None, whether that run is finished)."""
    if args.loadcheck is None:
        return None, None, False
    if args.loadcheck != "auto":
        path = Path(args.loadcheck)
        if not path.exists():
            raise UserError(f"--loadcheck: there is nothing at {path}; give a run folder, its checkpoint file, or auto")
        file = path / "checkpoint" / "last.safetensors" if path.is_dir() else path
        return (file.parent.parent if file.parent.name == "checkpoint" else None), file, False
    for path in Run.candidates(args):
        if is_finished(path, args):
            return path, None, True
        if (path / "checkpoint" / "last.safetensors").exists():
            return path, path / "checkpoint" / "last.safetensors", False
    return None, None, False


@contextmanager
def claimed(args: Namespace) -> Iterator[None]:
    """Under ``--loadcheck auto`` no two processes carry out the same run, from before it has a folder to its end.

    The lock is on a file of the results folder, named by the settings and the seed; it goes with its process.

    Raises:
        Busy: another process is at it.
    """
    if args.loadcheck != "auto":
        yield
        return
    file = Path(args.results_path) / ".locks" / f"s{args.seed}-{settings_hash(args)}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file, "w")  # noqa: SIM115
    except OSError as e:
        raise UserError(f"cannot write to {file.parent}: {e.strerror or e}; give another --results_path") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another process is at this run (it holds {file}): wait for it, or leave out --loadcheck auto"
            ) from None
        yield
