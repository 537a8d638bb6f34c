"""The stream of turning digits."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from datasets import get_dataset
from datasets.mnist_360 import rotated, stream
from tests.helpers import only_folder, rows, run

from .test_8vision import write_mnist


def test_every_image_is_shown_once_and_digits_turn():
    labels = np.random.default_rng(0).integers(0, 10, 2000)
    order, angles = stream(labels, np.random.default_rng(1))
    assert sorted(order) == np.flatnonzero(labels < 9).tolist()
    seen = [0] * 9
    for i in order:
        j = labels[i]
        assert angles[i] == pytest.approx(60 * (j - 1) + 360 * seen[j] / np.count_nonzero(labels == j))
        seen[j] += 1


def test_pairs_follow_each_other():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    order, _ = stream(labels, np.random.default_rng(1))
    stretches = labels[order].reshape(27, 20)  # a sixth of each of two digits
    for s, stretch in enumerate(stretches):
        pair = sorted({s % 9, (s + 1) % 9})
        for half in stretch.reshape(2, 10):  # mixed all the way
            assert sorted(half) == [pair[0]] * 5 + [pair[1]] * 5


def test_turning_is_torchvisions():
    x = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    degrees = torch.linspace(-60, 700, 40, dtype=torch.float64)
    want = torch.stack([TF.rotate(image, float(d)) for image, d in zip(x, degrees)])
    assert (rotated(x, degrees) != want).float().mean() < 1e-3 and torch.equal(rotated(x[:1], degrees[:1] * 0), x[:1])


def test_batches_come_in_order(tmp_path):
    write_mnist(tmp_path)
    d = get_dataset(Namespace(dataset="mnist-360", base_path=str(tmp_path), batch_size=4, seed=1))
    assert len(d.train_labels) == 18 and sorted(d.eval_labels.tolist()) == list(range(9)) and d.N_CLASSES == 9
    train, _ = d.get_data_loaders()
    x, y = torch.cat([b[0] for b in train]), torch.cat([b[1] for b in train])
    assert torch.equal(x, d.train_images.float() / 255) and torch.equal(y, d.train_labels)
    parts = [(torch.arange(10), torch.Generator()), (torch.arange(10, 18), torch.Generator())]
    clients = list(d.loader_of_many(parts, 0, 4))
    assert [y.tolist() for _, _, y in clients][0] == [*d.train_labels[:4].tolist(), *d.train_labels[10:14].tolist()]
    other = get_dataset(Namespace(dataset="mnist-360", base_path=str(tmp_path), seed=2))
    assert not torch.equal(other.train_images, d.train_images) and torch.equal(other.eval_images, d.eval_images)
    mixed = get_dataset(Namespace(dataset="mnist-360", base_path=str(tmp_path), batch_size=18, seed=1, joint=1))
    assert not torch.equal(next(iter(mixed.get_data_loaders()[0]))[1], mixed.train_labels)


@pytest.mark.parametrize("fl", [False, True])
def test_a_run(tmp_path, fl):
    write_mnist(tmp_path)
    argv = f"--model=er --dataset=mnist-360 --base_path={tmp_path} --device=cpu --lr=0.1 --buffer_size=9".split()
    more = ["--fl", "--num_clients=2", "--num_comm_rounds=1", "--partition_mode=iid"] if fl else []
    assert run([*argv, *more], tmp_path / "results") == 0
    (summary,) = rows(only_folder(tmp_path / "results") / "summary.csv")
    assert summary["status"] == "finished" and summary["n_tasks"] == "1" and 0 <= float(summary["faa"]) <= 100
