"""MNIST and CIFAR as whole arrays, through torchvision's readers, with its downloads and checksums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor

from utils.errors import UserError


def torchvision_arrays(name: str, base_path: str, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of ``'MNIST'``, ``'CIFAR10'`` or ``'CIFAR100'``.

    The files are looked for in ``base_path/NAME`` (where Mammoth keeps them) and in ``base_path`` (where a plain
    torchvision call does), and downloaded into the first. Files or archives put there by hand are used.

    Raises:
        UserError: no readable files and no download; says which files to put where.
    """
    reader, home = getattr(torchvision.datasets, name), Path(base_path) / name
    for root, download in ((home, False), (Path(base_path), False), (home, True)):
        try:
            data = reader(root, train=train, download=download)
            images = torch.as_tensor(np.asarray(data.data))
            labels = torch.as_tensor(np.asarray(data.targets), dtype=torch.long)
            break
        except Exception as e:  # whatever fails in there (network, disk, format), the remedy is the same
            error = e
    else:
        raise UserError(_remedy(reader, home, error)) from error
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), labels


def _remedy(reader: type, home: Path, error: Exception) -> str:
    if issubclass(reader, torchvision.datasets.MNIST):
        folder, files = home / reader.__name__ / "raw", list(reader.resources)
        url = next((m for m in reader.mirrors if m.startswith("https")), reader.mirrors[0])
    else:
        folder, files = home, [(reader.filename, reader.tgz_md5)]
        url = reader.url.rsplit("/", 1)[0] + "/"
    reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
    names = ", ".join(f"{name} (md5 {md5})" for name, md5 in files)
    return (
        f"{reader.__name__} cannot be read or downloaded ({reason}): fetch {names} from {url} and put them in "
        f"{folder.absolute()}"
    )
