"""What central and federated runs share (a session: results, checkpoints, interrupts), and the central training loop.

Everything random is seeded again at the start of each phase from (seed, phase, task, epoch), and a checkpoint is
written only between phases: so a resumed run repeats the interrupted phase from its start with the same draws.
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager

from utils import checkpoints
from utils.bias_source import bias_source
from utils.conf import make_generator, set_random_seed
from utils.errors import Interrupted, UserError
from utils.evaluate import Results
from utils.loggers import Run, identity, peak_memory_mb, write_csv


class Session:
    """A run in progress.

    Attributes:
        cursor: what comes next: task, and step, the epoch or communication round within it (0: the task has not begun).
        results: the accuracy matrices. run: the folder. under_way: whether there is anything to write there yet.
    """

    def __init__(self, args, dataset, model, run: Run, fresh_net) -> None:
        self.args, self.dataset, self.model, self.run = args, dataset, model, run
        self.results = Results(dataset, args)
        self.cursor = {"task": 0, "step": 0}
        self.fresh_net, self.nets = fresh_net, [model.net]  # the networks in use; the simulator adds the worker's
        saves = args.savecheck != "none" or getattr(args, "unlearn_client", None)
        self.baseline = checkpoints.baseline_of(model.net) if saves else {}
        self.interrupted = self.under_way = False
        # state beside the model: name -> function that gives its value for the checkpoint; values come back in restored
        self.parts: dict[str, Callable] = {}
        self.restored: dict = {}

    # ---- checkpoints

    def save(self, file=None) -> None:
        """Write the checkpoint of this moment (``file``: elsewhere than usual)."""
        self.run.clock["total"] = self.run.seconds()
        self.run._started = time.perf_counter()
        plain = {
            "identity": identity(self.args),
            "cursor": self.cursor,
            "results": self.results.state(),
            "rounds": self.run.rounds,
            "clock": self.run.clock,
        }
        values = {"model": self.model, **{name: get() for name, get in self.parts.items()}}
        checkpoints.write(file or self.run.checkpoint, plain, values, self.baseline, self.nets)

    def resume(self, checkpoint, fresh: dict | None = None) -> None:
        """Take up a checkpoint: the model and the cursor at once, the other parts into ``restored``.

        Args:
            checkpoint: what ``checkpoints.read`` gives, of the same settings (:func:`check_identity`), or None to
                start from nothing.
            fresh: newly built values that parts are put back into, by name.

        Raises:
            UserError: it does not fit what was built.
        """
        if checkpoint is None:
            self.under_way = True
            return
        plain, specs, tensors = checkpoint
        self.cursor, self.run.rounds = plain["cursor"], plain["rounds"]
        self.run.clock |= plain["clock"]
        self.results.load(plain["results"])
        reader = checkpoints.Reader(tensors, self.fresh_net, self.model.device, self.nets)
        reader.decode(specs["model"], self.model, "model")
        self.restored = {
            name: reader.decode(specs[name], (fresh or {}).get(name), name) for name in specs if name != "model"
        }
        if self.run.rounds:  # without what was measured after the checkpoint
            write_csv(self.run.path / "rounds.csv", self.run.rounds)
        self.under_way = True

    def boundary(self, level: str) -> None:
        """Between two phases: save if ``--savecheck`` asks for this level (round or task), stop if Ctrl-C asked.

        Raises:
            Interrupted: after saving.
        """
        if self.interrupted or self.args.savecheck == "round" or self.args.savecheck == level:
            self.save()
        if self.interrupted:
            raise Interrupted

    @contextmanager
    def catch_interrupts(self):
        """The first Ctrl-C ends the run at the next boundary, the second at once."""

        def handler(signum, frame):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print(
                "\ninterrupted: finishing this round or epoch, then saving (Ctrl-C again to stop at once)",
                file=sys.stderr,
            )

        old = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)

    # ---- results

    @contextmanager
    def training(self):
        """Counts the time inside as training: the clock's, and that of this process on all its cores."""
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.run.clock["train"] += time.perf_counter() - start
            self.run.clock["train_cpu"] += time.process_time() - cpu

    def measure_random(self) -> None:
        """Accuracy of the untrained model, which forward transfer is measured against."""
        if self.args.enable_other_metrics and self.results.random is None:
            self.results.random = list(self.results.measure(self.model, 0))

    def measure(self, task: int, step: int | None, extra: dict | None = None) -> dict:
        """Test now; step None: the task is over, and the accuracy matrices grow by a row."""
        class_il, task_il = self.results.measure(self.model, task)
        if step is None:
            self.results.class_il.append(class_il)
            self.results.task_il.append(task_il)
            if self.args.measure_bias_source:
                self.results.bias |= bias_source(self.model, self.dataset, task)
            if self.args.measure_spikes or self.args.plot_spikes:
                self.spikes(task)
            if task + 1 == self.dataset.n_train_tasks:
                self.results.bias |= self.model.final_metrics(self.dataset, self.run.path)
        seen = list(class_il[: len(class_il) if self.args.joint else task + 1])
        seen_task = list(task_il[: len(seen)])
        row = {
            "task": task,
            "round": -1 if step is None else step,
            "faa": sum(seen) / len(seen),
            "faa_task_il": sum(seen_task) / len(seen_task),
            **self.results.bias,
            **(extra or {}),
            "train_seconds": round(self.run.clock["train"], 3),
        }
        self.run.add_round(row)
        if step is None:
            self.write_files("interrupted")
        return row

    def spikes(self, task: int) -> None:
        """What ``--measure_spikes`` and ``--plot_spikes`` ask for after a task."""
        from backbones.utils.spikes import neuron_layers
        from utils.spiking_metrics import plot_spikes, spiking_metrics

        if self.args.measure_spikes:
            self.results.bias |= spiking_metrics(self.model, self.dataset, task)
        if self.args.plot_spikes and neuron_layers(self.model.net):
            plot_spikes(self.model, self.dataset, task, self.run.path / f"spikes-{task + 1}.png")

    def write_files(self, status: str) -> None:
        """Bring accuracy.csv and summary.csv up to date."""
        self.run.write_accuracy(self.results.class_il, self.results.task_il)
        summary = self.results.summary() if self.results.class_il else {}
        for name in ("federated_bias", "federated_bias_js"):  # the mean over tasks, each after its last round
            values = [r[name] for r in self.run.rounds if r["round"] == -1 and r.get(name) is not None]
            summary |= {name: sum(values) / len(values)} if values else {}
        trainable = sum(p.numel() for p in self.model.get_parameters() if p.requires_grad)
        self.run.write_summary(
            {
                "status": status,
                "tasks_done": len(self.results.class_il),
                "n_tasks": self.dataset.n_train_tasks,
                **summary,
                **self.traffic(),
                "train_seconds": round(self.run.clock["train"], 3),
                "train_cpu_seconds": round(self.run.clock["train_cpu"], 3),
                "total_seconds": round(self.run.seconds(), 3),
                "peak_memory_mb": round(peak_memory_mb(), 1),
                "trainable_params": trainable,
            }
        )

    def traffic(self) -> dict:
        """Columns on communication; the simulator fills them."""
        return {"uplink_mb": None, "downlink_mb": None}

    @property
    def last_task(self) -> int:
        """One past the last task to run in this sitting."""
        n = self.dataset.n_train_tasks
        return n if self.args.stop_after is None else min(self.args.stop_after, n)

    def report(self, row: dict, task: int, what: str) -> None:
        """One line on how it stands."""
        loss = f" | loss {row['loss']:.4f}" if row.get("loss") is not None else ""
        traffic = f" | up {row['uplink_mb']:.2f} MB down {row['downlink_mb']:.2f} MB" if "uplink_mb" in row else ""
        self.run.say(
            f"task {task + 1}/{self.dataset.n_train_tasks} {what}{loss} | class-IL {row['faa']:.2f} "
            f"task-IL {row['faa_task_il']:.2f}{traffic} | {row['train_seconds']:.1f} s"
        )

    def bar(self, iterable, total: int, text: str):
        """A progress bar on a terminal; nothing in a log file, where :meth:`report` lines tell."""
        from tqdm import tqdm

        return tqdm(iterable, total=total, desc=text, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)


