"""seq-eurosat-rgb: EuroSAT in 5 tasks of 2 kinds of land (Mammoth: ViT, 5 epochs, batches of 128).

Mammoth and fed-mammoth train on 13 500 images and test on 8 100, the division of CoOp (Zhou et al. 2022, 2109.01134;
its validation images are left out). It is taken from split.json or split_zhou_EuroSAT.json, if one of them lies in the
folder eurosat; else half of each class is for training and three tenths are for testing, always the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torchvision.datasets as tv
from torch.utils.data import Subset

from datasets.utils.cifar import CLIP, FEDERATED
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import EUROSAT, Files, divided, found
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, RandomHorizontalFlip, RandomResizedCrop, Resize

LISTS = "eurosat/split.json", "eurosat/split_zhou_EuroSAT.json"


def _read(root: Path, train: bool):
    data = found(tv.EuroSAT, root)
    for file in (root / name for name in LISTS):
        if file.exists():
            rows = json.loads(file.read_text(encoding="utf-8"))["train" if train else "test"]
            return Files([(root / "eurosat" / "2750" / path, label) for path, label, _ in rows]), data.classes
    targets = np.array(data.targets)
    rest = divided(data, targets, 0.3, train, "eurosat-rgb")
    if not train:
        return rest, data.classes
    kept = divided(rest.indices, targets[rest.indices], 2 / 7, True, "eurosat-rgb, validation")
    return Subset(data, rest.indices[kept.indices]), data.classes


class SequentialEuroSATRGB(FileDataset):
    """Images of 64 pixels; random resized crops of 224 out of them (under ``--fl`` out of 224, as in fed-mammoth) and
    flips, with CLIP's statistics; enlarged for testing. LoRM's published results are of images that are enlarged and
    nothing else (``--transforms lorm_iclr``)."""

    NAME = "seq-eurosat-rgb"
    PART = Part("eurosat-rgb", _read, 10, EUROSAT.how, lists=LISTS)
    N_TASKS = 5
    N_CLASSES_PER_TASK = 2
    MEAN, STD = CLIP
    KEEP_TRAIN = KEEP_TEST = (64, whole)
    TRAIN_AUGMENT = [RandomResizedCrop(224, interpolation=BICUBIC), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(224, BICUBIC)]
    FED = {"TRAIN_AUGMENT": [Resize(224, BICUBIC), *TRAIN_AUGMENT]}
    DEFAULTS = {"backbone": "vit", "n_epochs": 5, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}

    @staticmethod
    def get_parser(parser):
        parser.add_argument(
            "--transforms",
            choices=("default", "lorm_iclr"),
            default="default",
            help="lorm_iclr: images are enlarged, not augmented, not normalised (fed-mammoth)",
        )
        return parser

    def configure(self) -> None:
        super().configure()
        if self._arg("transforms") == "lorm_iclr":
            self.TRAIN_AUGMENT, self.MEAN, self.STD = self.TEST_AUGMENT, None, None
