"""What the dataset files share."""

from __future__ import annotations

import zlib

import numpy as np


def seeded(seed: int | None, *purpose: str | int) -> np.random.Generator:
    """A generator of its own for one purpose, so that no other draw of the run can shift it.

    Args:
        seed: the run's seed; ``None`` counts as 0.
        purpose: what the draws are for, e.g. ``"partition", 3``.
    """
    words = [p if isinstance(p, int) else zlib.crc32(p.encode()) for p in purpose]
    return np.random.default_rng([int(seed or 0) % 2**63, *words])


def stratified_split(labels: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split positions in two with the same ``share`` of every class in the second part.

    A class with two samples or more has at least one on each side.

    Returns:
        ``(kept, held_out)``, both sorted, disjoint, together every position.
    """
    held = []
    for c in np.unique(labels):
        where = rng.permutation(np.flatnonzero(labels == c))
        n = min(max(round(share * len(where)), 1), len(where) - 1)
        held.append(where[: max(n, 0)])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
