"""The command line: Mammoth's flag names, fed-mammoth's for what is federated, then Herd's own.

Nothing here imports PyTorch, so ``--help`` answers at once. Settings come from four places; the later wins:
flag defaults < data set (its class, then ``--dataset_config``) < model config (``models/config/<model>.yaml``:
section ``default``, then the one ``--model_config`` names) < command line. Mammoth's own config files are read too:
``--model_config best`` takes the section of the data set, and in it that of the buffer size; files of data sets may
change their tasks and transforms (``datasets/utils/configured.py``). Configs are turned into arguments and put
in front of the user's, so every value, wherever it comes from, passes the same checks.
"""

from __future__ import annotations

import argparse
import inspect
import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

from utils import binary_to_boolean_type
from utils.errors import UserError, nearest
from utils.registry import ROOT, find, normal, scan

RAY_FLAGS = ("num_gpus", "workers", "ray_address", "allow_missing_clients")
# of what happens to a trained model when clients ask to be forgotten
UNLEARNING_FLAGS = (
    "unlearn",
    "unlearn_client",
    "unlearn_at",
    "recover_rounds",
    "eval_retrain",
    "retrain_seeds",
    "relearn_rounds",
)
FEDERATED_FLAGS = (
    "num_clients",
    "num_comm_rounds",
    "participation_rate",
    "distribution_alpha",
    "partition_mode",
    "class_quantity",
    "partition_seed",
    "avg_type",
    "engine",
    "clients_per_batch",
    *RAY_FLAGS,
    "exclude_clients",
    "unlearn_history",
    "poison",
    "poison_clients",
    "poison_share",
    *UNLEARNING_FLAGS,
)


class HerdParser(ArgumentParser):
    """An ArgumentParser whose errors are one line, exit code 2 and no usage dump."""

    def error(self, message: str):
        raise UserError(message.replace("argument ", "", 1))


def number(kind: type, low: float = -math.inf, high: float = math.inf, open_low: bool = False):
    """An argparse type: an int or a float within ``[low, high]`` (``(low, high]`` with ``open_low``), never nan."""
    span = f"{'above' if open_low else 'at least'} {low:g}" if low > -math.inf else ""
    span += (" and " if span else "") + f"at most {high:g}" if high < math.inf else ""
    wanted = f"{'a whole number' if kind is int else 'a number'}{' ' + span if span else ''}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not (low <= value <= high) or (open_low and value == low) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is out of range: give {wanted}")
        return value

    return parse


def flag01(text: str) -> int:
    """0 or 1 from ``0/1/true/false``."""
    return int(binary_to_boolean_type(text))


def add_switch(parser, *names: str, default: int = 0, help: str | None = None) -> None:
    """A flag that is 0 or 1; ``--name`` alone is 1."""
    parser.add_argument(*names, type=flag01, nargs="?", const=1, default=default, help=help)


