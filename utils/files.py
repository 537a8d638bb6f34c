"""Writing a file so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import RunError


@contextmanager
def replacing(file: Path, what: str = "") -> Iterator[Path]:
    """A temporary path beside ``file`` to write to; it takes the place of ``file`` when the block ends well.

    Args:
        what: what the file is, for the message.

    Raises:
        RunError: the disk refuses. The old file stays, the temporary one goes.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    except OSError as e:
        raise RunError(f"cannot write {what}{file}: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)
