"""The worker process of the Ray engine, and the form in which things travel to it and back."""

from __future__ import annotations

import os
import signal
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from federated.engines.base import Engine
from federated.engines.batched import BatchedEngine
from federated.engines.serial import SerialEngine
from federated.message import Message
from utils.checkpoints import Reader, Writer
from utils.conf import get_device, set_random_seed
from utils.errors import ClientError, RunError, UserError

CPU = torch.device("cpu")


def pack(entries: Mapping, device: torch.device) -> list[tuple]:
    """Tensors as bytes, which Ray puts into shared memory as they are; other values unchanged; all in order."""
    packed = []
    for name, value in entries.items():
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            value = (data, value.dtype, tuple(value.shape), value.device.type == device.type)
        packed.append((name, value))
    return packed


def unpack(packed: list[tuple], device: torch.device) -> dict:
    """The inverse: tensors with storage of their own, on ``device`` where they were on the sender's."""
    entries = {}
    for name, value in packed:
        if isinstance(value, tuple):
            data, dtype, shape, on_device = value
            value = torch.empty(shape, dtype=dtype)
            value.view(-1).view(torch.uint8).numpy()[:] = data
            value = value.to(device) if on_device else value
        entries[name] = value
    return entries


def pack_state(state: dict, net: torch.nn.Module) -> tuple | None:
    """A client's private state as a specification and tensors; weights of ``net`` go by name. None if it is empty.

    Raises:
        RunError: it holds something that no checkpoint can hold either.
    """
    if not state:
        return None
    writer = Writer(nets=[net])
    return writer.encode(state, "state"), pack(writer.tensors, CPU)


def unpack_state(packed: tuple | None, worker, fresh_net: Callable, device: torch.device) -> dict:
    """The inverse, over the network of ``worker``. Tensors go to ``device``."""
    if packed is None:
        return {}
    spec, tensors = packed
    reader = Reader(unpack(tensors, CPU), fresh_net, device, [worker.net])
    return reader.decode(spec, worker.fresh_state(), "state")


class Job(NamedTuple):
    """Clients that a worker takes at once, for their replies (``how`` is "run") or the sum of these ("reduce").

    Attributes:
        part: index of the chunk they belong to. tries: how often a worker has died of it.
    """

    how: str
    ids: list[int]
    part: int
    tries: int = 0


class Done(NamedTuple):
    """What comes back.

    Attributes:
        answer: [(client, packed reply or None)], or (packed sum, sizes by client). states: packed, by client.
        said: lines for the reader.
    """

    answer: object
    states: dict[int, tuple | None]
    said: list[str]


class Indices:
    """The partition, as far as a job tells."""

    def __init__(self) -> None:
        self.of: dict[int, torch.Tensor] = {}

    def indices(self, task: int, client: int) -> torch.Tensor:
        return self.of[client]


class Actor:
    """One worker process. Errors are returned, not raised: Ray would change their class and text."""

    def start(self, shared: list, device: str, threads: int) -> int | Exception:
        """Build the data set, the network and the worker.

        Args:
            shared: references to the settings, the network and the arrays of the data set.

        Returns:
            The id of this process, or what went wrong.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which finishes its round
        try:
            import ray

            import main
            from datasets import get_dataset
            from datasets.utils.continual_dataset import preload

            torch.set_num_threads(threads)
            settings, network, arrays = shared
            self.args = args = Namespace(**{**ray.get(settings), "device": device})
            self.device = get_device(device)
            preload(ray.get(arrays))
            self.dataset = get_dataset(args).to(self.device)
            self.fresh_net = lambda: ray.get(network).to(self.device)  # another one each time
            self.worker = main.build_method(args, self.dataset, self.fresh_net())
            self.partition, self.said = Indices(), []
            if args.clients_per_batch is None:
                self.engine: Engine = SerialEngine(self.worker, self.partition, {}, args)
            else:
                self.engine = BatchedEngine(self.worker, self.partition, {}, args, self.said.append)
            self.key = -1
            return os.getpid()
        except (UserError, RunError) as e:
            return e
        except Exception as e:
            return ClientError(f"a worker of Ray could not start: {type(e).__name__}: {e}", traceback.format_exc())

    def work(
        self, job: Job, call: str, key: int, message: list, clients: list[tuple], task: int, round_: int
    ) -> Done | Exception:
        """Carry out a job.

        Args:
            key: number of the call; its message is fetched once. message: a list with the reference to it.
            clients: (id, indices, packed state) of each.
        """
        try:
            if key != self.key:
                import ray

                self.message, self.key = Message(unpack(ray.get(message[0]), self.device)), key
            set_random_seed(self.args.seed, "worker", task)  # a worker that starts late makes the same draws
            while self.dataset.c_task < task:
                self.dataset.get_data_loaders()
            self.worker.enter_task(task)  # before the states, which may refer to what a task puts into the network
            states = self.engine.states
            states.clear()
            for i, indices, state in clients:
                self.partition.of[i] = torch.from_numpy(indices.copy())
                states[i] = unpack_state(state, self.worker, self.fresh_net, self.device)
            verb = getattr(self.engine, job.how)(call, self.message, job.ids, task, round_)
            if job.how == "run":
                answer: object = [(i, None if r is None else pack(r, self.device)) for i, r in verb]
            else:
                ((_, partial),) = verb
                answer = pack(partial.total, self.device), partial.sizes
            said, self.said[:] = list(self.said), []
            return Done(answer, {i: self.leaving(i) for i in job.ids}, said)
        except (UserError, RunError) as e:
            return e
        except Exception as e:
            where = f"{call} (task {task}, round {round_})"
            return ClientError(f"a worker of Ray failed in {where}: {type(e).__name__}: {e}", traceback.format_exc())
        finally:
            self.partition.of.clear()

    def leaving(self, i: int) -> tuple | None:
        """The state of a client, packed."""
        try:
            return pack_state(self.engine.states[i], self.worker.net)
        except RunError as e:
            raise RunError(f"client {i} keeps what cannot leave its process; use --engine serial ({e})") from None
