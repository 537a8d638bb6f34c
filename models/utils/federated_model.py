"""The contract of a federated method: the server half and the client half of one algorithm in one class.

The class is instantiated once on the server and once on each worker. The two never share attributes: what a client
needs arrives in a Message, what the server learns comes back in one. What runs where:

    server   begin_rounds, round, end_rounds, broadcast, aggregate
    client   local_update and any other method named in ``clients.call`` / ``clients.sum``: (message, client) -> Message
    both     __init__, begin_task, end_task (structure and counters only, no learning)

A paper usually overrides the loss (``local_loss``), not the step: ``observe`` is written once, below. An engine may
then stack what K clients train and differentiate K losses at once (federated/engines/batched.py). That asks of a
method: ``local_loss`` gives the loss of each sample, from that sample and the network alone; what depends on the
trained tensors by themselves (a proximal term) is ``local_penalty``; and client methods keep what they learn about a
client in ``client.state``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from federated.clients import participants
from federated.message import Message, Reply
from models.utils.continual_model import ContinualModel
from models.utils.merging import weighted_mean
from utils.conf import set_random_seed
from utils.evaluate import evaluating, evaluation_batches
from utils.metrics import federated_bias, prediction_share


def share_backbone(net: nn.Module) -> nn.Module:
    """A second instance of a network over the same storage: modules and buffers are copied, parameters are not.

    Frozen weights are therefore held once per device. Whoever changes a shared weight must give the parameter a new
    tensor (``p.data = ...``), never write into it.
    """
    shared = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo=shared)


@contextmanager
def in_place(places: dict[str, tuple[nn.Module, str]], tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within the block, the modules of ``FederatedModel.places`` hold ``tensors`` in place of their parameters."""
    before = {n: module._parameters[key] for n, (module, key) in places.items()}
    try:
        for n, (module, key) in places.items():
            module._parameters[key] = tensors[n]
        yield
    finally:
        for n, (module, key) in places.items():
            module._parameters[key] = before[n]


