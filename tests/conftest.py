"""Tests run side by side on few cores: one thread each, and idle threads must not spin."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Hubs are never asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
