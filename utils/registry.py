"""A name leads to a file: models, data sets and backbones are found by reading files, not by importing them.

A file in the package's folder that holds ``NAME = '...'`` (or ``NAMES = (...)``) is registered; nothing is imported
until that name is asked for, so a broken or half-installed neighbour cannot stop a run. Names are compared with
``-`` and ``_`` taken as the same, as Mammoth does.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from types import ModuleType

from utils.errors import UserError, nearest

ROOT = Path(__file__).resolve().parent.parent
_NAMES = re.compile(r"^\s*NAMES?\s*(?::[^=\n]+)?=\s*(\(?[^\n#]*)", re.MULTILINE)
_STRING = re.compile(r"['\"]([A-Za-z0-9_.-]+)['\"]")


def normal(name: str) -> str:
    """The spelling under which names are compared: lower case, ``-`` for ``_``."""
    return name.lower().replace("_", "-")


@cache
def scan(package: str) -> dict[str, str]:
    """Names registered in a package: ``{name: module}``, in alphabetical order, found without importing."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / package).glob("*.py")):
        if file.name != "__init__.py":
            for line in _NAMES.findall(file.read_text(encoding="utf-8", errors="replace")):
                for name in _STRING.findall(line):
                    if name not in found or normal(name) == normal(file.stem):  # the file named after it wins
                        found[name] = f"{package}.{file.stem}"
    return dict(sorted(found.items()))


def find(package: str, name: str, kind: str) -> tuple[str, str]:
    """The registered spelling of ``name`` and its module.

    Raises:
        UserError: no such name in the package.
    """
    for known, module in scan(package).items():
        if normal(known) == normal(name):
            return known, module
    raise UserError(f"unknown {kind} {name!r}: {nearest(name, scan(package))}")


def load(package: str, name: str, kind: str) -> ModuleType:
    """Import the one file that holds ``name``.

    Raises:
        UserError: no such name, or the file needs a package that is not installed.
    """
    known, module = find(package, name, kind)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        top = (e.name or "").split(".")[0]
        if (ROOT / top).exists() or (ROOT / f"{top}.py").exists():
            raise UserError(
                f"{kind} {known!r}: {module.replace('.', '/')}.py imports {e.name!r}, which Herd does not have; "
                "copy that file here too or drop the import"
            ) from e
        raise UserError(f"{kind} {known!r} needs the package {top!r}, which is not installed: pip install {top}") from e


def load_class(package: str, name: str, kind: str) -> type:
    """The class with ``NAME == name`` in its file."""
    known, _ = find(package, name, kind)
    module = load(package, name, kind)
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and getattr(value, "NAME", None) == known:
            return value
    raise UserError(f"{module.__name__.replace('.', '/')}.py names {known!r} but holds no class with NAME = {known!r}")
