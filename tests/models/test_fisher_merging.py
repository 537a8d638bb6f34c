"""Fisher merging against gradients taken image by image, and the errors of layers against copies of the network."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch

from models.utils.task_vectors import layer_errors, layer_outputs
from utils.errors import UserError
from utils.evaluate import evaluation_batches

NET = "--dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu"
SHORT = "--n_epochs 1 --batch_size 16 --lr 0.01 --optimizer adamw --warmup 3 --debug_mode 1 --alpha_share 0"


@pytest.fixture
def experts(rig, nano):
    """A rig with random experts, before the merge."""

    def make(flags="", model="fisher_merging", n=5, same=False):
        r = rig(f"--model {model} {SHORT} {flags}", NET)
        r.begin(0)
        r.model.rows = r.worker.rows = torch.nn.functional.normalize(torch.randn(10, r.model.net.feature_dim), dim=1)
        g = torch.Generator().manual_seed(0)
        for _ in range(n):
            tau = {k: 0.1 * torch.randn(p.shape, generator=g) for k, p in r.model._own_lin.start().items()}
            r.model.taus.append(r.model.taus[0] if same and r.model.taus else tau)
        return r

    return make


def merged(r):
    r.model.prepare_merge(r.clients(0))
    return r.model.merged_vector()


def squares(r, task):
    """The mean over drawn images of squared gradients of log p(own label), one image at a time."""
    r.clients(task)
    client = r.engine.client(0, task, -1, "fisher")
    client.indices = r.model.drawn(client, r.args.calib_examples)
    net, W, (a, b) = copy.deepcopy(r.model.net).eval(), r.model.rows, r.model.get_offsets(task)
    theta, total, n = {}, {}, 0
    for name, tau in r.model.taus[task].items():
        p = net.get_parameter(name)
        p.data += tau
        theta[name] = p.requires_grad_()
    for x, y in client.stat_loader():
        for xi, yi in zip(x, y):
            f = torch.nn.functional.normalize(net(xi[None], returnt="features"), dim=1)
            logp = (20 * f @ W[a:b].T).log_softmax(1)[0, yi - a]
            for name, g in zip(theta, torch.autograd.grad(logp, list(theta.values()), allow_unused=True)):
                if g is not None:
                    total[name] = total.get(name, 0) + g.square()
            n += 1
    return {k: total.get(k, torch.zeros_like(p)) / n for k, p in theta.items()}


@pytest.mark.parametrize("normalize", [0, 1])
def test_the_formula_with_gradients_of_single_images(experts, normalize):
    r = experts(f"--fisher_labels data --calib_examples 6 --fisher_normalize {normalize}")
    got, num, den = merged(r), {}, {}
    for t, tau in enumerate(r.model.taus):
        F = squares(r, t)
        size = sum(f.double().square().sum() for f in F.values()).sqrt() if normalize else 1.0
        for k, f in F.items():
            share = f.double() / size
            num[k] = num.get(k, 0) + share * tau[k]
            den[k] = den.get(k, 0) + share
    for k, d in den.items():
        sure = d > 1e-6 * d.max()  # elsewhere float32 gradients are rounding
        assert sure.any() or d.max() == 0
        torch.testing.assert_close(got[k][sure].double(), (num[k] / d)[sure], rtol=2e-3, atol=1e-4)


def test_drawn_labels_follow_the_expert(experts, monkeypatch):
    """Whose logits are one-hot draws its own answer; equal experts come out as they went in."""
    r = experts("--calib_examples 4", same=True)
    for m in (r.model, r.worker):
        m.args.logit_scale = 1e4
    labels = []
    plain = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *a, **k: labels.append((p, plain(p, *a, **k))) or labels[-1][1])
    got = merged(r)
    assert labels and all((p.argmax(1) == y[:, 0]).float().mean() > 0.9 for p, y in labels)
    for k, tau in r.model.taus[0].items():
        torch.testing.assert_close(got[k], tau)


def test_two_runs_draw_the_same(experts):
    a, b = merged(experts("--calib_examples 4")), merged(experts("--calib_examples 4"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_tangent_has_no_weights_to_merge(rig, nano):
    with pytest.raises(UserError, match="use full or attention"):
        rig(f"--model fisher_merging --regime linear {SHORT}", NET)


# ---------------------------------------------------------------- layers


def test_errors_of_layers(experts, tmp_path):
    """Against outputs of copies; nothing is off where all experts are the same."""
    r = experts("--regime full --merging mean", model="task_arithmetic", n=5)
    found = layer_errors(r.model, r.dataset, tmp_path)
    table = pd.read_csv(tmp_path / "layer_errors.csv").set_index("layer")
    assert list(table.index) == [
        f"blocks.{b}.{m}" for b in range(3) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert found == pytest.approx(table["mean"].mean())
    assert (tmp_path / "layer_errors.png").stat().st_size > 1000

    task, name = 2, "blocks.1.mlp.fc1"
    x = torch.cat([x for x, _ in evaluation_batches(r.dataset, task, torch.device("cpu"), slice(1024))])

    def outputs(tau):
        net, seen = copy.deepcopy(r.model.net).eval(), []
        for n, t in tau.items():
            net.get_parameter(n).data += t
        net.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y.detach()))
        net(x, returnt="features")
        return seen[0]

    mean = {n: sum(t[n] for t in r.model.taus) / 5 for n in r.model.taus[0]}
    mine, theirs = outputs(mean), outputs(r.model.taus[task])
    expected = 100 * float((mine - theirs).square().sum() / theirs.square().sum())
    assert table.loc[name, f"task_{task + 1}"] == pytest.approx(expected, rel=1e-3)

    same = experts("--regime full --merging mean", model="task_arithmetic", same=True)
    assert layer_errors(same.model, same.dataset, tmp_path) < 1e-6


def test_hooks_leave_no_trace(experts):
    r = experts("--regime full", model="task_arithmetic", n=1)
    layer_outputs(r.model, r.model._own_lin.start(), torch.zeros(1, 1, 28, 28))
    assert not any(m._forward_hooks for m in r.model.net.modules())


def test_layers_in_the_tangent(rig, nano):
    with pytest.raises(UserError, match="--layer_errors needs --regime full"):
        rig(f"--model task_arithmetic --layer_errors {SHORT}", NET)
