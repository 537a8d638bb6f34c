"""seq-8vision from small files in the original formats."""

from __future__ import annotations

import dataclasses
import struct
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from datasets import get_dataset
from datasets.seq_8vision import CLASSES, TASKS, Sequential8Vision
from datasets.utils.stacked import Stacked, square
from datasets.utils.transforms import BICUBIC
from utils.errors import UserError


def picture(seed, width=20, height=14):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_cars(root):
    from scipy.io import savemat

    base = root / "stanford_cars"
    names = np.array([f"Car {c}" for c in range(196)], dtype=object)
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, file in (
        ("train", base / "devkit" / "cars_train_annos.mat"),
        ("test", base / "cars_test_annos_withlabels.mat"),
    ):
        kind = [("fname", object), ("class", object)]
        rows = np.array([(f"{i}.jpg", c + 1) for i, c in enumerate((0, 195, 7))], dtype=kind)
        savemat(file, {"annotations": rows})
        for i in range(3):
            save(picture(i), base / f"cars_{part}" / f"{i}.jpg")


def write_dtd(root):
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        lines = [f"texture{c:02d}/{part}.jpg" for c in range(47)]
        (base / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")
        for i, line in enumerate(lines):
            save(picture(i), base / "images" / line)


def write_folders(where, names, n):
    for c, name in enumerate(names):
        for i in range(n):
            save(picture(c * n + i), where / name / f"{i}.png")


def write_gtsrb(root):
    base = root / "gtsrb"
    write = lambda c, i: save(picture(c), base / "GTSRB" / "Training" / f"{c:05d}" / f"{i:05d}.ppm")  # noqa: E731
    for c in range(43):
        write(c, 0), write(c, 1)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(5):
        save(picture(i), base / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm")
        lines.append(f"{i:05d}.ppm;20;14;0;0;1;1;{i}")
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


def write_mnist(root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 20), ("t10k", 10)):
        x, y = np.random.default_rng(n).integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        for kind, a in (("images-idx3", x), ("labels-idx1", y)):
            head = struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(head + a.astype(np.uint8).tobytes())


def write_sun(root):
    base = root / "SUN397"
    names = [f"/{'abc'[c % 3]}/place{c}" + ("/indoor" if c == 5 else "") for c in range(397)]
    for c, name in enumerate(names):
        for i in range(2):
            save(picture(c, 6, 6), base / name.strip("/") / f"sun_{c}_{i}.jpg")
    (base / "ClassName.txt").write_text("\n".join(names) + "\n")


def write_svhn(root, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets.utils import calculate_md5

    for part, n in (("train", 20), ("test", 10)):
        file = root / f"{part}_32x32.mat"
        x = np.random.default_rng(n).integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        savemat(file, {"X": x, "y": (np.arange(n) % 10 + 1)[:, None].astype(np.uint8)})
        url, name, _ = tv.SVHN.split_list[part]
        monkeypatch.setitem(tv.SVHN.split_list, part, [url, name, calculate_md5(str(file))])


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    write_cars(tmp_path), write_dtd(tmp_path), write_gtsrb(tmp_path), write_mnist(tmp_path), write_sun(tmp_path)
    eurosat = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    )
    write_folders(tmp_path / "eurosat" / "2750", eurosat.split(), 4)
    write_folders(tmp_path / "NWPU-RESISC45", [f"scene_{c:02d}" for c in range(45)], 3)
    write_svhn(tmp_path, monkeypatch)
    return tmp_path


def make(folder, **args):
    return get_dataset(Namespace(dataset="seq-8vision", base_path=str(folder), batch_size=4, **args))


def test_eight_data_sets(files):
    d = make(files)
    assert d.N_CLASSES == sum(CLASSES) == 758 and d.get_offsets(3) == (253, 296)
    train = [len(d.task_indices(t)) for t in range(8)]
    test = [len(d.task_indices(t, False)) for t in range(8)]
    assert train == [3, 94, 30, 86, 20, 90, 397, 20] and test == [3, 47, 10, 5, 10, 45, 397, 10]
    for task, (name, seed, kept) in {0: ("cars", 1, 224), 3: ("gtsrb", 0, 224)}.items():
        i = d.task_indices(task)[1]
        image = picture(seed)
        if name == "cars":
            image = Image.open(files / "stanford_cars" / "cars_train" / "1.jpg")
        assert torch.equal(d.train_images[i[None]][0], torch.tensor(square(image, kept)))
    labels = d.labels_of(d.task_indices(0)).tolist()
    assert sorted(labels) == [0, 7, 195]
    x, y, plain = next(iter(d.get_data_loaders()[0]))
    assert x.shape == (3, 3, 224, 224) and plain.max() <= 1 and set(y.tolist()) == {0, 7, 195}
    mnist = d.task_indices(4, False)[:2]
    x = next(iter(d.loader(mnist, 4, 2, False)))[0]
    raw = torch.from_numpy(np.load(files / "8vision" / "mnist" / "test-28.npy")[:2])
    want = TF.resize(raw, [224, 224], BICUBIC, antialias=True).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (d.MEAN, d.STD))
    torch.testing.assert_close(x, (want - mean) / std)


