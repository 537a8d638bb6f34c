"""The errors a user can cause: one line that says what was wrong, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OneLine(Exception):
    """An error whose message is one line, whatever a library has put in it."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class UserError(OneLine, ValueError):
    """A mistake in what the user asked for. ``main.py`` prints its message and exits with code 2."""


class Busy(UserError):
    """Another process is carrying out the same run. ``main.py`` exits with code 75, and a sweep comes back later."""


class RunError(OneLine):
    """A run that cannot go on (a diverged client, a full disk). ``main.py`` prints one line and exits with code 1."""


class Interrupted(Exception):
    """Ctrl-C, raised between two phases after the state was saved."""


class ClientError(RunError):
    """The method's own code failed on a client.

    Attributes:
        trace: the traceback, of whichever process it happened in; ``main.py`` prints it before the line.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        return " ".join(self.args[0].split())


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
