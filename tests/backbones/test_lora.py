import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from backbones.utils.lora import LoRA

torch.set_num_threads(1)
D = 12


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(D, 3 * D)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(D, 7)

    def forward(self, x):
        q, k, v = self.attn.qkv(x).chunk(3, -1)
        return self.mlp.fc1(q.tanh() * k.sigmoid() + v)


class Both(nn.Module):
    def __init__(self, net, lora):
        super().__init__()
        self.net, self.lora = net, lora

    def forward(self, x):
        return self.net(x)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Toy().double()


@pytest.fixture
def x():
    return torch.randn(4, 5, D, dtype=torch.float64, generator=gen(1))


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5
    ).eval()


def randomise(lora, seed=2):
    lora.reset(A="gaussian", B="gaussian", generator=gen(seed))
    return lora


def materialised(net, *loras):
    """A copy of the network with plain, trainable W + scale * B A, built without the code under test's own merge."""
    weights = {k: v.detach().clone() for k, v in net.state_dict().items()}
    for lora in loras:
        for name, slices, b in lora.branches():
            full = torch.zeros_like(weights[name + ".weight"])
            d = full.shape[0] // 3
            index = (
                torch.arange(len(full))
                if slices == "all"
                else torch.cat([torch.arange("qkv".index(s) * d, ("qkv".index(s) + 1) * d) for s in slices])
            )
            full[index] = (b.scale * b.B @ b.A).detach().to(full)
            weights[name + ".weight"] += full
    out = Toy().to(next(iter(weights.values())))
    out.load_state_dict(weights)
    return out


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "targets",
    [
        ["attn.qkv"],
        ["attn.qkv:k"],
        ["attn.qkv:k,v"],
        ["qkv:q,v"],
        ["attn.qkv:v,k,q"],
        ["attn.qkv:q", "mlp.fc?"],
        ["attn.qkv:q", "attn.qkv:v"],
    ],
)
def test_equals_materialised_weights(net, x, targets, share):
    expected_keys = list(net.state_dict())
    lora = randomise(LoRA(net, targets, r=3, alpha=6, share_A=share))
    assert list(net.state_dict()) == expected_keys and type(net.attn.qkv) is nn.Linear
    torch.testing.assert_close(net(x), materialised(net, lora)(x), rtol=0, atol=1e-10)


def test_zero_at_the_start_and_names(net, x):
    before = net(x)
    lora = LoRA(net, ["attn.qkv:v,k", "fc1"], r=2, generator=gen())
    assert torch.equal(net(x), before)
    assert list(dict(lora.named_parameters())) == [
        f"layers.{k}.{p}" for k in ("attn-qkv.k", "attn-qkv.v", "mlp-fc1.all") for p in "AB"
    ]
    assert [(n, s) for n, s, _, _ in lora] == [("attn.qkv", "k"), ("attn.qkv", "v"), ("mlp.fc1", "all")]
    assert lora.layer_names == ["attn.qkv", "mlp.fc1"]
    again = LoRA(net, ["attn.qkv:v,k", "fc1"], r=2, generator=gen())
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters(), strict=True))
    shared = LoRA(net, "attn.qkv:k,v", r=2, share_A=True)
    assert {n: tuple(p.shape) for n, p in shared.named_parameters()} == {
        "layers.attn-qkv.kv.A": (2, D),
        "layers.attn-qkv.kv.B": (2 * D, 2),
    }


def test_a_slice_changes_its_rows_only(net, x):
    before = net.attn.qkv(x)
    for slices in ("q", "k", "v", "qv"):
        for share in (False, True):
            lora = randomise(LoRA(net, f"attn.qkv:{','.join(slices)}", r=2, share_A=share))
            after = net.attn.qkv(x)
            for i, s in enumerate("qkv"):
                same = torch.equal(after[..., i * D : (i + 1) * D], before[..., i * D : (i + 1) * D])
                assert same == (s not in slices)
            lora.remove()
    assert torch.equal(net.attn.qkv(x), before)


