"""The server's loop: for each task, what comes before the rounds, the rounds, what comes after them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from federated.clients import Clients, Ledger, participants
from federated.engines import make_engine
from federated.unlearning import request_point
from utils.conf import set_random_seed
from utils.loggers import Table
from utils.training import Session


def recorder(server, history: dict, when: tuple[int, int]) -> Callable:
    """Keeps a round in ``history``: what was sent to be trained, what each client made of it, its weight, and the
    running statistics that came with it."""
    start = {n: p.detach().cpu().clone() for n, p in server.trainable().items()}

    def watch(call: str, replies: list) -> None:
        if call == "local_update":
            replies = [server.expanded(r) for r in replies]
            history[when] = {
                "start": start,
                "updates": {r.client: {n: r[n].cpu() - t for n, t in start.items() if n in r} for r in replies},
                "weights": dict(zip([r.client for r in replies], server.client_weights(replies))),
                "running": {r.client: {n: r[n].cpu() for n in server.shared_buffers() if n in r} for r in replies},
            }

    return watch


class Untouched(dict):
    """The private state of clients that have done nothing yet, made for a client when it is asked for."""

    def __init__(self, make: Callable[[], dict]) -> None:
        super().__init__()
        self._make = make

    def get(self, client, default=None) -> dict:
        return self._make()


def resume(session: Session, worker, checkpoint) -> tuple[Ledger, dict]:
    """Take up a checkpoint (None: none yet): bytes so far and clients' private states, which ``session`` saves."""
    ledger, states = Ledger(), {}
    session.nets.append(worker.net)
    session.parts.update(ledger=ledger.state, clients=lambda: states)
    session.resume(checkpoint, {"clients": Untouched(worker.fresh_state)})
    if session.restored:
        ledger.load(session.restored["ledger"])
        states.update(session.restored["clients"])
    return ledger, states


def simulate(session: Session, worker, partition, checkpoint=None) -> None:
    """Run a federated experiment.

    With ``--unlearn_client`` the state at the moment of the request is kept, from which clients are forgotten
    (federated/unlearning.py); the run itself goes on with all.

    Args:
        session: the run; its model is the server. worker: the method's instance on the client side, over the same
            frozen weights. partition: who owns which samples. checkpoint: what to resume from.
    """
    ledger, states = resume(session, worker, checkpoint)
    session.traffic = lambda: (
        {"uplink_mb": ledger.uplink / 1e6, "downlink_mb": ledger.downlink / 1e6} if session.args.fl else {}
    )
    session.measure_random()
    with closing(make_engine(worker, partition, states, session.args, session.run.say)) as engine:
        tasks(session, engine, ledger, partition)


def tasks(session: Session, engine, ledger: Ledger, partition, until: tuple[int, int] | None = None) -> None:
    """The loop over tasks and rounds, from the session's cursor on; ``until`` so many rounds of a task are done."""
    args, dataset, server, run = session.args, session.dataset, session.model, session.run
    traffic = Table(run.path / "traffic.csv", ledger.rows)
    history = session.restored.get("history") or ({} if args.unlearn_history else None)
    if history is not None:
        session.parts["history"] = lambda: history
    request = request_point(args, dataset.n_train_tasks) if args.unlearn_client else None

    def group(ids, round_: int = -1, watch=None) -> Clients:
        def progress(replies, total, call):
            return session.bar(
                replies, total, f"task {task + 1} " + (call if round_ < 0 else f"round {round_ + 1} {call}")
            )

        return Clients(ids, engine, ledger, task, round_, progress, watch)

    # steps of a task: 0 before the rounds, 1 + r round r, then what comes after the rounds
    for task in range(session.cursor["task"], session.last_task):
        ids = [i for i, n in enumerate(partition.sizes(task)) if n > 0]
        while dataset.c_task < task:
            dataset.get_data_loaders()
        loss = server.last_loss if session.cursor["step"] > 1 else None  # of the last round, also when resumed

        def done(step: int, task=task) -> None:
            session.cursor = {"task": task, "step": step}
            traffic.update()
            if (task, step - 1) == request:
                session.save(run.request)
            session.boundary("round")

        if session.cursor["step"] == 0:
            with session.training():
                set_random_seed(args.seed, "server", task, "begin")
                server.meta_begin_task(dataset)
                server.begin_rounds(group(ids))
            done(1)
        for r in range(session.cursor["step"] - 1, args.num_comm_rounds):
            with session.training():
                set_random_seed(args.seed, "server", task, "round", r)
                watch = recorder(server, history, (task, r)) if history is not None else None
                server.round(group(participants(args, ids, task, r), r, watch), r)
                loss = server.last_loss
            if args.eval_every and (r + 1) % args.eval_every == 0 and r + 1 < args.num_comm_rounds:
                row = session.measure(task, r, {"loss": loss, **server.report(), **session.traffic()})
                session.report(row, task, f"round {r + 1}/{args.num_comm_rounds}")
            elif r + 1 < args.num_comm_rounds:
                run.say(
                    f"task {task + 1}/{dataset.n_train_tasks} round {r + 1}/{args.num_comm_rounds} | loss {loss:.4f}"
                    if loss is not None
                    else f"task {task + 1} round {r + 1}/{args.num_comm_rounds}"
                )
            done(r + 2)
            if (task, r + 1) == until:
                return
        with session.training():
            set_random_seed(args.seed, "server", task, "end")
            server.end_rounds(group(ids))
            server.meta_end_task(dataset)
        traffic.update()
        session.cursor = {"task": task + 1, "step": 0}
        session.report(
            session.measure(task, None, {"loss": loss, **server.report(), **session.traffic()}), task, "done"
        )
        session.boundary("task")
