"""The rehearsal buffer: sampling, tuples, exact 8-bit storage, checkpoints; transforms and batch norm beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from utils.augmentations import apply_transform, is_batched, normalize
from utils.batch_norm import bn_track_stats
from utils.buffer import Buffer, fill_buffer, reservoir
from utils.errors import UserError


def numbered(n, start=0):
    """Images whose pixels tell their number; not 8-bit levels."""
    return torch.arange(start, start + n, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


def filled(size=6, n=6, **kwargs):
    buffer = Buffer(size)
    buffer.add_data(numbered(n), labels=torch.arange(n), **kwargs)
    return buffer


@pytest.mark.parametrize("batches", [[5, 7, 30, 1, 200], [3, 3, 3], [50], [1] * 40])
def test_same_as_one_at_a_time(batches):
    size = 10
    buffer = Buffer(size)
    np.random.seed(3)
    start = 0
    for n in batches:
        buffer.add_data(numbered(n, start), labels=torch.arange(start, start + n))
        start += n
        assert len(buffer) == min(size, start)
    after = np.random.rand()

    np.random.seed(3)
    slots = [-1] * size
    for i in range(start):
        if (slot := reservoir(i, size)) >= 0:
            slots[slot] = i
    assert after == np.random.rand()  # as many draws
    n = min(size, start)
    assert buffer.labels[:n].tolist() == slots[:n]
    assert buffer.examples[:n, 0, 0, 0].tolist() == slots[:n]


def test_every_example_is_equally_likely():
    np.random.seed(0)
    size, stream, runs = 10, 40, 1500
    counts = torch.zeros(stream)
    for _ in range(runs):
        buffer = Buffer(size)
        for chunk in torch.arange(stream).split(16):
            buffer.add_data(numbered(len(chunk), int(chunk[0])), labels=chunk)
        counts[buffer.labels] += 1
    expected = runs * size / stream
    chi2 = ((counts - expected) ** 2 / expected).sum() / (1 - size / stream)
    assert chi2 < 39 + 4 * (2 * 39) ** 0.5  # mean and four deviations for 39 degrees of freedom


def test_order_of_the_tuple():
    n = 6
    buffer = filled(
        logits=torch.arange(n)[:, None] + torch.rand(n, 1) / 2,
        task_labels=torch.arange(n) * 2,
        true_labels=torch.arange(n) * 3,
    )
    assert buffer.used_attributes == ["examples", "labels", "logits", "task_labels", "true_labels"]
    out = buffer.get_data(
        4, transform=lambda x: x + 100, return_index=True, return_not_aug=True, not_aug_transform=lambda x: x - 1
    )
    index, not_aug, x, labels, logits, tasks, true = out
    assert len(index.unique()) == 4 and index.dtype == torch.int64
    assert torch.equal(labels, index) and torch.equal(tasks, index * 2) and torch.equal(true, index * 3)
    assert torch.equal(not_aug[:, 0, 0, 0], index - 1.0) and torch.equal(x[:, 0, 0, 0], index + 100.0)
    assert torch.equal(logits.floor().flatten(), index.float()) and logits.dtype == torch.float32
    assert torch.equal(buffer.get_data_by_index(index)[1], labels)
    assert torch.equal(buffer.get_data(1, force_indexes=[4, 2])[1], torch.tensor([4, 2]))
    assert len(buffer.get_data(99)) == 5 and len(buffer.get_data(99)[0]) == n
    assert torch.equal(buffer.get_all_data()[1], torch.arange(n))


def test_draw_is_mammoths():
    buffer = filled(size=20, n=12)
    np.random.seed(5)
    labels = buffer.get_data(5)[1]
    np.random.seed(5)
    assert labels.tolist() == np.random.choice(12, size=5, replace=False).tolist()


@pytest.mark.parametrize("stored", [True, False])
def test_mask_task_out(stored):
    buffer = Buffer(20)  # not full: empty slots must not be drawn as task 0
    labels = torch.arange(8)
    buffer.add_data(numbered(8), labels=labels, task_labels=labels // 2 if stored else None)
    index, _, y, *_ = buffer.get_data(20, mask_task_out=1, cpt=2, return_index=True)
    assert sorted(y.tolist()) == [0, 1, 4, 5, 6, 7]
    assert torch.equal(index, y)  # slots, not positions among the allowed ones
    if not stored:
        with pytest.raises(ValueError, match="cpt"):
            buffer.get_data(2, mask_task_out=1)
    only = Buffer(4)
    only.add_data(numbered(2), labels=torch.zeros(2))
    assert len(only.get_data(2, mask_task_out=0, cpt=2, transform=lambda x: x)[0]) == 0


@pytest.mark.parametrize("made", [lambda q: q.float().div(255), lambda q: q.float() * (torch.ones(()) / 255)])
def test_all_256_levels_are_exact(made):
    levels = made(torch.arange(256).to(torch.uint8)).view(16, 1, 4, 4)
    buffer = Buffer(32)
    buffer.add_data(levels[:8])
    buffer.add_data(levels[8:])
    assert buffer._examples.dtype == torch.uint8
    assert torch.equal(buffer.get_all_data()[0], levels)
    before = buffer.state_dict()
    buffer.examples[3] = 7.5  # a write through the attribute must not be lost
    assert torch.equal(buffer.get_all_data()[0][3], torch.full((1, 4, 4), 7.5))
    buffer.load_state_dict(before)
    assert torch.equal(buffer.examples[:16], levels)


def test_floats_after_levels_are_exact():
    levels, floats = torch.ones(2, 1, 2, 2), torch.rand(2, 1, 2, 2)
    buffer = Buffer(4)
    buffer.add_data(levels)
    assert buffer._examples.dtype == torch.uint8
    buffer.add_data(floats)
    assert torch.equal(buffer.get_all_data()[0], torch.cat([levels, floats]))


def test_used_like_derpp():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    buffer = Buffer(5)
    assert buffer.is_empty() and not hasattr(buffer, "examples") and not hasattr(buffer, "logits")
    x = numbered(8)
    out = net(x)
    buffer.add_data(examples=x, labels=torch.arange(8), logits=out)  # attached to a graph
    assert not buffer.logits.requires_grad and buffer.is_full() and len(buffer) == 5
    xs, ys, logits = buffer.get_data(5, transform=None, device="cpu")
    assert torch.allclose(net(xs), logits, atol=1e-5) and torch.equal(xs[:, 0, 0, 0].long(), ys)
    buffer.empty()
    assert buffer.is_empty() and len(buffer) == 0 and not hasattr(buffer, "logits") and buffer.used_attributes == []
    buffer.add_data(x, attention_maps=[torch.ones(8, 2), torch.ones(8, 3)])
    assert len(buffer.get_data(2)) == 1 and [a.shape[0] for a in buffer.attention_maps[0]] == [2, 3]


def test_wrong_use():
    buffer = filled()
    with pytest.raises(ValueError, match="holds"):
        buffer.add_data(numbered(2))
    with pytest.raises(ValueError, match="holds"):
        buffer.add_data(numbered(2), labels=torch.zeros(2), logits=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="2 examples, but 3 labels"):
        buffer.add_data(numbered(2), labels=torch.zeros(3))
    with pytest.raises(ValueError, match="empty"):
        Buffer(3).get_data(1)
    with pytest.raises(UserError, match="choose reservoir"):
        Buffer(3, sample_selection_strategy="lars")
    with pytest.raises(UserError, match="negative"):
        Buffer(-1)
    none = Buffer(0)
    none.add_data(numbered(3))
    assert len(none) == 0 and len(none.get_data(2)[0]) == 0


def test_state_dict_round_trip(tmp_path):
    buffer = Buffer(6)
    buffer.add_data(torch.rand(4, 1, 2, 2), labels=torch.arange(4), attention_maps=[torch.ones(4, 2)])
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other = Buffer(1)
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert other.buffer_size == 6 and other.num_seen_examples == 4
    for b in (buffer, other):
        np.random.seed(1)
        b.add_data(torch.arange(20.0).view(5, 1, 2, 2), labels=torch.arange(4, 9))
    for a, b in zip(buffer.get_all_data(), other.get_all_data()):
        assert torch.equal(a, b)
    empty = Buffer(2)
    empty.load_state_dict(Buffer(3).state_dict())
    assert empty.is_empty() and empty.buffer_size == 3


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(4, 4)

    def forward(self, x, returnt="out"):
        f = x.flatten(1)
        return f if returnt == "features" else self.classifier(f)


@pytest.mark.parametrize("herding", [True, False])
def test_fill_buffer(herding):
    torch.manual_seed(0)
    x, y = torch.rand(40, 1, 2, 2), torch.arange(40) % 4
    net, buffer = _Net().train(), Buffer(10)
    wanted = ["examples", "labels", "logits", "task_labels"]
    for t in range(2):
        mask = y // 2 == t
        data = SimpleNamespace(
            N_CLASSES_PER_TASK=2,
            train_loader=[(xb, yb, xb) for xb, yb in zip(x[mask].split(7), y[mask].split(7))],
            get_normalization_transform=lambda: None,
        )
        fill_buffer(buffer, data, t, net, herding, wanted)
        assert torch.bincount(buffer.labels[: len(buffer)]).tolist() == ([5, 5] if t == 0 else [2] * 4)
        if t == 0:
            first = buffer.get_all_data()[0]
    assert net.training and len(buffer) == 8
    xs, ys, logits, tasks = buffer.get_all_data()
    assert torch.equal(tasks, ys // 2) and torch.allclose(torch.sigmoid(net(xs)), logits)
    assert torch.equal(xs[ys == 0], first[:2])  # the first chosen stay
    if herding:
        of_class = x[y == 3].flatten(1)
        nearest = (of_class - of_class.mean(0)).norm(dim=1).argmin()
        assert torch.equal(xs[ys == 3][0].flatten(), of_class[nearest])
    with pytest.raises(UserError, match="give 4 or more"):
        fill_buffer(Buffer(3), data, 1)


def test_apply_transform():
    from datasets.utils.transforms import Compose, RandomHorizontalFlip

    x = torch.rand(64, 1, 2, 3)
    flip = Compose([RandomHorizontalFlip()])
    assert is_batched(flip) and not is_batched(Compose([lambda v: v])) and not is_batched(nn.Identity())
    flipped = (apply_transform(x, flip) != x).flatten(1).any(1)
    assert 0 < flipped.sum() < 64  # a draw per image
    assert apply_transform(x, lambda v: v.sum((1, 2))).shape == (64, 1)
    assert apply_transform(x, None) is x
    assert torch.allclose(normalize(x, [0.5], [2.0]), (x - 0.5) / 2)


def test_bn_track_stats():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = net[0].running_mean.clone()
    with pytest.raises(KeyError), bn_track_stats(net, False):
        net(torch.rand(8, 3))
        raise KeyError
    assert torch.equal(net[0].running_mean, before)
    assert net[0].track_running_stats and not net[1].track_running_stats
    with bn_track_stats(net):
        net(torch.rand(8, 3))
    assert not torch.equal(net[0].running_mean, before)
