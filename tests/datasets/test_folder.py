"""A folder of images as a benchmark."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import get_dataset
from datasets.utils import continual_dataset, image_files
from datasets.utils.stacked import square
from tests.helpers import assert_same_run, folders, only_folder, rows, run
from utils.args import parse_args
from utils.errors import UserError
from utils.loggers import settings_hash


def put(path, seed, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, "PNG")


@pytest.fixture
def animals(tmp_path):
    """train and val of five classes, 12 and 4 images each."""
    for c, name in enumerate(["wolf", "ant", "Bee", "cat", "dog"]):
        for i in range(16):
            put(tmp_path / "animals" / ("train" if i < 12 else "val") / name / f"{i}.jpg", 100 * c + i)
    return tmp_path / "animals"


def args(folder, *more, model="sgd"):
    argv = f"--model {model} --dataset folder --data_dir {folder} --base_path {folder.parent} --device cpu --lr 0.1"
    return [*argv.split(), "--backbone=mnistmlp", "--image_size=8", "--n_epochs=1", "--batch_size=8", *more]


def build(folder, *more, **kwargs):
    continual_dataset._ARRAYS.clear()
    return get_dataset(parse_args(args(folder, *more, **kwargs)))


def test_train_and_val(animals):
    d = build(animals, "--n_tasks=2")
    assert d.N_TASKS == 2 and d.N_CLASSES_PER_TASK == [3, 2] and d.N_CLASSES == 5 and d.SIZE == (8, 8)
    assert torch.bincount(d.train_labels).tolist() == [12] * 5 and torch.bincount(d.eval_labels).tolist() == [4] * 5
    names = ["Bee", "ant", "cat", "dog", "wolf"]
    files = [animals / "train" / name / f"{i}.jpg" for name in names for i in sorted(range(12), key=str)]
    for image, file in zip(d.train_images, files):
        assert np.array_equal(image.numpy(), square(Image.open(file), 8))
    assert d.MEAN == (0.485, 0.456, 0.406) and d._read(True)[2] == names


def test_one_level_is_divided(animals):
    d = build(animals / "train", "--n_tasks=5", "--normalise=none", "--seed=1")
    assert torch.bincount(d.eval_labels).tolist() == [2] * 5 and torch.bincount(d.train_labels).tolist() == [10] * 5
    assert d.MEAN is None
    again = build(animals / "train", "--seed=2")
    assert torch.equal(again.eval_images, d.eval_images)
    assert build(animals, "--fl", model="fedavg").MEAN == (0.5, 0.5, 0.5)


def test_changed_files_make_another_benchmark(animals, tmp_path):
    first, d = parse_args(args(animals)), build(animals)
    assert settings_hash(first) == settings_hash(parse_args(args(animals)))
    moved = tmp_path / "elsewhere"
    shutil.copytree(animals, moved)
    assert settings_hash(first) == settings_hash(parse_args(args(moved)))  # where it lies does not count
    (animals / "train" / "ant" / "notes.txt").write_text("no image")
    (animals / ".trash" / "x").mkdir(parents=True)
    put(animals / ".trash" / "x" / "1.jpg", 0)
    assert settings_hash(first) == settings_hash(parse_args(args(animals)))
    put(animals / "train" / "ant" / "new.jpg", 9)
    assert settings_hash(first) != settings_hash(parse_args(args(animals)))
    assert len(build(animals).train_labels) == len(d.train_labels) + 1
    shutil.move(animals / "train" / "ant" / "new.jpg", animals / "train" / "cat" / "new.jpg")
    assert torch.bincount(build(animals).train_labels).tolist() == [12, 12, 13, 12, 12]


def test_a_second_start_reads_nothing(animals, monkeypatch):
    d = build(animals)
    monkeypatch.setattr("datasets.folder.image_folder", lambda *a: pytest.fail("read again"))
    assert torch.equal(build(animals).train_images, d.train_images)


@pytest.mark.parametrize("fl", [False, True])
def test_a_run(animals, tmp_path, fl):
    more = [
        "--n_tasks=2",
        *(["--fl", "--num_clients=2", "--num_comm_rounds=1", "--distribution_alpha=5"] if fl else []),
    ]
    argv = args(animals, *more, model="fedavg" if fl else "er")
    results = tmp_path / "results"
    assert run(argv, results) == 0
    (summary,) = rows(only_folder(results) / "summary.csv")
    assert summary["status"] == "finished" and summary["n_tasks"] == "2" and summary["dataset"] == "folder"
    assert run(argv, results, "--loadcheck=auto") == 0 and len(folders(results)) == 1  # it is done
    put(animals / "train" / "ant" / "new.jpg", 9)
    assert run(argv, results, "--loadcheck=auto", "--stop_after=1") == 0 and len(folders(results)) == 2


def test_images_that_stay_on_disk_give_the_same_run(animals, tmp_path, monkeypatch):
    argv = args(animals, "--fl", "--num_clients=2", "--num_comm_rounds=1", "--distribution_alpha=5", model="fedavg")
    assert run(argv, tmp_path / "a") == 0
    continual_dataset._ARRAYS.clear()
    monkeypatch.setattr(image_files, "IN_MEMORY", 0)
    assert run(argv, tmp_path / "b") == 0 and not continual_dataset._ARRAYS
    assert_same_run(only_folder(tmp_path / "a"), only_folder(tmp_path / "b"))


def test_mistakes(animals, tmp_path):
    def refused(match, folder=animals, *more):
        with pytest.raises(UserError, match=match) as e:
            build(folder, *more)
        assert "\n" not in str(e.value)

    refused("needs --data_dir|there is no such folder", tmp_path / "nowhere")
    refused("--n_tasks 6.*has 5 classes, so 1 to 5", animals, "--n_tasks=6")
    refused("--n_tasks", animals, "--n_tasks=0")
    put(animals / "val" / "yak" / "1.jpg", 1)
    refused("val has classes that train has not: yak")
    shutil.rmtree(animals / "val" / "yak")
    shutil.rmtree(animals / "val" / "cat")
    refused("no valid file for the classes cat|cat")
    shutil.rmtree(animals / "val")
    refused("train or test images but not both")
    put(tmp_path / "single" / "a" / "1.jpg", 1), put(tmp_path / "single" / "b" / "1.jpg", 1)
    refused("one image cannot be both.*a, b", tmp_path / "single", "--n_tasks=1")
    (tmp_path / "empty").mkdir()
    refused(r"no folders of classes.*must hold train/<class>/\*.jpg", tmp_path / "empty")
    (tmp_path / "single" / "a" / "2.jpg").write_bytes(b"not an image")
    put(tmp_path / "single" / "b" / "2.jpg", 1)
    refused("cannot identify image file", tmp_path / "single", "--n_tasks=1")
    refused("cannot identify.*{odd} must hold", (tmp_path / "single").rename(tmp_path / "{odd}"), "--n_tasks=1")
    with pytest.raises(UserError, match="--dataset folder needs --data_dir"):
        parse_args(["--model=sgd", "--dataset=folder"])


def test_help_lists_its_flags(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model=sgd", "--dataset=folder", "--help"])
    out = capsys.readouterr().out
    assert all(re.search(flag, out) for flag in ("--data_dir", "--n_tasks", "--image_size", "--normalise"))
