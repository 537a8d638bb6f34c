"""Whether there is a hub of weights to ask."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub


def offline() -> bool:
    """Whether the hub's name does not resolve (and no proxy would resolve it for us).

    Without a network the hub client would retry for most of a minute before it looks into its cache.
    """
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False
