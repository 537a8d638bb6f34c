"""Who owns which sample: a client is a list of indices, and the whole division is one small index map.

The rules are fed-mammoth's, with generators of their own: the division depends on the seed, the dataset, the number of
clients and the options below, never on the method, so that methods are compared on the same clients.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.utils import seeded
from datasets.utils.continual_dataset import ContinualDataset
from utils.errors import UserError, nearest
from utils.files import replacing

MODES = ("distribution", "quantity", "iid")
MIN_SAMPLES = 6  # fed-mammoth's least number of samples per client and task


def partition_task(
    labels: np.ndarray,
    n_clients: int,
    mode: str = "distribution",
    alpha: float = 0.5,
    class_quantity: int = 1,
    rng: np.random.Generator | None = None,
    min_samples: int = MIN_SAMPLES,
    max_tries: int = 10_000,
) -> list[np.ndarray]:
    """Divide the samples of one task among clients.

    * ``distribution``: for each class p ~ Dirichlet(alpha) **over the clients**, and every sample goes to a client
      drawn from p, so both the labels and the sizes are skewed, more for small alpha. All classes are drawn again until
      every client has ``min_samples``.
    * ``quantity``: each client draws ``class_quantity`` classes without replacement, until every class has an owner;
      the samples of a class are spread uniformly over its owners. Every client gets at least one sample.
    * ``iid``: equal shares of the shuffled samples.

    Args:
        labels: (N,) integers.
        rng: the source of all draws (default: a fixed one).
        max_tries: how often ``distribution`` is drawn before giving up.

    Returns:
        For each client the sorted positions (int64) of its samples in ``labels``; disjoint, together all.

    Raises:
        UserError: an option is out of range, or no division that satisfies the rules was found.
    """
    labels = np.asarray(labels)
    rng = rng if rng is not None else seeded(0, "partition")
    if mode not in MODES:
        raise UserError(f"unknown --partition_mode {mode!r}: {nearest(mode, MODES)}")
    if n_clients < 1:
        raise UserError(f"--num_clients {n_clients}: give 1 or more")
    least = min_samples if mode == "distribution" else 1
    if n_clients * least > len(labels):
        raise UserError(
            f"--num_clients {n_clients} is too many: a task has {len(labels)} training samples and each client needs "
            f"at least {least}; at most {len(labels) // least} clients are possible"
        )
    if mode == "iid":
        return [np.sort(p) for p in np.array_split(rng.permutation(len(labels)), n_clients)]

    classes, per_class = np.unique(labels, return_counts=True)
    if mode == "distribution":
        if not alpha > 0 or not np.isfinite(alpha):
            raise UserError(f"--distribution_alpha {alpha:g}: give a number above 0 (small is more heterogeneous)")
        counts = _dirichlet_counts(per_class, n_clients, alpha, rng, min_samples, max_tries)
    else:
        if not 1 <= class_quantity <= len(classes):
            raise UserError(
                f"--class_quantity {class_quantity}: a task has {len(classes)} classes, give 1 to {len(classes)}"
            )
        if n_clients * class_quantity < len(classes):
            raise UserError(
                f"--num_clients {n_clients} with --class_quantity {class_quantity} leaves classes without an owner: "
                f"the task has {len(classes)}; give at least {-(-len(classes) // n_clients)} classes per client"
            )
        counts = _quantity_counts(per_class, n_clients, class_quantity, rng)
    parts: list[list[np.ndarray]] = [[] for _ in range(n_clients)]
    for c, row in zip(classes, counts):  # who gets how many is settled; which ones is a shuffle
        shuffled = rng.permutation(np.flatnonzero(labels == c))
        for part, share in zip(parts, np.split(shuffled, np.cumsum(row)[:-1])):
            part.append(share)
    return [np.sort(np.concatenate(part)) for part in parts]


def _dirichlet_counts(
    per_class: np.ndarray, n_clients: int, alpha: float, rng: np.random.Generator, min_samples: int, max_tries: int
) -> np.ndarray:
    """(classes, clients) numbers of samples, every column summing to ``min_samples`` or more.

    Independent categorical draws and multinomial counts have the same law; the counts need no loop over the samples,
    and several tries are drawn at once.
    """
    tried, at_once = 0, 1
    most = max(1, 2**22 // (len(per_class) * n_clients))  # bounds the memory of a batch of tries
    while tried < max_tries:
        n = min(at_once, most, max_tries - tried)
        p = rng.dirichlet(np.full(n_clients, alpha), size=(n, len(per_class)))
        lost = ~np.isfinite(p).all(-1)  # alpha so small that every weight underflowed: the limit is one owner
        p[lost] = np.eye(n_clients)[rng.integers(n_clients, size=int(lost.sum()))]
        p[p < 1e-20] = 0
        counts = rng.multinomial(per_class, p / p.sum(-1, keepdims=True))
        good = np.flatnonzero(counts.sum(1).min(-1) >= min_samples)
        if len(good):
            return counts[good[0]]
        tried, at_once = tried + n, at_once * 2
    raise UserError(
        f"no division found in {max_tries} tries: {n_clients} clients with at least {min_samples} samples each are too "
        f"unlikely at --distribution_alpha {alpha:g}; give a larger alpha or fewer clients"
    )


def _quantity_counts(
    per_class: np.ndarray, n_clients: int, quantity: int, rng: np.random.Generator, max_tries: int = 1000
) -> np.ndarray:
    """(classes, clients) numbers of samples; each client owns ``quantity`` classes, each class has an owner."""
    n_classes = len(per_class)
    for _ in range(max_tries):
        owns = rng.random((n_clients, n_classes)).argsort(1).argsort(1) < quantity
        if owns.any(0).all():
            break
    # few clients with few classes rarely cover all by chance: give an orphan class to an owner of a shared one
    for orphan in np.flatnonzero(~owns.any(0)):
        client, shared = rng.permutation(np.argwhere(owns & (owns.sum(0) > 1)))[0]
        owns[client, shared], owns[client, orphan] = False, True
    p = (owns / owns.sum(0)).T
    for _ in range(max_tries):
        counts = rng.multinomial(per_class, p)
        if counts.sum(0).min() >= 1:
            return counts
    raise UserError(
        f"--num_clients {n_clients} with --class_quantity {quantity} leaves clients without samples (the smallest "
        f"class has {per_class.min()}); give fewer clients or a larger --class_quantity"
    )


class Partition:
    """The index map: for every training task and client, indices into the dataset's training arrays."""

    def __init__(self, tasks: list[list[Tensor]]):
        self.tasks = tasks

    @classmethod
    def make(cls, dataset: ContinualDataset, args: Namespace, exclude: Iterable[int] | None = None) -> Partition:
        """Divide every training task of ``dataset``.

        Args:
            args: ``num_clients``, ``partition_mode`` ('distribution'), ``distribution_alpha`` (the dataset's federated
                default), ``class_quantity`` (1), ``partition_seed``, or ``seed`` when that is None, and
                ``exclude_clients``, who get no samples. exclude: in place of those.
        """

        def arg(name: str, default):
            value = getattr(args, name, None)
            return default if value is None else value

        given = dataset.defaults(fl=True)
        seed = arg("partition_seed", arg("seed", None))
        tasks = []
        for t in range(dataset.n_train_tasks):
            indices = dataset.task_indices(t)
            parts = partition_task(
                dataset.labels_of(indices).numpy(),
                int(arg("num_clients", given.get("num_clients", 10))),
                arg("partition_mode", "distribution"),
                float(arg("distribution_alpha", given.get("distribution_alpha", 0.5))),
                int(arg("class_quantity", 1)),
                seeded(seed, "partition", t),
            )
            tasks.append([indices[torch.from_numpy(p)] for p in parts])
        return cls(tasks).without(arg("exclude_clients", ()) if exclude is None else exclude)

    def without(self, clients: Iterable[int]) -> Partition:
        """The same division, in which some clients have no samples.

        Raises:
            UserError: there is no such client, or a task would have no samples.
        """
        gone = set(clients)
        odd = sorted(gone - set(range(self.n_clients)))
        if odd:
            raise UserError(f"there is no client {odd[0]}: they are 0 to {self.n_clients - 1}")
        tasks = [[part[:0] if i in gone else part for i, part in enumerate(task)] for task in self.tasks]
        for t, task in enumerate(tasks):
            if not sum(map(len, task)):
                raise UserError(f"without client {', '.join(map(str, sorted(gone)))} task {t + 1} has no samples left")
        return Partition(tasks)

    @property
    def n_tasks(self) -> int:
        return len(self.tasks)

    @property
    def n_clients(self) -> int:
        return len(self.tasks[0])

    def indices(self, task: int, client: int) -> Tensor:
        """Sorted int64 indices of the client's samples in the task."""
        return self.tasks[task][client]

    def sizes(self, task: int) -> list[int]:
        """Number of samples per client."""
        return [len(i) for i in self.tasks[task]]

    def save(self, path: str | os.PathLike) -> None:
        """Write an ``.npz`` of plain arrays; a reader never sees half a file."""
        arrays = {}
        for t, clients in enumerate(self.tasks):
            arrays[f"indices_{t}"] = torch.cat(clients).numpy()
            arrays[f"sizes_{t}"] = np.array(self.sizes(t), dtype=np.int64)
        path = Path(path)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Partition:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            tasks = [
                list(torch.from_numpy(file[f"indices_{t}"]).split(file[f"sizes_{t}"].tolist()))
                for t in range(len(file.files) // 2)
            ]
        return cls(tasks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partition):
            return NotImplemented
        return len(self.tasks) == len(other.tasks) and all(
            len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b)) for a, b in zip(self.tasks, other.tasks)
        )

    __hash__ = None
