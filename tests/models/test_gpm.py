import math

import pytest
import timm
import torch

from backbones.utils.lora import LoRA
from backbones.utils.moments import InputMoments
from models.utils.gpm import DualGPM, pack_triu, threshold, top_eigenpairs, unpack_triu

torch.set_num_threads(1)
D, R = 64, 6
MODES = pytest.mark.parametrize("energy", ["official", "paper"])


def inputs(task, n=300, d=D, decay=0.9):
    """Tokens with a decaying spectrum in directions of the task's own, and a mean."""
    g = torch.Generator().manual_seed(task)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=g)).Q
    X = torch.randn(n, d, dtype=torch.float64, generator=g) * decay ** torch.arange(d)
    return (X + 0.1) @ basis.T


def moment(X):
    return X.T @ X / len(X)


def filled(energy="official", tasks=3, eps=0.9, **kwargs):
    memory = DualGPM(D, energy, **kwargs)
    for t in range(tasks):
        memory.update(moment(inputs(t)), eps)
    return memory


def used(memory):
    """M itself, however it is stored."""
    return (
        torch.linalg.qr(memory.basis, mode="complete").Q[:, memory.basis.shape[1] :] if memory.retain else memory.basis
    )


def projector(memory):
    return memory.project(torch.eye(D, dtype=torch.float64))


def kernel(C, energy):
    return C @ C if energy == "official" else C


def captured(U, K):
    return float((U.T @ K @ U).trace() / K.trace())


@MODES
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_designed_rows_avoid_the_memory(energy, tasks):
    memory = filled(energy, tasks)
    assert memory.retain == (tasks == 8)
    A = memory.design(moment(inputs(50)), R)
    assert A.shape == (R, D) and A.dtype == torch.float64
    assert (A @ used(memory)).abs().max() < 1e-10
    assert (A.float() @ used(memory).float()).abs().max() < 1e-5
    torch.testing.assert_close(3 * A @ A.T, torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(A @ projector(memory), A, rtol=0, atol=1e-10)
    B = memory.random(R, torch.Generator().manual_seed(0))
    assert (B @ used(memory)).abs().max() < 1e-10
    torch.testing.assert_close(3 * B @ B.T, torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-10)


@MODES
def test_design_takes_the_leading_directions_of_projected_inputs(energy):
    for memory in (DualGPM(D, energy), filled(energy)):
        X = inputs(50)
        H = memory.project(X).T  # d x n
        if energy == "official":
            H = projector(memory) @ moment(X)
        U = torch.linalg.svd(H).U[:, :R]
        A = memory.design(moment(X), R, scale=1)
        torch.testing.assert_close(A.T @ A, U @ U.T, rtol=0, atol=1e-8)
        torch.testing.assert_close((A @ U).abs(), torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-6)


@MODES
def test_old_inputs_pass_with_almost_no_output(energy):
    X = inputs(0)
    C = moment(X)
    memory = DualGPM(D, energy)
    memory.update(C, 0.97)
    A = memory.design(moment(inputs(1)), R)
    B = torch.randn(D, R, dtype=torch.float64)
    x = used(memory) @ torch.randn(memory.dim_used, 20, dtype=torch.float64)
    assert ((B @ (A @ x)).norm(dim=0) / x.norm(dim=0)).max() < 1e-10
    c = captured(used(memory), C)
    assert (X @ A.T).square().sum() / X.square().sum() <= (1 - c) / 3 + 1e-12


def test_the_frozen_factor_must_meet_the_input_first():
    memory = filled(tasks=2)
    A = memory.design(moment(inputs(50)), R)
    B = torch.randn(D, R, dtype=torch.float64)
    x = used(memory) @ torch.randn(memory.dim_used, 20, dtype=torch.float64)

    def leak(W):
        return float((W @ x).norm() / x.norm())

    assert leak(B @ A) < 1e-10
    assert leak(A.T @ B.T) > 0.1, "a constraint on the output side protects nothing"


def test_vit_block_forgets_less_with_a_designed_A():
    """What a trained adapter does to the keys and values, and to the block's output, on inputs of the first task."""
    torch.manual_seed(0)
    vit = (
        timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=D, depth=2, num_heads=4, num_classes=5
        )
        .eval()
        .double()
    )

    def images(task, n=40):
        g = torch.Generator().manual_seed(100 + task)
        patterns = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=g)
        return (torch.randn(n, 4, dtype=torch.float64, generator=g) @ patterns.flatten(1)).view(n, 3, 32, 32)

    def moments(task):
        with InputMoments(vit, "attn.qkv", torch.float64) as stats, torch.no_grad():
            vit(images(task))
        return stats.means()

    memories = {name: DualGPM(D, "paper") for name in moments(0)}
    for name, C in moments(0).items():
        memories[name].update(C, 0.999)
    second = moments(1)
    seen, change = {}, {}
    vit.blocks[0].attn.qkv.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    with torch.no_grad():
        before = vit(images(0))
        block_input = used(memories["blocks.0.attn.qkv"])
        inside = seen["x"] @ block_input @ block_input.T
        keys = vit.blocks[0].attn.qkv(inside)
        attention = vit.blocks[0].attn(inside)
        for kind in ("designed", "plain"):
            lora = LoRA(vit, "attn.qkv:k,v", r=R, share_A=True)
            memory = memories if kind == "designed" else {n: DualGPM(D, "paper") for n in memories}
            lora.reset(
                A={n: memory[n].design(C, R) for n, C in second.items()},
                B="gaussian",
                generator=torch.Generator().manual_seed(3),
            )
            change[kind] = [
                float((a - b).norm())
                for a, b in (
                    (vit.blocks[0].attn.qkv(inside), keys),
                    (vit.blocks[0].attn(inside), attention),
                    (vit(images(0)), before),
                )
            ]
            lora.remove()
    for designed, plain in list(zip(change["designed"], change["plain"], strict=True))[:2]:
        assert designed < 1e-9 * plain
    assert change["designed"][2] < change["plain"][2] / 10