def add_general_args(parser: ArgumentParser) -> None:
    """The flags every run has."""
    positive, count = number(int, 1), number(int, 0)
    g = parser.add_argument_group("experiment")
    g.add_argument("--model", required=True, help="method: " + ", ".join(scan("models")))
    g.add_argument("--dataset", required=True, help="benchmark: " + ", ".join(scan("datasets")))
    g.add_argument(
        "--backbone",
        "--network",
        default=None,
        help="network; default: the data set's. One of " + ", ".join(scan("backbones")),
    )
    g.add_argument("--fl", action="store_true", help="federated: clients, rounds and a server instead of one trainer")
    g.add_argument("--model_config", "--preset", default="default", help="section of models/config/<model>.yaml to use")
    g.add_argument("--dataset_config", default=None, help="name of datasets/configs/<dataset>/<name>.yaml")
    g.add_argument("--seed", type=count, default=0, help="seeds everything random")
    add_switch(g, "--joint", help="one task with all classes (upper bound)")
    add_switch(g, "--permute_classes", help="random class order, by the seed")
    g.add_argument(
        "--validation",
        type=number(float, 0, 99, open_low=True),
        default=None,
        help="percentage of the training set that replaces the test set (to choose hyper-parameters)",
    )
    g = parser.add_argument_group("optimisation")
    g.add_argument("--n_epochs", "--num_epochs", type=count, default=1, help="epochs per task; under --fl per round")
    g.add_argument("--batch_size", type=positive, default=32)
    g.add_argument("--lr", type=number(float, 0, 1e38), default=0.03, help="learning rate")
    g.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd")
    g.add_argument("--optim_wd", "--wd_reg", type=number(float, 0), default=0.0, help="weight decay")
    g.add_argument("--optim_mom", type=number(float, 0, 1), default=0.0, help="momentum (sgd)")
    add_switch(g, "--optim_nesterov")
    g.add_argument(
        "--clip_grad", type=number(float, 0, open_low=True), default=None, help="largest norm of the gradient"
    )
    g.add_argument(
        "--lr_scheduler",
        choices=("none", "multisteplr", "cosine"),
        type=str.lower,
        default="none",
        help="per epoch, restarted for each task (central) or round (--fl)",
    )
    g.add_argument("--lr_milestones", type=positive, nargs="+", default=[35, 45], help="epochs, for multisteplr")
    g.add_argument("--sched_multistep_lr_gamma", type=number(float, 0, 1), default=0.1)
    g = parser.add_argument_group("federated (with --fl)")
    g.add_argument("--num_clients", type=positive, default=10)
    g.add_argument("--num_comm_rounds", type=positive, default=5, help="communication rounds per task")
    g.add_argument(
        "--participation_rate",
        type=number(float, 0, 1, open_low=True),
        default=1.0,
        help="share of the clients drawn in each round",
    )
    g.add_argument(
        "--partition_mode",
        choices=("distribution", "quantity", "iid"),
        default="distribution",
        help="distribution: Dirichlet over clients for each class; quantity: a fixed number of classes per client",
    )
    g.add_argument(
        "--distribution_alpha",
        "--beta",
        type=number(float, 0, open_low=True),
        default=0.5,
        help="concentration of the Dirichlet; small is more skewed",
    )
    g.add_argument("--class_quantity", type=positive, default=2, help="classes per client and task (quantity)")
    g.add_argument("--partition_seed", type=count, default=None, help="seed of the partition; default: --seed")
    g.add_argument(
        "--avg_type",
        choices=("weighted", "uniform"),
        default="weighted",
        help="weights of the server's mean: samples of the client, or equal",
    )
    g.add_argument(
        "--engine",
        choices=("serial", "batched", "ray"),
        default="serial",
        help="clients in turn, many in one forward and backward, or over the worker processes of Ray",
    )
    g.add_argument(
        "--clients_per_batch",
        type=positive,
        default=None,
        help="clients stacked (batched: default as many as memory allows; ray: default 1, each worker in turn)",
    )
    g.add_argument("--workers", type=positive, default=None, help="processes (ray); default: a GPU or two CPUs each")
    g.add_argument(
        "--num_gpus",
        type=number(float, 0),
        default=None,
        help="GPUs shared by the workers (ray); default: all there are, 0 with --device cpu",
    )
    g.add_argument("--ray_address", default=None, help="a running Ray cluster (auto, host:port); default: start one")
    add_switch(
        g,
        "--allow_missing_clients",
        help="go on with a round without clients whose worker was lost again and again (ray)",
    )
    g = parser.add_argument_group("unlearning (with --fl)")
    g.add_argument(
        "--unlearn_client",
        nargs="+",
        default=None,
        metavar="WHO",
        help="clients that ask to be forgotten: 3 7 each in turn from the same model, 3+7 together, 3,7 one after the "
        "other, all: every client in turn",
    )
    g.add_argument(
        "--unlearn", default=None, help="how: own (the method's), " + ", ".join(scan("unlearning")) + "; default: own"
    )
    g.add_argument(
        "--unlearn_at", default="end", help="when: end, or TASK:ROUND, counted from 1, after which training goes on"
    )
    add_switch(
        g, "--unlearn_history", help="1: the server keeps every client's updates, which some ways to unlearn need"
    )
    g.add_argument("--recover_rounds", type=count, default=0, help="rounds of the others after unlearning")
    add_switch(g, "--eval_retrain", help="1: train without the clients from the start, once, and compare")
    g.add_argument("--retrain_seeds", type=positive, default=1, help="so many times, for the noise between seeds")
    g.add_argument(
        "--relearn_rounds",
        type=count,
        default=0,
        help="at most so many epochs alone bring the clients back to what they had: how many are needed (0: not asked)",
    )
    g.add_argument(
        "--exclude_clients", type=count, nargs="+", default=None, help="clients that take no part from the start"
    )
    g.add_argument(
        "--poison",
        choices=("backdoor", "labels"),
        default=None,
        help="what some clients' data are spoilt by: a trigger with a label of its own, or labels off by one",
    )
    g.add_argument("--poison_clients", type=count, nargs="+", default=None, help="whose data are spoilt")
    g.add_argument(
        "--poison_share", type=number(float, 0, 1), default=0.8, help="share of their images that get the trigger"
    )
    g = parser.add_argument_group("run")
    g.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the network's forward and backward pass; weights, losses and statistics stay in float32",
    )
    add_switch(g, "--compile", help="torch.compile the network")
    g.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: the best there is")
    g.add_argument("--num_threads", type=number(int, 1, 1024), default=None, help="CPU threads of PyTorch")
    g.add_argument("--base_path", default="./data/", help="folder of the data sets")
    g.add_argument("--results_path", default="./results/", help="folder of the results")
    g.add_argument(
        "--savecheck",
        choices=("none", "task", "round"),
        default="none",
        help="write a checkpoint after every task, or every round (--fl) or epoch (central)",
    )
    g.add_argument(
        "--loadcheck",
        default=None,
        help="run folder or checkpoint to go on from; auto: the run with the same "
        "settings under --results_path, if there is one",
    )
    g.add_argument("--eval_every", type=count, default=0, help="also evaluate every this many rounds (--fl) or epochs")
    add_switch(g, "--enable_other_metrics", help="also test on tasks not seen yet, which forward transfer needs")
    add_switch(
        g,
        "--measure_federated_bias",
        help="with --fl: test every client's own model before it is merged, on the task's classes",
    )
    add_switch(
        g,
        "--measure_bias_source",
        help="after each task: the bias that is left with balanced classifiers on the network's features",
    )
    add_switch(
        g,
        "--measure_spikes",
        help="after each task: firing rate, operations, energy; accuracy with 1, 2, 4 and 8 time steps; logit drift",
    )
    add_switch(g, "--plot_spikes", help="after each task: spikes-<task>.png")
    g.add_argument("--stop_after", type=positive, default=None, help="stop after this many tasks")
    add_switch(g, "--debug_mode", help="a few batches per epoch only")
    add_switch(g, "--nowand", default=1, help="0: log to Weights & Biases as well")
    g.add_argument("--wandb_project", default="herd")
    g.add_argument("--wandb_entity", default=None, help="team or user; default: wandb's own")
    g.add_argument("--wandb_mode", choices=("online", "offline"), default=None, help="default: wandb's own, online")
    add_switch(g, "--tensorboard", help="1: event files in the run's folder as well")
    g.add_argument("--notes", default=None, help="free text, kept in args.yaml")


