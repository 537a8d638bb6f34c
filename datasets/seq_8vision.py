"""seq-8vision: eight data sets, one task each, the benchmark of task arithmetic (Ilharco et al. 2023, 2212.04089).

Cars, DTD, EuroSAT, GTSRB, MNIST, RESISC45, SUN397 and SVHN, in this order; 758 classes. Images are kept as CLIP
prepares them, 224 x 224 (MNIST 28, SVHN 32, EuroSAT 64, enlarged when read), on disk: about 20 GB. Methods that train
each task by itself give it epochs of its own, those of task arithmetic's authors, unless --n_epochs is given.

Where files do not divide a data set into training and test images, a fixed division is made: a tenth of each class of
EuroSAT for testing, a fifth of RESISC45's, and half of SUN397's, unless its folder Partitions (Training_01.txt,
Testing_01.txt) is there. DTD's training and validation parts are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torchvision.datasets as tv
import yaml
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.transforms.v2 import functional as TF

from datasets.utils.cifar import CLIP
from datasets.utils.mapped import MappedDataset, Part, divided, found
from datasets.utils.shipped import DATA_DIR
from datasets.utils.torchvision_arrays import torchvision_arrays
from datasets.utils.transforms import BICUBIC, RandomResizedCrop

TASKS = ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
CLASSES = (196, 47, 10, 43, 10, 45, 397, 10)
EPOCHS = (35, 76, 12, 11, 5, 15, 14, 4)
STORED = {"mnist": 28, "svhn": 32, "eurosat": 64}
HOW = {  # what to do where there is no download, or it fails
    "cars": "put the folder stanford_cars (cars_train, cars_test, devkit, cars_test_annos_withlabels.mat) into {}",
    "dtd": "put dtd-r1.0.1.tar.gz (md5 fff73e5086ae6bdbea199a49dfb8a4c1, robots.ox.ac.uk/~vgg/data/dtd) into {}/dtd",
    "eurosat": "put the folder 2750 of EuroSAT.zip (RGB, github.com/phelber/EuroSAT) into {}/eurosat",
    "gtsrb": "put the training and test images of benchmark.ini.rub.de into {}/gtsrb, unpacked",
    "mnist": "put MNIST's four files into {}/MNIST/raw",
    "resisc45": "put the folder NWPU-RESISC45 (a folder of images for each of 45 classes) into {}",
    "sun397": "put the folder SUN397 (SUN397.tar.gz, md5 8ca2778205c41d23104230ba66911c7a) into {}",
    "svhn": "put train_32x32.mat and test_32x32.mat (ufldl.stanford.edu/housenumbers) into {}",
}


class Files(Sequence):
    """(PIL image, label) of files."""

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i):
        path, label = self.files[i]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def _cars(root: Path, train: bool):
    data = tv.StanfordCars(root, split="train" if train else "test")
    return data, data.classes


def _dtd(root: Path, train: bool):
    splits = [found(tv.DTD, root, split=s) for s in (("train", "val") if train else ("test",))]
    return ConcatDataset(splits), splits[0].classes


def _eurosat(root: Path, train: bool):
    data = found(tv.EuroSAT, root)
    return divided(data, data.targets, 0.1, train, "eurosat"), data.classes


def _gtsrb(root: Path, train: bool):
    return found(tv.GTSRB, root, split="train" if train else "test"), [str(c) for c in range(43)]


def _mnist(root: Path, train: bool):
    images, labels = torchvision_arrays("MNIST", str(root), train)
    return [(TF.to_pil_image(x), int(y)) for x, y in zip(images, labels)], [str(c) for c in range(10)]


def _resisc45(root: Path, train: bool):
    data = tv.ImageFolder(root / "NWPU-RESISC45")
    return divided(data, data.targets, 0.2, train, "resisc45"), data.classes


def _sun397(root: Path, train: bool):
    data = found(tv.SUN397, root)
    lists = root / "SUN397" / "Partitions" / ("Training_01.txt" if train else "Testing_01.txt")
    names = [c.replace("/", " ") for c in data.classes]
    if not lists.exists():
        order = sorted(range(len(data)), key=lambda i: str(data._image_files[i]))  # the system lists files in any order
        labels = [data._labels[i] for i in order]
        return divided(Subset(data, order), labels, 0.5, train, "sun397"), names
    paths = [line.strip() for line in lists.read_text().splitlines() if line.strip()]
    files = [(str(root / "SUN397" / p.lstrip("/")), data.class_to_idx["/".join(Path(p).parts[2:-1])]) for p in paths]
    return Files(files), names


def _svhn(root: Path, train: bool):
    return found(tv.SVHN, root, split="train" if train else "test"), [str(c) for c in range(10)]


PARTS = [
    Part(name, globals()[f"_{name}"], classes, HOW[name], STORED.get(name)) for name, classes in zip(TASKS, CLASSES)
]


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
