import copy

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.func import functional_call, grad, vmap

from backbones.utils.lora import LoRA
from backbones.utils.prompts import PrefixPrompts, PrependPrompts

torch.set_num_threads(1)
D, HEADS, N = 24, 3, 17


def make_vit(**kwargs):
    torch.manual_seed(0)
    return (
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=D,
            depth=3,
            num_heads=HEADS,
            num_classes=5,
            **kwargs,
        )
        .eval()
        .double()
    )


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Holder(nn.Module):
    """A network of one attention, with the names that prompts look for."""

    def __init__(self, fused, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Module()
        block.attn = Attention(D, HEADS, qkv_bias=True, norm_layer=nn.LayerNorm, **kwargs).double().eval()
        block.attn.fused_attn = fused
        for p in block.parameters():
            nn.init.normal_(p, 0.2, 0.3)
        self.blocks = nn.ModuleList([block])

    def forward(self, x, **kwargs):
        return self.blocks[0].attn(x, **kwargs)


def reference(attn, x, keys, values, mask=None):
    """Attention written out head by head for one sample at a time; mask: N x N additive."""
    out = []
    d = D // HEADS
    for sample, pk, pv in zip(x, keys, values, strict=True):
        q, k, v = (sample @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1)
        heads = []
        for h in range(HEADS):
            cols = slice(h * d, (h + 1) * d)
            kh = torch.cat([pk[:, cols], attn.k_norm(k[:, cols])])
            vh = torch.cat([pv[:, cols], v[:, cols]])
            scores = attn.q_norm(q[:, cols]) @ kh.T / d**0.5
            if mask is not None:
                scores = scores + torch.cat([torch.zeros(len(x[0]), len(pk), dtype=x.dtype), mask], 1)
            heads.append(scores.softmax(-1) @ vh)
        y = attn.norm(torch.cat(heads, -1))
        if attn.gate is not None:
            y = y * attn.gate(sample).sigmoid()
        out.append(y @ attn.proj.weight.T + attn.proj.bias)
    return torch.stack(out)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_norm": True, "gated": True}])
@pytest.mark.parametrize("init", ["uniform", "zeros"])
def test_equals_a_reference_attention(fused, options, init):
    net = Holder(fused, **options)
    x = torch.randn(2, 6, D, dtype=torch.float64)
    prompts = PrefixPrompts(net, [0], 4, init=init)
    keys, values = prompts.prompts["0"].expand(2, 2, 4, D).unbind(1)
    attn = net.blocks[0].attn
    torch.testing.assert_close(net(x), reference(attn, x, keys, values), rtol=0, atol=1e-12)

    causal = torch.full((6, 6), float("-inf"), dtype=x.dtype).triu(1)
    expected = reference(attn, x, keys, values, causal)
    torch.testing.assert_close(net(x, is_causal=True), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x, attn_mask=causal), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x, attn_mask=causal == 0), expected, rtol=0, atol=1e-12)

    keys, values = torch.randn(2, 2, 3, D, dtype=torch.float64).unbind(0)  # a prompt for each sample
    prompts.set(0, keys, values)
    torch.testing.assert_close(net(x), reference(attn, x, keys, values), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_no_prompts_is_the_bare_network_bit_for_bit(images, fused):
    net = make_vit()
    for block in net.blocks:
        block.attn.fused_attn = fused
    bare, keys = copy.deepcopy(net), list(net.state_dict())
    expected = bare(images)
    empty = PrefixPrompts(net, [0, 2], 0)
    assert not list(empty.parameters()) and torch.equal(net(images), expected)
    empty.remove()
    prompts = PrefixPrompts(net, [0, 2], 5)
    assert [n for n, _ in prompts.named_parameters()] == ["prompts.0", "prompts.2"]
    assert prompts.prompts["2"].shape == (2, 5, D) and prompts.prompts["2"].dtype == torch.float64
    assert list(net.state_dict()) == keys
    assert all(torch.equal(v, bare.state_dict()[k]) for k, v in net.state_dict().items())
    assert not torch.allclose(net(images), expected)
    with prompts.disabled():
        assert torch.equal(net(images), expected)
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        assert torch.equal(net(images, attn_mask=mask), bare(images, attn_mask=mask))
    assert not torch.allclose(net(images), expected)
    prompts.remove()
    assert torch.equal(net(images), expected) and "forward" not in net.blocks[0].attn.__dict__


def test_set_and_clear(images):
    net = make_vit()
    prompts = PrefixPrompts(net, [1], 2, generator=torch.Generator().manual_seed(0))
    own = net(images)
    keys, values = (torch.randn(4, 3, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    prompts.set(1, keys, values)
    out = net(images)
    out.sum().backward()
    assert keys.grad.abs().sum() > 0 and values.grad.abs().sum() > 0 and prompts.prompts["1"].grad is None
    # Each sample is answered with its own prompt.
    for i in range(4):
        prompts.set(1, keys[i : i + 1], values[i : i + 1])
        torch.testing.assert_close(net(images[i : i + 1]), out[i : i + 1], rtol=0, atol=1e-12)
        prompts.set(1, keys[i], values[i])
        torch.testing.assert_close(net(images)[i], out[i], rtol=0, atol=1e-12)
    prompts.set(1, keys * 1, values * 1)  # with a graph, which a copy leaves behind
    assert torch.equal(copy.deepcopy(net)(images), own)
    prompts.set(1, None)
    assert torch.equal(net(images), own)
    prompts.set(1, keys, values)
    prompts.clear()
    assert torch.equal(net(images), own)


def test_clients(images):
    net = make_vit()
    both = nn.ModuleDict({"net": net, "prompts": PrefixPrompts(net, [0, 1], 2), "front": PrependPrompts(net, 3)})
    both.forward = net.forward
    g = torch.Generator().manual_seed(5)
    stack = {
        n: torch.randn(3, *p.shape, dtype=p.dtype, generator=g)
        for n, p in both.named_parameters()
        if not n.startswith("net.")
    }
    xs = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64, generator=g)
    each = [{k: v[c] for k, v in stack.items()} for c in range(3)]
    expected = torch.stack([functional_call(both, each[c], xs[c]) for c in range(3)])
    torch.testing.assert_close(functional_call(both, stack, xs.flatten(0, 1)).unflatten(0, (3, 2)), expected)
    torch.testing.assert_close(vmap(lambda p, x: functional_call(both, p, x))(stack, xs), expected)

    def loss(p, x):
        return functional_call(both, p, x).square().sum()

    together = vmap(grad(loss))(stack, xs)
    for c in range(3):
        for k, v in grad(loss)(each[c], xs[c]).items():
            torch.testing.assert_close(together[k][c], v)


def test_prompts_and_lora_together_and_checkpointing(images):
    net = make_vit()
    net.requires_grad_(False)
    prompts, front = PrefixPrompts(net, [0], 2), PrependPrompts(net, 2)
    lora = LoRA(net, "attn.qkv:k,v", 2)
    lora.reset(B="gaussian")

    def grads():
        ps = [*prompts.parameters(), *front.parameters(), *lora.parameters()]
        return torch.autograd.grad(net(images).square().sum(), ps)

    plain = grads()
    assert all(g.abs().sum() > 0 for g in plain)
    net.set_grad_checkpointing()
    torch.testing.assert_close(grads(), plain)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_prepended_tokens(images, pool):
    net = make_vit(global_pool=pool, reg_tokens=2 if pool == "avg" else 0)
    expected, keys = net(images), list(net.state_dict())
    front = PrependPrompts(net, 4)
    assert front.tokens.shape == (4, D) and list(net.state_dict()) == keys
    position, blocks = net.num_prefix_tokens, net.blocks
    x = net._pos_embed(net.patch_embed(images))
    x = torch.cat([x[:, :position], front.tokens.expand(4, -1, -1), x[:, position:]], 1)
    for block in blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(net(images), net.forward_head(net.norm(x)), rtol=0, atol=1e-12)
    tokens = torch.randn(4, 2, D, dtype=torch.float64)
    front.set(tokens)
    out = net(images)
    front.set(tokens[1])
    torch.testing.assert_close(net(images)[1], out[1])
    with front.disabled():
        assert torch.equal(net(images), expected)
    front.remove()
    assert torch.equal(net(images), expected)


def test_copies_take_their_prompts_along(images):
    net = make_vit()
    prompts = PrefixPrompts(net, [0], 2)
    expected, teacher = net(images), copy.deepcopy(net)
    nn.init.zeros_(prompts.prompts["0"])
    assert torch.equal(teacher(images), expected) and not torch.allclose(net(images), expected)


def test_messages(images):
    net = make_vit()
    with pytest.raises(ValueError, match="there is no block 3; the network has 3"):
        PrefixPrompts(net, [0, 3], 2)
    assert "forward" not in net.blocks[0].attn.__dict__
    with pytest.raises(ValueError, match="not timm's Attention"):
        PrefixPrompts(Odd(), [0], 2)
    prompts = PrefixPrompts(net, [0], 2)
    with pytest.raises(ValueError, match="has prompts already"):
        PrefixPrompts(net, [0], 2)
    with pytest.raises(ValueError, match=r"block 1 has no prompts; blocks: \[0\]"):
        prompts.set(1, torch.zeros(1, D))
    with pytest.raises(ValueError, match="same shape"):
        prompts.set(0, torch.zeros(1, D))
    with pytest.raises(ValueError, match="available: uniform"):
        PrependPrompts(net, 2, init="ones")
    prompts.set(0, torch.zeros(3, 1, D), torch.zeros(3, 1, D))
    with pytest.raises(ValueError, match="a batch of 4 does not divide into 3 stacked clients"):
        net(images)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
