import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.sgd import Sgd
from utils.conf import make_generator

FAST = "--n_epochs 1 --batch_size 16"


def task(r, t):
    """Go to a task without training."""
    while r.dataset.c_task < t:
        r.dataset.get_data_loaders()
    r.model._current_task = t
    r.model.meta_begin_task(r.dataset)
    return next(iter(r.dataset.train_loader))


def bits(net):
    return [t.clone() for t in net.state_dict().values()]


def cross_entropy(logits, labels):
    """Mean of -log softmax at the label, one sample at a time."""
    return sum(torch.logsumexp(z, 0) - z[y] for z, y in zip(logits, labels.tolist(), strict=True)) / len(labels)


# ---- sgd, joint, schedules


@pytest.mark.parametrize("flags", ["--optimizer sgd --lr 0.1 --optim_mom 0.9 --optim_wd 0.001", "--optimizer adam"])
def test_sgd_is_a_plain_loop(rig, flags):
    r = rig(f"--model sgd --n_epochs 2 --batch_size 16 --stop_after 2 {flags}", rig.MLP)
    net = copy.deepcopy(r.model.net)
    opt = (
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.001)
        if "sgd" in flags
        else torch.optim.Adam(net.parameters(), lr=0.03)
    )
    r.run()
    for t in range(2):
        indices = torch.cat([(r.dataset.train_labels == c).nonzero().flatten() for c in (2 * t, 2 * t + 1)]).sort()[0]
        for epoch in range(2):
            order = torch.randperm(len(indices), generator=make_generator(0, "epoch", t, epoch))
            for batch in order.split(16):
                x = (r.dataset.train_images[indices[batch]].float() / 255 - 0.5) / 0.5
                loss = F.cross_entropy(net(x), r.dataset.train_labels[indices[batch]])
                opt.zero_grad()
                loss.backward()
                opt.step()
    assert all(torch.equal(a, b) for a, b in zip(bits(r.model.net), bits(net), strict=True))


@pytest.mark.parametrize("flags", ["--optim_mom 0.9", "--optimizer adam --lr 0.003", "--lr_scheduler cosine"])
def test_the_optimiser_survives_a_stop_between_tasks(rig, flags):
    flags = f"--model sgd --n_epochs 2 --batch_size 16 {flags} --savecheck task"
    whole = rig(flags, rig.MLP).run(stop_after=2)
    first = rig(flags, rig.MLP).run(stop_after=1)
    second = rig(flags, rig.MLP).run(checkpoint=first.record.checkpoint, stop_after=2)
    assert all(torch.equal(a, b) for a, b in zip(bits(whole.model.net), bits(second.model.net), strict=True))


