"""What the framework costs: seconds per client-round of its serial engine against a plain PyTorch loop.

Both sides do the same work on the same data, in this process, in turns (framework, plain, framework, ...): every client
loads the global weights, takes the same batches in the same order under the same augmentation, trains ``--n_epochs``
epochs with a new optimiser, and hands a copy of what it trained to the mean. Framework: ``server.round``, with its
messages, byte counts, checks for finite values, private state and seeding. Plain: about thirty lines with
functional transforms and a dictionary of weights. Not measured on either side: building, evaluation, files.

The results of both sides are compared first: they must be the same weights, or the times would mean nothing.
A row for each case has the minimum and the median over ``--repeats`` rounds; read the minimum on a busy machine.

    python scripts/bench/client_round.py --out client_round.csv
"""

import argparse
import copy
import csv
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from datasets.utils.partition import Partition
from federated.clients import Clients, Ledger
from federated.engines.serial import SerialEngine
from main import build
from utils.args import parse_args
from utils.conf import make_generator

CASES = {
    "vit-pocket lora": "--model fedavg --tuning lora --backbone vit-pocket --pretrained 0",
    "vit-pocket full": "--model fedavg --tuning full --backbone vit-pocket --pretrained 0",
    "mnistmlp full": "--model fedavg --tuning full --backbone mnistmlp",
}


class Framework:
    """One federated experiment at its first task."""

    def __init__(self, args) -> None:
        self.args = args
        self.dataset, self.model, self.worker, _ = build(args)
        self.partition = Partition.make(self.dataset, args)
        self.sizes = {i: n for i, n in enumerate(self.partition.sizes(0)) if n > 0}
        self.engine, self.ledger = SerialEngine(self.worker, self.partition, {}, args), Ledger()
        self.dataset.get_data_loaders()
        self.model.meta_begin_task(self.dataset)
        self.model.begin_rounds(self.clients(-1))

    def clients(self, r: int) -> Clients:
        return Clients(self.sizes, self.engine, self.ledger, 0, r)

    def round(self, r: int) -> None:
        self.model.round(self.clients(r), r)

    def weights(self) -> dict:
        return self.model.trainable()


class Plain:
    """The same by hand: one network, no framework. The network and its adapter are the framework's own modules."""

    def __init__(self, framework: Framework) -> None:
        args, dataset = framework.args, framework.dataset
        self.args, self.mean, self.std = args, dataset.MEAN[0], dataset.STD[0]
        if dataset.TRAIN_AUGMENT:
            raise SystemExit("the plain loop knows no augmentation")
        model = copy.deepcopy(framework.worker)
        self.net, self.head = model.net, model.head
        self.params = model.trainable()
        for p in self.params.values():
            p.data = p.data.clone()
        self.columns = slice(0, framework.model.n_seen_classes)
        self.images, self.labels = dataset.train_images, dataset.train_labels
        self.indices = {i: framework.partition.indices(0, i) for i in framework.sizes}
        self.weights_of_clients = {i: n / sum(framework.sizes.values()) for i, n in framework.sizes.items()}
        self.state = {n: p.detach().clone() for n, p in self.params.items()}

    def round(self, r: int) -> None:
        total = {}
        for client, indices in self.indices.items():
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(self.state[name])
            opt = torch.optim.SGD(self.params.values(), lr=self.args.lr)
            generator = make_generator(self.args.seed, "client", 0, r, client, "local_update")
            self.net.train()
            for _ in range(self.args.n_epochs):
                for batch in torch.randperm(len(indices), generator=generator).split(self.args.batch_size):
                    chosen = indices[batch]
                    x = (self.images[chosen].float() / 255 - self.mean) / self.std
                    opt.zero_grad()
                    if self.head is None:
                        logits = self.net(x)[:, self.columns]
                    else:
                        logits = self.head(self.net(x, returnt="features"))
                    F.cross_entropy(logits, self.labels[chosen]).backward()
                    opt.step()
            w = self.weights_of_clients[client]
            for name, p in self.params.items():
                mine = p.detach().clone()
                total[name] = total.get(name, 0) + w * mine.double()
        self.state = {n: t.float() for n, t in total.items()}

    def weights(self) -> dict:
        return self.state


def measure(name: str, flags: str, options) -> dict:
    """One row: both sides round by round, in turns."""
    args = parse_args(
        [
            *shlex.split(flags),
            *shlex.split(f"--dataset seq-digits --fl --device cpu --num_clients {options.clients}"),
            *shlex.split(f"--n_epochs {options.n_epochs} --batch_size {options.batch_size} --optimizer sgd --lr 0.01"),
        ]
    )
    framework = Framework(args)
    framework.worker.enter_task(0)
    for mine, theirs in zip(framework.worker.trainable().values(), framework.model.trainable().values(), strict=True):
        mine.data = theirs.data.clone()
    plain = Plain(framework)
    times = {"framework": [], "plain": []}
    for r in range(options.repeats + 1):
        for side, runner in (("framework", framework), ("plain", plain)):
            start = time.perf_counter()
            runner.round(r)
            if r > 0:  # the first round warms both up
                times[side].append((time.perf_counter() - start) / len(framework.sizes))
        if r == 0:
            far = max(float((framework.weights()[n].detach() - w).abs().max()) for n, w in plain.weights().items())
            if far > 1e-6:
                raise SystemExit(f"{name}: the two sides do not do the same work (weights differ by {far:.1e})")
    low, mid = ({s: f(t) for s, t in times.items()} for f in (min, statistics.median))
    ratios = [a / b for a, b in zip(times["framework"], times["plain"], strict=True)]
    return {
        "case": name,
        "clients": len(framework.sizes),
        "n_epochs": args.n_epochs,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "framework_min_ms": round(1e3 * low["framework"], 3),
        "plain_min_ms": round(1e3 * low["plain"], 3),
        "ratio_min": round(low["framework"] / low["plain"], 4),
        "framework_median_ms": round(1e3 * mid["framework"], 3),
        "plain_median_ms": round(1e3 * mid["plain"], 3),
        "ratio_median": round(statistics.median(ratios), 4),
        "torch": str(torch.__version__),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch (default: 1)")
    parser.add_argument("--repeats", type=int, default=15, help="measured rounds of each side")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--n_epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.cases:
        row = measure(name, CASES[name], options)
        rows.append(row)
        print(
            f"{name:16s} per client-round: framework {row['framework_min_ms']:8.2f} ms, plain "
            f"{row['plain_min_ms']:8.2f} ms, ratio {row['ratio_min']:.3f} (median {row['ratio_median']:.3f})",
            flush=True,
        )
    if options.out:
        with open(options.out, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
