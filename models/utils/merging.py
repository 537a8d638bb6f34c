"""Merging of weights that were trained apart: least squares over what layers see, means, Fisher weights, task vectors.

Pure tensor functions, used by federated servers and by merging after the fact. W is (o x d) as in ``nn.Linear``, its
inputs X are (n x d), a row per sample and token, and G = X^T X is their Gram matrix. Leading dimensions are a batch:
layers of equal shape are solved together.

    regression   (sum_i W_i G_i)(sum_i G_i)^-1 = argmin_W sum_i |X_i W^T - X_i W_i^T|^2
                 RegMean (Jin et al. 2023, arXiv 2212.09849, eq. 2); LoRM (arXiv 2410.17961) on either factor of a LoRA
    Fisher       sum_i F_i theta_i / sum_i F_i                        (Matena and Raffel 2022, arXiv 2111.09832)
    task vectors theta_0 + lambda sum_i tau_i, tau_i = theta_i - theta_0        (Ilharco et al. 2023, arXiv 2212.04089)
    TIES         trim, elect signs, mean of those that agree               (Yadav et al. 2023, arXiv 2306.01708)
    DARE         drop entries of tau_i at random and rescale                  (Yu et al. 2024, arXiv 2311.03099)
    Iso, TSV     spectra of task vectors made flat; their leading triplets made orthogonal
    WUDI         least disturbance of the inputs that task vectors themselves suggest
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

UNSEEN = 1e-30  # an input whose energy is below this share of the largest one was never seen
SINGULAR = 1e-12  # a squared pivot of the equilibrated matrix below this is rounding
JITTERS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
TOLERANCE = 1e-6  # on the residual of a solve


def wide(like: Tensor | torch.device) -> torch.dtype:
    """The type in which weights are merged: float64, where the device has it."""
    device = like if isinstance(like, torch.device) else like.device
    return torch.float32 if device.type == "mps" else torch.float64


# ---------------------------------------------------------------- Gram matrices


def scale_off_diagonal(G: Tensor, alpha: float) -> Tensor:
    """S_alpha(G) = alpha G + (1 - alpha) diag(G) for (... x d x d): RegMean's shrinkage; the diagonal stays."""
    if alpha == 1:
        return G
    return alpha * G + (1 - alpha) * torch.diag_embed(G.diagonal(dim1=-2, dim2=-1))


def reduced_gram(A: Tensor, G: Tensor) -> Tensor:
    """A G A^T (... x r x r) for A (... x r x d) and a Gram matrix (... x d x d) or its diagonal (... x d).

    It is the Gram matrix of what leaves A, so B is merged by an r x r solve (LoRM, B step).
    """
    A = A.to(torch.promote_types(A.dtype, G.dtype))
    G = G.to(A.dtype)
    return (A @ G if G.dim() == A.dim() else A * G[..., None, :]) @ A.mT


# ---------------------------------------------------------------- regression


def solve_gram(G: Tensor, R: Tensor, damping: float = 0.0) -> Tensor:
    """X with X G = R, for symmetric positive semi-definite G (... x d x d) and R (... x o x d), in the type of G.

    G is scaled to a unit diagonal first, S_alpha(G) then has no eigenvalue below 1 - alpha, and factorised by Cholesky.
    Where that meets a pivot of rounding size, 1e-6 is added to the diagonal, then ten times as much, up to 1e-2, with
    refinement against the matrix itself; what still fails is solved by eigenvalues. Columns of inputs that were never
    seen are zero. ``damping`` is added to the unit diagonal for good.
    """
    batch = G.shape[:-2]
    G, R = G.reshape(-1, *G.shape[-2:]), R.reshape(-1, *R.shape[-2:])
    energy = G.diagonal(dim1=-2, dim2=-1)
    seen = energy > UNSEEN * energy.amax(-1, keepdim=True).clamp(min=torch.finfo(G.dtype).tiny)
    s = torch.where(seen, energy.clamp(min=torch.finfo(G.dtype).tiny).rsqrt(), torch.zeros_like(energy))
    C = s[:, :, None] * G * s[:, None, :]
    C = C + torch.diag_embed((~seen).to(G.dtype) + damping)
    R = R * s[:, None, :]
    X = torch.zeros_like(R)
    todo = torch.arange(len(C), device=C.device)
    for jitter in (0.0, *JITTERS):
        L, info = torch.linalg.cholesky_ex(_jittered(C[todo], jitter))
        pivots = L.diagonal(dim1=-2, dim2=-1).nan_to_num(nan=0.0).amin(-1).square()
        good = (info == 0) & (pivots > (SINGULAR if jitter == 0 else 0))
        which, L = todo[good], L[good]
        if len(which):
            X[which] = _solved(L, R[which])
            for _ in range(3 if jitter else 0):
                X[which] += _solved(L, R[which] - X[which] @ C[which])
        todo = todo[~good]
        if not len(todo):
            break
    if len(todo):
        values, V = torch.linalg.eigh(C[todo])
        inverse = torch.where(values > 1e-10 * values.amax(-1, keepdim=True), 1 / values, torch.zeros_like(values))
        X[todo] = ((R[todo] @ V) * inverse[:, None, :]) @ V.mT
    return (X * s[:, None, :]).reshape(*batch, *R.shape[-2:])


