"""Batched image transforms on the device.

torchvision's v2 transforms draw **once per call**: given a batch they flip all images or none, and crop all at one
place. Here every image of the batch has its own draw, as in a DataLoader that transforms images one by one. Draws are
made on the CPU, from ``generator`` or the global generator, so that they do not depend on the device; the image
arithmetic is torchvision's (or checked against it) and runs wherever the images are.

Each transform is called as ``t(x, generator=None)`` with ``x`` of shape (B, C, H, W) or (C, H, W), float in [0, 1] or
uint8. The generator may be a :class:`Draws`: several sources, each for its own run of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC


def to_float(x: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [0, 1]; floats pass."""
    return x if x.is_floating_point() else x.float() / 255


class Draws:
    """Several generators for one batch, ``parts = [(generator, how many consecutive images), ...]``.

    Every image gets the draw it would get in a batch of its part alone, so a batch of many clients can be augmented at
    once.
    """

    def __init__(self, parts: Sequence[tuple[torch.Generator, int]]):
        self.parts = list(parts)


def rand(
    n: int, *shape: int, generator: torch.Generator | Draws | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform draws in [0, 1), (n, *shape), on the CPU; row i belongs to image i."""
    if isinstance(generator, Draws):
        return torch.cat([torch.rand(m, *shape, generator=g, dtype=dtype) for g, m in generator.parts])
    return torch.rand(n, *shape, generator=generator, dtype=dtype)


def randint(high: int, n: int, *shape: int, generator: torch.Generator | Draws | None = None) -> Tensor:
    """Integers in [0, high), (n, *shape), int64 on the CPU; row i belongs to image i."""
    if isinstance(generator, Draws):
        return torch.cat([torch.randint(high, (m, *shape), generator=g) for g, m in generator.parts])
    return torch.randint(high, (n, *shape), generator=generator)


def send(t: Tensor, device: torch.device | str) -> Tensor:
    """``t`` (on the CPU) on ``device``; a GPU is not waited for, since the copy starts from pinned memory."""
    if torch.device(device).type == "cuda" and not t.is_cuda:
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


@cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Per-channel constants (C, 1, 1), made once for a device."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def _pair(v: int | Sequence[int]) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else (int(v[0]), int(v[1]))


class BatchTransform:
    """Base: a single image is a batch of one, frames (B, T, C, H, W) are treated alike. Subclasses write ``apply``."""

    pointwise = False  # whether apply takes (..., C, H, W)
    draws = True  # whether apply takes anything from the generator

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if x.dim() == 5 and not self.pointwise:
            return self.apply(x.flatten(1, 2), generator).unflatten(1, x.shape[1:3])
        if x.dim() not in (3, 4, 5):
            raise ValueError(f"{type(self).__name__} takes (B, [T,] C, H, W) or (C, H, W), not {tuple(x.shape)}")
        return self.apply(x, generator) if x.dim() >= 4 else self.apply(x[None], generator)[0]

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class Compose:
    """Transforms in sequence; callables that are not batch transforms (torchvision's own) get no generator.

    A PIL image, which method files written for Mammoth may pass, is read as float in [0, 1].
    """

    def __init__(self, transforms: Sequence[Callable]):
        self.transforms = list(transforms)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            x = to_float(TF.pil_to_tensor(x))
        for t in self.transforms:
            x = t(x, generator) if isinstance(t, BatchTransform | Compose) else t(x)
        return x

    def __repr__(self) -> str:
        return f"Compose({self.transforms})"


def draws_nothing(transform: Callable) -> bool:
    """Whether a transform is known to show an image in the same way every time."""
    if isinstance(transform, Compose):
        return all(map(draws_nothing, transform.transforms))
    return isinstance(transform, BatchTransform) and not transform.draws


class Normalize(BatchTransform):
    """``(x - mean) / std`` per channel; uint8 is brought to [0, 1] first."""

    pointwise, draws = True, False

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = tuple(mean), tuple(std)

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = to_float(x)
        return (x - _constant(self.mean, x.dtype, x.device)) / _constant(self.std, x.dtype, x.device)


class Denormalize(BatchTransform):
    """The inverse of :class:`Normalize`."""

    pointwise, draws = True, False

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = tuple(mean), tuple(std)

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x * _constant(self.std, x.dtype, x.device) + _constant(self.mean, x.dtype, x.device)


class Resize(BatchTransform):
    """torchvision's antialiased resize. An int is the length of the shorter side, a pair is (height, width)."""

    draws = False

    def __init__(self, size: int | Sequence[int], interpolation: InterpolationMode = BILINEAR):
        self.size, self.interpolation = size, interpolation

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        size = [self.size] if isinstance(self.size, int) else list(self.size)
        return TF.resize(x, size, self.interpolation, antialias=True)


class CenterCrop(BatchTransform):
    """The middle ``size``; a smaller image is padded with zeros, as in torchvision."""

    draws = False

    def __init__(self, size: int | Sequence[int]):
        self.size = _pair(size)

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return TF.center_crop(x, list(self.size))


class RandomCrop(BatchTransform):
    """Pad with ``padding`` zeros on each side, then cut ``size`` at a place of its own for each image."""

    def __init__(self, size: int | Sequence[int], padding: int = 0):
        self.size, self.padding = _pair(size), padding

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = F.pad(x, [self.padding] * 4)
        (b, c, height, width), (h, w) = x.shape, self.size
        if height < h or width < w:
            raise ValueError(f"RandomCrop: {h}x{w} does not fit in {height}x{width} (padding included)")
        top = randint(height - h + 1, b, 1, generator=generator)
        left = randint(width - w + 1, b, 1, generator=generator)
        rows = send(top + torch.arange(h), x.device)
        cols = send(left + torch.arange(w), x.device)
        x = x.gather(2, rows.view(b, 1, h, 1).expand(b, c, h, width))
        return x.gather(3, cols.view(b, 1, 1, w).expand(b, c, h, w))


class RandomHorizontalFlip(BatchTransform):
    """Mirror each image with probability ``p``."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        flip = rand(len(x), generator=generator) < self.p
        return torch.where(send(flip.view(-1, 1, 1, 1), x.device), x.flip(-1), x)


class RandomResizedCrop(BatchTransform):
    """A box of random area and aspect ratio per image, resized to ``size``; boxes are drawn by torchvision's rule.

    Resizing is linear and separable, so a batch of crops is two batched products with one small matrix per image and
    axis (no loop over images, which matters on a GPU); the matrices are those of torchvision's antialiased resize.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: InterpolationMode = BILINEAR,
    ):
        if interpolation not in (BILINEAR, BICUBIC):
            raise ValueError("RandomResizedCrop: interpolation is BILINEAR or BICUBIC")
        self.size, self.scale, self.ratio, self.interpolation = _pair(size), scale, ratio, interpolation

    def boxes(self, n: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, 4) int64 boxes (top, left, height, width): the first of ten tries that fits, else a central crop."""
        u = rand(n, 10, 4, generator=generator, dtype=torch.float64)
        area = height * width * (self.scale[0] + u[..., 0] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + u[..., 1] * (high - low))
        h, w = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
        fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
        first = fits.int().argmax(1, keepdim=True)
        h, w, u, fits = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0], u[torch.arange(n), first[:, 0]], fits.any(1)
        whole = min(max(width / height, self.ratio[0]), self.ratio[1])  # the nearest allowed ratio for the central crop
        h = torch.where(fits, h, min(height, round(width / whole)))
        w = torch.where(fits, w, min(width, round(height * whole)))
        top = torch.where(fits, (u[:, 2] * (height - h + 1)).long(), (height - h) // 2)
        left = torch.where(fits, (u[:, 3] * (width - w + 1)).long(), (width - w) // 2)
        return torch.stack((top, left, h, w), 1)

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.crop(x, self.boxes(len(x), x.shape[2], x.shape[3], generator))

    def crop(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Image i of (B, C, H, W) cut at ``boxes[i]`` and resized: (B, C, *size)."""
        boxes = send(boxes, x.device)
        y = x if x.is_floating_point() else x.float()
        down = _resize_matrix(boxes[:, 0], boxes[:, 2], x.shape[2], self.size[0], self.interpolation).to(y.dtype)
        across = _resize_matrix(boxes[:, 1], boxes[:, 3], x.shape[3], self.size[1], self.interpolation).to(y.dtype)
        (b, c, h, w), (out_h, out_w) = y.shape, self.size
        y = (y.reshape(b, c * h, w) @ across.mT).view(b, c, h, out_w)  # channels share a matrix: one product per image
        y = down @ y.transpose(1, 2).reshape(b, h, c * out_w)
        y = y.view(b, out_h, c, out_w).transpose(1, 2).contiguous()
        return y if x.is_floating_point() else y.round_().clamp_(0, 255).to(x.dtype)


def _resize_matrix(start: Tensor, length: Tensor, n_in: int, n_out: int, interpolation: InterpolationMode) -> Tensor:
    """(B, n_out, n_in) float32: row o weighs the input pixels that make output pixel o of [start, start + length).

    PIL's and torch's antialiased filters: triangle, or cubic with a = -0.5, widened by the scale when shrinking.
    """
    scale = (length.float() / n_out).view(-1, 1, 1)
    wide = scale.clamp(min=1)
    support = (1.0 if interpolation == BILINEAR else 2.0) * wide
    centre = scale * (torch.arange(n_out, device=start.device) + 0.5).view(1, -1, 1)
    pixel = torch.arange(n_in, device=start.device).view(1, 1, -1) - start.view(-1, 1, 1)
    low = (centre - support + 0.5).trunc().clamp(min=0)
    high = torch.minimum((centre + support + 0.5).trunc(), length.view(-1, 1, 1).float())
    t = ((pixel + 0.5 - centre) / wide).abs()
    if interpolation == BILINEAR:
        weight = (1 - t).clamp(min=0)
    else:
        near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        weight = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    weight = weight * ((pixel >= low) & (pixel < high))
    return weight / weight.sum(-1, keepdim=True)


class RandomAffine(BatchTransform):
    """Rotate, shift and scale each image by draws of its own (bilinear, zeros outside).

    Args:
        degrees: angles lie in [-degrees, degrees].
        translate: shifts lie in +-translate of (width, height).
        scale: (low, high) factors of magnification.
    """

    def __init__(
        self, degrees: float, translate: tuple[float, float] = (0.0, 0.0), scale: tuple[float, float] = (1.0, 1.0)
    ):
        self.degrees, self.translate, self.scale = degrees, translate, scale

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        b, _, h, w = x.shape
        u = rand(b, 4, generator=generator)
        angle = torch.deg2rad((2 * u[:, 0] - 1) * self.degrees)
        factor = self.scale[0] + u[:, 1] * (self.scale[1] - self.scale[0])
        shift = 2 * (2 * u[:, 2:] - 1) * torch.tensor(self.translate)  # grid coordinates span 2
        cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
        # the grid says where each output pixel comes from, so this is the inverse map, in coordinates of a w x h image
        linear = torch.stack((cos, sin * h / w, -sin * w / h, cos), 1).view(b, 2, 2)
        theta = send(torch.cat((linear, -linear @ shift[:, :, None]), 2), x.device)
        y = x if x.is_floating_point() else x.float()
        grid = F.affine_grid(theta.to(y.dtype), list(x.shape), align_corners=False)
        y = F.grid_sample(y, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return y if x.is_floating_point() else y.round_().clamp_(0, 255).to(x.dtype)


class ColorJitter(BatchTransform):
    """Change brightness, contrast, saturation and hue of each image, in this order (torchvision draws the order too).

    Args:
        brightness, contrast, saturation: factors lie in [1 - value, 1 + value].
        hue: shifts lie in [-value, value], of a full circle of 1.
    """

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0):
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        ranges = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        drawn = (2 * rand(len(x), 4, generator=generator) - 1) * ranges + torch.tensor([1.0, 1.0, 1.0, 0.0])
        y = self.jitter(to_float(x), send(drawn, x.device))
        return y if x.is_floating_point() else (y * 255).round_().to(x.dtype)

    @staticmethod
    def jitter(x: Tensor, drawn: Tensor) -> Tensor:
        """Float images (B, 3, H, W) changed by ``drawn`` (B, 4): three factors and the shift of the hue."""
        brightness, contrast, saturation, hue = drawn.view(-1, 4, 1, 1, 1).unbind(1)
        x = (x * brightness).clamp(0, 1)
        x = (contrast * x + (1 - contrast) * _grey(x).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
        x = (saturation * x + (1 - saturation) * _grey(x)).clamp(0, 1)
        r, g, b = x.unbind(1)
        value, chroma = x.amax(1), x.amax(1) - x.amin(1)
        d = chroma.clamp(min=1e-12)  # without chroma there is no hue, and none is needed
        angle = torch.where(value == r, (g - b) / d, torch.where(value == g, (b - r) / d + 2, (r - g) / d + 4))
        k = (angle[:, None] + 6 * hue + _constant((5.0, 3.0, 1.0), x.dtype, x.device)) % 6
        return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    """Luminance (B, 1, H, W) of (B, 3, H, W)."""
    return (x * _constant((0.2989, 0.587, 0.114), x.dtype, x.device)).sum(1, keepdim=True)
