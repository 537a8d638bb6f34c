"""The errors a user can cause: one line that says what was wrong, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked for. ``main.py`` prints its message on one line and exits with code 2."""


class RunError(Exception):
    """A run that cannot go on (a diverged client, a full disk). ``main.py`` prints one line and exits with code 1."""


class ClientError(RunError):
    """The method's own code failed on a client.

    Attributes:
        trace: the traceback, of whichever process it happened in; ``main.py`` prints it before the line.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        return self.args[0]


def nearest(name: str, allowed: Iterable[str], n: int = 3) -> str:
    """What to suggest for a misspelt ``name``: the closest of ``allowed``, or all of them when none is close.

    Returns:
        ``"did you mean 'a' or 'b'?"`` or ``"choose from a, b, c"``.
    """
    allowed = sorted(set(allowed))
    close = difflib.get_close_matches(name.lower().replace("_", "-"), [a.lower().replace("_", "-") for a in allowed], n)
    if close:
        names = sorted(
            (a for a in allowed if a.lower().replace("_", "-") in close),
            key=lambda a: close.index(a.lower().replace("_", "-")),
        )
        return "did you mean " + " or ".join(repr(a) for a in names) + "?"
    return "choose from " + ", ".join(allowed)
