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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from federated.stage import Stage
from unlearning import get_unlearner_class
from utils.args import UNLEARNING_FLAGS
from utils.errors import UserError
from utils.loggers import Run, write_csv
from utils.registry import scan
from utils.unlearning_metrics import auc, distance, figures, lira, log_odds, outage, report, same_mix, tpr_at

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
        asked = set()
    else:
        again = getattr(original.model, "REPLAYS", False)
        made = Stage(args, record, None if again else start_of(record))
        up, down, known = made.ledger.uplink, made.ledger.downlink, len(made.ledger)
        if again:  # who left first makes no difference
            made.replay(who, original)
        else:
            for step in request:
                made.forget(step)
        made.recover(args.recover_rounds, look=compare and args.unlearn_at == "end")
        messages = made.ledger.rows(known)
        asked = {r["client"] for r in messages}
        spent = {
            "rounds": rounds_of(messages, getattr(made.model, "TRAINING", ("local_update",))),
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
        if args.unlearn_at == "end":  # else what follows is not the others' recovery alone
            row["outage"] = outage([*made.moments, (spent["seconds"], row["TA"])], row["R_TA"])
    spent |= {"storage_mb": storage(original), "client_asked": int(not asked.isdisjoint(who))}
    row |= bound(original, who) | spent
    if args.relearn_rounds:
        row |= relearning(args, original, made, golds[0] if compare else None, who)
    return row


def rounds_of(rows: list[dict], training: Sequence[str]) -> int:
    """Rounds in rows of the ledger: for each call that trains, how often the busiest client was asked."""
    asked = Counter((r["call"], r["client"]) for r in rows)
    return sum(max((n for (call, _), n in asked.items() if call == name), default=0) for name in training)


def storage(original: Stage) -> float:
    """MB that the server had kept for the request: past updates, for ways that read them, or isolated vectors."""

    def size(kept) -> float:
        if isinstance(kept, dict):
            return sum(map(size, kept.values()))
        return kept.nbytes / 1e6 if isinstance(kept, torch.Tensor) else 0.0

    model = original.model
    if original.args.unlearn == "own":
        return size(model.stored)
    history = getattr(model, "_own_history", {}) if getattr(model, "NEEDS_HISTORY", False) else {}
    return size({when: kept for when, kept in history.items() if when < original.at})


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
