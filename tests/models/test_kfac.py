"""Curvature against Jacobians of torch.func, where the factors are exact, and in expectation where they are drawn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

from backbones.vit import as_backbone
from models.utils.kfac import (
    Curvature,
    DiagonalPenalty,
    Layout,
    Penalty,
    References,
    curvature,
    each,
    fingerprint,
    ggn_diagonal,
    load,
    pack,
    save,
    unpack,
)
from models.utils.linearize import Linearized
from utils.errors import UserError

DTYPE = torch.float64


class Call(nn.Module):
    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(x)


def jacobian(net, names, function, x):
    """{name: (N, C, numel)}, image by image."""
    theta = {f"net.{n}": p.detach() for n, p in net.named_parameters() if n in names}
    call = Call(net, function).eval()
    per_image = vmap(jacrev(lambda t, one: functional_call(call, t, (one[None],))[0]), (None, 0))
    from models.utils.linearize import differentiable_forward

    with differentiable_forward(net):
        J = per_image(theta, x)
    return {n[4:]: j.flatten(2) for n, j in J.items()}


def gram(*parts):
    """sum_n J_n^T J_n of joined columns."""
    J = torch.cat(parts, -1)
    return torch.einsum("nci,ncj->ij", J, J)


def kron(factors, block):
    return torch.block_diag(*(torch.kron(b, factors.A[block.name]) for b in factors.B[block.name]))


def weight_and_bias(J, layer, net):
    """Columns of [W b], row by row."""
    o, i = net.get_submodule(layer).weight.shape
    W = J[f"{layer}.weight"].unflatten(-1, (o, i))
    return torch.cat((W, J[f"{layer}.bias"][..., None]), -1).flatten(2)


def mlp(*layers):
    torch.manual_seed(0)
    net = nn.Sequential(*layers).to(DTYPE)
    return net, [n for n, _ in net.named_parameters()]


@pytest.fixture
def vit():
    """A transformer whose f is the normalised projection of its class token, as CLIP's."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    body = VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, num_classes=0)
    net = as_backbone(body, 4).to(DTYPE)
    for p in net.parameters():
        nn.init.normal_(p, std=0.4)
    names = [n for n, _ in net.named_parameters() if not n.startswith(("patch_embed", "pos_embed"))]
    return SimpleNamespace(net=net, names=names, f=lambda x: F.normalize(net(x), dim=1))


IMAGES = torch.randn(6, 1, 8, 8, dtype=DTYPE, generator=torch.Generator().manual_seed(4))


# ---- where the factors are exact


def test_one_layer_one_image():
    net, names = mlp(nn.Linear(3, 4))
    x = torch.randn(1, 3, dtype=DTYPE)
    factors = curvature(net, Layout.of(net, names), net, [x], draws=0)
    a = torch.cat((x, torch.ones(1, 1, dtype=DTYPE)), 1)
    want = torch.kron(torch.eye(4, dtype=DTYPE), a.T @ a)
    torch.testing.assert_close(kron(factors, factors.layout.blocks[0]), want)
    torch.testing.assert_close(want, gram(weight_and_bias(jacobian(net, names, net, x), "0", net)))


