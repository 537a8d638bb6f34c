"""seq-chestx: chest radiographs (NIH ChestX-ray14) in 2 tasks of 3 findings (Mammoth: ViT, 30 epochs, batches of 128).

Mammoth's six findings, and of the images those that show one of them and no other of the fourteen. train_val_list.txt
and test_list.txt divide them if both are there; else a fixed fifth of each class is for testing. The selection and the
division of Mammoth's copy are not published.
"""

from __future__ import annotations

import csv
from pathlib import Path

from datasets.utils.cifar import FEDERATED, IMAGENET
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import Files, divided, labels_of, told
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, Resize

FINDINGS = ["Cardiomegaly", "Consolidation", "Edema", "Fibrosis", "Pleural_Thickening", "Pneumothorax"]
LISTS = "chestx/train_val_list.txt", "chestx/test_list.txt"


def _read(root: Path, train: bool):
    folder = root / "chestx"
    tables = sorted(folder.glob("Data_Entry_2017*.csv"))
    if not tables:
        raise FileNotFoundError("no Data_Entry_2017.csv")
    with open(tables[-1], newline="", encoding="utf-8") as file:
        found = {row["Image Index"]: row["Finding Labels"] for row in csv.DictReader(file)}
    found = {name: FINDINGS.index(said) for name, said in sorted(found.items()) if said in FINDINGS}
    where = {path.name: path for path in folder.rglob("*.png")}  # twelve folders, or one
    missing = found.keys() - where.keys()
    if missing:
        raise FileNotFoundError(f"{len(missing)} images are missing, such as {min(missing)}")
    files = [(where[name], label) for name, label in found.items()]
    listed = told(root, LISTS, train)
    if listed:
        names = set(listed.read_text().split())
        return Files([f for f in files if f[0].name in names]), FINDINGS
    files = Files(files)
    return divided(files, labels_of(files), 0.2, train, "chestx"), FINDINGS


class SequentialChestX(FileDataset):
    """224 pixels, no augmentation."""

    NAME = "seq-chestx"
    PART = Part(
        "chestx",
        _read,
        6,
        "put Data_Entry_2017.csv, train_val_list.txt, test_list.txt and the unpacked images of "
        "nihcc.app.box.com/v/ChestXray-NIHCC into {}/chestx",
        lists=LISTS,
    )
    N_TASKS = 2
    N_CLASSES_PER_TASK = 3
    MEAN, STD = IMAGENET
    KEEP_TRAIN = KEEP_TEST = (224, whole)
    TEST_AUGMENT = [Resize(224, BICUBIC)]
    DEFAULTS = {"backbone": "vit", "n_epochs": 30, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}
