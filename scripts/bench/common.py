"""What the benchmark scripts share: a federated experiment at its first task, timing in turns, statistics, tables."""

from __future__ import annotations

import copy
import os
import platform
import shlex
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads that spin disturb a measurement
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from datasets import get_dataset_class
from datasets.utils.continual_dataset import preload
from datasets.utils.partition import Partition
from federated.clients import Clients, Ledger
from federated.engines import make_engine
from main import build
from utils.args import parse_args
from utils.loggers import versions, write_csv


def settings(*flags: str) -> Namespace:
    """The resolved settings of a federated run with these flags, given as in a shell."""
    return parse_args([*(f for some in flags for f in shlex.split(some)), "--fl"])


class Experiment:
    """A federated run whose first task has begun.

    One server and one worker, over which any number of engines may take turns.

    Args:
        begin: whether the server's work before the first round is done, too.

    Attributes:
        sizes: samples by client. start: the weights before the first round.
    """

    def __init__(self, args: Namespace, begin: bool = True) -> None:
        self.args = args
        self.dataset, self.model, self.worker, _ = build(args)
        self.partition = Partition.make(self.dataset, args)
        self.sizes = {i: n for i, n in enumerate(self.partition.sizes(0)) if n > 0}
        self.states: dict[int, dict] = {}
        self.ledger = Ledger()
        self.dataset.get_data_loaders()
        self.model.meta_begin_task(self.dataset)
        if begin:
            self.model.begin_rounds(self.clients(self.engine("serial"), -1))
        self.start = {n: p.detach().clone() for n, p in self.model.trainable().items()}

    def engine(self, name: str, say: Callable = lambda *_: None, **more):
        """An engine over this experiment's worker; ``more`` are its settings (clients_per_batch, workers)."""
        args = copy.copy(self.args)
        vars(args).update(engine=name, **more)
        return make_engine(self.worker, self.partition, self.states, args, say)

    def clients(self, engine, r: int, ids=None) -> Clients:
        return Clients(self.sizes if ids is None else ids, engine, self.ledger, 0, r)

    def round(self, engine, r: int) -> None:
        """A communication round with all clients."""
        self.model.round(self.clients(engine, r), r)

    def rewind(self) -> None:
        """Back to the weights before the first round."""
        for name, p in self.model.trainable().items():
            p.data = self.start[name].clone()

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.trainable().items()}


def synthetic_images(
    dataset: str, n: int, others: int, tests: int, stored: tuple[int, int] | None = None, base_path: str = "./data/"
) -> None:
    """Put random images where ``dataset`` looks for its arrays, so that nothing is read or downloaded.

    Args:
        n: training samples of the first task. others: of each later task. tests: test samples of each task.
        stored: height and width of the images where that is not the size fed to the network.
    """
    cls, rng = get_dataset_class(dataset), np.random.default_rng(0)
    per_task = cls.N_CLASSES_PER_TASK
    for train in (True, False):
        labels, first = [], 0
        for task, classes in enumerate([per_task] * cls.N_TASKS if isinstance(per_task, int) else per_task):
            labels.append(np.arange(tests if not train else n if task == 0 else others) % classes + first)
            first += classes
        shape = sum(map(len, labels)), cls.CHANNELS, *(stored or cls.SIZE)
        images = rng.integers(256, size=shape, dtype=np.uint8)
        preload({(cls.SOURCE or cls.NAME, base_path, train): (images, np.concatenate(labels))})


def update_differs(start: dict, one: dict, other: dict) -> float:
    """How far two sides have come apart: the norm of the difference over the norm of what ``one`` has learned."""
    far = sum(float((one[n].double().cpu() - other[n].double().cpu()).square().sum()) for n in start)
    way = sum(float((one[n].double().cpu() - start[n].double().cpu()).square().sum()) for n in start)
    return (far / way) ** 0.5 if way else float(far > 0)


def synchronise(device: str) -> None:
    """Wait for the device, so that the clock tells when the work is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(sides: dict[str, Callable[[int], None]], repeats: int, first: int = 1, device: str = "cpu") -> dict:
    """Run every side ``repeats`` times, in turns, whose order rotates.

    Args:
        sides: name -> what to run, called with the number of the round, which counts from ``first``.

    Returns:
        {side: {"wall": seconds of each turn, "cpu": CPU seconds of this process}}.
    """
    times = {name: {"wall": [], "cpu": []} for name in sides}
    names = list(sides)
    for r in range(first, first + repeats):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name](r)
            synchronise(device)
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return times


def low_and_mid(seconds: list[float], scale: float = 1.0, digits: int = 3) -> tuple[float, float]:
    """Minimum and median."""
    return round(scale * min(seconds), digits), round(scale * statistics.median(seconds), digits)


def ratios(mine: list[float], theirs: list[float]) -> tuple[float, float]:
    """Ratio of the minima, and median of the ratios turn by turn."""
    return (
        round(min(mine) / min(theirs), 4),
        round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 4),
    )


def differences(mine: list[float], theirs: list[float], scale: float = 1e3) -> tuple[float, float]:
    """Difference of the minima, and median of the differences turn by turn; in milliseconds by default."""
    return (
        round(scale * (min(mine) - min(theirs)), 3),
        round(scale * statistics.median(a - b for a, b in zip(mine, theirs, strict=True)), 3),
    )


def peak_rss(reset: bool = False) -> float | None:
    """Peak resident memory of this process in MB (2^20 bytes) since the last reset; None where Linux's /proc is not."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        return None


def resident() -> float:
    """Resident memory of this process in MB now; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def give_back_memory() -> None:
    """Free what Python and the C library hold for later use, so that one side's peak is not another's."""
    import ctypes
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def standard_options(doc: str, repeats: int) -> ArgumentParser:
    """A parser with the options that every script has."""
    parser = ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="measured rounds of each side (default: %(default)s)"
    )
    return parser


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write(out: str | None, rows: list[dict]) -> None:
    """Write the rows, each with the commit, the versions and the machine."""
    if out:
        write_csv(Path(out), [{**row, **versions(), "cpus": os.cpu_count(), "cpu": cpu_name()} for row in rows])


def has_ray(engine: bool = False) -> bool:
    """Whether Ray can be imported, and with ``engine`` whether Herd has an engine for it."""
    names = ["ray", "federated.engines.ray"] if engine else ["ray"]
    return all(find_spec(name) is not None for name in names)
