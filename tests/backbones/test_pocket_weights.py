"""The shipped weights and images: what the model card and the data's README claim."""

from __future__ import annotations

import io
import lzma
from argparse import Namespace

import numpy as np
import pytest
import torch

from backbones import get_backbone
from datasets import get_dataset
from utils.registry import ROOT


def archive():
    with lzma.open(ROOT / "datasets/data/glyphs.npz.xz") as f:
        return np.load(io.BytesIO(f.read()), allow_pickle=False)


def test_no_two_classes_look_alike_and_none_was_seen_in_pretraining():
    data = archive()
    assert data["glyphs_max_iou"].max() < 0.75 and data["scripts_max_iou"].max() < 0.75
    codes = [int(str(name).split()[0][2:], 16) for part in ("glyphs", "scripts") for name in data[f"{part}_names"]]
    assert len(set(codes)) == 180 and not set(codes) & set(data["pretraining_codepoints"].tolist())


def test_no_class_is_a_missing_glyph_box_or_blank():
    data = archive()
    for part in ("glyphs", "scripts"):
        x, y = data[f"{part}_x_train"], data[f"{part}_y_train"]
        means = np.stack([x[y == c].mean(0) for c in range(y.max() + 1)]).reshape(y.max() + 1, -1)
        assert means.max(1).min() > 60  # ink in every class
        correlation = np.corrcoef(means) - np.eye(len(means))
        assert correlation.max() < 0.97  # placeholder boxes would give equal means


@pytest.mark.parametrize("name, bar", [("seq-glyphs", 85), ("seq-scripts", 83), ("seq-digits", 88)])
def test_nearest_class_mean_on_frozen_features(name, bar):
    args = Namespace(dataset=name, backbone="vit-pocket", fl=True, seed=0)
    dataset = get_dataset(args)
    net = get_backbone(args, dataset).eval()

    def features(train: bool):
        parts = []
        for task in range(dataset.n_eval_tasks):
            loader = dataset.loader(
                dataset.task_indices(task, train), task, 512, train=False, split="train" if train else "test"
            )
            with torch.no_grad():
                parts += [(net(x, returnt="features"), y) for x, y in loader]
        return torch.cat([f for f, _ in parts]), torch.cat([y for _, y in parts])

    f, y = features(True)
    means = torch.stack([f[y == c].mean(0) for c in range(dataset.N_CLASSES)])
    f, y = features(False)
    assert 100 * (torch.cdist(f, means).argmin(1) == y).float().mean() > bar
