"""Recordings of event cameras: SpikingJelly reads them, events are counted into frames, and frames are kept as bytes.

A recording is a list of events (time, x, y, polarity). It is cut into T stretches, with equally many events or equally
long, and the events of each are counted at every pixel: frames (T, 2, H, W), off events first.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

from datasets.utils import seeded, stratified_split
from datasets.utils.cache import cached_arrays
from datasets.utils.continual_dataset import ContinualDataset
from datasets.utils.transforms import BatchTransform, Compose
from utils.errors import UserError

SCALES = ("count", "max", "log")


def reader_class(name: str):
    """The data set class ``name`` of ``spikingjelly.datasets``, which is imported only here.

    Raises:
        UserError: SpikingJelly, or torchaudio which its data sets import, is not installed.
    """
    try:
        import spikingjelly.datasets as sj
    except ImportError as e:
        raise UserError(
            f"event data need SpikingJelly with torchaudio ({e}): pip install -r requirements-spiking.txt"
        ) from e
    return getattr(sj, name)


def open_recordings(name: str, root: Path, **kwargs):
    """SpikingJelly's data set ``name`` in ``root``: pairs (events, label), unpacked on first use.

    Archives are looked for in ``root/download`` and, where they may be, downloaded there. SpikingJelly removes archives
    that do not match their checksum and leaves half of its folders behind when it stops; so they are checked here.

    Raises:
        UserError: archives are missing or damaged, or an earlier run was cut off while unpacking.
    """
    reader, raw, archives = reader_class(name), root / "events_np", root / "download"
    marker = root / "events_np.building"
    if marker.exists():
        raise UserError(
            f"{name} was being unpacked when a run was cut off: remove {marker}, {raw} and {root / 'extract'}, then "
            f"start again (the archives in {archives} stay)"
        )
    if not raw.exists():
        _fetch(reader, archives)
    try:
        return reader(str(root), data_type="event", **kwargs)
    except Exception as e:
        raise UserError(f"{name} in {root} cannot be read ({type(e).__name__}: {e})") from e


def _fetch(reader: type, folder: Path) -> None:
    resources = reader.resource_url_md5()
    listed = ", ".join(f"{name} (md5 {md5}) from {url}" for name, url, md5 in resources)
    for name, url, md5 in resources:
        file = folder / name
        if check_integrity(str(file), md5):
            continue
        if file.exists():
            raise UserError(f"{file} is damaged, its md5 is not {md5}: fetch it again from {url}")
        reason = "it cannot be downloaded by a program"
        if reader.downloadable():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                download_url(url, str(folder), name, md5)
                continue
            except Exception as e:  # network, disk: the remedy is the same
                reason = f"its download failed: {e}"
        raise UserError(
            f"{reader.__name__}: {name} is missing and {reason}; fetch {listed}, and put them in {folder.absolute()}"
        )


def count_events(events: dict[str, np.ndarray], frames: int, split_by: str, size: tuple[int, int], recorded) -> Tensor:
    """A recording as frames, uint8 (frames, 2, H, W); no event is lost, except those over 255 at one pixel of a frame.

    Args:
        events: arrays t, x, y, p of one length. split_by: 'number' of events in a frame, or 'time'.
        size: (H, W) of the frames. recorded: (H, W) of the camera; pixels are joined where it is larger.

    Raises:
        UserError: split by time, a frame has no events.
    """
    from spikingjelly.datasets import integrate_events_by_fixed_frames_number

    (h, w), (h0, w0) = size, recorded
    events = {**events, "x": events["x"].astype(np.int64) * w // w0, "y": events["y"].astype(np.int64) * h // h0}
    try:
        counts = integrate_events_by_fixed_frames_number(events, split_by, frames, h, w)
    except IndexError as e:
        raise UserError(
            f"--split_by {split_by}: a recording has no event for one {frames}th of its time; take fewer frames (--T) "
            "or --split_by number"
        ) from e
    return torch.from_numpy(np.minimum(counts, 255).astype(np.uint8))


class Scale(BatchTransform):
    """Counts, stored as count / 255, as the network sees them (``--event_scale``); the same for all frames.

    ``count``: as they are. ``max``: divided by the largest of the recording. ``log``: log(1 + count).
    """

    pointwise, draws = True, False

    def __init__(self, how: str):
        self.how = how

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = x * 255
        if self.how == "log":
            return x.log1p()
        return x if self.how == "count" else x / x.flatten(1).amax(1).clamp(min=1).view(-1, *[1] * (x.dim() - 1))


class Rebin(BatchTransform):
    """Scaled frames (B, T, C, H, W) as so many steps (B, steps, C, H, W), without making or losing an event.

    Fewer steps add up frames that follow each other; more show each frame several times at a fraction of its size.

    Raises:
        ValueError: neither of T and ``steps`` divides the other.
    """

    pointwise, draws = True, False

    def __init__(self, steps: int, how: str):
        self.steps, self.how = steps, how

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        T, steps = x.shape[1], self.steps
        if T % steps and steps % T:
            raise ValueError(f"{T} frames cannot be made {steps}")
        x = x.expm1() if self.how == "log" else x
        if steps <= T:
            x = x.unflatten(1, (steps, T // steps)).sum(2)
        else:
            x = x.repeat_interleave(steps // T, 1) / (steps // T)
        return x.log1p() if self.how == "log" else x


class EventDataset(ContinualDataset):
    """Frames of events (B, T, 2, H, W) for networks over time. The backbone's ``--T`` is the number of frames.

    Subclasses set ``READER``, the class in ``spikingjelly.datasets``, and SIZE. ``SPLIT``: whether it comes in
    training and test recordings; if not, a tenth of each class, the same in all runs, is for testing.
    """

    READER: str
    SPLIT = True
    CHANNELS = 2

    @staticmethod
    def get_parser(parser):
        parser.add_argument(
            "--split_by",
            choices=("number", "time"),
            default="number",
            help="frames with equally many events, or equally long ones",
        )
        parser.add_argument(
            "--event_scale",
            choices=SCALES,
            default="count",
            help="events at a pixel of a frame as they are, divided by the recording's largest, or log(1 + count)",
        )
        return parser

    def configure(self) -> None:
        name = self._arg("backbone")
        if name is not None and not hasattr(self.args, "T"):
            raise UserError(
                f"--backbone {name} has no time: {self.NAME} shows frames of events; use sresnet19, sresnet18 or "
                "sresnet-pocket"
            )
        self.FRAMES = int(self._default("T", 10))
        self.scale, self.split_by = self._arg("event_scale", "count"), self._arg("split_by", "number")

    @property
    def _source(self) -> tuple[str, str]:
        name, base_path = super()._source
        return f"{name} {self.FRAMES} {self.split_by}", base_path

    def load_arrays(self, train: bool) -> tuple[Tensor, Tensor]:
        root = Path(self._arg("base_path", "./data/")) / self.READER
        part = ("train" if train else "test") if self.SPLIT else "all"
        size = "x".join(map(str, self.SIZE))
        file = root / f"frames-{self.FRAMES}-by-{self.split_by}-{size}-{part}.npz"
        arrays = cached_arrays(file, lambda: self._read(root, {"train": train} if self.SPLIT else {}))
        images, labels = arrays["frames"], arrays["labels"]
        if not self.SPLIT:
            keep = stratified_split(labels, 0.1, seeded(0, self.NAME))[0 if train else 1]
            images, labels = images[keep], labels[keep]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _read(self, root: Path, split: dict) -> dict[str, np.ndarray]:
        recordings = open_recordings(self.READER, root, **split)
        frames = np.empty((len(recordings), self.FRAMES, 2, *self.SIZE), dtype=np.uint8)
        labels = np.empty(len(recordings), dtype=np.int64)
        for i, (events, label) in enumerate(tqdm(recordings, desc=f"{self.NAME}: counting events", mininterval=1)):
            frames[i] = count_events(events, self.FRAMES, self.split_by, self.SIZE, recordings.get_H_W())
            labels[i] = label
        return {"frames": frames, "labels": labels}

    def _normalize(self) -> list[BatchTransform]:
        return [Scale(self.scale)]

    def rebin(self, frames: Tensor, steps: int) -> Tensor:
        """Frames (B, T, 2, H, W) as the network sees them, in another number of steps (:class:`Rebin`)."""
        return Rebin(steps, self.scale)(frames)

    @contextmanager
    def steps(self, n: int):
        """Within the block test recordings have ``n`` frames; yields whether T frames can be made so many."""
        possible, before = not (self.FRAMES % n and n % self.FRAMES), self._transforms[False]
        if possible:
            self._transforms[False] = Compose([before, Rebin(n, self.scale)])
        try:
            yield possible
        finally:
            self._transforms[False] = before
