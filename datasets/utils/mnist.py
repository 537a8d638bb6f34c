"""What the MNIST benchmarks share."""

from __future__ import annotations

from torch import Tensor

from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.torchvision_arrays import torchvision_arrays


class MNISTDataset(ContinualDataset):
    """28x28 grey digits in [0, 1], neither normalised nor augmented, as in Mammoth."""

    SIZE = (28, 28)
    CHANNELS = 1
    SOURCE = "MNIST"
    FED_DEFAULTS = {"n_epochs": 1, "num_comm_rounds": 5, "batch_size": 64, "num_clients": 10, "distribution_alpha": 0.5}

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        return torchvision_arrays("MNIST", self._arg("base_path", "./data/"), train)
