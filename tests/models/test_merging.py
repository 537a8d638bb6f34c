"""Merging as pure tensor functions, against least squares, enumeration and hand-made examples, in float64."""

import warnings

import numpy as np
import pytest
import torch

from models.utils.merging import (
    dare,
    fisher_mean,
    iso_c,
    iso_cts,
    low_rank_sum,
    merge_layers,
    reduced_gram,
    regression_merge,
    scale_off_diagonal,
    solve_gram,
    task_arithmetic,
    ties_merge,
    trim,
    tsv_m,
    weighted_mean,
    wudi,
)

OUT, D, N = 5, 12, 4


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def models():
    """Weights, inputs and Gram matrices of N models; inputs of very different scales."""
    scale = torch.logspace(-2, 2, D, dtype=torch.float64)
    X = [rand(40 + 10 * i, D, seed=i) @ rand(D, D, seed=90) * scale for i in range(N)]
    return [rand(OUT, D, seed=50 + i) for i in range(N)], X, [x.T @ x for x in X]


def close(a, b, rtol=1e-8):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


# ---- regression


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("anchor", ["mean", "zero", "w0"])
def test_stationary_and_equal_to_least_squares(models, alpha, anchor):
    W, X, G = models
    merged = regression_merge(W, G, alpha=alpha, anchor=rand(OUT, D, seed=7) if anchor == "w0" else anchor)
    S = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in G]
    gradient = sum((merged - w) @ s for w, s in zip(W, S, strict=True))
    assert gradient.norm() < 1e-8 * sum(w @ s for w, s in zip(W, S, strict=True)).norm()
    if alpha == 1:
        targets = torch.cat([x @ w.T for x, w in zip(X, W, strict=True)])
        close(merged, torch.linalg.lstsq(torch.cat(X), targets).solution.T)
    # the formula as it is written
    close(merged, sum(w @ s for w, s in zip(W, S, strict=True)) @ torch.linalg.inv(sum(S)))


def test_coefficients_weigh_the_models(models):
    W, X, G = models
    c = [0.5, 2.0, 1.0, 3.0]
    rows = [k**0.5 * x for k, x in zip(c, X, strict=True)]
    targets = torch.cat([x @ w.T for x, w in zip(rows, W, strict=True)])
    close(regression_merge(W, G, coefficients=c), torch.linalg.lstsq(torch.cat(rows), targets).solution.T)


def test_the_diagonal_alone_is_a_weighted_mean_of_columns(models):
    W, _, G = models
    g = [x.diagonal() for x in G]
    g[0] = g[0].clone()
    for x in g:
        x[3] = 0  # an input that nobody has seen
    merged = regression_merge(W, g)
    for j in range(D):
        total = sum(x[j] for x in g)
        column = sum(x[j] * w[:, j] for x, w in zip(g, W, strict=True)) / total if total else sum(W)[:, j] / N
        close(merged[:, j], column)
    close(merged, regression_merge(W, [torch.diag(x) for x in g]))
    close(merged, regression_merge(W, [torch.diag(x) for x in g], alpha=0))


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_what_must_not_change(models, alpha):
    W, _, G = models
    low_rank = [x[:3].T @ x[:3] for x in (rand(5, D, seed=i) for i in range(N))]
    shape = [torch.diag(g.diagonal()) for g in G] if alpha == 0 else G

    def merge(w, g, **more):
        return regression_merge(w, g, alpha=alpha, **more)

    close(merge(W, [G[0]] * N), sum(W) / N)  # equal Grams
    if alpha == 0:  # equal diagonals are enough
        close(merge(W, [torch.diag(G[0].diagonal()) + i * rand(D, D).tril(-1) for i in range(N)]), sum(W) / N)
    assert torch.equal(merge([W[0]] * N, low_rank), W[0])  # equal weights
    assert torch.equal(merge(W[:1], low_rank[:1]), W[0])  # one model, of a Gram without full rank
    close(merge(W[:1], G[:1], anchor="zero"), W[0])
    close(merge(W[::-1], shape[::-1]), merge(W, shape))
    close(merge(W, [7.5 * g for g in shape]), merge(W, shape))
    zero = torch.zeros(D, D, dtype=torch.float64)
    close(merge([*W, 1e3 * W[0]], [*shape, zero]), merge(W, shape))  # a client without data
    assert torch.isfinite(merge(W, [zero] * N)).all()
    close(merge(W, [zero] * N), sum(W) / N)


