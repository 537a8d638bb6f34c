"""seq-8vision: eight data sets, one task each, the benchmark of task arithmetic (Ilharco et al. 2023, 2212.04089).

Cars, DTD, EuroSAT, GTSRB, MNIST, RESISC45, SUN397 and SVHN, in this order; 758 classes. Images are kept as CLIP
prepares them, 224 x 224 (MNIST 28, SVHN 32, EuroSAT 64, enlarged when read), on disk: about 20 GB. Methods that train
each task by itself give it epochs of its own, those of task arithmetic's authors, unless --n_epochs is given.

Where files do not divide a data set into training and test images, a fixed division is made: a tenth of each class of
EuroSAT for testing, a fifth of RESISC45's, and half of SUN397's, unless its folder Partitions (Training_01.txt,
Testing_01.txt) is there. DTD's training and validation parts are trained on.
"""

from __future__ import annotations

import yaml

from datasets.utils.cifar import CLIP
from datasets.utils.mapped import MappedDataset
from datasets.utils.readers import CARS, DTD, EUROSAT, GTSRB, MNIST, RESISC45, SUN397, SVHN
from datasets.utils.shipped import DATA_DIR
from datasets.utils.transforms import BICUBIC, RandomResizedCrop

PARTS = [CARS, DTD, EUROSAT, GTSRB, MNIST, RESISC45, SUN397, SVHN]
TASKS, CLASSES = tuple(p.name for p in PARTS), tuple(p.classes for p in PARTS)
EPOCHS = (35, 76, 12, 11, 5, 15, 14, 4)


class Sequential8Vision(MappedDataset):
    """One data set after another; labels are those of all before plus its own."""

    NAME = "seq-8vision"
    PARTS = PARTS
    FOLDER = "8vision"
    N_TASKS = 8
    N_CLASSES_PER_TASK = list(CLASSES)
    SIZE = (224, 224)
    MEAN, STD = CLIP
    TRAIN_AUGMENT = [RandomResizedCrop(224, scale=(0.9, 1.0), interpolation=BICUBIC)]  # open_clip's; no mirrored digits
    DEFAULTS = {"backbone": "clip", "n_epochs": 10, "batch_size": 128}
    FED_DEFAULTS = {"n_epochs": 2, "num_comm_rounds": 5, "num_clients": 10, "distribution_alpha": 0.5}

    def get_task_epochs(self, task: int) -> int | None:
        """Epochs of a task by the benchmark's authors."""
        return EPOCHS[task]

    def prompts(self) -> list[list[str]]:
        """For each of the 758 classes its prompts, for a classifier made of text."""
        known = yaml.safe_load((DATA_DIR / "prompts_8vision.yaml").read_text())
        out = []
        for name in TASKS:
            about = known[name]
            for c in self.class_names(name):
                said = about.get("names", {}).get(c, c.replace("_", " "))
                out.append([t.format(said) for t in about["templates"]])
        return self.in_class_order(out)
