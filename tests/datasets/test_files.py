"""The dataset files, from tiny files in the original formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import pickle
import struct
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from torchvision.transforms.v2 import functional as TF

from datasets import get_dataset, get_dataset_class
from datasets.utils import shipped
from datasets.utils.transforms import BICUBIC, Normalize, RandomCrop, RandomResizedCrop
from utils.errors import UserError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_arrays(n):
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n) % 10


def write_mnist(folder, packed=False):
    folder.mkdir(parents=True)
    for prefix, n in (("train", 50), ("t10k", 20)):
        for kind, array in zip(("images-idx3", "labels-idx1"), mnist_arrays(n)):
            data = idx(array)
            if packed:
                (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
            else:
                (folder / f"{prefix}-{kind}-ubyte").write_bytes(data)


@pytest.mark.parametrize("place", ["MNIST/MNIST/raw", "MNIST/raw"])
def test_mnist_is_read_where_mammoth_and_torchvision_put_it(tmp_path, place):
    write_mnist(tmp_path / place)
    d = get_dataset(Namespace(dataset="seq-mnist", base_path=str(tmp_path) + "/"))
    images, labels = mnist_arrays(50)
    assert torch.equal(d.train_images[:, 0], torch.from_numpy(images))
    assert d.train_labels.tolist() == labels.tolist()
    train, test = d.get_data_loaders()
    assert train.batch_size == 64 and d.get_epochs() == 1 and d.SIZE == (28, 28)
    inputs, _, not_aug = next(iter(train))
    assert torch.equal(inputs, not_aug) and set(test.dataset.targets) == {0, 1}


def test_mnist_archives_placed_by_hand_are_unpacked(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "MNIST" / "raw"
    write_mnist(raw, packed=True)
    md5 = [(name, hashlib.md5((raw / name).read_bytes()).hexdigest()) for name, _ in tv.MNIST.resources]
    monkeypatch.setattr(tv.MNIST, "resources", md5)
    d = get_dataset(Namespace(dataset="seq-mnist", base_path=str(tmp_path)))
    assert len(d.eval_labels) == 20


def test_permuted_mnist(tmp_path):
    write_mnist(tmp_path / "MNIST" / "MNIST" / "raw")
    make = lambda **a: get_dataset(Namespace(dataset="perm-mnist", base_path=str(tmp_path), **a))  # noqa: E731
    d, x = make(seed=1), torch.from_numpy(mnist_arrays(50)[0])[:, None]
    assert d.N_TASKS == 20 and d.N_CLASSES == 10 and d.get_batch_size() == 128
    a, b = d.task_images(x, 0), d.task_images(x, 1)
    assert a.shape == x.shape and a.dtype == torch.uint8
    assert not torch.equal(a, b) and not torch.equal(a, x)
    assert torch.equal(a.flatten(1).sort().values, x.flatten(1).sort().values)
    p = d.permutations[0]
    assert torch.equal(a.flatten(1), x.flatten(1)[:, p])  # one permutation for all images
    assert torch.equal(make(seed=1).task_images(x, 3), d.task_images(x, 3))
    assert not torch.equal(make(seed=2).task_images(x, 3), d.task_images(x, 3))
    s = get_dataset(Namespace(dataset="seq-mnist", base_path=str(tmp_path)))
    assert s.train_images is d.train_images  # one copy for all MNIST benchmarks


def test_rotated_mnist(tmp_path):
    write_mnist(tmp_path / "MNIST" / "MNIST" / "raw")
    d = get_dataset(Namespace(dataset="rot-mnist", base_path=str(tmp_path), seed=1))
    x = d.train_images
    assert len(d.angles) == 20 and min(d.angles) >= 0 and max(d.angles) <= 180 and len(set(d.angles)) == 20
    assert torch.equal(d.task_images(x, 4), TF.rotate(x, d.angles[4])) and d.task_images(x, 4).dtype == torch.uint8
    d.angles[0] = 90.0
    assert torch.equal(d.task_images(x, 0), x.rot90(1, (2, 3)))


def cifar_batch(n, classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), (np.arange(n) % classes).tolist()


def write_cifar(folder, reader, monkeypatch, classes):
    """A data set in the original format under ``folder``, with torchvision's checksums adapted."""
    folder = folder / reader.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        sums = []
        for i, (name, _) in enumerate(getattr(reader, part)):
            data, labels = cifar_batch(2 * classes, classes, i + 100 * (part == "test_list"))
            sums.append([name, write(name, {"data": data.reshape(len(data), -1), key: labels})])
        monkeypatch.setattr(reader, part, sums)
    meta = reader.meta
    names = {meta["key"]: [str(i) for i in range(classes)]}
    monkeypatch.setattr(reader, "meta", {**meta, "md5": write(meta["filename"], names)})


