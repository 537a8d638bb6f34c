"""Reader of the glyph archive that ships with the project (``datasets/data``)."""

from __future__ import annotations

import functools
import hashlib
import io
import lzma
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
ARCHIVE, CHECKSUM = "glyphs.npz.xz", "glyphs.sha256"


@functools.lru_cache(maxsize=1)
def _arrays(folder: Path) -> dict[str, np.ndarray]:
    path, wanted = folder / ARCHIVE, ""
    try:
        packed = path.read_bytes()
        for line in (folder / CHECKSUM).read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().lstrip("*") == ARCHIVE:
                wanted = digest.lower()
    except OSError as e:
        raise UserError(
            f"{e.filename} is missing or unreadable: it ships with the project, restore it with 'git checkout -- "
            f"{DATA_DIR.name}' in {DATA_DIR.parent}"
        ) from e
    if hashlib.sha256(packed).hexdigest() != wanted:
        raise UserError(
            f"{path} is damaged: its sha256 is not the one in {CHECKSUM}; restore both with "
            "'git checkout -- datasets/data' (or 'git lfs pull' where the clone left a pointer)"
        )
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def shipped_arrays(prefix: str, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 1, 28, 28) and labels int64 (N,) of ``prefix`` ('glyphs' or 'scripts').

    Raises:
        UserError: the archive is missing or its checksum is wrong.
    """
    arrays, part = _arrays(DATA_DIR), "train" if train else "test"
    images, labels = arrays[f"{prefix}_x_{part}"], arrays[f"{prefix}_y_{part}"]
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()
