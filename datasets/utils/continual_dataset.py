"""The dataset contract: uint8 images in memory once, tasks and clients as lists of indices, transforms on batches.

Names follow Mammoth's ``ContinualDataset`` so that method files written for it run unchanged.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.utils import configured, seeded, stratified_split
from datasets.utils.loaders import BatchLoader, ManyLoader, SampleView
from datasets.utils.transforms import Compose, Denormalize, Normalize, Resize, to_float
from utils.errors import UserError

# (SOURCE or NAME, base_path, train) -> (images, labels): one copy per process, also for datasets that share files
_ARRAYS: dict[tuple[str, str, bool], tuple[Tensor, Tensor]] = {}


def preload(arrays: dict[tuple[str, str, bool], tuple[np.ndarray, np.ndarray]]) -> None:
    """Take over what another process has read (``ContinualDataset.arrays``); the memory is not copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shared memory cannot be written to
        _ARRAYS.update({key: (torch.from_numpy(x), torch.from_numpy(y)) for key, (x, y) in arrays.items()})


class ContinualDataset:
    """A benchmark: images, their division into tasks, and how they are fed to the network.

    Subclasses set the class attributes below and write :meth:`load_arrays`. Three settings: ``class-il`` (tasks have
    classes of their own), ``domain-il`` (every task has all samples and classes; :meth:`task_images` changes the
    images) and ``general-continual`` (one task, a ``STREAM`` whose samples come in their order).

    Fields of ``args`` that are read, all optional: ``dataset, base_path ('./data/'), seed, backbone, fl, batch_size,
    n_epochs, minibatch_size, device, drop_last, permute_classes (0/1), validation (percentage of the training set that
    replaces the test set), joint (0/1: one training task with everything; evaluation stays per task),
    dataset_attributes (what --dataset_config changes, see ``configured.py``)``.

    Attributes:
        train_loader: loader of the current task's training data; None before the first.
        test_loaders: one loader per task seen so far (all of them under ``joint``).
        c_task: current training task, -1 before the first.
        class_order: with ``permute_classes`` the int64 array that maps labels, new = class_order[old]; else None.
        train_images, train_labels, eval_images, eval_labels: (N, C, H, W) uint8 and (N,) int64; what
            ``task_indices(task, train)`` points into. With ``validation`` both pairs are the training arrays.
    """

    NAME: str
    SETTING: str = "class-il"
    N_TASKS: int
    N_CLASSES_PER_TASK: int | list[int]
    N_CLASSES: int  # derived when absent
    SIZE: tuple[int, int]  # (H, W) as fed to the network
    CHANNELS: int = 3
    FRAMES: int | None = None  # frames of a sample, for data over time: samples are (FRAMES, C, H, W)
    MEAN: tuple[float, ...] | None = None
    STD: tuple[float, ...] | None = None
    TRAIN_AUGMENT: list = []  # before the normalisation, on float (B, C, H, W) in [0, 1]
    TEST_AUGMENT: list = []
    DEFAULTS: dict[str, Any] = {}
    FED_DEFAULTS: dict[str, Any] = {}  # on top of DEFAULTS under --fl
    STREAM: bool = False  # training samples come in the order of the arrays, not shuffled; not so under --joint
    SOURCE: str | None = None  # datasets with equal SOURCE share one copy of their arrays
    taught_labels: Tensor | None = None  # (N,) what training samples are taught as, where that is not what they are

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        per_task = getattr(cls, "N_CLASSES_PER_TASK", None)
        if "N_CLASSES" not in cls.__dict__ and per_task is not None and hasattr(cls, "N_TASKS"):
            if isinstance(per_task, int):
                cls.N_CLASSES = per_task * (1 if cls.SETTING == "domain-il" else cls.N_TASKS)
            else:
                cls.N_CLASSES = per_task[0] if cls.SETTING == "domain-il" else sum(per_task)

    def __init__(self, args: Namespace | None = None):
        self.args = args if args is not None else Namespace()
        if self.SETTING not in ("class-il", "domain-il", "general-continual"):
            raise ValueError(
                f"{self.NAME}: SETTING is 'class-il', 'domain-il' or 'general-continual', not {self.SETTING!r}"
            )
        changed = self._arg("dataset_attributes", {})
        vars(self).update(configured.division(type(self), changed))
        per_task = self.N_CLASSES_PER_TASK
        self._sizes = [per_task] * self.N_TASKS if isinstance(per_task, int) else list(per_task)
        if len(self._sizes) != self.N_TASKS:
            raise ValueError(f"{self.NAME}: N_CLASSES_PER_TASK has {len(self._sizes)} entries for {self.N_TASKS} tasks")
        self.seed: int | None = self._arg("seed")
        self.joint = bool(int(self._arg("joint", 0)))
        self.n_train_tasks = 1 if self.joint else self.N_TASKS
        self.n_eval_tasks = self.N_TASKS
        self.mixed_domains = self.joint and self.SETTING == "domain-il"
        self.c_task = -1
        self.train_loader: BatchLoader | None = None
        self.test_loaders: list[BatchLoader] = []
        self.configure()
        looks = configured.appearance(type(self), changed)
        listed = {True: looks.pop("TRANSFORM", None), False: looks.pop("TEST_TRANSFORM", None)}
        vars(self).update(looks)
        if listed[False] is not None:  # what get_normalization_transform looks at
            self.TEST_AUGMENT = [t for t in listed[False] if not isinstance(t, Normalize)]
        augment = {True: self.TRAIN_AUGMENT, False: self.TEST_AUGMENT}
        self._transforms = {
            train: Compose([*augment[train], *self._normalize()] if listed[train] is None else listed[train])
            for train in (True, False)
        }
        self._load()
        if changed:
            self._check_size()

    # ---- what a dataset file writes
    @staticmethod
    def get_parser(parser):
        """Add flags of the dataset's own; returns the parser."""
        return parser

    @staticmethod
    def settle(args: Namespace) -> None:
        """Turn what the benchmark depends on besides its flags into settings, before these name the run."""

    def configure(self) -> None:
        """Adapt SIZE, MEAN, STD, TRAIN_AUGMENT, TEST_AUGMENT to ``self.args``, as instance attributes."""

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        """The raw images, uint8 (N, C, H, W), and labels, int64 (N,), in natural order. Called once per process.

        With ``FRAMES`` the images are (N, FRAMES, C, H, W).
        """
        raise NotImplementedError

    def task_images(self, images: Tensor, task: int) -> Tensor:
        """The uint8 batch ``images`` as task ``task`` shows them. Identity, except in domain-il datasets."""
        return images

    # ---- arrays
    def _arg(self, name: str, default: Any = None) -> Any:
        value = getattr(self.args, name, None)
        return default if value is None else value

    def _load(self) -> None:
        self._check_arguments()
        self.train_images, self.train_labels = self._cached(True)
        validation = self._arg("validation")
        if validation is None:
            self.eval_images, self.eval_labels = self._cached(False)
            self._used = {True: torch.arange(len(self.train_labels)), False: torch.arange(len(self.eval_labels))}
        else:
            self.eval_images, self.eval_labels = self.train_images, self.train_labels
            rng = seeded(self.seed, "validation")
            parts = stratified_split(self.train_labels.numpy(), validation / 100, rng)
            self._used = {True: torch.from_numpy(parts[0]), False: torch.from_numpy(parts[1])}
        self.class_order: np.ndarray | None = None
        if int(self._arg("permute_classes", 0)):
            self.class_order = seeded(self.seed, "permute_classes").permutation(self.N_CLASSES)
            order = torch.from_numpy(self.class_order)
            self.train_labels, self.eval_labels = order[self.train_labels], order[self.eval_labels]

    def _check_size(self) -> None:
        """That the transforms of ``--dataset_config`` make images of ``SIZE``, which networks are built for."""
        for train, name in ((True, "TRANSFORM"), (False, "TEST_TRANSFORM")):
            image = to_float(self.task_images(self.train_images[:1], 0))
            try:
                channels, *size = self._transforms[train](image, torch.Generator()).shape[-3:]
            except (ValueError, RuntimeError) as e:
                raise UserError(f"--dataset_config: {name} does not take images of {self.NAME}: {e}") from None
            if channels != self.CHANNELS:
                raise UserError(f"--dataset_config: {name}: means and deviations are not for {self.CHANNELS} channels")
            if size != list(self.SIZE):
                raise UserError(
                    f"--dataset_config: {name} makes images of {size[0]} x {size[1]}, SIZE is {list(self.SIZE)}: make "
                    "them the same"
                )

    def _check_arguments(self) -> None:
        validation = self._arg("validation")
        if validation is not None and not 0 < validation < 100:
            raise UserError(
                f"--validation {validation:g} is not a percentage between 0 and 100: give for example 10 to hold out "
                "10% of the training set, or leave it out to evaluate on the test set"
            )

    def _cached(self, train: bool) -> tuple[Tensor, Tensor]:
        key = (*self._source, train)
        if key not in _ARRAYS:
            images, labels = self.load_arrays(train)
            shape = (self.CHANNELS,) if self.FRAMES is None else (self.FRAMES, self.CHANNELS)
            ok = images.dtype == torch.uint8 and images.dim() == 3 + len(shape) and images.shape[1:-2] == shape
            if not ok or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{self.NAME}: load_arrays gives uint8 (N, {', '.join(map(str, shape))}, H, W) and int64 (N,)"
                )
            if len(labels) == 0 or labels.min() < 0 or labels.max() >= self.N_CLASSES:
                raise ValueError(f"{self.NAME}: load_arrays gives labels outside 0..{self.N_CLASSES - 1}, or none")
            _ARRAYS[key] = images.contiguous(), labels
        return _ARRAYS[key]

    @property
    def _source(self) -> tuple[str, str]:
        return self.SOURCE or self.NAME, str(self._arg("base_path", "./data/"))

    def arrays(self) -> dict[tuple[str, str, bool], tuple[np.ndarray, np.ndarray]]:
        """What was read from files, for :func:`preload` in another process."""
        return {key: (x.numpy(), y.numpy()) for key, (x, y) in _ARRAYS.items() if key[:2] == self._source}

    def to(self, device: torch.device | str) -> ContinualDataset:
        """Keep the uint8 images on ``device``, so that batches are indexed there."""
        shared = self.eval_images is self.train_images
        self.train_images = self.train_images.to(device)
        self.eval_images = self.train_images if shared else self.eval_images.to(device)
        return self

    # ---- tasks
    def get_offsets(self, task: int | None = None) -> tuple[int, int]:
        """Class range (start, end) of an original task; of the current training task when ``task`` is None."""
        if task is None:
            return self.offsets_for_training(max(self.c_task, 0))
        if not 0 <= task < self.N_TASKS:
            raise IndexError(f"{self.NAME} has tasks 0..{self.N_TASKS - 1}, not {task}")
        if self.SETTING == "domain-il":
            return 0, self.N_CLASSES
        start = sum(self._sizes[:task])
        return start, start + self._sizes[task]

    def offsets_for_training(self, task: int) -> tuple[int, int]:
        """Class range of a training task: everything under ``joint``."""
        if self.joint and task == 0:
            return 0, self.N_CLASSES
        return self.get_offsets(task)

    def task_indices(self, task: int, train: bool = True) -> Tensor:
        """Sorted int64 indices of a task's samples in the training arrays, or in the evaluation arrays.

        With ``joint`` on a domain-il dataset, index ``t * N + i`` is sample i of N as task t shows it.
        """
        used = self._used[train]
        start, end = self.offsets_for_training(task) if train else self.get_offsets(task)
        if train and self.mixed_domains:
            return torch.cat([used + t * len(self.train_labels) for t in range(self.N_TASKS)])
        labels = self.labels_of(used, "train" if train else "test")
        return used[(labels >= start) & (labels < end)]

    def labels_of(self, indices: Tensor, split: str = "train") -> Tensor:
        """int64 labels of samples given by indices as ``task_indices`` returns them."""
        labels = self.train_labels if split == "train" else self.eval_labels
        return labels[indices % len(labels)]

    # ---- loaders
    def loader(
        self,
        indices: Tensor,
        task: int,
        batch_size: int,
        train: bool,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        split: str | None = None,
    ) -> BatchLoader:
        """A re-iterable over the samples ``indices``.

        Args:
            indices: positions in the arrays of ``split``, as ``task_indices`` and ``Partition`` give them.
            train: True yields (inputs, labels, not_aug_inputs[, extra fields]), shuffled and augmented;
                False yields (inputs, labels) in order with the test transform.
            generator: CPU generator for the order and the augmentations; None draws from the global one.
            split: ``'train'`` or ``'test'``; by default what ``train`` says. ``train=False, split='train'`` reads
                training samples in order without augmentation (statistics, prototypes, importances).
        """
        view = SampleView(self, indices, task, train, generator, device, split or ("train" if train else "test"))
        return BatchLoader(view, batch_size, drop_last)

    def get_data_loaders(self) -> tuple[BatchLoader, BatchLoader]:
        """Go to the next task: set ``train_loader``, append to ``test_loaders``, return (train, test of this task)."""
        if self.c_task + 1 >= self.n_train_tasks:
            raise IndexError(f"{self.NAME} has no training task after {self.c_task}")
        self.c_task += 1
        device, batch = self._arg("device", "cpu"), self.get_batch_size()
        drop_last = bool(int(self._arg("drop_last", 0)))
        self.train_loader = self.loader(
            self.task_indices(self.c_task), self.c_task, batch, True, device=device, drop_last=drop_last
        )
        for t in range(self.N_TASKS) if self.joint else [self.c_task]:
            self.test_loaders.append(self.test_loader(t))
        return self.train_loader, self.test_loaders[-1]

    def test_loader(self, task: int) -> BatchLoader:
        """The evaluation samples of one original task, in order, in large batches."""
        batch = max(self.get_batch_size(), 512 if max(self.SIZE) <= 64 else 128)
        return self.loader(self.task_indices(task, False), task, batch, False, device=self._arg("device", "cpu"))

    def loader_of_many(
        self,
        parts: Sequence[tuple[Tensor, torch.Generator]],
        task: int,
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> ManyLoader:
        """A re-iterable over the training samples of several clients at once.

        Args:
            parts: (indices, generator) of each client, as for :meth:`loader`; the largest clients first.
        """
        views = [SampleView(self, indices, task, True, generator, device, "train") for indices, generator in parts]
        return ManyLoader(views, batch_size)

    # ---- transforms
    def _normalize(self) -> list[Normalize]:
        return [] if self.MEAN is None else [Normalize(self.MEAN, self.STD)]

    def get_transform(self) -> Compose:
        """From not_aug inputs (or images of a buffer), batched or single, to augmented, normalised training inputs."""
        return self._transforms[True]

    def get_test_transform(self) -> Compose:
        """From raw images in [0, 1] to what the network is evaluated on."""
        return self._transforms[False]

    def get_normalization_transform(self) -> Compose:
        """From not_aug inputs to network inputs without augmentation.

        Normalises and, where stored images are smaller than what the network takes (CIFAR at 224), resizes. An image
        that has the right size already is only normalised, as in Mammoth.
        """
        resize = [Resize(self.SIZE, t.interpolation) for t in self.TEST_AUGMENT[:1] if isinstance(t, Resize)]
        return Compose([*resize, *self._normalize()])

    def get_denormalization_transform(self) -> Compose:
        """The inverse of the normalisation (sizes stay)."""
        return Compose([] if self.MEAN is None else [Denormalize(self.MEAN, self.STD)])

    TRANSFORM = property(get_transform)  # Mammoth's attribute names
    TEST_TRANSFORM = property(get_test_transform)

    # ---- Mammoth's accessors of defaults: what args says, else the dataset's default
    @classmethod
    def defaults(cls, fl: bool = False) -> dict[str, Any]:
        """The dataset's own defaults by flag name, central or federated."""
        return {**cls.DEFAULTS, **(cls.FED_DEFAULTS if fl else {})}

    def _default(self, name: str, otherwise: Any) -> Any:
        return self._arg(name, self.defaults(bool(self._arg("fl", False))).get(name, otherwise))

    @staticmethod
    def get_loss():
        """Cross-entropy."""
        return F.cross_entropy

    def get_backbone(self) -> str:
        return self._default("backbone", None)

    def get_epochs(self) -> int:
        return int(self._default("n_epochs", 1))

    def get_batch_size(self) -> int:
        return int(self._default("batch_size", 32))

    def get_minibatch_size(self) -> int:
        return int(self._arg("minibatch_size", self.get_batch_size()))