def test_deep_linear_network():
    net, names = mlp(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    x = torch.randn(7, 3, dtype=DTYPE)
    factors, J = curvature(net, Layout.of(net, names), net, [x], draws=0), jacobian(net, names, net, x)
    for block in factors.layout.blocks:
        exact = gram(weight_and_bias(J, block.layers[0], net)) / 7
        torch.testing.assert_close(kron(factors, block) / 49, exact)


def test_one_image_through_relus_and_not_many_through_a_norm():
    net, names = mlp(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(6, 3, dtype=DTYPE)
    layout = Layout.of(net, names)
    for n, function, exact in ((1, net, True), (6, lambda x: F.normalize(net(x), dim=1), False)):
        factors = curvature(net, layout, function, [x[:n]], draws=0)
        J = jacobian(net, names, function, x[:n])
        for block in layout.blocks:
            want = gram(weight_and_bias(J, block.layers[0], net)) / n
            error = (kron(factors, block) / n**2 - want).norm() / want.norm()
            assert (error < 1e-12) == exact


@pytest.mark.parametrize("mode", ["official", "expand", "reduce"])
def test_tokens(mode):
    """expand is exact for an output per token, reduce for the mean over tokens; official is expand over R."""
    net, names = mlp(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(6, 5, 3, dtype=DTYPE)  # 5 tokens
    function = (lambda x: net(x).mean(1)) if mode == "reduce" else (lambda x: net(x).flatten(1))
    factors, J = curvature(net, Layout.of(net, names), function, [x], draws=0, mode=mode), None
    J = jacobian(net, names, function, x)
    for block in factors.layout.blocks:
        want = gram(weight_and_bias(J, block.layers[0], net)) / 6
        torch.testing.assert_close(kron(factors, block) / 36, want / (5 if mode == "official" else 1))


def test_full_blocks_are_the_jacobians(vit):
    factors = curvature(vit.net, Layout.of(vit.net, vit.names), vit.f, [IMAGES[:4], IMAGES[4:]], draws=0)
    J = jacobian(vit.net, vit.names, vit.f, IMAGES)
    assert factors.layout.tokens == ("cls_token",) and len(factors.layout.norms) == 10 and factors.n == 6
    for name in factors.layout.full:
        torch.testing.assert_close(factors.F[name], gram(J[name]))


def test_projection_by_hand(vit):
    """The layer before the norm sees one token: B = sum (I - f f^T) / |e|^2."""
    factors = curvature(vit.net, Layout.of(vit.net, vit.names), vit.f, [IMAGES], draws=0)
    with torch.no_grad():
        e = vit.net.eval()(IMAGES)
    f, size = F.normalize(e, dim=1), e.square().sum(1)
    want = ((torch.eye(4, dtype=DTYPE) - f[:, :, None] * f[:, None]) / size[:, None, None]).sum(0)
    torch.testing.assert_close(factors.B["classifier"][0], want)
    torch.testing.assert_close(want.trace(), (3 / size).sum())


def test_factors_are_symmetric_and_count_the_images(vit):
    factors = curvature(vit.net, Layout.of(vit.net, vit.names), vit.f, [IMAGES], draws=0)
    for name, M in factors.tensors().items():
        values = torch.linalg.eigvalsh(M)
        torch.testing.assert_close(M, M.mT)
        assert values.min() >= -1e-8 * values.max() and values.max() > 0, name
    for A in factors.A.values():
        assert A[-1, -1] == pytest.approx(6)


@pytest.mark.parametrize("mode", ["official", "reduce"])
def test_parts_of_a_data_set_add_up(vit, mode):
    layout = Layout.of(vit.net, vit.names)
    one, two, whole = (
        curvature(vit.net, layout, vit.f, list(x.split(size)), draws=0, mode=mode)
        for x, size in ((IMAGES[:2], 1), (IMAGES[2:], 3), (IMAGES, 6))
    )
    both = one + two
    assert both.n == whole.n == 6
    for name, t in whole.tensors().items():
        torch.testing.assert_close(both.tensors()[name], t)


def test_draws_are_unbiased_and_averaged(vit):
    """The mean over draws goes to the exact factors like 1 / sqrt(draws); more draws do not make it grow."""
    layout = Layout.of(vit.net, vit.names)
    exact = curvature(vit.net, layout, vit.f, [IMAGES], draws=0)

    def off(draws, seed=0):
        drawn = curvature(vit.net, layout, vit.f, [IMAGES], draws, generator=torch.Generator().manual_seed(seed))
        parts = [(drawn.tensors()[n] - t, t) for n, t in exact.tensors().items() if not n.startswith("A.")]
        assert all(torch.equal(drawn.A[n], A) for n, A in exact.A.items())
        return sum(d.norm() for d, _ in parts) / sum(t.norm() for _, t in parts)

    few, many = sum(off(16, s) for s in range(4)) / 4, sum(off(1024, s) for s in range(2)) / 2
    assert few / many == pytest.approx(8, rel=0.5) and many < 0.1


@pytest.mark.parametrize("draws", [0, 3])
def test_diagonal_of_the_matrix_itself(vit, draws):
    diagonal = ggn_diagonal(
        vit.net, Layout.of(vit.net, vit.names), vit.f, IMAGES.split(4), draws, torch.Generator().manual_seed(1)
    )
    got = diagonal.D
    assert diagonal.n == 6 and set(got) == set(vit.names)
    if draws == 0:
        for name, j in jacobian(vit.net, vit.names, vit.f, IMAGES).items():
            torch.testing.assert_close(got[name].flatten(), j.square().sum((0, 1)))
    else:
        exact = ggn_diagonal(vit.net, Layout.of(vit.net, vit.names), vit.f, [IMAGES]).D
        ratio = sum(float(t.sum()) for t in got.values()) / sum(float(t.sum()) for t in exact.values())
        assert 0.5 < ratio < 2


# ---- queries, keys and values


class Attention(nn.Module):
    """CLIP's three layers."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return ((q @ k.mT).softmax(-1) @ v).flatten(1)


class Fused(nn.Module):
    def __init__(self, three):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        parts = (three.q_proj, three.k_proj, three.v_proj)
        self.qkv.weight.data = torch.cat([p.weight.data for p in parts])
        self.qkv.bias.data = torch.cat([p.bias.data for p in parts])

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return ((q @ k.mT).softmax(-1) @ v).flatten(1)


def test_fused_or_split():
    torch.manual_seed(0)
    three = Attention().to(DTYPE)
    one, x = Fused(three).to(DTYPE), torch.randn(5, 3, 4, dtype=DTYPE)
    f = {}
    for net, key in ((three, "three"), (one, "one")):
        for qkv in ("fused", "split"):
            layout = Layout.of(net, [n for n, _ in net.named_parameters()], qkv)
            f[key, qkv] = curvature(net, layout, net, [x], draws=0)
    joint = "q_proj+k_proj+v_proj"
    torch.testing.assert_close(f["three", "fused"].B[joint], f["one", "fused"].B["qkv"])
    torch.testing.assert_close(f["three", "fused"].A[joint], f["one", "split"].A["qkv"])
    for i, layer in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(4 * i, 4 * i + 4)
        torch.testing.assert_close(f["one", "split"].B["qkv"][i], f["one", "fused"].B["qkv"][0, rows, rows])
        torch.testing.assert_close(f["three", "split"].B[layer][0], f["one", "split"].B["qkv"][i])
        torch.testing.assert_close(f["three", "split"].A[layer], f["one", "fused"].A["qkv"])
    tau = {n: torch.randn_like(p) for n, p in three.named_parameters()}
    same = {
        f"qkv.{k}": torch.cat([tau[f"{n}.{k}"] for n in ("q_proj", "k_proj", "v_proj")]) for k in ("weight", "bias")
    }
    for qkv in ("fused", "split"):
        a, grads = Penalty(each([f["three", qkv]]), tau)(tau)
        b, other = Penalty(each([f["one", qkv]]), same)(same)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.cat([grads[f"{n}.weight"] for n in three._modules]), other["qkv.weight"])


# ---- penalty and merging


def some_tasks(net, names, n=3, qkv="fused"):
    layout = Layout.of(net, names, qkv)
    xs = [torch.randn(3 + t, 1, 8, 8, dtype=DTYPE) for t in range(n)]
    function = lambda x: F.normalize(net(x), dim=1)  # noqa: E731
    return [curvature(net, layout, function, [x], draws=0) for x in xs]


def test_penalty_is_the_quadratic_form(vit):
    """Against Kronecker products, and its gradient against autograd; scales are by block."""
    tasks = some_tasks(vit.net, vit.names, qkv="split")
    tau = {n: torch.randn_like(p) for n, p in vit.net.named_parameters() if n in vit.names}
    scale = {"classifier": 0.1, "blocks.0.norm1.weight": 10.0}
    value, grads = Penalty(each(tasks), tau, scale)(tau)
    leaves = {n: t.clone().requires_grad_() for n, t in tau.items()}
    want = torch.zeros((), dtype=DTYPE)
    total = sum(t.n for t in tasks)
    for t in tasks:
        for block in t.layout.blocks:
            d = block.join(leaves).flatten()
            want = want + t.n / total * scale.get(block.name, 1) * d @ (kron(t, block) / t.n**2) @ d
        for name in t.layout.full:
            d = leaves[name].flatten()
            want = want + t.n / total * scale.get(name, 1) * d @ (t.F[name] / t.n) @ d
    want.backward()
    torch.testing.assert_close(value, want.detach())
    assert set(grads) == set(tau)
    for n, leaf in leaves.items():
        torch.testing.assert_close(grads[n], leaf.grad)


def test_quadratic_form_is_the_drift():
    """One group of parameters, exact factors: E |J tau|^2."""
    net, names = mlp(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(9, 3, dtype=DTYPE)
    for layer in ("0", "1"):
        some = [n for n in names if n.startswith(layer)]
        tau = {n: torch.randn_like(p) for n, p in net.named_parameters() if n in some}
        value, _ = Penalty(each([curvature(net, Layout.of(net, some), net, [x], draws=0)]), tau)(tau)
        _, (drift,) = Linearized(net, some).expansion(x, [tau])
        torch.testing.assert_close(value, drift.square().sum(1).mean())


def test_accumulated_in_the_room_of_one(vit):
    tasks = some_tasks(vit.net, vit.names, 4)
    refs = References()
    for t in tasks:
        refs.add(t)
    got, direct = refs.without(tasks[2]).mean(), References()
    for t in (tasks[0], tasks[1], tasks[3]):
        direct.add(t)
    n = sum(t.n for t in tasks) - tasks[2].n
    for name, t in got.tensors().items():
        torch.testing.assert_close(t, direct.mean().tensors()[name])
    block = got.layout.blocks[0].name
    rest = (tasks[0], tasks[1], tasks[3])
    torch.testing.assert_close(got.A[block], sum(t.A[block] for t in rest) / n)
    torch.testing.assert_close(got.B[block], sum(t.B[block] / t.n for t in rest))
    torch.testing.assert_close(got.F["cls_token"], sum(t.F["cls_token"] for t in rest) / n)
    assert References().mean() is None
    alone = References()
    alone.add(tasks[0])
    assert alone.without(tasks[0]).mean() is None


def test_merging_weighs_equal_tasks_by_their_number(vit):
    """eq. 8 over eq. 7: T for Kronecker blocks of T equal tasks, 1 for full ones; the rest is the covariance."""
    (task,) = some_tasks(vit.net, vit.names, 1)
    refs = References()
    for _ in range(7):
        refs.add(task)
    merged, mean = refs.mean(), each([task])[0][1]
    for name, t in merged.tensors().items():
        torch.testing.assert_close(t, mean.tensors()[name] * (7 if name.startswith("B.") else 1))
    tasks = [each([t])[0][1] for t in some_tasks(vit.net, vit.names, 3)]
    name = "classifier"
    A, B = torch.stack([t.A[name] for t in tasks]), torch.stack([t.B[name][0] for t in tasks])
    left = sum(torch.kron(b, a) for a, b in zip(A, B)) - torch.kron(B.sum(0), A.mean(0))
    right = sum(torch.kron(b - B.mean(0), a - A.mean(0)) for a, b in zip(A, B))
    torch.testing.assert_close(left, right)


# ---- files


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_triangles(blocks):
    M = torch.randn(2, 7, 7)
    M = M + M.mT
    packed = pack(M, blocks)
    back = unpack(packed, 7, blocks)
    keep = back != 0
    assert torch.equal(back[keep], M[keep]) and torch.equal(back, back.mT)
    edges = [7 * i // blocks for i in range(blocks + 1)]
    assert int(keep[0].sum()) == sum((j - i) ** 2 for i, j in zip(edges, edges[1:]))
    assert packed.shape[1] == sum((j - i) * (j - i + 1) // 2 for i, j in zip(edges, edges[1:]))


def test_files(vit, tmp_path):
    (task,) = some_tasks(vit.net, vit.names, 1)
    file, belongs = tmp_path / "deep" / "task-0.safetensors", fingerprint(vit.net, task=0, draws=1)
    save(file, task, belongs)
    back = load(file, Curvature.zeros(task.layout, vit.net), belongs)
    assert back.n == task.n and [p.name for p in file.parent.iterdir()] == [file.name]
    for name, t in task.tensors().items():
        torch.testing.assert_close(back.tensors()[name], t, rtol=1e-6, atol=1e-6)
    like = Curvature.zeros(task.layout, vit.net)
    with pytest.raises(UserError, match="computed with draws = 1, this run has 2"):
        load(file, like, fingerprint(vit.net, task=0, draws=2))
    vit.net.norm.weight.data += 1e-3
    with pytest.raises(UserError, match="computed with weights = "):
        load(file, like, fingerprint(vit.net, task=0, draws=1))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as curvature.*delete it"):
        load(file, like, belongs)


def test_mistakes(vit):
    for name, said in (
        ("pos_embed", "no curvature for pos_embed"),
        ("patch_embed.proj.weight", "no curvature for patch"),
    ):
        with pytest.raises(UserError, match=said):
            Layout.of(vit.net, [name])
    with pytest.raises(UserError, match="fc1.bias without blocks.0.mlp.fc1.weight"):
        Layout.of(vit.net, ["blocks.0.mlp.fc1.bias"])
    net, names = mlp(nn.Linear(3, 3))
    with pytest.raises(UserError, match="0 is used twice"):
        curvature(net, Layout.of(net, names), lambda x: net(net(x)), [torch.randn(2, 3, dtype=DTYPE)])
    assert not net[0]._forward_hooks


def test_diagonals_are_merged_and_penalised(vit):
    layout = Layout.of(vit.net, vit.names)
    tasks = [ggn_diagonal(vit.net, layout, vit.f, [x]) for x in (IMAGES[:4], IMAGES[4:])]
    tau = {n: torch.randn_like(p) for n, p in vit.net.named_parameters() if n in vit.names}
    value, grads = DiagonalPenalty(each(tasks), tau, {"cls_token": 3.0})(tau)
    refs = References()
    for t in tasks:
        refs.add(t)
    merged, other = DiagonalPenalty([(1.0, refs.mean())], tau, {"cls_token": 3.0})(tau)
    torch.testing.assert_close(value, merged)  # a weighted mean is exact here
    whole = sum(
        (3.0 if n == "cls_token" else 1.0) * ((tasks[0].D[n] + tasks[1].D[n]) / 6 * t.square()).sum()
        for n, t in tau.items()
    )
    torch.testing.assert_close(value, whole)
    for n, t in tau.items():
        factor = 3.0 if n == "cls_token" else 1.0
        torch.testing.assert_close(grads[n], factor * 2 * (tasks[0].D[n] + tasks[1].D[n]) / 6 * t)
        torch.testing.assert_close(grads[n], other[n])
