"""imagenet-val: the 50 000 validation images of ImageNet-1k, the control set of negation (arXiv 2212.04089, sec. 3).

One task of 1000 classes. Ten images of each class are for choosing coefficients and for curvature, forty are the test:
a division of ours, as the training images are of no use here.
"""

from __future__ import annotations

from pathlib import Path

import torchvision.datasets as tv

from datasets.utils.cifar import CLIP
from datasets.utils.mapped import MappedDataset, Part
from datasets.utils.readers import divided

TEMPLATES = (  # the seven that CLIP's authors found to do as well as all eighty
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def _read(root: Path, train: bool):
    data = tv.ImageNet(root / "imagenet", split="val")
    return divided(data, data.targets, 0.8, train, "imagenet"), [names[0] for names in data.classes]


class ImageNetVal(MappedDataset):
    """ImageNet's validation images."""

    NAME = "imagenet-val"
    PARTS = [
        Part(
            "imagenet-val",
            _read,
            1000,
            "put ILSVRC2012_img_val.tar (md5 29b22e2961454d5413ddabcf34fc5622) and ILSVRC2012_devkit_t12.tar.gz (md5 "
            "fa75699e90414af021442c21a62c3abf) of image-net.org into {}/imagenet",
        )
    ]
    FOLDER = "."
    N_TASKS = 1
    N_CLASSES_PER_TASK = 1000
    SIZE = (224, 224)
    MEAN, STD = CLIP
    DEFAULTS = {"backbone": "clip", "n_epochs": 1, "batch_size": 128}
    FED_DEFAULTS = {"num_comm_rounds": 5, "num_clients": 10, "distribution_alpha": 0.5}

    def prompts(self) -> list[list[str]]:
        """Seven for each class, with the first of its names."""
        return self.in_class_order([[t.format(c) for t in TEMPLATES] for c in self.class_names("imagenet-val")])
