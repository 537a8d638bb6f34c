"""Soft-DTW against enumeration of all paths, finite differences, hard DTW, closed forms and a plain triple loop."""

import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.utils.soft_dtw import (
    MAX_PATHS,
    alignment_loss,
    count_paths,
    half_squared_distances,
    path_matrix,
    self_soft_dtw,
    soft_dtw,
    soft_dtw_divergence,
)

METHODS = ["paths", "wavefront"]
B, K = 5, 3
both = pytest.mark.parametrize("method", METHODS)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def costs(m, n, seed=0, scale=1.0, batch=B):
    """Random costs of both signs: nothing here may rely on distances."""
    return (scale * rand(batch, m, n, seed=seed)).requires_grad_()


def delannoy(m, n):
    """Number of paths through m x n cells in closed form."""
    return sum(math.comb(m - 1, k) * math.comb(n - 1, k) * 2**k for k in range(min(m, n)))


def all_paths(m, n, i=0, j=0):
    """Every path from (i, j) to (m - 1, n - 1), one step at a time."""
    if (i, j) == (m - 1, n - 1):
        yield [(i, j)]
    for down, right in ((0, 1), (1, 0), (1, 1)):
        if i + down < m and j + right < n:
            for rest in all_paths(m, n, i + down, j + right):
                yield [(i, j), *rest]


def brute_force(C, gamma):
    """-g log sum over paths exp(-cost / g), the smallest cost taken out."""
    sums = []
    for path in all_paths(*C.shape[1:]):
        rows, columns = zip(*path)
        sums.append(C[:, rows, columns].sum(1))
    sums = torch.stack(sums, 1)
    low = sums.detach().amin(1, keepdim=True)
    return low[:, 0] - gamma * torch.exp((low - sums) / gamma).sum(1).log()


def recursion(C, gamma):
    """Algorithm 1, cell by cell."""
    m, n = C.shape[1:]
    V = {(i, j): C.new_full((len(C),), float("inf")) for i in range(-1, m) for j in range(-1, n)}
    V[-1, -1] = C.new_zeros(len(C))
    for i, j in product(range(m), range(n)):
        before = torch.stack([V[i, j - 1], V[i - 1, j - 1], V[i - 1, j]])
        V[i, j] = C[:, i, j] - gamma * torch.logsumexp(-before / gamma, 0)
    return V[m - 1, n - 1]


def naive_S(X, Y, gamma):
    return recursion((X[:, :, None] - Y[:, None]).square().sum(-1) / 2, gamma)


def naive_D(X, Y, gamma, normalise):
    D = naive_S(X, Y, gamma) - naive_S(X, X, gamma) / 2 - naive_S(Y, Y, gamma) / 2
    return D / ((X.shape[1] + Y.shape[1]) / 2) if normalise else D


def close(a, b, atol=1e-12, rtol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def same_value_and_gradient(a, b, inputs, **tolerance):
    close(a, b, **tolerance)
    weights = rand(*a.shape, seed=99, dtype=a.dtype)
    for x, y in zip(
        torch.autograd.grad((a * weights).sum(), inputs), torch.autograd.grad((b * weights).sum(), inputs), strict=True
    ):
        close(x, y, **tolerance)


class Seen(TorchDispatchMode):
    """Names of the operations that run, and the precision of products in force at each product."""

    def __init__(self):
        super().__init__()
        self.names, self.precisions = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] in ("mm", "bmm", "addmm", "baddbmm"):
            self.precisions.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


# ---- Soft-DTW


@both
@pytest.mark.parametrize("m, n", [*product(range(1, 5), range(1, 5)), (5, 5), (6, 4), (6, 6), (4, 8), (1, 9), (9, 1)])
def test_brute_force(m, n, method):
    for gamma in (0.3, 1.0) if m * n < 30 else (0.7,):
        C = costs(m, n, seed=m + n, batch=2)
        same_value_and_gradient(soft_dtw(C, gamma, method=method), brute_force(C, gamma), C)


@pytest.mark.parametrize("m, n", [(8, 9), (16, 16), (3, 20), (20, 3)])
def test_the_recursion_cell_by_cell(m, n):
    C = costs(m, n)
    same_value_and_gradient(soft_dtw(C, 0.5), recursion(C, 0.5), C)


@both
@pytest.mark.parametrize("m, n", [(1, 1), (1, 4), (3, 1), (3, 4), (4, 2)])
def test_finite_differences(m, n, method):
    def f(C):
        return soft_dtw(C, 0.8, method=method)

    assert torch.autograd.gradcheck(f, costs(m, n, batch=2))
    if method == "paths":
        assert torch.autograd.gradgradcheck(f, costs(m, n, batch=2))
    else:
        C = costs(m, n, batch=2)
        with pytest.raises(RuntimeError, match="differentiable once: .*'paths'"):
            torch.autograd.grad(f(C).sum(), C, create_graph=True)


