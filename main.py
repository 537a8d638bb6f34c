"""Herd's one command: parse, build, run. ``python main.py --model dolfin --dataset seq-digits --fl``"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin cost a shared machine dearly

from utils.args import parse_args
from utils.errors import ClientError, RunError, UserError


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


def find_checkpoint(args):
    """What ``--loadcheck`` points to: (run folder or None, checkpoint file or None, whether that run is finished)."""
    from pathlib import Path

    from utils.loggers import Run, is_finished

    if args.loadcheck is None:
        return None, None, False
    if args.loadcheck != "auto":
        path = Path(args.loadcheck)
        if not path.exists():
            raise UserError(f"--loadcheck: there is nothing at {path}; give a run folder, its checkpoint file, or auto")
        file = path / "checkpoint" / "last.safetensors" if path.is_dir() else path
        return (file.parent.parent if file.parent.name == "checkpoint" else None), file, False
    for path in Run.candidates(args):
        if is_finished(path, args):
            return path, None, True
        if (path / "checkpoint" / "last.safetensors").exists():
            return path, path / "checkpoint" / "last.safetensors", False
    return None, None, False


def run(args) -> int:
    """Carry out one run. Returns the exit code."""
    from datasets.utils.partition import Partition
    from federated.simulator import simulate
    from utils import checkpoints
    from utils.compare import print_run_table
    from utils.loggers import Run
    from utils.training import Interrupted, Session, check_identity, train_central

    folder, file, finished = find_checkpoint(args)
    if finished:
        print(f"already finished: {folder}")
        print_run_table(folder)
        return forget(args, Run(folder, args)) if args.unlearn_client else 0
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
    if not args.nowand:
        record.start_wandb()
    session = Session(args, dataset, model, record, fresh_net)
    status = "interrupted"
    try:
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
    finally:
        if session.under_way:
            session.write_files(status)
        record.close()
    if status != "interrupted":
        print_run_table(record.path)
        print(f"files: {record.path}")
    if status == "finished" and args.unlearn_client:
        return forget(args, Run(record.path, args))
    return 130 if status == "interrupted" else 0


def forget(args, record) -> int:
    """What clients ask for once a run is there (``--unlearn_client``). Returns the exit code."""
    from federated.unlearning import forget_clients
    from utils.training import Interrupted

    try:
        forget_clients(args, record)
    except Interrupted:
        record.say(f"stopped by Ctrl-C; go on with: {args.command} --loadcheck {record.path}")
        return 130
    finally:
        record.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_args(argv))
    except UserError as e:
        print("error:", *str(e).split(), file=sys.stderr)  # one line, whatever a library has put in it
        return 2
    except RunError as e:
        if isinstance(e, ClientError):  # a fault of the method's code, not of the user
            print(e.trace, file=sys.stderr)
        print("run failed:", *str(e).split(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has had enough; the run itself is on disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