def add_rehearsal_args(parser: ArgumentParser) -> None:
    """Mammoth's flags of methods with a replay buffer."""
    g = parser.add_argument_group("rehearsal")
    g.add_argument("--buffer_size", type=number(int, 1), default=200, help="samples kept (per client under --fl)")
    g.add_argument(
        "--minibatch_size", type=number(int, 1), default=None, help="replayed per step; default: --batch_size"
    )


def add_management_args(parser: ArgumentParser) -> None:
    """Part of old Mammoth method files; the general flags already hold these."""


def add_experiment_args(parser: ArgumentParser) -> None:
    """Part of old Mammoth method files; the general flags already hold these."""


def add_method_args(cls: type, parser: ArgumentParser) -> None:
    """Add the method's own flags. Mammoth has had two styles: ``get_parser(parser)`` and ``get_parser()``."""
    get = getattr(cls, "get_parser", None)
    if get is None:
        return
    known = set(parser._option_string_actions)
    group = parser.add_argument_group(f"method {cls.NAME}")
    if inspect.signature(get).parameters:
        before = list(parser._optionals._group_actions)
        get(parser)
        for action in [a for a in parser._optionals._group_actions if a not in before]:  # list them under the method
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
        return
    own = get()
    for action in own._actions:
        if not known.intersection(action.option_strings) and action.option_strings:
            group._add_action(action)
    parser.set_defaults(**own._defaults)


