"""seq-imagenet-a: ImageNet-A in 10 tasks of 20 classes (fed-mammoth).

7 500 photographs of 200 ImageNet classes that networks get wrong. fed-mammoth's folders imagenet-a/train and
imagenet-a/test are used if they are there; of the original archive a fixed fifth of each class is for testing. Mammoth
does not have this benchmark: central settings are those of seq-imagenet-r.
"""

from __future__ import annotations

from pathlib import Path

from datasets.utils.cifar import FEDERATED, IMAGENET
from datasets.utils.image_files import FileDataset
from datasets.utils.mapped import Part
from datasets.utils.readers import divided_folder, unpacked
from datasets.utils.stacked import whole
from datasets.utils.transforms import BICUBIC, CenterCrop, RandomHorizontalFlip, RandomResizedCrop, Resize

URL, MD5 = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar", "c3e55429088dc681f30d81f4726b6595"


def _read(root: Path, train: bool):
    return divided_folder(unpacked(root / "imagenet-a", URL, MD5), train, "imagenet-a")


class SequentialImageNetA(FileDataset):
    """Crops of at least a twentieth of the area (fed-mammoth) and flips; for testing 256 pixels and the central 224."""

    NAME = "seq-imagenet-a"
    PART = Part("imagenet-a", _read, 200, f"put imagenet-a.tar (md5 {MD5}, {URL}), or the folder out of it, into {{}}")
    N_TASKS = 10
    N_CLASSES_PER_TASK = 20
    MEAN, STD = IMAGENET
    KEEP_TRAIN = KEEP_TEST = (256, whole)
    TRAIN_AUGMENT = [RandomResizedCrop(224, scale=(0.05, 1.0), interpolation=BICUBIC), RandomHorizontalFlip()]
    TEST_AUGMENT = [Resize(256, BICUBIC), CenterCrop(224)]
    FED = {"KEEP_TRAIN": (224, whole), "KEEP_TEST": (224, whole)}
    DEFAULTS = {"backbone": "vit", "n_epochs": 50, "batch_size": 128}
    FED_DEFAULTS = {**FEDERATED, "num_comm_rounds": 10, "distribution_alpha": 1.0}
