"""Event data from small archives in the original formats, against counts made one event at a time."""

from __future__ import annotations

import hashlib
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch

from datasets import get_dataset
from datasets.utils import continual_dataset
from datasets.utils.cache import cached_arrays
from datasets.utils.events import Rebin, Scale, count_events, reader_class
from datasets.utils.transforms import RandomCrop, RandomHorizontalFlip
from tests.helpers import only_folder, rows, run
from utils.errors import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def recording(seed, side, n=60):
    """Events in the order of their time."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.choice(300_000, n, replace=False))
    return {"t": t, "x": rng.integers(side, size=n), "y": rng.integers(side, size=n), "p": rng.integers(2, size=n)}


def atis(e) -> bytes:
    """N-MNIST: five bytes an event, x, y, polarity and 23 bits of microseconds."""
    return b"".join(
        bytes([x, y]) + ((int(p) << 23) | int(t)).to_bytes(3, "big") for t, x, y, p in zip(*(e[k] for k in "txyp"))
    )


def aedat(e) -> bytes:
    """CIFAR10-DVS: a header, then address and time as big-endian words; the chip's axes are turned."""
    words = [
        w
        for t, x, y, p in zip(*(e[k] for k in "txyp"))
        for w in (((127 - x) << 8) | ((127 - y) << 1) | (1 - p), int(t))
    ]
    return b"#!AER-DAT2.0\r\n# test\r\n" + np.array(words, dtype=">u4").tobytes()


