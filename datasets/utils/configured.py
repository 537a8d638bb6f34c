"""What ``--dataset_config`` may change about a data set itself, in the format of Mammoth's ``datasets/configs``.

Keys in capitals are attributes of the data set: ``N_TASKS, N_CLASSES_PER_TASK, N_CLASSES, SIZE, MEAN, STD, TRANSFORM,
TEST_TRANSFORM``; the other keys of such a file are flags (``utils/args.py``). A transform is a list of torchvision's
names, alone or with their arguments::

    TRANSFORM:
      - RandomCrop: {size: 32, padding: 4}
      - RandomHorizontalFlip
      - ToTensor
      - Normalize: {mean: [0.5], std: [0.5]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchvision.transforms import InterpolationMode

from datasets.utils import transforms
from utils.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets.utils.continual_dataset import ContinualDataset

ATTRIBUTES = ("N_TASKS", "N_CLASSES_PER_TASK", "N_CLASSES", "SIZE", "MEAN", "STD", "TRANSFORM", "TEST_TRANSFORM")
NAMES = ["CenterCrop", "Normalize", "RandomAffine", "RandomCrop", "RandomHorizontalFlip", "RandomResizedCrop", "Resize"]
ALREADY = ("ToTensor", "ToPILImage")  # images are tensors in [0, 1]
PIL = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def split(settings: dict) -> tuple[dict, dict]:
    """(attributes, flags) of a file.

    Raises:
        UserError: a name in capitals that is no attribute.
    """
    attributes = {k.upper(): v for k, v in settings.items() if str(k).upper() in ATTRIBUTES}
    flags = {k: v for k, v in settings.items() if str(k).upper() not in ATTRIBUTES}
    for name in flags:
        if str(name).isupper():
            raise UserError(f"--dataset_config: unknown attribute {name!r}: {nearest(name, ATTRIBUTES)}")
    return attributes, flags


def division(cls: type[ContinualDataset], attributes: dict) -> dict[str, Any]:
    """``N_TASKS, N_CLASSES_PER_TASK, N_CLASSES`` as they are to be; {} where the class's own stay.

    Raises:
        UserError: they do not divide the classes of the data set.
    """
    given = {k: attributes[k] for k in ATTRIBUTES[:3] if k in attributes}
    if not given:
        return {}
    tasks, per_task = (given.get(k, getattr(cls, k)) for k in ATTRIBUTES[:2])
    sizes = per_task if isinstance(per_task, list) else [per_task] * (tasks if isinstance(tasks, int) else 0)
    if not all(type(n) is int and n > 0 for n in (tasks, *sizes)) or len(sizes) != tasks:
        raise UserError(
            f"--dataset_config: N_TASKS {tasks} and N_CLASSES_PER_TASK {per_task} do not fit: give a whole number, and "
            "a whole number or one for each task"
        )
    total = sizes[0] if cls.SETTING == "domain-il" else sum(sizes)
    if total != cls.N_CLASSES or given.get("N_CLASSES", total) != total:
        raise UserError(
            f"--dataset_config: {tasks} tasks of {per_task} classes make {given.get('N_CLASSES', total)} classes, "
            f"{cls.NAME} has {cls.N_CLASSES}: give N_TASKS and N_CLASSES_PER_TASK that go into that"
        )
    return {"N_TASKS": tasks, "N_CLASSES_PER_TASK": per_task, "N_CLASSES": total}


def appearance(cls: type[ContinualDataset], attributes: dict) -> dict[str, Any]:
    """``SIZE, MEAN, STD``, and the transforms as lists, as far as they are given.

    Raises:
        UserError: not in that form.
    """
    made: dict[str, Any] = {}
    for name, count in (("SIZE", 2), ("MEAN", cls.CHANNELS), ("STD", cls.CHANNELS)):
        if name in attributes:
            value = attributes[name]
            if not isinstance(value, list) or len(value) != count or not all(type(v) in (int, float) for v in value):
                raise UserError(f"--dataset_config: {name} {value!r}: give a list of {count} numbers")
            made[name] = tuple(value)
    for name in ("TRANSFORM", "TEST_TRANSFORM"):
        if name in attributes:
            made[name] = build(attributes[name], name)
            for t in made[name]:
                if isinstance(t, transforms.Normalize) and ("MEAN" not in attributes or "STD" not in attributes):
                    made |= {"MEAN": t.mean, "STD": t.std}
    if ("MEAN" in made) != ("STD" in made):
        raise UserError("--dataset_config: MEAN and STD go together")
    return made


def build(entries: Sequence, what: str) -> list[transforms.BatchTransform]:
    """The batch transforms that a list names.

    Raises:
        UserError: one that Herd does not have, or wrong arguments.
    """
    if not isinstance(entries, list):
        raise UserError(f"--dataset_config: {what} must be a list of transforms")
    made = []
    for entry in entries:
        name, given = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
        if name in ALREADY:
            continue
        if name not in NAMES:
            known = nearest(str(name), [*NAMES, *ALREADY])
            raise UserError(f"--dataset_config: {what}: there is no {name!r} here: {known}")
        named = dict(given) if isinstance(given, dict) else {}
        placed = given if isinstance(given, list) else [] if given is None or named else [given]
        try:
            if "interpolation" in named:
                mode = named["interpolation"]
                named["interpolation"] = InterpolationMode(PIL.get(mode, str(mode).rpartition(".")[2].lower()))
            made.append(getattr(transforms, name)(*placed, **named))
        except (TypeError, ValueError) as e:
            raise UserError(f"--dataset_config: {what}: {name}: {e}") from None
    return made
