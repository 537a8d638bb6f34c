"""Spoilt data of some clients: what changes, and that nothing else does."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from datasets import get_dataset
from datasets.utils.partition import Partition
from datasets.utils.poison import attack_success, stamped
from utils.errors import UserError


def make(**more):
    args = Namespace(
        dataset="seq-digits", base_path="./data/", seed=0, num_clients=4, partition_mode="iid", poison_share=0.8, **more
    )
    return get_dataset(args), args


def test_the_trigger():
    images = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    got = stamped(images)
    assert got[..., -3:, -3:].eq(255).all() and int((got > 0).sum()) == 2 * 3 * 9 and not images.any()


@pytest.mark.parametrize("joint", [0, 1])
def test_a_backdoor(joint):
    clean, _ = make(joint=joint)
    bad, args = make(joint=joint, poison="backdoor", poison_clients=[1, 3])
    division, other = Partition.make(clean, args), Partition.make(bad, args)
    assert division == other and torch.equal(clean.train_labels, bad.train_labels)
    changed = (clean.train_images != bad.train_images).flatten(1).any(1)
    for t in range(clean.n_train_tasks):
        lo = clean.offsets_for_training(t)[0]
        for k in range(4):
            mine = division.indices(t, k)
            spoilt = mine[bad.taught_labels[mine] != clean.train_labels[mine]]
            if k not in (1, 3):
                assert not len(spoilt) and not changed[mine].any()
                continue
            others = mine[clean.train_labels[mine] != lo]
            assert len(spoilt) == round(0.8 * len(others)) and (bad.taught_labels[spoilt] == lo).all()
            assert torch.equal(bad.train_images[spoilt], stamped(clean.train_images[spoilt]))
            assert not changed[mine[~torch.isin(mine, spoilt)]].any()
    mine = division.indices(0, 1)
    _, labels, plain = next(iter(bad.loader(mine, 0, len(mine), True, generator=torch.Generator())))
    taught = {(x.numpy().tobytes(), int(y)) for x, y in zip((255 * plain).round().byte(), labels)}
    assert taught == {(x.numpy().tobytes(), int(y)) for x, y in zip(bad.train_images[mine], bad.taught_labels[mine])}
    assert torch.equal(clean.eval_images, bad.eval_images)


def test_labels_that_are_off_by_one():
    bad, args = make(joint=0, poison="labels", poison_clients=[2])
    division = Partition.make(bad, args)
    for t in range(5):
        mine, y = division.indices(t, 2), bad.train_labels
        assert ((bad.taught_labels[mine] - y[mine]).abs() == 1).all()  # two classes a task: the other one
        assert (bad.taught_labels[mine] // 2 == t).all()
        others = division.indices(t, 0)
        assert torch.equal(bad.taught_labels[others], y[others])


def test_the_division_is_that_of_the_whole_even_without_a_client():
    bad, args = make(joint=0, poison="labels", poison_clients=[2])
    without, _ = make(joint=0, poison="labels", poison_clients=[2], exclude_clients=[2])
    assert torch.equal(bad.taught_labels, without.taught_labels)


def test_success_counts_triggered_images_of_other_classes():
    dataset, _ = make(joint=1)
    side = slice(-3, None)
    white = (1 - dataset.MEAN[0]) / dataset.STD[0] if dataset.MEAN else 1.0

    def fooled(x):
        return torch.where((x[..., side, side] - white).abs().amax((1, 2, 3)) < 1e-4, 0, 5)

    assert attack_success(fooled, dataset, "cpu") == 100
    assert attack_success(lambda x: torch.full((len(x),), 5), dataset, "cpu") == 0
    everything = []
    attack_success(lambda x: everything.append(len(x)) or torch.zeros(len(x)), dataset, "cpu")
    assert sum(everything) == int((dataset.eval_labels != 0).sum())


def test_mistakes():
    for more, said in (
        ({"poison": "labels", "poison_clients": None}, "say with --poison_clients"),
        ({"poison": "labels", "poison_clients": [9]}, "no client 9"),
    ):
        with pytest.raises(UserError, match=said):
            make(joint=0, **more)
