"""What the framework costs: a client-round against a plain PyTorch loop, and the start-up of a run.

Rounds. All sides do the same work on the same data: every client loads the global weights, takes the same batches in
the same order, trains ``--n_epochs`` epochs with a new optimiser, and hands what it trained to the mean.

    plain        about thirty lines: functional transforms, a dictionary of weights, one network
    serial       ``server.round`` with the serial engine: messages, byte counts, checks for finite values, private
                 state, seeding
    batched      the same with the batched engine. It computes in another way than the plain loop (all clients in one
                 batch), so the difference is not its overhead alone; scripts/bench/batched.py measures it
    ray          written by hand: the plain loop in one Ray actor, one call for each client that carries the weights
                 there and back, as other frameworks do (where Ray is installed)
    flower       Flower's simulation with one actor, for the MLP, by flower_round.py in an environment of its own
                 (``--flower_python``; else not measured); its plain loop runs in that process, between its rounds.
                 ``flower span`` leaves out what Flower waits for messages

Sides run in turns in one process (Flower apart). The weights of all sides are compared after the first round: they must
be the same, or the times would mean nothing. Overhead is the side less the plain loop, per client-round; CPU time
counts this process only, so it is blank where workers do the work. Overhead is given as the difference of the minima
over ``--repeats`` and as the median of the differences turn by turn, ratios likewise. Not measured: building,
evaluation, files, memory.

Start-up. ``main.py`` in a fresh process until its first round begins, less ``python -c "import torch"`` in a fresh
process, in turns; a launcher of a few lines imports main.py and ends the process there. The first repeat, which fills
the file cache, is not counted. Not measured: a cold disk, downloads, work of a method before its first round.

Targets, for the medians: at most 2 ms of CPU per client-round for the engines in this process, and 3 s beyond
``import torch``.

    python scripts/bench/overhead.py --out overhead.csv
    python scripts/bench/overhead.py --flower_python ../flower/bin/python --out overhead.csv
"""

import copy
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F

from utils.conf import derive_seed, make_generator
from utils.registry import ROOT

CASES = {
    "vit-pocket lora": "--model fedavg --tuning lora --backbone vit-pocket --pretrained 0",
    "vit-pocket full": "--model fedavg --tuning full --backbone vit-pocket --pretrained 0",
    "mnistmlp full": "--model fedavg --tuning full --backbone mnistmlp",
}
FLOWER_CASE = "mnistmlp full"
STARTUPS = {
    "mnistmlp": "--model fedavg --dataset seq-digits --fl --backbone mnistmlp",
    "vit-pocket": "--model fedavg --model_config lora --dataset seq-digits --fl",
    "vit-pocket, seq-glyphs": "--model fedavg --model_config lora --dataset seq-glyphs --fl",
}
CPU_MS, STARTUP_S = 2.0, 3.0  # the targets

LAUNCH = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import main
build = main.build
def stop(*_):
    print("READY", flush=True)
    os._exit(0)
def built(args):
    made = build(args)
    made[1].round = stop
    return made
