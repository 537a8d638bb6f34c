"""Soft-DTW of short sequences, its divergence, and the temporal alignment loss of STAER (arXiv 2601.20870).

Soft-DTW (Cuturi and Blondel, ICML 2017, arXiv 1703.01541) is the soft minimum, over all monotone paths from cell (0, 0)
to cell (m - 1, n - 1) of a cost matrix C, of the costs along a path:

    S_g(C) = -g log sum_{A in paths(m, n)} exp(-<A, C> / g)                                          (eq. 2)
    V_ij   = C_ij + softmin_g(V_i,j-1, V_i-1,j-1, V_i-1,j),     S_g(C) = V_m-1,n-1                   (Algorithm 1)
    E      = dS/dC, the expectation of A, by the same recursion backwards                            (Algorithm 2)

The divergence takes off what S gives two equal sequences (Blondel, Mensch and Vert, AISTATS 2021, arXiv 2010.08354):

    D(X, Y) = S(C_xy) - S(C_xx) / 2 - S(C_yy) / 2,      C_ij = |x_i - y_j|^2 / 2

D(X, X) = 0. With m != n it has a floor above zero even for one constant sequence: the logarithms of the numbers of
paths do not cancel. Costs, values and gamma have the unit of a squared logit; C is finite.

Two exact ways, alike in value and gradient up to rounding. *Paths*: the formula as it is written, with all paths as the
columns of a 0/1 matrix, which is kept; one product and one logsumexp, differentiable any number of times. *Wavefront*:
the recursion over anti-diagonals, m + n - 1 steps over all cells of a diagonal and all samples; differentiable once.
Sequences of different lengths share a sweep. Everything is float32 at least and never rounded to TF32 or bfloat16,
also under autocast; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from backbones.utils.moments import exact_float32

Method = Literal["auto", "paths", "wavefront"]
MAX_PATHS = 1000  # beyond it a sweep is faster than the product with all paths
BORDER = -1e30  # minus infinity, of which no difference is undefined
ENUMERABLE = 1_000_000  # more paths than this are never listed


def _checked(gamma: float, method: Method = "auto") -> float:
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma, the smoothing of Soft-DTW, must be above 0 and finite, not {gamma}")
    if method not in ("auto", "paths", "wavefront"):
        raise ValueError(f"unknown method {method!r} of Soft-DTW: 'auto', 'paths' or 'wavefront'")
    return float(gamma)


def _wide(x: Tensor) -> Tensor:
    """x in float32 if it was narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Product(torch.autograd.Function):
    """a @ b, at full precision forwards, backwards and beyond."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False), exact_float32():
            return a @ b

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return (
            _Product.apply(grad, b.mT) if ctx.needs_input_grad[0] else None,
            _Product.apply(a.mT, grad) if ctx.needs_input_grad[1] else None,
        )


class _Costs(torch.autograd.Function):
    """``half_squared_distances`` without a tensor of all differences."""

    @staticmethod
    def forward(ctx, X: Tensor, Y: Tensor) -> Tensor:
        ctx.save_for_backward(X, Y)
        return torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist").square_().div_(2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        X, Y = ctx.saved_tensors
        return (
            grad.sum(2, keepdim=True) * X - _Product.apply(grad, Y) if ctx.needs_input_grad[0] else None,
            grad.sum(1)[:, :, None] * Y - _Product.apply(grad.mT, X) if ctx.needs_input_grad[1] else None,
        )


# ---------------------------------------------------------------- all paths


@lru_cache(maxsize=1024)
def count_paths(m: int, n: int) -> int:
    """Number of monotone paths through m x n cells, the Delannoy number D(m - 1, n - 1)."""
    row = [1] * n
    for _ in range(m - 1):
        above, row = row, [1]
        for j in range(1, n):
            row.append(row[-1] + above[j] + above[j - 1])
    return row[-1]


@lru_cache(maxsize=64)
def path_matrix(m: int, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All monotone paths through m x n cells, (m n, paths): 1 where a path visits a cell.

    The tensor is kept for the next call: it must not be written to.

    Raises:
        ValueError: more than a million paths.
    """
    if count_paths(m, n) > ENUMERABLE:
        raise ValueError(f"{m} x {n} cells have {count_paths(m, n)} paths, too many to list: use the wavefront")
    with torch.inference_mode(False):  # a kept tensor must serve training, whoever asks for it first
        above: list[Tensor] = []
        for i in range(m):
            row: list[Tensor] = []
            for j in range(n):
                before = [row[j - 1]] if j else []
                before += above[max(j - 1, 0) : j + 1]
                paths = torch.cat(before, 1) if before else torch.zeros(m * n, 1, dtype=torch.bool)
                paths[i * n + j] = True
                row.append(paths)
            above = row
        return above[-1].to(device, dtype)


