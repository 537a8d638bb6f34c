"""The MLP's rounds through Flower's simulation; ``overhead.py --flower_python`` starts it in its own environment.

Flower pins another Ray than Herd does, so this file imports nothing of Herd (``requirements-flower.txt`` beside it is
all it needs). The work comes in a file that ``overhead.py`` writes: images, who owns which, the seeds of the batch
order, the first weights. ``FedAvg`` runs over a ``ClientApp`` with one Ray actor of one thread, no evaluation; the
actor keeps data and network from call to call, which is the best case for Flower. Between two of Flower's rounds the
same clients train in a plain loop in this process, so that both are measured under the same load.

A round lasts from ``configure_train`` to the end of ``aggregate_train``. Flower's runtime looks for messages every
0.1 s on both ways; ``span`` leaves that waiting out: from the start of the first client to the end of the last.

Prints one line of JSON: versions, and seconds per round for ``flower``, ``span`` and ``plain``.
"""

import argparse
import functools
import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

WORK = "HERD_FLOWER_WORK"  # environment variable: the file with the work; Ray's workers inherit it


class MLP(torch.nn.Module):
    """Two hidden layers, with the names of Herd's ``mnistmlp``."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(inputs, hidden)
        self.fc2 = torch.nn.Linear(hidden, hidden)
        self.classifier = torch.nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


class Work:
    """What every client trains on, and a network to do it with."""

    def __init__(self, path: str) -> None:
        torch.set_num_threads(1)
        with np.load(path) as file:
            arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "settings"}
            self.settings = json.loads(str(file["settings"]))
        self.images, self.labels, self.seeds = arrays["images"], arrays["labels"], arrays["seeds"]
        self.indices = list(arrays["indices"].split(arrays["sizes"].tolist()))
        self.first = {k[len("weights.") :]: v for k, v in arrays.items() if k.startswith("weights.")}
        hidden, inputs = self.first["fc1.weight"].shape
        self.net = MLP(inputs, hidden, len(self.first["classifier.weight"]))

    def train(self, weights: dict, client: int, r: int) -> dict:
        """One client's turn in round ``r``: its new weights."""
        s, indices = self.settings, self.indices[client]
        self.net.load_state_dict(weights)
        opt = torch.optim.SGD(self.net.parameters(), lr=s["lr"])
        generator = torch.Generator().manual_seed(int(self.seeds[r, client]))
        self.net.train()
        for _ in range(s["n_epochs"]):
            for batch in torch.randperm(len(indices), generator=generator).split(s["batch_size"]):
                chosen = indices[batch]
                x = (self.images[chosen].float() / 255 - s["mean"]) / s["std"]
                opt.zero_grad()
                F.cross_entropy(self.net(x)[:, : s["classes"]], self.labels[chosen]).backward()
                opt.step()
        return {k: v.detach().clone() for k, v in self.net.state_dict().items()}

    def plain_round(self, weights: dict, r: int) -> dict:
        """All clients in turn, and their mean."""
        total, n = {}, sum(map(len, self.indices))
        for client, indices in enumerate(self.indices):
            for name, mine in self.train(weights, client, r).items():
                total[name] = total.get(name, 0) + len(indices) / n * mine.double()
        return {name: t.float() for name, t in total.items()}


@functools.cache
def work() -> Work:
    """The work, read once per process."""
    return Work(os.environ[WORK])


client_app = ClientApp()


@client_app.train()
def train(message: Message, context) -> Message:
    """What the client's side does with a message of the server."""
    start = time.time()
    client = int(context.node_config["partition-id"])
    weights = message.content["arrays"].to_torch_state_dict()
    mine = work().train(weights, client, message.content["config"]["server-round"] - 1)
    content = {
        "arrays": ArrayRecord(mine),
        "metrics": MetricRecord({"num-examples": len(work().indices[client]), "start": start, "end": time.time()}),
    }
    return Message(RecordDict(content), reply_to=message)


class Timed(FedAvg):
    """FedAvg that reads the clock, and lets the plain loop have its turn after every round."""

    def __init__(self) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0)
        self.times: dict[str, list[float]] = {"flower": [], "span": [], "plain": []}
        self.after_first: dict | None = None
        self.plain = work().first

    def configure_train(self, server_round, arrays, config, grid):
        self.started = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        done = super().aggregate_train(server_round, replies)
        self.times["flower"].append(time.perf_counter() - self.started)
        stamps = [reply.content["metrics"] for reply in replies]  # a failed client has none, and ends the run here
        self.times["span"].append(max(s["end"] for s in stamps) - min(s["start"] for s in stamps))
        if self.after_first is None:
            self.after_first = {k: v.numpy() for k, v in done[0].to_torch_state_dict().items()}
        start = time.perf_counter()
        self.plain = work().plain_round(self.plain, server_round - 1)
        self.times["plain"].append(time.perf_counter() - start)
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, help="the file that overhead.py writes")
    parser.add_argument("--weights", required=True, help="file for the weights after the first round")
    options = parser.parse_args()
    os.environ[WORK] = os.path.abspath(options.work)
    strategies = []
    server_app = ServerApp()

    @server_app.main()
    def serve(grid, context) -> None:
        strategies.append(Timed())
        strategies[0].start(grid, ArrayRecord(work().first), num_rounds=len(work().seeds))

    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(work().indices),
        backend_config={
            "init_args": {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 * 2**20},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    import flwr
    import ray

    np.savez(options.weights, **strategies[0].after_first)
    versions = {"flwr": flwr.__version__, "ray": ray.__version__, "torch": str(torch.__version__)}
    print(json.dumps({**versions, **strategies[0].times}), flush=True)


if __name__ == "__main__":
    import flower_round  # as a module, so that Ray's actor imports it once instead of getting a copy with every call

    sys.exit(flower_round.main())
