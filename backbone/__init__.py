"""Alias of :mod:`backbones` at the path from which method files written for Mammoth import."""

from backbones import get_backbone, get_backbone_names
from backbones.utils.base import Backbone, MammothBackbone, ReturnTypes, num_flat_features, xavier

__all__ = [
    "Backbone",
    "MammothBackbone",
    "ReturnTypes",
    "get_backbone",
    "get_backbone_names",
    "num_flat_features",
    "xavier",
]
