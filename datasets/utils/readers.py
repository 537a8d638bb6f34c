"""Readers of image data sets in the layout in which they are distributed, for the benchmarks that use them.

A reader takes --base_path and whether the training images are meant, and gives (a sequence of (PIL image, label), names
of the classes). Where files do not divide a data set into training and test images, a fixed division is made.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torchvision.datasets as tv
import yaml
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.transforms.v2 import functional as TF

from datasets.utils import seeded, stratified_split
from datasets.utils.mapped import Part
from datasets.utils.torchvision_arrays import torchvision_arrays


class Files(Sequence):
    """(PIL image, label) of files."""

    def __init__(self, files: Sequence[tuple[str | Path, int]]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i):
        path, label = self.files[i]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def divided(samples, labels, share: float, train: bool, name: str) -> Subset:
    """The training part of a data set that has none, or its test part, a ``share`` of each class: always the same."""
    return Subset(samples, stratified_split(np.asarray(labels), share, seeded(0, name))[0 if train else 1])


def found(reader, root, **kwargs):
    """torchvision's data set from its files, or else downloaded."""
    try:
        return reader(root, download=False, **kwargs)
    except Exception:  # not there, not whole: the download says more
        return reader(root, download=True, **kwargs)


def fetched(file: Path, url: str, md5: str | None = None) -> Path:
    """``file``, downloaded unless it is there; it appears whole or not at all.

    Raises:
        RuntimeError, OSError: no download, or a file whose checksum is another.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetching-") as temporary:
            download_url(url, temporary, file.name, md5)
            os.rename(Path(temporary) / file.name, file)
    elif not check_integrity(file, md5):
        raise RuntimeError(f"{file} is damaged: its md5 is not {md5}")
    return file


def unpacked(folder: Path, url: str, md5: str | None = None) -> Path:
    """``folder`` out of the archive at ``url``, which is downloaded and stays beside it, unless one of them is there.

    The folder, which must be what the archive holds, appears whole or not at all.

    Raises:
        RuntimeError, OSError: no download, or an archive whose checksum is another.
    """
    if not folder.is_dir():
        archive = fetched(folder.parent / url.rsplit("/", 1)[1], url, md5)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as temporary:
            try:
                extract_archive(archive, temporary)
                os.rename(Path(temporary) / folder.name, folder)
            except Exception as e:  # cut short, another format, other contents
                raise RuntimeError(f"{archive} cannot be unpacked ({e}): delete it") from e
    return folder


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder in alphabetical order; hidden ones are passed over."""
    return sorted(f.name for f in os.scandir(folder) if f.is_dir() and not f.name.startswith("."))


def image_folder(folder: Path, classes: Sequence[str]) -> Files:
    """The images in the folders of ``classes`` in a folder, sorted by class and path."""
    return Files(make_dataset(folder, {c: i for i, c in enumerate(classes)}, extensions=IMG_EXTENSIONS))


def labels_of(files: Files) -> list[int]:
    """The labels of files, without reading these."""
    return [label for _, label in files.files]


def divided_folder(folder: Path, train: bool, name: str, left_out: Collection[str] = ()) -> tuple[Sequence, list[str]]:
    """``folder``/train and /test, with a folder for each class, or else the classes' folders and a fixed fifth of each
    for testing."""
    apart = (folder / "train").is_dir() and (folder / "test").is_dir()
    classes = [c for c in class_folders(folder / "train" if apart else folder) if c not in left_out]
    if apart:
        return image_folder(folder / ("train" if train else "test"), classes), classes
    data = image_folder(folder, classes)
    return divided(data, labels_of(data), 0.2, train, name), classes


def told(root: Path, lists: Sequence[str], train: bool) -> Path | None:
    """The file that lists the training (first of ``lists``) or test images (second); None unless both are there."""
    files = [root / name for name in lists]
    return files[0 if train else 1] if all(f.exists() for f in files) else None


def yaml_list(file: Path, folder: Path, depth: int) -> Files:
    """What a list of Mammoth's names: ``data``, paths whose last ``depth`` parts lie in ``folder``, and ``targets``."""
    content = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return Files(
        [(folder.joinpath(*Path(p).parts[-depth:]), int(y)) for p, y in zip(content["data"], content["targets"])]
    )


# ---- those of seq-8vision, which have benchmarks of their own too
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


RESISC45_LISTS = "NWPU-RESISC45/resisc45_train.yaml", "NWPU-RESISC45/resisc45_test.yaml"


def _resisc45(root: Path, train: bool):
    folder = root / "NWPU-RESISC45"
    listed = told(root, RESISC45_LISTS, train)
    if listed:
        return yaml_list(listed, folder, 2), class_folders(folder)
    return divided_folder(folder, train, "resisc45")


SUN397_LISTS = "SUN397/Partitions/Training_01.txt", "SUN397/Partitions/Testing_01.txt"


def _sun397(root: Path, train: bool):
    data = found(tv.SUN397, root)
    file = told(root, SUN397_LISTS, train)
    names = [c.replace("/", " ") for c in data.classes]
    if not file:
        order = sorted(range(len(data)), key=lambda i: str(data._image_files[i]))  # the system lists files in any order
        labels = [data._labels[i] for i in order]
        return divided(Subset(data, order), labels, 0.5, train, "sun397"), names
    paths = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    files = [(str(root / "SUN397" / p.lstrip("/")), data.class_to_idx["/".join(Path(p).parts[2:-1])]) for p in paths]
    return Files(files), names


def _svhn(root: Path, train: bool):
    return found(tv.SVHN, root, split="train" if train else "test"), [str(c) for c in range(10)]


CARS = Part(
    "cars",
    _cars,
    196,
    "put the folder stanford_cars (cars_train, cars_test, devkit, cars_test_annos_withlabels.mat) into {}",
)
DTD = Part(
    "dtd",
    _dtd,
    47,
    "put dtd-r1.0.1.tar.gz (md5 fff73e5086ae6bdbea199a49dfb8a4c1, robots.ox.ac.uk/~vgg/data/dtd) into {}/dtd",
)
EUROSAT = Part(
    "eurosat", _eurosat, 10, "put the folder 2750 of EuroSAT.zip (RGB, github.com/phelber/EuroSAT) into {}/eurosat", 64
)
GTSRB = Part("gtsrb", _gtsrb, 43, "put the training and test images of benchmark.ini.rub.de into {}/gtsrb, unpacked")
MNIST = Part("mnist", _mnist, 10, "put MNIST's four files into {}/MNIST/raw", 28)
RESISC45 = Part(
    "resisc45",
    _resisc45,
    45,
    "put the folder NWPU-RESISC45 (a folder of images for each of 45 classes) into {}",
    lists=RESISC45_LISTS,
)
SUN397 = Part(
    "sun397",
    _sun397,
    397,
    "put the folder SUN397 (SUN397.tar.gz, md5 8ca2778205c41d23104230ba66911c7a) into {}",
    lists=SUN397_LISTS,
)
SVHN = Part("svhn", _svhn, 10, "put train_32x32.mat and test_32x32.mat (ufldl.stanford.edu/housenumbers) into {}", 32)
