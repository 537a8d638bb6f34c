"""seq-tinyimg: Tiny ImageNet in 10 tasks of 20 classes (Mammoth: ResNet-18 at 64 pixels, 50 epochs, batches of 32).

500 training and 50 validation images of each class; these are the test. Classes are in the order of wnids.txt.
"""

from __future__ import annotations

from pathlib import Path

from datasets.utils.cifar import FEDERATED, wants_224
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import Files, image_folder, unpacked
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, CenterCrop, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, Resize

URL, MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


def _read(root: Path, train: bool):
    folder = unpacked(root / "tiny-imagenet-200", URL, MD5)
    classes = (folder / "wnids.txt").read_text().split()
    if train:
        return image_folder(folder / "train", classes), classes
    rows = [line.split("\t")[:2] for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    return Files([(folder / "val" / "images" / name, classes.index(wnid)) for name, wnid in rows]), classes


class SequentialTinyImageNet(FileDataset):
    """Crops with 4 pixels of padding and flips (Mammoth). For a ViT or CLIP, and so by default under ``--fl``, images
    are enlarged to 224 pixels on the device, with random resized crops, and for testing 256 and the central 224
    (fed-mammoth).
    """

    NAME = "seq-tinyimg"
    PART = Part("tinyimg", _read, 200, f"put tiny-imagenet-200.zip (md5 {MD5}, {URL}), or its folder, into {{}}")
    N_TASKS = 10
    N_CLASSES_PER_TASK = 20
    SIZE = (64, 64)
    MEAN, STD = (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)
    KEEP_TRAIN = KEEP_TEST = (64, whole)
    TRAIN_AUGMENT = [RandomCrop(64, padding=4), RandomHorizontalFlip()]
    DEFAULTS = {"backbone": "resnet18", "n_epochs": 50, "batch_size": 32}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.05}

    def configure(self) -> None:
        super().configure()
        if wants_224(self.get_backbone()):
            self.SIZE, enlarge = (224, 224), Resize(224, BICUBIC)
            self.TRAIN_AUGMENT = [enlarge, RandomResizedCrop(224, interpolation=BICUBIC), RandomHorizontalFlip()]
            self.TEST_AUGMENT = [enlarge, Resize(256, BICUBIC), CenterCrop(224)]
