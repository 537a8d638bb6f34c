"""The rehearsal buffer, with the interface of Mammoth's, and reservoir sampling (Vitter, 1985, "Algorithm R").

Random draws come from numpy's global generator, in the order in which Mammoth makes them, so a seed gives the same
buffer here and there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.augmentations import apply_transform
from utils.errors import UserError


def reservoir(num_seen_examples: int, buffer_size: int) -> int:
    """The slot for the next example of a stream of which ``num_seen_examples`` have passed, or -1 to drop it."""
    if num_seen_examples < buffer_size:
        return num_seen_examples
    slot = int(np.random.randint(0, num_seen_examples + 1))
    return slot if slot < buffer_size else -1


def _reservoir_slots(num_seen: int, n: int, size: int) -> dict[int, int]:
    """What ``n`` calls of :func:`reservoir` in a row leave behind: ``{slot: position of the last example put there}``.

    One call of numpy draws the same numbers as ``n`` calls, since its legacy stream is frozen.
    """
    free = min(max(size - num_seen, 0), n)
    slots = list(range(num_seen, num_seen + free))
    if free < n:
        slots += np.random.randint(0, np.arange(num_seen + free + 1, num_seen + n + 1)).tolist()
    return {slot: i for i, slot in enumerate(slots) if slot < size}


@cache
def _levels(kind: str, device: torch.device) -> torch.Tensor:
    """The 256 floats that 8-bit pixels become: divided by 255, or (CUDA's way) multiplied by its rounded inverse."""
    levels = torch.arange(256, dtype=torch.float32)
    return (levels / 255 if kind == "div" else levels * (torch.ones(()) / 255)).to(device)


class Buffer:
    """A memory of ``buffer_size`` examples, each of which of those seen so far is in it with the same probability.

    ``examples`` and, where given, ``labels``, ``logits``, ``task_labels`` and ``true_labels`` are tensors with
    ``buffer_size`` rows, of which the first ``len(buffer)`` are filled. Images whose values are 8-bit levels are kept
    as uint8, which loses nothing; anything else as float32. Touching ``buffer.examples`` turns them into float32 for
    good, because a caller may write into it.

    Args:
        buffer_size: how many examples fit.
        device: where they are kept.
        sample_selection_strategy: only 'reservoir'.

    Raises:
        UserError: another strategy, or a negative size.
    """

    def __init__(
        self,
        buffer_size: int,
        device: torch.device | str = "cpu",
        sample_selection_strategy: str = "reservoir",
        **_: Any,
    ) -> None:
        if sample_selection_strategy != "reservoir":
            raise UserError(f"unknown buffer strategy {sample_selection_strategy!r}: choose reservoir")
        if buffer_size < 0:
            raise UserError(f"--buffer_size {buffer_size} is negative: give 0 or more")
        self.buffer_size = int(buffer_size)
        self.device = device
        self.sample_selection_strategy = sample_selection_strategy
        self.attributes = ["examples", "labels", "logits", "task_labels", "true_labels"]
        self.empty()

    # ---- storage
    @property
    def examples(self) -> torch.Tensor:
        """The images (buffer_size, C, H, W) as float32. AttributeError before the first ``add_data``."""
        if self._examples is None:
            raise AttributeError("examples")  # so that hasattr tells, as in Mammoth
        self._widen()
        return self._examples

    @examples.setter
    def examples(self, value: torch.Tensor) -> None:
        self._examples, self._kind = value, None

    def _widen(self) -> None:
        """Keep float32 from now on."""
        if self._kind is not None:
            self._examples, self._kind = self._rows(slice(None)), None

    def _rows(self, index: Any) -> torch.Tensor:
        """Copies of the images at ``index``, as float32."""
        rows = self._examples[index]
        return rows if self._kind is None else _levels(self._kind, rows.device)[rows.long()]

    def _quantise(self, x: torch.Tensor, kinds: Sequence[str]) -> tuple[str | None, torch.Tensor]:
        """(kind, uint8) if ``x`` is exactly what one of ``kinds`` makes of uint8, else (None, x)."""
        levels = (x * 255).round().clamp(0, 255).to(torch.uint8)
        for kind in kinds:
            if torch.equal(_levels(kind, x.device)[levels.long()], x):
                return kind, levels
        return None, x

    def _write(self, slots: torch.Tensor, x: torch.Tensor) -> None:
        x = x.detach().to(self.device, torch.float32)
        if self._kind is not None:
            kind, levels = self._quantise(x, [self._kind])
            if kind is None:
                self._widen()
            else:
                x = levels
        self._examples[slots] = x

    @property
    def used_attributes(self) -> list[str]:
        """Those of ``attributes`` that hold data."""
        return [a for a in self.attributes if (self._examples is not None if a == "examples" else hasattr(self, a))]

    def init_tensors(
        self,
        examples: torch.Tensor,
        labels: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        task_labels: torch.Tensor | None = None,
        true_labels: torch.Tensor | None = None,
    ) -> None:
        """Make room for whatever is given and has none yet: int64 for labels of any kind, float32 for the rest."""
        if self._examples is None:
            x = examples.detach().to(self.device, torch.float32)
            self._kind, x = self._quantise(x, ["div", "mul"])
            self._examples = torch.zeros((self.buffer_size, *x.shape[1:]), dtype=x.dtype, device=self.device)
        given = {"labels": labels, "logits": logits, "task_labels": task_labels, "true_labels": true_labels}
        for name, value in given.items():
            if value is not None and not hasattr(self, name):
                dtype = torch.int64 if name.endswith("els") else torch.float32
                setattr(self, name, torch.zeros((self.buffer_size, *value.shape[1:]), dtype=dtype, device=self.device))

    def to(self, device: torch.device | str) -> Buffer:
        """Move everything to ``device``."""
        self.device = device
        if self._examples is not None:
            self._examples = self._examples.to(device)
        for name in self.used_attributes[1:]:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def __len__(self) -> int:
        return min(self.num_seen_examples, self.buffer_size)

    def is_empty(self) -> bool:
        """Whether nothing was ever added."""
        return self.num_seen_examples == 0

    def is_full(self) -> bool:
        """Whether every slot is filled."""
        return self.num_seen_examples >= self.buffer_size

    def empty(self) -> None:
        """Forget everything, also how many examples were seen."""
        for name in self.attributes[1:]:
            if hasattr(self, name):
                delattr(self, name)
        self._examples: torch.Tensor | None = None
        self._kind: str | None = None  # how uint8 becomes float; None: stored as float
        self.num_seen_examples = 0
        self.attention_maps: list[list[torch.Tensor] | None] = [None] * self.buffer_size

    # ---- in
    def add_data(
        self,
        examples: torch.Tensor,
        labels: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        task_labels: torch.Tensor | None = None,
        attention_maps: Sequence[torch.Tensor] | None = None,
        true_labels: torch.Tensor | None = None,
        sample_selection_scores: torch.Tensor | None = None,
    ) -> None:
        """Show a batch of n examples to the reservoir, one after the other.

        Args:
            examples: (n, C, H, W), not augmented.
            labels, task_labels, true_labels: (n,).
            logits: (n, n_classes).
            attention_maps: tensors (n, ...), kept as bytes.
            sample_selection_scores: accepted for Mammoth's other strategies; the reservoir has no use for them.

        Raises:
            ValueError: lengths differ, or not the same attributes as in earlier calls (their rows would be stale).
        """
        given = {"labels": labels, "logits": logits, "task_labels": task_labels, "true_labels": true_labels}
        given = {name: value for name, value in given.items() if value is not None}
        n = len(examples)
        if any(len(value) != n for value in given.values()):
            sizes = ", ".join(f"{len(v)} {name}" for name, v in given.items())
            raise ValueError(f"{n} examples, but {sizes}")
        if len(self) and set(given) != set(self.used_attributes[1:]):
            raise ValueError(f"this buffer holds {self.used_attributes[1:]} for each example, not {list(given)}")
        if n == 0:
            return
        self.init_tensors(examples, **given)
        kept = _reservoir_slots(self.num_seen_examples, n, self.buffer_size)
        self.num_seen_examples += n
        if not kept:
            return
        slots = torch.tensor(list(kept), device=self.device)
        rows = torch.tensor(list(kept.values()), device=examples.device)
        self._write(slots, examples[rows])
        for name, value in given.items():
            stored = getattr(self, name)
            stored[slots] = value.detach()[rows.to(value.device)].to(stored)
        if attention_maps is not None:
            for slot, row in kept.items():
                self.attention_maps[slot] = [a[row].byte().to(self.device) for a in attention_maps]

    # ---- out
    def _others(self, index: Any, device: torch.device | str) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name)[index].to(device) for name in self.used_attributes[1:])

    def get_data(
        self,
        size: int,
        transform: Callable | None = None,
        return_index: bool = False,
        device: torch.device | str | None = None,
        mask_task_out: int | None = None,
        cpt: int | None = None,
        return_not_aug: bool = False,
        not_aug_transform: Callable | None = None,
        force_indexes: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Draw examples without replacement.

        Args:
            size: how many; all there are if there are fewer.
            transform: applied to the images, with a draw of its own for each.
            return_index: put the slots (size,) in front.
            device: of the result; default: the buffer's.
            mask_task_out: leave out this task's examples, told by ``task_labels`` or else by ``labels // cpt``.
            return_not_aug: put the images under ``not_aug_transform`` before the transformed ones.
            force_indexes: these slots instead of a draw.

        Returns:
            ``([slots,] [not augmented images,] images, *others)``, where others are those of labels, logits,
            task_labels, true_labels that the buffer holds, in this order.

        Raises:
            ValueError: nothing was added yet, or the task of the examples cannot be told.
        """
        if self.is_empty():
            raise ValueError("the buffer is empty")
        device = self.device if device is None else device
        if force_indexes is not None:
            slots = np.asarray(force_indexes)
        elif mask_task_out is None:
            slots = np.random.choice(len(self), size=min(size, len(self)), replace=False)
        else:
            if hasattr(self, "task_labels"):
                tasks = self.task_labels
            elif cpt is not None and hasattr(self, "labels"):
                tasks = self.labels // cpt
            else:
                raise ValueError("mask_task_out needs task_labels in the buffer, or labels and cpt (classes per task)")
            allowed = (tasks[: len(self)] != mask_task_out).nonzero().flatten().cpu().numpy()
            slots = allowed[np.random.choice(len(allowed), size=min(size, len(allowed)), replace=False)]
        index = torch.as_tensor(slots, dtype=torch.int64, device=self.device)
        images = self._rows(index).to(device)
        out: tuple[torch.Tensor, ...] = (index.to(device),) if return_index else ()
        if return_not_aug:
            out += (apply_transform(images, not_aug_transform),)
        return (*out, apply_transform(images, transform), *self._others(index, device))

    def get_data_by_index(
        self,
        indexes: Sequence[int] | torch.Tensor,
        transform: Callable | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """``(images, *others)`` at the given slots, as in :meth:`get_data`."""
        return self.get_data(0, transform, device=device, force_indexes=torch.as_tensor(indexes).cpu().numpy())

    def get_all_data(
        self, transform: Callable | None = None, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, ...]:
        """``(images, *others)`` of everything in the buffer, in the order of the slots."""
        return self.get_data(0, transform, device=device, force_indexes=range(len(self)))

    # ---- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Everything in the buffer, as tensors, numbers, strings and lists."""
        filled = slice(len(self))
        return {
            "buffer_size": self.buffer_size,
            "num_seen_examples": self.num_seen_examples,
            "kind": self._kind,
            "examples": None if self._examples is None else self._examples[filled].clone(),
            "others": {name: getattr(self, name)[filled].clone() for name in self.used_attributes[1:]},
            "attention_maps": [None if m is None else list(m) for m in self.attention_maps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, its size included; the device stays this buffer's."""

        def pad(rows: torch.Tensor) -> torch.Tensor:
            full = torch.zeros((self.buffer_size, *rows.shape[1:]), dtype=rows.dtype, device=self.device)
            full[: len(rows)] = rows.to(self.device)
            return full

        self.buffer_size = state["buffer_size"]
        self.empty()
        self.num_seen_examples, self._kind = state["num_seen_examples"], state["kind"]
        if state["examples"] is not None:
            self._examples = pad(state["examples"])
        for name, rows in state["others"].items():
            setattr(self, name, pad(rows))
        self.attention_maps = [None if m is None else [a.to(self.device) for a in m] for m in state["attention_maps"]]


def _herd(features: torch.Tensor, n: int) -> torch.Tensor:
    """The first ``n`` rows of iCaRL's herding (Rebuffi et al., arXiv:1611.07725, Algorithm 4): each next row brings the
    mean of the chosen ones closest to the mean of all rows (N, D)."""
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen: list[int] = []
    for k in range(1, min(n, len(features)) + 1):
        distance = (mean - (features + total) / k).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.int64)


@torch.no_grad()
def fill_buffer(
    buffer: Buffer,
    dataset: Any,
    t_idx: int,
    net: nn.Module | None = None,
    use_herding: bool = False,
    required_attributes: Sequence[str] | None = None,
    normalize_features: bool = False,
) -> None:
    """Fill the buffer with equally many examples of every class seen up to task ``t_idx`` (from 0), as iCaRL does.

    The first ones kept of each earlier class stay; those of the current task are drawn at random or by herding.

    Args:
        buffer: changed in place.
        dataset: with ``N_CLASSES_PER_TASK``, ``train_loader`` (batches of inputs, labels, not augmented inputs) and
            ``get_normalization_transform()``.
        net: the network (or the method that holds it), needed for herding and for logits (stored as
            ``sigmoid(logits)``, as in Mammoth).
        required_attributes: what to store; default: examples and labels.
        normalize_features: herd on features of norm 1.

    Raises:
        UserError: fewer slots than classes.
        ValueError: a network is needed and missing, or the buffer holds other attributes already.
    """
    wanted = list(required_attributes or ["examples", "labels"])
    net = getattr(net, "net", net)
    if net is None and (use_herding or "logits" in wanted):
        raise ValueError("herding and logits need net")
    if len(buffer) and set(buffer.used_attributes) != set(wanted):
        raise ValueError(f"the buffer holds {buffer.used_attributes}, not {wanted}")
    per_task = dataset.N_CLASSES_PER_TASK
    per_task = [per_task] * (t_idx + 1) if isinstance(per_task, int) else list(per_task)[: t_idx + 1]
    n_seen, n_past = sum(per_task), sum(per_task[:-1])
    per_class = buffer.buffer_size // n_seen
    if per_class == 0:
        raise UserError(f"--buffer_size {buffer.buffer_size} has no place for {n_seen} classes: give {n_seen} or more")

    if len(buffer):
        names = buffer.used_attributes
        data = buffer.get_all_data()
        labels = data[names.index("labels")]
        keep = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in labels.unique()])
        buffer.empty()
        buffer.add_data(**{name: values[keep] for name, values in zip(names, data)})

    device = next((p.device for p in net.parameters()), torch.device("cpu")) if net is not None else None
    normalise = dataset.get_normalization_transform()
    was_training = net is not None and net.training
    parts: dict[str, list[torch.Tensor]] = {"examples": [], "labels": [], "features": [], "logits": []}
    if net is not None:
        net.eval()
    try:
        for batch in dataset.train_loader:
            labels, images = batch[1], batch[2]
            current = (labels >= n_past) & (labels < n_seen)
            labels, images = labels[current], images[current.to(images.device)]
            if not len(labels):
                continue
            parts["examples"].append(images.cpu())
            parts["labels"].append(labels.cpu())
            if net is not None:
                inputs = images.to(device)
                features = net(inputs if normalise is None else normalise(inputs), returnt="features")
                parts["logits"].append(torch.sigmoid(net.classifier(features)).cpu())
                parts["features"].append(
                    (nn.functional.normalize(features, dim=1) if normalize_features else features).cpu()
                )
    finally:
        if was_training:
            net.train()
    rows = {name: torch.cat(values) for name, values in parts.items() if values}
    if not rows:
        return
    rows["task_labels"] = torch.full_like(rows["labels"], t_idx)
    for c in rows["labels"].unique():
        of_class = (rows["labels"] == c).nonzero().flatten()
        order = _herd(rows["features"][of_class], per_class) if use_herding else torch.randperm(len(of_class))
        pick = of_class[order[:per_class]]
        buffer.add_data(**{name: rows[name][pick] for name in wanted})


