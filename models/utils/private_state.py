"""Any central method under ``--fl``: weights are averaged, everything else the method keeps is private to its client.

One instance of the method serves all clients of a worker. Before a client's turn its attributes (buffers, Fisher
matrices, teachers, counters) are put in place, after it they are taken out again; they are keyed by the client's id,
so participation never hands one client's buffer to another.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from datasets.utils.continual_dataset import ContinualDataset
from federated.message import Message, Reply
from models.utils.continual_model import ContinualModel, construct
from models.utils.federated_model import FederatedModel
from utils.checkpoints import model_attributes
from utils.errors import RunError
from utils.training import train_epoch, view_state


class ClientView:
    """The data set as one client sees it: its own training data, everything else as it is."""

    def __init__(self, dataset, train_loader) -> None:
        self._dataset, self.train_loader = dataset, train_loader

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)


class PrivateStateModel(FederatedModel):
    """FedAvg around a central method ``INNER``; made by :func:`federate`."""

    INNER: type[ContinualModel]
    SCALES_LOSS = False

    def __init__(self, backbone, loss, args, transform, dataset=None) -> None:
        super().__init__(backbone, loss, args, transform, dataset)
        self.inner = construct(self.INNER, backbone, loss, args, transform, dataset)
        self.net = self.inner.net  # a method may have replaced it
        self.trained_by: list[int] = []  # clients that took part in the task's rounds
        shared = [
            self.net,
            args,
            dataset,
            transform,
            loss,
            *self.net.modules(),
            *self.net.parameters(),
            *self.net.buffers(),
            *(v for v in vars(self.inner).values() if isinstance(v, ContinualDataset)),
        ]
        self._own_shared = {id(s): s for s in shared}
        self._own_pristine = self._copy(self._private())  # "_own": rebuilt, never saved

    def forward(self, x):
        """The method's own prediction; if it rests on what only clients hold (class means), the network's."""
        if not hasattr(self, "_own_network_only"):
            try:
                return self.inner(x)
            except Exception as e:  # whatever an empty buffer leads to
                if type(self.inner).forward is ContinualModel.forward:
                    raise
                warnings.warn(
                    f"{self.NAME} cannot predict on the server ({type(e).__name__}: {e}), which has no client's "
                    "private state: accuracies are those of the averaged network",
                    stacklevel=2,
                )
                self._own_network_only = True
        return self.net(x)

    def get_debug_iters(self) -> int:
        return self.inner.get_debug_iters()

    # ---- private state

    def _private(self) -> dict:
        state = model_attributes(self.inner)
        state["modules"] = {k: m for k, m in state["modules"].items() if k != "net"}
        return state

    def _copy(self, state: dict) -> dict:
        return copy.deepcopy(state, memo=dict(self._own_shared))

    def fresh_state(self) -> dict:
        """A client that has not done anything yet."""
        return {"method": self._copy(self._own_pristine), "task": -1}

    def _enter(self, client):
        """Put the client's state in place; its view of the data set."""
        if not client.state:
            client.state.update(self.fresh_state())
        self._clear()
        state = client.state["method"]
        vars(self.inner).update(state["attrs"])
        self.inner._modules.update(state["modules"])
        for name, t in state["tensors"].items():
            (self.inner._parameters if isinstance(t, nn.Parameter) else self.inner._buffers)[name] = t
        self.inner._current_task = client.task
        self.inner._count_classes()
        self.inner.dataset = view = ClientView(self.dataset, client.train_loader())
        if client.state["task"] == client.task:
            vars(view.train_loader.dataset).update(client.state["view"])
        return view

    def _leave(self, client, view) -> None:
        client.state["method"] = self._private()
        client.state["view"] = view_state(view.train_loader.dataset)
        self._clear()
        self.inner.dataset = self.dataset
        if self.inner.net is not self.net:
            self._take_weights(self.inner.net)
            self.inner.net = self.net

    def _take_weights(self, net: nn.Module) -> None:
        """The method has put another network in place of its own: what is sent are that one's weights."""
        mine, theirs = self.net.state_dict(keep_vars=True), net.state_dict()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
            raise RunError(f"{self.NAME} has replaced its network by one of another structure: that cannot be averaged")
        for name, t in mine.items():
            t.data = theirs[name].to(t, copy=True)

    def _clear(self) -> None:
        private = self._private()
        for name in private["attrs"]:
            delattr(self.inner, name)
        for name in private["modules"]:
            del self.inner._modules[name]
        for name in private["tensors"]:
            self.inner._parameters.pop(name, None)
            self.inner._buffers.pop(name, None)

    # ---- server

    def meta_begin_task(self, dataset) -> None:
        super().meta_begin_task(dataset)
        self.inner._current_task = self.current_task
        self.inner._count_classes()

    def meta_end_task(self, dataset) -> None:
        super().meta_end_task(dataset)
        self.inner._current_task = self.current_task

    def begin_rounds(self, clients) -> None:
        self.trained_by = []

    def aggregate(self, replies: list[Reply]) -> None:
        super().aggregate(replies)
        self.trained_by = sorted({*self.trained_by, *(r.client for r in replies)})

    def end_rounds(self, clients) -> None:
        """``end_task`` of the method on every client that took part, starting from the global weights.

        What it learns there stays private, except weights: clients whose network changed send it to be averaged.
        """
        replies = clients.only(self.trained_by).call("finish_task", self.broadcast())
        changed = [r for r in replies if len(r)]
        if changed:
            super().aggregate(changed)

    # ---- client

    def local_update(self, message: Message, client) -> Message:
        self.load(message)
        view, inner = self._enter(client), self.inner
        inner.opt = inner.get_optimizer()
        if client.state["task"] != client.task:
            client.state["task"] = client.task
            inner.net.train()
            inner.meta_begin_task(view)
        inner.scheduler = inner.get_scheduler(inner.opt)
        total, steps = 0.0, 0
        for epoch in range(self.args.n_epochs):
            loss, n = train_epoch(inner, view.train_loader, view, epoch)
            total, steps = total + loss, steps + n
        self._leave(client, view)
        return self.reply_of(client, float(total) / max(steps, 1))

    def finish_task(self, message: Message, client) -> Message:
        """``end_task`` with the global weights in place."""
        self.load(message)
        view = self._enter(client)
        self.inner.opt = self.inner.get_optimizer()
        self.inner.net.train()
        self.inner.end_task(view)
        self._leave(client, view)
        same = all(torch.equal(message[name], t) for name, t in {**self.trainable(), **self.shared_buffers()}.items())
        return Message() if same else self.after_local(client)


def federate(cls: type[ContinualModel]) -> type[FederatedModel]:
    """The federated form of a method: itself if it is one, else FedAvg around it with private state."""
    if issubclass(cls, FederatedModel):
        return cls
    return type(
        f"Federated{cls.__name__}",
        (PrivateStateModel,),
        {"INNER": cls, "NAME": cls.NAME, "COMPATIBILITY": cls.COMPATIBILITY, "AVAIL_OPTIMS": cls.AVAIL_OPTIMS},
    )