@both
@pytest.mark.parametrize("m, n", [(2, 2), (4, 4), (5, 3), (1, 6)])
def test_tends_to_hard_dtw(m, n, method):
    C, gamma = costs(m, n), 1e-4
    best = torch.stack([sum(C[:, i, j] for i, j in path) for path in all_paths(m, n)]).amin(0)
    gap = best - soft_dtw(C, gamma, method=method)
    assert (gap > -1e-12).all() and (gap <= gamma * math.log(delannoy(m, n)) + 1e-12).all()
    (E,) = torch.autograd.grad(soft_dtw(C, gamma, method=method).sum(), C)
    close((E * C).sum((1, 2)), best, atol=1e-6)


@both
@pytest.mark.parametrize("m, n", [(1, 1), (2, 5), (4, 4), (7, 3), (12, 16)])
def test_the_gradient_is_an_expected_path(m, n, method):
    if method == "paths" and m * n > 100:
        pytest.skip("too many paths")
    C = costs(m, n, scale=3)
    (E,) = torch.autograd.grad(soft_dtw(C, 0.5, method=method).sum(), C)
    assert (E >= 0).all() and (E <= 1 + 1e-12).all()
    assert (E.sum(1) >= 1 - 1e-12).all() and (E.sum(2) >= 1 - 1e-12).all()  # every path visits each row and column
    close(E[:, 0, 0], torch.ones(B).double())
    close(E[:, -1, -1], torch.ones(B).double())


@both
@pytest.mark.parametrize("m, n", [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (6, 6)])
def test_without_costs_it_counts_paths(m, n, method):
    S = soft_dtw(torch.zeros(2, m, n, dtype=torch.float64), 0.6, method=method)
    close(S, torch.full_like(S, -0.6 * math.log(delannoy(m, n))))


def test_numbers_of_paths():
    for (m, n), number in {(2, 2): 3, (2, 4): 7, (4, 4): 63, (4, 8): 575, (6, 6): 1683, (8, 8): 48639}.items():
        assert count_paths(m, n) == count_paths(n, m) == number == delannoy(m, n)
    A = path_matrix(4, 5, torch.device("cpu"), torch.float64)
    assert A.shape == (20, count_paths(4, 5)) and len(A.T.unique(dim=0)) == A.shape[1]
    assert A is path_matrix(4, 5, torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match="paths, too many to list"):
        soft_dtw(torch.zeros(1, 12, 12), method="paths")


@both
def test_samples_do_not_meet(method):
    C = costs(4, 6)

    def S(C):
        return soft_dtw(C, 1.0, method=method)

    order = torch.tensor([3, 0, 4, 1, 2])
    same_value_and_gradient(S(C[order]), S(C)[order], C)
    same_value_and_gradient(torch.cat([S(C[i : i + 1]) for i in range(B)]), S(C), C)
    (E,) = torch.autograd.grad(S(C)[2], C)
    assert E[2].any() and not E[[0, 1, 3, 4]].any()
    assert soft_dtw(C[:0], 1.0, method=method).shape == (0,)


