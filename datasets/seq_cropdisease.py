"""seq-cropdisease: PlantVillage's leaves in 7 tasks of 5 classes (Mammoth: ViT, 5 epochs, batches of 128).

Of 38 classes Mammoth leaves out three (below). The folder cropdisease holds train.json and test.json of Mammoth's copy
(``data``, paths in its folder images, and ``labels``), or folders train and test with a folder for each class, or those
of the classes alone; of these a fixed fifth is for testing.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets.utils.cifar import FEDERATED, IMAGENET
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import Files, divided_folder, told
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, RandomHorizontalFlip, RandomResizedCrop, Resize

LISTS = "cropdisease/train.json", "cropdisease/test.json"
LEFT_OUT = {"Apple___Cedar_apple_rust", "Peach___healthy", "Potato___healthy"}


def _read(root: Path, train: bool):
    folder, listed = root / "cropdisease", told(root, LISTS, train)
    if listed:
        content = json.loads(listed.read_text(encoding="utf-8"))
        files = [(folder / "images" / p, int(y)) for p, y in zip(content["data"], content["labels"])]
        return Files(files), [str(c) for c in range(35)]
    return divided_folder(folder, train, "cropdisease", LEFT_OUT)


class SequentialCropDisease(FileDataset):
    """Images have 256 pixels. Random resized crops and flips; the whole image for testing."""

    NAME = "seq-cropdisease"
    PART = Part(
        "cropdisease",
        _read,
        35,
        "put PlantVillage's folders of colour images (raw/color of github.com/spMohanty/PlantVillage-Dataset), one for "
        "each class, into {}/cropdisease",
        lists=LISTS,
    )
    N_TASKS = 7
    N_CLASSES_PER_TASK = 5
    MEAN, STD = IMAGENET
    KEEP_TRAIN, KEEP_TEST = (256, whole), (224, whole)
    TRAIN_AUGMENT = [RandomResizedCrop(224, interpolation=BICUBIC), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(224, BICUBIC)]
    DEFAULTS = {"backbone": "vit", "n_epochs": 5, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}