def test_gradients_match_the_materialised_weights(net, x):
    lora = randomise(LoRA(net, ["attn.qkv:q,v", "fc1"], r=3, alpha=1.5))
    net(x).square().sum().backward()
    plain = materialised(net, lora)
    plain(x).square().sum().backward()
    for name, slices, b in lora.branches():
        G = plain.get_submodule(name).weight.grad
        if slices != "all":
            G = G.chunk(3)["qkv".index(slices)]
        torch.testing.assert_close(b.B.grad, b.scale * G @ b.A.T, rtol=0, atol=1e-10)
        torch.testing.assert_close(b.A.grad, b.scale * b.B.T @ G, rtol=0, atol=1e-10)
    torch.testing.assert_close(net.attn.qkv.weight.grad, plain.attn.qkv.weight.grad, rtol=0, atol=1e-10)


def test_frozen_network_and_trainable_B_only(net, x):
    net.requires_grad_(False)
    lora = LoRA(net, "attn.qkv:k,v", r=2, share_A=True)
    for _, _, A, _ in lora:
        A.requires_grad_(False)
    net(x).square().sum().backward()
    grads = {n: p.grad is not None for n, p in lora.named_parameters()}
    assert grads == {"layers.attn-qkv.kv.A": False, "layers.attn-qkv.kv.B": True}
    assert all(p.grad is None for p in net.parameters())


def test_several_adapters_add_up(net, x):
    before = net(x)
    one, two = randomise(LoRA(net, "attn.qkv:k", 2)), randomise(LoRA(net, ["attn.qkv", "fc1"], 3), 5)
    torch.testing.assert_close(net(x), materialised(net, one, two)(x), rtol=0, atol=1e-10)
    with one.disabled():
        torch.testing.assert_close(net(x), materialised(net, two)(x), rtol=0, atol=1e-10)
        with two.disabled():
            assert torch.equal(net(x), before)
    two.disable()
    torch.testing.assert_close(net(x), materialised(net, one)(x), rtol=0, atol=1e-10)
    two.enable()
    one.remove()
    torch.testing.assert_close(net(x), materialised(net, two)(x), rtol=0, atol=1e-10)


def test_fold_and_unfold(net, x):
    other = Toy().double()
    other.load_state_dict(net.state_dict(), assign=True)  # shares the tensors, as a second model instance may
    original, bits, pointer = net.attn.qkv.weight, net.attn.qkv.weight.detach().clone(), net.attn.qkv.weight.data_ptr()
    lora = randomise(LoRA(net, ["attn.qkv:q,v", "fc1"], r=3))
    expected, bare = net(x), other(x)
    lora.fold()
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-10)
    assert torch.equal(other(x), bare), "the shared tensors must not be written to"
    with pytest.raises(RuntimeError, match="already folded"):
        lora.fold()
    lora.unfold()
    assert net.attn.qkv.weight is original and torch.equal(original, bits) and original.data_ptr() == pointer
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    lora.fold(-1)
    minus = net.attn.qkv.weight.detach().clone()
    lora.unfold()
    torch.testing.assert_close(minus, 2 * bits - lora.merged("attn.qkv"), rtol=0, atol=1e-12)


def test_folds_nest(net, x):
    one, two = randomise(LoRA(net, "attn.qkv:k", 2)), randomise(LoRA(net, "attn.qkv", 3), 5)
    bits, expected = net.attn.qkv.weight.detach().clone(), net(x)
    one.fold()
    two.fold()
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-10)
    with pytest.raises(RuntimeError, match="folded over"):
        one.unfold()
    with pytest.raises(RuntimeError, match="is folded"):
        one.fold_into()
    copied = copy.deepcopy(net)
    two.unfold()
    one.unfold()
    assert torch.equal(net.attn.qkv.weight, bits)
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=1e-10)