@MODES
def test_both_ways_of_storing_give_the_same_memory(energy):
    dual, plain = DualGPM(D, energy), DualGPM(D, energy, switch=False)
    kinds = set()
    for t in range(10):
        C = moment(inputs(t))
        assert dual.update(C, threshold(t, 10)) == plain.update(C, threshold(t, 10))
        assert (projector(dual) - projector(plain)).abs().max() < 1e-12
        assert dual.dim_used == plain.dim_used and not plain.retain
        assert dual.basis.shape[1] <= D / 2
        kinds.add(dual.retain)
        g = (torch.Generator().manual_seed(t) for _ in range(2))
        torch.testing.assert_close(dual.random(2, next(g)), plain.random(2, next(g)), rtol=0, atol=1e-10)
    assert kinds == {False, True}
    Q, M = dual.allowed_basis(), plain.basis
    torch.testing.assert_close(Q @ Q.T, torch.eye(D, dtype=torch.float64) - M @ M.T, rtol=0, atol=1e-12)


def literal_update(F, retain, H, eps):
    """One step of the update as published, for a matrix H (d x n) whose singular values squared are the energy."""
    total = torch.linalg.svdvals(H).square().sum()
    if F is None:
        U, S, _ = torch.linalg.svd(H)
        r = int((S.square().cumsum(0) / total < eps).sum())
        return U[:, : max(r, 1)], False
    inside = F @ F.T @ H
    rest = inside if retain else H - inside
    U, S, _ = torch.linalg.svd(rest)
    S = S.square()
    r = 0
    if retain:
        share = S.sum() / total
        while share >= 1 - eps and r < F.shape[1]:
            share -= S[r] / total
            r += 1
        left = F - U[:, :r] @ U[:, :r].T @ F
        return torch.linalg.svd(left).U[:, : F.shape[1] - r], True
    share = (total - S.sum()) / total
    while share < eps and r < len(S):
        share += S[r] / total
        r += 1
    return torch.cat([F, U[:, :r]], 1), False


@MODES
def test_equals_the_published_update(energy):
    memory, F, retain = DualGPM(D, energy), None, False
    for t in range(8):
        X, eps = inputs(t), 0.85 + 0.01 * t
        C = moment(X)
        memory.update(C, eps)
        F, retain = literal_update(F, retain, C if energy == "official" else X.T, eps)
        if not retain and F.shape[1] > D / 2:
            F, retain = torch.linalg.svd(F).U[:, F.shape[1] :], True
        assert (memory.retain, memory.basis.shape) == (retain, F.shape)
        assert (memory.basis @ memory.basis.T - F @ F.T).abs().max() < 1e-9


def test_official_energy_is_the_paper_energy_of_the_squared_moment():
    official, paper = DualGPM(D, "official"), DualGPM(D, "paper")
    for t in range(6):
        C = moment(inputs(t))
        assert official.update(C, 0.95) == paper.update(C @ C, 0.95)
        assert (projector(official) - projector(paper)).abs().max() < 1e-10
        torch.testing.assert_close(official.design(C, 3), paper.design(C @ C, 3), rtol=0, atol=1e-10)


