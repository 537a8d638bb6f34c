from __future__ import annotations

import time
from argparse import Namespace

import numpy as np
import pytest
import torch

from datasets.utils.partition import Partition, partition_task
from utils.errors import UserError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))


def divide(labels=LABELS, n_clients=10, seed=0, **options):
    return partition_task(labels, n_clients, rng=np.random.default_rng(seed), **options)


def assert_division(parts, n):
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))  # all of them, each once
    assert all((np.diff(p) > 0).all() for p in parts)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_dirichlet_is_a_division_with_at_least_six_each(alpha, seed):
    parts = divide(seed=seed, alpha=alpha)
    assert_division(parts, len(LABELS))
    assert min(map(len, parts)) >= 6
    again = divide(seed=seed, alpha=alpha)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again))
    assert any(not np.array_equal(a, b) for a, b in zip(parts, divide(seed=seed + 10, alpha=alpha)))


def test_large_alpha_is_nearly_uniform_per_class():
    labels = np.repeat(np.arange(4), 20_000)
    parts = divide(labels, alpha=1e4)
    for c in range(4):
        share = np.array([(labels[p] == c).mean() * len(p) / 20_000 for p in parts])
        # binomial spread plus that of Dirichlet(1e4) weights, which is smaller
        sigma = np.sqrt(0.1 * 0.9 / 20_000 + 0.1 * 0.9 / (10 * 1e4 + 1))
        assert np.abs(share - 0.1).max() < 5 * sigma


def test_small_alpha_means_few_classes_per_client():
    seen = {
        a: np.mean([len(np.unique(LABELS[p])) for s in range(5) for p in divide(seed=s, alpha=a)]) for a in (0.05, 0.5)
    }
    assert 3.0 < seen[0.05] < 5.0 and 8.3 < seen[0.5] < 9.7  # fed-mammoth's rule gives about 3.8 and 9.0


def test_counts_have_the_law_of_independent_draws():
    # two clients, one class: the first one's share is Beta(alpha, alpha); its variance is 1 / (4 (2 alpha + 1))
    labels = np.zeros(2000, dtype=int)
    share = np.array([len(divide(labels, 2, s, alpha=1.0, min_samples=0 + 1)[0]) for s in range(2000)]) / 2000
    assert abs(share.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 2000)
    assert abs(share.var() - 1 / 12) < 0.01
    which = np.bincount(np.concatenate([divide(labels, 2, s, alpha=1.0)[0] for s in range(400)]), minlength=2000)
    assert abs(which[:1000].mean() - which[1000:].mean()) < 5  # samples of a class are interchangeable


