"""Benchmarks whose images do not fit in memory: data sets of files, kept as memory maps (datasets/utils/stacked.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from datasets.utils import seeded, stratified_split
from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.stacked import Stacked, mapped_images
from utils.errors import RunError, UserError


def divided(samples, labels, share: float, train: bool, name: str) -> Subset:
    """The training part of a data set that has none, or its test part, a ``share`` of each class: always the same."""
    return Subset(samples, stratified_split(np.asarray(labels), share, seeded(0, name))[0 if train else 1])


def found(reader, root, **kwargs):
    """torchvision's data set from its files, or else downloaded."""
    try:
        return reader(root, download=False, **kwargs)
    except Exception:  # not there, not whole: the download says more
        return reader(root, download=True, **kwargs)


@dataclass(frozen=True)
class Part:
    """One data set of files.

    Attributes:
        read: (--base_path, train?) -> (a sequence of (PIL image, label), names of the classes).
        classes: how many there must be. how: what to do where it is not there; ``{}`` becomes --base_path.
        size: side of the images that are kept; None: the benchmark's.
    """

    name: str
    read: Callable
    classes: int
    how: str
    size: int | None = None


class MappedDataset(ContinualDataset):
    """Parts one after another; labels of a part are its own plus the number of classes before it.

    A subclass sets ``PARTS`` and ``FOLDER``, where arrays are kept, within --base_path.
    """

    PARTS: Sequence[Part]
    FOLDER: str

    def _part(self, part: Part, train: bool):
        root, split = Path(self._arg("base_path", "./data/")), "train" if train else "test"
        try:
            read = functools.partial(part.read, root, train)
            got = mapped_images(root / self.FOLDER / part.name, split, part.size or self.SIZE[0], read)
            if len(got[2]) != part.classes:
                raise ValueError(f"{len(got[2])} classes instead of {part.classes}")
            return got
        except (UserError, RunError):
            raise
        except Exception as e:
            reason = (" ".join(str(e).split()) or type(e).__name__)[:150]
            raise UserError(
                f"{self.NAME}: {part.name} cannot be read or downloaded ({reason}): {part.how.format(root.absolute())}"
            ) from e

    @functools.cached_property
    def _maps(self) -> dict:
        return {(part.name, train): self._part(part, train) for part in self.PARTS for train in (True, False)}

    def _cached(self, train: bool) -> tuple[Stacked, Tensor]:
        parts = [self._maps[part.name, train] for part in self.PARTS]
        starts = np.cumsum([0, *(part.classes for part in self.PARTS)])
        labels = [torch.from_numpy(y) + int(s) for (_, y, _), s in zip(parts, starts)]
        return Stacked([x for x, _, _ in parts], self.SIZE[0]), torch.cat(labels)

    def arrays(self) -> dict:
        """Nothing: every process maps the files."""
        return {}

    def class_names(self, part: str) -> list[str]:
        """Those of the classes of a part, as its files name them."""
        return self._maps[part, True][2]

    def in_class_order(self, of_class: list) -> list:
        """A list with one entry for each class in the order of the parts, in the order of the labels in use."""
        return of_class if self.class_order is None else [of_class[old] for old in np.argsort(self.class_order)]
