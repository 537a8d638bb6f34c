"""Clients over worker processes of Ray, on one machine or many.

Each worker (federated/engines/ray_actor.py) lives as long as the run and holds one network; it receives the settings,
the network and the images once, through Ray's object store. A job is a few clients and one call. What the clients own
stays on the server: their indices and private state travel with the job, and the state that comes back replaces the
old one only when the answer has arrived. So a worker may die at any time: another takes its place and the job is done
again, with the same result. Inside a worker the serial engine runs the clients, or under ``--clients_per_batch`` the
batched one; results are those of that engine in this process, to the bit, given equal numbers of threads.

``import ray`` means the package; nothing here needs it before a :class:`RayEngine` is made.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from federated.engines.base import LOST, Engine, Lost, Partial, add_up, chunks
from federated.engines.ray_actor import CPU, Actor, Done, Job, pack, pack_state, unpack, unpack_state
from federated.message import Message
from utils.errors import ClientError, RunError, UserError
from utils.registry import ROOT

MAX_TRIES = 3  # a client whose worker dies this often is lost
PATIENCE = 30.0  # seconds that all workers may take to start before the reader is told
KNOCK = 5.0  # seconds that a cluster may take to answer
NOT_SHIPPED = ["/results", "/data", "/.git", "/.venv"]  # of the repository, when it is sent to a cluster
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def import_ray():
    """The package.

    Raises:
        UserError: it is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as e:
        raise UserError(
            f"--engine ray needs the package ray ({e}): pip install -r requirements-ray.txt, or use --engine serial"
        ) from None
    return ray


def check_address(address: str) -> None:
    """Whether someone at ``host:port`` speaks HTTP/2, as Ray does. Ray itself would go on trying for many minutes.

    Raises:
        UserError: nobody does.
    """
    host, _, port = address.rpartition(":")
    try:
        if not host or "/" in host or not port.isdigit():
            raise OSError("that is no host:port")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK) as s:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                if s.recv(9)[3:4] != b"\x04":  # the other side's settings come first
                    raise OSError("something else is listening there")
    except (OSError, OverflowError) as e:
        raise no_cluster(address, e) from None


def no_cluster(address: str, reason: Exception) -> UserError:
    return UserError(
        f"--ray_address {address}: no Ray cluster answers ({reason}); give the host:port that ray start --head "
        "printed (with RAY_AUTH_MODE=token in the environment if the cluster has a token), auto for the cluster of "
        "this machine, or leave the flag out to start Ray here"
    )


