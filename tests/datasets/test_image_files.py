"""The benchmarks made of image files, from small folders and archives in the original layouts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from datasets import get_dataset, get_dataset_class
from datasets.utils import image_files, readers
from datasets.utils.readers import unpacked
from datasets.utils.stacked import Stacked, square, whole
from datasets.utils.transforms import BICUBIC
from utils.args import parse_args
from utils.errors import UserError

from .test_8vision import write_cars, write_dtd, write_folders, write_gtsrb, write_sun, write_svhn

SIDE = 8
WNIDS = [f"n{c:08d}" for c in range(200)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def picture(*key, size=(SIDE, SIDE)):
    """The image that ``key`` names: always the same, different from all others."""
    rng = np.random.default_rng(list(hashlib.md5(repr(key).encode()).digest()))
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def put(path, *key):
    """Save that image, without loss whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(*key).save(path, "PNG")


def pixels(*key):
    return np.asarray(picture(*key)).transpose(2, 0, 1)


def make(name, root, monkeypatch=None, **args):
    """The benchmark; with ``monkeypatch`` its images are kept as they are in the tests' files."""
    image_files._ARRAYS.clear()  # a process of its own
    if monkeypatch is not None:
        cls = get_dataset_class(name)
        monkeypatch.setattr(cls, "KEEP_TRAIN", (SIDE, whole))
        monkeypatch.setattr(cls, "KEEP_TEST", (SIDE, whole))
        monkeypatch.setattr(cls, "FED", {})
    return get_dataset(Namespace(dataset=name, base_path=str(root), **args))


def contents(images, labels):
    """{bytes of an image: label}."""
    known = {x.numpy().tobytes(): int(y) for x, y in zip(images, labels)}
    assert len(known) == len(labels)
    return known


def assert_holds(d, train, test):
    """The training and the test images are those named, with their labels: ``{key: label}``."""
    for images, labels, want in ((d.train_images, d.train_labels, train), (d.eval_images, d.eval_labels, test)):
        assert contents(images, labels) == {pixels(*key).tobytes(): label for key, label in want.items()}


