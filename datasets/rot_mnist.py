"""rot-mnist: 20 tasks with all ten digits, turned by a fixed angle per task, 0 to 180 degrees (as in Mammoth)."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from datasets.utils import seeded
from datasets.utils.mnist import MNISTDataset


class RotatedMNIST(MNISTDataset):
    """The angles (``self.angles``, counter-clockwise) are a function of ``--seed``; nearest pixel, as in Mammoth."""

    NAME = "rot-mnist"
    SETTING = "domain-il"
    N_TASKS = 20
    N_CLASSES_PER_TASK = 10
    DEFAULTS = {"backbone": "mnistmlp", "n_epochs": 1, "batch_size": 128}

    def configure(self) -> None:
        self.angles = seeded(self.seed, "rot-mnist").uniform(0, 180, self.N_TASKS).tolist()

    def task_images(self, images: Tensor, task: int) -> Tensor:
        return TF.rotate(images, self.angles[task])