def _by_paths(C: Tensor, gamma: float) -> Tensor:
    A = path_matrix(*C.shape[1:], C.device, C.dtype)
    return torch.logsumexp(_Product.apply(C.flatten(1) / -gamma, A), 1) * -gamma


# ---------------------------------------------------------------- wavefront


def _cells(R: Tensor, n: int) -> Tensor:
    """The cells (m, n, B) of a state (m + n + 1, m + 1, B), as a view: (i, j) is at (i + j + 2, i + 1)."""
    _, above, B = R.shape
    row = above * B
    return R[2:, 1:].as_strided((above - 1, n, B), (row + B, row, 1))


class _Wavefront(torch.autograd.Function):
    """S_g of (B, m, n) costs, read for each of several blocks of samples at a cell of its own.

    The state is R = -V / g, with a border that stands for minus infinity, and 0 at the one entry of it that comes
    diagonally before the first cell. So a cell is the logsumexp of three entries, less C_ij / g. On the way back the
    shares P of the three add up to 1: rounding in R changes where E flows, but loses none of it.

    Args:
        ends: (samples, rows, columns, factor) of each block. Cells beyond its last one are padding, with any finite
            cost. The factor multiplies its gradient.
    """

    @staticmethod
    def forward(ctx, C: Tensor, gamma: float, ends: Sequence[tuple[int, int, int, int]]) -> Tensor:
        B, m, n = C.shape
        R = C.new_full((m + n + 1, m + 1, B), BORDER)
        R[0, 0] = 0
        _cells(R, n).copy_(C.permute(1, 2, 0)).div_(-gamma)
        here, above, best = R[:, 1:].unbind(), R[:, :-1].unbind(), C.new_empty(m, B)  # entries i and i - 1
        for d in range(2, m + n + 1):
            torch.logaddexp(here[d - 1], above[d - 1], out=best)
            here[d].add_(torch.logaddexp(best, above[d - 2], out=best))
        ctx.save_for_backward(R)
        ctx.ends, ctx.n = ends, n
        return torch.cat([R[p, q, part] for p, q, part, _ in _Wavefront.places(ends)]) * -gamma

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph: E would pass for a constant
            raise RuntimeError("the wavefront of Soft-DTW is differentiable once: a second time takes method='paths'")
        (R,) = ctx.saved_tensors
        P = torch.stack([R[1:-1, 1:], R[1:-1, :-1], R[:-2, :-1]])  # a softmax over these; outside the matrix E is 0
        P.sub_(P.amax(0)).exp_()
        P.div_(P.sum(0))
        E = torch.zeros_like(R)
        for p, q, part, factor in _Wavefront.places(ctx.ends):
            torch.mul(grad[part], factor, out=E[p, q, part])
        here, above = E[:, 1:].unbind(), E[:, :-1].unbind()
        left, up, diagonal = (p.unbind() for p in P)
        for d in range(len(left) + 1, 1, -1):
            here[d - 1].addcmul_(left[d - 2], here[d])
            above[d - 1].addcmul_(up[d - 2], here[d])
            above[d - 2].addcmul_(diagonal[d - 2], here[d])
        return _cells(E, ctx.n).permute(2, 0, 1).contiguous(), None, None

    @staticmethod
    def places(ends: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, slice, int]]:
        """Where R holds the last cell of each block, with the factor."""
        out, start = [], 0
        for samples, rows, columns, factor in ends:
            out.append((rows + columns, rows, slice(start, start + samples), factor))
            start += samples
        return out


# ---------------------------------------------------------------- Soft-DTW


def soft_dtw(C: Tensor, gamma: float = 1.0, *, method: Method = "auto") -> Tensor:
    """S_g(C) (B,) of cost matrices C (B, m, n) (Cuturi and Blondel 2017, eq. 2). It may be negative.

    Args:
        gamma: smoothing, above 0, in the unit of C; S tends to the cost of the best path (DTW) as gamma tends to 0.
        method: 'paths', 'wavefront', or what is faster for m and n.

    Returns:
        float32, or float64 if C is.

    Raises:
        ValueError: gamma is not above 0, C is not (B, m, n), m or n is 0, or there are too many paths to list.
    """
    gamma = _checked(gamma, method)
    if C.dim() != 3 or not (C.shape[1] and C.shape[2]):
        raise ValueError(f"Soft-DTW needs costs (B, m, n) with m, n > 0, not {tuple(C.shape)}")
    B, m, n = C.shape
    if method == "paths" or (method == "auto" and count_paths(m, n) <= MAX_PATHS):
        return _by_paths(_wide(C), gamma)
    return _Wavefront.apply(_wide(C), gamma, [(B, m, n, 1)])


