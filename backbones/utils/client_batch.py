"""One batch that holds the samples of several clients, one client after another, and what each does with its own.

Everything frozen sees one large batch; only what clients train is applied client by client: a tensor with a leading
client dimension K meets the K runs of samples it belongs to. Adapters, prompts and head rows are built on the two
functions here, so they work for one client and for many, and say so with a class attribute ``STACKS = True``. How many
samples each client has is said by :func:`client_batch`; outside of it the batch is divided into K equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_sizes: tuple[int, ...] | None = None


@contextmanager
def client_batch(sizes: Sequence[int]) -> Iterator[None]:
    """Within the block, the batch holds ``sizes[k]`` samples of client k, in this order."""
    global _sizes
    before, _sizes = _sizes, tuple(sizes)
    try:
        yield
    finally:
        _sizes = before


def sizes_of(batch: int, clients: int) -> tuple[int, ...]:
    """How many of ``batch`` samples belong to each of ``clients`` clients.

    Raises:
        ValueError: the batch is not the one announced, or does not divide.
    """
    if _sizes is not None:
        if len(_sizes) != clients or sum(_sizes) != batch:
            raise ValueError(f"a batch of {batch} for {clients} clients, where {_sizes} were announced")
        return _sizes
    if batch % clients:
        raise ValueError(f"a batch of {batch} does not divide into {clients} stacked clients")
    return (batch // clients,) * clients


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, where weight (K x out x in) and bias (K x out) may have a leading client dimension.

    Args:
        x: (batch x ... x in). Equal shares are one batched product; unequal ones a product for each client.
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    sizes = sizes_of(x.shape[0], weight.shape[0])
    if len(set(sizes)) == 1:
        mine = x.reshape(len(sizes), -1, x.shape[-1])
        if bias is None:
            out = torch.bmm(mine, weight.transpose(1, 2))
        else:
            out = torch.baddbmm(bias[:, None], mine, weight.transpose(1, 2))
        return out.reshape(*x.shape[:-1], weight.shape[1])
    biases = [None] * len(sizes) if bias is None else bias
    return torch.cat([F.linear(*each) for each in zip(x.split(sizes), weight, biases, strict=True)])


def per_sample(t: Tensor, batch: int) -> Tensor:
    """(K x ...) -> (batch x ...): every sample gets its client's entry."""
    sizes = sizes_of(batch, len(t))
    if len(set(sizes)) == 1:
        return t if sizes[0] == 1 else t.repeat_interleave(sizes[0], 0)
    return torch.cat([entry.expand(n, *entry.shape) for n, entry in zip(sizes, t, strict=True)])