def test_without_full_rank_unseen_directions_take_the_anchor():
    """Two models on orthogonal inputs: each is kept where it has seen data; elsewhere nothing is added to the mean,
    in units of the inputs' energies, and exactly nothing for an input that was never on."""
    Q = torch.linalg.qr(rand(D, D)).Q
    seen = [Q[:, :3], Q[:, 3:5]]
    W, G = [rand(OUT, D, seed=i) for i in (1, 2)], [q @ q.T for q in seen]
    merged = regression_merge(W, G)
    for w, q in zip(W, seen, strict=True):
        torch.testing.assert_close(merged @ q, w @ q, rtol=0, atol=1e-6)
    step, energy = merged - (W[0] + W[1]) / 2, sum(G).diagonal()
    assert step.norm() > 1
    torch.testing.assert_close(step @ (energy[:, None] * Q[:, 5:]), torch.zeros(OUT, D - 5).double(), rtol=0, atol=1e-6)
    off = [g.clone() for g in G]
    for g in off:
        g[2], g[:, 2] = 0, 0
    assert torch.equal(regression_merge(W, off)[:, 2], ((W[0] + W[1]) / 2)[:, 2])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95, 1.0])
def test_scaling_off_the_diagonal(models, alpha):
    _, _, G = models
    S = scale_off_diagonal(torch.stack(G), alpha)
    assert torch.equal(S.diagonal(dim1=1, dim2=2), torch.stack(G).diagonal(dim1=1, dim2=2))
    off = ~torch.eye(D, dtype=torch.bool)
    close(S[:, off], alpha * torch.stack(G)[:, off])
    s = S.diagonal(dim1=1, dim2=2).rsqrt()
    values = torch.linalg.eigvalsh(s[:, :, None] * S * s[:, None, :])
    assert values.min() >= 1 - alpha - 1e-9


def test_a_reduced_gram_is_that_of_what_leaves_A(models):
    _, X, G = models
    A = rand(3, D, seed=4)
    close(reduced_gram(A, G[0]), (X[0] @ A.T).T @ (X[0] @ A.T))
    close(reduced_gram(A, G[0].diagonal()), A @ torch.diag(G[0].diagonal()) @ A.T)
    assert reduced_gram(A.float(), G[0]).dtype == torch.float64


def test_solves_of_many_layers_at_once():
    """A batch with a regular, a rank-deficient, a badly scaled and an empty matrix: each as if alone."""
    x = [rand(30, D, seed=1), rand(4, D, seed=2), rand(30, D, seed=3) * torch.logspace(-3, 3, D, dtype=torch.float64)]
    G = torch.stack([*(y.T @ y for y in x), torch.zeros(D, D, dtype=torch.float64)])
    want = rand(4, OUT, D, seed=5)
    R = want @ G
    X = solve_gram(G, R)
    for i in range(4):
        assert torch.equal(X[i], solve_gram(G[i], R[i]))
        residual = (X[i] @ G[i] - R[i]).norm()
        assert residual <= 1e-6 * R[i].norm()
    close(X[0], want[0])
    close(X[2], want[2], 1e-6)
    assert X[3].abs().max() == 0
    assert X[1].norm() < 10 * want[1].norm()  # nothing is blown up where nothing was seen
    close(solve_gram(G[0], R[0], damping=0.1), R[0] @ torch.linalg.inv(G[0] + 0.1 * torch.diag(G[0].diagonal())))


def test_equations_that_are_missed_are_told():
    """A Gram that is no Gram has no solution; the merge says so and stays finite."""
    W, G = [rand(OUT, D, seed=i) for i in (1, 2)], [torch.ones(D, D, dtype=torch.float64) for _ in range(2)]
    G[1] = torch.diag(torch.tensor([1.0] + [1e-30] * (D - 1), dtype=torch.float64))
    G[1][0, 1] = G[1][1, 0] = 3.0
    with pytest.warns(UserWarning, match="close to singular"):
        assert torch.isfinite(regression_merge(W, G)).all()


