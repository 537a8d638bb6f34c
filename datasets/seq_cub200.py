"""seq-cub200: Caltech-UCSD Birds 200-2011 in 10 tasks of 20 species (Mammoth: ViT, 50 epochs, batches of 128).

5 994 images for training and 5 794 for testing, as train_test_split.txt says.
"""

from __future__ import annotations

from pathlib import Path

from datasets.utils.cifar import FEDERATED, IMAGENET
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import Files, unpacked
from datasets.utils.stacked import square, whole
from datasets.utils.transforms import BICUBIC, CenterCrop, RandomCrop, RandomHorizontalFlip, Resize

URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
MD5 = "97eceeb196236b17998738112f37df78"


def _read(root: Path, train: bool):
    folder = unpacked(root / "CUB_200_2011", URL, MD5)

    def table(name: str) -> dict[str, str]:
        return dict(line.split() for line in (folder / name).read_text().splitlines() if line.strip())

    paths, species, training = (table(f"{t}.txt") for t in ("images", "image_class_labels", "train_test_split"))
    files = [
        (folder / "images" / path, int(species[i]) - 1) for i, path in paths.items() if (training[i] == "1") == train
    ]
    names = table("classes.txt")
    return Files(files), [names[str(c + 1)].split(".", 1)[-1] for c in range(len(names))]


class SequentialCUB200(FileDataset):
    """Random crops of 224 out of 300 pixels (Mammoth) and flips; for testing 256 pixels and the central 224. Under
    ``--fl`` images are brought to 224 pixels before anything else, and crops are out of 256 (fed-mammoth)."""

    NAME = "seq-cub200"
    PART = Part("cub200", _read, 200, f"put CUB_200_2011.tgz (md5 {MD5}, {URL}), or the folder out of it, into {{}}")
    N_TASKS = 10
    N_CLASSES_PER_TASK = 20
    MEAN, STD = IMAGENET
    KEEP_TRAIN, KEEP_TEST = (300, whole), (256, square)
    TRAIN_AUGMENT = [RandomCrop(224), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(256, BICUBIC), CenterCrop(224)]
    FED = {
        "KEEP_TRAIN": (224, whole),
        "KEEP_TEST": (224, whole),
        "TRAIN_AUGMENT": [Resize(256, BICUBIC), RandomCrop(224), RandomHorizontalFlip()],
    }
    DEFAULTS = {"backbone": "vit", "n_epochs": 50, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.5}