def counted(e, T, side, camera, split_by="number"):
    """Frames (T, 2, side, side), one event after another."""
    frames, n = np.zeros((T, 2, side, side), dtype=np.uint8), len(e["t"])
    length = (e["t"][-1] - e["t"][0]) // T
    for i, (t, x, y, p) in enumerate(zip(*(e[k] for k in "txyp"))):
        k = min(i // (n // T), T - 1) if split_by == "number" else min((t - e["t"][0]) // length, T - 1)
        frames[k, p, y * side // camera, x * side // camera] += 1
    return torch.from_numpy(frames)


def pack(folder, monkeypatch, reader, archives):
    """``archives``: {name: {file inside: bytes}}, with their checksums as the ones that SpikingJelly expects."""
    folder.mkdir(parents=True)
    for name, files in archives.items():
        with zipfile.ZipFile(folder / name, "w") as z:
            for inside, data in files.items():
                z.writestr(inside, data)
    sums = [(n, f"https://example.org/{n}", hashlib.md5((folder / n).read_bytes()).hexdigest()) for n in archives]
    monkeypatch.setattr(reader_class(reader), "resource_url_md5", classmethod(lambda cls: sums))


@pytest.fixture
def n_mnist(tmp_path, monkeypatch):
    """Eight training and two test recordings of each digit, numbered by digit * 10 + i (test: + 1000)."""
    archives = {
        f"{part}.zip": {
            f"{part}/{c}/{i:05d}.bin": atis(recording(first + 10 * c + i, 34)) for c in range(10) for i in range(n)
        }
        for part, n, first in (("Train", 8, 0), ("Test", 2, 1000))
    }
    pack(tmp_path / "NMNIST" / "download", monkeypatch, "NMNIST", archives)
    return tmp_path


@pytest.fixture
def dvs(tmp_path, monkeypatch):
    archives = {
        f"{name}.zip": {f"{name}/cifar10_{name}_{i}.aedat": aedat(recording(100 * c + i, 128, 300)) for i in range(10)}
        for c, name in enumerate(CLASSES)
    }
    pack(tmp_path / "CIFAR10DVS" / "download", monkeypatch, "CIFAR10DVS", archives)
    return tmp_path


def n_mnist_of(folder, **args):
    return get_dataset(Namespace(dataset="seq-n-mnist", base_path=str(folder), **{"T": 6, "batch_size": 4, **args}))


@pytest.mark.parametrize("split_by", ["number", "time"])
def test_n_mnist(n_mnist, split_by):
    d = n_mnist_of(n_mnist, split_by=split_by)
    assert d.train_images.shape == (80, 6, 2, 34, 34) and d.eval_images.shape == (20, 6, 2, 34, 34)
    for part, images, first in ((d.train_labels, d.train_images, 0), (d.eval_labels, d.eval_images, 1000)):
        n = len(part) // 10
        assert part.tolist() == sorted(list(range(10)) * n)
        for j, frames in enumerate(images):
            want = counted(recording(first + 10 * int(part[j]) + j % n, 34), 6, 34, 34, split_by)
            assert torch.equal(frames, want)
    inputs, labels, not_aug = next(iter(d.get_data_loaders()[0]))
    assert inputs.shape == (4, 6, 2, 34, 34) and set(labels.tolist()) <= {0, 1}
    torch.testing.assert_close(not_aug * 255, inputs)
    assert float(inputs.sum()) == 4 * 60  # every event is there


def test_second_start_reads_one_file(n_mnist, monkeypatch):
    first = n_mnist_of(n_mnist)
    continual_dataset._ARRAYS.clear()
    monkeypatch.setattr("datasets.utils.events.reader_class", lambda name: pytest.fail("read again"))
    again = n_mnist_of(n_mnist)
    assert torch.equal(first.train_images, again.train_images) and torch.equal(first.eval_labels, again.eval_labels)
    continual_dataset._ARRAYS.clear()
    file = n_mnist / "NMNIST" / "frames-6-by-number-34x34-train.npz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="train.npz is damaged .* delete it"):
        n_mnist_of(n_mnist)


def test_frames_of_another_number_are_other_arrays(n_mnist):
    six, three = n_mnist_of(n_mnist), n_mnist_of(n_mnist, T=3)
    torch.testing.assert_close(three.rebin(six.train_images.float(), 3), three.train_images.float())


def test_dvs_cifar10(dvs):
    d = get_dataset(Namespace(dataset="seq-dvs-cifar10", base_path=str(dvs), T=4, batch_size=5))
    assert len(d.train_labels) == 90 and len(d.eval_labels) == 10 and d.train_images.shape[1:] == (4, 2, 48, 48)
    assert d.eval_labels.tolist() == list(range(10)) and d.train_labels.bincount().tolist() == [9] * 10
    kept = {x.numpy().tobytes() for x in torch.cat([d.train_images, d.eval_images])}
    want = [counted(recording(100 * c + i, 128, 300), 4, 48, 128) for c in range(10) for i in range(10)]
    assert kept == {x.numpy().tobytes() for x in want} and all(x.sum() == 300 for x in want)
    other = get_dataset(Namespace(dataset="seq-dvs-cifar10", base_path=str(dvs), T=4, batch_size=5, seed=7))
    assert torch.equal(d.eval_images, other.eval_images)  # the division is no matter of the seed


def test_all_frames_are_moved_alike():
    one = torch.rand(5, 1, 2, 12, 12)
    frames = one.expand(5, 7, 2, 12, 12)
    for t in (RandomCrop(12, padding=3), RandomHorizontalFlip()):
        moved = t(frames, torch.Generator().manual_seed(0))
        assert moved.shape == frames.shape and torch.equal(moved, moved[:, :1].expand_as(moved))
        assert torch.equal(moved[:, 0], t(one[:, 0], torch.Generator().manual_seed(0)))
        assert not torch.equal(moved[:, :1], one)


def test_scales():
    counts = torch.randint(256, (3, 4, 2, 5, 5))
    counts[1] = 0  # a silent recording stays one
    stored = counts / 255
    torch.testing.assert_close(Scale("count")(stored), counts.float())
    torch.testing.assert_close(Scale("log")(stored), torch.log(1 + counts.float()))
    scaled = Scale("max")(stored)
    torch.testing.assert_close(scaled[0], counts[0] / counts[0].max())
    assert not scaled[1].any()


@pytest.mark.parametrize("how", ["count", "max", "log"])
def test_steps_are_added_up_or_spread(how):
    counts = torch.randint(9, (3, 6, 2, 5, 5)).float()
    x = counts.log1p() if how == "log" else counts
    plain = (lambda y: y.expm1()) if how == "log" else (lambda y: y)
    for steps in (1, 2, 3, 6, 12, 18):
        y = plain(Rebin(steps, how)(x))
        assert y.shape[1] == steps
        torch.testing.assert_close(y.sum(1), counts.sum(1))
        for k in range(steps):
            lo, hi = k * 6 // steps, max((k + 1) * 6 // steps, k * 6 // steps + 1)
            torch.testing.assert_close(y[:, k], counts[:, lo:hi].sum(1) * min(6 / steps, 1), rtol=1e-5, atol=1e-5)
    for steps in (4, 5, 7):
        with pytest.raises(ValueError, match="cannot be made"):
            Rebin(steps, how)(x)


def test_more_events_than_a_byte_holds():
    e = {k: np.zeros(1000, dtype=np.int64) for k in "xyp"} | {"t": np.arange(1000)}
    assert count_events(e, 2, "number", (4, 4), (4, 4)).flatten().sort().values[-3:].tolist() == [0, 255, 255]


def test_mistakes(n_mnist, dvs, monkeypatch, tmp_path):
    archives = n_mnist / "NMNIST" / "download"
    with pytest.raises(UserError, match="--backbone resnet19 has no time.*sresnet19"):
        get_dataset(Namespace(dataset="seq-n-mnist", base_path=str(n_mnist), backbone="resnet19"))
    e = recording(0, 4, 9) | {"t": np.array([0, 1, 2, 3, 4, 5, 6, 7, 100])}
    with pytest.raises(UserError, match="--split_by time: a recording has no event"):
        count_events(e, 4, "time", (4, 4), (4, 4))
    whole = (archives / "Test.zip").read_bytes()
    (archives / "Test.zip").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="Test.zip is damaged"):
        n_mnist_of(n_mnist)
    assert (archives / "Test.zip").read_bytes() == whole[:-1]  # nothing is deleted
    (archives / "Test.zip").unlink()
    with pytest.raises(
        UserError, match=r"NMNIST: Test.zip is missing.*Train.zip \(md5 .*put them in .*NMNIST/download"
    ):
        n_mnist_of(n_mnist)
    (archives / "Test.zip").write_bytes(whole)
    assert len(n_mnist_of(n_mnist).eval_labels) == 20  # a failed start leaves nothing behind that stops the next
    continual_dataset._ARRAYS.clear()
    (n_mnist / "NMNIST" / "events_np.building").touch()
    with pytest.raises(UserError, match="was being unpacked when a run was cut off: remove"):
        n_mnist_of(n_mnist, T=2)
    (dvs / "CIFAR10DVS" / "download" / "cat.zip").unlink()

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("datasets.utils.events.download_url", refuse)
    with pytest.raises(UserError, match="CIFAR10DVS: cat.zip is missing and its download failed: no network"):
        get_dataset(Namespace(dataset="seq-dvs-cifar10", base_path=str(dvs), T=4))
    monkeypatch.setitem(__import__("sys").modules, "spikingjelly.datasets", None)
    with pytest.raises(UserError, match="requirements-spiking.txt"):
        reader_class("NMNIST")


def test_cache_is_whole_or_absent(tmp_path):
    file = tmp_path / "deep" / "x.npz"

    def fail():
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        cached_arrays(file, fail)
    assert not file.exists()
    made = cached_arrays(file, lambda: {"a": np.arange(3)})
    assert cached_arrays(file, fail)["a"].tolist() == made["a"].tolist()
    assert [p.name for p in file.parent.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("flags", ["--model=staer --buffer_size=8", "--model=fedavg --fl --num_clients=2"])
def test_a_run(n_mnist, tmp_path, flags):
    argv = f"{flags} --dataset=seq-n-mnist --backbone=sresnet-pocket --T=4 --base_path={n_mnist} --batch_size=4"
    argv += " --minibatch_size=4 --measure_spikes=1" if "staer" in flags else " --num_comm_rounds=1 --n_epochs=1"
    out = tmp_path / "out"
    assert run([*argv.split(), "--device=cpu", "--stop_after=2"], out) == 0
    summary = rows(only_folder(out) / "summary.csv")[0]
    assert 0 <= float(summary["faa"]) <= 100
    if "staer" in flags:
        assert {f"faa_T{n}" for n in (1, 2, 4, 8)} < set(summary) and float(summary["logit_drift"]) > 0


def test_accuracy_at_other_steps_is_that_of_recounted_recordings(n_mnist, rig):
    from utils.spiking_metrics import spiking_metrics

    base = f"--dataset seq-n-mnist --backbone sresnet-pocket --base_path {n_mnist} --device cpu"
    r = rig("--model spiking-sgd --T 6 --stop_after 1", base).run()
    got = spiking_metrics(r.model, r.dataset, 0)
    assert "faa_T4" not in got and "faa_T8" not in got  # 6 frames cannot be made 4 or 8
    labels = r.dataset.eval_labels[r.dataset.task_indices(0, False)]
    frames = r.dataset.eval_images[r.dataset.task_indices(0, False)].float()
    r.model.net.eval()
    for T in (1, 2):
        with torch.no_grad():
            logits = r.model.net(torch.stack([frames[:, k : k + 6 // T].sum(1) for k in range(0, 6, 6 // T)], 1))
        assert got[f"faa_T{T}"] == 100 * float((logits[:, :2].argmax(1) == labels).float().mean())
