"""Adapters grafted on a transformer against the same network written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.utils.adapters import AdaptFormer, ScaleShift
from backbones.utils.base import plain_attention
from tests.rig import POCKET
from utils.args import parse_args


@pytest.fixture
def net():
    from main import build

    torch.manual_seed(0)
    _, model, *_ = build(parse_args(f"--model sgd {POCKET}".split()))
    return model.net.double().eval()


@pytest.fixture
def images():
    return torch.randn(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(net, x, mlp=lambda i, x, out: out, after=lambda i, x: x):
    """timm's forward pass; ``mlp`` sees block, input of the norm and output of the MLP, ``after`` every operation."""
    n = iter(range(1000))

    def op(module, x):
        return after(next(n), module(x))

    x = op(net.patch_embed, x)
    x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1) + net.pos_embed
    for i, block in enumerate(net.blocks):
        attn = block.attn
        h = op(block.norm1, x)
        B, N, d = h.shape
        norm2, qkv = next(n), next(n)
        q, k, v = after(qkv, attn.qkv(h)).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        h = ((q @ k.mT * attn.scale).softmax(-1) @ v).transpose(1, 2).reshape(B, N, d)
        x = x + op(attn.proj, h)
        h = after(norm2, block.norm2(x))
        h = F.gelu(op(block.mlp.fc1, h))
        x = x + mlp(i, x, op(block.mlp.fc2, h))
    return op(net.norm, x)[:, 0]


def test_by_hand_is_the_network(net, images):
    torch.testing.assert_close(net.features(images), by_hand(net, images), rtol=1e-9, atol=1e-9)


def test_adaptformer(net, images):
    before, names = net.features(images), list(net.state_dict())
    plain = copy.deepcopy(net)
    adapters = AdaptFormer(net, bottleneck=7, scale=0.3)
    assert list(net.state_dict()) == names
    assert torch.equal(net.features(images), before)  # up starts at zero
    for p in adapters.parameters():
        nn.init.normal_(p, 0, 0.1)

    def beside(i, x, out):
        hidden = (x @ adapters.down[i].weight.T + adapters.down[i].bias).clamp(min=0)
        return out + 0.3 * (hidden @ adapters.up[i].weight.T + adapters.up[i].bias)

    expected = by_hand(plain, images, mlp=beside)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(net.features(images), expected, rtol=1e-9, atol=1e-9)
    assert not adapters.entered  # nothing of the batch is kept


def test_scale_and_shift(net, images):
    before, names = net.features(images), list(net.state_dict())
    plain = copy.deepcopy(net)
    torch.manual_seed(0)
    ssf = ScaleShift(net)
    assert list(net.state_dict()) == names and len(ssf.scale) == 6 * len(net.blocks) + 2
    drawn = torch.cat([p.detach().flatten() for p in ssf.scale]), torch.cat([p.detach().flatten() for p in ssf.shift])
    assert abs(drawn[0].mean() - 1) < 1e-3 and abs(drawn[1].mean()) < 1e-3
    assert abs(drawn[0].std() - 0.02) < 1e-3 and abs(drawn[1].std() - 0.02) < 1e-3
    expected = by_hand(plain, images, after=lambda i, x: x * ssf.scale[i] + ssf.shift[i])
    torch.testing.assert_close(net.features(images), expected, rtol=1e-9, atol=1e-9)
    for scale, shift in zip(ssf.scale, ssf.shift):
        nn.init.ones_(scale), nn.init.zeros_(shift)
    assert torch.equal(net.features(images), before)


@pytest.mark.parametrize("graft", [AdaptFormer, ScaleShift])
def test_gradients_reach_every_part_and_vmap_agrees(net, images, graft):
    """Per-client weights by vmap, as the batched engine stacks modules that do not fold."""
    parts = graft(net)
    for p in parts.parameters():
        nn.init.normal_(p, 1, 0.1)
    net.requires_grad_(False)
    net.features(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.parameters())
    named = dict(parts.named_parameters())
    stacked = {n: torch.stack([p, 1.5 * p]).detach() for n, p in named.items()}
    holder = nn.Module()
    holder.net, holder.parts, holder.forward = net, parts, lambda x: net.features(x)
    with plain_attention(net):
        both = torch.func.vmap(
            lambda w: torch.func.functional_call(holder, {f"parts.{n}": t for n, t in w.items()}, (images,))
        )(stacked)
        torch.testing.assert_close(both[0], net.features(images), rtol=1e-9, atol=1e-9)
    assert (both[1] - both[0]).abs().max() > 1e-3


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="blocks"):
        AdaptFormer(nn.Linear(3, 3))
