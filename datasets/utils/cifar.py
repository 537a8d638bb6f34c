"""What the CIFAR benchmarks share: 32-pixel arrays, and the image pipeline that the backbone asks for."""

from __future__ import annotations

from torch import Tensor

from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.torchvision_arrays import torchvision_arrays
from datasets.utils.transforms import (
    BICUBIC,
    CenterCrop,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# fed-mammoth's defaults
FEDERATED = {"backbone": "vit", "n_epochs": 5, "num_comm_rounds": 5, "batch_size": 16, "num_clients": 10}


def wants_224(backbone: str | None) -> bool:
    """Whether a backbone of that name takes 224-pixel images: the ViTs and CLIP, except vit-pocket."""
    name = (backbone or "").lower().replace("_", "-")
    return name.startswith(("vit", "clip")) and not name.startswith("vit-pocket")


class CIFARDataset(ContinualDataset):
    """CIFAR kept at 32 pixels; for backbones that take 224, batches are enlarged on the device.

    * 32 pixels: Mammoth's crop with 4 pixels of padding, flip, and the statistics of the data set;
    * 224 pixels, central: Mammoth's random resized crop (bicubic) and flip, test images enlarged, ImageNet's
      statistics;
    * 224 pixels, ``--fl``: fed-mammoth's enlargement to 224 (bicubic), then random resized crop (bilinear) and flip,
      or for testing 256 and the central 224; mean and deviation 0.5, which its ViT weights expect. fed-mammoth leaves
      CIFAR-10 without augmentation; here both data sets are treated alike.

    CLIP backbones get CLIP's statistics.
    """

    SETTING = "class-il"
    SIZE = (32, 32)
    TRAIN_AUGMENT = [RandomCrop(32, padding=4), RandomHorizontalFlip()]
    FED_DEFAULTS = {**FEDERATED, "distribution_alpha": 0.05}

    def configure(self) -> None:
        backbone = self.get_backbone()
        if not wants_224(backbone):
            return
        self.SIZE = (224, 224)
        enlarge = Resize(224, BICUBIC)
        if self._arg("fl", False):
            self.MEAN, self.STD = HALF
            self.TRAIN_AUGMENT = [enlarge, RandomResizedCrop(224), RandomHorizontalFlip()]
            self.TEST_AUGMENT = [enlarge, Resize(256), CenterCrop(224)]
        else:
            self.MEAN, self.STD = IMAGENET
            self.TRAIN_AUGMENT = [RandomResizedCrop(224, interpolation=BICUBIC), RandomHorizontalFlip()]
            self.TEST_AUGMENT = [enlarge]
        if backbone.lower().startswith("clip"):
            self.MEAN, self.STD = CLIP

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        return torchvision_arrays(self.SOURCE, self._arg("base_path", "./data/"), train)