@pytest.mark.parametrize("where", ["CIFAR10", "."])
def test_cifar10_central(tmp_path, monkeypatch, where):
    write_cifar(tmp_path / where, tv.CIFAR10, monkeypatch, 10)
    d = get_dataset(Namespace(dataset="seq-cifar10", base_path=str(tmp_path)))
    want = torch.cat([torch.from_numpy(cifar_batch(20, 10, i)[0]) for i in range(5)])
    assert torch.equal(d.train_images, want) and d.train_images.is_contiguous()
    assert d.eval_labels.tolist() == cifar_batch(20, 10, 100)[1]
    assert d.SIZE == (32, 32) and d.N_TASKS == 5 and (d.get_epochs(), d.get_batch_size()) == (50, 32)
    assert d.get_backbone() == "resnet18" and d.MEAN == (0.4914, 0.4822, 0.4465)
    first = d.get_transform().transforms[0]
    assert isinstance(first, RandomCrop) and (first.size, first.padding) == ((32, 32), 4)
    inputs, _, not_aug = next(iter(d.get_data_loaders()[0]))
    assert inputs.shape[1:] == not_aug.shape[1:] == (3, 32, 32)


def test_cifar10_archive_placed_by_hand_is_unpacked(tmp_path, monkeypatch):
    write_cifar(tmp_path / "made", tv.CIFAR10, monkeypatch, 10)
    home = tmp_path / "data" / "CIFAR10"
    home.mkdir(parents=True)
    with tarfile.open(home / tv.CIFAR10.filename, "w:gz") as tar:
        tar.add(tmp_path / "made" / tv.CIFAR10.base_folder, tv.CIFAR10.base_folder)
    digest = hashlib.md5((home / tv.CIFAR10.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", digest)
    assert len(get_dataset(Namespace(dataset="seq-cifar10", base_path=str(tmp_path / "data"))).train_labels) == 100


def test_cifar100_takes_the_pipeline_of_its_backbone(tmp_path, monkeypatch):
    write_cifar(tmp_path / "CIFAR100", tv.CIFAR100, monkeypatch, 100)

    def make(name="seq-cifar100", **args):
        return get_dataset(Namespace(dataset=name, base_path=str(tmp_path), **args))

    small = make()
    assert small.SIZE == (32, 32) and small.get_backbone() == "resnet18" and small.MEAN == (0.5071, 0.4867, 0.4408)
    assert small.get_offsets(9) == (90, 100)

    fed = make(fl=True)  # python main.py --model dolfin --dataset seq-cifar100 --fl
    assert fed.SIZE == (224, 224) and fed.get_backbone() == "vit" and type(fed).SIZE == (32, 32)
    assert (fed.get_epochs(), fed.get_batch_size()) == (5, 16) and fed.MEAN == fed.STD == (0.5, 0.5, 0.5)
    assert type(fed).defaults(True)["distribution_alpha"] == 0.05 and type(fed).defaults(True)["num_clients"] == 10
    assert fed.train_images is small.train_images and fed.train_images.shape[-1] == 32
    inputs, _ = fed.test_loader(0).dataset.batch(torch.arange(3))
    x = fed.eval_images[fed.task_indices(0, False)[:3]].float() / 255
    want = TF.resize(TF.resize(x, [224], BICUBIC), [256])[:, :, 16:240, 16:240]
    assert torch.allclose(inputs, (want - 0.5) / 0.5, atol=1e-6)
    inputs, labels, not_aug = next(iter(fed.get_data_loaders()[0]))
    assert inputs.shape[1:] == (3, 224, 224) and not_aug.shape[1:] == (3, 32, 32)

    for d in (make(backbone="vit"), make("seq-cifar100-224"), make(backbone="vit_base_patch16_224")):
        assert d.SIZE == (224, 224) and d.MEAN == (0.485, 0.456, 0.406)
        crop = d.get_transform().transforms[0]
        assert isinstance(crop, RandomResizedCrop) and crop.interpolation == BICUBIC
        x = torch.rand(2, 3, 32, 32)
        y = d.get_test_transform()(x)
        assert torch.allclose(y, Normalize(d.MEAN, d.STD)(TF.resize(x, [224], BICUBIC)))
        assert torch.allclose(d.get_normalization_transform()(x), y)
        big = torch.rand(2, 3, 224, 224)
        assert torch.allclose(d.get_normalization_transform()(big), Normalize(d.MEAN, d.STD)(big))
    assert (make("seq-cifar100-224").get_epochs(), make("seq-cifar100-224").get_batch_size()) == (20, 128)
    assert make(backbone="clip").MEAN[0] == 0.48145466
    for d in (
        make(backbone="resnet18", fl=True),
        make("seq-cifar100-224", backbone="resnet18"),
        make(backbone="vit-pocket"),
    ):
        assert d.SIZE == (32, 32)


@pytest.mark.parametrize(
    "name,folder,files",
    [
        ("seq-mnist", "MNIST/MNIST/raw", [f"{n} (md5 {m})" for n, m in tv.MNIST.resources]),
        ("seq-cifar10", "CIFAR10", [f"{tv.CIFAR10.filename} (md5 {tv.CIFAR10.tgz_md5})"]),
        ("seq-cifar100-224", "CIFAR100", [f"{tv.CIFAR100.filename} (md5 {tv.CIFAR100.tgz_md5})"]),
    ],
)
def test_a_missing_download_says_how_to_get_the_files(tmp_path, name, folder, files):
    with pytest.raises(UserError) as e:
        get_dataset(Namespace(dataset=name, base_path=str(tmp_path)))
    message = str(e.value)
    assert (
        "\n" not in message and str(tmp_path / folder) in message and "https://" in message and "no network" in message
    )
    assert all(f in message for f in files)


def test_damaged_files_are_a_user_error_too(tmp_path, monkeypatch):
    write_mnist(tmp_path / "MNIST" / "MNIST" / "raw")
    file = tmp_path / "MNIST" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="MNIST cannot be read"):
        get_dataset(Namespace(dataset="seq-mnist", base_path=str(tmp_path)))
    write_cifar(tmp_path / "CIFAR10", tv.CIFAR10, monkeypatch, 10)
    (tmp_path / "CIFAR10" / tv.CIFAR10.base_folder / "data_batch_2").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="CIFAR10 cannot be read"):  # refused by checksum, never unpickled
        get_dataset(Namespace(dataset="seq-cifar10", base_path=str(tmp_path)))


