"""mnist-360: a stream of nine digits that turn, without borders between tasks (Buzzega et al. 2020, 2004.07211).

Digits 0 to 8 come in pairs, (0, 1), (1, 2), ..., (8, 0), three times over. A sixth of a digit's images, drawn by the
seed, belongs to each of its six appearances. From one image of a digit to its next it is turned a little further, a
full circle in all, digit j starting at 60 (j - 1) degrees. One epoch, batches of 16, both digits of a pair mixed in
proportion. The test images, in the order of their files, go once around the circle too.

Here the stream is one task whose samples are not shuffled, so that methods see no border, and every image is shown once
(Mammoth draws them with replacement). Under ``--fl`` each client goes through its part of the stream, in the stream's
order, in every round.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.utils import seeded
from datasets.utils.mnist import MNISTDataset

DIGITS, ROUNDS = 9, 3


def stream(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the images in the order of the stream, and the angle of each in degrees."""
    shares, angles = [], np.zeros(len(labels))
    for j in range(DIGITS):
        mine = rng.permutation(np.flatnonzero(labels == j))
        angles[mine] = 60 * (j - 1) + 360 * np.arange(len(mine)) / len(mine)
        shares.append(np.array_split(mine, 2 * ROUNDS))
    order = []
    for first in list(range(DIGITS)) * ROUNDS:
        pair = [shares[first].pop(0), shares[(first + 1) % DIGITS].pop(0)]
        when = [(np.arange(len(p)) + 0.5) / len(p) for p in pair]  # mixed in proportion: both end together
        order.append(np.concatenate(pair)[np.argsort(np.concatenate(when), kind="stable")])
    return np.concatenate(order), angles


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """uint8 images (N, C, S, S), each turned by an angle of its own, as torchvision's ``rotate`` does it (nearest)."""
    cos, sin, nothing = *(f(torch.deg2rad(degrees)) for f in (torch.cos, torch.sin)), torch.zeros_like(degrees)
    theta = torch.stack((cos, -sin, nothing, sin, cos, nothing), 1).view(-1, 2, 3).float()
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(images.dtype)


class MNIST360(MNISTDataset):
    NAME = "mnist-360"
    SETTING = "general-continual"
    N_TASKS = 1
    N_CLASSES_PER_TASK = DIGITS
    STREAM = True
    DEFAULTS = {"backbone": "mnistmlp", "n_epochs": 1, "batch_size": 16}

    @property
    def _source(self) -> tuple[str, str]:
        return f"{self.NAME} {self.seed}", str(self._arg("base_path", "./data/"))

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load_arrays(train)
        if train:
            order, angles = stream(labels.numpy(), seeded(self.seed, "mnist-360"))
        else:
            order, angles = np.flatnonzero(labels.numpy() < DIGITS), np.zeros(len(labels))
            for j in range(DIGITS):
                mine = np.flatnonzero(labels.numpy() == j)
                angles[mine] = 360 * np.arange(len(mine)) / len(mine)
        order = torch.from_numpy(order)
        return rotated(images[order], torch.from_numpy(angles)[order]), labels[order]
