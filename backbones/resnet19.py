"""ResNets with ReLUs of the spiking networks' shape (backbones/sresnet.py): their twins in STAER's comparisons.

    resnet19        3x3 stem of 128 channels, stages of 3, 3 and 2 basic blocks of 128, 256 and 512 channels;
                    12,569,216 parameters for ten classes of colour images, 12,566,912 for grey ones
    resnet-pocket   16, 32 and 64 channels, one block each, 77,744 parameters for ten grey classes; the stride of the
                    stem (1 to 3) brings images to 8x8 or a little more

The stem takes the data set's channels; ``resnet19-mnist`` and ``resnet19-cifar10`` take 1 and 3 whatever the data set.
The twin of sresnet18 is ``resnet18``, which has a bias in its head. Here the head has none, as in the released code.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from backbones.utils.base import Backbone, fit_channels
from utils.registry import normal

NAMES = ("resnet19", "resnet19-mnist", "resnet19-cifar10", "resnet-pocket")


class Shape(NamedTuple):
    """Input channels, stride of the stem (its channels are the first stage's), channels and blocks of each stage."""

    channels: int
    stem_stride: int
    stages: tuple[tuple[int, int], ...]


STAGES = {
    "18": ((64, 2), (128, 2), (256, 2), (512, 2)),
    "19": ((128, 3), (256, 3), (512, 2)),
    "pocket": ((16, 1), (32, 1), (64, 1)),
}


def shape_of(name: str, dataset: Any) -> Shape:
    """What a name such as ``resnet19-mnist`` or ``sresnet-pocket`` means for a data set."""
    size, _, data = normal(name).partition("resnet")[2].strip("-").partition("-")
    stride = max(1, min(3, dataset.SIZE[0] // 8)) if size == "pocket" else 1
    return Shape({"mnist": 1, "cifar10": 3}.get(data, dataset.CHANNELS), stride, STAGES[size])


def blocks(shape: Shape, make) -> list[nn.Module]:
    """All blocks in order, each ``make(inputs, outputs, stride)``; every stage but the first begins with stride 2."""
    inputs, made = shape.stages[0][0], []
    for stage, (width, count) in enumerate(shape.stages):
        for i in range(count):
            made.append(make(inputs, width, 2 if stage and not i else 1))
            inputs = width
    return made


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """1x1 convolution and batch norm where the shape changes, else None."""
    if (inputs, stride) == (outputs, 1):
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(Backbone):
    """Images (B, C, H, W) of any size -> features, averaged over the last map. torch's default initialisation."""

    def __init__(self, num_classes: int, shape: Shape) -> None:
        super().__init__()
        width = shape.stages[0][0]
        self.conv1 = nn.Conv2d(shape.channels, width, 3, shape.stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*blocks(shape, lambda i, o, s: BasicBlock(i, o, s, shortcut(i, o, s))))
        self._attach_head(shape.stages[-1][0], num_classes, bias=False)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(fit_channels(x, self.conv1.in_channels))))
        return self.blocks(x).mean((-2, -1))


def build(args: argparse.Namespace, dataset: Any) -> ResNet:
    """A randomly initialised network for ``dataset.N_CLASSES``."""
    return ResNet(dataset.N_CLASSES, shape_of(args.backbone, dataset))
