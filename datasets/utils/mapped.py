"""Benchmarks whose images do not fit in memory: data sets of files, kept as memory maps (datasets/utils/stacked.py)."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.stacked import Stacked, mapped_images, square
from utils.errors import RunError, UserError


@dataclass(frozen=True)
class Part:
    """One data set of files.

    Attributes:
        read: (--base_path, train?) -> (a sequence of (PIL image, label), names of the classes).
        classes: how many there must be. how: what to do where it is not there; ``{}`` becomes --base_path.
        size: side of the images that are kept; None: the benchmark's.
        lists: files within --base_path that say, where they are there, which images are for training and for testing.
    """

    name: str
    read: Callable
    classes: int
    how: str
    size: int | None = None
    lists: tuple[str, ...] = ()

    def arrays(
        self, root: Path, folder: str, train: bool, size: int, fit: Callable = square
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images (N, 3, size, size) as a memory map, labels (N,) and class names; read once, then kept.

        Args:
            root: --base_path. folder: where arrays are kept, within it. fit: how images are brought to the size.

        Raises:
            UserError: the files are not there, or not as they should be. RunError: arrays cannot be written.
        """
        split = "train" if train else "test"

        def read():
            samples, names = self.read(root, train)
            if len(names) != self.classes:
                raise ValueError(f"{len(names)} classes instead of {self.classes}")
            return samples, names

        try:
            there = [root / name for name in self.lists if (root / name).exists()]
            said = zlib.crc32(b"".join(file.read_bytes() for file in there))  # another list, another division
            name = f"{split}-{said:08x}" if there else split
            got = mapped_images(root / folder / self.name, name, size, read, fit)
            if len(got[1]) == 0 or got[1].min() < 0 or got[1].max() >= self.classes:
                raise ValueError(f"no {split} images, or labels beyond {self.classes - 1}")
            return got
        except (UserError, RunError):
            raise
        except Exception as e:
            reason = (" ".join(str(e).split()) or type(e).__name__)[:150]
            raise UserError(
                f"{self.name} cannot be read or downloaded ({reason}): {self.how.replace('{}', str(root.absolute()))}"
            ) from e


class MappedDataset(ContinualDataset):
    """Parts one after another; labels of a part are its own plus the number of classes before it.

    A subclass sets ``PARTS`` and ``FOLDER``, where arrays are kept, within --base_path.
    """

    PARTS: Sequence[Part]
    FOLDER: str

    @functools.cached_property
    def _maps(self) -> dict:
        root = Path(self._arg("base_path", "./data/"))
        return {
            (part.name, train): part.arrays(root, self.FOLDER, train, part.size or self.SIZE[0])
            for part in self.PARTS
            for train in (True, False)
        }

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
