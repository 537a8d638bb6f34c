"""folder: any folder of images as a benchmark, in tasks of classes in alphabetical order.

``--data_dir`` holds train/<class>/*.jpg and test/<class>/*.jpg (or val), or <class>/*.jpg, of which a fixed fifth of
each class is for testing. Classes that --n_tasks does not divide are spread evenly, the first tasks having one more.
Names and sizes of the files are part of what names a run and the arrays that are kept, so files that are added, removed
or changed make another benchmark.
"""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets.utils.cifar import CLIP, FEDERATED, HALF, IMAGENET, wants_224
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import class_folders, divided, image_folder, labels_of
from datasets.utils.stacked import square
from datasets.utils.transforms import BICUBIC, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, Resize
from utils.args import number
from utils.errors import UserError

STATISTICS = {"imagenet": IMAGENET, "half": HALF, "clip": CLIP, "none": (None, None)}
WANTED = "train/<class>/*.jpg and test/<class>/*.jpg (or val), or <class>/*.jpg"


def _parts(data_dir: str) -> tuple[Path, Path | None]:
    """The folders of training and of test images; None where there is but one for both.

    Raises:
        UserError: not a folder of that kind.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data_dir {data_dir}: there is no such folder; give one that holds {WANTED}")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if train.is_dir() != (test is not None):
        raise UserError(f"--data_dir {data_dir} has train or test images but not both: it must hold {WANTED}")
    train = root if test is None else train
    if not class_folders(train):
        raise UserError(f"--data_dir {data_dir}: no folders of classes in {train}; it must hold {WANTED}")
    odd = [c for c in class_folders(test) if c not in class_folders(train)] if test else []
    if odd:
        raise UserError(f"--data_dir {data_dir}: {test.name} has classes that train has not: {', '.join(odd[:5])}")
    return train, test


def fingerprint(data_dir: str) -> str:
    """Ten hexadecimal digits that change with the names and sizes of the images in a folder."""
    rows = []
    for here, folders, files in os.walk(data_dir, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS):
                file = os.path.join(here, name)
                rows.append(f"{Path(file).relative_to(data_dir).as_posix()} {os.path.getsize(file)}")
    return hashlib.blake2b("\n".join(sorted(rows)).encode(), digest_size=5).hexdigest()


def _reader(data_dir: str):
    """The reader of a folder. Every class must have images for training and for testing."""
    training, testing = _parts(data_dir)
    classes = class_folders(training)

    def read(root: Path, train: bool):
        if testing:
            return image_folder(training if train else testing, classes), classes
        data = image_folder(training, classes)
        labels = labels_of(data)
        few = [name for c, name in enumerate(classes) if labels.count(c) < 2]
        if few:
            raise ValueError(f"one image cannot be both for training and for testing: {', '.join(few[:5])}")
        return divided(data, labels, 0.2, train, "folder"), classes

    return read, classes


class Folder(FileDataset):
    """The middle of each image at ``--image_size`` pixels; flips, and crops with 4 pixels of padding up to 64 pixels,
    above random resized crops."""

    NAME = "folder"
    N_TASKS = N_CLASSES_PER_TASK = 1  # these three are an instance's own
    PART = Part("folder", lambda root, train: None, 1, "")
    DEFAULTS = {"backbone": "resnet18", "n_epochs": 20, "batch_size": 32}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}

    @staticmethod
    def get_parser(parser):
        parser.add_argument("--data_dir", help=f"folder that holds {WANTED}")
        parser.add_argument("--n_tasks", type=number(int, 1), default=5, help="number of tasks")
        parser.add_argument(
            "--image_size",
            type=number(int, 1),
            default=None,
            help="side of the images in pixels; None: 224 for a ViT or CLIP, else 64",
        )
        parser.add_argument(
            "--normalise",
            choices=list(STATISTICS),
            default=None,
            help="mean and deviation; None: CLIP's for CLIP, 0.5 with --fl, else ImageNet's",
        )
        return parser

    @staticmethod
    def settle(args: Namespace) -> None:
        """The files become a setting: a run with other files is another run."""
        if getattr(args, "data_dir", None) is None:
            raise UserError(f"--dataset folder needs --data_dir, a folder that holds {WANTED}")
        _parts(args.data_dir)
        args.data_fingerprint = fingerprint(args.data_dir)

    def __init__(self, args: Namespace) -> None:
        if getattr(args, "data_fingerprint", None) is None:
            self.settle(args)
        read, classes = _reader(args.data_dir)
        tasks = getattr(args, "n_tasks", 5)
        if tasks > len(classes):
            raise UserError(
                f"--n_tasks {tasks}: {args.data_dir} has {len(classes)} classes, so 1 to {len(classes)} tasks"
            )
        name = f"folder-{args.data_fingerprint}"
        self.PART = Part(name, read, len(classes), f"--data_dir {args.data_dir} must hold {WANTED}")
        each, more = divmod(len(classes), tasks)
        self.N_TASKS, self.N_CLASSES = tasks, len(classes)
        self.N_CLASSES_PER_TASK = [each + (t < more) for t in range(tasks)]
        super().__init__(args)

    def configure(self) -> None:
        side = self._arg("image_size", 224 if wants_224(self.get_backbone()) else 64)
        self.SIZE, self.KEEP_TRAIN, self.KEEP_TEST = (side, side), (side, square), (side, square)
        crop = RandomCrop(side, padding=4) if side <= 64 else RandomResizedCrop(side, interpolation=BICUBIC)
        self.TRAIN_AUGMENT = [crop, RandomHorizontalFlip()]
        self.TEST_AUGMENT = [Resize(side, BICUBIC)]
        self.MEAN, self.STD = HALF if self._arg("fl", False) else IMAGENET
        super().configure()
        if self._arg("normalise"):
            self.MEAN, self.STD = STATISTICS[self.args.normalise]