def test_layers_of_equal_shape_are_merged_as_if_alone(models):
    W, _, G = models
    weights = [{"a": w, "b": 2 * w.flip(0), "c": w[:, :3], "d": w + 1} for w in W]
    grams = [{"a": g, "b": g.flip(0, 1), "c": g[:3, :3].diagonal(), "d": g.diagonal()} for g in G]
    merged = merge_layers(weights, grams, alpha=0.7)
    assert list(merged) == list("abcd")
    for name, value in merged.items():
        close(value, regression_merge([w[name] for w in weights], [g[name] for g in grams], alpha=0.7))
    anchor = {n: torch.zeros_like(t) for n, t in weights[0].items()}
    close(merge_layers(weights, grams, anchor=anchor)["a"], regression_merge(W, G, anchor="zero"))


def test_merging_one_by_one_equals_merging_at_once(models):
    """W_past (sum of past G) is the sum of past W_i G_i: why a server need not keep past models."""
    W, _, G = models
    for alpha in (1.0, 0.5):
        so_far, seen = W[0], G[0]
        for w, g in zip(W[1:], G[1:], strict=True):
            so_far, seen = regression_merge([so_far, w], [seen, g], alpha=alpha), seen + g
        close(so_far, regression_merge(W, G, alpha=alpha))


