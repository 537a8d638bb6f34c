"""Data sets as ``--dataset_config`` changes them."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
import yaml
from torchvision.transforms import InterpolationMode, v2

import utils.args
from datasets import get_dataset
from datasets.perm_mnist import PermutedMNIST
from datasets.seq_cifar100 import SequentialCIFAR100
from datasets.seq_digits import SequentialDigits
from datasets.utils import configured
from tests.helpers import only_folder, rows, run
from utils.errors import UserError

TEXT = """
N_TASKS: 2
N_CLASSES_PER_TASK: [4, 6]
N_CLASSES: 10
SIZE: [20, 20]
MEAN: [0.25]
STD: [0.75]
TRANSFORM:
  - Resize: {size: [24, 24], interpolation: 3}
  - RandomCrop: {size: 20, padding: 2}
  - RandomHorizontalFlip
  - ToTensor
  - Normalize: {mean: [0.1], std: [0.2]}
TEST_TRANSFORM:
  - Resize: {size: 24}
  - CenterCrop: 20
  - ToTensor
  - Normalize: [[0.1], [0.2]]
batch_size: 64
n_epochs: 1
"""


def digits(text: str) -> SequentialDigits:
    attributes, _ = configured.split(yaml.safe_load(text))
    return get_dataset(Namespace(dataset="seq-digits", dataset_attributes=attributes))


def test_the_split_between_attributes_and_flags():
    attributes, flags = configured.split(yaml.safe_load(TEXT))
    assert set(attributes) == set(configured.ATTRIBUTES) and flags == {"batch_size": 64, "n_epochs": 1}


def test_tasks():
    d = digits(TEXT)
    assert (d.N_TASKS, d.n_train_tasks, d.N_CLASSES) == (2, 2, 10)
    assert [d.get_offsets(t) for t in range(2)] == [(0, 4), (4, 10)]
    labels = [d.train_labels[d.task_indices(t)] for t in range(2)]
    assert set(labels[0].tolist()) == set(range(4)) and set(labels[1].tolist()) == set(range(4, 10))
    assert sum(map(len, labels)) == len(d.train_labels)
    assert SequentialDigits.N_TASKS == 5 and get_dataset(Namespace(dataset="seq-digits")).N_TASKS == 5


def test_transforms():
    """Against torchvision's, image by image."""
    d = digits(TEXT)
    x = d.eval_images[:16].float() / 255
    theirs = v2.Compose([v2.Resize(24, antialias=True), v2.CenterCrop(20), v2.Normalize([0.1], [0.2])])
    torch.testing.assert_close(d.get_test_transform()(x), torch.stack([theirs(i) for i in x]))
    torch.testing.assert_close(d.get_normalization_transform()(x[..., :20, :20]), (x[..., :20, :20] - 0.25) / 0.75)
    big = v2.Resize((24, 24), InterpolationMode.BICUBIC, antialias=True)(x)
    big = (torch.nn.functional.pad(big, [2] * 4) - 0.1) / 0.2  # with a border of what zero becomes
    seen = set()
    for image, crop in zip(big, d.get_transform()(x, torch.Generator().manual_seed(0))):
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.allclose(crop.flip(-1) if flip else crop, image[:, top : top + 20, left : left + 20], atol=1e-5)
        ]
        assert found
        seen.add(found[0])
    assert len(seen) > 8  # every image has draws of its own


def test_normalize_alone_gives_mean_and_deviation():
    d = digits("TRANSFORM: [ToTensor, Normalize: {mean: [0.1], std: [0.2]}]")
    assert (d.MEAN, d.STD, d.N_TASKS, d.SIZE) == ((0.1,), (0.2,), 5, (28, 28))
    x = d.train_images[:3].float() / 255
    for t in (d.get_transform(), d.get_test_transform(), d.get_normalization_transform()):
        torch.testing.assert_close(t(x), (x - 0.1) / 0.2)


