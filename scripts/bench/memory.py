"""Peak memory against the number of registered clients, of whom 10 take part in each round.

Runs. ``main.py`` in a process of its own for 10, 100 and 1000 clients: one task of vit-pocket, fedavg with LoRA and
DOLFIN (whose statistics come from all clients, before and after the rounds), on the serial, batched and, where it is
installed, ray engine. Clients are equal in every run, and so is the data set: each client has ``--samples`` images of
the first task, and what is left belongs to later tasks. Images are random bytes put where the data set looks for its
arrays. ``memory_mb`` is what the run writes into summary.csv: peak resident memory of its process, or peak memory
allocated on the GPU. ``host_mb`` is the process's peak resident memory as its parent sees it. ``tree_mb`` is the peak
of that process and all its children (Ray, its workers), sampled, on Linux: what is private to each, and what is shared
once.

Sums. What ``clients.sum`` adds to the server's memory when all clients send second moments (DOLFIN's
``input_statistics``): peak less what was resident before, after one chunk of clients has warmed everything up.
``kept_mb`` is what the replies would take if the server kept them all.

Target: 1000 registered clients take at most 1.1 times the memory of 10. Not measured: time, GPU memory of Ray's
workers.

    python scripts/bench/memory.py --out memory.csv
    python scripts/bench/memory.py --device cuda --out memory_gpu.csv
"""

import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import common
import torch

import main as herd
from utils.registry import ROOT

METHODS = {"fedavg lora": "--model fedavg --model_config lora", "dolfin": "--model dolfin"}
ENGINES = {"serial": "", "batched": "", "ray": "--workers 1"}
ACTIVE, TASKS, TARGET = 10, 10, 1.1
BATCH = 16


# ---------------------------------------------------------------- in the child process


def prepare(clients: int, largest: int, samples: int) -> None:
    """The images of a run: as many in every run, ``samples`` of them for each client's first task."""
    total = largest * (samples + TASKS - 1)
    common.synthetic_images(
        "seq-glyphs", n=samples * clients, others=(total - samples * clients) // (TASKS - 1), tests=20
    )


def child_run(flags: str) -> None:
    """The run itself."""
    code = herd.main(shlex.split(flags))
    sys.stdout.flush()
    sys.exit(code)


def child_sum(flags: str) -> None:
    """What a sum over all clients costs; prints it as JSON."""
    experiment = common.Experiment(common.settings(flags), begin=False)
    engine = experiment.engine(experiment.args.engine)
    call, message = "input_statistics", experiment.model.broadcast()
    experiment.clients(engine, -1, range(8)).sum(call, message)
    experiment.ledger.uplink = 0
    cuda = experiment.model.device.type == "cuda"
    common.give_back_memory()
    device = experiment.model.device
    before = torch.cuda.memory_allocated(device) / 2**20 if cuda else common.resident()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        common.peak_rss(reset=True)
    total = experiment.clients(engine, -1).sum(call, message)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else common.peak_rss()
    assert total["tokens"] > 0
    engine.close()
    print(json.dumps({"memory_mb": peak - before, "peak_mb": peak, "kept_mb": experiment.ledger.uplink / 2**20}))


# ---------------------------------------------------------------- in the parent


