"""The diagonal of the empirical Fisher matrix, sample by sample with vmap: EWC, Fisher-weighted averaging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

PER_SAMPLE_FLOATS = 100_000_000  # room for the per-sample gradients of one chunk


def chunk_size(params: Mapping[str, Tensor]) -> int:
    """Samples whose gradients fit in the room there is, at most 64."""
    return max(1, min(64, PER_SAMPLE_FLOATS // max(1, sum(p.numel() for p in params.values()))))


def fisher_diagonal(
    log_likelihood: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor],
    params: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """sum_x p(y|x) (d log p(y|x) / d theta)^2, with the labels y of the data (fed-mammoth's and Mammoth's weighting).

    Args:
        log_likelihood: (params, x (1, ...), y (1,)) -> log p(y|x), a scalar. params: {name: theta}.
        batches: (x, y) of any size; :func:`chunk_size` samples are differentiated at once.

    Returns:
        {name: sum}, not divided by the number of samples, so that sums of several data sets add up.
    """
    params = {n: p.detach() for n, p in params.items()}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    per_sample = vmap(
        grad_and_value(lambda params, x, y: log_likelihood(params, x[None], y[None])),
        in_dims=(None, 0, 0),
        randomness="same",
    )
    size = chunk_size(params)
    for inputs, labels in batches:
        for x, y in zip(inputs.split(size), labels.split(size)):
            grads, logp = per_sample(params, x, y)
            for name, g in grads.items():
                total[name] += torch.einsum("b,b...->...", logp.exp(), g.square())
    return total
