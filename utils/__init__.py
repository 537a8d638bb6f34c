"""Small parsers that method files from Mammoth import from here."""

from __future__ import annotations

import argparse


def binary_to_boolean_type(value: str) -> bool:
    """``0/1/true/false/yes/no`` to bool, for argparse."""
    text = str(value).lower()
    if text in ("1", "true", "t", "yes", "y"):
        return True
    if text in ("0", "false", "f", "no", "n"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false: give 0 or 1")


def none_or_float(value: str) -> float | None:
    """``none`` or a number, for argparse."""
    return None if str(value).lower() == "none" else float(value)
