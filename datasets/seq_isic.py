"""seq-isic: skin lesions of ISIC 2018 (HAM10000) in 3 tasks of 2 diagnoses (Mammoth: ViT, 30 epochs, batches of 128).

The training images of the challenge's third task without the moles (NV), which are two thirds of them. A fixed fifth of
each class is for testing: the division of Mammoth's copy is not published. Images of one lesion may be on both sides.
"""

from __future__ import annotations

import csv
from pathlib import Path

from datasets.utils.cifar import FEDERATED, IMAGENET
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import Files, divided, labels_of, unpacked
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, CenterCrop, RandomCrop, RandomHorizontalFlip, Resize

CODES = ("MEL", "BCC", "AKIEC", "BKL", "DF", "VASC")
DIAGNOSES = [
    "melanoma",
    "basal cell carcinoma",
    "actinic keratosis",
    "benign keratosis",
    "dermatofibroma",
    "vascular lesion",
]
IMAGES, TRUTH = "ISIC2018_Task3_Training_Input", "ISIC2018_Task3_Training_GroundTruth"
URL = "https://isic-challenge-data.s3.amazonaws.com/2018/"


def _read(root: Path, train: bool):
    truth = unpacked(root / "isic" / TRUTH, f"{URL}{TRUTH}.zip")
    images = unpacked(root / "isic" / IMAGES, f"{URL}{IMAGES}.zip")
    with open(truth / f"{TRUTH}.csv", newline="", encoding="utf-8") as file:
        rows = [(row["image"], [float(row[c]) for c in CODES]) for row in csv.DictReader(file)]
    files = Files([(images / f"{name}.jpg", said.index(1.0)) for name, said in sorted(rows) if 1.0 in said])
    return divided(files, labels_of(files), 0.2, train, "isic"), DIAGNOSES


class SequentialISIC(FileDataset):
    """Random crops of 224 out of 256 pixels and flips; the central 224 for testing, where fed-mammoth crops at random.
    Under ``--fl`` images are brought to 224 pixels before anything else (fed-mammoth).
    """

    NAME = "seq-isic"
    PART = Part(
        "isic", _read, 6, f"put {IMAGES}.zip and {TRUTH}.zip of {URL}, or the folders out of them, into {{}}/isic"
    )
    N_TASKS = 3
    N_CLASSES_PER_TASK = 2
    MEAN, STD = IMAGENET
    KEEP_TRAIN = KEEP_TEST = (256, whole)
    TRAIN_AUGMENT = [Resize(256, BICUBIC), RandomCrop(224), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(256, BICUBIC), CenterCrop(224)]
    FED = {"KEEP_TRAIN": (224, whole), "KEEP_TEST": (224, whole)}
    DEFAULTS = {"backbone": "vit", "n_epochs": 30, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}
