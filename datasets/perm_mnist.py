"""perm-mnist: 20 tasks with all ten digits, the pixels shuffled by a fixed permutation per task (as in Mammoth)."""

from __future__ import annotations

import torch
from torch import Tensor

from datasets.utils import seeded
from datasets.utils.mnist import MNISTDataset


class PermutedMNIST(MNISTDataset):
    """Every task is permuted, the first one too; the permutations are a function of ``--seed``."""

    NAME = "perm-mnist"
    SETTING = "domain-il"
    N_TASKS = 20
    N_CLASSES_PER_TASK = 10
    DEFAULTS = {"backbone": "mnistmlp", "n_epochs": 1, "batch_size": 128}

    def configure(self) -> None:
        rng, pixels = seeded(self.seed, "perm-mnist"), self.SIZE[0] * self.SIZE[1]
        self.permutations = [torch.from_numpy(rng.permutation(pixels)) for _ in range(self.N_TASKS)]

    def task_images(self, images: Tensor, task: int) -> Tensor:
        return images.flatten(2)[:, :, self.permutations[task].to(images.device)].view_as(images)
