from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import datasets
from datasets.utils.continual_dataset import ContinualDataset
from utils import registry
from utils.errors import UserError


def test_names_come_from_the_files_and_every_class_is_found():
    names = datasets.get_dataset_names()
    assert {"seq-digits", "seq-glyphs", "seq-scripts", "seq-mnist", "perm-mnist", "rot-mnist", "seq-cifar10"} < set(
        names
    )
    assert {"seq-cifar100", "seq-cifar100-224", "seq-cifar10-224"} < set(names)
    for name in names:
        cls = datasets.get_dataset_class(name)
        assert issubclass(cls, ContinualDataset) and name == cls.NAME
        sizes = cls.N_CLASSES_PER_TASK
        total = sum(sizes) if isinstance(sizes, list) else sizes * cls.N_TASKS
        assert (10 if cls.SETTING == "domain-il" else total) == cls.N_CLASSES
        assert {"backbone", "n_epochs", "batch_size"} <= set(cls.defaults())
        assert {"num_clients", "num_comm_rounds", "distribution_alpha"} <= set(cls.defaults(fl=True))
    assert datasets.get_dataset_class("seq_cifar100").NAME == "seq-cifar100"


def test_listing_imports_neither_torch_nor_datasets():
    code = (
        "import sys, datasets; datasets.get_dataset_names(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    root = Path(datasets.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(UserError, match="seq-cifar100"):
        datasets.get_dataset(Namespace(dataset="seq-cifar-100"))
    with pytest.raises(UserError, match="unknown dataset 'zzz'.*choose from"):
        datasets.get_dataset_class("zzz")


def test_a_dropped_in_file_is_found_whatever_it_is_called(tmp_path, monkeypatch):
    folder = tmp_path / "datasets"
    folder.mkdir()
    (folder / "whatever.py").write_text(
        "from datasets.utils.continual_dataset import ContinualDataset\n"
        "class Mine(ContinualDataset):\n    NAME: str = 'seq-mine'\n    N_TASKS = 2\n    N_CLASSES_PER_TASK = 3\n"
    )
    (folder / "broken.py").write_text("raise RuntimeError('imported')\nclass A:\n    NAME = 'broken-one'\n")
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(datasets, "__path__", [str(folder)])
    registry.scan.cache_clear()
    assert datasets.get_dataset_names() == ["broken-one", "seq-mine"]
    assert datasets.get_dataset_class("seq-mine").N_CLASSES == 6
    sys.modules.pop("datasets.whatever")
    registry.scan.cache_clear()
