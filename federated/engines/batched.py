"""Many clients in one forward and backward pass on one device.

What the clients train is stacked: a tensor with a leading client dimension for each trainable tensor. Two ways to run
the network over a stack, chosen by what is trained:

    adapters, prompts, head rows   the samples of all clients form one batch for the frozen network; only the modules
                                   that are trained tell clients apart (backbones/utils/client_batch.py). Batches of
                                   unequal size need no padding.
    the network's own weights      ``torch.func.vmap`` over the clients; smaller batches are padded, and padding has
                                   weight zero. On a GPU, where at least ``MAPPED_FROM`` clients have a batch left, or
                                   when ``--clients_per_batch`` asks for it: on a CPU, or for few clients, this is no
                                   faster than clients in turn.

The K losses are added up, so each client's slice receives the gradient of its own loss. Every client has an optimiser,
a schedule and a loss scale of its own: the method's, made over views of its slices. So K clients in a stack take the
steps that K clients in turn take, and a client that has no batch left is left alone, whatever its momentum. Draws come
from each client's own generator. Only the order of additions differs from the serial engine.

Everything but training (``FederatedModel.is_update``) runs client by client, and so does the training of a method with
a step of its own (``FederatedModel.why_one_by_one``).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from backbones.utils.base import plain_attention
from backbones.utils.client_batch import client_batch
from datasets.utils.transforms import send
from federated.client import Client
from federated.engines.base import Engine, blaming
from federated.message import Message
from models.utils.federated_model import in_place
from utils.errors import ClientError, RunError

CPU_SAMPLES = 128  # a larger batch outgrows a CPU's caches and is slower than several
MAPPED_FROM = 4  # whole networks: a mapped step of two takes as long as three plain ones (docs/performance.md)


class Stack:
    """K copies of what a worker trains, in tensors with a leading client dimension.

    Attributes:
        values: {name: (K, ...)}, contiguous. of: for each client {name: parameter}, views of its slices.
    """

    def __init__(self, worker, clients: int) -> None:
        trained, self.places = worker.trainable(), worker.places()
        as_rows = torch.contiguous_format
        self.values = {n: p.detach().expand(clients, *p.shape).clone(memory_format=as_rows) for n, p in trained.items()}
        self.of = [{n: nn.Parameter(v[k]) for n, v in self.values.items()} for k in range(clients)]

    def leaves(self, clients: int) -> dict[str, Tensor]:
        """The slices of the first ``clients`` clients, to differentiate by."""
        return {n: v[:clients].detach().requires_grad_() for n, v in self.values.items()}

    def in_place(self, tensors: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Within the block, the worker's modules hold ``tensors`` in place of what it trains."""
        return in_place(self.places, tensors)


def tells_clients_apart(worker, trained: dict[str, nn.Parameter]) -> bool:
    """Whether all that is trained belongs to modules that take a leading client dimension."""
    covered = {id(p) for m in worker.modules() if getattr(m, "STACKS", False) for p in m.parameters()}
    return all(id(p) in covered for p in trained.values())


class NotAlike(RunError):
    """The stacked loss has other gradients than the clients' own losses."""


