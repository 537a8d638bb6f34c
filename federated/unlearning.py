"""Clients ask to be forgotten: train, request, unlearn, recover, evaluate.

``--unlearn_client`` makes a run keep its state at the moment of the request (``--unlearn_at``). Once the run is over,
each request starts from that state: the way to unlearn (``--unlearn``) acts, the others may train some rounds more
(``--recover_rounds``), and the rest of the run, if there is any, happens without the clients that left. The outcome V
is compared with the run itself (O) and, with ``--eval_retrain``, with the same command and --exclude_clients (R), which
is an ordinary run with a folder of its own and is done once. Rows go to unlearning.csv in the run's folder.

As settings of unlearning are no part of what names a run, ``--loadcheck auto`` makes the training happen once, whatever
is tried on it afterwards. Rows that are there are not made again.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from datasets.utils.partition import Partition
from federated.clients import Clients, Ledger
from federated.engines import make_engine
from unlearning import get_unlearner_class
from utils import checkpoints
from utils.args import UNLEARNING_FLAGS
from utils.conf import set_random_seed
from utils.errors import UserError
from utils.evaluate import EVAL_BATCH, evaluating
from utils.files import replacing
from utils.loggers import Run, write_csv
from utils.registry import scan
from utils.training import Session
from utils.unlearning_metrics import accuracy, auc, distance, figures, lira, log_odds, report, same_mix, tpr_at

# ---------------------------------------------------------------- what is asked for


def requests(args) -> list[list[list[int]]]:
    """``--unlearn_client``: a list of requests, each a list of steps that follow on each other, each a set of clients.

    ``3 7`` two requests; ``3+7`` one for both at once; ``3,7`` one for 3 and then, on what is left, for 7.

    Raises:
        UserError: nothing of the kind, or a client that there is not.
    """
    K, out = args.num_clients, []
    for text in args.unlearn_client:
        if text == "all":
            out += [[[u]] for u in range(K)]
            continue
        try:
            steps = [sorted({int(u) for u in step.split("+")}) for step in text.split(",")]
        except ValueError:
            raise UserError(
                f"--unlearn_client {text!r}: give numbers of clients (3 7: each in turn, 3+7: together, 3,7: one after "
                "the other), or all"
            ) from None
        everyone = [u for step in steps for u in step]
        odd = [u for u in everyone if not 0 <= u < K]
        if odd:
            raise UserError(f"--unlearn_client {text!r}: there is no client {odd[0]}, they are 0 to {K - 1}")
        if len(set(everyone)) < len(everyone):
            raise UserError(f"--unlearn_client {text!r}: a client can leave but once")
        if len(everyone) == K:
            raise UserError(f"--unlearn_client {text!r}: nobody would be left; name some of the {K} clients")
        out.append(steps)
    return out


def request_point(args, n_tasks: int) -> tuple[int, int]:
    """(task, rounds of it that are done) at the moment of the request.

    Raises:
        UserError: ``--unlearn_at`` is no such moment.
    """
    R = args.num_comm_rounds
    if args.unlearn_at == "end":
        return n_tasks - 1, R
    try:
        task, round_ = map(int, args.unlearn_at.split(":"))
    except ValueError:
        task = round_ = 0
    if not (1 <= task <= n_tasks and 1 <= round_ <= R):
        raise UserError(
            f"--unlearn_at {args.unlearn_at!r}: give end, or TASK:ROUND with a task of 1 to {n_tasks} and a round of 1 "
            f"to {R}"
        )
    return task - 1, round_


def check(args, cls: type) -> None:
    """Settings that do not go together, told before anything is trained.

    Raises:
        UserError: which.
    """
    if not args.fl:
        raise UserError("--unlearn_client is for clients: add --fl")
    if args.unlearn_client is None:
        raise UserError("--unlearn says how: say with --unlearn_client who is to be forgotten")
    ways = ", ".join(scan("unlearning"))
    own = getattr(cls, "UNLEARNS", False)
    if args.unlearn is None:
        if not own:
            raise UserError(f"--unlearn_client: {args.model} has no way of its own to forget; give --unlearn {ways}")
        args.unlearn = "own"
    if args.unlearn == "own" and not own:
        raise UserError(f"--unlearn own: {args.model} has no way of its own to forget; choose from {ways}")
    vectors = getattr(cls, "TASK_VECTORS", False)
    able = [way for way in scan("unlearning") if not vectors or get_unlearner_class(way).ON_TASK_VECTORS]
    if args.unlearn not in ("own", *able):
        raise UserError(
            f"--unlearn {args.unlearn} acts on a network's own weights and loss, and {args.model} trains vectors added "
            f"to a frozen network; choose from {', '.join((['own'] if own else []) + able)}"
        )
    if args.unlearn != "own" and get_unlearner_class(args.unlearn).NEEDS_HISTORY and not args.unlearn_history:
        raise UserError(f"--unlearn {args.unlearn} needs every client's past updates: train with --unlearn_history 1")
    if args.joint == 0 and args.stop_after is not None:
        raise UserError("--unlearn_client needs a whole run: leave out --stop_after")
    if args.exclude_clients:
        raise UserError("--unlearn_client and --exclude_clients: who takes no part has nothing to be forgotten")
    requests(args)


# ---------------------------------------------------------------- one model after another


class Stage:
    """A model in the making: built anew, brought to a checkpoint, taken on from there; nothing of the run is written.

    Args:
        args: of the run. run: its folder, for messages. checkpoint: file; None for a model that knows nothing yet.
        keep: folder for what the model says of all images, which does not change from one request to the next (O, R).

    Attributes:
        at: (task, rounds of it that were done) then. seconds: spent on unlearning and recovery.
    """

    def __init__(self, args, run, checkpoint: Path | None, keep: Path | None = None) -> None:
        import main
        from federated.simulator import Untouched

        self.keep = keep

        self.args = copy.deepcopy(args)
        self.args.unlearn_client, self.args.savecheck = None, "none"
        self.dataset, self.model, self.worker, fresh = main.build(self.args)
        self.partition = Partition.make(self.dataset, self.args)
        self.session = Silent(self.args, self.dataset, self.model, Quiet(run), fresh)
        self.ledger, self.states = Ledger(), {}
        self.session.nets.append(self.worker.net)
        stored = checkpoints.read(checkpoint) if checkpoint else None
        self.session.resume(stored, {"clients": Untouched(self.worker.fresh_state)})
        self.session.traffic = dict
        if stored is not None:
            self.ledger.load(self.session.restored["ledger"])
            self.states.update(self.session.restored["clients"])
        history = self.session.restored.get("history")
        if history is not None:
            self.model._own_history = history
        self.seconds, self.at = 0.0, (self.session.cursor["task"], self.session.cursor["step"] - 1)
        self._said: dict[tuple[int, bool], np.ndarray] = {}

    def engine(self):
        """Where those of the division that is in force now train."""
        return closing(make_engine(self.worker, self.partition, self.states, self.args, self.session.run.say))

    @contextmanager
    def clients(self) -> Iterator[Clients]:
        """Those that own samples of the current task; the time they take counts."""
        began, task = time.perf_counter(), self.session.cursor["task"]
        with self.engine() as engine:
            yield Clients([i for i, n in enumerate(self.partition.sizes(task)) if n > 0], engine, self.ledger, task)
        self.seconds += time.perf_counter() - began

    def forget(self, who: Sequence[int]) -> None:
        """The way to unlearn, then the clients are gone."""
        while self.dataset.c_task < self.session.cursor["task"]:
            self.dataset.get_data_loaders()
        set_random_seed(self.args.seed, "unlearn", *who)
        with self.clients() as clients:
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
        began = time.perf_counter()
        self.args.unlearn_history = 0
        if hasattr(original.model, "_own_history"):
            known = original.model._own_history  # to which the rest of the run has added
            self.model._own_history = {when: kept for when, kept in known.items() if when < original.at}
        self.model.plan(list(who))
        self.partition = self.partition.without(who)
        self.finish(original.at)
        self.seconds += time.perf_counter() - began

    def recover(self, rounds: int) -> None:
        """Rounds of those that are left."""
        with self.clients() as clients:
            self.model.more_rounds(clients, rounds, "recover")

    def finish(self, until: tuple[int, int] | None = None) -> None:
        """What is left of the run (until so many rounds of a task are done), without those that are gone."""
        from federated.simulator import tasks

        with self.engine() as engine:
            tasks(self.session, engine, self.ledger, self.partition, until)

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
        self.clock = {"train": 0.0, "train_cpu": 0.0, "total": 0.0}
        self.say = lambda text="", screen=True: run.say(f"  {text}", screen=False)


class Silent(Session):
    """A session that measures nothing on its way."""

    def measure(self, task, step, extra=None) -> dict:
        return {}

    def report(self, row, task, what) -> None:
        pass


# ---------------------------------------------------------------- the comparison


def start_of(record) -> Path:
    """The state of a run at the moment of the request.

    Raises:
        UserError: it was not kept.
    """
    if record.request.exists():
        return record.request
    raise UserError(
        f"{record.path} has not kept its state at the moment of the request: run it again with --unlearn_client, and "
        "without --loadcheck"
    )


def samples(stage: Stage, whole, who: Sequence[int], n_tasks: int, seed: int) -> dict[str, list[tuple]]:
    """The four sets of utils/unlearning_metrics.py: {name: [(task, indices, from the training set?)]}."""
    dataset, K = stage.dataset, whole.n_clients
    mine = [(t, torch.cat([whole.indices(t, u) for u in who]), True) for t in range(n_tasks)]
    others = [(t, torch.cat([whole.indices(t, k) for k in range(K) if k not in who]), True) for t in range(n_tasks)]
    test = [(s, dataset.task_indices(s, train=False), False) for s in range(dataset.n_eval_tasks)]
    apart = dataset.SETTING == "domain-il" and not stage.args.joint  # a class of one domain is not that of another

    def kinds(parts, labels) -> np.ndarray:
        """What shall be mixed alike, of each sample: its class, and its domain."""
        return np.concatenate([labels[i].cpu().numpy() + (dataset.N_CLASSES * t if apart else 0) for t, i, _ in parts])

    pick = same_mix(kinds(mine, dataset.train_labels), kinds(test, dataset.eval_labels), np.random.default_rng(seed))
    ends, unseen = np.cumsum([len(i) for _, i, _ in test]), []
    for (s, i, _), end in zip(test, ends):
        here = pick[(pick >= end - len(i)) & (pick < end)] - (end - len(i))
        unseen.append((s, i[torch.from_numpy(here)], False))
    return {"forget": mine, "retain": others, "forget_test": unseen, "test": test}


def outputs(stage: Stage, sets: dict[str, list[tuple]]) -> tuple[dict, dict]:
    """({set: probabilities (N, C)}, {set: labels (N,)}) of a model."""
    p, y = {}, {}
    for name, parts in sets.items():
        p[name] = np.concatenate([stage.probabilities(i, t, train) for t, i, train in parts])
        labels = [
            (stage.dataset.train_labels if train else stage.dataset.eval_labels)[i].cpu().numpy()
            for t, i, train in parts
        ]
        y[name] = np.concatenate(labels)
    return p, y


def with_settings(args, who: Sequence[int], seed: int):
    """The settings of the run without the clients; with another seed the division stays."""
    new = copy.deepcopy(args)
    change = {"exclude_clients": list(who), "seed": seed, "unlearn": None, "unlearn_client": None}
    if seed != args.seed and args.partition_seed is None:
        change["partition_seed"] = args.seed
    vars(new).update(change, savecheck="task", loadcheck="auto")
    new.asked = {**args.asked, **change}
    return new


def retrained(args) -> tuple[Path, dict]:
    """A run of :func:`with_settings`, made if it is not there: (its checkpoint, its summary)."""
    import main

    main.execute(args)
    for folder in Run.candidates(args):
        checkpoint = folder / "checkpoint" / "last.safetensors"
        if checkpoint.exists():
            with open(folder / "summary.csv", newline="") as f:
                return checkpoint, next(csv.DictReader(f))
    raise UserError(f"{Run.candidates(args)[0]} is finished, but has kept no model to compare with: delete that folder")


def settings_key(args, request) -> str:
    """What names a row: how and whom."""
    said = {k: getattr(args, k, None) for k in args.unlearning_flags if k not in ("unlearn_client", "retrain_seeds")}
    text = json.dumps({**said, "who": request}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def forget_clients(args, record) -> None:
    """Carry out every request of ``--unlearn_client`` on a run that is over."""
    from utils.report_plots import plot_unlearning

    file = record.path / "unlearning.csv"
    rows: list[dict] = []
    if file.exists():
        with open(file, newline="") as f:
            rows = list(csv.DictReader(f))
    asked = {settings_key(args, request): request for request in requests(args)}
    for row in rows:
        if row["key"] in asked:
            record.say(f"already there: {args.unlearn}, client {request_name(asked.pop(row['key']))}")
    if not asked:
        return
    original = Stage(args, record, start_of(record), keep=record.path)
    if original.at != request_point(args, original.dataset.n_train_tasks):
        raise UserError(
            f"--unlearn_at {args.unlearn_at}: {record.path} has kept its state after task {original.at[0] + 1}, round "
            f"{original.at[1]}; use that, or train a run of its own"
        )
    original.finish()
    for key, request in asked.items():
        row = forget_one(args, record, request, original)
        rows.append({"key": key, **row})
        write_csv(file, rows)
        plot_unlearning(rows, record.path / "unlearning.png")
        say_row(record, row)


def request_name(request: list[list[int]]) -> str:
    """As it is written on the command line."""
    return ",".join("+".join(map(str, step)) for step in request)


def forget_one(args, record, request, original: Stage) -> dict:
    """One request: a row of unlearning.csv."""
    who, golds, summaries = [u for step in request for u in step], [], []
    compare = bool(args.eval_retrain)
    for s in range(args.retrain_seeds if compare else int(args.unlearn == "retrain")):
        again = with_settings(args, who, args.seed + s)
        checkpoint, summary = retrained(again)
        golds.append(Stage(again, record, checkpoint, keep=checkpoint.parents[1]))
        summaries.append(summary)
    if args.unlearn == "retrain":
        made = golds[0]
        spent = {
            "rounds": args.num_comm_rounds * original.dataset.n_train_tasks,
            "mb_up": float(summaries[0]["uplink_mb"]),
            "mb_down": float(summaries[0]["downlink_mb"]),
            "seconds": float(summaries[0]["train_seconds"]),
        }
    else:
        again = getattr(original.model, "REPLAYS", False)
        made = Stage(args, record, None if again else start_of(record))
        up, down, known = made.ledger.uplink, made.ledger.downlink, len(made.ledger)
        if again:  # who left first makes no difference
            made.replay(who, original)
        else:
            for step in request:
                made.forget(step)
        made.recover(args.recover_rounds)
        spent = {
            "rounds": rounds_of(made.ledger.rows(known), getattr(made.model, "TRAINING", ("local_update",))),
            "mb_up": (made.ledger.uplink - up) / 1e6,
            "mb_down": (made.ledger.downlink - down) / 1e6,
            "seconds": made.seconds,
        }
        made.finish()
    sets = samples(original, original.partition, who, original.dataset.n_train_tasks, args.seed)
    (V, y), (O, _) = outputs(made, sets), outputs(original, sets)  # noqa: E741 - the paper's names
    Rs = [outputs(stage, sets)[0] for stage in golds] if compare else []
    row = {
        "method": args.model if args.unlearn == "own" else args.unlearn,
        "model": args.model,
        "regime": getattr(args, "regime", None),
        "dataset": args.dataset,
        "K": args.num_clients,
        "beta": args.distribution_alpha if args.partition_mode == "distribution" else None,
        "T": args.num_comm_rounds,
        "E": args.n_epochs,
        "seed": args.seed,
        "client": request_name(request),
        "n_forget": len(y["forget"]),
        "at": args.unlearn_at,
        "recover_rounds": args.recover_rounds,
        **{k: getattr(args, k) for k in args.unlearning_flags if k not in UNLEARNING_FLAGS},
        **report(V, y, Rs[0] if Rs else None, args.seed),
        **{f"O_{k}": v for k, v in figures(O, y).items()},
    }
    if args.poison == "backdoor":
        row |= {"ASR": made.attack_success(), "O_ASR": original.attack_success()}
        row |= {"R_ASR": golds[0].attack_success()} if Rs else {}
    if Rs:
        row |= {f"R_{k}": v for k, v in figures(Rs[0], y).items()}
        row |= distances(made, original, golds) | shadows(V, y, Rs[1:])
    row |= bound(original, who) | spent
    if args.relearn_rounds:
        row |= relearning(args, original, made, golds[0] if compare else None, who)
    return row


def rounds_of(rows: list[dict], training: Sequence[str]) -> int:
    """Rounds in rows of the ledger: for each call that trains, how often the busiest client was asked."""
    asked = Counter((r["call"], r["client"]) for r in rows)
    return sum(max((n for (call, _), n in asked.items() if call == name), default=0) for name in training)


def bound(original: Stage, who: Sequence[int]) -> dict:
    """What the clients can have moved the model by in the current task, for convex losses (unlearning/sifu.py)."""
    from unlearning.sifu import sensitivity

    history, (task, done) = getattr(original.model, "_own_history", {}), original.at
    rounds = [kept for (t, r), kept in sorted(history.items()) if t == task and r < done]
    return {"bound": sensitivity(rounds, list(who))[-1]} if rounds else {}


def relearning(args, original: Stage, made: Stage, gold: Stage | None, who: Sequence[int]) -> dict:
    """relearn, R_relearn: rounds in which the clients bring V and R to what O has on their images of the last task.

    The fewer V needs beside R, the more of them it has kept. Changes both models: nothing is measured afterwards.
    """
    whole = original.partition
    goal = original.accuracy_of(who, whole)
    found = {"relearn": made.relearn(who, whole, goal, args.relearn_rounds)}
    if gold is made:  # the way is retraining itself
        found["R_relearn"] = found["relearn"]
    elif gold is not None:
        found["R_relearn"] = gold.relearn(who, whole, goal, args.relearn_rounds)
    return found


def distances(made: Stage, original: Stage, golds: list[Stage]) -> dict:
    """relD = |V - R| / |O - R|, below 1 is progress; floorD, the same of R with another seed."""
    r, whole = golds[0].solution(), distance(original.solution(), golds[0].solution())
    seeds = [distance(r, s.solution()) for s in golds[1:]]
    unit = max(whole, 1e-30)
    return {"relD": distance(made.solution(), r) / unit, "floorD": float(np.mean(seeds)) / unit if seeds else None}


def shadows(V: dict, y: dict, Rs: list[dict]) -> dict:
    """Offline LiRA with the other seeds' retrained models as those that have not seen the client."""
    if not Rs:
        return {}
    inside, outside = (
        lira(log_odds(V[s], y[s]), [log_odds(p[s], y[s]) for p in Rs]) for s in ("forget", "forget_test")
    )
    return {"lira_auc": auc(inside, outside), "lira_tpr01": tpr_at(inside, outside)}


def say_row(record, row: dict) -> None:
    """The row in a line."""
    parts = []
    for k, what in (("FA", "forgotten"), ("RA", "retained"), ("TA", "test")):
        gold = f", retrained {row[f'R_{k}']:.1f}" if f"R_{k}" in row else ""
        parts.append(f"{what} {row[k]:.1f} (all {row[f'O_{k}']:.1f}{gold})")
    record.say(
        f"{row['method']} without client {row['client']}: {', '.join(parts)} | {row['rounds']} rounds, "
        f"up {row['mb_up']:.2f} MB, {row['seconds']:.1f} s"
    )
