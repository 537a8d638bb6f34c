"""seq-mit67: MIT Indoor Scenes in 7 tasks of 7 rooms and 3 of 6 (Mammoth: ViT, 50 epochs, batches of 32).

About 80 images of each class for training and 20 for testing, as TrainImages.txt and TestImages.txt say.
"""

from __future__ import annotations

from pathlib import Path

from datasets.utils.cifar import FEDERATED, IMAGENET
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import Files, class_folders, fetched, unpacked
from datasets.utils.stacked import square
from datasets.utils.transforms import BICUBIC, CenterCrop, RandomCrop, RandomHorizontalFlip, Resize

URL, LISTS = (
    "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar",
    "https://web.mit.edu/torralba/www",
)


def _read(root: Path, train: bool):
    name = "TrainImages.txt" if train else "TestImages.txt"
    paths = fetched(root / "MIT67" / name, f"{LISTS}/{name}").read_text(encoding="utf-8").split("\n")
    folder = unpacked(root / "MIT67" / "Images", URL)
    rooms = class_folders(folder)
    return Files([(folder / p.strip(), rooms.index(p.split("/")[0])) for p in paths if p.strip()]), rooms


class SequentialMIT67(FileDataset):
    """The middle of each image at 256 pixels. Random crops of 224 and flips; the central 224 for testing."""

    NAME = "seq-mit67"
    PART = Part(
        "mit67",
        _read,
        67,
        f"put indoorCVPR_09.tar ({URL}) or its folder Images, and TrainImages.txt and TestImages.txt of {LISTS}, into "
        "{}/MIT67",
    )
    N_TASKS = 10
    N_CLASSES_PER_TASK = [7] * 7 + [6] * 3
    MEAN, STD = IMAGENET
    KEEP_TRAIN = KEEP_TEST = (256, square)
    TRAIN_AUGMENT = [RandomCrop(224), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(256, BICUBIC), CenterCrop(224)]
    DEFAULTS = {"backbone": "vit", "n_epochs": 50, "batch_size": 32}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}