def _check_sequences(X: Tensor, Y: Tensor) -> None:
    if X.dim() != 3 or Y.dim() != 3 or X.shape[::2] != Y.shape[::2] or not (X.shape[1] and Y.shape[1]):
        raise ValueError(
            f"sequences are (B, m, K) and (B, n, K) with m, n > 0, not {tuple(X.shape)} and {tuple(Y.shape)}"
        )


def half_squared_distances(X: Tensor, Y: Tensor) -> Tensor:
    """C_ij = |x_i - y_j|^2 / 2 (B, m, n) for X (B, m, K) and Y (B, n, K); float32 at least.

    By differences, so that no digits cancel for close sequences of large logits, and C_ii(X, X) = 0; yet without a
    (B, m, n, K) tensor of them.

    Raises:
        ValueError: shapes that do not fit, or empty sequences.
    """
    _check_sequences(X, Y)
    return _Costs.apply(_wide(X), _wide(Y))


def _of_pairs(pairs: Sequence[tuple[Tensor, Tensor]], gamma: float, method: Method) -> Tensor:
    """S_g of the half squared distances of pairs X_k (B_k, m_k, K), Y_k (B_k, n_k, K), in a row: (sum of B_k,).

    All of them share one product with all paths, if they have equal lengths and few paths, or else one sweep, which is
    faster than a product for every length. Forced to 'paths', neighbours of equal lengths share a product.

    In a sweep only one side of S(X, X) is differentiated: E is symmetric like C, so the other side adds the same.
    """
    for X, Y in pairs:
        _check_sequences(X, Y)
    if method == "auto":
        lengths = {(X.shape[1], Y.shape[1]) for X, Y in pairs}
        method = "paths" if len(lengths) == 1 and count_paths(*lengths.pop()) <= MAX_PATHS else "wavefront"
    if method == "wavefront":
        ends = [(len(X), X.shape[1], Y.shape[1], 2 if X is Y else 1) for X, Y in pairs]
        return _Wavefront.apply(_joint_costs([(X, Y.detach() if X is Y else Y) for X, Y in pairs]), gamma, ends)
    alike = [[*group] for _, group in groupby(pairs, lambda p: (p[0].shape[1], p[1].shape[1]))]
    values = [_by_paths(_joint_costs(group), gamma) for group in alike]
    return values[0] if len(values) == 1 else torch.cat(values)