def _jittered(C: Tensor, jitter: float) -> Tensor:
    return C if jitter == 0 else C + jitter * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)


def _solved(L: Tensor, R: Tensor) -> Tensor:
    """R (L L^T)^-1."""
    return torch.cholesky_solve(R.mT, L).mT


def regression_merge(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    anchor: str | Tensor = "mean",
    coefficients: Sequence[float] | None = None,
    damping: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """argmin_W sum_i c_i |X_i (W - W_i)^T|^2 with G_i = X_i^T X_i: RegMean's closed form, around an anchor.

        W = W_0 + (sum_i c_i (W_i - W_0) S(G_i)) (sum_i c_i S(G_i))^-1

    With an invertible sum and no damping the anchor W_0 cancels. Without, W differs from it by as little as the data
    allow (in units of each input's scale), and not at all for inputs that were never seen; so one model, or equal
    models, come out as they went in, whatever the rank of G.

    Args:
        weights: W_i (... x o x d). grams: dense (... x d x d), or the diagonal alone (... x d): then every column is a
            weighted mean and no d x d matrix is made.
        alpha: off-diagonal scaling S_alpha of dense Grams (``scale_off_diagonal``).
        anchor: 'mean' of the W_i; 'zero', the formula as it is written; or W_0 itself.
        coefficients: c_i, default 1. damping: added to the diagonal, as a multiple of it.
        dtype: of the solve; float64 by default.

    Returns:
        W (... x o x d) in the type of the weights.

    Raises:
        ValueError: no weights, or shapes that do not fit.
    """
    if not weights or len(weights) != len(grams):
        raise ValueError(f"{len(weights)} weights and {len(grams)} Gram matrices: give one of each per model")
    like = weights[0]
    dtype = wide(like) if dtype is None else dtype
    diagonal = grams[0].dim() == like.dim() - 1
    if grams[0].shape[-1] != like.shape[-1] or not (diagonal or grams[0].shape[-2] == like.shape[-1]):
        raise ValueError(f"a Gram matrix {tuple(grams[0].shape)} does not fit a weight {tuple(like.shape)}")
    if isinstance(anchor, Tensor):
        W0 = anchor.to(like.device, dtype)
    elif anchor == "mean":
        W0 = sum(W.to(dtype) for W in weights) / len(weights)
    elif anchor == "zero":
        W0 = torch.zeros_like(like, dtype=dtype)
    else:
        raise ValueError(f"unknown anchor {anchor!r}: 'mean', 'zero' or a tensor")
    total = numerator = None
    for i, (W, G) in enumerate(zip(weights, grams, strict=True)):  # one Gram in the wide type at a time
        G = G.to(like.device, dtype)
        if not diagonal:
            G = scale_off_diagonal(G, alpha)
        if coefficients is not None:
            G = coefficients[i] * G
        off = W.to(dtype) - W0
        part = off * G[..., None, :] if diagonal else off @ G
        total = G.clone() if total is None else total.add_(G)
        numerator = part if numerator is None else numerator.add_(part)
    if diagonal:
        share = numerator / (total * (1 + damping))[..., None, :]
        return (W0 + torch.where((total > 0)[..., None, :], share, 0)).to(like.dtype)
    step = solve_gram(total, numerator, damping)
    if not damping:
        _check(step, total, numerator)
    return (W0 + step).to(like.dtype)


def _check(step: Tensor, total: Tensor, numerator: Tensor) -> None:
    """Warn if a solve has not solved its equations."""
    norm = numerator.flatten(-2).norm(dim=-1)
    residual = (step @ total - numerator).flatten(-2).norm(dim=-1)
    worst = (residual / norm.clamp(min=torch.finfo(norm.dtype).tiny)).max()
    if worst > TOLERANCE:
        warnings.warn(
            "Gram matrices are so close to singular that merged weights miss their equations by more than "
            f"{TOLERANCE:.0e}: an off-diagonal scaling below 1, damping, or more data helps (said once)",
            stacklevel=3,
        )


def merge_layers(
    weights: Sequence[Mapping[str, Tensor]], grams: Sequence[Mapping[str, Tensor]], **options
) -> dict[str, Tensor]:
    """``regression_merge`` of many layers, those of equal shape in one batch.

    Args:
        weights, grams: for each model {layer: W_i} and {layer: G_i}. options: of ``regression_merge``; ``anchor`` may
            also be {layer: W_0}.
    """
    anchor = options.pop("anchor", "mean")
    alike: dict[tuple, list[str]] = {}
    for name, W in weights[0].items():
        alike.setdefault((W.shape, grams[0][name].shape), []).append(name)
    merged = {}
    for names in alike.values():
        whole = regression_merge(
            [torch.stack([w[n] for n in names]) for w in weights],
            [torch.stack([g[n] for n in names]) for g in grams],
            anchor=torch.stack([anchor[n] for n in names]) if isinstance(anchor, Mapping) else anchor,
            **options,
        )
        merged |= dict(zip(names, whole.unbind(), strict=True))
    return {name: merged[name] for name in weights[0]}


# ---------------------------------------------------------------- means


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i, summed in float64; the weights are taken as they are. Returns the type of the tensors."""
    dtype = wide(tensors[0])
    return sum(w * t.to(dtype) for w, t in zip(weights, tensors, strict=True)).to(tensors[0].dtype)


def fisher_mean(
    tensors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """sum_i c_i (F_i + eps) t_i / sum_i c_i (F_i + eps), entry by entry (Matena and Raffel 2022, eq. 4).

    Where no model has any Fisher information the result is the mean, weighted by c_i.
    """
    dtype = wide(tensors[0])
    c = [1.0] * len(tensors) if coefficients is None else coefficients
    shares = [ci * (F.to(dtype) + eps) for ci, F in zip(c, fishers, strict=True)]
    return (sum(s * t.to(dtype) for s, t in zip(shares, tensors, strict=True)) / sum(shares)).to(tensors[0].dtype)


def low_rank_sum(Bs: Sequence[Tensor], As: Sequence[Tensor], weights: Sequence[float], r: int) -> tuple[Tensor, Tensor]:
    """(B, A) of rank r nearest to sum_i w_i B_i A_i in the Frobenius norm, split evenly: U sqrt(S), sqrt(S) V^T.

    No o x d matrix is made: QR of the stacked factors, then an SVD of (N r x N r). B_i (o x r_i), A_i (r_i x d).
    """
    dtype = wide(Bs[0])
    B = torch.cat([w * b.to(dtype) for w, b in zip(weights, Bs, strict=True)], 1)
    A = torch.cat([a.to(dtype) for a in As])
    left, b = torch.linalg.qr(B)
    right, a = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(b @ a.mT, full_matrices=False)
    root = S[:r].sqrt()
    missing = r - len(root)  # the sum has a lower rank than asked for
    B, A = left @ (U[:, :r] * root), (root[:, None] * Vh[:r]) @ right.mT
    pad = torch.nn.functional.pad
    return pad(B, (0, missing)).to(Bs[0].dtype), pad(A, (0, 0, 0, missing)).to(As[0].dtype)


# ---------------------------------------------------------------- task vectors


def task_arithmetic(start: Tensor, taus: Sequence[Tensor], scale: float) -> Tensor:
    """theta_0 + lambda sum_i tau_i (Ilharco et al. 2023)."""
    dtype = wide(start)
    return (start.to(dtype) + scale * sum(t.to(dtype) for t in taus)).to(start.dtype)


def trim(tau: Tensor, keep: float) -> Tensor:
    """The share ``keep`` of entries that are largest by size, the others zero (TIES, step 1).

    Entries below the (1 - keep) quantile are dropped, as ``numpy.quantile`` has it; ties at the threshold stay.
    """
    if keep >= 1:
        return tau
    n = tau.numel()
    position = (1 - keep) * (n - 1)
    k = min(int(position) + (position - int(position) > 1e-9), n - 1)  # sorted entries before it are dropped
    threshold = tau.abs().flatten().kthvalue(k + 1).values
    return torch.where(tau.abs() < threshold, 0, tau)


def ties_merge(taus: Sequence[Tensor], keep: float = 0.2, reduce: str = "mean", undecided: str = "majority") -> Tensor:
    """One task vector (n,) from several: trim, elect a sign per entry, merge those that have it (TIES, Alg. 1).

    Args:
        taus: flattened task vectors. keep: share of entries kept by ``trim``, over the whole vector.
        reduce: 'mean' over the entries that agree (paper), or their 'sum'.
        undecided: entries whose sum is zero take the 'majority' sign of the whole vector, or stay 'zero'.
    """
    if reduce not in ("mean", "sum") or undecided not in ("majority", "zero"):
        raise ValueError(f"reduce is 'mean' or 'sum', undecided 'majority' or 'zero', not {reduce!r} and {undecided!r}")
    kept = torch.stack([trim(t, keep) for t in taus])
    sign = kept.sum(0).sign()
    if undecided == "majority":
        whole = sign.sum().sign()
        sign = torch.where(sign == 0, whole if whole != 0 else torch.ones_like(whole), sign)
    agree = (kept.sign() == sign) & (kept != 0)
    total = torch.where(agree, kept, 0).sum(0)
    return total / agree.sum(0).clamp(min=1) if reduce == "mean" else total


def dare(tau: Tensor, drop: float, generator: torch.Generator | None = None) -> Tensor:
    """tau with a share ``drop`` of its entries set to zero at random and the others divided by 1 - drop: E = tau.

    Raises:
        ValueError: drop outside [0, 1).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"the share of entries to drop is at least 0 and below 1, not {drop}")
    mask = torch.rand(tau.shape, generator=generator, device="cpu" if generator is None else generator.device)
    return tau * (mask >= drop).to(tau) / (1 - drop)


