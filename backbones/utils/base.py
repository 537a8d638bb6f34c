"""What every backbone can do: return logits or features, tell head from body, and pass its weights as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

ReturnTypes = Literal["out", "features", "both", "all"]


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero bias for a linear layer; anything else is left alone (for ``net.apply``)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def num_flat_features(x: torch.Tensor) -> int:
    """How many values one sample of the batch ``x`` of shape (B, ...) has."""
    return math.prod(x.shape[1:])


def fit_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Bring images (B, C, H, W) to ``channels`` channels: grey is repeated, colour is averaged to one channel.

    Raises:
        ValueError: neither applies.
    """
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    if channels == 1:
        return x.mean(1, keepdim=True)
    raise ValueError(f"this backbone takes images of {channels} channels (or 1), not {x.shape[1]}")


def fit_size(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize images (B, C, H, W) to ``size`` (height, width), bilinearly with antialiasing, unless they have it."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


@contextmanager
def plain_attention(net: nn.Module) -> Iterator[None]:
    """timm's attention as plain products within the block: vmap has no rule for the fused kernel and loops instead."""
    fused = [m for m in net.modules() if getattr(m, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


class Backbone(nn.Module):
    """A feature extractor with one linear head, with the interface of Mammoth's ``MammothBackbone``.

    A subclass writes ``_features(x)`` and calls ``_attach_head``, which sets ``classifier``, ``feature_dim`` and
    ``num_classes``. Nothing here needs ``__init__`` to have run, so it may be mixed into another library's network.
    """

    classifier: nn.Linear
    feature_dim: int
    num_classes: int
    autocast: torch.dtype | None = None  # type of the forward pass where it is not the weights' own; see set_precision

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def _attach_head(self, feature_dim: int, num_classes: int, bias: bool = True) -> None:
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.classifier = nn.Linear(feature_dim, num_classes, bias=bias)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> features (B, feature_dim)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(
        self, x: torch.Tensor, returnt: ReturnTypes = "out"
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) -> what ``returnt`` asks for.

        Args:
            x: a batch of normalised images.
            returnt: 'out' for logits (B, num_classes), 'features' for (B, feature_dim), 'both' or 'all' for
                (logits, features).

        Raises:
            NotImplementedError: another ``returnt``, as in Mammoth.
        """
        if returnt not in ("out", "features", "both", "all"):
            raise NotImplementedError(f"unknown return type {returnt!r}: choose 'out', 'features', 'both' or 'all'")
        with self._precision(x.device):
            features = self._features(x)
        features = features if self.autocast is None else features.float()
        if returnt == "features":
            return features
        out = self.logits(features)
        return out if returnt == "out" else (out, features)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, feature_dim) -> logits (B, num_classes), as :meth:`forward` makes them."""
        with self._precision(features.device):
            out = self.classifier(features)
        return out if self.autocast is None else out.float()

    def _precision(self, device: torch.device):
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)

    def set_precision(self, precision: str) -> None:
        """Run the forward pass, and with it the backward pass, in 'fp32', 'bf16' or 'fp16' (torch's autocast).

        Weights keep their type, and features and logits come out as float32, so that losses and statistics outside are
        not affected.
        """
        self.autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> features (B, feature_dim)."""
        return self(x, returnt="features")

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The classifier's parameters under their names in ``named_parameters()``."""
        return {name: p for name, p in self.named_parameters() if name.startswith("classifier.")}

    def body_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters but the classifier's, under their names in ``named_parameters()``."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("classifier.")}

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly drawn one for ``num_classes`` classes, with the old one's device and type."""
        like, bias = self.classifier.weight, self.classifier.bias is not None
        self._attach_head(self.feature_dim, num_classes, bias)
        self.classifier.to(device=like.device, dtype=like.dtype).train(self.training)

    def get_params(self) -> torch.Tensor:
        """All parameters as one vector (P,), in the order of ``parameters()``; gradients flow through it."""
        return torch.cat([p.reshape(-1) for p in self.parameters()])

    @torch.no_grad()
    def set_params(self, new_params: torch.Tensor) -> None:
        """Copy the vector ``new_params`` (P,) into the parameters. Copied, so that two networks never share memory."""
        for p, new in zip(self.parameters(), self._split(new_params)):
            p.copy_(new)

    def get_grads_list(self) -> list[torch.Tensor]:
        """The flattened gradient of each parameter; zeros where there is none (a frozen or unused parameter)."""
        return [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters()]

    def get_grads(self) -> torch.Tensor:
        """All gradients as one vector (P,), in the order of ``parameters()``."""
        return torch.cat(self.get_grads_list())

    def set_grads(self, new_grads: torch.Tensor) -> None:
        """Set every parameter's gradient from the vector ``new_grads`` (P,)."""
        for p, new in zip(self.parameters(), self._split(new_grads)):
            p.grad = new.detach().to(device=p.device, dtype=p.dtype, copy=True)

    def _split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        shapes = [p.shape for p in self.parameters()]
        total = sum(s.numel() for s in shapes)
        if vector.numel() != total:
            raise ValueError(f"this network has {total} parameters, the vector has {vector.numel()} values")
        return [v.view(s) for v, s in zip(vector.reshape(-1).split([s.numel() for s in shapes]), shapes)]


MammothBackbone = Backbone