@pytest.mark.parametrize(
    "flags, factors",
    [
        ("--lr_scheduler none", [1, 1, 1, 1]),
        ("--lr_scheduler multisteplr --lr_milestones 1 3 --sched_multistep_lr_gamma 0.1", [1, 0.1, 0.1, 0.01]),
        ("--lr_scheduler cosine", [(1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]),
    ],
)
@pytest.mark.parametrize("fl", [False, True])
def test_schedules_start_again(rig, monkeypatch, flags, factors, fl):
    r = rig(
        f"--model sgd --n_epochs 4 --batch_size 16 --lr 0.05 --debug_mode 1 --stop_after 2 {flags} "
        + ("--fl --num_clients 1 --num_comm_rounds 2 --partition_mode iid" if fl else ""),
        rig.MLP,
    )
    seen = {}
    model = r.worker.inner if fl else r.model
    observe = model.observe

    def watch(inputs, labels, not_aug_inputs, epoch=None):
        seen.setdefault((model.current_task, epoch), []).append(model.opt.param_groups[0]["lr"])
        return observe(inputs, labels, not_aug_inputs, epoch=epoch)

    monkeypatch.setattr(type(model), "observe", lambda self, *a, epoch=None: watch(*a, epoch=epoch))
    r.run()
    for t in range(2):
        for epoch, factor in enumerate(factors):
            assert seen[t, epoch] == pytest.approx([0.05 * factor] * 5 * (2 if fl else 1), rel=1e-6, abs=1e-9)


def test_joint_sees_every_class(rig, monkeypatch):
    r = rig(f"--model joint {FAST}", rig.MLP)
    seen, plain = torch.zeros(10), Sgd.observe

    def watch(self, inputs, labels, not_aug_inputs, epoch=None):
        seen.add_(torch.bincount(labels, minlength=10))
        return plain(self, inputs, labels, not_aug_inputs, epoch)

    monkeypatch.setattr(Sgd, "observe", watch)
    r.run()
    assert torch.equal(seen, torch.bincount(r.dataset.train_labels, minlength=10).float())
    assert r.model.n_seen_classes == 10 and r.dataset.n_train_tasks == 1
    (row,) = r.session.results.class_il
    assert len(row) == 5 and not any(math.isnan(a) for a in row)


# ---- rehearsal


def replayed(buffer, seed, draws, size):
    """What the next draws from the buffer will be."""
    np.random.seed(seed)
    out = [buffer.get_data(size) for _ in range(draws)]
    np.random.seed(seed)
    return out


def test_er(rig):
    r = rig(f"--model er {FAST} --buffer_size 40 --minibatch_size 8 --lr 0.1", rig.MLP)
    normalise = r.dataset.get_normalization_transform()
    x, y, raw = task(r, 0)
    first = cross_entropy(r.model.net(x), y)
    assert float(r.model.observe(x, y, raw)) == pytest.approx(float(first.detach()), abs=1e-6)  # nothing to replay yet
    assert len(r.model.buffer) == 16 and torch.equal(r.model.buffer.examples[:16], raw)
    x, y, raw = task(r, 1)
    ((images, labels),) = replayed(r.model.buffer, 7, 1, 8)
    before = copy.deepcopy(r.model.net)
    loss = cross_entropy(before(torch.cat([x, normalise(images)])), torch.cat([y, labels]))
    loss.backward()
    assert float(r.model.observe(x, y, raw)) == pytest.approx(float(loss.detach()), abs=1e-6)
    for p, q in zip(r.model.net.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)
    assert sorted(r.model.buffer.labels[:32].tolist()) == sorted([*labels_of(r, 0), *y.tolist()])


def labels_of(r, t):
    """Labels in the buffer that belong to a task."""
    return [c for c in r.model.buffer.labels[: len(r.model.buffer)].tolist() if c // 2 == t]


def test_derpp(rig):
    r = rig(f"--model derpp {FAST} --buffer_size 40 --minibatch_size 8 --lr 0.1 --alpha 0.3 --beta 0.7", rig.MLP)
    normalise = r.dataset.get_normalization_transform()
    x, y, raw = task(r, 0)
    logits = r.model.net(x).detach()
    assert float(r.model.observe(x, y, raw)) == pytest.approx(float(cross_entropy(logits, y)), abs=1e-6)
    assert torch.equal(r.model.buffer.logits[:16], logits)
    x, y, raw = task(r, 1)
    (x1, _, z1), (x2, y2, _) = replayed(r.model.buffer, 3, 2, 8)
    assert not torch.equal(x1, x2)
    before = copy.deepcopy(r.model.net)
    distance = (before(normalise(x1)) - z1).square().sum() / (8 * 10)
    loss = cross_entropy(before(x), y) + 0.3 * distance + 0.7 * cross_entropy(before(normalise(x2)), y2)
    loss.backward()
    assert float(r.model.observe(x, y, raw)) == pytest.approx(float(loss.detach()), abs=1e-6)
    for p, q in zip(r.model.net.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


# ---- online EWC


def ewc(rig, flags=""):
    """The method in float64 over twenty samples."""
    r = rig(f"--model ewc_on {FAST} --e_lambda 3 --gamma 0.6 --lr 0.1 {flags}", rig.MLP)
    r.model.double()
    normalise = r.dataset.get_normalization_transform()
    r.model.normalization_transform = lambda x: normalise(x).double()
    return r


def fisher_by_hand(net, samples):
    total = [torch.zeros_like(p) for p in net.parameters()]
    for x, y in samples:
        net.zero_grad()
        log_p = net(x[None]).log_softmax(1)[0, y]
        log_p.backward()
        for t, p in zip(total, net.parameters(), strict=True):
            t += log_p.detach().exp() * p.grad**2
    return [t / len(samples) for t in total]


def test_ewc_fisher_is_a_loop_over_samples(rig, monkeypatch):
    import models.utils.fisher

    monkeypatch.setattr(models.utils.fisher, "PER_SAMPLE_FLOATS", 7 * 89_610)  # chunks that do not divide the samples
    r = ewc(rig)
    expected = None
    for t in range(2):
        task(r, t)
        r.dataset.train_loader = r.dataset.loader(r.dataset.task_indices(t)[:20], t, 8, train=True)
        view = r.dataset.train_loader.dataset
        samples = [(r.model.normalization_transform(view[i][2][None])[0], view[i][1]) for i in range(20)]
        new = fisher_by_hand(copy.deepcopy(r.model.net), samples)
        expected = new if expected is None else [0.6 * old + f for old, f in zip(expected, new, strict=True)]
        r.model.meta_end_task(r.dataset)
        for (name, p), f in zip(r.model.net.named_parameters(), expected, strict=True):
            torch.testing.assert_close(r.model.fish[name], f, rtol=1e-9, atol=1e-15)
            assert torch.equal(r.model.checkpoint[name], p) and r.model.checkpoint[name].data_ptr() != p.data_ptr()
        assert r.model.net.training
        with torch.no_grad():
            for p in r.model.net.parameters():
                p.add_(0.05 * torch.randn_like(p))


def test_ewc_penalty(rig):
    r = ewc(rig)
    x, y, raw = task(r, 0)
    x = x.double()
    assert float(r.model.penalty()) == 0
    torch.manual_seed(0)
    start = [p.detach().clone() for p in r.model.net.parameters()]
    names = [n for n, _ in r.model.net.named_parameters()]
    r.model.checkpoint = dict(zip(names, start, strict=True))
    r.model.fish = {n: torch.rand_like(p) for n, p in zip(names, start, strict=True)}
    with torch.no_grad():
        for p in r.model.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    r.model.penalty().backward()
    for (name, p), old in zip(r.model.net.named_parameters(), start, strict=True):
        torch.testing.assert_close(p.grad, 2 * 3 * r.model.fish[name] * (p.detach() - old), rtol=1e-12, atol=0)
    before = copy.deepcopy(r.model.net)
    far = sum(
        (r.model.fish[n] * (p - s) ** 2).sum() for (n, p), s in zip(before.named_parameters(), start, strict=True)
    )
    loss = cross_entropy(before(x), y) + 3 * far
    before.zero_grad()
    loss.backward()
    assert float(r.model.observe(x, y, raw)) == pytest.approx(float(loss.detach()), rel=1e-9)
    for p, q in zip(r.model.net.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


# ---- learning without forgetting


@pytest.mark.parametrize("official", [0, 1])
def test_lwf_distils(rig, official):
    r = rig(f"--model lwf {FAST} --softmax_temp 2.5 --alpha 0.8 --lwf_official {official} --lr 0.1", rig.MLP)
    x, y, raw, _ = task(r, 2)
    columns = slice(4, 6) if official else slice(0, 4)
    old = torch.randn(16, 10)
    student = copy.deepcopy(r.model.net)
    logits = student(x)
    p = torch.exp(logits[:, columns] / 2.5)
    q = torch.exp(old[:, columns] / 2.5)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    distance = -sum(q[i, j] * p[i, j].log() for i in range(16) for j in range(q.shape[1])) / 16
    loss = cross_entropy(logits[:, 4:6], y - 4) + 0.8 * distance
    loss.backward()
    assert float(r.model.observe(x, y, raw, logits=old)) == pytest.approx(float(loss.detach()), abs=1e-5)
    for mine, theirs in zip(r.model.net.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)
    # a student that equals its teacher pays the entropy of the answers, and is not pushed anywhere
    z = torch.randn(16, 10, requires_grad=True)
    pays = r.model.distillation(z, z.detach())
    p = (z.detach()[:, columns] / 2.5).softmax(1)
    torch.testing.assert_close(pays.detach(), -(p * p.log()).sum(1).mean())
    pays.backward()
    assert float(z.grad.abs().max()) < 1e-7


def test_lwf_without_a_past_is_cross_entropy(rig):
    r = rig(f"--model lwf {FAST}", rig.MLP)
    x, y, raw = task(r, 0)
    assert not hasattr(r.dataset.train_loader.dataset, "logits")
    expected = cross_entropy(r.model.net(x)[:, :2], y)
    assert float(r.model.observe(x, y, raw)) == pytest.approx(float(expected.detach()), abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_lwf_warm_up_moves_the_new_head_only(rig, warmup):
    r = rig(f"--model lwf {FAST} --lwf_warmup {warmup} --lr 0.1", rig.MLP)
    task(r, 0)
    before = {n: p.clone() for n, p in r.model.net.named_parameters()}
    batch = task(r, 1)
    after = dict(r.model.net.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == ({"classifier.weight", "classifier.bias"} if warmup else set())
    rows = (after["classifier.weight"] != before["classifier.weight"]).any(1)
    assert rows.tolist() == [warmup and 2 <= c < 4 for c in range(10)]
    # the answers are those of the warmed-up network to the plain images, and reach observe sample by sample
    view = r.dataset.train_loader.dataset
    assert r.model.net.training
    with torch.no_grad():
        answers = r.model.net(
            r.dataset.get_normalization_transform()(torch.stack([view[i][2] for i in range(len(view))]))
        )
        torch.testing.assert_close(view.logits, answers, rtol=0, atol=1e-5)
        torch.testing.assert_close(batch[3], r.model.net(r.dataset.get_normalization_transform()(batch[2])))


def test_lwf_reads_its_answers_in_a_run(rig, monkeypatch):
    r = rig(f"--model lwf {FAST} --debug_mode 1 --stop_after 2", rig.MLP)
    got, plain = [], type(r.model).distillation
    monkeypatch.setattr(
        type(r.model), "distillation", lambda self, outputs, old: got.append(len(old)) or plain(self, outputs, old)
    )
    r.run()
    assert got == [16] * 5