def _joint_costs(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    if len(pairs) == 1:
        return half_squared_distances(*pairs[0])
    return half_squared_distances(*(_stacked(side) for side in zip(*pairs, strict=True)))


def _stacked(sequences: Sequence[Tensor]) -> Tensor:
    """Sequences of any lengths as one batch, the shorter ones followed by zeros."""
    longest = max(x.shape[1] for x in sequences)
    return torch.cat([x if x.shape[1] == longest else pad(x, (0, 0, 0, longest - x.shape[1])) for x in sequences])


# ---------------------------------------------------------------- divergence


@torch.no_grad()
def self_soft_dtw(Y: Tensor, gamma: float = 1.0, *, method: Method = "auto") -> Tensor:
    """S_g(C_yy) (B,) of sequences Y (B, n, K), without gradient: what a divergence from a constant Y takes off once.

    Raises:
        ValueError: as ``soft_dtw`` and ``half_squared_distances``.
    """
    return _of_pairs([(Y, Y)], _checked(gamma, method), method)


def soft_dtw_divergence(
    X: Tensor,
    Y: Tensor,
    gamma: float = 1.0,
    normalise: bool = True,
    *,
    self_term: Tensor | bool = True,
    method: Method = "auto",
) -> Tensor:
    """D(X, Y) = S(C_xy) - S(C_xx) / 2 - S(C_yy) / 2 (B,) of X (B, m, K) and Y (B, n, K) (arXiv 2010.08354, eq. 9).

    Args:
        gamma: smoothing, above 0, in the unit of a squared logit.
        normalise: divide by (m + n) / 2, the mean length.
        self_term: S(C_yy). True: computed, without gradient unless Y needs one. A tensor (B,): given, as
            ``self_soft_dtw`` returns it for the same gamma. False: left out, for a Y without gradient; then the value
            is off by a constant and the gradient right.

    Raises:
        ValueError: as ``soft_dtw`` and ``half_squared_distances``, or a Y with gradient whose own term is left out.
    """
    gamma = _checked(gamma, method)
    learns = torch.is_grad_enabled() and Y.requires_grad
    if learns and self_term is not True:
        raise ValueError("Y needs a gradient, of which S(Y, Y) is a part: leave self_term at True or detach Y")
    pairs = [(X, Y), (X, X), (Y, Y)] if learns else [(X, Y), (X, X)]
    cross, own, *rest = _of_pairs(pairs, gamma, method).split(len(X))
    D = cross - own / 2
    if learns:
        D = D - rest[0] / 2
    elif self_term is not False:
        D = D - (self_soft_dtw(Y, gamma, method=method) if self_term is True else self_term) / 2
    return D / ((X.shape[1] + Y.shape[1]) / 2) if normalise else D


# ---------------------------------------------------------------- STAER


@lru_cache(maxsize=64)
def _weights(blocks: tuple[tuple[int, float], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A weight for each sample of blocks (samples, weight of their mean), kept like ``path_matrix``."""
    with torch.inference_mode(False):
        return torch.cat([torch.full((n,), w / n, dtype=dtype) for n, w in blocks]).to(device)


def _weighted(values: Tensor, blocks: Sequence[tuple[int, float]]) -> Tensor:
    return values.dot(_weights(tuple(blocks), values.device, values.dtype))


def alignment_loss(
    o1: Tensor,
    o2: Tensor | None,
    stored: Sequence[Tensor | None],
    gamma: float = 1.0,
    alpha1: float = 0.5,
    alpha2: float = 0.5,
    normalise: bool = True,
    *,
    stored_self: Sequence[Tensor | None] | bool = True,
    method: Method = "auto",
) -> Tensor:
    """The temporal alignment loss of STAER (arXiv 2601.20870), a scalar:

        (D(o1, p_T) + alpha1 D(o2, p_T/2) + alpha2 D(o2, p_2T)) / (1 + alpha1 + alpha2)

    Each D is ``soft_dtw_divergence``, averaged over its samples. S(o2, o2) is computed once, a term of weight 0 not at
    all. The stored logits are constants.

    Args:
        o1: logits (B, T, K) of the current network on samples of the buffer.
        o2: its logits (b, T, K) on the first b <= B of them. None or b = 0: there is neither contraction nor expansion;
            the divisor stays, so a sample's weight does not depend on it.
        stored: (p_T/2, p_T, p_2T), each (samples x its length x K) in the order of o1, with at least b, B and b
            samples; what is not used may be None.
        gamma: smoothing, above 0, in the unit of a squared logit.
        alpha1, alpha2: weights of contraction and expansion, at least 0.
        normalise: divide every divergence by the mean length of its two sequences.
        stored_self: S(p, p) of the three, as ``self_soft_dtw`` returns them for the same gamma; True: computed; False:
            left out, which changes the value by a constant and no gradient.

    Raises:
        ValueError: no samples, fewer stored ones than current ones, a negative weight, and as ``soft_dtw_divergence``.
    """
    gamma = _checked(gamma, method)
    if min(alpha1, alpha2) < 0:
        raise ValueError(f"alpha1 and alpha2 are at least 0, not {alpha1} and {alpha2}")
    if not len(o1):
        raise ValueError("the alignment loss needs at least one sample")
    terms = [(o1, 1, 1.0)]
    if o2 is not None and len(o2):
        terms += [(o2, i, float(a)) for i, a in ((0, alpha1), (2, alpha2)) if a]
    crosses, constants = [], []  # (current, stored, weight), (stored, its own S or None, weight)
    for o, i, alpha in terms:
        p = stored[i]
        if p is None or len(p) < len(o):
            raise ValueError(f"{len(o)} current samples, but {0 if p is None else len(p)} stored ones")
        p = p[: len(o)].detach()
        w = alpha / (1 + alpha1 + alpha2) / ((o.shape[1] + p.shape[1]) / 2 if normalise else 1)
        crosses.append((o, p, w))
        constants.append((p, None if isinstance(stored_self, bool) else stored_self[i], -w / 2))
    same, *half = crosses
    pairs = [same, (o1, o1, -same[2] / 2)]
    if half:  # those of equal lengths stand together
        pairs += [(o2, o2, -sum(w for *_, w in half) / 2), *half]
    loss = _weighted(_of_pairs([(x, y) for x, y, _ in pairs], gamma, method), [(len(x), w) for x, _, w in pairs])
    if stored_self is False:
        return loss
    with torch.no_grad():
        if stored_self is True:
            own = _of_pairs([(p, p) for p, *_ in constants], gamma, method)
        else:
            own = torch.cat([s[: len(p)] for p, s, _ in constants]).to(loss.dtype)
        own = _weighted(own, [(len(p), w) for p, _, w in constants])
    return loss + own
