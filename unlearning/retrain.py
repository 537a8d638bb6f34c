"""Retraining: the model that the others train from the start. What every other way is judged by, and its costs."""

from __future__ import annotations

from models.utils.unlearner import Unlearner


class Retrain(Unlearner):
    """federated/unlearning.py runs the same command with --exclude_clients and takes its model."""

    NAME = "retrain"
