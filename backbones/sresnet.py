"""Spiking ResNets, as STAER trains them (arXiv:2601.20870, after its released code).

    sresnet19        3x3 stem of 128 channels, stages of 3, 3 and 2 blocks of 128, 256 and 512 channels;
                     12,569,216 parameters for ten classes of colour images, 12,566,912 for grey ones
    sresnet18        stem of 64 channels, stages of 2 blocks of 64, 128, 256 and 512; 11,173,952 and 11,172,800
    sresnet-pocket   16, 32 and 64 channels, one block each, 77,744 parameters for ten grey classes, 10 layers of
                     neurons; the stride of the stem (1 to 3) brings images to 8x8 or a little more

The stem takes the data set's channels; the names with ``-mnist`` and ``-cifar10`` take 1 and 3 whatever the data set.
A block is conv-BN-LIF-conv-BN-LIF, plus its input (or conv1x1-BN of it), then a third LIF; the first two networks have
25 layers of neurons (backbones/utils/neurons.py). The readout is a linear head without bias at every step.

An image is shown at each of ``--T`` steps; a sequence of frames brings its own number. Everything but the neurons sees
time folded into the batch, (T*B, C, H, W). Batch norm over that is batch norm over (B, T, H, W).

``--precision`` needs no counterpart here: autocast reaches convolutions and batch norms, spikes (0 or 1) are exact in
any type, and membranes and time averages stay float32.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from backbones.resnet19 import Shape, blocks, shape_of, shortcut
from backbones.utils.base import Backbone, fit_channels
from backbones.utils.neurons import CONVENTIONS, LIF

NAME = "sresnet-pocket"
NAMES = ("sresnet19", "sresnet18", "sresnet19-mnist", "sresnet19-cifar10", "sresnet18-mnist", "sresnet18-cifar10")


def fire(lif: LIF, x: torch.Tensor, T: int) -> torch.Tensor:
    """Spikes (T*B, ...) of a layer of neurons for its inputs (T*B, ...)."""
    return lif(x.unflatten(0, (T, -1))).flatten(0, 1)


class SpikingBlock(nn.Module):
    """(T*B, inputs, H, W) -> spikes (T*B, outputs, H/stride, W/stride). ``neuron`` makes a layer of neurons."""

    def __init__(self, inputs: int, outputs: int, stride: int, neuron) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.lif1 = neuron()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.lif2 = neuron()
        self.shortcut = shortcut(inputs, outputs, stride)
        self.lif3 = neuron()

    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        out = fire(self.lif1, self.bn1(self.conv1(x)), T)
        out = fire(self.lif2, self.bn2(self.conv2(out)), T)
        return fire(self.lif3, out + (x if self.shortcut is None else self.shortcut(x)), T)


class SpikingResNet(Backbone):
    """Images (B, C, H, W) or frames (B, T, C, H, W) of any size -> features and logits, averaged over time.

    Neurons start from rest in every forward pass. In training as in evaluation ``net(x)`` is (B, classes); sequences
    come from :meth:`sequence`.

    Args:
        shape: of the network. convention, fused: of the neurons (:class:`backbones.utils.neurons.LIF`).
        stem_once: compute the stem's convolution and batch norm once where every step shows the same image. All outputs
            and gradients are those of the full computation; only the running variance of its batch norm is not, by the
            correction n / (n - 1), whose n no longer counts the copies.

    Attributes:
        T: time steps of an image; may be set at any time.
    """

    def __init__(
        self,
        num_classes: int,
        shape: Shape,
        T: int = 4,
        convention: str = "gt-post",
        fused: bool = True,
        stem_once: bool = True,
    ) -> None:
        super().__init__()
        self.T, self.stem_once = T, stem_once

        def neuron() -> LIF:
            return LIF(convention, fused=fused)

        width = shape.stages[0][0]
        self.conv1 = nn.Conv2d(shape.channels, width, 3, shape.stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.lif1 = neuron()
        self.blocks = nn.ModuleList(blocks(shape, lambda i, o, s: SpikingBlock(i, o, s, neuron)))
        self._attach_head(shape.stages[-1][0], num_classes, bias=False)

    def forward(self, x: torch.Tensor, returnt: str = "out", T: int | None = None):
        """What :meth:`Backbone.forward` returns, of the time average; or with 'sequence' the logits (T, B, classes).

        Args:
            x: a batch of normalised images or frames. T: time steps, of images only; default: the attribute.

        Raises:
            ValueError: ``T`` is below 1, or not the number of frames.
        """
        x = self._in_time(x, T)
        if returnt != "sequence":
            return super().forward(x, returnt)
        with self._precision(x.device):
            features = self._steps(x)
        return self.logits(features)

    def sequence(self, x: torch.Tensor, T: int | None = None) -> torch.Tensor:
        """Logits at every time step (T, B, classes); their mean over time is ``net(x)``."""
        return self(x, returnt="sequence", T=T)

    def _in_time(self, x: torch.Tensor, T: int | None) -> torch.Tensor:
        """Frames (B, T, C, H, W); an image's are a view of it, with stride 0 in time."""
        if x.dim() == 4:
            T = self.T if T is None else T
            if T < 1:
                raise ValueError(f"there is no network of {T} time steps")
            return x[:, None].expand(-1, T, -1, -1, -1)
        if T not in (None, x.shape[1]):
            raise ValueError(f"{x.shape[1]} frames take {x.shape[1]} time steps, not {T}")
        return x

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        return self._steps(x).mean(0)

    def _steps(self, x: torch.Tensor) -> torch.Tensor:
        """Frames (B, T, C, H, W) -> features at each step (T, B, d), at least float32."""
        T, channels = x.shape[1], self.conv1.in_channels
        if self.stem_once and x.stride(1) == 0:
            h = self.bn1(self.conv1(fit_channels(x[:, 0], channels)))
            h = self.lif1(h.expand(T, *h.shape)).flatten(0, 1)
        else:
            h = self.bn1(self.conv1(fit_channels(x.transpose(0, 1).flatten(0, 1), channels)))
            h = fire(self.lif1, h, T)
        for block in self.blocks:
            h = block(h, T)
        return h.mean((-2, -1), dtype=torch.promote_types(h.dtype, torch.float32)).unflatten(0, (T, -1))


def add_args(parser: argparse.ArgumentParser) -> None:
    """The flags of the spiking backbones."""
    from utils.args import add_switch, number

    parser.add_argument("--T", type=number(int, 1), default=4, help="time steps for which a spiking network is run")
    parser.add_argument(
        "--neuron",
        choices=CONVENTIONS,
        default="gt-post",
        help="when neurons fire (above the threshold, or at it too) and reset (after or before the decay): gt-post is "
        "snntorch's neuron, ge-pre SpikingJelly's",
    )
    add_switch(
        parser, "--fused_neuron", default=1, help="1: closed-form neurons, on CUDA one kernel; 0: loop over time"
    )
    add_switch(
        parser,
        "--stem_once",
        default=1,
        help="1: the stem of an image is computed once for all steps; 0: at every step",
    )


def build(args: argparse.Namespace, dataset: Any) -> SpikingResNet:
    """A randomly initialised network for ``dataset.N_CLASSES``."""
    return SpikingResNet(
        dataset.N_CLASSES,
        shape_of(args.backbone, dataset),
        getattr(args, "T", 4),
        getattr(args, "neuron", "gt-post"),
        bool(getattr(args, "fused_neuron", 1)),
        bool(getattr(args, "stem_once", 1)),
    )