main.build = built
sys.exit(main.main())
"""
IMPORT = """
import os, torch
print("READY", flush=True)
os._exit(0)
"""


class Plain:
    """The rounds by hand: one network, no framework. The network and its adapter are the framework's own modules."""

    def __init__(self, experiment: common.Experiment) -> None:
        args, dataset = experiment.args, experiment.dataset
        if dataset.TRAIN_AUGMENT:
            raise SystemExit("the plain loop knows no augmentation")
        self.seed, self.lr, self.n_epochs, self.batch_size = args.seed, args.lr, args.n_epochs, args.batch_size
        self.mean, self.std = dataset.MEAN[0], dataset.STD[0]
        experiment.worker.enter_task(0)
        model = copy.deepcopy(experiment.worker)
        self.net, self.head, self.params = model.net, model.head, model.trainable()
        for p in self.params.values():
            p.data = p.data.clone()
        self.columns = slice(0, experiment.model.n_seen_classes)
        self.images, self.labels = dataset.train_images, dataset.train_labels
        self.indices = {i: experiment.partition.indices(0, i) for i in experiment.sizes}
        self.share = {i: n / sum(experiment.sizes.values()) for i, n in experiment.sizes.items()}
        self.start = self.state = experiment.start

    def train(self, state: dict, client: int, r: int) -> dict:
        """One client's turn: its new weights."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(state[name])
        indices = self.indices[client]
        opt = torch.optim.SGD(self.params.values(), lr=self.lr)
        generator = make_generator(self.seed, "client", 0, r, client, "local_update")
        self.net.train()
        for _ in range(self.n_epochs):
            for batch in torch.randperm(len(indices), generator=generator).split(self.batch_size):
                chosen = indices[batch]
                x = (self.images[chosen].float() / 255 - self.mean) / self.std
                opt.zero_grad()
                if self.head is None:
                    logits = self.net(x)[:, self.columns]
                else:
                    logits = self.head(self.net(x, returnt="features"))
                F.cross_entropy(logits, self.labels[chosen]).backward()
                opt.step()
        return {name: p.detach().clone() for name, p in self.params.items()}

    def mean_of(self, replies) -> dict:
        """The weighted mean of (client, weights)."""
        total = {}
        for client, mine in replies:
            for name, value in mine.items():
                total[name] = total.get(name, 0) + self.share[client] * value.double()
        return {n: t.float() for n, t in total.items()}

    def round(self, r: int) -> None:
        self.state = self.mean_of((client, self.train(self.state, client, r)) for client in self.indices)

    def weights(self) -> dict:
        return self.state


class RayActor:
    """The far end of :class:`OneCall`."""

    def __init__(self, plain: Plain, threads: int) -> None:
        torch.set_num_threads(threads)
        self.plain = plain

    def train(self, state: dict, client: int, r: int) -> dict:
        return self.plain.train(state, client, r)


class OneCall:
    """A Ray call for each client; weights are pickled into every call, and into every answer."""

    def __init__(self, plain: Plain, threads: int) -> None:
        import ray

        if not ray.is_initialized():
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
            ray.init(
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=200 * 2**20,
                runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}},
            )
        self.ray, self.mean_of, self.clients, self.state = ray, plain.mean_of, list(plain.indices), plain.start
        self.actor = ray.remote(num_cpus=1)(RayActor).remote(plain, threads)

    def round(self, r: int) -> None:
        calls = [self.actor.train.remote(self.state, client, r) for client in self.clients]
        self.state = self.mean_of((c, self.ray.get(call)) for c, call in zip(self.clients, calls, strict=True))

    def weights(self) -> dict:
        return self.state

    def close(self) -> None:
        self.ray.kill(self.actor)


class Framework:
    """``server.round`` with an engine."""

    def __init__(self, args, engine: str) -> None:
        self.experiment = common.Experiment(args)
        self.engine = self.experiment.engine(engine)

    def round(self, r: int) -> None:
        self.experiment.round(self.engine, r)

    def weights(self) -> dict:
        return self.experiment.weights()


def measure(name: str, options) -> list[dict]:
    """The rows of one case."""
    args = common.settings(
        CASES[name],
        f"--dataset seq-digits --device cpu --num_clients {options.clients} --n_epochs {options.n_epochs}",
        f"--batch_size {options.batch_size} --optimizer sgd --lr 0.01",
    )
    sides = {"plain": None, **{engine: Framework(args, engine) for engine in ("serial", "batched")}}
    experiment = sides["serial"].experiment
    sides["plain"] = plain = Plain(experiment)
    if common.has_ray():
        sides["ray"] = OneCall(plain, options.threads)
    differs = {}
    for side, runner in sides.items():
        runner.round(0)  # warms up, too
        differs[side] = common.update_differs(experiment.start, sides["plain"].weights(), runner.weights())
        if differs[side] > (1e-3 if side == "batched" else 1e-5):  # batched adds up in another order
            raise SystemExit(f"{name}: {side} does not do the work of the plain loop (off by {differs[side]:.1e})")
    times = common.in_turns({side: runner.round for side, runner in sides.items()}, options.repeats)
    if "ray" in sides:
        sides["ray"].close()
    here = {
        "part": "rounds",
        "case": name,
        "clients": len(experiment.sizes),
        "n_epochs": args.n_epochs,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
    }
    n = len(experiment.sizes)
    rows = [
        {
            **here,
            **figures(side, t["wall"], times["plain"]["wall"], n),
            **(cpu_figures(t["cpu"], times["plain"]["cpu"], n) if side != "ray" else {}),
            "differs": differs[side],
            "note": "trains whole networks in turn, as serial" if turned_down(sides[side]) else "",
        }
        for side, t in times.items()
    ]
    if name == FLOWER_CASE and options.flower_python:
        rows += [{**here, **row} for row in flower(experiment, plain, n, options)]
    return rows


def turned_down(runner) -> bool:
    """Whether this side's engine does not stack the clients of this case."""
    return getattr(getattr(runner, "engine", None), "in_turn", None) is not None