# ---- what every one of them has in common
TABLE = {  # tasks, classes per task, central epochs and batch, --fl: rounds, alpha
    "seq-imagenet-r": (10, 20, 50, 128, 5, 0.05),
    "seq-imagenet-a": (10, 20, 50, 128, 10, 1.0),
    "seq-cub200": (10, 20, 50, 128, 5, 0.5),
    "seq-cars196": (10, [20] * 9 + [16], 50, 128, 10, 0.2),
    "seq-eurosat-rgb": (5, 2, 5, 128, 5, 0.5),
    "seq-tinyimg": (10, 20, 50, 32, 5, 0.05),
    "seq-isic": (3, 2, 30, 128, 5, 0.5),
    "seq-resisc45": (9, 5, 30, 128, 5, 0.5),
    "seq-cropdisease": (7, 5, 5, 128, 5, 0.5),
    "seq-chestx": (2, 3, 30, 128, 5, 0.5),
    "seq-mit67": (10, [7] * 7 + [6] * 3, 50, 32, 5, 0.5),
    "seq-svhn": (5, 2, 20, 128, 5, 0.5),
    "seq-gtsrb": (5, [10] * 4 + [3], 20, 128, 5, 0.5),
    "seq-dtd": (5, [10] * 4 + [7], 20, 128, 5, 0.5),
    "seq-sun397": (8, [50] * 7 + [47], 20, 128, 5, 0.5),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    cls = get_dataset_class(name)
    tasks, classes, epochs, batch, rounds, alpha = TABLE[name]
    assert (tasks, classes) == (cls.N_TASKS, cls.N_CLASSES_PER_TASK) and cls.PART.classes == cls.N_CLASSES
    central, fed = cls.defaults(), cls.defaults(True)
    assert (central["n_epochs"], central["batch_size"]) == (epochs, batch)
    assert (fed["num_comm_rounds"], fed["distribution_alpha"]) == (rounds, alpha)
    assert (fed["backbone"], fed["n_epochs"], fed["batch_size"], fed["num_clients"]) == ("vit", 5, 16, 10)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("fl", [False, True])
def test_pipelines(name, fl, monkeypatch):
    """Whatever is kept comes out at the size that the network takes, in training, testing and replay."""
    cls = get_dataset_class(name)
    monkeypatch.setattr(cls, "_load", lambda self: None)
    d = cls(Namespace(fl=fl))
    for (side, _), transform in ((d.KEEP_TRAIN, d.get_transform()), (d.KEEP_TEST, d.get_test_transform())):
        x = torch.rand(2, 3, side, side)
        assert transform(x).shape == d.get_normalization_transform()(x).shape == (2, 3, *d.SIZE)
    x = torch.rand(2, 3, d.KEEP_TRAIN[0], d.KEEP_TRAIN[0])
    assert d.get_test_transform()(x).shape == (2, 3, *d.SIZE)  # --validation, statistics of training images
    clip = cls(Namespace(fl=fl, backbone="clip"))
    assert clip.MEAN[0] == 0.48145466


@pytest.mark.parametrize(
    "name,said",
    [
        ("seq-imagenet-r", ["imagenet-r.tar (md5 a61312130a589d0ca1a8fca1f2bd3337"]),
        ("seq-imagenet-a", ["imagenet-a.tar (md5 c3e55429088dc681f30d81f4726b6595"]),
        ("seq-cub200", ["CUB_200_2011.tgz (md5 97eceeb196236b17998738112f37df78"]),
        ("seq-cars196", ["stanford_cars", "devkit"]),
        ("seq-eurosat-rgb", ["2750", "EuroSAT.zip"]),
        ("seq-tinyimg", ["tiny-imagenet-200.zip (md5 90528d7ca1a48142e341f4ef8d21d0de"]),
        ("seq-isic", ["ISIC2018_Task3_Training_Input.zip", "ISIC2018_Task3_Training_GroundTruth.zip", "isic"]),
        ("seq-resisc45", ["NWPU-RESISC45"]),
        ("seq-cropdisease", ["PlantVillage", "cropdisease"]),
        ("seq-chestx", ["Data_Entry_2017.csv", "test_list.txt", "chestx"]),
        ("seq-mit67", ["indoorCVPR_09.tar", "TrainImages.txt", "MIT67"]),
        ("seq-svhn", ["train_32x32.mat"]),
        ("seq-gtsrb", ["gtsrb"]),
        ("seq-dtd", ["dtd-r1.0.1.tar.gz"]),
        ("seq-sun397", ["SUN397.tar.gz"]),
    ],
)
def test_missing_files(name, said, tmp_path):
    with pytest.raises(UserError) as e:
        make(name, tmp_path)
    message = str(e.value)
    assert "\n" not in message and f"{tmp_path}" in message and all(s in message for s in said)


# ---- reading, keeping
def write_classes(folder, names, n):
    """n images of each class; gives {key: label}."""
    for name in names:
        for i in range(n):
            put(folder / name / f"{i}.jpg", name, i)
    return {(name, i): c for c, name in enumerate(sorted(names)) for i in range(n)}


def test_imagenet_r(tmp_path, monkeypatch):
    everything = write_classes(tmp_path / "imagenet-r", WNIDS, 2)
    d = make("seq-imagenet-r", tmp_path, monkeypatch, seed=3)
    held = contents(d.eval_images, d.eval_labels)
    assert sorted(held.values()) == list(range(200)) and len(d.train_labels) == 200
    assert held | contents(d.train_images, d.train_labels) == {pixels(*k).tobytes(): y for k, y in everything.items()}
    # the lists decide when they are there, also where arrays have been kept without them
    for part, i in (("train", 0), ("test", 1)):
        rows = [(f"data/imagenet-r/{w}/{i}.jpg", c) for c, w in enumerate(WNIDS)][::-1]
        content = {"data": [p for p, _ in rows], "targets": [c for _, c in rows]}
        (tmp_path / "imagenet-r" / f"imagenet-r_{part}.yaml").write_text(yaml.safe_dump(content))
    listed = make("seq-imagenet-r", tmp_path, monkeypatch)
    assert listed.train_labels.tolist() == list(range(200))[::-1]
    assert_holds(listed, *({(w, i): c for c, w in enumerate(WNIDS)} for i in (0, 1)))


def test_imagenet_r_sizes(tmp_path, monkeypatch):
    """Mammoth's test images and fed-mammoth's, from PIL directly."""
    cls = get_dataset_class("seq-imagenet-r")
    monkeypatch.setattr(cls, "PART", dataclasses.replace(cls.PART, classes=2))
    big = picture("big", size=(300, 170))
    write_classes(tmp_path / "imagenet-r", ["a", "b"], 2)
    for c in "ab":
        for i in range(2):
            big.save(tmp_path / "imagenet-r" / c / f"{i}.jpg", "PNG")
    d = make("seq-imagenet-r", tmp_path)
    x = next(iter(d.test_loader(0)))[0]
    want = TF.center_crop(TF.pil_to_tensor(TF.resize(big, [256, 256], BICUBIC)), [224, 224])
    assert torch.equal(x[0], want.float() / 255)
    fed = make("seq-imagenet-r", tmp_path, fl=True)
    base = TF.pil_to_tensor(TF.resize(big, [224, 224], BICUBIC))
    assert torch.equal(fed.train_images[0], base)
    x = next(iter(fed.test_loader(0)))[0]
    want = TF.center_crop(TF.resize(base.float() / 255, [256], BICUBIC), [224, 224])
    torch.testing.assert_close(x[0], (want - 0.5) / 0.5)


def test_imagenet_a(tmp_path, monkeypatch):
    write_classes(tmp_path / "imagenet-a", WNIDS, 5)
    d = make("seq-imagenet-a", tmp_path, monkeypatch)
    assert torch.bincount(d.eval_labels).tolist() == [1] * 200 and torch.bincount(d.train_labels).tolist() == [4] * 200
    other = tmp_path / "other"
    want = [write_classes(other / "imagenet-a" / part, WNIDS, n) for part, n in (("train", 3), ("test", 1))]
    for w in WNIDS:  # an image of its own
        put(other / "imagenet-a" / "test" / w / "0.jpg", w, "test")
    d = make("seq-imagenet-a", other, monkeypatch)
    assert_holds(d, want[0], {(w, "test"): c for c, w in enumerate(WNIDS)})


def write_cub(root):
    base, rows = root / "CUB_200_2011", []
    names = [f"{c + 1:03d}.Bird_{c}" for c in range(200)]
    for c, name in enumerate(names):
        for i in range(2):
            put(base / "images" / name / f"Bird_{i}.jpg", name, i)
            rows.append((len(rows) + 1, f"{name}/Bird_{i}.jpg", c + 1, int(i == c % 2)))
    for file, column in (("images", 1), ("image_class_labels", 2), ("train_test_split", 3)):
        (base / f"{file}.txt").write_text("".join(f"{r[0]} {r[column]}\n" for r in rows))
    (base / "classes.txt").write_text("".join(f"{c + 1} {n}\n" for c, n in enumerate(names)))
    return names


def test_cub_from_the_archive(tmp_path, monkeypatch):
    names = write_cub(tmp_path / "made")
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / "CUB_200_2011.tgz", "w:gz") as tar:
        tar.add(tmp_path / "made" / "CUB_200_2011", "CUB_200_2011")
    with pytest.raises(UserError, match="cub200 cannot be .*CUB_200_2011.tgz is damaged: its md5 is not 97ec"):
        make("seq-cub200", root, monkeypatch)
    digest = hashlib.md5((root / "CUB_200_2011.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr("datasets.seq_cub200.MD5", digest)
    d = make("seq-cub200", root, monkeypatch)
    train = {(n, c % 2): c for c, n in enumerate(names)}
    assert_holds(d, train, {(n, 1 - i): c for (n, i), c in train.items()})
    assert sorted(p.name for p in root.iterdir()) == ["CUB_200_2011", "CUB_200_2011.tgz", "arrays"]
    assert d._read(True)[2][7] == "Bird_7"


def test_cars(tmp_path):
    write_cars(tmp_path)
    d = make("seq-cars196", tmp_path)
    assert d.train_labels.tolist() == [0, 195, 7] and d.get_offsets(9) == (180, 196)
    for i in range(3):
        image = Image.open(tmp_path / "stanford_cars" / "cars_train" / f"{i}.jpg")
        assert np.array_equal(d.train_images[i].numpy(), square(image, 224))
    x, y = next(iter(d.test_loader(0)))
    assert torch.equal(x, d.eval_images[[0, 2]].float() / 255) and y.tolist() == [0, 7]
    assert (tmp_path / "8vision" / "cars" / "train-224.npy").exists()


def test_eurosat(tmp_path):
    names = [f"Land{c}" for c in range(10)]
    folder = tmp_path / "eurosat" / "2750"
    for name in names:
        for i in range(20):
            put(folder / name / f"{name}_{i}.jpg", name, i)
    d = make("seq-eurosat-rgb", tmp_path)
    assert torch.bincount(d.train_labels).tolist() == [10] * 10 and torch.bincount(d.eval_labels).tolist() == [6] * 10
    both = contents(d.train_images, d.train_labels).keys() & contents(d.eval_images, d.eval_labels).keys()
    assert not both
    split = {p: [[f"Land{c}/Land{c}_{i}.jpg", c, "x"] for c in (3, 0)] for i, p in enumerate(("train", "val", "test"))}
    (tmp_path / "eurosat" / "split.json").write_text(json.dumps(split))
    d = make("seq-eurosat-rgb", tmp_path)
    assert d.train_labels.tolist() == d.eval_labels.tolist() == [3, 0]
    for images, i in ((d.train_images, 0), (d.eval_images, 2)):
        assert np.array_equal(images[0].numpy(), whole(picture("Land3", i), 64))


def test_tiny_imagenet(tmp_path, monkeypatch):
    base, wnids = tmp_path / "tiny-imagenet-200", WNIDS[::-1]  # the order of wnids.txt, not that of the alphabet
    base.mkdir()
    (base / "wnids.txt").write_text("\n".join(wnids) + "\n")
    rows = []
    for c, w in enumerate(wnids):
        put(base / "train" / w / "images" / f"{w}_0.JPEG", w)
        put(base / "val" / "images" / f"val_{c}.JPEG", c)
        rows.append(f"val_{c}.JPEG\t{w}\t0\t0\t63\t63\n")
    (base / "val" / "val_annotations.txt").write_text("".join(rows[::-1]))
    d = make("seq-tinyimg", tmp_path, monkeypatch)
    assert_holds(d, {(w,): c for c, w in enumerate(wnids)}, {(c,): c for c in range(200)})


def test_tiny_imagenet_takes_the_pipeline_of_its_backbone(monkeypatch):
    cls = get_dataset_class("seq-tinyimg")
    monkeypatch.setattr(cls, "_load", lambda self: None)
    small, vit, fed = cls(Namespace()), cls(Namespace(backbone="vit")), cls(Namespace(fl=True))
    assert small.SIZE == (64, 64) and small.get_backbone() == "resnet18" and vit.SIZE == fed.SIZE == (224, 224)
    assert small.MEAN == vit.MEAN == fed.MEAN == (0.4802, 0.4480, 0.3975)
    x = torch.rand(2, 3, 64, 64)
    want = TF.resize(TF.resize(x, [224], BICUBIC), [256], BICUBIC)[:, :, 16:240, 16:240]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (fed.MEAN, fed.STD))
    torch.testing.assert_close(fed.get_test_transform()(x), (want - mean) / std)
    assert cls(Namespace(fl=True, backbone="resnet18")).SIZE == (64, 64)


def test_isic(tmp_path, monkeypatch):
    codes = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    home, name = tmp_path / "isic", "ISIC2018_Task3_Training"
    lines, want = ["image," + ",".join(codes)], {}
    for i in range(70):
        put(home / f"{name}_Input" / f"ISIC_{i:07d}.jpg", i)
        lines.append(f"ISIC_{i:07d}," + ",".join("1.0" if c == i % 7 else "0.0" for c in range(7)))
        if i % 7 != 1:
            want[(i,)] = [0, None, 1, 2, 3, 4, 5][i % 7]
    (tmp_path / f"{name}_GroundTruth").mkdir()
    (tmp_path / f"{name}_GroundTruth" / f"{name}_GroundTruth.csv").write_text("\n".join(lines) + "\n")
    with zipfile.ZipFile(home / f"{name}_GroundTruth.zip", "w") as z:
        z.write(
            tmp_path / f"{name}_GroundTruth" / f"{name}_GroundTruth.csv", f"{name}_GroundTruth/{name}_GroundTruth.csv"
        )
    d = make("seq-isic", tmp_path, monkeypatch)
    assert torch.bincount(d.train_labels).tolist() == [8] * 6 and torch.bincount(d.eval_labels).tolist() == [2] * 6
    both = contents(d.train_images, d.train_labels) | contents(d.eval_images, d.eval_labels)
    assert both == {pixels(*k).tobytes(): y for k, y in want.items()}


def test_isic_is_tested_in_the_middle(monkeypatch):
    """fed-mammoth's random crop of test images made every evaluation another one."""
    cls = get_dataset_class("seq-isic")
    monkeypatch.setattr(cls, "_load", lambda self: None)
    for fl in (False, True):
        d = cls(Namespace(fl=fl))
        x = torch.rand(2, 3, *[d.KEEP_TEST[0]] * 2)
        want = TF.center_crop(TF.resize(x, [256], BICUBIC), [224, 224])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (d.MEAN, d.STD))
        torch.testing.assert_close(d.get_test_transform()(x), (want - mean) / std)
        assert not torch.equal(d.get_transform()(x), d.get_transform()(x))


