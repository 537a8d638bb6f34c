"""One model of an experiment on forgetting: O with everybody, V that forgot, R that never saw the client."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from datasets.utils.partition import Partition
from federated.clients import Clients
from federated.engines import make_engine
from utils import checkpoints
from utils.conf import set_random_seed
from utils.evaluate import EVAL_BATCH, evaluating
from utils.files import replacing
from utils.training import Session
from utils.unlearning_metrics import accuracy


class Stage:
    """A model in the making: built anew, brought to a checkpoint, taken on from there; nothing of the run is written.

    Args:
        args: of the run. run: its folder, for messages. checkpoint: file; None for a model that knows nothing yet.
        keep: folder for what the model says of all images, which does not change from one request to the next (O, R).

    Attributes:
        at: (task, rounds of it that were done) then. seconds: spent on unlearning and recovery.
        moments: (seconds, test accuracy in % if the run ended then) before each round of recovery.
    """

    def __init__(self, args, run, checkpoint: Path | None, keep: Path | None = None) -> None:
        import main
        from federated.simulator import resume

        self.keep = keep

        self.args = copy.deepcopy(args)
        self.args.unlearn_client, self.args.savecheck = None, "none"
        self.dataset, self.model, self.worker, fresh = main.build(self.args)
        self.partition = Partition.make(self.dataset, self.args)
        self.session = Silent(self.args, self.dataset, self.model, Quiet(run), fresh)
        stored = checkpoints.read(checkpoint) if checkpoint else None
        self.ledger, self.states = resume(self.session, self.worker, stored)
        self.session.traffic = dict
        history = self.session.restored.get("history")
        if history is not None:
            self.model._own_history = history
        self.seconds, self.at = 0.0, (self.session.cursor["task"], self.session.cursor["step"] - 1)
        self.moments: list[tuple[float, float]] = []
        self._said: dict[tuple[int, bool], np.ndarray] = {}

    def engine(self):
        """Where those of the division that is in force now train."""
        return closing(make_engine(self.worker, self.partition, self.states, self.args, self.session.run.say))

    @contextmanager
    def clients(self) -> Iterator[Clients]:
        """Those that own samples of the current task."""
        task = self.session.cursor["task"]
        with self.engine() as engine:
            yield Clients([i for i, n in enumerate(self.partition.sizes(task)) if n > 0], engine, self.ledger, task)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The time inside counts."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def forget(self, who: Sequence[int]) -> None:
        """The way to unlearn, then the clients are gone."""
        while self.dataset.c_task < self.session.cursor["task"]:
            self.dataset.get_data_loaders()
        set_random_seed(self.args.seed, "unlearn", *who)
        with self.timed(), self.clients() as clients:
            self.model.unlearn(clients, list(who))
        self.partition = self.partition.without(who)
        for u in who:
            self.states.pop(u, None)
        for kept in getattr(self.model, "_own_history", {}).values():  # as if they had never been there
            for part in ("updates", "weights"):
                kept[part] = {k: v for k, v in kept[part].items() if k not in who}
            total = sum(kept["weights"].values())
            kept["weights"] = {k: w / total for k, w in kept["weights"].items()} if total else {}

    def replay(self, who: Sequence[int], original: Stage) -> None:
        """The training until the request once more, without the clients, by the rounds of a way with ``REPLAYS``."""
        self.args.unlearn_history = 0
        if hasattr(original.model, "_own_history"):
            known = original.model._own_history  # to which the rest of the run has added
            self.model._own_history = {when: kept for when, kept in known.items() if when < original.at}
        self.model.plan(list(who))
        self.partition = self.partition.without(who)
        with self.timed():
            self.finish(original.at)

    def recover(self, rounds: int, look: bool = False) -> None:
        """Rounds of those that are left; ``look``: test before each, off the clock (``moments``)."""
        for n in [1] * rounds if look else [rounds]:
            if look:
                self.moments.append((self.seconds, self.at_its_end().test_accuracy()))
            with self.clients() as clients, self.timed():
                self.model.more_rounds(clients, n, "recover")

    def finish(self, until: tuple[int, int] | None = None) -> None:
        """What is left of the run (until so many rounds of a task are done), without those that are gone."""
        from federated.simulator import tasks

        with self.engine() as engine:
            tasks(self.session, engine, self.ledger, self.partition, until)

    def at_its_end(self) -> Stage:
        """Another stage, which has done from here what is left of the run; a method may learn in a task's end."""
        with tempfile.TemporaryDirectory() as folder:
            self.session.save(file := Path(folder) / "now.safetensors")
            then = Stage(self.args, self.session.run, file)
        then.partition = self.partition
        then.finish()
        return then

    def test_accuracy(self) -> float:
        """In %, on the test images of all tasks."""
        parts = [(t, self.dataset.task_indices(t, train=False)) for t in range(self.dataset.n_eval_tasks)]
        said = [self.predict(indices, t, False) for t, indices in parts]
        labels = torch.cat([self.dataset.eval_labels[indices] for _, indices in parts])
        return accuracy(np.concatenate(said), labels.cpu().numpy())

    def accuracy_of(self, who: Sequence[int], whole: Partition) -> float:
        """In %, on the clients' images of the last task, by the division with everybody; nan if they have none."""
        task = self.dataset.n_train_tasks - 1
        mine = torch.cat([whole.indices(task, u) for u in who])
        return accuracy(self.predict(mine, task, True), self.dataset.train_labels[mine].cpu().numpy())

    def relearn(self, who: Sequence[int], whole: Partition, goal: float, most: int) -> int | None:
        """Rounds of one epoch until clients that train alone have ``goal`` % (:meth:`accuracy_of`).

        None: more than ``most``, or they have no images to train on. Kept like predictions, as a model learns once.
        """
        file = self.keep / "relearning.json" if self.keep else None
        known = json.loads(file.read_text()) if file and file.exists() else {}
        key = json.dumps([sorted(who), round(goal, 6), most])
        if key not in known:
            known[key] = self._relearn(who, whole, goal, most)
            if file:
                with replacing(file) as temporary:
                    temporary.write_text(json.dumps(known))
        return known[key]

    def _relearn(self, who: Sequence[int], whole: Partition, goal: float, most: int) -> int | None:
        task, self.partition = self.dataset.n_train_tasks - 1, whole
        self.args.n_epochs, self.args.given = 1, {*self.args.given, "n_epochs"}
        self.model._current_task = task  # which goes on
        with self.engine() as engine:
            group = Clients([u for u in who if len(whole.indices(task, u))], engine, self.ledger, task)
            for done in range(most + 1 if len(group) else 0):
                if done > 0:
                    self.model.more_rounds(group, 1, "relearn")
                if self.accuracy_of(who, whole) >= goal:
                    return done
        return None

    @torch.no_grad()
    def predict(self, indices: torch.Tensor, task: int, train: bool) -> np.ndarray:
        """softmax over the classes seen (n, C) of training or test images of a task, with the test transform."""
        model, split = self.model, "train" if train else "test"
        loader = self.dataset.loader(indices, task, EVAL_BATCH, False, split=split, device=model.device)
        with evaluating(model):
            out = [model(x)[:, : model.n_seen_classes].float().softmax(1).cpu().numpy() for x, _ in loader]
        return np.concatenate(out) if out else np.empty((0, model.n_seen_classes), np.float32)

    def probabilities(self, indices: torch.Tensor, task: int, train: bool) -> np.ndarray:
        """:meth:`predict` of the model before it relearns, on all images of the task at once.

        The sets that are compared are parts of them.
        """
        everything = self.dataset.task_indices(task, train)
        if (task, train) not in self._said:
            file = self.keep / f"predictions-{'train' if train else 'test'}-{task}.npy" if self.keep else None
            if file and file.exists():
                self._said[task, train] = np.load(file)
            else:
                self._said[task, train] = self.predict(everything, task, train)
                if file:
                    with replacing(file) as temporary, open(temporary, "wb") as f:
                        np.save(f, self._said[task, train])
        return self._said[task, train][np.searchsorted(everything.numpy(), indices.numpy())]

    def attack_success(self) -> float:
        """Of a backdoor (datasets/utils/poison.py), in %."""
        from datasets.utils.poison import attack_success

        model = self.model
        with evaluating(model):
            return attack_success(lambda x: model(x)[:, : model.n_seen_classes].argmax(1), self.dataset, model.device)

    def solution(self) -> dict[str, torch.Tensor]:
        """What has been learnt, by name: the tensors of the network, of what is grafted on it, and task vectors."""
        out = {**dict(self.model.net.state_dict()), **self.model.trainable()}
        for t, tau in enumerate(getattr(self.model, "taus", ())):
            out |= {f"{t}.{n}": v for n, v in tau.items()}
        return {n: v.detach() for n, v in out.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


class Quiet:
    """In place of a run's folder, for what is only looked at: lines go to the run's log, files nowhere."""

    def __init__(self, run) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self.path, self.rounds = Path(self._scratch.name), []
        self.clock, self.seconds = {"train": 0.0, "train_cpu": 0.0, "total": 0.0}, lambda: 0.0
        self.say = lambda text="", screen=True: run.say(f"  {text}", screen=False)


class Silent(Session):
    """A session that measures nothing on its way."""

    def measure(self, task, step, extra=None) -> dict:
        return {}

    def report(self, row, task, what) -> None:
        pass
