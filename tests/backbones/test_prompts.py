import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn
from torch.func import functional_call, grad, vmap

from backbones.utils.client_batch import client_batch
from backbones.utils.lora import LoRA
from backbones.utils.prompts import (
    ComponentPool,
    PrefixPrompts,
    PrependPrompts,
    PromptKeys,
    PromptPool,
    orthonormal_rows,
)

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
@pytest.mark.parametrize("init", ["uniform", "zeros", "unit"])
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


@pytest.mark.parametrize("pool, first", [("prompts", 1), ("prefix+prompts", 0)])
def test_features_of_the_prompts(images, pool, first):
    """With the position of the class token, and the mean over their outputs."""
    net = make_vit()
    expected = net(images)
    with pytest.raises(ValueError, match="unknown pool 'patches'; available: network, prompts, prefix"):
        PrependPrompts(net, 4, pool="patches")
    front = PrependPrompts(net, 4, positioned=True, pool=pool)
    x = net._pos_embed(net.patch_embed(images))
    x = torch.cat([x[:, :1], (front.tokens + net.pos_embed[0, 0]).expand(4, -1, -1), x[:, 1:]], 1)
    with front.disabled():
        x = net.blocks(x)
    mean = torch.stack([sum(tokens[first:5]) / (5 - first) for tokens in net.norm(x)])
    torch.testing.assert_close(net(images), net.head(mean), rtol=0, atol=1e-12)
    copied = copy.deepcopy(net)
    torch.testing.assert_close(copied(images), net(images), rtol=0, atol=0)
    with front.disabled():
        assert torch.equal(net(images), expected)
    front.remove()
    assert torch.equal(net(images), expected) and "pool" not in net.__dict__


# ---- what prefixes do to attention