def test_fold_into_keeps_A_and_the_outputs(net, x):
    twin = copy.deepcopy(net)
    lora = randomise(LoRA(net, ["attn.qkv:k,v", "fc1"], r=3, share_A=True))
    expected, A = net(x), [a.clone() for _, _, a, _ in lora]
    B = [b.detach().clone() for _, _, _, b in lora]
    sent = [b.detach() for _, _, _, b in lora]
    lora.fold_into()
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-10)
    assert all(torch.equal(a, b) for a, (_, _, b, _) in zip(A, lora, strict=True))
    assert all(not b.any() for _, _, _, b in lora)
    assert all(torch.equal(a, b) for a, b in zip(sent, B, strict=True)), "tensors already handed out keep their values"
    for (_, _, _, b), old in zip(lora, B, strict=True):
        b.data = old
    lora.fold_into(twin)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=1e-10)


def test_reset(net):
    lora = LoRA(net, ["attn.qkv:k,v", "fc1"], r=2)
    A = torch.randn(2, D, dtype=torch.float64)
    lora.reset(A={"attn.qkv": A}, B="gaussian", generator=gen())
    assert all(torch.equal(a, A) == (n == "attn.qkv") and b.any() for n, _, a, b in lora)
    lora.reset()
    assert all(not b.any() for _, _, _, b in lora) and torch.equal(next(iter(lora))[2], A)
    with pytest.raises(ValueError, match="no adapter on"):
        lora.reset(A={"head": A})
    with pytest.raises(ValueError, match="must be"):
        lora.reset(A={"attn.qkv": A[:1]})
    with pytest.raises(ValueError, match="available: kaiming"):
        lora.reset(A="xavier")


@pytest.mark.parametrize(
    "targets, message",
    [
        ("head", "no linear layer matches target 'head'; available: attn.qkv, mlp.fc1"),
        (["attn.qkv", ""], "no linear layer"),
        ("fc1:k", "not divisible by 3"),
        ("attn.qkv:k,w", "available: q, k, v"),
        (["attn.qkv", "attn.qkv:k"], "choose one"),
    ],
)
def test_messages(net, targets, message):
    with pytest.raises(ValueError, match=message) as error:
        LoRA(net, targets, r=2)
    assert "\n" not in str(error.value)
    assert not net.attn.qkv._forward_hooks


def test_bad_rank(net):
    with pytest.raises(ValueError, match="at least 1"):
        LoRA(net, "attn.qkv", r=0)