class BatchedEngine(Engine):
    """Stacks clients where it can and where it pays, and trains the others in turn.

    Attributes:
        clients_per_batch: clients in a stack; None until it is known how many fit.
    """

    def __init__(self, worker, partition, states, args, say=print) -> None:
        super().__init__(worker, partition, states, args)
        self.say, self.clients_per_batch = say, args.clients_per_batch
        self.in_turn: str | None = None  # why not to stack at all
        self._mean_of: dict[tuple, Tensor] = {}
        self._proven = -1  # the task whose stacked gradients have been compared with a client's own

    # ---------------------------------------------------------------- which clients, how many at once

    def run(
        self, call: str, message: Message, ids: Iterable[int], task: int, round_: int
    ) -> Iterator[tuple[int, Message | None]]:
        """Yield (client id, reply): stacks of the largest clients first, so that those alike are trained together."""
        self.worker.enter_task(task)
        waiting = list(ids)
        if self.worker.is_update(call) and self._stacks():
            waiting = self.largest_first(waiting, task)
            while self.in_turn is None and len(waiting) >= self._worth():
                if self.clients_per_batch is None:
                    self.clients_per_batch = self._how_many(message, self.client(waiting[0], task, round_, call))
                stacks = -(-len(waiting) // self.clients_per_batch)
                some = waiting[: -(-len(waiting) // stacks)]  # of about the same size
                try:
                    replies = self._together(call, message, some, task, round_)
                except NotAlike as e:
                    self._give_up(str(e))
                    break
                except ClientError as e:
                    if not isinstance(e.__cause__, torch.OutOfMemoryError) or len(some) == 1:
                        raise
                    replies = None
                if replies is None:  # only now has the exception let go of what it held
                    self.clients_per_batch = len(some) // 2
                    self.say(f"engine batched: no memory for {len(some)} clients: going on with {len(some) // 2}")
                    torch.cuda.empty_cache()
                    continue
                yield from replies
                waiting = waiting[len(some) :]
        for i in sorted(waiting):
            yield i, self.answer(call, message, self.client(i, task, round_, call))

    def _stacks(self) -> bool:
        """Whether clients are trained together; says once why not."""
        if self.in_turn is not None:
            return False
        worker, trained = self.worker, self.worker.trainable()
        reason = worker.why_one_by_one()
        if reason is None and not trained:
            reason = "it trains nothing"
        if reason is None and len(worker.places()) < len(trained):
            reason = "it trains tensors that are no parameters of its modules"
        self._folds = reason is None and tells_clients_apart(worker, trained)
        if reason is None and not self._folds:
            reason = self._why_not_vmap()
        if reason is not None:
            self._give_up(reason)
        return reason is None

    def _why_not_vmap(self) -> str | None:
        """Why whole networks are not stacked."""
        for module in self.worker.net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                return "its network has BatchNorm, whose statistics mix the samples of a batch"
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                return "its network has dropout, which draws from no client's generator"
        if self.args.clients_per_batch is None and self.worker.device.type == "cpu":
            return "it trains whole networks, which a CPU does as fast in turn (--clients_per_batch K stacks them)"
        return None

    def _worth(self) -> int:
        """How many clients are trained together no slower than in turn, if not told."""
        return 1 if self._folds or self.args.clients_per_batch is not None else MAPPED_FROM

    def _give_up(self, reason: str) -> None:
        self.in_turn = reason
        self.say(f"engine batched: {self.worker.NAME} trains its clients one at a time: {reason}")

    def _how_many(self, message: Message, client: Client) -> int:
        """Clients whose activations fit in 70 % of the free memory, from what one small batch keeps for its backward.

        Memory that runs out all the same halves the number (in :meth:`run`). On a CPU also no more than pay.
        """
        worker, indices, device = self.worker, client.indices[:2], self.worker.device
        client.state = copy.deepcopy(client.state)
        worker.client = client
        with self._blaming(client):
            worker.load(message)
            worker.start_training()
            worker.before_local(message, client)
        loader = worker.dataset.loader_of_many([(indices, client.generator)], client.task, 2, device)
        _, inputs, labels = next(iter(loader))
        seen: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in worker.parameters()}

        def count(t: Tensor) -> Tensor:
            seen.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            return t

        with self._blaming(client), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = worker.local_loss(inputs, labels, client)
        del loss
        batch = min(self.args.batch_size, client.n_samples)
        most = max(CPU_SAMPLES // batch, 2) if device.type == "cpu" else sys.maxsize
        each = 1.5 * sum(seen.values()) / len(indices) * batch  # and as much again in half for the backward's own
        each += 4 * sum(p.numel() * p.element_size() for p in worker.trainable().values())
        return max(1, min(most, int(0.7 * free_memory(device) / each)))

    # ---------------------------------------------------------------- training together

    def _together(
        self, call: str, message: Message, ids: Sequence[int], task: int, round_: int
    ) -> list[tuple[int, Message]]:
        """The replies of some clients, the largest first, trained as a stack; their states change only at the end."""
        worker = self.worker
        clients = [self.client(i, task, round_, call) for i in ids]
        for client in clients:
            client.state = copy.deepcopy(client.state)  # a stack that fails is trained again
            client.indices = worker.training_samples(client)
        clients.sort(key=lambda c: -c.n_samples)
        try:
            worker.load(message)
            stack = Stack(worker, len(clients))
            turns, replies = [], []
            for client, own in zip(clients, stack.of):
                with stack.in_place(own), self._blaming(client):
                    worker.client = client
                    worker.start_training()
                    worker.before_local(message, client)
                    turns.append(worker._own_turn)
            with self._blaming(*clients):
                losses = self._train(stack, clients, turns).tolist()
            for client, own, turn, loss in zip(clients, stack.of, turns, losses):
                with stack.in_place(own), self._blaming(client):
                    worker.client, worker._own_turn = client, turn
                    replies.append((client.id, worker.reply_of(client, loss)))
        finally:
            worker.client = worker.opt = worker.scheduler = worker._own_turn = None
        for client in clients:
            self.states[client.id] = client.state
        return replies

    @staticmethod
    def _blaming(*clients: Client):
        names = sorted(c.id for c in clients)
        who = f"client {names[0]}" if len(names) == 1 else f"one of the clients {', '.join(map(str, names))}"
        return blaming(clients[0].call, who, clients[0].task, clients[0].round)

    def _train(self, stack: Stack, clients: list[Client], turns: list) -> Tensor:
        """All epochs of all clients. Returns their mean losses (K,)."""
        worker, args, task, epochs = self.worker, self.args, clients[0].task, self.worker.local_epochs()
        loader = worker.dataset.loader_of_many(
            [(c.indices, c.generator) for c in clients], task, args.batch_size, worker.device
        )
        n_batches = [worker.batches_of(c) for c in clients]
        # the last moment at which so many train together: by then they have gone different ways
        least, proof = max(self._worth(), 2), None
        if len(clients) >= least and self._proven != task:
            proof = epochs - 1, n_batches[least - 1] - 1
        total = torch.zeros(len(clients), device=worker.device)
        for epoch in range(epochs):
            for j, (sizes, inputs, labels) in enumerate(loader):
                if j == n_batches[0]:
                    break
                active = tuple(clients[: len(sizes)])
                gradients = self._folded if self._folds else self._vmapped
                if len(active) < self._worth():
                    gradients = self._each
                losses, grads = gradients(stack, active, sizes, inputs, labels, [t.scaler for t in turns])
                # autograd's may be transposed; a fused optimiser wants them as the tensors are
                grads = {n: None if g is None else g.contiguous() for n, g in grads.items()}
                if (epoch, j) == proof:
                    self._compare(stack, active, sizes, inputs, labels, grads, turns[0].scaler)
                total[: len(active)] += losses
                for k, client in enumerate(active):
                    for n, p in stack.of[k].items():
                        p.grad = grads[n][k] if grads[n] is not None else None
                    added = worker.descend(client, turns[k])
                    if added is not None:
                        total[k] += added
            for turn in turns:
                if turn.scheduler is not None:
                    turn.scheduler.step()
        return total / send(torch.tensor([float(max(n * epochs, 1)) for n in n_batches]), worker.device)

    def _folded(self, stack, clients, sizes, inputs, labels, scalers) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Losses (K,) and their (scaled) gradients by the slices, from one batch of all clients' samples."""
        leaves = stack.leaves(len(clients))
        with stack.in_place(leaves), client_batch(sizes):
            each = self._per_sample(self.worker.local_loss(inputs, labels, clients), labels)
        losses = self._means(sizes, each.dtype) @ each
        penalties = self._penalties(leaves, clients)
        losses = losses if penalties is None else losses + penalties
        grads = torch.autograd.grad(self._scaled(losses, scalers), list(leaves.values()), allow_unused=True)
        return losses.detach(), dict(zip(leaves, grads))

    def _penalties(self, leaves: dict[str, Tensor], clients) -> Tensor | None:
        """``local_penalty`` of each client on its slices, (K,)."""
        each = [self.worker.local_penalty({n: v[k] for n, v in leaves.items()}, c) for k, c in enumerate(clients)]
        return None if each[0] is None else torch.stack(each)

    @staticmethod
    def _scaled(losses: Tensor, scalers) -> Tensor:
        """The sum of the losses, each at its client's loss scale."""
        if not scalers[0].is_enabled():
            return losses.sum()
        return sum(scaler.scale(loss) for scaler, loss in zip(scalers, losses.unbind()))

    def _vmapped(self, stack, clients, sizes, inputs, labels, scalers) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for networks that are trained themselves: one loss, mapped over the clients."""
        longest, offsets = max(sizes), torch.tensor([0, *sizes]).cumsum(0)[:-1]
        last = torch.tensor(sizes) - 1
        rows = send(offsets[:, None] + torch.minimum(torch.arange(longest), last[:, None]), inputs.device)
        one = torch.ones((), device=inputs.device)
        scales = torch.stack([s.scale(one) if s.is_enabled() else one for s in scalers[: len(sizes)]])
        weights = torch.stack([w[r] for w, r in zip(self._means(sizes, inputs.dtype), rows)])
        weights = weights * send(torch.arange(longest) <= last[:, None], inputs.device)

        def loss(trained, x, y, w, scale):
            with stack.in_place(trained):
                each = self._per_sample(self.worker.local_loss(x, y, clients), y)
            value = (each * w).sum()
            return value * scale, value

        leaves = stack.leaves(len(clients))
        with plain_attention(self.worker.net):
            grads, losses = torch.func.vmap(torch.func.grad(loss, has_aux=True))(
                {n: v.detach() for n, v in leaves.items()}, inputs[rows], labels[rows], weights, scales
            )
        penalties = self._penalties(leaves, clients)
        if penalties is not None:
            more = torch.autograd.grad(self._scaled(penalties, scalers), list(leaves.values()), allow_unused=True)
            grads = {n: grads[n] if g is None else grads[n] + g for n, g in zip(leaves, more)}
            losses = losses + penalties.detach()
        return losses.detach(), grads

    def _each(self, stack, clients, sizes, inputs, labels, scalers) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, one client after the other."""
        batches = zip(clients, inputs.split(sizes), labels.split(sizes), scalers)
        losses, grads = zip(*(self._alone(stack, k, *batch) for k, batch in enumerate(batches)))
        return torch.stack(losses), {n: torch.stack([own[n] for own in grads]) for n in grads[0]}

    def _alone(self, stack, k: int, client, inputs, labels, scaler) -> tuple[Tensor, dict[str, Tensor]]:
        """Client k's loss and its (scaled) gradient by its slices, as the serial engine computes them."""
        own = {n: p.detach().requires_grad_() for n, p in stack.of[k].items()}
        with stack.in_place(own):
            loss = self.worker.local_loss(inputs, labels, client).mean()
            penalty = self.worker.local_penalty(own, client)
        loss = loss if penalty is None else loss + penalty
        grads = torch.autograd.grad(scaler.scale(loss), list(own.values()), materialize_grads=True)
        return loss.detach(), dict(zip(own, grads))

    def _means(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(K, batch): row k takes the mean over the samples of client k."""
        key = (tuple(sizes), dtype)
        if key not in self._mean_of:
            rows = torch.block_diag(*(torch.full((1, n), 1 / n, dtype=dtype) for n in sizes))
            self._mean_of[key] = send(rows, self.worker.device)
        return self._mean_of[key]

    @staticmethod
    def _per_sample(each: Tensor, labels: Tensor) -> Tensor:
        if each.shape != labels.shape:
            raise NotAlike("its local_loss gives no loss for each sample (PER_SAMPLE_LOSS = False says so beforehand)")
        return each

    def _compare(self, stack, clients, sizes, inputs, labels, grads, scaler) -> None:
        """Hold the first client's slices against its own loss, alone.

        Raises:
            NotAlike: the gradients differ by more than rounding, so the method does not bear stacking.
        """
        n, worker = sizes[0], self.worker
        _, alone = self._alone(stack, 0, clients[0], inputs[:n], labels[:n], scaler)
        # cuDNN's convolutions round float32 to TF32, which has float16's digits
        coarse = self.args.precision != "fp32" or worker.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        tolerance = 5e-2 if coarse else 1e-4
        for name, whole in grads.items():
            right = alone[name]
            mine = torch.zeros_like(right) if whole is None else whole[0]
            if (mine - right).norm() > tolerance * right.norm() + 1e-6 * mine.numel() ** 0.5:
                raise NotAlike(f"stacked, the gradient of {name} is not the client's own; does its loss mix clients?")
        self._proven = clients[0].task


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left; of the machine's memory for the CPU, as far as the system tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30
