from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from datasets.utils.continual_dataset import _ARRAYS
from datasets.utils.transforms import Compose, Normalize, RandomHorizontalFlip
from utils.errors import UserError


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- tasks
def test_offsets_and_tasks_of_unequal_size(toy):
    d = toy()
    assert d.N_CLASSES == 6 and d.n_train_tasks == d.n_eval_tasks == 3
    assert [d.get_offsets(t) for t in range(3)] == [(0, 2), (2, 5), (5, 6)]
    assert [d.offsets_for_training(t) for t in range(3)] == [(0, 2), (2, 5), (5, 6)]
    for train in (True, False):
        labels = d.train_labels if train else d.eval_labels
        parts = [d.task_indices(t, train) for t in range(3)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))
        for t, part in enumerate(parts):
            start, end = d.get_offsets(t)
            assert set(labels[part].tolist()) == set(range(start, end))
    with pytest.raises(IndexError):
        d.get_offsets(3)


def test_get_data_loaders_walks_through_the_tasks(toy):
    d = toy(batch_size=16)
    assert d.c_task == -1 and d.train_loader is None and d.test_loaders == []
    for t in range(3):
        train, test = d.get_data_loaders()
        assert d.c_task == t and train is d.train_loader and test is d.test_loaders[-1]
        assert len(d.test_loaders) == t + 1 and d.get_offsets() == d.get_offsets(t)
        assert torch.equal(train.dataset.indices, d.task_indices(t))
        assert train.batch_size == 16
    with pytest.raises(IndexError):
        d.get_data_loaders()


def test_images_are_kept_once(toy):
    a = toy()
    loads = type(a).loads
    b = toy(seed=3, permute_classes=1)
    assert type(a).loads == loads
    train, _ = a.get_data_loaders()
    ptr = a.train_images.untyped_storage().data_ptr()
    assert b.train_images.untyped_storage().data_ptr() == ptr
    assert train.dataset.source.train_images.untyped_storage().data_ptr() == ptr
    clients = [a.loader(torch.arange(k, 240, 10), 0, 8, True) for k in range(10)]
    for c in clients:
        held = [v for v in vars(c.dataset).values() if isinstance(v, torch.Tensor)]
        assert sum(v.numel() for v in held) == 24  # the indices, nothing else
    assert a.train_images.dtype == torch.uint8


def test_to_keeps_the_arrays_shared_under_validation(toy):
    d = toy(validation=25)
    assert d.to("cpu") is d and d.eval_images is d.train_images


# ---- loaders
def test_training_batches(toy):
    d = toy()
    indices = d.task_indices(1)
    loader = d.loader(indices, 1, 32, True, generator=gen(1))
    assert len(loader) == 4 and len(loader.dataset) == 120
    seen, where = [], {bytes(d.train_images[i].numpy()): i for i in indices.tolist()}
    for inputs, labels, not_aug in loader:
        assert inputs.shape == not_aug.shape and inputs.dtype == not_aug.dtype == torch.float32
        ids = [where[bytes((x * 255).round().to(torch.uint8).numpy())] for x in not_aug]
        assert torch.equal(not_aug, d.train_images[ids].float() / 255)
        assert torch.equal(labels, d.train_labels[ids]) and labels.dtype == torch.int64
        assert torch.allclose(inputs, Normalize(d.MEAN, d.STD)(not_aug))
        seen += ids
    assert sorted(seen) == indices.tolist() and seen != indices.tolist()


def test_the_generator_decides_order_and_augmentation(toy, monkeypatch):
    Toy = type(toy())
    monkeypatch.setattr(Toy, "TRAIN_AUGMENT", [RandomHorizontalFlip()])
    d = toy()
    loader = d.loader(d.task_indices(0), 0, 32, True, generator=gen(1))
    first = [b[0] for b in loader]
    second = [b[0] for b in loader]  # the generator has moved on
    assert not torch.equal(first[0], second[0])
    loader.set_generator(gen(1))
    torch.manual_seed(99)
    assert all(torch.equal(a, b[0]) for a, b in zip(first, loader))
    loader.set_generator(None)
    torch.manual_seed(1)
    a = next(iter(loader))[0]
    torch.manual_seed(1)
    assert torch.equal(a, next(iter(loader))[0])


