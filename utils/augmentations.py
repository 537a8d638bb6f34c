"""Applying transforms to batches, at the path where method files written for Mammoth look for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def is_batched(transform: Callable) -> bool:
    """Whether ``transform`` draws anew for every image of a batch, so that it may be called on the whole batch.

    True for the transforms of :mod:`datasets.utils.transforms`, for a composition of only those, and for any callable
    with an attribute ``batched = True``.
    """
    from datasets.utils.transforms import BatchTransform, Compose

    if hasattr(transform, "batched"):
        return bool(transform.batched)
    if isinstance(transform, Compose):
        return all(is_batched(t) for t in transform.transforms)
    return isinstance(transform, BatchTransform)


def apply_transform(x: torch.Tensor, transform: Callable | None) -> torch.Tensor:
    """Transform a batch with an own random draw per image.

    Args:
        x: images (B, C, H, W).
        transform: None returns ``x``; a batched one (see :func:`is_batched`) runs where ``x`` is; another (torchvision,
            PIL-based) is called on each image, on the CPU.

    Returns:
        the transformed images, on the device of ``x``.
    """
    if transform is None or len(x) == 0:
        return x
    if is_batched(transform):
        return transform(x)
    return torch.stack([transform(image) for image in x.cpu()]).to(x.device)


def normalize(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """``(x - mean) / std`` per channel of images (B, C, H, W)."""
    return (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)
