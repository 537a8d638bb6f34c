"""The contract of a continual-learning method: Mammoth's ``ContinualModel``, name for name.

A method says what it does with one batch (``observe``) and, where it needs them, what happens around tasks and epochs.
The training loop is utils/training.py. Under ``--fl`` the same class runs on every client through
models/utils/federated_model.py.
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager

import torch
from torch import nn

from utils.conf import get_device
from utils.errors import UserError


class ContinualModel(nn.Module):
    """Base class of all methods.

    Attributes:
        net: the backbone. opt: its optimiser. loss: the data set's loss. args: the resolved settings.
        transform: training augmentation and normalisation of a batch (B, C, H, W) of images in [0, 1].
        dataset: the benchmark. device: where the network lives.
        current_task: index of the task being learnt. n_past_classes, n_seen_classes, n_remaining_classes,
        n_classes_current_task: counts of classes before, up to, after, and in that task.
    """

    NAME: str
    COMPATIBILITY: list[str]
    AVAIL_OPTIMS = ["sgd", "adam", "adamw"]
    FEDERATED_ONLY = CENTRAL_ONLY = False
    SCALES_LOSS = False  # whether the training step scales the loss, as gradients in float16 need

    # Old Mammoth methods do not pass the data set to this constructor; ``construct`` leaves it here meanwhile.
    _dataset_of_construction = None

    @staticmethod
    def get_parser(parser: ArgumentParser) -> ArgumentParser:
        """Add the method's own flags to ``parser``; ``parser.set_defaults`` changes defaults of the general ones."""
        return parser

    def __init__(self, backbone: nn.Module, loss, args: Namespace, transform, dataset=None) -> None:
        super().__init__()
        if not getattr(self, "NAME", None) or not getattr(self, "COMPATIBILITY", None):
            raise NotImplementedError("a method needs the class attributes NAME and COMPATIBILITY")
        if getattr(args, "precision", "fp32") == "fp16" and not self.SCALES_LOSS:
            raise UserError(
                f"--precision fp16: {self.NAME} has a training step of its own, without loss scaling; use bf16"
            )
        self.net = backbone
        self.loss = loss
        self.args = args
        self.transform = self.original_transform = transform
        self.dataset = dataset = dataset if dataset is not None else self._dataset_of_construction
        self.normalization_transform = self.weak_transform = None
        self.device = get_device(args.device)
        self._current_task = 0
        self.task_iteration = self.epoch_iteration = 0
        if dataset is not None:
            self.normalization_transform = dataset.get_normalization_transform()
            self.weak_transform = transform
            self.N_CLASSES = self.num_classes = dataset.N_CLASSES
            self.N_TASKS = self.n_tasks = dataset.n_train_tasks
            self.SETTING = dataset.SETTING
            self._cpt = dataset.N_CLASSES_PER_TASK
            self._count_classes()
        self.opt = self.get_optimizer() if backbone is not None else None
        self.scheduler = None

    # ---- what a method may override

    def begin_task(self, dataset) -> None:
        """Called before each task."""

    def end_task(self, dataset) -> None:
        """Called after each task."""

    def begin_epoch(self, epoch: int, dataset) -> None:
        """Called before each epoch."""

    def end_epoch(self, epoch: int, dataset) -> None:
        """Called after each epoch."""

    def observe(
        self, inputs: torch.Tensor, labels: torch.Tensor, not_aug_inputs: torch.Tensor, epoch: int | None = None
    ):
        """One training step.

        Args:
            inputs: (B, C, H, W), augmented and normalised. labels: (B,) class indices over all tasks.
            not_aug_inputs: (B, C, H, W) in [0, 1], before ``transform``. epoch: index of the epoch within the task.

        Returns:
            The loss of the batch, a float or a 0-d tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} must define observe")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits over all classes (B, N_CLASSES) for normalised inputs."""
        return self.net(x)

    def results(self) -> tuple[list[float], list[float], list[float]] | None:
        """What ``utils.evaluate.evaluate`` would return, where it was measured elsewhere; None: test this model."""
        return None

    def final_metrics(self, dataset, folder) -> dict[str, float]:
        """What the method measures of itself once all tasks are learnt: columns of the summary, files in ``folder``."""
        return {}

    def get_parameters(self):
        """The parameters the optimiser updates."""
        return self.net.parameters()

    def get_debug_iters(self) -> int:
        """Batches per epoch under ``--debug_mode``."""
        return 5

    # ---- what a method uses

    @property
    def current_task(self) -> int:
        return vars(self).get("_task_of_method", self._current_task)

    @current_task.setter
    def current_task(self, value: int) -> None:
        # Old Mammoth methods count tasks themselves, from when they like; class counts do not follow them.
        self._task_of_method = value

    @property
    def cpt(self):
        """Classes per task, an int or a list (as the data set declares it)."""
        return self._cpt

    @cpt.setter
    def cpt(self, value) -> None:
        self._cpt = value

    @property
    def n_past_classes(self) -> int:
        return self._n_past_classes

    @property
    def n_seen_classes(self) -> int:
        return self._n_seen_classes

    @property
    def n_classes_current_task(self) -> int:
        return self._n_seen_classes - self._n_past_classes

    @property
    def n_remaining_classes(self) -> int:
        return self.N_CLASSES - self._n_seen_classes

    def get_offsets(self, task: int) -> tuple[int, int]:
        """First and one past the last class of a task."""
        return self.dataset.offsets_for_training(task)

    def get_optimizer(self, params=None, lr: float | None = None) -> torch.optim.Optimizer | None:
        """A fresh optimiser by ``--optimizer --lr --optim_wd --optim_mom``; None if nothing requires grad.

        Raises:
            UserError: an optimiser that the method excludes by AVAIL_OPTIMS.
        """
        params = [
            p for p in (self.get_parameters() if params is None else params) if isinstance(p, dict) or p.requires_grad
        ]
        if not params:
            return None
        name, lr, wd = self.args.optimizer.lower(), self.args.lr if lr is None else lr, self.args.optim_wd
        if name not in self.AVAIL_OPTIMS:
            raise UserError(f"--optimizer {name}: {self.NAME} supports {', '.join(self.AVAIL_OPTIMS)}")
        options = {"lr": lr, "weight_decay": wd}
        if self.device.type == "cuda":
            options["fused"] = True  # one kernel for all tensors, and no waiting for the loss scale in float16
        if name == "sgd":
            options |= {"momentum": self.args.optim_mom, "nesterov": bool(self.args.optim_nesterov)}
        return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](params, **options)

    def get_scheduler(self, opt: torch.optim.Optimizer | None):
        """The learning-rate schedule by ``--lr_scheduler`` over the ``--n_epochs`` epochs to come, or None."""
        if opt is None or self.args.lr_scheduler == "none":
            return None
        for group in opt.param_groups:  # where an earlier schedule has left it
            group["lr"] = group.get("initial_lr", group["lr"])
        if self.args.lr_scheduler == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(opt, max(self.args.n_epochs, 1))
        return torch.optim.lr_scheduler.MultiStepLR(opt, self.args.lr_milestones, self.args.sched_multistep_lr_gamma)

    # ---- called by the training loop

    def meta_begin_task(self, dataset) -> None:
        """Refresh the class counts, then ``begin_task``."""
        self.task_iteration = self.epoch_iteration = 0
        self._count_classes()
        self.begin_task(dataset)

    def meta_end_task(self, dataset) -> None:
        """``end_task``, then move to the next task."""
        self.end_task(dataset)
        self._current_task += 1

    def meta_observe(self, inputs, labels, not_aug_inputs, epoch: int | None = None, **extra):
        """``observe`` with the arguments it knows (``epoch`` is recent in Mammoth), counting iterations."""
        if not hasattr(self, "_observe_takes_epoch"):
            known = inspect.signature(self.observe).parameters
            self._observe_takes_epoch = "epoch" in known or any(p.kind is p.VAR_KEYWORD for p in known.values())
        if self._observe_takes_epoch:
            extra["epoch"] = epoch
        loss = self.observe(inputs, labels, not_aug_inputs, **extra)
        self.task_iteration += 1
        self.epoch_iteration += 1
        return loss

    def _count_classes(self) -> None:
        task = min(self._current_task, self.dataset.n_train_tasks - 1)
        self._n_past_classes, self._n_seen_classes = self.dataset.offsets_for_training(task)


@contextmanager
def _construction(dataset):
    ContinualModel._dataset_of_construction = dataset
    try:
        yield
    finally:
        ContinualModel._dataset_of_construction = None


def construct(cls: type[ContinualModel], backbone, loss, args, transform, dataset) -> ContinualModel:
    """Instantiate a method, whether or not its constructor knows the argument ``dataset``."""
    with _construction(dataset):
        parameters = inspect.signature(cls.__init__).parameters
        takes = "dataset" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        model = cls(backbone, loss, args, transform, **({"dataset": dataset} if takes else {}))
    if getattr(args, "compile", 0):
        model.net.compile()  # in place: names, adapters and copies stay as they are
    return model.to(model.device)
