"""The tangent regime against Jacobians from torch.func and against autograd through the forward-mode product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from backbones.vit import as_backbone
from models.utils.linearize import Linearized, places_of


@pytest.fixture
def net():
    """A small timm transformer in float64, with dropout that must not act."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, num_classes=0, proj_drop_rate=0.5
    )
    net = as_backbone(vit, 3).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.train()


def linearized(net):
    names = [n for n, _ in net.named_parameters() if "classifier" not in n]
    return Linearized(net, names, lambda x: F.normalize(net(x, returnt="features"), dim=1))


def random_tau(lin, scale=0.1, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in lin.start().items()}


def features(net, theta, x):
    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return F.normalize(self.net(x, returnt="features"), dim=1)

    net.eval()
    return functional_call(Call(), {f"net.{n}": t for n, t in theta.items()}, (x,))


def test_tangent_is_the_jacobian_times_tau(net):
    lin = linearized(net)
    x, tau = torch.randn(3, 1, 8, 8, dtype=torch.float64), random_tau(lin)
    J = jacrev(lambda theta: features(net, theta, x))(lin.start())
    want = sum((j.flatten(2) @ tau[n].flatten() for n, j in J.items()), torch.zeros(()))
    f0, (got,) = lin.expansion(x, [tau])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(f0, features(net, lin.start(), x))
    assert torch.equal(lin.output(x), f0) and torch.equal(lin(x, lin.zeros()), f0)  # zero-shot, to the bit
    h = 1e-6
    moved = {n: p + h * tau[n] for n, p in lin.start().items()}
    torch.testing.assert_close((features(net, moved, x) - f0) / h, got, rtol=1e-4, atol=1e-5)


def test_linear_in_tau(net):
    lin = linearized(net)
    x, one, two = torch.randn(4, 1, 8, 8, dtype=torch.float64), random_tau(lin, seed=1), random_tau(lin, seed=2)
    f0, (a, b) = lin.expansion(x, [one, two])
    both = {n: 0.3 * one[n] - 1.7 * two[n] for n in one}
    torch.testing.assert_close(lin(x, both), f0 + 0.3 * a - 1.7 * b)
    some = {n: t for n, t in one.items() if "attn" in n}  # a tau of some parameters is zero elsewhere
    torch.testing.assert_close(lin(x, some), lin(x, {n: t if n in some else 0 * t for n, t in one.items()}))


def test_step_is_autograd_through_the_product(net):
    lin = linearized(net)
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    head = torch.randn(8, 3, dtype=torch.float64)
    loss = lambda f0, product: F.cross_entropy(5 * F.normalize(f0 + product, dim=1) @ head, y)  # noqa: E731
    tau = random_tau(lin)
    value, grads = lin.step(x, tau, loss)
    leaves = {n: t.clone().requires_grad_() for n, t in tau.items()}
    from backbones.utils.base import plain_attention

    with plain_attention(net):
        f0, product = torch.func.jvp(lambda theta: features(net, theta, x), (lin.start(),), (leaves,))
        want = loss(f0, product)
    want.backward()
    torch.testing.assert_close(value, want.detach())
    for n, t in leaves.items():
        torch.testing.assert_close(grads[n], t.grad)
    assert any(g.abs().max() > 1e-3 for g in grads.values())


def test_network_is_left_as_it_was(net):
    lin = linearized(net)
    before = {n: p.clone() for n, p in net.named_parameters()}
    lin.step(torch.randn(2, 1, 8, 8, dtype=torch.float64), random_tau(lin), lambda f0, product: product.sum())
    assert all(m.training for m in net.modules()) and all(
        m.fused_attn for m in net.modules() if hasattr(m, "fused_attn")
    )
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in net.named_parameters())
    with pytest.raises(KeyError, match="nothing"):
        places_of(net, ["nothing.weight"])


def test_any_module():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 36, 4)).double()
    net(torch.randn(6, 1, 8, 8, dtype=torch.float64))
    lin = Linearized(net, [n for n, _ in net.named_parameters()])
    x, tau = torch.randn(3, 1, 8, 8, dtype=torch.float64), random_tau(lin)
    running = net[1].running_mean.clone()
    theta = lin.start()
    net.eval()
    J = jacrev(lambda t: functional_call(net, t, (x,)))(theta)
    net.train()
    torch.testing.assert_close(lin(x, tau) - lin.output(x), sum(j.flatten(2) @ tau[n].flatten() for n, j in J.items()))
    assert torch.equal(net[1].running_mean, running)


def test_bfloat16_stays_close(net):
    """The tangent is a small difference of large numbers; autocast must not drown it."""
    net.float().eval()
    lin = linearized(net)
    x, tau = torch.randn(8, 1, 8, 8), random_tau(lin, 0.01)
    _, (want,) = lin.expansion(x, [tau])
    net.set_precision("bf16")
    _, (got,) = lin.expansion(x, [tau])
    assert (got - want).norm() / want.norm() < 0.05
