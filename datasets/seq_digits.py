"""seq-digits: the 1,797 handwritten digits that scikit-learn ships, in 5 tasks of 2 classes. Nothing to download."""

from __future__ import annotations

import torch
from torch import Tensor

from datasets.utils import seeded, stratified_split
from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.transforms import Resize


class SequentialDigits(ContinualDataset):
    """Images are brought to 28x28 once (bilinear, antialiased), white ink on black; the 80/20 split never changes."""

    NAME = "seq-digits"
    SETTING = "class-il"
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    SIZE = (28, 28)
    CHANNELS = 1
    MEAN, STD = (0.5,), (0.5,)
    DEFAULTS = {"backbone": "vit-pocket", "n_epochs": 5, "batch_size": 32}
    FED_DEFAULTS = {"n_epochs": 2, "num_comm_rounds": 3, "batch_size": 16, "num_clients": 10, "distribution_alpha": 0.5}

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        part = stratified_split(digits.target, 0.2, seeded(0, "seq-digits"))[0 if train else 1]
        images = torch.from_numpy(digits.images[part]).float()[:, None] / 16  # ink comes as 0..16
        images = (Resize(28)(images) * 255).round().to(torch.uint8)
        return images, torch.from_numpy(digits.target[part]).long()
