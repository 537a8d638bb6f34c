"""seq-imagenet-r: ImageNet-R in 10 tasks of 20 classes (Mammoth: ViT, 50 epochs, batches of 128).

30 000 renditions of 200 ImageNet classes. The 24 000 for training and 6 000 for testing are those of the lists that
Mammoth and fed-mammoth use, imagenet-r_train.yaml and imagenet-r_test.yaml, if they lie in the folder imagenet-r; else
a fixed fifth of each class is for testing.
"""

from __future__ import annotations

from pathlib import Path

from datasets.utils.cifar import FEDERATED, HALF
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import class_folders, divided_folder, told, unpacked, yaml_list
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, CenterCrop, RandomHorizontalFlip, RandomResizedCrop, Resize

URL, MD5 = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", "a61312130a589d0ca1a8fca1f2bd3337"
LISTS = "imagenet-r/imagenet-r_train.yaml", "imagenet-r/imagenet-r_test.yaml"


def _read(root: Path, train: bool):
    folder = unpacked(root / "imagenet-r", URL, MD5)
    listed = told(root, LISTS, train)
    if listed:
        return yaml_list(listed, folder, 2), class_folders(folder)
    return divided_folder(folder, train, "imagenet-r")


class SequentialImageNetR(FileDataset):
    """Random resized crops and flips; for testing 256 pixels and the central 224. No normalisation in Mammoth, mean and
    deviation 0.5 under ``--fl``, where images are brought to 224 pixels before anything else, as in fed-mammoth.
    """

    NAME = "seq-imagenet-r"
    PART = Part(
        "imagenet-r",
        _read,
        200,
        f"put imagenet-r.tar (md5 {MD5}, {URL}), or the folder out of it, into {{}}",
        lists=LISTS,
    )
    N_TASKS = 10
    N_CLASSES_PER_TASK = 20
    KEEP_TRAIN = KEEP_TEST = (256, whole)
    TRAIN_AUGMENT = [RandomResizedCrop(224, interpolation=BICUBIC), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(256, BICUBIC), CenterCrop(224)]
    FED = {"KEEP_TRAIN": (224, whole), "KEEP_TEST": (224, whole), "MEAN": HALF[0], "STD": HALF[1]}
    DEFAULTS = {"backbone": "vit", "n_epochs": 50, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.05}