def tree_memory(root: int) -> float:
    """MB of a process and all that descend from it: what is private to each, and the largest share of common pages."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    private, shared, waiting = 0, 0, [root]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        try:
            rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended meanwhile
            continue
        kb = {name: int(value.split()[0]) for name, value in (row.split(":") for row in rows)}
        private += kb["Private_Clean"] + kb["Private_Dirty"]
        shared = max(shared, kb["Shared_Clean"] + kb["Shared_Dirty"])
    return (private + shared) / 2**10


def child(what: str, clients: int, flags: str, options) -> tuple[str, float, float | None]:
    """Start a child. Returns (what it printed, its peak resident MB, that of it and its children)."""
    job = {
        "what": what,
        "flags": flags,
        "clients": clients,
        "largest": max(options.clients),
        "samples": options.samples,
    }
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, __file__, "--child", json.dumps(job)]
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=env, cwd=ROOT)
        tree, linux = 0.0, os.path.exists("/proc/self/smaps_rollup")
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            tree = max(tree, tree_memory(process.pid)) if linux else tree
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{flags} failed:\n{errors.read()[-3000:]}")
        said = out.read()
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return said, peak, tree if linux else None


def flags_of(method: str, engine: str, clients: int, options) -> str:
    """The command line of a case, except where the results go."""
    return (
        f"{METHODS[method]} --engine {engine} {ENGINES[engine]} --dataset seq-glyphs --fl --device {options.device} "
        f"--num_threads {options.threads} --num_clients {clients} --partition_mode iid "
        f"--participation_rate {min(1.0, (ACTIVE + 0.5) / clients)} --num_comm_rounds {options.rounds} --n_epochs 1 "
        f"--batch_size {BATCH} --stop_after 1"
    )


def run_row(method: str, engine: str, clients: int, options) -> dict:
    """One case: a whole run."""
    seen = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            flags = f"{flags_of(method, engine, clients, options)} --results_path {folder}"
            _, host, tree = child("run", clients, flags, options)
            (summary,) = Path(folder).rglob("summary.csv")
            with open(summary, newline="") as f:
                seen.append((float(next(csv.DictReader(f))["peak_memory_mb"]), host, tree))
    return {
        "what": "run",
        "case": method,
        "engine": engine,
        "clients": clients,
        "memory_mb": round(median(m for m, *_ in seen), 1),
        "host_mb": round(median(h for _, h, _ in seen), 1),
        "tree_mb": round(median(t for *_, t in seen), 1) if seen[0][2] else None,
    }


def sum_row(engine: str, clients: int, options) -> dict:
    """One case: a sum over all clients."""
    seen = []
    for _ in range(options.repeats):
        said, *_ = child("sum", clients, flags_of("dolfin", engine, clients, options).replace(" --fl", ""), options)
        seen.append(json.loads(said.strip().splitlines()[-1]))
    row = {"what": "sum", "case": "dolfin input_statistics", "engine": engine, "clients": clients}
    return {**row, **{k: round(median(s[k] for s in seen), 1) for k in seen[0]}}


def show(row: dict, first: dict) -> None:
    """One line on a row, compared with that of the fewest clients."""
    key = "memory_mb" if row["what"] == "run" else "peak_mb"
    row["ratio"] = round(row[key] / first[key], 4)
    row["tree_ratio"] = round(row["tree_mb"] / first["tree_mb"], 4) if row.get("tree_mb") else None
    line = f"{row['what']} {row['case']:24s} {row['engine']:8s} {row['clients']:5d} clients: {row['memory_mb']:8.1f} MB"
    if row["what"] == "sum":
        line += f" beyond what was resident (all replies kept: {row['kept_mb']:.1f} MB), peak {row['peak_mb']:.1f} MB"
    elif row["tree_mb"] and row["engine"] == "ray":
        line += f" (with Ray and its worker {row['tree_mb']:.1f} MB)"
    if row is not first:
        line += f", x {row['ratio']:.3f}: {'met' if row['ratio'] <= TARGET else 'NOT met'}"
    print(line, flush=True)


def main() -> None:
    parser = common.standard_options(__doc__, repeats=1)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--clients", nargs="+", type=int, default=[10, 100, 1000], help="the first is what others are held against"
    )
    parser.add_argument("--samples", type=int, default=32, help="images of each client (default: 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch (default: 1)")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="default: all that are installed")
    parser.add_argument("--no_sums", action="store_true", help="only whole runs")
    parser.add_argument("--child", help="used by the script itself")
    options = parser.parse_args()
    if options.child:
        job = json.loads(options.child)
        prepare(job["clients"], job["largest"], job["samples"])
        {"run": child_run, "sum": child_sum}[job["what"]](job["flags"])
        return
    engines = options.engines or [e for e in ENGINES if e != "ray" or common.has_ray(engine=True)]
    cases = [(lambda c, m=m, e=e: run_row(m, e, c, options)) for m in options.methods for e in engines]
    if options.device == "cpu" and common.peak_rss() is None:
        print("sums: not measured, they need Linux's /proc")
        options.no_sums = True
    sums = [] if options.no_sums else [(lambda c, e=e: sum_row(e, c, options)) for e in engines if e != "batched"]
    rows = []
    for case in cases + sums:
        first = None
        for clients in options.clients if case in cases else (options.clients[0], options.clients[-1]):
            row = case(clients)
            first = first or row
            show(row, first)
            rows.append(row)
    more = {
        "device": options.device,
        "threads": options.threads,
        "samples": options.samples,
        "repeats": options.repeats,
    }
    common.write(options.out, [{**row, **more} for row in rows])


if __name__ == "__main__":
    main()