def test_resisc45(tmp_path, monkeypatch):
    names = [f"scene_{c:02d}" for c in range(45)]
    write_classes(tmp_path / "NWPU-RESISC45", names, 5)
    d = make("seq-resisc45", tmp_path, monkeypatch)
    assert torch.bincount(d.eval_labels).tolist() == [1] * 45 and len(d.train_labels) == 180
    for part, i in (("train", 4), ("test", 2)):
        content = {"data": [f"{n}/{i}.jpg" for n in names], "targets": list(range(45))}
        (tmp_path / "NWPU-RESISC45" / f"resisc45_{part}.yaml").write_text(yaml.safe_dump(content))
    d = make("seq-resisc45", tmp_path, monkeypatch)
    assert_holds(d, *({(n, i): c for c, n in enumerate(names)} for i in (4, 2)))


def test_cropdisease(tmp_path, monkeypatch):
    names = [f"Crop_{c:02d}" for c in range(34)] + ["Peach___Bacterial_spot"]
    left_out = ["Apple___Cedar_apple_rust", "Peach___healthy", "Potato___healthy"]
    write_classes(tmp_path / "cropdisease", [*names, *left_out], 5)
    d = make("seq-cropdisease", tmp_path, monkeypatch)
    assert torch.bincount(d.eval_labels).tolist() == [1] * 35 and torch.bincount(d.train_labels).tolist() == [4] * 35
    known = {pixels(n, i).tobytes(): c for c, n in enumerate(names) for i in range(5)}
    assert contents(d.train_images, d.train_labels) | contents(d.eval_images, d.eval_labels) == known
    for part, i in (("train", 1), ("test", 3)):
        write = {"data": [f"{n}/{i}.jpg" for n in names], "labels": [str(c) for c in range(35)]}
        (tmp_path / "cropdisease" / f"{part}.json").write_text(json.dumps(write))
        for n in names:
            put(tmp_path / "cropdisease" / "images" / n / f"{i}.jpg", n, i)
    assert_holds(
        make("seq-cropdisease", tmp_path, monkeypatch), *({(n, i): c for c, n in enumerate(names)} for i in (1, 3))
    )


