"""Batch normalisation without touching its running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def bn_track_stats(module: nn.Module, condition: bool = True) -> Iterator[None]:
    """Within the block, no batch-norm layer of ``module`` updates its running statistics unless ``condition``.

    Interface of Mammoth's context manager of the same name; what was set before is restored, also after an exception.
    """
    layers = [] if condition else [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [m.track_running_stats for m in layers]
    try:
        for m in layers:
            m.track_running_stats = False
        yield
    finally:
        for m, track in zip(layers, before):
            m.track_running_stats = track