def test_tiny_alpha_does_not_give_nan():
    parts = divide(np.repeat(np.arange(40), 10), 2, alpha=1e-300)
    assert_division(parts, 400)
    assert all(len(set(p // 10)) * 10 == len(p) for p in parts)  # whole classes


def test_many_clients_are_quick():
    labels = np.repeat(np.arange(10), 5000)
    start = time.perf_counter()
    assert_division(divide(labels, 1000, alpha=0.5), 50_000)
    assert time.perf_counter() - start < 5


def test_iid_is_equal_and_shuffled():
    parts = divide(n_clients=7, mode="iid")
    assert_division(parts, 5000)
    assert {len(p) for p in parts} == {714, 715}
    for p in parts:
        assert (np.bincount(LABELS[p], minlength=10) > 30).all()


@pytest.mark.parametrize("n_clients,quantity", [(10, 2), (10, 1), (4, 3), (50, 1), (3, 10)])
def test_quantity_gives_each_client_its_number_of_classes(n_clients, quantity):
    for seed in range(3):
        parts = divide(n_clients=n_clients, mode="quantity", class_quantity=quantity, seed=seed)
        assert_division(parts, 5000)
        assert all(len(np.unique(LABELS[p])) == quantity for p in parts)
    owners = [sum(c in LABELS[p] for p in parts) for c in range(10)]
    for p in parts:  # uniform among owners, within 5 sigma
        for c in np.unique(LABELS[p]):
            mean = 500 / owners[c]
            assert abs((LABELS[p] == c).sum() - mean) <= 5 * np.sqrt(mean) + 1


@pytest.mark.parametrize(
    "options,message",
    [
        ({"n_clients": 834}, "at most 833 clients"),
        ({"n_clients": 0}, "give 1 or more"),
        ({"n_clients": 5001, "mode": "iid"}, "at most 5000 clients"),
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": float("nan")}, "above 0"),
        ({"alpha": -1.0}, "above 0"),
        ({"mode": "quantity", "class_quantity": 0}, "give 1 to 10"),
        ({"mode": "quantity", "class_quantity": 11}, "give 1 to 10"),
        ({"mode": "quantity", "class_quantity": 2, "n_clients": 4}, "at least 3 classes"),
        ({"mode": "dirichlet"}, "unknown --partition_mode"),
        ({"n_clients": 100, "alpha": 0.001, "max_tries": 50}, "larger alpha or fewer clients"),
    ],
)
def test_what_cannot_be_says_what_can(options, message):
    with pytest.raises(UserError, match=message) as e:
        divide(**options)
    assert "\n" not in str(e.value)


def test_a_quantity_division_without_samples_for_all_is_refused():
    labels = np.repeat(np.arange(2), [3, 400])
    with pytest.raises(UserError, match="leaves clients without samples"):
        divide(labels, 60, mode="quantity", class_quantity=1)


def test_partition_covers_every_task_and_depends_on_the_seed_only(toy, tmp_path):
    d = toy(seed=1)
    args = Namespace(num_clients=3, distribution_alpha=0.5, seed=5, model="a")
    p = Partition.make(d, args)
    assert (p.n_tasks, p.n_clients) == (3, 3)
    for t in range(3):
        union = torch.cat([p.indices(t, k) for k in range(3)])
        assert torch.equal(union.sort().values, d.task_indices(t))
        assert p.sizes(t) == [len(p.indices(t, k)) for k in range(3)] and min(p.sizes(t)) >= 6
    torch.manual_seed(1)
    np.random.seed(1)
    assert Partition.make(toy(seed=9), Namespace(num_clients=3, distribution_alpha=0.5, seed=5, model="b")) == p
    assert Partition.make(d, Namespace(num_clients=3, distribution_alpha=0.5, seed=6)) != p
    assert Partition.make(d, Namespace(num_clients=3, distribution_alpha=0.5, seed=6, partition_seed=5)) == p
    assert Partition.make(d, Namespace(num_clients=3, distribution_alpha=0.5, seed=6, partition_seed=0)) != p
    assert Partition.make(d, Namespace(num_clients=3, distribution_alpha=0.4, seed=5)) != p
    assert p != "p"

    path = tmp_path / "partition.npz"
    p.save(path)
    assert Partition.load(path) == p
    assert [f.name for f in tmp_path.iterdir()] == ["partition.npz"]
    with np.load(path, allow_pickle=False) as f:
        assert all(f[k].dtype == np.int64 for k in f.files)


def test_partition_under_joint_and_domains(toy, toy_domains):
    args = Namespace(num_clients=4, partition_mode="iid", seed=0)
    p = Partition.make(toy(joint=1), args)
    assert p.n_tasks == 1 and sum(p.sizes(0)) == 240
    p = Partition.make(toy_domains(), args)
    assert p.n_tasks == 3 and [sum(p.sizes(t)) for t in range(3)] == [240] * 3
    assert not torch.equal(p.indices(0, 0), p.indices(1, 0))  # each task is divided anew
    assert sum(Partition.make(toy_domains(joint=1), args).sizes(0)) == 720


def test_the_users_test_set_is_pooled_whole(toy):
    d = toy()
    assert torch.equal(torch.cat([d.task_indices(t, False) for t in range(3)]).sort().values, torch.arange(60))