def prefixed(keys, values):
    """(attention, its output for some tokens, those tokens) with a prefix of one sample."""
    net = Holder(True)
    x = torch.randn(1, 6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    PrefixPrompts(net, [0], 0).set(0, keys, values)
    return net.blocks[0].attn, net(x), x


def test_the_order_of_a_prefix_does_not_matter():
    keys, values = torch.randn(2, 5, D, dtype=torch.float64)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(prefixed(keys, values)[1], prefixed(keys[order], values[order])[1], rtol=0, atol=1e-12)
    assert (prefixed(keys, values)[1] - prefixed(keys[order], values)[1]).abs().max() > 1e-4


def test_a_prefix_is_a_gate():
    """out = (1 - l) Attn(x) + l Attn_prefix, l the share of the softmax that falls on the prefix; before ``proj``."""
    keys, values = torch.randn(2, 5, D, dtype=torch.float64)
    attn, out, x = prefixed(keys, values)
    q, k, v = (x[0] @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1)
    q, k, d = q.unflatten(-1, (HEADS, -1)), k.unflatten(-1, (HEADS, -1)), D // HEADS
    q, k = attn.q_norm(q).flatten(-2), attn.k_norm(k).flatten(-2)
    parts = []
    for h in range(HEADS):
        cols = slice(h * d, (h + 1) * d)
        ours, theirs = (q[:, cols] @ t[:, cols].T / d**0.5 for t in (keys, k))
        share = (ours.logsumexp(1) - torch.cat([ours, theirs], 1).logsumexp(1)).exp()[:, None]
        plain, prefix = theirs.softmax(1) @ v[:, cols], ours.softmax(1) @ values[:, cols]
        parts.append((1 - share) * plain + share * prefix)
    torch.testing.assert_close(out[0], attn.proj(torch.cat(parts, -1)), rtol=0, atol=1e-12)


def test_equal_rows_are_one_row_of_more_weight():
    """n equal rows are one whose logit is larger by log n: zero rows dilute attention rather than do nothing."""
    key, value = torch.randn(2, 1, D, dtype=torch.float64)
    attn, out, x = prefixed(key.expand(7, -1), value.expand(7, -1))
    more = torch.zeros(6, 7, dtype=torch.float64)
    more[:, 0] = torch.log(torch.tensor(7.0, dtype=torch.float64))

    def one(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=more)

    heads = (6, HEADS, -1)
    q, k, v = (t.view(heads) for t in (x[0] @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    k, v = torch.cat([key.view(1, HEADS, -1), k]), torch.cat([value.view(1, HEADS, -1), v])
    y = one(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1).reshape(6, D)
    torch.testing.assert_close(out[0], attn.proj(y), rtol=0, atol=1e-12)


def test_the_unit_start_breaks_the_symmetry_that_zeros_keep(images):
    spread = {}
    for init in ("zeros", "unit"):
        net = make_vit().requires_grad_(False)
        prompts = PrefixPrompts(net, [0, 1], 6, init, torch.Generator().manual_seed(0))
        norms = [float(p.detach().norm()) for p in prompts.prompts.values()]
        assert norms == ([0.0, 0.0] if init == "zeros" else pytest.approx([1.0, 1.0], abs=1e-6))
        opt = torch.optim.Adam(prompts.parameters(), 0.01)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(net(images), torch.tensor([0, 1, 2, 3])).backward()
            opt.step()
        spread[init] = [float((p - p[:, :1]).detach().abs().max()) for p in prompts.prompts.values()]
        assert all(float(p.detach().abs().max()) > 0 for p in prompts.prompts.values())
    assert spread["zeros"] == [0.0, 0.0] and min(spread["unit"]) > 1e-3


# ---- pools


def test_orthonormal_rows():
    g = torch.Generator().manual_seed(0)
    others = torch.randn(4, 9, dtype=torch.float64, generator=g)  # not orthogonal, as after training
    rows = orthonormal_rows(5, others, torch.Generator().manual_seed(1))
    # Gram-Schmidt, one vector after another
    basis = []
    for v in others:
        v = v - sum((v @ b) * b for b in basis)
        basis.append(v / v.norm())
    for v in torch.empty(5, 9, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(1)):
        v = v - sum((v @ b) * b for b in basis)
        basis.append(v / v.norm())
    torch.testing.assert_close(rows, torch.stack(basis[4:]), rtol=0, atol=1e-10)
    single = orthonormal_rows(5, others.float(), torch.Generator().manual_seed(1))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single @ single.T, torch.eye(5), rtol=0, atol=1e-5)
    assert (single @ others.float().T).abs().max() < 1e-5
    with pytest.raises(ValueError, match="10 orthogonal vectors do not fit into 9 dimensions"):
        orthonormal_rows(6, others)


def composed(pool, block, query):
    """The prefix by the definition, one sample and one component at a time."""
    out = []
    for q in query:
        total = 0
        stored = {kind: [*pool.frozen(kind, block), *of_block[str(block)]] for kind, of_block in pool.kinds().items()}
        for m, p in enumerate(stored["prompts"]):
            a = stored["attention"][m] if "attention" in stored else torch.ones_like(q)
            k = stored["keys"][m]
            total = total + ((q * a) @ k / (q * a).norm() / k.norm()) * p
        out.append(total)
    return torch.stack(out).chunk(2, 1)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("extended", [False, True])
def test_components(images, attention, extended):
    net = make_vit()
    with torch.no_grad():
        query = net.forward_head(net.forward_features(images), pre_logits=True)
    g = torch.Generator().manual_seed(0)
    pool = ComponentPool(net, [0, 2], 3, 4, attention, "normal", g)
    names = [f"{kind}.{i}" for kind in ("prompts", "keys", "attention")[: 2 + attention] for i in (0, 2)]
    assert sorted(n for n, _ in pool.named_parameters()) == sorted(names)
    assert pool.prompts["2"].shape == (3, 4, D) and pool.keys["0"].shape == (3, D) and pool.n_frozen == 0
    if extended:
        before = {n: p.detach().clone() for n, p in pool.named_parameters()}
        pool.extend(2, "uniform", g)
        assert pool.n_frozen == 3 and len(pool.keys["0"]) == 2
        assert all(torch.equal(pool.frozen(*n.split(".")), p) for n, p in before.items())
    pool.match(query)
    for i in (0, 2):
        for ours, expected in zip(pool.prefix(i), composed(pool, i, query), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        assert pool.weights(i, query).shape == (4, 5 if extended else 3)
    out = net(images)
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in pool.parameters())
    plain = PrefixPrompts(other := make_vit(), [0, 2], 0)
    for i in (0, 2):
        plain.set(i, *composed(pool, i, query))
    torch.testing.assert_close(out, other(images), rtol=0, atol=1e-10)


def test_components_that_are_not_used(images):
    net = make_vit()
    pool = ComponentPool(net, [0], 5, 4, attention=False, used=(1, 3))
    query = torch.randn(4, D, dtype=torch.float64)
    pool.match(query)
    out = net(images)
    out.sum().backward()
    for p in pool.parameters():
        moved = p.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, True, True, False, False]
    few = ComponentPool(again := make_vit(), [0], 2, 4, attention=False)
    for mine, theirs in zip(few.parameters(), pool.parameters(), strict=True):
        mine.data = theirs.data[1:3]
    few.match(query)
    torch.testing.assert_close(again(images), out, rtol=0, atol=1e-12)


def test_new_components_are_orthonormal_to_all_before(images):
    net = make_vit()
    expected = net(images)
    pool = ComponentPool(net, [0, 1], 0, 2)
    assert torch.equal(net(images), expected)  # nothing to add up yet
    for n in (3, 4):
        pool.extend(n, generator=torch.Generator().manual_seed(n))
        for kind, of_block in pool.kinds().items():
            for i, p in of_block.items():
                new, old = p.detach().flatten(1), pool.frozen(kind, i).flatten(1)
                torch.testing.assert_close(new @ new.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-5)
                assert not len(old) or (new @ old.T).abs().max() < 1e-5
                p.data = p.data + 0.3 * torch.randn(p.shape, dtype=p.dtype)  # as if trained: no longer orthonormal
    with pytest.raises(RuntimeError, match="no query: call match"):
        net(images)
    with pool.disabled():
        assert torch.equal(net(images), expected)
    pool.remove()
    assert torch.equal(net(images), expected)
    with pytest.raises(ValueError, match="components of 3 rows: half are keys and half values"):
        ComponentPool(net, [0], 2, 3)
    with pytest.raises(ValueError, match=f"{D + 1} orthogonal vectors do not fit into {D} dimensions"):
        ComponentPool(net, [0], D + 1, 2)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("frozen", [0, 2])
def test_components_of_clients(sizes, frozen):
    net = make_vit()
    pool = ComponentPool(net, [0, 1], frozen, 4)
    pool.extend(3)
    both = nn.ModuleDict({"net": net, "pool": pool})
    both.forward = net.forward
    g = torch.Generator().manual_seed(5)
    stack = {
        f"pool.{n}": torch.randn(3, *p.shape, dtype=p.dtype, generator=g).requires_grad_()
        for n, p in pool.named_parameters()
    }
    xs = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=g)
    query = torch.randn(6, D, dtype=torch.float64, generator=g)
    alone = []
    for k, (x, q) in enumerate(zip(xs.split(sizes), query.split(sizes), strict=True)):
        pool.match(q)
        alone.append(functional_call(both, {n: v[k] for n, v in stack.items()}, x))
    pool.match(query)
    with client_batch(sizes):
        together = functional_call(both, stack, xs)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)
    weights = torch.randn(together.shape, dtype=torch.float64, generator=g)
    mine = torch.autograd.grad((together * weights).sum(), list(stack.values()))
    theirs = torch.autograd.grad((torch.cat(alone) * weights).sum(), list(stack.values()))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def make_pool(n=6, length=2):
    return PromptPool(n, length, D, torch.zeros(1), generator=torch.Generator().manual_seed(0))