def test_drop_last_and_small_clients(toy):
    d = toy()
    loader = d.loader(torch.arange(33), 0, 16, True, drop_last=True)
    assert len(loader) == 2 and [len(b[1]) for b in loader] == [16, 16]
    loader = d.loader(torch.arange(33), 0, 16, True)
    assert len(loader) == 3 and [len(b[1]) for b in loader] == [16, 16, 1]
    empty = d.loader(torch.arange(0), 0, 16, True)
    assert len(empty) == 0 and list(empty) == []
    with pytest.raises(UserError, match="batch size"):
        d.loader(torch.arange(3), 0, 0, True)


def test_evaluation_in_order(toy):
    d = toy()
    _, test = d.get_data_loaders()
    inputs, labels = next(iter(test))
    indices = d.task_indices(0, False)
    assert torch.equal(labels, d.eval_labels[indices])
    assert torch.allclose(inputs, Normalize(d.MEAN, d.STD)(d.eval_images[indices]))
    # training samples without augmentation, for statistics
    inputs, labels = next(iter(d.loader(torch.tensor([7, 3]), 0, 8, False, split="train")))
    assert torch.equal(labels, d.train_labels[[7, 3]])
    assert torch.allclose(inputs, Normalize(d.MEAN, d.STD)(d.train_images[[7, 3]]))
    with pytest.raises(ValueError):
        d.loader(torch.tensor([7, 3]), 0, 8, False, split="val")


# ---- the view that Mammoth's methods use
def test_view_items_and_extra_fields(toy):
    d = toy()
    train, test = d.get_data_loaders()
    view = train.dataset
    assert view.data.shape[0] == len(view) == 80 and view.data.dtype == torch.uint8
    assert isinstance(view.targets, np.ndarray) and view.targets.dtype == np.int64
    image, label, not_aug = view[5]
    assert image.shape == (3, 8, 8) and label == view.targets[5] and isinstance(label, int)
    assert torch.equal(not_aug, view.data[5].float() / 255)
    assert len(test.dataset[0]) == 2 and torch.equal(view[-1][2], view[79][2])
    with pytest.raises(IndexError):
        view[80]

    assert train.extra_fields() == ()
    view.logits = torch.arange(80.0)[:, None].repeat(1, 6)  # as LwF does
    assert train.extra_fields() == ("logits",) and view[5][3][0] == 5
    view.extra_return_fields += ("logits", "where")
    view.where = torch.arange(80)
    assert train.extra_fields() == ("logits", "where")
    for _, labels, not_aug, logits, where in train:
        assert torch.equal(logits[:, 0].long(), where)
        assert torch.equal(not_aug, view.data[where].float() / 255)
        assert torch.equal(labels, torch.from_numpy(view.targets)[where])


def test_view_works_in_a_torch_data_loader_and_with_a_foreign_transform(toy):
    train, _ = toy().get_data_loaders()
    batch = next(iter(DataLoader(train.dataset, batch_size=4)))
    assert batch[0].shape == (4, 3, 8, 8) and batch[1].tolist() == train.dataset.targets[:4].tolist()
    train.dataset.transform = lambda image: image[:, :2]
    assert next(iter(train))[0].shape[1:] == (3, 2, 8)


def test_view_data_and_targets_can_be_replaced(toy):
    train, _ = toy(batch_size=64).get_data_loaders()
    view = train.dataset
    more = torch.full((5, 3, 8, 8), 9, dtype=torch.uint8)
    view.data = np.concatenate([view.data, more])
    view.targets = np.concatenate([view.targets, np.full(5, 4)])
    assert len(view) == 85 and len(train) == 2
    labels = torch.cat([b[1] for b in train])
    assert (labels == 4).sum() == 5 and torch.allclose(view[84][2], torch.tensor(9 / 255))


# ---- options
def test_permute_classes(toy):
    plain, d = toy(seed=3), toy(seed=3, permute_classes=1)
    assert plain.class_order is None and sorted(d.class_order.tolist()) == list(range(6))
    assert torch.equal(d.train_labels, torch.from_numpy(d.class_order)[plain.train_labels])
    assert torch.equal(d.eval_labels, torch.from_numpy(d.class_order)[plain.eval_labels])
    np.random.seed(0)
    torch.manual_seed(0)
    assert np.array_equal(toy(seed=3, permute_classes=1).class_order, d.class_order)
    assert any(not np.array_equal(toy(seed=s, permute_classes=1).class_order, d.class_order) for s in (4, 5))
    assert set(d.train_labels[d.task_indices(1)].tolist()) == {2, 3, 4}
    several = [toy(seed=s, permute_classes=1) for s in range(9)]
    # an order that is not its own inverse, so that the direction shows
    d = next(d for d in several if (d.class_order[d.class_order] != np.arange(6)).any())
    assert d.train_labels[:6].tolist() == d.class_order.tolist()  # the toy's first labels are 0..5