def cause(error: Exception) -> str:
    """Why a worker died, from Ray's page on it."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or "low on memory" in text:
        return "the machine ran out of memory"
    detail = text.partition("Worker exit detail: ")[2].partition(" Some common causes")[0]
    return detail[:200] or str(error).strip().splitlines()[-1].strip()


class Worker:
    """An actor as the server sees it.

    Attributes:
        starting: reference to the outcome of its start; None once it is up. pid: its process.
    """

    def __init__(self, actor, starting) -> None:
        self.actor, self.starting, self.pid = actor, starting, None


class RayEngine(Engine):
    """Sends clients to whichever worker is idle.

    Args:
        worker, partition, states, args: see :class:`Engine`; this process's worker only tells what states look like.
        say: prints a line for the reader.

    Raises:
        UserError: Ray is missing, out of reach, or has not got what was asked for.
        RunError: a worker could not be started.
    """

    def __init__(self, worker, partition, states: dict[int, dict], args, say=print) -> None:
        super().__init__(worker, partition, states, args)
        self.ray, self.say = import_ray(), say
        self.workers: list[Worker] = []
        self._told: set[str] = set()
        self._calls = itertools.count()
        self._folder, self._connected = None, False
        try:
            n, share, threads = self._connect()
            self._prepare(share, threads)
            for _ in range(n):
                self.workers.append(self._spawn())
            starting = {w.starting: w for w in self.workers}
            while starting:
                self._started(starting.pop(self._first(list(starting))))
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------------- Ray itself

    def _connect(self) -> tuple[int, float, int]:
        """Start Ray, join a cluster, or use what this process has joined before. Returns the :meth:`_plan`."""
        ray, address = self.ray, self.args.ray_address
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not ray.is_initialized() and address is None:
            cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            plan = self._plan(cpus, torch.cuda.device_count())
            # a folder of its own: nothing stays behind, and under /tmp, as the paths of sockets must be short
            self._folder = tempfile.mkdtemp(prefix="herd-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
            resources = {"num_cpus": plan[0], "num_gpus": torch.cuda.device_count()}
            store = self._store_bytes(plan[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(
                    "local",
                    **resources,
                    include_dashboard=False,
                    object_store_memory=store,
                    _temp_dir=self._folder,
                    **quiet,
                )
            self._connected = True
            return plan
        if not ray.is_initialized():
            if address != "auto":
                check_address(address)
            env = {"working_dir": str(ROOT), "excludes": NOT_SHIPPED, "env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
            try:
                ray.init(address, runtime_env=env, **quiet)
            except Exception as e:
                raise no_cluster(address, e) from None
            self._connected = True
        have = ray.cluster_resources()
        plan = self._plan(int(have.get("CPU", 0)), int(have.get("GPU", 0)))
        if plan[0] > have.get("CPU", 0):
            raise UserError(
                f"--workers {plan[0]}: the cluster has {have.get('CPU', 0):g} CPUs and every worker takes one; "
                "give at most that many"
            )
        return plan

    def _plan(self, cpus: int, gpus: int) -> tuple[int, float, int]:
        """The number of workers, and for each its share of a GPU and its CPU threads.

        Raises:
            UserError: more GPUs are asked for than there are.
        """
        args = self.args
        wanted = args.num_gpus if args.num_gpus is not None else 0 if self.worker.device.type == "cpu" else gpus
        if wanted > gpus:
            raise UserError(f"--num_gpus {wanted:g}: Ray sees {gpus} here; give at most that, 0 for workers on CPUs")
        n = args.workers or (math.ceil(wanted) if wanted else max(1, cpus // 2))
        # 3 workers on 2 GPUs take half a GPU each: of 2/3 only one fits on each
        share = 0 if not wanted else 1 if wanted >= n else 1 / math.ceil(n / wanted)
        return n, share, args.num_threads or max(1, cpus // n)

    def _store_bytes(self, workers: int) -> int:
        """Shared memory for the images, the network, a message and answers under way; what is beyond goes to disk."""
        net = sum(t.numel() * t.element_size() for t in self.worker.net.state_dict().values())
        images = sum(x.nbytes + y.nbytes for x, y in self.worker.dataset.arrays().values())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return max(100 << 20, min((256 << 20) + images + (3 + 2 * workers) * net, int(0.3 * memory)))

    def _prepare(self, share: float, threads: int) -> None:
        """Put what every worker needs into the object store, once."""
        import main

        ray, args, dataset = self.ray, self.args, self.worker.dataset
        network = main.build_network(args, dataset)  # afresh: a run that was resumed has changed this process's own
        self._network = ray.put(network)
        device = "cuda:0" if share else "cpu" if self.worker.device.type == "cuda" else args.device
        self._start = [ray.put(vars(args)), self._network, ray.put(dataset.arrays())], device, threads
        options: dict = {"num_cpus": 1, "num_gpus": share, "max_restarts": 0}
        if args.ray_address is None:
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}}
        self._actor = ray.remote(Actor).options(**options)

    def close(self) -> None:
        """Stop the workers, and Ray if this engine has started it."""
        for worker in self.workers:
            self.ray.kill(worker.actor)
        self.workers, self._start, self._network = [], None, None
        if self._connected:
            self.ray.shutdown()
            self._connected = False
        for _ in range(20 if self._folder is not None else 0):
            shutil.rmtree(self._folder, ignore_errors=True)
            if not os.path.exists(self._folder):
                break
            time.sleep(0.1)  # a last process is still writing its log

    # ---------------------------------------------------------------- workers

    def _spawn(self) -> Worker:
        actor = self._actor.remote()
        return Worker(actor, actor.start.remote(*self._start))

    def _started(self, worker: Worker) -> None:
        """Take note that a worker is up.

        Raises:
            UserError, RunError: it is not, and another would not be either.
        """
        try:
            outcome = self.ray.get(worker.starting)
        except self.ray.exceptions.RayError as e:
            raise RunError(f"a worker of Ray could not start: {cause(e)}; fewer --workers need less memory") from e
        if isinstance(outcome, Exception):
            raise outcome
        worker.starting, worker.pid = None, outcome

    def _first(self, refs: list):
        """The first of ``refs`` to be done."""
        starting = {w.starting for w in self.workers}
        while not (done := self.ray.wait(refs, num_returns=1, timeout=PATIENCE)[0]):
            if starting.issuperset(refs):
                self._tell(f"engine ray: still waiting for {len(refs)} workers; is the cluster busy?")
        return done[0]

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.say(line)

    # ---------------------------------------------------------------- calls

    def run(
        self, call: str, message: Message, ids: Iterable[int], task: int, round_: int
    ) -> Iterator[tuple[int, Message | None | Lost]]:
        """Yield (client id, reply) as they come in. Large clients go first, so that none is waited for at the end."""
        ids = self.largest_first(ids, task)
        n = len(self.workers)
        if self.args.clients_per_batch is not None and self.worker.is_update(call):
            size = min(self.args.clients_per_batch, -(-len(ids) // n))
        else:
            size = min(8, len(ids) // (4 * n))
        jobs = [Job("run", some, part) for part, some in enumerate(chunks(ids, max(1, size)))]
        for _, answers in self._carry_out(jobs, call, message, task, round_):
            yield from answers

    def reduce(
        self, call: str, message: Message, ids: list[int], task: int, round_: int
    ) -> Iterator[tuple[int, Partial]]:
        """Yield (index of the chunk, its sum) as they come in. Workers add up, at most a few chunks ahead."""
        parts = chunks(ids)
        pieces: dict[int, dict] = {}  # of chunks that have to be done client by client
        jobs = [Job("reduce", some, part) for part, some in enumerate(parts)]
        for job, answer in self._carry_out(jobs, call, message, task, round_, ahead=2 * len(self.workers)):
            if job.how == "run":
                got = pieces.setdefault(job.part, {})
                got.update(answer)
                if len(got) < len(parts[job.part]):
                    continue
                answer = add_up([(i, got[i]) for i in parts[job.part]], call, task, round_)
                del pieces[job.part]
            yield job.part, answer

    def _carry_out(
        self, jobs: list[Job], call: str, message: Message, task: int, round_: int, ahead: float = math.inf
    ) -> Iterator[tuple[Job, list | Partial]]:
        """Yield (job, answer) as they come in: [(client, reply)] or a sum. A job may come back in pieces.

        Args:
            ahead: a chunk is begun only if it is less than this far from the first one under way. It bounds what the
                receiver must keep until it can go on in order.
        """
        self.worker.enter_task(task)  # states may refer to what a task puts into the network
        ray, key = self.ray, next(self._calls)
        sent = [ray.put(pack(message, self.worker.device))]
        waiting, busy = deque(jobs), {w.starting: (w, None) for w in self.workers if w.starting is not None}
        idle, arrived = [w for w in self.workers if w.starting is None], None
        while waiting or arrived or any(job is not None for _, job in busy.values()):
            while idle and waiting:
                first = min((job.part for _, job in busy.values() if job is not None), default=waiting[0].part)
                if waiting[0].part >= first + ahead:
                    break
                worker, job = idle.pop(), waiting.popleft()
                clients = [(i, self.partition.indices(task, i).numpy(), self._leaving(i)) for i in job.ids]
                busy[worker.actor.work.remote(job, call, key, sent, clients, task, round_)] = worker, job
            if arrived:  # only now, so that its worker need not wait for the next job
                yield arrived[0], self._received(*arrived)
                arrived = None
                continue
            ref = self._first(list(busy))
            worker, job = busy.pop(ref)
            if job is None:
                self._started(worker)
                idle.append(worker)
                continue
            try:
                done = ray.get(ref)
            except ray.exceptions.RayTaskError as e:  # no fault of the method: what it raises is returned
                raise ClientError(f"a worker of Ray failed in {call}: {cause(e)}", str(e)) from e
            except ray.exceptions.RayError as e:
                new = self._replace(worker)
                busy[new.starting] = new, None
                again, lost = self._after_death(job, e, f"{call} (task {task}, round {round_})")
                waiting.extendleft(reversed(again))
                if lost:
                    yield job, [(i, LOST) for i in lost]
                continue
            if isinstance(done, Exception):
                raise done
            idle.append(worker)
            for line in done.said:
                self._tell(line)
            arrived = job, done

    def _leaving(self, i: int) -> tuple | None:
        return pack_state(self.states.get(i, {}), self.worker.net)

    def _received(self, job: Job, done: Done) -> list | Partial:
        """Unpack an answer, and put the clients' states in the place of the old ones."""
        for i, state in done.states.items():
            self.states[i] = unpack_state(state, self.worker, lambda: self.ray.get(self._network), CPU)
        device = self.worker.device
        if job.how == "reduce":
            total, sizes = done.answer
            return Partial(unpack(total, device), sizes)
        return [(i, None if r is None else Message(unpack(r, device))) for i, r in done.answer]

    # ---------------------------------------------------------------- deaths

    def _replace(self, worker: Worker) -> Worker:
        self.ray.kill(worker.actor)  # it may only have been out of reach
        new = self._spawn()
        self.workers[self.workers.index(worker)] = new
        return new

    def _after_death(self, job: Job, error: Exception, where: str) -> tuple[list[Job], list[int]]:
        """(what to do again, clients that are lost) after the worker of ``job`` died.

        The clients of a chunk are done again one by one, so that only the guilty one is blamed.

        Raises:
            RunError: a client is lost, and ``--allow_missing_clients`` was not given.
        """
        many = len(job.ids) > 1
        who = f"clients {', '.join(map(str, job.ids))}" if many else f"client {job.ids[0]}"
        self.say(f"engine ray: a worker died in {where}, with {who}: {cause(error)}")
        tries = 0 if many else job.tries + 1
        if tries < MAX_TRIES:
            return [Job("run", [i], job.part, tries) for i in job.ids], []
        text = f"{who} is lost in {where}: its worker died {tries} times, at last: {cause(error)}"
        if not self.args.allow_missing_clients:
            raise RunError(f"{text}; fewer --workers need less memory, --allow_missing_clients goes on without it")
        self.say(f"engine ray: {text}; the round goes on without it")
        return [], job.ids
