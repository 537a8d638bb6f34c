"""ResNet-18 for small images (He et al., arXiv:1512.03385), as Mammoth has it for CIFAR.

torchvision's network with a 3x3 stem of stride 1 and without max-pooling; 11,173,962 parameters with ten classes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from backbones.utils.base import Backbone, fit_channels

NAME = "resnet18"


class ResNet18(Backbone, ResNet):
    """Images (B, 1 or 3, H, W) of any size -> 512 features, averaged over the last map."""

    def __init__(self, num_classes: int) -> None:
        ResNet.__init__(self, BasicBlock, [2, 2, 2, 2], num_classes=1)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.maxpool = nn.Identity()
        del self.fc
        for m in self.modules():
            if isinstance(m, nn.Conv2d):  # torch's default initialisation, as in Mammoth, not torchvision's
                m.reset_parameters()
        self._attach_head(512, num_classes)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(fit_channels(x, 3))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def build(args: argparse.Namespace, dataset: Any) -> ResNet18:
    """A randomly initialised network for ``dataset.N_CLASSES``."""
    return ResNet18(dataset.N_CLASSES)