def test_copies_take_their_adapter_along(net, x):
    lora = randomise(LoRA(net, "attn.qkv:k,v", r=2))
    expected = net(x)
    teacher, both = copy.deepcopy(net), copy.deepcopy(Both(net, lora))
    lora.reset(B="zeros")
    torch.testing.assert_close(teacher(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(both(x), expected, rtol=0, atol=0)
    both.lora.reset(B="zeros")
    torch.testing.assert_close(both(x), net(x), rtol=0, atol=0)


def stacked(lora, clients):
    g = gen(7)
    return {f"lora.{n}": torch.randn(clients, *p.shape, dtype=p.dtype, generator=g) for n, p in lora.named_parameters()}


@pytest.mark.parametrize("targets", [["attn.qkv:q,v", "fc1"], ["attn.qkv:k,v"]])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("frozen_A", [False, True])
def test_stacked_clients_equal_separate_runs(net, targets, share, frozen_A):
    K, both = 3, Both(net, LoRA(net, targets, r=2, share_A=share))
    stack = stacked(both.lora, K)
    if frozen_A:  # one A for all clients, a B each
        stack = {k: v[0] if k.endswith("A") else v for k, v in stack.items()}
    xs = torch.randn(K, 4, 5, D, dtype=torch.float64, generator=gen(3))
    dims = {k: 0 if v.dim() == 3 else None for k, v in stack.items()}

    def loss(p, x):
        return functional_call(both, p, x).square().sum()

    def one(c):
        return {k: v[c] if dims[k] == 0 else v for k, v in stack.items()}

    expected = torch.stack([functional_call(both, one(c), xs[c]) for c in range(K)])
    torch.testing.assert_close(vmap(lambda p, x: functional_call(both, p, x), (dims, 0))(stack, xs), expected)
    folded = functional_call(both, stack, xs.flatten(0, 1))
    torch.testing.assert_close(folded.unflatten(0, (K, 4)), expected)

    separate = [grad(loss)(one(c), xs[c]) for c in range(K)]
    together = vmap(grad(loss), (dims, 0))(stack, xs)
    leaves = {k: v.clone().requires_grad_() for k, v in stack.items()}
    loss(leaves, xs.flatten(0, 1)).backward()
    for k in stack:
        want = torch.stack([g[k] for g in separate])
        torch.testing.assert_close(together[k], want)
        torch.testing.assert_close(leaves[k].grad, want if dims[k] == 0 else want.sum(0))


def test_stacks_that_do_not_fit(net, x):
    both = Both(net, LoRA(net, "attn.qkv", r=2))
    with pytest.raises(ValueError, match="does not divide into 3"):
        functional_call(both, stacked(both.lora, 3), x)
    for branch in both.lora.modules():
        if hasattr(branch, "B"):
            branch.B.data = torch.zeros(2, *branch.B.shape, dtype=torch.float64)
    assert both.lora.delta()["attn.qkv"][0][1].shape == (2, 3 * D, D)
    with pytest.raises(ValueError, match="only one pair"):
        both.lora.fold()


def test_same_input_for_all_clients_and_forward_mode(net, x):
    both = Both(net, LoRA(net, ["attn.qkv:q,v", "fc1"], r=2))
    stack = stacked(both.lora, 2)
    out = vmap(lambda p: functional_call(both, p, x))(stack)
    expected = torch.stack([functional_call(both, {k: v[c] for k, v in stack.items()}, x) for c in range(2)])
    torch.testing.assert_close(out, expected)
    p, t = ({k: v[c] for k, v in stack.items()} for c in range(2))
    _, tangent = jvp(lambda q: functional_call(both, q, x), (p,), (t,))
    h = 1e-6
    ends = [functional_call(both, {k: p[k] + s * h * t[k] for k in p}, x) for s in (1, -1)]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = {k: torch.autograd.forward_ad.make_dual(p[k], t[k]) for k in p}
        out = torch.autograd.forward_ad.unpack_dual(functional_call(both, dual, x))
    torch.testing.assert_close(out.tangent, tangent)


def test_autocast_and_half_precision_networks(x):
    torch.manual_seed(0)
    net, x = Toy(), x.float()
    lora = randomise(LoRA(net, ["attn.qkv:q,v", "fc1"], r=3))
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        out.float().sum().backward()
        both = Both(net, lora)
        folded = functional_call(both, {f"lora.{n}": p.expand(2, *p.shape) for n, p in lora.named_parameters()}, x)
    assert out.dtype == torch.bfloat16 and (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert (folded - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(b.dtype == torch.float32 and b.grad.isfinite().all() for _, _, _, b in lora)
    half = randomise(LoRA(small := Toy().bfloat16(), "attn.qkv", r=2))
    assert small(x.bfloat16()).dtype == torch.bfloat16 and next(half.parameters()).dtype == torch.float32


def test_a_vit_keeps_its_names_and_gradient_checkpointing_works(vit):
    keys, bits = list(vit.state_dict()), {k: v.clone() for k, v in vit.state_dict().items()}
    vit.requires_grad_(False)
    lora = randomise(LoRA(vit, ["attn.qkv:k,v"], r=2, share_A=True))
    images = torch.randn(2, 3, 32, 32, generator=gen(4))

    def grads():
        lora.zero_grad()
        F.cross_entropy(vit(images), torch.tensor([0, 1])).backward()
        return [p.grad.clone() for p in lora.parameters()]

    plain = grads()
    vit.set_grad_checkpointing()
    torch.testing.assert_close(grads(), plain)
    assert list(vit.state_dict()) == keys and all(torch.equal(v, bits[k]) for k, v in vit.state_dict().items())
