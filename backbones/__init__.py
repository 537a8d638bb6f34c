"""Backbones by name: one file in this folder is one backbone (or a few), and no list has to be edited.

A file holds ``NAME = '...'`` (or ``NAMES = (...)``), defines ``build(args, dataset) -> Backbone`` and may define
``add_args(parser)`` for flags that only it has. Names are read from the text of the files (:mod:`utils.registry`), so
listing them imports neither torch nor timm.
"""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.registry import load, scan

if TYPE_CHECKING:
    from backbones.utils.base import Backbone


def _module(name: str) -> ModuleType:
    return load("backbones", name, "backbone")


def get_backbone_names() -> list[str]:
    """The names accepted by ``--backbone``, sorted."""
    return sorted(scan("backbones"))


def add_backbone_args(name: str, parser: argparse.ArgumentParser) -> None:
    """Add to ``parser`` the flags that only backbone ``name`` has. UserError if there is no such backbone."""
    add_args = getattr(_module(name), "add_args", None)
    if add_args is not None:
        add_args(parser)


def get_backbone_parser(name: str) -> argparse.ArgumentParser:
    """A parser (without ``--help``) of the flags that only backbone ``name`` has."""
    parser = argparse.ArgumentParser(add_help=False)
    add_backbone_args(name, parser)
    return parser


def get_backbone(args: argparse.Namespace, dataset: Any = None) -> Backbone:
    """Build the backbone ``args.backbone`` with a head for the classes of ``dataset``, on the CPU, in training mode.

    Args:
        args: the parsed command line: ``backbone`` and the flags of that backbone (missing ones take their default).
        dataset: gives ``N_CLASSES``, ``SIZE`` (height, width) and ``CHANNELS``. If None, as in the one-argument call of
            Mammoth's method files, the dataset that ``args`` names is asked.

    Raises:
        UserError: unknown name, or what the backbone's own ``build`` rejects (a missing weights file, ...).
    """
    module = _module(args.backbone)
    if dataset is None:
        dataset = importlib.import_module("datasets").get_dataset(args)
    net = module.build(args, dataset)
    net.set_precision(getattr(args, "precision", "fp32"))
    return net
