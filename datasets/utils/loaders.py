"""Batches of a data set: the samples of a list of indices, as they are shown, in the order of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datasets.utils.transforms import BatchTransform, Compose, Draws, draws_nothing, send, to_float
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.utils.continual_dataset import ContinualDataset


class SampleView:
    """The samples of a loader one by one, with the attributes that Mammoth's methods read and write.

    ``view[i]`` gives (augmented image, label, not_aug image[, extra fields]), or (image, label) when not training.
    Setting ``view.logits``, or an attribute named in ``view.extra_return_fields``, to a tensor with a row per sample
    adds it to what the loader yields. ``data`` and ``targets`` may be replaced (uint8 (N, C, H, W), integers (N,)), as
    methods that replay whole datasets do.

    Where nothing is drawn, an image looks the same every time. The inputs of such a batch have the attribute ``shown``,
    [(view, positions in it), ...] in the batch's order, for those who keep what they have computed of an image.
    """

    def __init__(self, source: ContinualDataset, indices, task: int, train: bool, generator, device, split: str):
        if split not in ("train", "test"):
            raise ValueError(f"split is 'train' or 'test', not {split!r}")
        self.source, self.task, self.train, self.split = source, task, train, split
        self.indices = torch.as_tensor(indices, dtype=torch.long, device="cpu")
        self.generator, self.device = generator, torch.device(device)
        self.transform = source.get_transform() if train else source.get_test_transform()
        self.extra_return_fields: tuple[str, ...] = ()
        self._own_data: Tensor | None = None
        self._own_targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices if self._own_data is None else self._own_data)

    def labels(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """int64 labels of the samples at ``positions``, on the CPU."""
        if self._own_targets is not None:
            return self._own_targets[positions]
        taught = self.source.taught_labels if self.split == "train" else None
        return (
            self.source.labels_of(self.indices[positions], self.split)
            if taught is None
            else taught[self.indices[positions]]
        )

    @property
    def always_the_same(self) -> bool:
        """Whether every image looks the same every time: in tests, and in training without augmentation."""
        usual = self.source.get_transform() if self.train else self.source.get_test_transform()
        return self._own_data is None and self.transform is usual and draws_nothing(usual)

    @cached_property
    def fingerprint(self) -> tuple:
        """What tells the images of this view, as they are shown, from those of another of the same data set."""
        return self.split, self.task, repr(self.transform), self.indices.numpy().tobytes()

    def images(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """Raw uint8 (n, C, H, W) images, where the dataset keeps them; before ``task_images``."""
        if self._own_data is not None:
            return self._own_data[positions]
        everything = self.source.train_images if self.split == "train" else self.source.eval_images
        return everything[send(self.indices[positions] % len(everything), everything.device)]

    @property
    def data(self) -> Tensor:
        return self.images()

    @data.setter
    def data(self, value: Tensor | np.ndarray) -> None:
        targets = self.labels() if self._own_targets is None else self._own_targets
        self._own_data, self._own_targets = torch.as_tensor(value, dtype=torch.uint8), targets

    @property
    def targets(self) -> np.ndarray:
        return self.labels().numpy()

    @targets.setter
    def targets(self, value: Tensor | np.ndarray) -> None:
        self._own_data, self._own_targets = self.images(), torch.as_tensor(value, dtype=torch.long).cpu()

    def _as_shown(self, images: Tensor, positions: Tensor) -> Tensor:
        if not (self.source.mixed_domains and self.split == "train") or self._own_data is not None:
            return self.source.task_images(images, self.task)
        images, domains = images.clone(), self.indices[positions] // len(self.source.train_labels)
        for t in domains.unique().tolist():
            rows = (domains == t).nonzero()[:, 0].to(images.device)
            images[rows] = self.source.task_images(images[rows], t)
        return images

    def order(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Positions of n samples in the order in which an epoch shows them."""
        stream = self.source.STREAM and not self.source.joint
        return torch.randperm(n, generator=generator) if self.train and not stream else torch.arange(n)

    def extra_fields(self) -> tuple[str, ...]:
        """Names of the extra tensors, in the order in which they are returned."""
        implied = ("logits",) if hasattr(self, "logits") and "logits" not in self.extra_return_fields else ()
        return implied + tuple(self.extra_return_fields)

    def batch(self, positions: Tensor) -> tuple[Tensor, ...]:
        """(inputs, labels[, not_aug_inputs, *extra]) on the device."""
        not_aug = to_float(self._as_shown(self.images(positions).to(self.device, non_blocking=True), positions))
        labels = send(self.labels(positions), self.device)
        if not self.train:
            inputs = self.transform(not_aug)
        elif isinstance(self.transform, Compose | BatchTransform):
            inputs = self.transform(not_aug, self.generator)
        else:  # a method has put a torchvision transform of its own here
            inputs = torch.stack([self.transform(image) for image in not_aug])
        if self.always_the_same:
            inputs.shown = [(self, positions)]
        if not self.train:
            return inputs, labels
        extra = (torch.as_tensor(getattr(self, name)) for name in self.extra_fields())
        return inputs, labels, not_aug, *(e[positions.to(e.device)].to(self.device) for e in extra)

    def __getitem__(self, i: int) -> tuple:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        image, label, *rest = (t[0] for t in self.batch(torch.tensor([int(i) % len(self)])))
        return image, int(label), *rest