def check_identity(plain: dict, args) -> None:
    """Refuse a checkpoint made with other settings, naming those that differ.

    Raises:
        UserError: the settings differ.
    """
    import json

    theirs, mine = plain["identity"], json.loads(json.dumps(identity(args)))
    odd = [k for k in sorted(set(theirs) | set(mine)) if theirs.get(k) != mine.get(k)]
    if odd:
        what = ", ".join(f"--{k} {theirs.get(k)!r} there and {mine.get(k)!r} here" for k in odd[:4])
        raise UserError(
            f"--loadcheck: the checkpoint belongs to another run ({what}"
            f"{', ...' if len(odd) > 4 else ''}): use the same settings, or another checkpoint"
        )


def train_central(session: Session, checkpoint=None) -> None:
    """Mammoth's loop: tasks, epochs, batches, on one device."""
    args, dataset, model = session.args, session.dataset, session.model
    session.parts["optimizer"] = lambda: model.opt.state_dict() if model.opt is not None else None
    session.parts["view"] = lambda: view_state(dataset.train_loader.dataset) if session.cursor["step"] else None
    session.resume(checkpoint)
    if checkpoint is not None:  # momentum outlives epochs and tasks
        model.opt = model.get_optimizer()
        if model.opt is not None and session.restored["optimizer"] is not None:
            model.opt.load_state_dict(session.restored["optimizer"])
    session.measure_random()
    for task in range(session.cursor["task"], session.last_task):
        while dataset.c_task < task:
            dataset.get_data_loaders()
        loader, first, loss = dataset.train_loader, session.cursor["step"], None
        if first == 0:
            with session.training():
                set_random_seed(args.seed, "begin_task", task)
                loader.set_generator(make_generator(args.seed, "begin_task", task))
                model.net.train()
                model.meta_begin_task(dataset)
                model.scheduler = model.get_scheduler(model.opt)
        else:  # resumed within a task: what begin_task left behind comes from the checkpoint
            vars(loader.dataset).update(session.restored["view"])
            model.opt = model.get_optimizer()
            model.scheduler = model.get_scheduler(model.opt)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimiser has not stepped yet
                for _ in range(first if model.scheduler else 0):
                    model.scheduler.step()
            if model.opt is not None:
                model.opt.load_state_dict(session.restored["optimizer"])
        for epoch in range(first, args.n_epochs):
            with session.training():
                loss = _epoch(session, loader, task, epoch)
            session.cursor = {"task": task, "step": epoch + 1}
            if args.eval_every and (epoch + 1) % args.eval_every == 0 and epoch + 1 < args.n_epochs:
                session.report(session.measure(task, epoch, {"loss": loss}), task, f"epoch {epoch + 1}/{args.n_epochs}")
            if epoch + 1 < args.n_epochs:
                session.boundary("round")
        with session.training():
            set_random_seed(args.seed, "end_task", task)
            model.meta_end_task(dataset)
        session.cursor = {"task": task + 1, "step": 0}
        session.report(session.measure(task, None, {"loss": loss}), task, "done")
        session.boundary("task")