def figures(side: str, mine: list[float], plain: list[float], clients: int) -> dict:
    """Wall time of a side, per client-round."""
    mine, plain = [t / clients for t in mine], [t / clients for t in plain]
    wall, ratio, over = common.low_and_mid(mine, 1e3), common.ratios(mine, plain), common.differences(mine, plain)
    return {
        "side": side,
        "wall_min_ms": wall[0],
        "wall_median_ms": wall[1],
        "ratio_min": ratio[0],
        "ratio_median": ratio[1],
        "overhead_min_ms": over[0],
        "overhead_median_ms": over[1],
    }


def cpu_figures(mine: list[float], plain: list[float], clients: int) -> dict:
    """CPU time of a side, per client-round."""
    mine, plain = [t / clients for t in mine], [t / clients for t in plain]
    cpu, over = common.low_and_mid(mine, 1e3), common.differences(mine, plain)
    return {
        "cpu_min_ms": cpu[0],
        "cpu_median_ms": cpu[1],
        "cpu_overhead_min_ms": over[0],
        "cpu_overhead_median_ms": over[1],
    }


def flower(experiment: common.Experiment, plain: Plain, n: int, options) -> list[dict]:
    """Flower's rows: the same MLP, images, clients, batches and first weights, in its own environment."""
    if sorted(plain.indices) != list(range(n)):
        raise SystemExit("Flower's clients are numbered from 0: every client needs samples here")
    rounds = options.repeats + 3  # the first three warm up
    seeds = [
        [derive_seed(plain.seed, "client", 0, r, client, "local_update") for client in range(n)] for r in range(rounds)
    ]
    chosen = {"lr": plain.lr, "n_epochs": plain.n_epochs, "batch_size": plain.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        work, weights = Path(folder, "work.npz"), Path(folder, "weights.npz")
        np.savez(
            work,
            images=plain.images.numpy(),
            labels=plain.labels.numpy(),
            indices=torch.cat([plain.indices[i] for i in range(n)]).numpy(),
            sizes=np.array([len(plain.indices[i]) for i in range(n)]),
            seeds=np.array(seeds, dtype=np.int64),
            settings=json.dumps({**chosen, "mean": plain.mean, "std": plain.std, "classes": plain.columns.stop}),
            **{f"weights.{k}": v.numpy() for k, v in plain.start.items()},
        )
        script = str(Path(__file__).with_name("flower_round.py"))
        command = [options.flower_python, script, "--work", str(work), "--weights", str(weights)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode or not weights.exists():
            raise SystemExit(f"Flower failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        times = json.loads(done.stdout.strip().splitlines()[-1])
        with np.load(weights) as file:
            theirs = {k: torch.from_numpy(file[k]) for k in file.files}
    plain.state = plain.start
    plain.round(0)
    differs = common.update_differs(plain.start, plain.weights(), theirs)
    if differs > 1e-4:
        raise SystemExit(f"Flower does not do the work of the plain loop (weights off by {differs:.1e})")
    used = ", ".join(f"{k} {times[k]}" for k in ("flwr", "ray", "torch"))
    return [
        {**figures(side, times[key][3:], times["plain"][3:], n), "differs": differs, "note": used}
        for side, key in (("flower", "flower"), ("flower span", "span"))
    ]


def startup(options) -> list[dict]:
    """Seconds from the start of a process to its first round, and to the end of ``import torch``."""
    with tempfile.TemporaryDirectory() as folder:
        rest = ["--num_threads", str(options.threads), "--device", "cpu", "--results_path", folder]
        commands = {"import torch": [sys.executable, "-c", IMPORT]}
        for name, flags in STARTUPS.items():
            commands[name] = [sys.executable, "-c", LAUNCH, str(ROOT), *shlex.split(flags), *rest]
        times = {name: {"wall": [], "cpu": []} for name in commands}
        for repeat in range(options.startup_repeats + 1):
            for name, command in commands.items():
                wall, cpu = time_to_ready(command)
                if repeat:
                    times[name]["wall"].append(wall)
                    times[name]["cpu"].append(cpu)
    rows, base = [], times["import torch"]
    for name, t in times.items():
        wall, cpu = common.low_and_mid(t["wall"]), common.low_and_mid(t["cpu"])
        beyond = common.differences(t["wall"], base["wall"], 1.0)
        beyond_cpu = common.differences(t["cpu"], base["cpu"], 1.0)
        rows.append(
            {
                "part": "start-up",
                "case": name,
                "threads": options.threads,
                "repeats": options.startup_repeats,
                "startup_min_s": wall[0],
                "startup_median_s": wall[1],
                "startup_cpu_min_s": cpu[0],
                "startup_cpu_median_s": cpu[1],
                "beyond_torch_min_s": beyond[0],
                "beyond_torch_median_s": beyond[1],
                "beyond_torch_cpu_min_s": beyond_cpu[0],
            }
        )
    return rows


def time_to_ready(command: list[str]) -> tuple[float, float]:
    """(wall seconds until a process says READY, CPU seconds it took)."""
    start = time.perf_counter()
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=env)
        ready = any(line.strip() == "READY" for line in process.stdout)
        wall = time.perf_counter() - start
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if not ready or process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command[3:])} did not reach its first round:\n{errors.read()[-3000:]}")
    return wall, usage.ru_utime + usage.ru_stime


