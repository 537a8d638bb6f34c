"""Ray's workers against the serial engine: seconds per round, speed-up, and what a client's call costs.

The serial engine and Ray with each number of ``--workers`` run the same rounds over one server, in turns, with one
PyTorch thread in every process. All workers live in one local Ray for the whole time; those whose turn it is not are
idle. After the first round all sides must have the same weights, to the bit. Cases: vit-pocket with LoRA, and a
90,000-weight perceptron whose client-round is so short that the calls dominate.

Speed-up is serial seconds over Ray's. What the cores allow is measured beside it: ``N processes`` of plain serial
engines do a whole round each at the same time, and count as a speed-up of N times serial over theirs. Overhead per
client is the seconds of a round with one worker, less those of the serial engine, over the clients: packing, Ray,
unpacking, caches gone cold. Not measured: starting Ray; building the workers (``start_s`` tells, once); several
machines; GPUs.

    python scripts/bench/ray_workers.py --out ray_workers.csv
"""

import multiprocessing
import time
from contextlib import ExitStack

import common
import torch

from federated.engines.ray import import_ray
from utils.registry import ROOT

CASES = {
    "vit-pocket lora": "--model fedavg --model_config lora --backbone vit-pocket --pretrained 0",
    "mnistmlp full": "--model fedavg --tuning full --backbone mnistmlp",
}


def settings_of(name: str, options):
    """The settings of a case."""
    return common.settings(
        CASES[name],
        f"--dataset seq-glyphs --device cpu --num_threads 1 --num_clients {options.clients} --partition_mode iid",
        f"--n_epochs {options.n_epochs} --batch_size 16",
    )


def neighbour(pipe, name: str, options) -> None:
    """A process that does the rounds it is asked for with an experiment of its own."""
    experiment = common.Experiment(settings_of(name, options))
    engine = experiment.engine("serial")
    experiment.round(engine, 0)
    pipe.send("ready")
    for r in iter(pipe.recv, None):
        experiment.round(engine, r)
        pipe.send(r)


class Neighbours:
    """``n`` processes that do a whole round each, at the same time."""

    def __init__(self, n: int, name: str, options) -> None:
        spawn, self.pipes, self.processes = multiprocessing.get_context("spawn"), [], []
        for _ in range(n):
            mine, theirs = spawn.Pipe()
            self.processes.append(spawn.Process(target=neighbour, args=(theirs, name, options), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(mine)
        for pipe in self.pipes:
            pipe.recv()

    def round(self, r: int) -> None:
        for pipe in self.pipes:
            pipe.send(r)
        for pipe in self.pipes:
            pipe.recv()

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def measure(name: str, options) -> list[dict]:
    """The rows of one case."""
    args = settings_of(name, options)
    experiment = common.Experiment(args)
    with ExitStack() as stack:
        engines, starts = {"serial": experiment.engine("serial")}, {}
        for n in options.workers:
            start = time.perf_counter()
            engines[f"ray {n}"] = experiment.engine("ray", workers=n, num_threads=1)
            starts[f"ray {n}"] = round(time.perf_counter() - start, 2)
            stack.callback(engines[f"ray {n}"].close)
        differs, first = {}, None
        for side, engine in engines.items():
            experiment.rewind()
            experiment.round(engine, 0)  # warms up, too
            first = first or experiment.weights()
            differs[side] = common.update_differs(experiment.start, first, experiment.weights())
            if differs[side] > 0:
                raise SystemExit(f"{name}: {side} does not learn what serial learns (off by {differs[side]:.1e})")
        sides = {side: lambda r, engine=engine: experiment.round(engine, r) for side, engine in engines.items()}
        for n in sorted({n for n in options.workers if n > 1}):
            neighbours = Neighbours(n, name, options)
            stack.callback(neighbours.close)
            sides[f"{n} processes"] = neighbours.round
        times = {side: t["wall"] for side, t in common.in_turns(sides, options.repeats).items()}
    rows, n = [], len(experiment.sizes)
    for side, wall in times.items():
        low, mid = common.low_and_mid(wall, digits=4)
        rounds = int(side.split()[0]) if side.endswith("processes") else 1
        speedup = [round(rounds * s, 4) for s in common.ratios(times["serial"], wall)]
        row = {
            "case": name,
            "side": side,
            "clients": n,
            "samples": sum(experiment.sizes.values()),
            "n_epochs": args.n_epochs,
            "batch_size": args.batch_size,
            "repeats": options.repeats,
            "round_min_s": low,
            "round_median_s": mid,
            "speedup_min": speedup[0],
            "speedup_median": speedup[1],
            "start_s": starts.get(side),
            "differs": differs.get(side),
        }
        if side == "ray 1":
            over = common.differences(wall, times["serial"])
            row["overhead_min_ms"], row["overhead_median_ms"] = (round(ms / n, 3) for ms in over)
        rows.append(row)
    return rows


def show(row: dict) -> None:
    """One line on a row."""
    line = f"{row['case']:16s} {row['side']:12s} {row['round_min_s']:8.3f} s per round"
    line += f" (median {row['round_median_s']:.3f})"
    if row["side"] != "serial":
        line += f", speed-up {row['speedup_min']:.2f} (median {row['speedup_median']:.2f})"
    if row["side"].endswith("processes"):
        line += ", the most that the cores allow"
    if "overhead_min_ms" in row:
        line += f", overhead {row['overhead_min_ms']:+.2f} ms per client (median {row['overhead_median_ms']:+.2f})"
    print(line, flush=True)


def main() -> None:
    parser = common.standard_options(__doc__, repeats=7)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of workers (default: 1 2)")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--n_epochs", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    if not common.has_ray(engine=True):
        raise SystemExit("ray: not measured, the package is not installed")
    torch.set_num_threads(1)
    ray = import_ray()
    # one Ray for all sides: an engine that finds it running joins it
    env = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(
        num_cpus=sum(options.workers),
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": env},
    )
    rows = []
    try:
        for name in options.cases:
            for row in measure(name, options):
                rows.append(row)
                show(row)
    finally:
        ray.shutdown()
    common.write(options.out, rows)


if __name__ == "__main__":
    main()