def test_validation_comes_out_of_the_training_set(toy):
    d = toy(seed=1, validation=25)
    train = torch.cat([d.task_indices(t) for t in range(3)])
    held = torch.cat([d.task_indices(t, False) for t in range(3)])
    assert len(held) == 60 and torch.equal(torch.cat([train, held]).sort().values, torch.arange(240))
    assert torch.bincount(d.eval_labels[held]).tolist() == [10] * 6  # stratified
    inputs, labels = next(iter(d.test_loader(0)))
    assert torch.allclose(inputs, Normalize(d.MEAN, d.STD)(d.train_images[d.task_indices(0, False)]))
    again, other = toy(seed=1, validation=25), toy(seed=2, validation=25)
    assert torch.equal(again.task_indices(0), d.task_indices(0)) and not torch.equal(
        other.task_indices(0), d.task_indices(0)
    )
    permuted = toy(seed=1, validation=25, permute_classes=1)
    assert torch.equal(torch.cat([permuted.task_indices(t, False) for t in range(3)]).sort().values, held.sort().values)
    assert len(toy(validation=0.1).task_indices(0, False)) == 2  # never an empty class
    for wrong in (0, 100, -5, 130):
        with pytest.raises(UserError, match="percentage"):
            toy(validation=wrong)


def test_joint_trains_once_and_evaluates_per_task(toy):
    d = toy(joint=1)
    train, _ = d.get_data_loaders()
    assert d.n_train_tasks == 1 and d.n_eval_tasks == 3 and len(d.test_loaders) == 3
    assert len(train.dataset) == 240 and d.offsets_for_training(0) == d.get_offsets() == (0, 6)
    assert d.get_offsets(1) == (2, 5)
    assert set(d.test_loaders[1].dataset.targets.tolist()) == {2, 3, 4}
    assert len(d.task_indices(0, False)) == 20
    with pytest.raises(IndexError):
        d.get_data_loaders()


def test_domains(toy_domains):
    d = toy_domains()
    assert d.N_CLASSES == 6 and [d.get_offsets(t) for t in range(3)] == [(0, 6)] * 3
    for t in range(3):
        train, test = d.get_data_loaders()
        assert len(train.dataset) == 240
        inputs, labels = next(iter(test))
        assert torch.allclose(inputs, Normalize(d.MEAN, d.STD)(d.eval_images + t))
        not_aug = torch.cat([b[2] for b in d.loader(torch.arange(240), t, 50, True, gen(0))])
        order = torch.randperm(240, generator=gen(0))
        assert torch.equal(not_aug, (d.train_images + t)[order].float() / 255)  # what a buffer must replay