def verdict(mid: float, limit: float) -> str:
    """Whether a median keeps its target."""
    return "met" if mid <= limit else "NOT met"


def show(row: dict) -> None:
    """One line on a row."""
    if row["part"] == "start-up":
        low, mid = row["beyond_torch_min_s"], row["beyond_torch_median_s"]
        line = f"start-up, {row['case']:24s} {row['startup_min_s']:6.2f} s (median {row['startup_median_s']:.2f})"
        if row["case"] != "import torch":
            line += f", beyond import torch {low:.2f} s (median {mid:.2f}): {verdict(mid, STARTUP_S)}"
    else:
        line = f"{row['case']:16s} {row['side']:12s} {row['wall_min_ms']:8.2f} ms per client-round"
        line += f" (median {row['wall_median_ms']:.2f})"
        if row["side"] != "plain":
            line += f", ratio {row['ratio_min']:.3f} (median {row['ratio_median']:.3f}), overhead "
            line += f"{row['overhead_min_ms']:+.2f} ms (median {row['overhead_median_ms']:+.2f})"
        if row["side"] in ("serial", "batched"):
            low, mid = row["cpu_overhead_min_ms"], row["cpu_overhead_median_ms"]
            line += f", of CPU {low:+.2f} ms (median {mid:+.2f}): {verdict(mid, CPU_MS)}"
    print(line, flush=True)


def main() -> None:
    parser = common.standard_options(__doc__, repeats=21)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch (default: 1)")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--n_epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--flower_python", help="Python of an environment with requirements-flower.txt")
    parser.add_argument("--startup_repeats", type=int, default=5, help="0 leaves start-up out (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"targets: {CPU_MS:g} ms of CPU per client-round, {STARTUP_S:g} s of start-up beyond import torch")
    rows = []
    for name in options.cases:
        for row in measure(name, options):
            rows.append(row)
            show(row)
    for missing, there in (("ray", common.has_ray()), ("flower", options.flower_python)):
        if options.cases and not there:
            print(f"{missing}: not measured")
    for row in startup(options) if options.startup_repeats else ():
        rows.append(row)
        show(row)
    common.write(options.out, rows)


if __name__ == "__main__":
    main()