def test_prompts_by_key():
    pool = make_pool()
    assert all(float(p.detach().abs().max()) <= 1 and p.detach().std() > 0.4 for p in pool.parameters())
    query = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    tokens, found, chosen = pool(query, 3)
    assert tokens.shape == (5, 6, D) and found.shape == chosen.shape == (5, 3)
    for b, q in enumerate(query):
        each = torch.stack([q @ k / q.norm() / k.norm() for k in pool.keys])
        best = each.sort(descending=True).indices[:3]
        assert chosen[b].tolist() == best.tolist()
        torch.testing.assert_close(found[b], each[best])
        assert torch.equal(tokens[b], torch.cat([pool.prompts[m] for m in best]))
    assert (found.detach().abs() <= 1).all()
    found.sum().backward()
    assert (pool.keys.grad.abs().sum(1) > 0).tolist() == [m in chosen for m in range(6)]
    pool.keys.data *= torch.rand(6, 1) * 5 + 0.1  # the length of a key does not matter
    assert torch.equal(pool(query, 3)[2], chosen)


def test_prompts_by_vote():
    pool = make_pool()
    query = torch.cat([pool.keys[[0, 0, 3, 4]], pool.keys[[5, 5, 5]]]).detach()
    assert pool(query, 1)[2].flatten().tolist() == [0, 0, 3, 4, 5, 5, 5]
    with client_batch([7]):
        assert pool(query, 1, vote=True)[2].flatten().tolist() == [5] * 7
    similarity = pool.cosines(query)
    assert PromptKeys.closest(similarity, 1, (4, 3)).flatten().tolist() == [0] * 4 + [5] * 3


@pytest.mark.parametrize(
    "vote, stacked",
    [
        (False, ("keys", "prompts")),
        (False, ("prompts",)),
        (False, ("keys",)),
        (True, ("keys", "prompts")),
        (True, ("prompts",)),
    ],
)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2)])
def test_prompts_of_clients_by_key(vote, stacked, sizes):
    pool = make_pool()
    g = torch.Generator().manual_seed(2)
    stack = {n: torch.randn(3, *getattr(pool, n).shape, generator=g) for n in stacked}
    query = torch.randn(6, D, generator=g)
    alone = [
        functional_call(pool, {n: v[k] for n, v in stack.items()}, (q, 2, vote))
        for k, q in enumerate(query.split(sizes))
    ]
    with client_batch(sizes):
        together = functional_call(pool, stack, (query, 2, vote))
    for mine, theirs in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.cat(theirs))


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
    with pytest.raises(ValueError, match="available: uniform, normal, unit, zeros"):
        PrependPrompts(net, 2, init="ones")
    prompts.set(0, torch.zeros(3, 1, D), torch.zeros(3, 1, D))
    with pytest.raises(ValueError, match="a batch of 4 does not divide into 3 stacked clients"):
        net(images)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