def test_the_files_of_domain_incremental_data_sets():
    assert configured.division(PermutedMNIST, {"N_TASKS": 10}) == {
        "N_TASKS": 10,
        "N_CLASSES_PER_TASK": 10,
        "N_CLASSES": 10,
    }
    want = {"N_TASKS": 20, "N_CLASSES_PER_TASK": 5, "N_CLASSES": 100}
    assert configured.division(SequentialCIFAR100, want) == want


@pytest.mark.parametrize(
    "text, message",
    [
        ("N_TASKS: 4", "4 tasks of 2 classes make 8 classes, seq-digits has 10"),
        ("{N_TASKS: 5, N_CLASSES: 100}", "5 tasks of 2 classes make 100 classes, seq-digits has 10"),
        ("{N_TASKS: 2, N_CLASSES_PER_TASK: [5, 4]}", "make 9 classes"),
        ("{N_TASKS: 3, N_CLASSES_PER_TASK: [5, 5]}", "N_TASKS 3 and N_CLASSES_PER_TASK \\[5, 5\\] do not fit"),
        ("{N_TASKS: two}", "N_TASKS two and N_CLASSES_PER_TASK 2 do not fit"),
        ("{N_TASKS: 0}", "N_TASKS 0 and"),
        ("SIZE: 28", "SIZE 28: give a list of 2 numbers"),
        ("SIZE: [32, 32]", "TRANSFORM makes images of 28 x 28, SIZE is \\[32, 32\\]"),
        ("MEAN: [0, 0, 0]", "MEAN \\[0, 0, 0\\]: give a list of 1 numbers"),
        ("MEAN: [0]", "MEAN and STD go together"),
        ("TRANSFORM: RandomCrop", "TRANSFORM must be a list"),
        ("TRANSFORM: [RandomCorp: {size: 3}]", "there is no 'RandomCorp' here: did you mean 'RandomCrop'"),
        ("TRANSFORM: [ColorJitter: {brightness: 1}]", "there is no 'ColorJitter' here: choose from CenterCrop"),
        ("TRANSFORM: [RandomCrop: {size: 28, pad: 3}]", "RandomCrop: .*unexpected keyword argument 'pad'"),
        ("TRANSFORM: [Resize: {size: 28, interpolation: 77}]", "Resize: '77' is not a valid InterpolationMode"),
        ("TRANSFORM: [RandomCrop: {size: 40}]", "TRANSFORM does not take images of seq-digits: RandomCrop: 40x40"),
        ("TRANSFORM: [Normalize: {mean: [0, 0, 0], std: [1, 1, 1]}]", "TRANSFORM: means .* are not for 1 channels"),
        ("TRANSFORM: [Normalize: {mean: 0, std: 1}]", "TRANSFORM: Normalize: 'int' object is not iterable"),
        ("TEST_TRANSFORM: [Resize: 14]", "TEST_TRANSFORM makes images of 14 x 14, SIZE is \\[28, 28\\]"),
    ],
)
def test_a_mistake_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        digits(text)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--dataset_config: ")


def test_a_run(tmp_path, monkeypatch):
    """Tasks, size and transforms reach the network and the results; a checkpoint of it is no other run's."""
    file = tmp_path / "datasets" / "configs" / "seq-digits" / "two.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(TEXT)
    monkeypatch.setattr(utils.args, "ROOT", tmp_path)
    argv = ["--model=sgd", "--dataset=seq_digits", "--backbone=mnistmlp", "--debug_mode=1", "--dataset_config=two"]
    argv += ["--loadcheck=auto", "--savecheck=task", "--fl", "--num_clients=2", "--num_comm_rounds=1"]
    assert run([*argv, "--stop_after=1"], tmp_path / "r") == 0
    assert run(argv, tmp_path / "r") == 0
    folder = only_folder(tmp_path / "r")
    (summary,) = rows(folder / "summary.csv")
    assert (summary["n_tasks"], summary["batch_size"], summary["status"]) == ("2", "64", "finished")
    assert int(summary["trainable_params"]) == (400 + 1) * 100 + (100 + 1) * 100 + (100 + 1) * 10
    table = rows(folder / "accuracy.csv")
    assert list(table[0]) == ["after_task", "setting", "task_0", "task_1"]
