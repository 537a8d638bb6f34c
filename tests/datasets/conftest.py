"""A small dataset in memory, and clean caches around every test."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from datasets.utils import continual_dataset, shipped
from datasets.utils.continual_dataset import ContinualDataset


@pytest.fixture(autouse=True)
def _fresh_caches():
    continual_dataset._ARRAYS.clear()
    shipped._arrays.cache_clear()
    yield
    continual_dataset._ARRAYS.clear()
    shipped._arrays.cache_clear()


class Toy(ContinualDataset):
    """Tasks of 2, 3 and 1 classes; 40 training and 10 test images per class, 3x8x8."""

    NAME = "toy"
    N_TASKS = 3
    N_CLASSES_PER_TASK = [2, 3, 1]
    SIZE = (8, 8)
    MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    loads = 0

    def load_arrays(self, train):
        type(self).loads += 1
        g = torch.Generator().manual_seed(int(train))
        labels = torch.arange(6).repeat(40 if train else 10)
        return torch.randint(256, (len(labels), 3, 8, 8), generator=g, dtype=torch.uint8), labels


class ToyDomains(Toy):
    NAME = "toy-domains"
    SETTING = "domain-il"
    N_CLASSES_PER_TASK = 6

    def task_images(self, images, task):
        return images + task  # uint8 wraps, which is fine here


@pytest.fixture
def toy():
    return lambda **args: Toy(Namespace(**args))


@pytest.fixture
def toy_domains():
    return lambda **args: ToyDomains(Namespace(**args))