def _as_argv(settings: dict, parser: ArgumentParser, source: str | None) -> list[str]:
    """Settings as command-line arguments, so that they pass the same checks.

    Args:
        source: the config file they come from, for messages; None: the user, whose unknown flags are met later.
    """
    argv = []
    for key, value in settings.items():
        action = parser._option_string_actions.get(f"--{key}")
        if action is None and source is not None:
            flags = [o[2:] for o in parser._option_string_actions if o.startswith("--")]
            raise UserError(f"{source}: unknown setting {key!r}: {nearest(str(key), flags)}")
        if isinstance(action, argparse._StoreTrueAction):
            argv += [f"--{key}"] if value else []
        elif isinstance(value, list | tuple):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{key}={int(value) if isinstance(value, bool) else value}")
    return argv


def _read_yaml(file: Path) -> dict:
    import yaml

    try:
        data = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as e:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold a mapping of settings")
    return data


def _pick(section: dict, dataset: str, fl: bool, buffer_size: str = "") -> dict:
    """Flatten a config section: plain keys, then those under ``fl`` or ``central``, then those of the data set, then
    those of the buffer size.

    Raises:
        UserError: there are settings by buffer size, but none for this one.
    """
    section = _flat_backbone(section)
    chosen = {k: v for k, v in section.items() if not isinstance(v, dict)}
    nested = {str(k): v for k, v in section.items() if isinstance(v, dict)}
    sizes = {k: v for k, v in nested.items() if k.isdigit()}
    for key, value in nested.items():
        if key == ("fl" if fl else "central"):
            chosen.update(_pick(value, dataset, fl, buffer_size))
    for key, value in nested.items():
        if normal(key) == normal(dataset):
            chosen.update(_pick(value, dataset, fl, buffer_size))
    if sizes and buffer_size not in sizes:
        raise UserError(
            f"--buffer_size {buffer_size or 'is not a flag of this method'}: the config file has settings for "
            f"{', '.join(sizes)}: choose one of them, or leave out --model_config"
        )
    if sizes:
        chosen.update(_pick(sizes[buffer_size], dataset, fl, buffer_size))
    return chosen


def _flat_backbone(settings: dict) -> dict:
    """Mammoth's ``backbone: {type: vit, args: {...}}`` as flags, without the number of classes, which is the data
    set's to say."""
    backbone = settings.get("backbone")
    if not isinstance(backbone, dict):
        return settings
    own = {k: v for k, v in (backbone.get("args") or {}).items() if k not in ("nclasses", "num_classes")}
    return {**settings, "backbone": backbone.get("type"), **own}


def _config_file(folder: Path, name: str) -> Path:
    """The file of that name, or one whose name differs in ``-`` and ``_`` alone."""
    return next((f for f in sorted(folder.glob("*.yaml")) if normal(f.stem) == normal(name)), folder / f"{name}.yaml")


def model_config(model: str, dataset: str, name: str, fl: bool, buffer_size: str = "") -> dict:
    """Settings of ``models/config/<model>.yaml``: section ``default`` overlaid by the section ``name``.

    In Mammoth's files the best settings are in sections named after data sets, which ``best`` takes as well.

    Raises:
        UserError: no such section (the message lists those there are).
    """
    file = _config_file(ROOT / "models" / "config", model)
    data = _read_yaml(file) if file.exists() else {}
    settings = _pick(data.get("default") or {}, dataset, fl, buffer_size)
    if name != "default":
        best = {k: v for k, v in data.items() if name == "best" and normal(str(k)) == normal(dataset)}
        if name not in data and not best:
            have = ", ".join(["default", *[str(k) for k in data if k != "default"]])
            nor = f", nor settings for {dataset}" if name == "best" else ""
            raise UserError(f"--model_config {name!r}: {file.name} has no such section{nor}: choose from {have}")
        section = {**(data.get(name) or {}), **best}
        covered = [k for k, v in section.items() if isinstance(v, dict) and k not in ("fl", "central")]
        if name.startswith("paper") and covered and normal(dataset) not in map(normal, covered):
            raise UserError(
                f"--model_config {name}: {file.name} has no published settings for {dataset!r} in that section, "
                f"only for {', '.join(covered)}"
            )
        settings.update(_pick(section, dataset, fl, buffer_size))
    if normal(str(settings.pop("model", model))) != normal(model):  # Mammoth's files say it
        raise UserError(f"{file} is of another model than {model!r}")
    return settings