@MODES
def test_threshold_is_met_and_not_exceeded(energy):
    for eps in (0.3, 0.95, 0.999):
        memory, used_before = DualGPM(D, energy), None
        for t in range(8):
            C = moment(inputs(t))
            K = kernel(C, energy)
            old, Q = memory.dim_used, memory.allowed_basis()
            r = memory.update(C, eps)
            M, k = used(memory), memory.dim_used
            assert k == old + r and memory.captured(C) == pytest.approx(captured(M, K), abs=1e-12)
            if t == 0:
                U = torch.linalg.eigh(K).eigenvectors.flip(1)
                assert k == 1 or captured(U[:, :k], K) < eps
                assert captured(U[:, : k + 1], K) >= eps
                assert captured(M, K) == pytest.approx(captured(U[:, :k], K), abs=1e-12)
            else:
                assert captured(M, K) >= eps - 1e-12
                assert (M.T @ used_before).square().sum() == pytest.approx(old, abs=1e-9), "nothing is forgotten"
                if r:
                    values = torch.linalg.eigvalsh(Q.T @ K @ Q).flip(0)
                    assert captured(M, K) - float(values[r - 1] / K.trace()) < eps
            used_before = M


def test_schedule():
    assert [round(threshold(t, 10), 10) for t in range(10)] == [
        0.95,
        0.955,
        0.96,
        0.965,
        0.97,
        0.975,
        0.98,
        0.985,
        0.99,
        0.995,
    ]
    assert threshold(3, 5, 0.9, 0.9) == pytest.approx(0.9)


@MODES
def test_neither_the_order_nor_the_number_of_clients_matters(energy):
    X = [torch.cat([inputs(t, n) for n in (40, 70, 25, 90)]) for t in range(3)]
    clients = [x.split([40, 70, 25, 90]) for x in X]

    def run(parts):
        memory = DualGPM(D, energy)
        for t, eps in enumerate((0.9, 0.93, 0.96)):
            C = sum(x.T @ x for x in parts[t]) / sum(len(x) for x in parts[t])
            A = memory.design(C, R)
            memory.update(C, eps)
        return C, A, projector(memory)

    central = run([[x] for x in X])
    turned = run([c[::-1] for c in clients])
    halved = run([[*c[:1], c[1][:33], c[1][33:], *c[2:]] for c in clients])
    packed = run(clients)
    for other in (turned, halved, packed):
        for got, expected, tol in zip(other, central, (1e-12, 1e-9, 1e-10), strict=True):
            assert (got - expected).abs().max() < tol


def test_averaging_B_is_averaging_the_updates_when_A_is_shared():
    g = torch.Generator().manual_seed(0)
    A = filled().design(moment(inputs(50)), R)
    B, w = torch.randn(5, 2 * D, R, dtype=torch.float64, generator=g), torch.rand(5, dtype=torch.float64, generator=g)
    w = w / w.sum()
    mean = (w[:, None, None] * B).sum(0) @ A
    assert (mean - (w[:, None, None] * (B @ A)).sum(0)).abs().max() < 1e-12
    own = torch.randn(5, R, D, dtype=torch.float64, generator=g)
    exact = (w[:, None, None] * (B @ own)).sum(0)
    product = (w[:, None, None] * B).sum(0) @ (w[:, None, None] * own).sum(0)
    assert (product - exact).norm() / exact.norm() > 0.2, "averaging the factors apart is not averaging the updates"


def test_merged_weights_give_the_logits_of_the_branches():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=D, depth=2, num_heads=4, num_classes=5
    ).eval()
    lora = LoRA(vit, "attn.qkv:k,v", r=R, share_A=True)
    A = filled().design(moment(inputs(50)), R)
    lora.reset(A=dict.fromkeys(lora.layer_names, A), B="gaussian")
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = vit(x)
        lora.fold_into()
        torch.testing.assert_close(vit(x), expected, rtol=1e-5, atol=1e-5)


@MODES
@pytest.mark.parametrize("switch", [True, False])
def test_little_or_no_room_left(energy, switch):
    memory = DualGPM(D, energy, switch)
    full = torch.eye(D, dtype=torch.float64)
    memory.basis, memory.retain = (full[:, D - 2 :], True) if switch else (full[:, : D - 2], False)
    assert memory.dim_used == D - 2
    for A in (memory.design(moment(inputs(1)), R), memory.random(R)):
        assert A.isfinite().all() and not A[2:].any() and (A[:, : D - 2].abs() < 1e-12).all()
        torch.testing.assert_close(3 * A[:2] @ A[:2].T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)
    assert memory.update(moment(inputs(1, 2000, decay=0.99)), 1.0) == 2
    assert memory.dim_used == D and memory.allowed_basis().shape == (D, 0)
    assert not memory.design(moment(inputs(1)), R).any() and not memory.random(R).any()
    assert memory.update(moment(inputs(2)), 0.9) == 0 and memory.update(moment(inputs(2)), 1.0) == 0
    assert memory.captured(moment(inputs(2))) == pytest.approx(1)
    torch.testing.assert_close(memory.project(inputs(2)), torch.zeros(300, D, dtype=torch.float64), rtol=0, atol=1e-12)


