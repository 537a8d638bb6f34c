"""Pretrained weights: the flag that asks for them, and whether there is a hub to ask."""

from __future__ import annotations

import argparse
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub


def add_pretrained_arg(parser: argparse.ArgumentParser) -> None:
    """``--pretrained``."""
    parser.add_argument(
        "--pretrained", type=int, choices=(0, 1), default=1, help="1: pretrained weights; 0: random initialisation"
    )


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