def test_the_division_is_the_same_in_every_run_and_the_second_start_maps_files(files, monkeypatch):
    first = make(files, seed=0)
    nobody = [dataclasses.replace(p, read=lambda *args: pytest.fail("read again")) for p in Sequential8Vision.PARTS]
    monkeypatch.setattr(Sequential8Vision, "PARTS", nobody)
    again = make(files, seed=5)
    for part in ("train_labels", "eval_labels"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    some = torch.arange(0, len(first.train_labels), 50)
    assert torch.equal(first.train_images[some], again.train_images[some])
    assert all(isinstance(p, np.memmap) for p in again.train_images.parts)


def test_partitions_of_sun(files):
    folder = files / "SUN397" / "Partitions"
    folder.mkdir()
    (folder / "Training_01.txt").write_text("/a/place0/sun_0_0.jpg\n/c/place5/indoor/sun_5_1.jpg\n")
    (folder / "Testing_01.txt").write_text("/a/place0/sun_0_1.jpg\n")
    d = make(files)
    lo = d.get_offsets(6)[0]
    assert (d.labels_of(d.task_indices(6)) - lo).tolist() == [0, 5] and len(d.task_indices(6, False)) == 1


def test_prompts(files):
    d = make(files)
    prompts = d.prompts()
    assert len(prompts) == 758 and [len(prompts[d.get_offsets(t)[0]]) for t in range(8)] == [8, 8, 3, 3, 1, 18, 2, 1]
    assert (
        prompts[0][0] == "a photo of a Car 0." and prompts[243][0] == "a centered satellite photo of annual crop land."
    )
    assert prompts[253 + 14][0] == 'a zoomed in photo of a "stop" traffic sign.'
    assert prompts[d.get_offsets(6)[0] + 5][1] == "a photo of the place5 indoor."
    shuffled = make(files, permute_classes=1, seed=3)
    order = shuffled.class_order
    assert all(shuffled.prompts()[order[c]] == prompts[c] for c in (0, 100, 757))


def test_epochs_of_a_task(files, rig):
    flags = f"--model task_arithmetic --device cpu --base_path {files} --backbone clip --clip_backbone tiny"
    r = rig(flags, "--dataset seq-8vision")
    epochs = []
    for t in range(8):
        r.worker._current_task = t
        epochs.append(r.worker.local_epochs())
    assert epochs == [35, 76, 12, 11, 5, 15, 14, 4]
    given = rig(f"{flags} --n_epochs 3", "--dataset seq-8vision")
    assert given.worker.local_epochs() == 3


def test_arrays_of_different_sizes():
    a = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    b = np.full((3, 3, 2, 2), 9, dtype=np.uint8)
    s = Stacked([a, b], 4)
    assert len(s) == 5 and s.shape == (5, 3, 4, 4)
    got = s[torch.tensor([4, 1, 0, 2])]
    assert torch.equal(got[1], torch.from_numpy(a[1])) and torch.equal(got[2], torch.from_numpy(a[0]))
    assert (got[0] == 9).all() and (got[3] == 9).all() and s[1:3].shape == (2, 3, 4, 4) and s.to("cpu") is s


def test_mistakes(files):
    import shutil

    shutil.rmtree(files / "NWPU-RESISC45" / "scene_00")
    with pytest.raises(
        UserError, match="resisc45 cannot be read.*44 classes instead of 45.*put the folder NWPU-RESISC45"
    ):
        make(files)
    shutil.rmtree(files / "8vision")
    shutil.rmtree(files / "stanford_cars")
    with pytest.raises(UserError, match="cars cannot be read or downloaded.*stanford_cars .*into /"):
        make(files)
    assert TASKS[0] == "cars"