@MODES
def test_full_energy_uses_up_no_more_than_the_inputs_span(energy):
    g = torch.Generator().manual_seed(0)
    low = [
        torch.randn(200, 5, dtype=torch.float64, generator=g) @ torch.randn(5, D, dtype=torch.float64, generator=g)
        for _ in range(3)
    ]
    memory = DualGPM(D, energy)
    for t, X in enumerate(low):
        memory.update(moment(X), 1.0)
        assert memory.dim_used <= 5 * (t + 1)
        assert t == 0 or memory.captured(moment(X)) == pytest.approx(1, abs=1e-12)
        assert memory.update(moment(X), 1.0) <= 1 and memory.update(moment(X), 1.0) == 0
    # A first moment that is all of one direction still takes it.
    memory = DualGPM(D, energy)
    assert memory.update(torch.diag(torch.arange(D) == 3).double(), 0.5) == 1


@MODES
@pytest.mark.parametrize("switch", [True, False])
def test_twenty_tasks(energy, switch):
    memory, before = DualGPM(D, energy, switch), 0
    for t in range(20):
        memory.update(moment(inputs(t)), threshold(t, 20))
        F = memory.basis
        torch.testing.assert_close(F.T @ F, torch.eye(F.shape[1], dtype=torch.float64), rtol=0, atol=1e-8)
        assert memory.dim_used >= before and (not switch or F.shape[1] <= D / 2)
        before = memory.dim_used
    assert before > D / 2


def test_state():
    for tasks in (0, 2, 8):
        memory, other = filled(tasks=tasks), DualGPM(D)
        state = memory.state_dict()
        assert all(isinstance(v, torch.Tensor) for v in state.values())
        other.load_state_dict(state)
        assert other.retain == memory.retain and torch.equal(other.basis, memory.basis)
        other.update(moment(inputs(30)), 0.95)
        memory.update(moment(inputs(30)), 0.95)
        assert torch.equal(other.basis, memory.basis)
    with pytest.raises(ValueError, match="not one of 64 dimensions"):
        DualGPM(D).load_state_dict(DualGPM(8).state_dict())


def test_scale_dtype_and_bad_arguments():
    C, a, b = moment(inputs(0)), DualGPM(D), DualGPM(D)
    a.update(C, 0.95)
    b.update((1e-12 * C).float(), 0.95)
    assert (projector(a) - projector(b)).abs().max() < 1e-4
    assert a.project(inputs(1).float()).dtype == torch.float32
    zero = DualGPM(D)
    assert zero.update(torch.zeros(D, D), 0.95) == 0 and zero.dim_used == 0
    assert repr(a) == f"DualGPM(64, energy='official', remove, used={a.dim_used})"
    for call, message in (
        (lambda: a.update(C, 0), "eps must be"),
        (lambda: a.update(C, 1.1), "eps must be"),
        (lambda: a.update(C[:3, :3], 0.9), "must be 64 x 64"),
        (lambda: a.update(C * math.nan, 0.9), "not finite"),
        (lambda: DualGPM(D, "both"), "available: official, paper"),
        (lambda: unpack_triu(torch.zeros(5)), "not the upper triangle"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_moments_on_the_wire():
    S = torch.stack([moment(inputs(t)) for t in range(2)])
    packed = pack_triu(S)
    assert packed.shape == (2, D * (D + 1) // 2)
    torch.testing.assert_close(unpack_triu(packed), S, rtol=0, atol=1e-15)
    assert torch.equal(pack_triu(unpack_triu(packed)), packed)
    W = top_eigenpairs(S, 10)
    assert W.shape == (2, D, 10)
    values, vectors = torch.linalg.eigh(S)
    top = vectors[..., -10:]
    best = top * values[:, None, -10:] @ top.mT
    torch.testing.assert_close(W @ W.mT, best, rtol=0, atol=1e-10)
    all_of_it = top_eigenpairs(S.float(), 1000)
    assert all_of_it.shape == (2, D, D) and all_of_it.dtype == torch.float32
    torch.testing.assert_close(all_of_it @ all_of_it.mT, S.float(), rtol=1e-4, atol=1e-5)
