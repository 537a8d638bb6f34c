"""Accuracy on the test sets, class-IL and task-IL, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from backbones.utils.base import Backbone
from models.utils.continual_model import ContinualModel
from utils.checkpoints import digest
from utils.metrics import prediction_bias, prediction_share, summary_metrics

EVAL_BATCH = 256


class Features:
    """Features of the test images, kept from one evaluation to the next while nothing before the head changes.

    They are kept only where that is certain: the method predicts with the network as it is, the network's body is
    frozen, nothing is grafted on it, and its tensors have the fingerprints they had when the features were computed.
    """

    def __init__(self) -> None:
        self.fingerprint: tuple | None = None
        self.kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def usable(self, model) -> bool:
        """Whether features may be kept with this model as it is now; forgets those of another body."""
        net = model.net
        if type(model).forward is not ContinualModel.forward or not isinstance(net, Backbone):
            return False
        if any(p.requires_grad for p in net.body_parameters().values()):
            return False
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in net.modules()):
            return False
        body = {n: t for n, t in net.state_dict().items() if not n.startswith("classifier.")}
        fingerprint = (net.autocast, *((n, digest(t)) for n, t in body.items()))
        if fingerprint != self.fingerprint:
            self.fingerprint, self.kept = fingerprint, {}
        return True

    def batches(self, model, task: int, loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(logits, labels) of a task's test batches."""
        if task not in self.kept:
            self.kept[task] = [(model.net(inputs, returnt="features"), labels) for inputs, labels in loader]
        for features, labels in self.kept[task]:
            yield model.net.logits(features), labels


def evaluation_batches(dataset, task: int, device, keep: slice = slice(None)):
    """Batches (inputs, labels) of the test images of a task (``keep``: some of them), with the test transform."""
    indices = dataset.task_indices(task, train=False)[keep]
    batch = max(EVAL_BATCH // (dataset.FRAMES or 1), 1)
    return dataset.loader(indices, task, batch, train=False, device=device)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within the block a method or a network is in evaluation mode; afterwards each of its modules is as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def evaluate(model, dataset, tasks, features: Features | None = None) -> tuple[list[float], list[float], list[float]]:
    """Accuracy in % on each of ``tasks`` with the model as it is.

    Class-IL takes the best of all classes seen so far (all there are, for a task not seen yet); task-IL the best
    among the classes of the image's own task.

    Args:
        model: a ContinualModel; its ``forward`` gives logits (B, N_CLASSES). tasks: indices of evaluation tasks.
        features: remembers the features of test images between calls, where that changes nothing.

    Returns:
        (class-IL, task-IL, share): accuracies, a value for each task, and the share of class-IL predictions that go to
        each class seen so far, over test images of the seen classes, each class counting the same.
    """
    class_il, task_il, classes = [], [], model.n_seen_classes
    said = torch.zeros(classes * classes, device=model.device)  # (class, prediction), flat
    keep = features is not None and features.usable(model)
    with evaluating(model):
        for task in tasks:
            start, end = dataset.get_offsets(task)
            seen = model.n_seen_classes if end <= model.n_seen_classes else dataset.N_CLASSES
            right = right_task = n = torch.zeros((), device=model.device)
            loader = evaluation_batches(dataset, task, model.device)
            batches = features.batches(model, task, loader) if keep else ((model(x), y) for x, y in loader)
            for logits, labels in batches:
                width = min(seen, logits.shape[1])
                predicted = logits[:, :width].argmax(1)
                right = right + (predicted == labels).sum()
                if end <= classes:
                    said += torch.bincount(labels * classes + predicted, minlength=classes * classes)
                right_task = right_task + (logits[:, start:end].argmax(1) + start == labels).sum()
                n = n + len(labels)
            class_il.append(100 * float(right) / float(n))
            task_il.append(100 * float(right_task) / float(n))
    return class_il, task_il, prediction_share(said.view(classes, classes).cpu()).tolist()


def tasks_to_test(dataset, args, after: int) -> list[int]:
    """Which tasks to test on after task ``after``."""
    everything = args.joint or args.enable_other_metrics
    return list(range(dataset.n_eval_tasks if everything else after + 1))


class Results:
    """What has been measured so far: the two accuracy matrices and what summary.csv is made of.

    Attributes:
        class_il, task_il: lists of rows, row i measured after task i over all evaluation tasks (nan: not evaluated).
        random: class-IL and task-IL accuracies of the untrained model, for forward transfer; None if not measured.
        bias: what else the last measurement says: prediction bias (``incremental_bias``, ``prediction_kl``), and what
            ``--measure_bias_source`` and ``--measure_spikes`` add.
    """

    def __init__(self, dataset, args) -> None:
        self.dataset, self.args = dataset, args
        self.class_il: list[list[float]] = []
        self.task_il: list[list[float]] = []
        self.random: list[list[float]] | None = None
        self.bias: dict[str, float | None] = {}
        self.features = Features()

    def measure(self, model, after: int) -> tuple[list[float], list[float]]:
        """A row of both matrices, padded with nan."""
        tasks = tasks_to_test(self.dataset, self.args, after)
        pad = [float("nan")] * (self.dataset.n_eval_tasks - len(tasks))
        class_il, task_il, share = model.results() or evaluate(model, self.dataset, tasks, self.features)
        self.bias = prediction_bias(share, model.n_past_classes)
        return class_il + pad, task_il + pad

    def state(self) -> dict:
        return {"class_il": self.class_il, "task_il": self.task_il, "random": self.random, "bias": self.bias}

    def load(self, state: dict) -> None:
        self.class_il, self.task_il, self.random = state["class_il"], state["task_il"], state["random"]
        self.bias = state["bias"]

    def summary(self) -> dict:
        """The metrics of utils/metrics.py over what has been measured."""
        import numpy as np

        n_tasks = self.dataset.n_eval_tasks
        counts = [len(self.dataset.task_indices(t, train=False)) for t in range(n_tasks)]
        # rows of tasks to come, so that one task of many is not taken for joint training
        pad = [] if self.args.joint else [[float("nan")] * n_tasks] * (n_tasks - len(self.class_il))
        accuracy = summary_metrics(
            np.array(self.class_il + pad), np.array(self.task_il + pad), counts, *(self.random or (None, None))
        )
        return accuracy | self.bias