def test_wrong_arguments(models):
    W, _, G = models
    for bad, match in (
        (lambda: regression_merge([], []), "0 weights"),
        (lambda: regression_merge(W, G[:2]), "4 weights and 2"),
        (lambda: regression_merge(W, [g[:3, :3] for g in G]), "does not fit"),
        (lambda: regression_merge(W, G, anchor="median"), "unknown anchor"),
        (lambda: dare(W[0], 1.0), "below 1"),
        (lambda: ties_merge(W, reduce="max"), "reduce"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()


def test_types_are_kept_and_inputs_left_alone(models):
    W, _, G = models
    W32, G32 = [w.float() for w in W], [g.float() for g in G]
    before = [g.clone() for g in G]
    assert regression_merge(W32, G32, alpha=0.5).dtype == torch.float32
    regression_merge(W, G, alpha=0.5)
    regression_merge(W, [g.diagonal() for g in G])
    assert all(torch.equal(a, b) for a, b in zip(G, before, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            regression_merge(W32, G32, alpha=0.5).double(), regression_merge(W, G, alpha=0.5), rtol=1e-3, atol=1e-3
        )


# ---- LoRM's two closed forms


def loss(B, A, Bs, As, X):
    return sum(((B @ A - b @ a) @ x.T).square().sum() for b, a, x in zip(Bs, As, X, strict=True))


def test_the_B_step(models):
    _, X, G = models
    A, Bs = rand(3, D, seed=8), [rand(OUT, 3, seed=i) for i in range(N)]
    B = regression_merge(Bs, [reduced_gram(A, g) for g in G])
    targets = torch.cat([x @ A.T @ b.T for x, b in zip(X, Bs, strict=True)])
    close(B, torch.linalg.lstsq(torch.cat([x @ A.T for x in X]), targets).solution.T)
    whole = sum(b @ A @ g for b, g in zip(Bs, G, strict=True)) @ A.T @ torch.linalg.pinv(A @ sum(G) @ A.T)
    close(B, whole)  # the released code's form over d x d
    R = rand(3, 3, seed=9)
    turned = regression_merge([b @ torch.linalg.inv(R) for b in Bs], [reduced_gram(R @ A, g) for g in G])
    close(turned @ R @ A, B @ A)
    average = sum(Bs) / N
    assert loss(B, A, Bs, [A] * N, X) < loss(average, A, Bs, [A] * N, X)


def test_the_A_step(models):
    _, X, G = models
    B, As = rand(OUT, 3, seed=8), [rand(3, D, seed=20 + i) for i in range(N)]
    A = regression_merge(As, G)
    close(B @ A, regression_merge([B @ a for a in As], G))
    other = rand(OUT, 3, seed=77)
    close(other @ A, regression_merge([other @ a for a in As], G))
    assert loss(B, A, [B] * N, As, X) < loss(B, sum(As) / N, [B] * N, As, X)
    g = [x.diagonal() for x in G]
    close(regression_merge(As, g), sum(a * x for a, x in zip(As, g, strict=True)) / sum(g))


# ---- means


def test_means():
    t = [rand(3, 4, seed=i) for i in range(3)]
    close(weighted_mean(t, [0.2, 0.3, 0.5]), 0.2 * t[0] + 0.3 * t[1] + 0.5 * t[2])
    close(fisher_mean(t, [torch.full((3, 4), 2.0)] * 3), sum(t) / 3)
    close(fisher_mean(t, [torch.zeros(3, 4)] * 3), sum(t) / 3)
    F = [rand(3, 4, seed=9 + i).square() for i in range(3)]
    merged = fisher_mean(t, F, [1, 2, 3])
    for i in np.ndindex(3, 4):
        c = [k * float(f[i]) for k, f in zip((1, 2, 3), F, strict=True)]
        assert float(merged[i]) == pytest.approx(sum(k * float(x[i]) for k, x in zip(c, t, strict=True)) / sum(c))


def test_the_nearest_product_of_low_rank():
    Bs, As, w = [rand(OUT, 2, seed=i) for i in range(3)], [rand(2, D, seed=9 + i) for i in range(3)], [0.5, 0.3, 0.2]
    whole = sum(k * b @ a for k, b, a in zip(w, Bs, As, strict=True))
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    B, A = low_rank_sum(Bs, As, w, 2)
    close(B @ A, (U[:, :2] * S[:2]) @ Vh[:2])
    close(B.T @ B, A @ A.T)  # split evenly
    B, A = low_rank_sum(Bs, As, w, 6)
    close(B @ A, whole)
    assert B.shape == (OUT, 6) and A.shape == (6, D)
    B, A = low_rank_sum(Bs[:1], As[:1], [1.0], 2)
    close(B @ A, Bs[0] @ As[0])


# ---- task vectors


@pytest.mark.parametrize("keep", [0.2, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [7, 10, 101])
def test_trimming_agrees_with_numpys_quantile(keep, n):
    tau = rand(n, seed=n)
    size = tau.abs().numpy()
    want = torch.where(torch.from_numpy(size < np.quantile(size, 1 - keep)), 0, tau)
    assert torch.equal(trim(tau, keep), want)


def test_ties_by_hand():
    """Three clients, four coordinates: agreement, a minority, a tie of opposite signs, one that is zero."""
    tau = [torch.tensor(t) for t in ([1.0, 3.0, 2.0, 0.0], [2.0, -1.0, -2.0, 0.0], [3.0, 4.0, 0.0, 0.0])]
    assert ties_merge(tau, 1.0, undecided="zero").tolist() == [2.0, 3.5, 0.0, 0.0]
    assert ties_merge(tau, 1.0, undecided="majority").tolist() == [2.0, 3.5, 2.0, 0.0]
    assert ties_merge(tau, 1.0, reduce="sum", undecided="zero").tolist() == [6.0, 7.0, 0.0, 0.0]
    # the upper half of each: [_, 3, 2, _], [2, _, -2, _] (the 1 goes), [3, 4, _, _]
    assert ties_merge(tau, 0.5, undecided="zero").tolist() == [2.5, 3.5, 0.0, 0.0]
    assert torch.equal(ties_merge(tau[:1], 1.0), tau[0])
    assert ties_merge([tau[0], -tau[0]], 1.0, undecided="zero").abs().max() == 0


def test_task_arithmetic():
    start, taus = rand(6), [rand(6, seed=i) for i in (1, 2)]
    close(task_arithmetic(start, taus, 0.3), start + 0.3 * (taus[0] + taus[1]))
    close(task_arithmetic(start, [t - start for t in taus], 0.5), (taus[0] + taus[1]) / 2)


def test_dare_is_unbiased():
    tau, generator = rand(8), torch.Generator().manual_seed(0)
    assert torch.equal(dare(tau, 0.0), tau)
    draws = torch.stack([dare(tau, 0.7, generator) for _ in range(10_000)])
    assert ((draws == 0).double().mean() - 0.7).abs() < 0.01
    assert ((draws.mean(0) - tau) / tau).abs().max() < 0.06  # a deviation of 1.5 % for each entry
    kept = draws[draws != 0].view(-1)
    assert (kept[:, None] - tau / 0.3).abs().min(1).values.max() < 1e-12


# ---- spectra


def orthonormal(n, k, seed):
    return torch.linalg.qr(rand(n, n, seed=seed))[0][:, :k]


def test_iso_c_makes_the_spectrum_of_the_sum_flat():
    taus = [rand(8, 12, seed=i) for i in range(3)]
    M, total = iso_c(taus), sum(taus)
    S = torch.linalg.svdvals(M)
    assert S.std() < 1e-10 and S[0] == pytest.approx(float(torch.linalg.svdvals(total).mean()))
    U, _, Vh = torch.linalg.svd(total, full_matrices=False)
    close(U.T @ M @ Vh.T, S[0] * torch.eye(8, dtype=torch.float64))  # the directions are those of the sum
    flat = 3 * orthonormal(8, 8, 1) @ orthonormal(12, 8, 2).T
    close(iso_c([flat]), flat)


def test_iso_cts_joins_common_and_own_directions():
    """10 directions of which 8 are common leave one each for 2 tasks, outside the common ones as far as they can be."""
    taus = [rand(10, 15, seed=i) * torch.logspace(0, -2, 15) for i in range(2)]
    M = iso_cts(taus)
    S = torch.linalg.svdvals(M)
    assert len(S) == 10 and S.std() < 1e-10
    U, spectrum, Vh = torch.linalg.svd(sum(taus), full_matrices=False)
    own = [torch.linalg.svd(t - U[:, :8] @ U[:, :8].T @ t, full_matrices=False) for t in taus]
    want = torch.cat([own[0][1][:1], own[1][1][:1], spectrum[:8]]).mean()
    assert S[0] == pytest.approx(float(want))
    left = torch.cat([own[0][0][:, :1], own[1][0][:, :1], U[:, :8]], 1)
    right = torch.cat([own[0][2][:1], own[1][2][:1], Vh[:8]])

    def nearest(A):  # orthonormal columns nearest to A: A (A^T A)^-1/2
        values, vectors = torch.linalg.eigh(A.T @ A)
        return A @ (vectors * values**-0.5) @ vectors.T

    close(M, S[0] * nearest(left) @ nearest(right.T).T, rtol=1e-6)
    close(iso_cts(taus, common=1.0), iso_c(taus))


def test_tsv_m():
    tau = rand(6, 9, seed=3)
    close(tsv_m([tau]), tau)
    left, right = orthonormal(8, 8, 4), orthonormal(12, 8, 5)
    apart = [(left[:, i : i + 4] * torch.tensor([4.0, 3, 2, 1])) @ right[:, i : i + 4].T for i in (0, 4)]
    close(tsv_m(apart), sum(apart))  # what is orthogonal is added up
    ranks = [torch.linalg.matrix_rank(tsv_m([rand(7, 9, seed=i) for i in range(n)])) for n in (2, 3)]
    assert [int(r) for r in ranks] == [6, 6]  # 7 // 2 of each of 2, 7 // 3 of each of 3


def test_wudi():
    taus = [rand(6, 4, seed=i) for i in range(3)]

    def loss(M):
        return sum(((M - t) @ t.T).square().sum() / t.square().sum() for t in taus)

    start = sum(taus)
    M = wudi(taus, steps=0).requires_grad_()
    loss(M).backward()
    assert M.grad.abs().max() < 1e-8 * loss(start)
    moved = wudi(taus, steps=400, lr=1e-3)
    leaf = start.clone().requires_grad_()  # autograd's Adam walks the same way
    opt = torch.optim.Adam([leaf], lr=1e-3)
    for _ in range(400):
        opt.zero_grad()
        loss(leaf).backward()
        opt.step()
    close(moved, leaf.detach())
    assert loss(M.detach()) <= loss(moved) < loss(start)
    close(wudi([rand(9, 4, seed=2)], steps=0), rand(9, 4, seed=2))