def view_state(view) -> dict:
    """What a method has put on the samples of a loader: extra fields, or samples of its own."""
    names = [*view.extra_fields(), "extra_return_fields", "_own_data", "_own_targets"]
    return {name: getattr(view, name) for name in names}


def train_epoch(model, loader, dataset, epoch: int, bar: Callable = iter) -> tuple:
    """One epoch of a method: its hooks, its batches (a few under ``--debug_mode``), its schedule.

    Args:
        dataset: what the hooks see. bar: wraps the loader, to show progress.

    Returns:
        (sum of the losses, number of steps); losses stay on the device.
    """
    model.net.train()
    model.epoch_iteration = 0
    model.begin_epoch(epoch, dataset)
    total, steps, fields = 0.0, 0, loader.extra_fields()
    for i, (inputs, labels, not_aug_inputs, *extra) in enumerate(bar(loader)):
        if model.args.debug_mode and i >= model.get_debug_iters():
            break
        more = dict(zip(fields, extra, strict=True))
        total = total + model.meta_observe(inputs, labels, not_aug_inputs, epoch=epoch, **more)
        steps += 1
    if model.scheduler is not None:
        model.scheduler.step()
    model.end_epoch(epoch, dataset)
    return total, steps


def _epoch(session: Session, loader, task: int, epoch: int) -> float:
    """A central epoch, seeded; the mean loss."""
    args = session.args
    set_random_seed(args.seed, "epoch", task, epoch)
    loader.set_generator(make_generator(args.seed, "epoch", task, epoch))
    text = f"task {task + 1} epoch {epoch + 1}/{args.n_epochs}"
    total, steps = train_epoch(
        session.model, loader, session.dataset, epoch, lambda batches: session.bar(batches, len(loader), text)
    )
    return float(total) / max(steps, 1)