class FederatedModel(ContinualModel):
    """Base class; as it stands it is FedAvg (McMahan et al. 2017, Alg. 1) over ``trainable``."""

    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    SCALES_LOSS = True
    PER_SAMPLE_LOSS = True  # whether ``local_loss`` gives a value for each sample
    STEP_NEEDS_BEFORE = True  # whether ``on_step`` looks at ``before``, which costs a copy at every step
    UPDATES = ("local_update",)  # client halves, beside its bases', that are ``local_update`` (see ``is_update``)

    # ---------------------------------------------------------------- what is trained, sent and averaged

    def trainable(self) -> dict[str, nn.Parameter]:
        """What clients train, by name: the one declaration that optimiser, Message and aggregation use."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def shared_buffers(self) -> dict[str, torch.Tensor]:
        """Floating-point buffers that are averaged with the weights: the running statistics of BatchNorm."""
        if not hasattr(self, "_own_running"):  # walking a large network takes longer than a small client's step
            named = self.net.named_buffers()
            self._own_running = [n for n, b in named if b.is_floating_point() and "running_" in n]
        if not self._own_running or not any(p.requires_grad for p in self.net.parameters()):
            return {}
        return {name: self.net.get_buffer(name) for name in self._own_running}

    def get_parameters(self) -> Iterable[nn.Parameter]:
        return list(self.trainable().values())

    def body_lr(self) -> float:
        """The learning rate of what is trained beside the rows ``head.*``; below 0: ``--lr``, as theirs."""
        return -1.0

    def get_optimizer(self, params=None, lr=None):
        """Two groups where the body has a rate of its own."""
        if params is None and getattr(self, "head", None) is not None and self.body_lr() >= 0:
            groups: dict[bool, list] = {True: [], False: []}
            for name, p in self.trainable().items():
                groups[name.startswith("head.")].append(p)
            params = [{"params": groups[False], "lr": self.body_lr()}, {"params": groups[True]}]
        return super().get_optimizer(params, lr)

    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """{name: (module, name within it)} of what is trained; tensors that belong to no module are missing."""
        names = {id(p): n for n, p in self.trainable().items()}
        return {
            names[id(p)]: (module, key)
            for module in self.modules()
            for key, p in module._parameters.items()
            if id(p) in names
        }

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        """Before the first round of a task; ``clients`` are all that own samples of it."""

    def round(self, clients, r: int) -> None:
        """One communication round with the clients drawn for it."""
        self.aggregate(clients.call("local_update", self.broadcast()))

    def end_rounds(self, clients) -> None:
        """After the last round of a task; ``clients`` are all that own samples of it."""

    def broadcast(self) -> Message:
        """What every client of the round receives."""
        return Message({**self.trainable(), **self.shared_buffers()})

    def aggregate(self, replies: list[Reply]) -> None:
        """theta <- sum_c w_c theta_c, w_c = n_c / sum n (``--avg_type weighted``) or 1 / #clients (``uniform``)."""
        weights = self.client_weights(replies)
        self.take_notes(replies, weights)
        current = {**self.trainable(), **self.shared_buffers()}
        for name, value in self.merged(current, replies, weights).items():
            current[name].data = value.to(current[name].dtype)

    def expanded(self, reply: Reply) -> Reply:
        """A client's reply with the trained tensors by their names, where what is sent is something smaller."""
        return reply

    def take_notes(self, replies: list[Reply], weights: list[float]) -> None:
        """What a round's replies say beside what is merged: training losses and measured biases."""
        self._loss = sum(w * r["loss"] for w, r in zip(weights, replies, strict=True)) if "loss" in replies[0] else None
        biases = [n for n in replies[0] if n.startswith("federated_bias")]
        self.measured = {n: sum(r[n] for r in replies) / len(replies) for n in biases}

    @torch.no_grad()
    def merged(self, current: dict, replies: list[Reply], weights: list[float]) -> dict[str, torch.Tensor]:
        """The server's new values of the tensors ``current`` {name: value so far}: the weighted means."""
        return {name: weighted_mean([r[name] for r in replies], weights) for name in current}

    def more_rounds(self, clients, n: int, what: str) -> None:
        """Rounds after those of the task (unlearning, recovery), numbered on; ``what`` seeds the server's draws."""
        for _ in range(n):
            r = self.args.num_comm_rounds + self.__dict__.setdefault("_own_more_rounds", 0)
            self._own_more_rounds += 1
            set_random_seed(self.args.seed, "server", self.current_task, what, r)
            self.round(clients.only(participants(self.args, clients.ids, self.current_task, r)).at(r), r)

    @property
    def last_loss(self) -> float | None:
        """Mean training loss of the last round, for the reader."""
        return self._loss if hasattr(self, "_loss") else None

    def report(self) -> dict:
        """Columns for rounds.csv: what the clients' own models of the last round were measured to be, on average."""
        return getattr(self, "measured", {})

    def client_weights(self, replies: list[Reply]) -> list[float]:
        """The weights of the mean, one per reply, adding up to one."""
        counts = [r["n_samples"] if self.args.avg_type == "weighted" else 1 for r in replies]
        return [n / sum(counts) for n in counts]

    # ---------------------------------------------------------------- client

    def local_update(self, message: Message, client) -> Message:
        """Load the broadcast, train :meth:`local_epochs` epochs with a fresh optimiser, reply."""
        client.indices = self.training_samples(client)
        self.begin_turn(message, client)
        loader = client.train_loader()
        total, steps = 0.0, 0
        for epoch in range(self.local_epochs() if self.opt is not None else 0):
            for i, (inputs, labels, not_aug_inputs) in enumerate(loader):
                if self.args.debug_mode and i >= self.get_debug_iters():
                    break
                total = total + self.observe(inputs, labels, not_aug_inputs, epoch)
                steps += 1
            if self.scheduler is not None:
                self.scheduler.step()
        return self.reply_of(client, float(total) / max(steps, 1))

    def begin_turn(self, message: Message, client) -> None:
        """What comes before a client's first step."""
        self.load(message)
        self.client = client
        self.start_training()
        self.before_local(message, client)

    def training_samples(self, client) -> torch.Tensor:
        """Indices of the client's samples that it trains on; a method may hold some out."""
        return client.indices

    def local_epochs(self) -> int:
        """How often a client goes through its data in a round."""
        return self.args.n_epochs

    def batches_of(self, client) -> int:
        """How many batches an epoch of the client has."""
        n = -(-client.n_samples // self.args.batch_size)
        return min(n, self.get_debug_iters()) if self.args.debug_mode else n

    def start_training(self) -> None:
        """A fresh optimiser, schedule and loss scaling for one client's turn; the network in training mode.

        They make up the turn, with ``trained`` {name: what the optimiser moves}. A method that keeps anything else from
        step to step keeps it there: an engine that trains many clients at once has a turn of each.
        """
        self.opt = self.get_optimizer()
        self.scheduler = self.get_scheduler(self.opt)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.args.precision == "fp16")
        # _own: no state of the method, never saved
        self._own_turn = SimpleNamespace(
            trained=self.trainable(), opt=self.opt, scheduler=self.scheduler, scaler=scaler
        )
        learns = any(p.requires_grad for p in self.net.parameters())  # a frozen network keeps its statistics
        if self.net.training != learns:
            self.net.train(learns)

    def reply_of(self, client, loss: float) -> Message:
        """``after_local`` with the mean training loss and, with ``--measure_federated_bias``, the client's bias."""
        bias = self.measure_bias(client) if self.args.measure_federated_bias else {}
        reply = self.after_local(client)
        return Message({**reply, **bias, **({} if "loss" in reply else {"loss": loss})})

    @torch.no_grad()
    def measure_bias(self, client) -> dict[str, float]:
        """``federated_bias`` of this client's model as it is, over test images of the current task's classes."""
        start, C = self.n_past_classes, self.n_classes_current_task
        said = torch.zeros(C * C, device=self.device)
        with evaluating(self):
            for x, y in evaluation_batches(self.dataset, client.task, self.device):
                said += torch.bincount((y - start) * C + self.task_logits(x).argmax(1), minlength=C * C)
        labels = torch.bincount(self.dataset.train_labels[client.indices].cpu() - start, minlength=C)
        share = prediction_share(said.view(C, C).cpu())
        return {n: v for n, v in federated_bias(share, labels).items() if v is not None}

    def observe(self, inputs, labels, not_aug_inputs, epoch=None) -> torch.Tensor:
        """One step: zero_grad, ``local_loss``, backward, step. Returns the loss, detached and not yet on the host."""
        client, turn = self.client, self._own_turn
        turn.opt.zero_grad()
        loss = self.local_loss(inputs, labels, client).mean()
        penalty = self.local_penalty(turn.trained, client)
        if penalty is not None:
            loss = loss + penalty
        turn.scaler.scale(loss).backward()
        added = self.descend(client, turn)
        return loss.detach() if added is None else loss.detach() + added

    def descend(self, client, turn: SimpleNamespace) -> torch.Tensor | None:
        """Clip the gradients of one client's tensors and let its optimiser take a step; ``on_step`` if overridden.

        Returns:
            What a method that adds to the gradients here adds to the loss, if it does.
        """
        trained, opt, scaler = turn.trained, turn.opt, turn.scaler
        if self.args.clip_grad is not None or self._watches_steps:
            scaler.unscale_(opt)
        if self.args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), self.args.clip_grad)
        keep = self._watches_steps and self.STEP_NEEDS_BEFORE
        before = {n: p.detach().clone() for n, p in trained.items()} if keep else {}
        scaler.step(opt)
        scaler.update()
        if self._watches_steps:
            self.on_step(client, before, trained)
        return None

    def local_loss(self, inputs, labels, client) -> torch.Tensor:
        """The loss of each sample of a batch, (B,): a function of the sample, the network and the client's state.

        Its mean is minimised. Default: cross-entropy over the columns of the current task only, as fed-mammoth trains
        every method. A method whose loss does not split by sample may return a scalar; it trains one client at a time
        on every engine and says so with ``PER_SAMPLE_LOSS = False``.
        """
        return F.cross_entropy(self.task_logits(inputs), labels - self.n_past_classes, reduction="none")

    def local_penalty(self, trained: dict[str, torch.Tensor], client) -> torch.Tensor | None:
        """A scalar added to the mean loss that depends on the trained tensors ``{name: tensor}`` alone, or None.

        FedProx's proximal term, say. Differentiable; ``trained`` has the names of :meth:`trainable`.
        """
        return None

    def before_local(self, message: Message, client) -> None:
        """Before the first step of a client in a round."""

    def after_local(self, client) -> Message:
        """What the client sends back."""
        return Message({**self.trainable(), **self.shared_buffers()}, n_samples=client.n_samples).clone()

    def on_step(self, client, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
        """After every optimiser step, with the trainable tensors on both sides of it.

        ``before`` is empty if the method says that it does not look at it (STEP_NEEDS_BEFORE).
        ``after[name].grad`` is the gradient the step was taken with: of loss and penalty, clipped, None if unused.
        """

    def fresh_state(self) -> dict:
        """The private state of a client that has not done anything yet."""
        return {}

    # ---------------------------------------------------------------- helpers

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features (B, d) of a batch of inputs."""
        return self.net(inputs, returnt="features")

    def task_logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (B, C_t) of the current task's classes, by the rows ``head`` of a method that trains some."""
        head = getattr(self, "head", None)
        if head is None:
            return self.net(inputs)[:, self.n_past_classes : self.n_seen_classes]
        return head(self.features(inputs))

    def load(self, message: Message) -> None:
        """Copy the broadcast into what this worker trains."""
        self.own(self.trainable().values())
        with torch.no_grad():
            for name, tensor in {**self.trainable(), **self.shared_buffers()}.items():
                tensor.copy_(message[name])

    def own(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give parameters storage of their own, once: a worker starts over the server's, and must not write there."""
        for p in parameters:
            if id(p) not in self._own:
                p.data = p.data.clone()
                self._own[id(p)] = p

    def enter_task(self, task: int) -> None:
        """Bring a worker to a task: the counters and structure of every task up to it, and tensors of its own.

        The worker starts with the server's storage; what it is going to train gets storage of its own here.
        """
        if getattr(self, "_entered", -1) == task:
            return
        for t in range(getattr(self, "_entered", -1) + 1, task + 1):
            self._current_task = t
            self.meta_begin_task(self.dataset)
        self._entered = task
        self.own(self.trainable().values())

    @classmethod
    def is_update(cls, call: str) -> bool:
        """Whether a client half is ``local_update``, under whatever name: ``client.call`` tells it what is different.

        So an engine may run it for many clients at once, with the same hooks. A class names its own in ``UPDATES``.
        """
        return any(call in vars(base).get("UPDATES", ()) for base in cls.__mro__)

    def why_one_by_one(self) -> str | None:
        """Why an engine must train the clients of this method one at a time; None if it may train many at once."""
        cls = type(self)
        if any(getattr(cls, n) is not getattr(FederatedModel, n) for n in ("local_update", "observe")):
            return "it has a training step of its own"
        if not self.PER_SAMPLE_LOSS:
            return "its loss does not split by sample"
        return None

    @property
    def _watches_steps(self) -> bool:
        return type(self).on_step is not FederatedModel.on_step

    @property
    def _own(self) -> dict:
        return self.__dict__.setdefault("_own_parameters", {})