def dataset_config(dataset: str, name: str | None) -> dict:
    """Settings of ``datasets/configs/<dataset>/<name>.yaml``."""
    if name is None:
        return {}
    folder = ROOT / "datasets" / "configs" / normal(dataset)
    file = _config_file(folder, name)
    if not file.exists():
        have = ", ".join(f.stem for f in sorted(folder.glob("*.yaml"))) or "none"
        raise UserError(f"--dataset_config {name!r}: there is no {file.relative_to(ROOT)}: those there are: {have}")
    return _flat_backbone(_read_yaml(file))


def _attributes(data_cls: type, settings: dict) -> tuple[dict, dict]:
    """(attributes of the data set, flags) of a ``--dataset_config`` file, checked as far as its class allows."""
    if not settings:
        return {}, {}
    from datasets.utils import configured

    attributes, flags = configured.split(settings)
    configured.division(data_cls, attributes)
    configured.appearance(data_cls, attributes)
    return attributes, flags


def _peek(argv: list[str], flag: str, *aliases: str) -> str | None:
    """The value of one flag before the full parser is known."""
    value = None
    for i, arg in enumerate(argv):
        for name in (flag, *aliases):
            if arg == name and i + 1 < len(argv):
                value = argv[i + 1]
            elif arg.startswith(name + "="):
                value = arg.split("=", 1)[1]
    return value