class BatchLoader:
    """Batches of a :class:`SampleView` (``.dataset``); made by ``ContinualDataset.loader``."""

    def __init__(self, dataset: SampleView, batch_size: int, drop_last: bool = False):
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: give 1 or more")
        self.dataset, self.batch_size, self.drop_last = dataset, int(batch_size), drop_last

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Draw the order and the augmentations from ``generator`` (on the CPU) from now on."""
        self.dataset.generator = generator

    def extra_fields(self) -> tuple[str, ...]:
        """Names of what a batch holds after not_aug_inputs."""
        return self.dataset.extra_fields()

    def __len__(self) -> int:
        n = len(self.dataset)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = self.dataset.order(len(self.dataset), self.dataset.generator)
        for positions in order.split(self.batch_size)[: len(self)]:
            yield self.dataset.batch(positions)


class ManyLoader:
    """Batches of several clients at once; made by ``ContinualDataset.loader_of_many``.

    The j-th item is (sizes, inputs, labels): the j-th batch of every client that still has one, client after client.
    Each client's samples, order and augmentation are those of a loader of its own with its generator.
    """

    def __init__(self, views: list[SampleView], batch_size: int):
        lengths = [len(view) for view in views]
        if sorted(lengths, reverse=True) != lengths:
            raise ValueError(
                f"the largest clients come first, so that those with a batch left are the first: {lengths}"
            )
        self.views, self.batch_size = views, batch_size
        first, indices = views[0], torch.cat([view.indices for view in views])
        self.dataset = SampleView(first.source, indices, first.task, first.train, None, first.device, first.split)

    def __len__(self) -> int:
        """Batches of the client that has most."""
        return -(-len(self.views[0]) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        orders = [view.order(len(view), view.generator).split(self.batch_size) for view in self.views]
        offsets = torch.tensor([0, *map(len, self.views)]).cumsum(0).tolist()
        for j in range(len(self)):
            mine = [batches[j] for batches in orders if j < len(batches)]
            sizes = [len(positions) for positions in mine]
            self.dataset.generator = Draws([(view.generator, n) for view, n in zip(self.views, sizes)])
            inputs, labels, *_ = self.dataset.batch(torch.cat([p + offset for p, offset in zip(mine, offsets)]))
            if self.dataset.always_the_same:
                inputs.shown = list(zip(self.views, mine))
            yield sizes, inputs, labels