def icarl_replay(model: Any, dataset: Any, val_set_split: float = 0) -> None:
    """Put the buffer's examples among the current task's training samples, as iCaRL trains on both alike.

    Args:
        model: a method with a ``buffer`` of examples and labels; nothing happens as long as it is empty.
        dataset: the images and labels of its ``train_loader`` are replaced.
        val_set_split: share of the buffer, with as many of the task's samples, that goes to ``model.val_loader``
            (images under the test transform, labels) instead.
    """
    if model.buffer.is_empty():
        return
    loader, view = dataset.train_loader, dataset.train_loader.dataset
    images, labels = model.buffer.get_data_by_index(range(len(model.buffer)), device="cpu")[:2]
    held = torch.rand(len(labels)) < val_set_split
    held_of_task = torch.zeros(len(view), dtype=torch.bool)
    held_of_task[torch.randperm(len(view))[: int(held.sum())]] = True
    data = torch.cat([view.data.cpu(), (images * 255).round().to(torch.uint8)])
    targets = torch.cat([torch.as_tensor(view.targets), labels])
    held = torch.cat([held_of_task, held])
    if val_set_split > 0:
        model.val_loader = copy.copy(loader)
        model.val_loader.dataset = validation = copy.copy(view)
        validation.train, validation.transform = False, dataset.get_test_transform()
        validation.data, validation.targets = data[held], targets[held]
    view.data, view.targets = data[~held].to(view.data.device), targets[~held]
