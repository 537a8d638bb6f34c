"""Seeds, device and paths."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from utils.errors import UserError


def derive_seed(*keys) -> int:
    """A 63-bit seed that depends on every key, and on nothing else: (seed, 'client', task, round, client), say."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(*keys) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Draws are made on the CPU so that no device changes them."""
    return torch.Generator().manual_seed(derive_seed(*keys))


def set_random_seed(*keys) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators.

    Called at the start of every phase (task, epoch, round, client call) with the keys of that phase, so that code
    which draws from the global generators (any method written for Mammoth) gives the same numbers whichever engine
    runs it and wherever a run was resumed.
    """
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for seed_device in _seeders():
        seed_device(seed)


@cache
def _seeders() -> list[Callable[[int], object]]:
    """What seeds PyTorch's generators. ``torch.manual_seed`` formats a stack trace for each kind of device that is not
    there, which takes a small client longer than its round."""
    seeders: list[Callable[[int], object]] = [torch.default_generator.manual_seed]
    if torch.cuda.is_available():
        seeders.append(torch.cuda.manual_seed_all)
    if torch.backends.mps.is_available():
        seeders.append(torch.mps.manual_seed)
    return seeders


@cache
def get_device(name: str | None = None) -> torch.device:
    """The device to run on: ``name`` if given, else the first of CUDA, MPS, CPU that is there.

    cuDNN is kept to kernels that add up in a fixed order: a run that goes on after a kill ends as it would have.

    Raises:
        UserError: a device that this machine or this build of PyTorch does not have.
    """
    torch.backends.cudnn.deterministic = True
    if name in (None, "auto"):
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    have = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        have.append("mps")
    try:
        device = torch.device(name)
        wanted = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
        if wanted not in have:
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {name!r} is not available: this machine has {', '.join(have)}") from None
    return device
