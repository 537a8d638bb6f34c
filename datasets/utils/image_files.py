"""Benchmarks out of one data set of image files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.utils.cifar import CLIP, FEDERATED
from datasets.utils.continual_dataset import _ARRAYS, ContinualDataset
from datasets.utils.mapped import Part
from datasets.utils.stacked import Stacked, square, whole
from datasets.utils.transforms import BICUBIC, ColorJitter, RandomHorizontalFlip, RandomResizedCrop, Resize

IN_MEMORY = 2 * 2**30  # bytes of images, of training or of testing; more stay on disk


class FileDataset(ContinualDataset):
    """Images of files, read once and kept as bytes of one size in ``FOLDER`` within --base_path.

    A subclass sets ``PART``. Augmentations start from the images as they are kept, not from the files: crops are cut
    from ``KEEP_TRAIN`` pixels. CLIP backbones get CLIP's statistics, whatever ``MEAN`` and ``STD`` are.

    Attributes:
        KEEP_TRAIN, KEEP_TEST: (side, how) of the images that are kept; ``stacked.whole`` stretches them to a square,
            ``stacked.square`` takes the middle.
        FED: attributes that are others under ``--fl``, by name.
    """

    SETTING = "class-il"
    PART: Part
    FOLDER = "arrays"
    SIZE = (224, 224)
    KEEP_TRAIN: tuple[int, Callable] = (224, whole)
    KEEP_TEST: tuple[int, Callable] = (224, whole)
    FED: dict = {}

    def configure(self) -> None:
        for name, value in self.FED.items() if self._arg("fl", False) else ():
            setattr(self, name, value)
        if (self.get_backbone() or "").lower().startswith("clip"):
            self.MEAN, self.STD = CLIP

    def _read(self, train: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        root = Path(self._arg("base_path", "./data/"))
        return self.PART.arrays(root, self.FOLDER, train, *(self.KEEP_TRAIN if train else self.KEEP_TEST))

    @property
    def _source(self) -> tuple[str, str]:
        kept = [f"{side} {fit.__name__}" for side, fit in (self.KEEP_TRAIN, self.KEEP_TEST)]
        return " ".join([self.PART.name, *kept]), str(self._arg("base_path", "./data/"))

    def _cached(self, train: bool) -> tuple[Tensor | Stacked, Tensor]:
        if (*self._source, train) not in _ARRAYS:
            images, labels, _ = self._read(train)
            if images.nbytes > IN_MEMORY:
                return Stacked([images], images.shape[-1]), torch.from_numpy(labels)
        return super()._cached(train)

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels, _ = self._read(train)
        return torch.from_numpy(np.array(images)), torch.from_numpy(labels)


class JitteredDataset(FileDataset):
    """What Mammoth does to DTD, GTSRB, SUN397 and SVHN: crops of at least four fifths of the area, flips and other
    colours; CLIP's statistics and, for testing, CLIP's preparation. Mirrored digits and traffic signs are Mammoth's.
    """

    FOLDER = "8vision"  # the arrays of seq-8vision
    MEAN, STD = CLIP
    KEEP_TRAIN = KEEP_TEST = (224, square)
    TRAIN_AUGMENT = [
        RandomResizedCrop(224, scale=(0.8, 1.0)),
        RandomHorizontalFlip(),
        ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
    ]
    TEST_AUGMENT = [Resize(224, BICUBIC)]
    DEFAULTS = {"backbone": "vit", "n_epochs": 20, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}
