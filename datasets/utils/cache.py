"""Arrays that took long to read, kept on disk in the form in which they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import replacing


def cached_arrays(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What ``make()`` returned when ``file`` (.npz) was written; it is called, and the file written, if there is none.

    The file appears whole or not at all. Its name must say everything that its content depends on.

    Raises:
        UserError: the file cannot be read. RunError: it cannot be written.
    """
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as e:  # cut short, overwritten, another format
            raise UserError(f"{file} is damaged ({e}): delete it, it will be made again") from e
    arrays = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, open(temporary, "wb") as out:
        np.savez(out, **arrays)
    return arrays