def test_chestx(tmp_path, monkeypatch):
    findings = ["Cardiomegaly", "Consolidation", "Edema", "Fibrosis", "Pleural_Thickening", "Pneumothorax"]
    others = ["No Finding", "Hernia", "Cardiomegaly|Edema"]
    home, lines, want = tmp_path / "chestx", ["Image Index,Finding Labels,Follow-up #"], {}
    for i in range(90):
        said = [*findings, *others][i % 9]
        file = home / f"images_{i % 3:03d}" / "images" / f"{i:08d}_000.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i).convert("L").save(file)
        lines.append(f"{file.name},{said},0")
        if said in findings:
            want[i] = findings.index(said)
    (home / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    grey = lambda i: np.asarray(picture(i).convert("L").convert("RGB")).transpose(2, 0, 1).tobytes()  # noqa: E731
    d = make("seq-chestx", tmp_path, monkeypatch)
    assert torch.bincount(d.train_labels).tolist() == [8] * 6 and torch.bincount(d.eval_labels).tolist() == [2] * 6
    both = contents(d.train_images, d.train_labels) | contents(d.eval_images, d.eval_labels)
    assert both == {grey(i): y for i, y in want.items()}
    for file, rows in (("train_val_list.txt", range(45)), ("test_list.txt", range(45, 90))):
        (home / file).write_text("".join(f"{i:08d}_000.png\n" for i in rows))
    d = make("seq-chestx", tmp_path, monkeypatch)
    assert contents(d.train_images, d.train_labels) == {grey(i): y for i, y in want.items() if i < 45}
    assert contents(d.eval_images, d.eval_labels) == {grey(i): y for i, y in want.items() if i >= 45}
    shutil.rmtree(tmp_path / "arrays")
    (home / "images_000" / "images" / "00000003_000.png").unlink()
    with pytest.raises(UserError, match="chestx cannot be read.*1 images are missing, such as 00000003_000.png"):
        make("seq-chestx", tmp_path, monkeypatch)


def test_mit67(tmp_path, monkeypatch):
    rooms = [f"room_{c:02d}" for c in range(67)]
    write_classes(tmp_path / "made" / "Images", rooms, 3)
    home = tmp_path / "MIT67"
    home.mkdir()
    with tarfile.open(home / "indoorCVPR_09.tar", "w") as tar:
        tar.add(tmp_path / "made" / "Images", "Images")
    for file, i in (("TrainImages.txt", 2), ("TestImages.txt", 0)):
        (home / file).write_text("\n".join(f"{r}/{i}.jpg" for r in rooms[::-1]))
    d = make("seq-mit67", tmp_path, monkeypatch)
    assert_holds(d, *({(r, i): c for c, r in enumerate(rooms)} for i in (2, 0)))
    assert d.get_offsets(9) == (61, 67)


def test_those_of_seq_8vision(tmp_path, monkeypatch):
    """Read by the same readers and kept in the same files."""
    write_dtd(tmp_path), write_gtsrb(tmp_path), write_sun(tmp_path), write_svhn(tmp_path, monkeypatch)
    counts = {"dtd": (94, 47), "gtsrb": (86, 5), "sun397": (397, 397), "svhn": (20, 10)}
    for name, (train, test) in counts.items():
        side = 32 if name == "svhn" else 224
        d = make(f"seq-{name}", tmp_path)
        assert (len(d.train_labels), len(d.eval_labels)) == (train, test)
        assert d.train_images[:1].shape == (1, 3, side, side) and d.SIZE == (224, 224)
        assert (tmp_path / "8vision" / name / f"train-{side}.npy").exists()
    raw = np.random.default_rng(20).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)  # of write_svhn
    assert np.array_equal(d.train_images.numpy(), raw.transpose(3, 2, 0, 1))
    assert d.train_labels.tolist() == [(i % 10 + 1) % 10 for i in range(20)]  # 10 stands for zero
    x, y, plain = next(iter(d.get_data_loaders()[0]))
    assert x.shape[1:] == (3, 224, 224) and plain.shape[1:] == (3, 32, 32) and set(y.tolist()) == {0, 1}