def test_joint_domains_are_the_union_of_all_tasks(toy_domains):
    d = toy_domains(joint=1, validation=25)
    indices = d.task_indices(0)
    assert len(indices) == 3 * 180 and len(d.task_indices(0, False)) == 60
    pick = indices[torch.tensor([0, 200, 400, 539])]
    inputs, labels = next(iter(d.loader(pick, 0, 8, False, split="train")))
    for x, y, i in zip(inputs, labels, pick.tolist()):
        task, sample = divmod(i, 240)
        assert (
            torch.allclose(x, Normalize(d.MEAN, d.STD)(d.train_images[sample] + task)) and y == d.train_labels[sample]
        )
    assert [i // 240 for i in pick.tolist()] == [0, 1, 2, 2]
    train, _ = d.get_data_loaders()
    assert len(torch.cat([b[1] for b in train])) == 540 and len(d.test_loaders) == 3
    assert len(train.dataset.data) == len(train.dataset.targets) == 540


# ---- accessors
def test_accessors(toy):
    d = toy()
    assert d.get_loss() is F.cross_entropy and type(d).get_loss() is F.cross_entropy
    assert (d.get_epochs(), d.get_batch_size(), d.get_minibatch_size(), d.get_backbone()) == (1, 32, 32, None)
    d = toy(n_epochs=7, batch_size=9, minibatch_size=4, backbone="vit")
    assert (d.get_epochs(), d.get_batch_size(), d.get_minibatch_size(), d.get_backbone()) == (7, 9, 4, "vit")
    x = torch.rand(2, 3, 8, 8)
    y = d.get_normalization_transform()(x)
    assert torch.allclose(y, Normalize(d.MEAN, d.STD)(x))
    assert torch.allclose(d.get_denormalization_transform()(y), x, atol=1e-6)
    assert torch.equal(d.TRANSFORM(x), d.get_transform()(x)) and torch.equal(d.TEST_TRANSFORM(x), y)


def test_defaults_of_the_federated_run(toy, monkeypatch):
    Toy = type(toy())
    monkeypatch.setattr(Toy, "DEFAULTS", {"n_epochs": 9, "batch_size": 64, "backbone": "a"})
    monkeypatch.setattr(Toy, "FED_DEFAULTS", {"n_epochs": 2, "num_clients": 4})
    assert Toy.defaults(True) == {"n_epochs": 2, "batch_size": 64, "backbone": "a", "num_clients": 4}
    assert toy(fl=True).get_epochs() == 2 and toy().get_epochs() == 9


def test_wrong_dataset_files_are_told(toy, monkeypatch):
    Toy = type(toy())
    monkeypatch.setattr(Toy, "load_arrays", lambda self, train: (torch.zeros(2, 3, 8, 8), torch.zeros(2).long()))
    _ARRAYS.clear()
    with pytest.raises(ValueError, match="uint8"):
        toy()
    monkeypatch.setattr(
        Toy, "load_arrays", lambda self, train: (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 6]))
    )
    with pytest.raises(ValueError, match="labels outside"):
        toy()
    monkeypatch.setattr(Toy, "N_CLASSES_PER_TASK", [3, 3])
    with pytest.raises(ValueError, match="2 entries for 3 tasks"):
        toy()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_or_not_the_batches_are_the_same(toy):
    d = toy()
    cpu = list(d.loader(d.task_indices(0), 0, 32, True, gen(0)))
    cuda = list(d.loader(d.task_indices(0), 0, 32, True, gen(0), device="cuda"))
    d.to("cuda")
    resident = list(d.loader(d.task_indices(0), 0, 32, True, gen(0), device="cuda"))
    for a, b, c in zip(cpu, cuda, resident):
        for x, y, z in zip(a, b, c):
            assert y.is_cuda and z.is_cuda and torch.equal(y, z)
            torch.testing.assert_close(x, y.cpu(), rtol=1e-5, atol=1e-6)  # x / 255 may be x times 1 / 255


def test_where_batches_come_from_that_look_the_same_every_time(toy, toy_domains):
    for d in (toy(), toy_domains()):
        for train, split in ((True, "train"), (False, "train"), (False, "test")):
            for inputs, *_ in d.loader(d.task_indices(1, split == "train"), 1, 32, train, gen(0), split=split):
                ((view, positions),) = inputs.shown
                assert torch.equal(view.batch(positions)[0], inputs)
    parts = [(torch.arange(7), gen(1)), (torch.arange(20, 25), gen(2))]
    for sizes, inputs, _ in d.loader_of_many(parts, 1, 3):
        assert [len(positions) for _, positions in inputs.shown] == sizes
        assert torch.equal(torch.cat([view.batch(positions)[0] for view, positions in inputs.shown]), inputs)

    def fingerprint(indices, task=1, train=True, split="train"):
        return next(iter(d.loader(indices, task, 3, train, gen(0), split=split)))[0].shown[0][0].fingerprint

    mine = fingerprint(torch.arange(7))
    assert mine == fingerprint(torch.arange(7)) == fingerprint(torch.arange(7), train=False), "the same transform"
    others = [
        fingerprint(torch.arange(1, 8)),
        fingerprint(torch.arange(7), 2),
        fingerprint(torch.arange(7), split="test"),
    ]
    assert len({mine, *others}) == 4


def test_batches_that_may_look_different_do_not_say_where_they_come_from(toy):
    d = toy()
    loader = d.loader(torch.arange(9), 0, 4, False, split="train")
    loader.dataset.transform = lambda images: images
    assert not any(hasattr(x, "shown") for x, *_ in loader)
    loader = d.loader(torch.arange(9), 0, 4, True)
    loader.dataset.data = loader.dataset.data.flip(0)  # replaced by a method
    assert not any(hasattr(x, "shown") for x, *_ in loader)
    d._transforms[True] = Compose([RandomHorizontalFlip(), Normalize(d.MEAN, d.STD)])
    assert not any(hasattr(x, "shown") for x, *_ in d.loader(torch.arange(9), 0, 4, True))
    assert not any(hasattr(x, "shown") for _, x, _ in d.loader_of_many([(torch.arange(9), gen(0))], 0, 4))
