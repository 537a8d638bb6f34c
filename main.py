"""Herd's one command: parse, build, run. ``python main.py --model dolfin --dataset seq-digits --fl``

The same from Python: ``from main import run; run(model="dolfin", dataset="seq-digits", fl=True)["faa"]``.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin cost a shared machine dearly

from utils.args import parse_args
from utils.errors import Busy, ClientError, Interrupted, RunError, UserError


def build_network(args, dataset):
    """The network as it is before a method takes hold of it, on the CPU."""
    from backbones import get_backbone
    from utils.conf import set_random_seed

    set_random_seed(args.seed, "backbone")
    return get_backbone(args, dataset)


def build_method(args, dataset, net):
    """The method over a network. Whoever builds one, the server or a worker, makes the same draws."""
    from models import get_model_class
    from models.utils.continual_model import construct
    from models.utils.private_state import federate
    from utils.conf import set_random_seed

    cls = get_model_class(args.model)
    cls = federate(cls) if args.fl else cls
    if getattr(args, "unlearn", None) not in (None, "own"):
        from unlearning import unlearning

        cls = unlearning(cls, args.unlearn)
    set_random_seed(args.seed, "model")
    return construct(cls, net, dataset.get_loss(), args, dataset.get_transform(), dataset)


def build(args):
    """The data set, the network, the method (the server's half under --fl) and, where it is federated, its worker."""
    import torch

    from datasets import get_dataset
    from models import get_model_class
    from models.utils.federated_model import FederatedModel, share_backbone
    from utils.checkpoints import fresh_copy
    from utils.conf import get_device

    device = get_device(args.device)
    args.device = str(device)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    dataset = get_dataset(args)
    dataset.to(device)
    federated = issubclass(get_model_class(args.model), FederatedModel)
    if federated and not args.fl:  # trained centrally: one client, one round
        args.num_clients = args.num_comm_rounds = 1
        args.participation_rate, args.partition_mode = 1.0, "iid"
    net = build_network(args, dataset).to(device)
    fresh_net = fresh_copy(net)
    worker_net = share_backbone(net)
    model = build_method(args, dataset, net)
    worker = build_method(args, dataset, worker_net) if federated or args.fl else None
    return dataset, model, worker, fresh_net


def train(args, folder: Path | None, file: Path | None) -> tuple[Path, bool]:
    """Train and test, from the start or from a checkpoint file. Returns the run's folder, and whether it came to its
    end."""
    from datasets.utils.partition import Partition
    from federated.simulator import simulate
    from utils import checkpoints
    from utils.compare import print_run_table
    from utils.loggers import Run
    from utils.training import Session, check_identity, train_central

    checkpoint = checkpoints.read(file) if file else None
    if checkpoint is not None:
        check_identity(checkpoint[0], args)  # before anything is written to a folder that may be another run's
    dataset, model, worker, fresh_net = build(args)
    partition = Partition.make(dataset, args) if worker is not None else None
    record = Run(folder, args) if folder is not None else Run.create(args)
    record.say(
        f"{args.model} on {args.dataset}, {args.backbone}, seed {args.seed}, {args.device}"
        + (f", {args.num_clients} clients x {args.num_comm_rounds} rounds" if args.fl else "")
        + f" -> {record.path}"
    )
    record.write_args()
    if partition is not None:
        partition.save(record.path / "partition.npz")
    session = Session(args, dataset, model, record, fresh_net)
    status = "interrupted"
    try:
        record.start_loggers(len(checkpoint[0]["rounds"]) if checkpoint else 0)
        with session.catch_interrupts():
            if worker is not None:
                simulate(session, worker, partition, checkpoint)
            else:
                train_central(session, checkpoint)
        if getattr(args, "export_adapter", None):
            model.export(args.export_adapter)
        status = "finished" if session.cursor["task"] >= dataset.n_train_tasks else "stopped"
    except Interrupted:
        record.say(f"stopped by Ctrl-C; go on with: {args.command} --loadcheck {record.path}")
        raise
    finally:
        if session.under_way:
            session.write_files(status)
        record.close()
    print_run_table(record.path)
    print(f"files: {record.path}")
    return record.path, status == "finished"


def forget(args, folder: Path) -> None:
    """What clients ask for once a run is there (``--unlearn_client``)."""
    from federated.unlearning import forget_clients
    from utils.loggers import Run

    record = Run(folder, args)
    try:
        forget_clients(args, record)
    except Interrupted:
        record.say(f"stopped by Ctrl-C; go on with: {args.command} --loadcheck {record.path}")
        raise
    finally:
        record.close()


def execute(args) -> Path:
    """Carry out what the settings ask for; a run that is finished is not trained again. Returns the run's folder.

    Raises:
        UserError, RunError: it cannot be done, or goes wrong. Interrupted: Ctrl-C, after saving.
    """
    from utils.compare import print_run_table
    from utils.loggers import claimed, find_checkpoint

    with claimed(args):
        folder, file, finished = find_checkpoint(args)
        if finished:
            print(f"already finished: {folder}")
            print_run_table(folder)
        else:
            folder, finished = train(args, folder, file)
        if finished and args.unlearn_client:
            forget(args, folder)
    return folder


def run(quiet: bool = False, **settings) -> dict:
    """One run from Python: ``run(model="dolfin", dataset="seq-digits", fl=True, seed=0)``.

    Args:
        quiet: print nothing; log.txt in the run's folder tells.
        settings: the flags by name; lists for those that take several values, booleans for switches.

    Returns:
        The row of summary.csv, numbers as numbers (None where there is none); ``path``, the run's folder; and
        ``accuracy``, the matrices {"class-il": (T, T), "task-il": (T, T)} in %, nan where a task was not tested.

    Raises:
        UserError (a ValueError): what the command line would say, in one line. RunError: the run went wrong.
        KeyboardInterrupt: Ctrl-C; with ``loadcheck="auto"`` the same call goes on from where it stopped.
    """
    from utils.compare import read_run

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if quiet else nullcontext():
        try:
            return read_run(execute(parse_args(settings)))
        except Interrupted:
            raise KeyboardInterrupt from None


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0; 1 the run went wrong; 2 a mistake of the user's; 75 another process is at
    this run; 130 Ctrl-C."""
    try:
        execute(parse_args(argv))
        return 0
    except UserError as e:
        print("error:", e, file=sys.stderr)
        return 75 if isinstance(e, Busy) else 2
    except RunError as e:
        if isinstance(e, ClientError):  # a fault of the method's code, not of the user
            print(e.trace, file=sys.stderr)
        print("run failed:", e, file=sys.stderr)
        return 1
    except Interrupted:
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has had enough; the run itself is on disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