def test_eurosat_as_lorm_was_published(monkeypatch):
    cls = get_dataset_class("seq-eurosat-rgb")
    monkeypatch.setattr(cls, "_load", lambda self: None)
    args = parse_args(
        ["--model=lorm", "--dataset=seq-eurosat-rgb", "--fl", "--model_config=paper-beta0.5", "--device=cpu"]
    )
    assert (args.lr, args.num_comm_rounds, args.distribution_alpha, args.transforms) == (0.001, 5, 0.5, "lorm_iclr")
    d, x = cls(args), torch.rand(3, 3, 64, 64)
    want = TF.resize(x, [224, 224], BICUBIC)
    assert torch.equal(d.get_transform()(x), want) and torch.equal(d.get_test_transform()(x), want)
    assert d.get_backbone() == "vit" and cls(Namespace(fl=True)).MEAN[0] == 0.48145466


def test_the_second_start_reads_nothing(tmp_path, monkeypatch):
    write_folders(tmp_path / "imagenet-a", WNIDS, 2)
    first = make("seq-imagenet-a", tmp_path, monkeypatch)
    cls = get_dataset_class("seq-imagenet-a")
    nobody = dataclasses.replace(cls.PART, read=lambda *args: pytest.fail("read again"))
    monkeypatch.setattr(cls, "PART", nobody)
    again = make("seq-imagenet-a", tmp_path, seed=4)
    assert torch.equal(first.train_images, again.train_images) and torch.equal(first.eval_labels, again.eval_labels)
    # what is too large stays on disk
    monkeypatch.setattr(image_files, "IN_MEMORY", 0)
    mapped = make("seq-imagenet-a", tmp_path)
    assert isinstance(mapped.train_images, Stacked) and isinstance(mapped.train_images.parts[0], np.memmap)
    assert torch.equal(mapped.train_images[torch.arange(200)], first.train_images) and not image_files._ARRAYS