# ---- what ships
def test_digits():
    d = get_dataset(Namespace(dataset="seq-digits", seed=1))
    assert d.train_images.shape[1:] == (1, 28, 28) and len(d.train_labels) + len(d.eval_labels) == 1797
    share = torch.bincount(d.eval_labels) / (torch.bincount(d.eval_labels) + torch.bincount(d.train_labels))
    assert (share - 0.2).abs().max() < 0.005
    corners = d.train_images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean()
    assert corners < 15 < d.train_images.float().mean()  # ink is white
    assert d.train_images.max() == 255
    other = get_dataset(Namespace(dataset="seq-digits", seed=2))
    assert other.train_images is d.train_images
    inputs, labels, _ = next(iter(d.get_data_loaders()[0]))
    assert inputs.min() == -1 and labels.max() == 1
    fed = get_dataset_class("seq-digits").defaults(fl=True)
    assert (fed["n_epochs"], fed["num_comm_rounds"], fed["batch_size"], fed["num_clients"]) == (2, 3, 16, 10)


def write_glyphs(folder):
    rng, arrays = np.random.default_rng(0), {}
    for prefix, classes in (("glyphs", 100), ("scripts", 80)):
        for part, n in (("train", 3), ("test", 1)):
            arrays[f"{prefix}_x_{part}"] = rng.integers(0, 256, (n * classes, 28, 28), dtype=np.uint8)
            arrays[f"{prefix}_y_{part}"] = np.tile(np.arange(classes, dtype=np.int64), n)
    file = io.BytesIO()
    np.savez(file, **arrays)
    packed = lzma.compress(file.getvalue())
    (folder / shipped.ARCHIVE).write_bytes(packed)
    (folder / shipped.CHECKSUM).write_text(f"{hashlib.sha256(packed).hexdigest()}  {shipped.ARCHIVE}\n")
    return arrays


@pytest.mark.parametrize("name,tasks", [("glyphs", 10), ("scripts", 8)])
def test_glyphs_and_scripts(tmp_path, monkeypatch, name, tasks):
    monkeypatch.setattr(shipped, "DATA_DIR", tmp_path)
    arrays = write_glyphs(tmp_path)
    d = get_dataset(Namespace(dataset=f"seq-{name}"))
    assert tasks == d.N_TASKS and tasks * 10 == d.N_CLASSES and d.get_backbone() == "vit-pocket"
    assert np.array_equal(d.train_images[:, 0].numpy(), arrays[f"{name}_x_train"])
    assert np.array_equal(d.eval_labels.numpy(), arrays[f"{name}_y_test"])
    assert len(d.task_indices(tasks - 1)) == 30


def test_a_missing_or_damaged_archive_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "DATA_DIR", tmp_path)
    with pytest.raises(UserError, match=r"glyphs.npz.xz is missing.*restore"):
        get_dataset(Namespace(dataset="seq-glyphs"))
    write_glyphs(tmp_path)
    path = tmp_path / shipped.ARCHIVE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        get_dataset(Namespace(dataset="seq-glyphs"))
    (tmp_path / shipped.CHECKSUM).unlink()
    with pytest.raises(UserError, match=r"glyphs.sha256 is missing"):
        get_dataset(Namespace(dataset="seq-scripts"))


@pytest.mark.skipif(not (shipped.DATA_DIR / shipped.ARCHIVE).exists(), reason="the archive is not there")
@pytest.mark.parametrize("name", ["seq-glyphs", "seq-scripts"])
def test_the_real_archive(name):
    d = get_dataset(Namespace(dataset=name))
    for labels in (d.train_labels, d.eval_labels):
        counts = torch.bincount(labels, minlength=d.N_CLASSES)
        assert len(counts) == d.N_CLASSES and counts.min() >= 1
    assert d.train_images.shape[1:] == (1, 28, 28)
    assert d.train_images[:, 0, 0].float().mean() < 64  # the border is dark