def iso_c(taus: Sequence[Tensor]) -> Tensor:
    """sigma U V^T of the sum U S V^T of task vectors (o x d), sigma the mean of S (Iso-C, arXiv 2502.04959, Alg. 1)."""
    U, S, Vh = torch.linalg.svd(sum(t.to(wide(t)) for t in taus), full_matrices=False)
    return (S.mean() * U @ Vh).to(taus[0].dtype)


def _polar(M: Tensor) -> Tensor:
    """The matrix with orthonormal columns (or rows) nearest to M."""
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def iso_cts(taus: Sequence[Tensor], common: float = 0.8) -> Tensor:
    """Iso-CTS (arXiv 2502.04959, Alg. 2): common directions of the sum, then each task's own, all equally long.

    Args:
        taus: (o x d) each. common: share of the min(o, d) directions that the sum gives; the tasks share the rest.
    """
    dtype, kind = wide(taus[0]), taus[0].dtype
    taus = [t.to(dtype) for t in taus]
    U, S, Vh = torch.linalg.svd(sum(taus), full_matrices=False)
    own = round((len(S) - int(common * len(S))) / len(taus))  # directions of each task
    c = max(len(S) - own * len(taus), 0)
    Us, Ss, Vs = [], [], []
    for t in taus if own else []:
        u, s, vh = torch.linalg.svd(t - U[:, :c] @ (U[:, :c].mT @ t), full_matrices=False)
        Us.append(u[:, :own]), Ss.append(s[:own]), Vs.append(vh[:own])
    left, right = torch.cat([*Us, U[:, :c]], 1), torch.cat([*Vs, Vh[:c]])
    sigma = torch.cat([*Ss, S[:c]]).mean()
    return (sigma * _polar(left) @ _polar(right)).to(kind)