def test_a_class_that_is_missing_and_comes_later(tmp_path, monkeypatch):
    write_classes(tmp_path / "imagenet-a", WNIDS[:-1], 2)
    with pytest.raises(UserError, match="imagenet-a cannot be read.*199 classes instead of 200.*imagenet-a.tar"):
        make("seq-imagenet-a", tmp_path, monkeypatch)
    write_classes(tmp_path / "imagenet-a", WNIDS[-1:], 2)
    assert len(make("seq-imagenet-a", tmp_path, monkeypatch).eval_labels) == 200


def test_a_download_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    put(tmp_path / "made" / "pets" / "a.jpg", 1)
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(tmp_path / "made" / "pets", "pets")
    packed, url = (tmp_path / "pets.tar").read_bytes(), "https://x.org/pets.tar"

    def download(address, root, name, md5):
        assert (address, name, md5) == (url, "pets.tar", None)
        (Path(root) / name).write_bytes(sent)
        if not sent:
            raise OSError("the line is dead")

    monkeypatch.setattr(readers, "download_url", download)
    home, sent = tmp_path / "data", b""
    with pytest.raises(OSError, match="the line is dead"):
        unpacked(home / "pets", url)
    assert list(home.iterdir()) == []
    sent = packed[:100]
    with pytest.raises(RuntimeError, match="(?s)pets.tar cannot be unpacked.*delete it"):
        unpacked(home / "pets", url)
    assert [f.name for f in home.iterdir()] == ["pets.tar"]
    (home / "pets.tar").unlink()
    sent = packed
    assert [f.name for f in unpacked(home / "pets", url).iterdir()] == ["a.jpg"]
    assert sorted(f.name for f in home.iterdir()) == ["pets", "pets.tar"]
