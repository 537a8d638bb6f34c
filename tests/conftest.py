"""Tests run side by side on few cores: one thread each, and idle threads must not spin."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import models
from backbones import resnet19, vit_pocket
from federated.engines.batched import BatchedEngine
from federated.engines.serial import SerialEngine
from tests.rig import MLP, POCKET, Rig

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Hubs are never asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def rig(tmp_path):
    """``rig(flags)`` builds an experiment over the pocket transformer, ``rig(flags, MLP)`` over the perceptron."""

    def make(flags: str, base: str = POCKET) -> Rig:
        return Rig(f"{base} {flags}", tmp_path)

    make.POCKET, make.MLP = POCKET, MLP
    return make


@pytest.fixture
def wire(monkeypatch):
    """Everything that crosses the wire from here on: call, task, round, client, message, reply."""
    record, plain = [], SerialEngine.run

    def run(self, call, message, ids, task, round_):
        for client, reply in plain(self, call, message, ids, task, round_):
            record.append(
                SimpleNamespace(call=call, task=task, round=round_, client=client, message=message, reply=reply)
            )
            yield client, reply

    monkeypatch.setattr(SerialEngine, "run", run)
    return record


@pytest.fixture
def stacks(monkeypatch):
    """(call, how many) for every stack of several clients from here on."""
    record, plain = [], BatchedEngine._together

    def together(self, call, message, ids, *rest):
        if len(ids) > 1:
            record.append((call, len(ids)))
        return plain(self, call, message, ids, *rest)

    monkeypatch.setattr(BatchedEngine, "_together", together)
    return record


@pytest.fixture
def method(monkeypatch):
    """``method(cls)`` makes whatever ``--model`` names mean a class of the test."""

    def use(cls):
        monkeypatch.setattr(models, "get_model_class", lambda name: cls)
        return cls

    return use


@pytest.fixture
def nano(monkeypatch):
    """Small networks for what is tested with every method, in this process: vit-pocket --pretrained 0 with 40,000
    weights, resnet-pocket and its spiking twin a quarter as wide."""
    monkeypatch.setitem(resnet19.STAGES, "pocket", ((4, 1), (8, 1), (16, 1)))
    small = partial(vit_pocket.VisionTransformer, img_size=28, patch_size=7, in_chans=1, num_classes=0)

    def make(**given):
        return small(embed_dim=32, depth=3, num_heads=2, weight_init="jax")

    monkeypatch.setattr(vit_pocket, "VisionTransformer", make)
