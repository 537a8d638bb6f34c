"""The dataset registry: a name leads to a file, and only the chosen file is imported.

A new benchmark is one new file in this folder whose class sets ``NAME``; nothing has to be listed anywhere. By
convention ``seq-cifar100`` lives in ``seq_cifar100.py``, but the ``NAME`` in the file is what counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from utils import registry

if TYPE_CHECKING:
    from argparse import Namespace

    from datasets.utils.continual_dataset import ContinualDataset

DATASETS_DIR = Path(__file__).resolve().parent


def get_dataset_names() -> list[str]:
    """All names ``--dataset`` accepts, sorted, without importing any dataset."""
    return sorted(registry.scan("datasets"))


def get_dataset_class(name: str) -> type[ContinualDataset]:
    """The class called ``name`` (``seq_cifar100`` is read as ``seq-cifar100``). Imports only its file.

    Raises:
        UserError: no file holds that name.
    """
    return registry.load_class("datasets", name, "dataset")


def get_dataset(args: Namespace) -> ContinualDataset:
    """The dataset ``args.dataset`` built for ``args`` (see ``ContinualDataset`` for the fields it reads)."""
    dataset = get_dataset_class(args.dataset)(args)
    if getattr(args, "poison", None):
        from datasets.utils.poison import poison

        poison(dataset, args)
    return dataset
