"""Gradient projection memory: which input directions of a layer old tasks use, and which are free for a new one.

The gradient of y = W x is (dL/dy) x^T, so it lies in the span of the layer's inputs. GPM (Saha et al., ICLR 2021,
arXiv 2103.09762) keeps a basis M of the span that past inputs fill and updates only outside it. DualGPM (Liang and Li,
CVPR 2023, "Adaptive Plasticity Improvement for Continual Learning") stores the complement instead once M fills more
than half of the space. InfLoRA (arXiv 2404.00228) and DOLFIN (arXiv 2510.13567) design the frozen factor A of a LoRA
pair dW = B A inside the complement of M: then A x = 0 for old inputs x, whatever B learns. A must be the factor that
meets x first; the same constraint on the output side would protect nothing.

Everything is computed in float64. Arguments may be of any floating type and on any device.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def threshold(task: int, n_tasks: int, lamb: float = 0.95, lame: float = 1.0) -> float:
    """Energy to keep at the end of task 0, 1, ..., n_tasks - 1: from lamb towards lame, which is not reached
    (InfLoRA's schedule)."""
    return lamb + (lame - lamb) * task / n_tasks


def pack_triu(S: Tensor) -> Tensor:
    """Upper triangle of symmetric matrices, (... x d x d) -> (... x d(d+1)/2): what needs to be sent of them."""
    i, j = torch.triu_indices(S.shape[-1], S.shape[-1], device=S.device)
    return S[..., i, j]


def unpack_triu(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_triu`, (... x d(d+1)/2) -> (... x d x d). ValueError if the length is of no triangle."""
    n = packed.shape[-1]
    d = (math.isqrt(8 * n + 1) - 1) // 2
    if d * (d + 1) // 2 != n:
        raise ValueError(f"{n} numbers are not the upper triangle of a matrix")
    i, j = torch.triu_indices(d, d, device=packed.device)
    S = packed.new_zeros(*packed.shape[:-1], d, d)
    S[..., i, j] = packed
    S[..., j, i] = packed
    return S


def _eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, at least 0) and eigenvectors (columns) of symmetric positive matrices.

    Each vector's largest entry is positive, so that the order in which S was summed cannot turn a sign around.
    """
    values, vectors = torch.linalg.eigh((S + S.mT) / 2)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    if vectors.shape[-2]:
        vectors = vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
    return values, vectors


def top_eigenpairs(S: Tensor, q: int) -> Tensor:
    """W (... x d x q): the q leading eigenvectors of S (... x d x d), each times the root of its eigenvalue.

    W W^T is the best approximation of S of rank q; q is clamped to d. Same dtype and device as S.
    """
    values, vectors = _eigh(S.double())
    q = min(q, S.shape[-1])
    return (vectors[..., :q] * values[..., None, :q].sqrt()).to(S.dtype)


class DualGPM:
    """The memory of one layer with inputs of size ``dim``.

    Args:
        dim: d, the size of the layer's inputs.
        energy: what a direction u counts for. 'paper': u^T C u, the energy of the inputs (GPM, eq. 5 and 9).
            'official': u^T C^2 u, as in InfLoRA's code, which takes the singular values of C and squares them.
        switch: store the complement once it is smaller. Changes storage (at most d * d/2 numbers), never results.
        device: where the basis lives and the work is done.

    ``basis`` has orthonormal columns: of the used space M (d x k), or if ``retain`` of its complement (d x (d - k)).
    A moment C is always d x d, the mean (or sum: the scale does not matter) of x x^T over a task's tokens.
    """

    def __init__(
        self,
        dim: int,
        energy: Literal["official", "paper"] = "official",
        switch: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if energy not in ("official", "paper"):
            raise ValueError(f"unknown energy '{energy}'; available: official, paper")
        self.dim, self.energy, self.switch = dim, energy, switch
        self.basis = torch.zeros(dim, 0, dtype=torch.float64, device=device)
        self.retain = False

    def __repr__(self) -> str:
        kind = "retain" if self.retain else "remove"
        return f"DualGPM({self.dim}, energy={self.energy!r}, {kind}, used={self.dim_used})"

    @property
    def dim_used(self) -> int:
        """k, the dimension of the space that old tasks use."""
        return self.dim - self.basis.shape[1] if self.retain else self.basis.shape[1]

    def allowed_basis(self) -> Tensor:
        """Orthonormal basis of the free space M^perp, d x (d - k), float64."""
        if self.retain:
            return self.basis
        return torch.linalg.qr(self.basis, mode="complete").Q[:, self.dim_used :]

    def project(self, X: Tensor) -> Tensor:
        """Rows of X (... x d) projected on the free space; dtype and device of X."""
        x = X.to(self.basis)
        inside = x @ self.basis @ self.basis.T
        return (inside if self.retain else x - inside).to(X)

    def _kernel(self, C: Tensor) -> Tensor:
        """The quadratic form of the energy, scaled to trace 1."""
        if C.shape != (self.dim, self.dim):
            raise ValueError(f"the moment must be {self.dim} x {self.dim}, not {tuple(C.shape)}")
        C = C.to(self.basis)
        if not C.isfinite().all():
            raise ValueError("the moment of the inputs is not finite")
        C = (C + C.T) / 2
        C = C / C.trace().clamp(min=torch.finfo(C.dtype).tiny)
        K = C @ C if self.energy == "official" else C
        return K / K.trace().clamp(min=torch.finfo(K.dtype).tiny)

    def captured(self, C: Tensor) -> float:
        """Share of the energy of C inside the used space, 0 to 1."""
        K, Q = self._kernel(C), self.allowed_basis()
        return float((K.trace() - (Q.T @ K @ Q).trace()).clamp(0, 1))

    @torch.no_grad()
    def update(self, C: Tensor, eps: float) -> int:
        """After a task, add the directions that its inputs need for a share ``eps`` of their energy to be inside M.

        The first task takes the directions whose cumulated energy stays below eps, at least one (InfLoRA); a later one
        takes the most energetic free directions until eps is reached. One rule serves both kinds of storage; InfLoRA's
        own two branches only differ from it, and from each other, at exact ties. Directions without energy are never
        taken: with eps = 1, rounding would otherwise use up the whole space.

        Returns the number of directions added. ValueError if C is not finite or of a wrong shape, or eps not in (0, 1].
        """
        if not 0 < eps <= 1:
            raise ValueError(f"eps must be in (0, 1], not {eps}")
        first, K, Q = self.dim_used == 0, self._kernel(C), self.allowed_basis()
        values, V = _eigh(Q.T @ K @ Q)
        # The trace of K is 1, unless there was no input at all.
        noise = 16 * torch.finfo(values.dtype).eps
        inside = values.cumsum(0) + (0 if first else (K.trace() - values.sum()).clamp(min=0))
        before = inside if first else inside - values
        r = min(int((before < eps).sum()), int((values > noise).sum()))
        if first and values.sum() > 0:
            r = max(r, 1)
        if r == 0:
            return 0
        U = Q @ V
        basis = U[:, r:] if self.retain else torch.cat([self.basis, U[:, :r]], 1)
        if self.switch and not self.retain and basis.shape[1] > self.dim / 2:
            basis, self.retain = U[:, r:], True
        self.basis = torch.linalg.qr(basis).Q  # rounding must not add up over tasks
        return r

    @torch.no_grad()
    def design(self, C: Tensor, r: int, scale: float = 1 / math.sqrt(3)) -> Tensor:
        """A (r x d, float64): ``scale`` times the r strongest directions of a new task's inputs in the free space.

        They are the leading left singular vectors of the projected inputs (I - M M^T) H (InfLoRA, DOLFIN). The work is
        done in coordinates of the free space, so rows are orthogonal to M even where the inputs have fewer than r
        directions left; if the space itself has fewer than r, the trailing rows are zero. The default scale gives the
        rows the norm that the usual LoRA initialisation has on average.
        """
        Q = self.allowed_basis()
        U = Q @ _eigh(Q.T @ self._kernel(C) @ Q)[1]
        return self._rows(U, r, scale, C.device)

    @torch.no_grad()
    def random(self, r: int, generator: torch.Generator | None = None, scale: float = 1 / math.sqrt(3)) -> Tensor:
        """A (r x d, float64) with r random orthogonal rows of norm ``scale`` in the free space; it needs no data.

        The draw does not depend on how the memory is stored. Rows beyond the free dimension are zero.
        """
        G = torch.randn(
            self.dim,
            r,
            dtype=torch.float64,
            generator=generator,
            device="cpu" if generator is None else generator.device,
        ).to(self.basis.device)
        return self.orthonormal(G.T, scale)

    @torch.no_grad()
    def orthonormal(self, rows: Tensor, scale: float = 1 / math.sqrt(3)) -> Tensor:
        """``rows`` (r x d) projected on the free space and made orthogonal, first to last, each of norm ``scale``.

        The work is done in coordinates of the free space, so that nothing can leave it. Rows beyond its dimension are
        zero.
        """
        Q = self.allowed_basis()
        U, R = torch.linalg.qr((rows[: Q.shape[1]].to(Q) @ Q).T)
        return self._rows(Q @ (U * R.diagonal().sign()), len(rows), scale, rows.device)

    def _rows(self, U: Tensor, r: int, scale: float, device: torch.device) -> Tensor:
        A = U.new_zeros(r, self.dim)
        A[: U.shape[1]] = scale * U[:, :r].T
        return A.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """``basis`` (d x columns, float64) and ``retain`` (bool scalar)."""
        return {"basis": self.basis.clone(), "retain": torch.tensor(self.retain)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """ValueError if the basis is of another dimension."""
        if state["basis"].dim() != 2 or len(state["basis"]) != self.dim:
            raise ValueError(f"a basis of {tuple(state['basis'].shape)} is not one of {self.dim} dimensions")
        self.basis = state["basis"].to(self.basis, copy=True)
        self.retain = bool(state["retain"])