@both
@pytest.mark.parametrize("m, n", [(4, 4), (4, 8), (16, 20)])
def test_float32(m, n, method):
    if method == "paths" and m * n > 100:
        pytest.skip("too many paths")
    C = costs(m, n)
    narrow = C.detach().float().requires_grad_()
    S, s = soft_dtw(C, 0.5, method=method), soft_dtw(narrow, 0.5, method=method)
    assert s.dtype == torch.float32
    close(s.double(), S, rtol=1e-5, atol=1e-5)
    (E,), (e,) = torch.autograd.grad(S.sum(), C), torch.autograd.grad(s.sum(), narrow)
    close(e.double(), E, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("scale", [300.0, 5000.0])
def test_large_costs(method, scale):
    C = (scale * rand(B, 4, 8).abs()).requires_grad_()
    narrow = C.detach().float().requires_grad_()
    S, s = soft_dtw(C, 1.0, method=method), soft_dtw(narrow, 1.0, method=method)
    close(S, recursion(C, 1.0), rtol=1e-12)
    close(s.double(), S, rtol=1e-6)
    (e,) = torch.autograd.grad(s.sum(), narrow)
    assert e.isfinite().all()
    close(e.double(), torch.autograd.grad(S.sum(), C)[0], atol=1e-2)


def test_the_choice_of_the_method():
    """Few paths: a product; many: none. The threshold is between the two."""
    assert count_paths(4, 8) <= MAX_PATHS < count_paths(8, 8)
    for n, products in ((4, 1), (8, 0)):
        with Seen() as seen:
            soft_dtw(torch.zeros(2, n, n))
        assert len(seen.precisions) == products


def test_wrong_arguments():
    C = torch.zeros(2, 3, 3)
    X, Y = torch.zeros(2, 3, K), torch.zeros(2, 4, K)
    for gamma in (0, -1.0, float("nan"), float("inf")):
        for call in (
            lambda g: soft_dtw(C, g),
            lambda g: soft_dtw_divergence(X, Y, g),
            lambda g: self_soft_dtw(X, g),
            lambda g: alignment_loss(X, X, (X, X, X), g),
        ):
            with pytest.raises(ValueError, match="gamma.* must be above 0") as e:
                call(gamma)
            assert "\n" not in str(e.value)
    for shape in ((2, 0, 3), (2, 3, 0), (3, 3)):
        with pytest.raises(ValueError, match="m, n > 0"):
            soft_dtw(torch.zeros(shape))
    for other in (X[:, :0], Y[:1], Y[..., :2], Y[0]):
        with pytest.raises(ValueError, match="sequences are"):
            soft_dtw_divergence(X, other)
    with pytest.raises(ValueError, match="unknown method"):
        soft_dtw(C, method="fast")
    with pytest.raises(ValueError, match="leave self_term at True"):
        soft_dtw_divergence(X, Y.requires_grad_(), self_term=False)


# ---- distances and divergence


def test_half_squared_distances():
    X, Y = rand(B, 4, K).requires_grad_(), rand(B, 6, K, seed=1).requires_grad_()
    plain = (X[:, :, None] - Y[:, None]).square().sum(-1) / 2
    same_value_and_gradient(half_squared_distances(X, Y), plain, (X, Y))
    assert torch.autograd.gradcheck(half_squared_distances, (X, Y))
    assert torch.autograd.gradgradcheck(half_squared_distances, (X, Y))
    # logits of which only the last digits differ
    far = (1000 + rand(B, 4, K)).float()
    near = far + 2**-10
    close(half_squared_distances(far, near).diagonal(dim1=1, dim2=2), torch.full((B, 4), K * 2.0**-21), rtol=1e-6)
    assert not half_squared_distances(far, far).diagonal(dim1=1, dim2=2).any()


@both
@pytest.mark.parametrize("m, n", [(1, 1), (2, 1), (3, 3), (2, 4), (4, 3)])
@pytest.mark.parametrize("normalise", [True, False])
def test_divergence(m, n, normalise, method):
    X, Y = rand(B, m, K).requires_grad_(), rand(B, n, K, seed=1).requires_grad_()

    def D(X, Y, **more):
        return soft_dtw_divergence(X, Y, 0.7, normalise, method=method, **more)

    same_value_and_gradient(D(X, Y), naive_D(X, Y, 0.7, normalise), (X, Y))
    constant = Y.detach()
    same_value_and_gradient(D(X, constant), naive_D(X, constant, 0.7, normalise), X)
    own = self_soft_dtw(Y, 0.7)
    assert not own.requires_grad
    same_value_and_gradient(D(X, constant, self_term=own), D(X, constant), X)
    offset = own / 2 / ((m + n) / 2 if normalise else 1)
    same_value_and_gradient(D(X, constant, self_term=False), D(X, constant) + offset, X)
    close(D(X, Y), D(Y, X))
    assert torch.autograd.gradcheck(D, (X, Y))
    if method == "paths" and normalise and m * n <= 8:
        assert torch.autograd.gradgradcheck(D, (X, Y))


@both
def test_divergence_of_equal_sequences(method):
    for scale in (1, 20):
        X = (scale * rand(B, 4, K)).requires_grad_()
        Y = X.detach().clone()
        D = soft_dtw_divergence(X, Y, method=method)
        close(D, torch.zeros(B).double(), atol=1e-10)
        close(torch.autograd.grad(D.sum(), X)[0], torch.zeros(B, 4, K).double(), atol=1e-10)
        assert soft_dtw_divergence(X, Y + 1, method=method).min() > 0.1


@pytest.mark.parametrize(
    "m, n, offset, normalised", [(2, 1, 0.549, 0.366), (4, 2, 0.675, 0.225), (2, 4, 0.675, 0.225), (4, 8, 1.113, 0.186)]
)
def test_floor_of_constant_sequences(m, n, offset, normalised):
    """Different lengths of one constant sequence: logarithms of Delannoy numbers are left."""
    x = rand(B, 1, K)
    X, Y = x.expand(B, m, K), x.expand(B, n, K)
    exact = (math.log(delannoy(m, m)) + math.log(delannoy(n, n))) / 2 - math.log(delannoy(m, n))
    assert exact == pytest.approx(offset, abs=5e-4)
    close(soft_dtw_divergence(X, Y, normalise=False), torch.full((B,), exact, dtype=torch.float64))
    close(soft_dtw_divergence(X, Y), torch.full((B,), normalised).double(), atol=5e-4)


# ---- the loss of STAER


def logits(T, batch=B, half=None, seed=0, dtype=torch.float64):
    """o1, o2 and the stored logits of T/2, T and 2T steps."""
    o1 = rand(batch, T, K, seed=seed, dtype=dtype).requires_grad_()
    o2 = rand(batch // 2 if half is None else half, T, K, seed=seed + 1, dtype=dtype).requires_grad_()
    return o1, o2, [rand(batch, t, K, seed=seed + t, dtype=dtype) for t in (T // 2, T, 2 * T)]


def naive_alignment(o1, o2, stored, gamma, alpha1, alpha2, normalise=True):
    half = len(o2)
    loss = naive_D(o1, stored[1], gamma, normalise).mean()
    if half:
        loss = loss + alpha1 * naive_D(o2, stored[0][:half], gamma, normalise).mean()
        loss = loss + alpha2 * naive_D(o2, stored[2][:half], gamma, normalise).mean()
    return loss / (1 + alpha1 + alpha2)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("T", [2, 4, 8])
@pytest.mark.parametrize("normalise", [True, False])
def test_alignment_loss(T, method, normalise):
    if method == "paths" and T == 8:
        pytest.skip("too many paths")
    o1, o2, stored = logits(T)

    def truth(gamma, alphas):
        return naive_alignment(o1, o2, stored, gamma, *alphas, normalise)

    for gamma, alphas in ((1.0, (0.5, 0.5)), (0.4, (0.2, 1.5))):
        own = [self_soft_dtw(p, gamma) for p in stored]
        gradients = []
        for given in (own, True, False):
            if given is True and (T, method) == (4, "paths"):
                continue  # 8 x 8 has too many for a short test
            mine = alignment_loss(o1, o2, stored, gamma, *alphas, normalise, stored_self=given, method=method)
            gradients.append(torch.autograd.grad(mine, (o1, o2), retain_graph=True))
            assert mine.shape == ()
            if given is not False:
                same_value_and_gradient(mine, truth(gamma, alphas), (o1, o2))
        for some in gradients:
            assert all(torch.equal(a, b) for a, b in zip(some, gradients[0], strict=True))


def test_odd_lengths_small_batches_and_a_shared_forward():
    for T, batch in ((5, 3), (3, 2), (2, 1), (4, 1)):
        o1, o2, stored = logits(T, batch)
        for half in (o2,) if len(o2) else (o2, None):
            truth = naive_alignment(o1, o2, stored, 0.9, 0.5, 0.5)
            inputs = (o1, o2) if len(o2) else (o1,)
            same_value_and_gradient(alignment_loss(o1, half, stored, 0.9), truth, inputs)
    o1, _, stored = logits(4)
    shared = o1[:2]
    same_value_and_gradient(alignment_loss(o1, shared, stored), naive_alignment(o1, shared, stored, 1, 0.5, 0.5), o1)
    with pytest.raises(ValueError, match="at least one sample"):
        alignment_loss(o1[:0], None, stored)
    with pytest.raises(ValueError, match="5 current samples, but 4 stored"):
        alignment_loss(o1, shared, [p[:4] for p in stored])
    with pytest.raises(ValueError, match="5 current samples, but 0 stored"):
        alignment_loss(o1, shared, (stored[0], None, stored[2]))
    with pytest.raises(ValueError, match="at least 0"):
        alignment_loss(o1, shared, stored, alpha1=-0.5)


@pytest.mark.parametrize("alphas, used", [((0, 0.5), [1, 2]), ((0.5, 0), [0, 1]), ((0, 0), [1])])
def test_terms_of_weight_zero_are_not_computed(alphas, used):
    o1, o2, stored = logits(4)

    def truth():
        return naive_alignment(o1, o2, stored, 1.0, *alphas)

    alone = [p if i in used else None for i, p in enumerate(stored)]
    inputs = (o1, o2) if len(used) > 1 else (o1,)
    same_value_and_gradient(alignment_loss(o1, o2, alone, 1.0, *alphas), truth(), inputs)
    own = [None if p is None else self_soft_dtw(p) for p in alone]
    same_value_and_gradient(alignment_loss(o1, o2, alone, 1.0, *alphas, stored_self=own), truth(), inputs)
    if len(used) == 1:  # then nothing comes from o2, either
        assert alignment_loss(o1, o2 * float("nan"), alone, 1.0, *alphas).isfinite()


def test_stored_logits_are_constants():
    o1, o2, stored = logits(4)
    for p in stored:
        p.requires_grad_()
    alignment_loss(o1, o2, stored).backward()
    assert o1.grad.any() and o2.grad.any() and all(p.grad is None for p in stored)
    with torch.no_grad():
        assert not alignment_loss(o1, o2, stored).requires_grad


def test_large_logits():
    for T in (4, 8):
        o1, o2, stored = logits(T)
        large = [(40 * x.detach()).float().requires_grad_() for x in (o1, o2)]
        wide = [x.detach().double().requires_grad_() for x in large]
        stored = [(40 * p).float() for p in stored]
        assert half_squared_distances(large[0], stored[1]).max() > 3000
        loss, truth = alignment_loss(*large, stored), alignment_loss(*wide, [p.double() for p in stored])
        close(loss.double(), truth, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(loss, large), torch.autograd.grad(truth, wide), strict=True):
            assert a.isfinite().all()
            close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


# ---- precision and devices


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method):
    def run():
        o1, o2, stored = logits(2, dtype=torch.float32)
        X = rand(B, 4, K, dtype=torch.float32).requires_grad_()
        loss = (
            alignment_loss(o1, o2, stored, method=method) + soft_dtw_divergence(X, X.detach() + 1, method=method).sum()
        )
        return [loss.detach(), *torch.autograd.grad(loss, (o1, o2, X))]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        probe = torch.ones(2, 2) @ torch.ones(2, 2)
        within = run()
    assert probe.dtype == torch.bfloat16
    for a, b in zip(within, plain, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_products_are_not_rounded(method):
    o1, o2, stored = logits(2, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Seen() as seen:
            alignment_loss(o1, o2, stored, method=method).backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen.precisions) == {"highest"}


@pytest.mark.parametrize("T", [4, 8])
def test_nothing_waits_for_the_device(T):
    o1, o2, stored = logits(T, dtype=torch.float32)
    alignment_loss(o1, o2, stored)
    with Seen() as seen:
        alignment_loss(o1, o2, stored).backward()
        soft_dtw_divergence(o1, stored[1]).sum().backward()
    assert "logaddexp" in seen.names
    assert not {"_local_scalar_dense", "item", "nonzero", "equal"} & set(seen.names)


def test_narrow_logits_are_widened():
    o1, o2, stored = logits(4)
    narrow = [x.detach().bfloat16() for x in (o1, o2)]
    stored = [p.bfloat16() for p in stored]
    loss = alignment_loss(*narrow, stored)
    assert loss.dtype == torch.float32
    close(loss, alignment_loss(*(x.float() for x in narrow), [p.float() for p in stored]), rtol=1e-6)
    close(soft_dtw(narrow[0]), soft_dtw(narrow[0].float()), rtol=0)
    assert soft_dtw(o1).dtype == torch.float64


def test_what_is_kept_from_inference_serves_training():
    with torch.inference_mode():
        soft_dtw(torch.zeros(1, 3, 7, dtype=torch.float64))
        alignment_loss(*(x.detach() for x in logits(6, 7)[:2]), logits(6, 7)[2])
    C = costs(3, 7)
    same_value_and_gradient(soft_dtw(C), recursion(C, 1.0), C)
    o1, o2, stored = logits(6, 7)
    alignment_loss(o1, o2, stored).backward()
    assert o1.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both
def test_cuda_equals_cpu(method):
    torch.set_float32_matmul_precision("medium")
    try:
        for m, n in ((4, 4), (4, 8), (1, 5)):
            C = costs(m, n)
            same_value_and_gradient(soft_dtw(C.cuda(), 0.7, method=method).cpu(), soft_dtw(C, 0.7, method=method), C)
        results = []
        for device in ("cpu", "cuda"):
            o1, o2, stored = logits(2, dtype=torch.float32)
            loss = alignment_loss(o1.to(device), o2.to(device), [p.to(device) for p in stored], method=method)
            results.append([loss.detach().cpu(), *torch.autograd.grad(loss, (o1, o2))])
        for a, b in zip(*results, strict=True):
            close(a, b, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision("highest")