def tsv_m(taus: Sequence[Tensor]) -> Tensor:
    """TSV-Merge (Gargiulo et al. 2025, arXiv 2412.00081): the leading singular triplets of each of T task vectors.

    Of each (o x d), min(o, d) / T triplets; the joined left and right vectors are made orthonormal (polar factors).
    """
    dtype = wide(taus[0])
    k = max(min(taus[0].shape) // len(taus), 1)
    parts = [torch.linalg.svd(t.to(dtype), full_matrices=False) for t in taus]
    U, V = torch.cat([u[:, :k] for u, _, _ in parts], 1), torch.cat([vh[:k] for _, _, vh in parts])
    S = torch.cat([s[:k] for _, s, _ in parts])
    return ((_polar(U) * S) @ _polar(V)).to(taus[0].dtype)


def wudi(taus: Sequence[Tensor], steps: int = 400, lr: float = 1e-5) -> Tensor:
    """WUDI-Merging (arXiv 2503.08099): M (o x d) that disturbs no task's own directions.

        L(M) = sum_i |(M - tau_i) tau_i^T|^2 / |tau_i|^2

    Adam from M = sum_i tau_i; with ``steps`` 0 the minimum itself, a regression with tau_i^T tau_i / |tau_i|^2 for Gram
    matrices. The few steps are part of the method: they keep M near the sum.
    """
    dtype = wide(taus[0])
    T = torch.stack([t.to(dtype) for t in taus])
    G = T.mT @ T / T.square().sum((1, 2), keepdim=True).clamp(min=UNSEEN)
    if steps == 0:
        return regression_merge(list(T), list(G)).to(taus[0].dtype)
    total, weighted = G.sum(0), (T @ G).sum(0)
    M = nn.Parameter(T.sum(0))
    opt = torch.optim.Adam([M], lr=lr)
    for _ in range(steps):
        M.grad = 2 * (M.detach() @ total - weighted)
        opt.step()
    return M.detach().to(taus[0].dtype)
