"""imagenet-val from small archives in the original formats."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision.datasets.imagenet as tv
from PIL import Image
from scipy.io import savemat
from torchvision.datasets.utils import calculate_md5

from datasets.imagenet_val import ImageNetVal
from datasets.utils.stacked import square
from utils.errors import UserError

WORDS = ["tench, Tinca tinca", "goldfish", "great white shark"]
PER_CLASS = 5


class Small(ImageNetVal):
    NAME = "small-imagenet"
    PARTS = [dataclasses.replace(ImageNetVal.PARTS[0], classes=3)]
    N_CLASSES_PER_TASK = 3
    SIZE = (8, 8)


def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8))


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """The development kit, whose numbering is not that of the sorted names, and the validation images."""
    root = tmp_path / "imagenet"
    root.mkdir()
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    order = [2, 0, 1]  # the kit's number k + 1 is class order[k]
    synsets = [(k + 1, f"n0000{c}", WORDS[c], "", 0) for k, c in enumerate(order)] + [(4, "n9", "fish", "", 3)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(synsets, dtype=kinds)})
    truth = [k + 1 for k in range(3) for _ in range(PER_CLASS)]
    kit, images = root / "ILSVRC2012_devkit_t12.tar.gz", root / "ILSVRC2012_img_val.tar"
    with tarfile.open(kit, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        text = "\n".join(map(str, truth)).encode()
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text)
    with tarfile.open(images, "w") as archive:
        for i in range(len(truth)):
            data = io.BytesIO()
            picture(i).save(data, "PNG")
            add(archive, f"ILSVRC2012_val_{i + 1:08d}.JPEG", data.getvalue())
    meta = {"devkit": (kit.name, calculate_md5(str(kit))), "val": (images.name, calculate_md5(str(images)))}
    monkeypatch.setattr(tv, "ARCHIVE_META", tv.ARCHIVE_META | meta)
    return tmp_path, [order[k - 1] for k in truth]


def test_from_the_archives(archives):
    root, labels = archives
    d = Small(Namespace(base_path=str(root), batch_size=4, seed=0))
    train, test = d.task_indices(0), d.task_indices(0, False)
    assert (len(train), len(test)) == (3, 12) and d.N_CLASSES == 3
    assert torch.bincount(d.eval_labels).tolist() == [4, 4, 4]
    known = {square(picture(i), 8).tobytes(): label for i, label in enumerate(labels)}
    for images, of in ((d.train_images, d.train_labels), (d.eval_images, d.eval_labels)):
        found = images[torch.arange(len(of))].numpy()
        assert [known.pop(x.tobytes()) for x in found] == of.tolist()
    assert not known
    assert [p[0] for p in d.prompts()] == ["itap of a tench.", "itap of a goldfish.", "itap of a great white shark."]
    again = Small(Namespace(base_path=str(root), batch_size=4, seed=9))
    assert torch.equal(again.train_images[torch.arange(3)], d.train_images[torch.arange(3)])


def test_without_files(tmp_path):
    with pytest.raises(UserError, match=r"imagenet-val cannot be read.*ILSVRC2012_img_val.tar .*into /.*/imagenet"):
        ImageNetVal(Namespace(base_path=str(tmp_path), batch_size=4))
