"""seq-scripts: 8 tasks, each 10 letters of one script. Ships with the project."""

from __future__ import annotations

from torch import Tensor

from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.shipped import shipped_arrays


class SequentialScripts(ContinualDataset):
    """28x28 renderings of letters, disjoint from what vit-pocket was pretrained on; white ink on black."""

    NAME = "seq-scripts"
    SETTING = "class-il"
    N_TASKS = 8
    N_CLASSES_PER_TASK = 10
    SIZE = (28, 28)
    CHANNELS = 1
    MEAN, STD = (0.5,), (0.5,)
    DEFAULTS = {"backbone": "vit-pocket", "n_epochs": 5, "batch_size": 32}
    FED_DEFAULTS = {"n_epochs": 2, "num_comm_rounds": 3, "batch_size": 16, "num_clients": 10, "distribution_alpha": 0.5}

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        return shipped_arrays("scripts", train)