def parse_args(argv: list[str] | dict | None = None) -> Namespace:
    """Parse the command line into the resolved settings of a run.

    Args:
        argv: arguments (default: the process's), or settings by flag name: lists for flags that take several values,
            booleans for switches, None for what is not given.

    Returns:
        Namespace with every flag of the run, plus ``given`` (names of flags the user typed) and ``command``.

    Raises:
        UserError: anything wrong with the flags, in one line.
    """
    settings = argv if isinstance(argv, dict) else None
    if settings is not None:  # for now; in full as soon as the parser knows what is a switch
        argv = ["--fl"] if settings.get("fl") else []
        argv += [f"--{k}={v}" for k, v in settings.items() if k != "fl" and v is not None]
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HerdParser(
        prog="main.py",
        allow_abbrev=False,
        conflict_handler="resolve",
        description="Herd: continual, federated, spiking and merging methods under one command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_general_args(parser)
    helping = any(a in ("-h", "--help") for a in argv)
    model, dataset = _peek(argv, "--model"), _peek(argv, "--dataset")
    if helping and model is None:
        parser.parse_args(["--help"])
    for flag, value, package in (("--model", model, "models"), ("--dataset", dataset, "datasets")):
        if value is None and not helping:
            raise UserError(f"{flag} is missing: choose from {', '.join(scan(package))}")
    model = find("models", model, "model")[0]

    from models import get_model_class  # from here on the method's own file is needed, and PyTorch with it

    cls = get_model_class(model)
    add_method_args(cls, parser)
    unlearn, unlearner = _peek(argv, "--unlearn"), None
    if unlearn not in (None, "own"):
        from unlearning import get_unlearner_class

        unlearner = get_unlearner_class(unlearn)
        add_method_args(unlearner, parser)
    backbone = _peek(argv, "--backbone", "--network")
    if dataset is not None:
        dataset = find("datasets", dataset, "dataset")[0]
        from datasets import get_dataset_class

        data_cls = get_dataset_class(dataset)
        data_cls.get_parser(parser.add_argument_group(f"dataset {dataset}"))
        fl = "--fl" in argv or _implied_fl(cls, argv)
        defaults = data_cls.defaults(fl)
        rehearses = "--buffer_size" in parser._option_string_actions
        size = _peek(argv, "--buffer_size") or (str(parser.get_default("buffer_size")) if rehearses else "")
        config = model_config(model, dataset, _peek(argv, "--model_config", "--preset") or "default", fl, size)
        chosen = dataset_config(dataset, _peek(argv, "--dataset_config") or config.get("dataset_config"))
        attributes, chosen = _attributes(data_cls, chosen)
        if backbone is None:
            backbone = {**defaults, **chosen, **config}.get("backbone")
    if backbone is not None:
        import backbones

        backbone = find("backbones", backbone, "backbone")[0]
        backbones.add_backbone_args(backbone, parser)
    if helping and dataset is None:
        parser.parse_args(["--help"])
    if settings is not None:
        argv = _as_argv(settings, parser, None)

    front = (
        _as_argv({k: v for k, v in defaults.items() if k in _dests(parser)}, parser, f"defaults of {dataset}")
        + _as_argv(chosen, parser, "--dataset_config")
        + _as_argv(config, parser, f"config of {model}")
    )
    front = [f"--model={model}", f"--dataset={dataset}", *front]
    if helping:  # with the defaults that this method has on this data set
        parser.set_defaults(**{**vars(parser.parse_known_args(front)[0]), "backbone": backbone})
        parser.parse_args(["--help"])
    args, unknown = parser.parse_known_args(front + argv)
    if unknown:
        flags = [o for o in parser._option_string_actions if o.startswith("--")]
        first = unknown[0].split("=")[0]
        raise UserError(
            f"unknown flag {first!r} for model {model!r}: {nearest(first, flags)}"
            if first.startswith("-")
            else f"cannot place the argument {first!r}: every value needs its flag"
        )
    args.model, args.dataset, args.backbone = model, dataset, backbone
    if attributes:  # the numbers depend on them, so they are settings
        args.dataset_attributes = attributes
    args.unlearning_flags = _unlearning_flags(cls, unlearner)
    args.given = sorted(
        {parser._option_string_actions[o].dest for a in argv if (o := a.split("=")[0]) in parser._option_string_actions}
    )
    args.fl = args.fl or _implied_fl(cls, argv)
    args.command = shlex.join(["python", "main.py", *argv])
    if getattr(args, "minibatch_size", 0) is None:
        args.minibatch_size = args.batch_size
    _check(args, cls, data_cls)
    data_cls.settle(args)
    # A run is found again before its method is built, and methods fill in settings when they are: what was asked for
    # is what names it.
    args.asked = dict(vars(args))
    return args


def _unlearning_flags(cls: type, unlearner: type | None) -> list[str]:
    """Settings that a trained model does not depend on: those of how clients are forgotten."""
    own = HerdParser(add_help=False)
    if unlearner is not None:
        unlearner.get_parser(own)
    return sorted({*UNLEARNING_FLAGS, *getattr(cls, "UNLEARNING_FLAGS", ()), *(a.dest for a in own._actions)})


def _dests(parser: ArgumentParser) -> set[str]:
    return {o[2:] for o in parser._option_string_actions if o.startswith("--")}


def _implied_fl(cls: type, argv: list[str]) -> bool:
    """fed-mammoth's command lines have no ``--fl``: its flags imply it for methods that only exist federated."""
    given = {a.split("=")[0] for a in argv}
    return bool(getattr(cls, "FEDERATED_ONLY", False) and given.intersection(f"--{f}" for f in FEDERATED_FLAGS))


def _check(args: Namespace, cls: type, data_cls: type) -> None:
    """Settings that do not go together."""
    if getattr(cls, "FEDERATED_ONLY", False) and not args.fl:
        raise UserError(f"model {args.model!r} is a federated method: add --fl")
    if getattr(cls, "CENTRAL_ONLY", False) and args.fl:
        raise UserError(f"model {args.model!r} needs the data of all tasks and clients in one place: leave out --fl")
    if not args.fl:
        useless = [f"--{f}" for f in FEDERATED_FLAGS if f in args.given]
        if useless:
            raise UserError(f"{', '.join(useless)} only make sense with --fl: add --fl or drop them")
    if args.unlearn is not None or args.unlearn_client is not None:
        from federated.unlearning import check

        check(args, cls)
    needs = {"clients_per_batch": ("batched", "ray"), **dict.fromkeys(RAY_FLAGS, ("ray",))}
    for flag, engines in needs.items():
        if flag in args.given and args.engine not in engines:
            raise UserError(f"--{flag} needs --engine {' or '.join(engines)}, this run has --engine {args.engine}")
    compatibility = [normal(c) for c in getattr(cls, "COMPATIBILITY", [])]
    if normal(data_cls.SETTING) not in compatibility:
        raise UserError(
            f"model {args.model!r} does not support {data_cls.SETTING} benchmarks such as {args.dataset!r}: "
            f"it supports {', '.join(compatibility) or 'nothing'}"
        )
    if not args.nowand and find_spec("wandb") is None:
        raise UserError("--nowand 0 needs the package wandb: pip install wandb, or leave --nowand at 1")
    if args.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard 1 needs the package tensorboard: pip install tensorboard, or leave it at 0")
    if args.optim_nesterov and (args.optimizer != "sgd" or args.optim_mom == 0):
        raise UserError("--optim_nesterov needs --optimizer sgd and --optim_mom above 0")
