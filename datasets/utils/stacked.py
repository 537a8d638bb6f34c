"""Image data sets of files, read once into memory-mapped bytes, and several of them as one long array.

What does not fit in memory stays on disk: a batch reads its own images, and the system keeps what it has room for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from datasets.utils.cache import cached_arrays
from datasets.utils.transforms import BICUBIC
from utils.files import replacing


def square(image, size: int) -> np.ndarray:
    """A PIL image as CLIP prepares it: RGB, the shorter side ``size`` (bicubic), the middle; uint8 (3, size, size)."""
    image = TF.center_crop(TF.resize(image.convert("RGB"), [size], BICUBIC, antialias=True), [size, size])
    return np.asarray(image).transpose(2, 0, 1)


def whole(image, size: int) -> np.ndarray:
    """A PIL image as RGB, stretched to a square of side ``size`` (bicubic); uint8 (3, size, size)."""
    return np.asarray(TF.resize(image.convert("RGB"), [size, size], BICUBIC, antialias=True)).transpose(2, 0, 1)


def mapped_images(
    folder: Path, part: str, size: int, read: Callable, fit: Callable = square
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, 3, size, size) as a memory map, labels (N,) and class names, read once and then kept in ``folder``.

    Args:
        part: name of the files. read: called if they are not there; gives (a sequence of (PIL image, label), names).
        fit: :func:`square` or :func:`whole`.
    """
    name = f"{part}-{size}" if fit is square else f"{part}-{size}-{fit.__name__}"
    file, info = folder / f"{name}.npy", folder / f"{name}.npz"

    def make() -> dict[str, np.ndarray]:
        """Write the images first: where there are labels, there are images."""
        samples, names = read()
        labels = np.empty(len(samples), dtype=np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(samples), 3, size, size))

            def keep(i: int) -> None:
                try:
                    image, labels[i] = samples[i]
                    fitted = fit(image, size)
                except OSError as e:  # a fault of what is read, not of the file that is written
                    raise ValueError(str(e)) from e
                images[i] = fitted

            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # decoding runs side by side
                done = threads.map(keep, range(len(samples)))
                try:
                    for _ in tqdm(done, desc=f"reading {folder.name}, {part}", total=len(samples), mininterval=1):
                        pass
                except BaseException:  # a broken image, Ctrl-C: do not read all others first
                    threads.shutdown(cancel_futures=True)
                    raise
            images.flush()
        return {"labels": labels, "names": np.array(names)}

    if not file.exists():
        info.unlink(missing_ok=True)
    stored = cached_arrays(info, make)
    return np.load(file, mmap_mode="r"), stored["labels"], stored["names"].tolist()


class Stacked:
    """Arrays (N_i, 3, H_i, W_i) of uint8 of different sizes as one, (sum N_i, 3, size, size), indexed like a tensor.

    Images of another size are enlarged or shrunk when they are read (bicubic). They stay on the CPU.
    """

    device = torch.device("cpu")
    dtype = torch.uint8

    def __init__(self, parts: Sequence[np.ndarray], size: int) -> None:
        self.parts, self.size = list(parts), size
        self.starts = np.cumsum([0, *(len(p) for p in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), 3, self.size, self.size

    def to(self, device) -> Stacked:
        """Itself: batches are moved, not the whole."""
        return self

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        rows = np.arange(len(self))[index] if isinstance(index, slice) else index.cpu().numpy()
        out = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for k in np.unique(owner):
            mine = owner == k
            images = torch.from_numpy(np.ascontiguousarray(self.parts[k][rows[mine] - self.starts[k]]))
            if images.shape[-1] != self.size:
                images = TF.resize(images, [self.size, self.size], BICUBIC, antialias=True)
            out[torch.from_numpy(mine)] = images
        return out
