"""Fit a table for ``--livar_rule fitted:FILE`` on a proxy data set: a reconstruction of LIVAR's offline SHAP stage.

    python -m utils.livar_fit_rule --out rule.json --dataset seq-scripts --num_comm_rounds 3 [any flag of --model livar]
    python main.py --model livar --livar_rule fitted:rule.json --joint 1 --dataset seq-glyphs --fl

What the paper (arXiv 2507.06813) fitted its table on is not known; what is known is that it has two inputs, the layer
importances I_A and I_B, an output of the size of a client's weight, and cells at quantiles. So, on one task of all
classes of the proxy data set:

1. federated LoRA, averaged by samples; after each round, for every client k and layer l, x_kl = (rank of I_A, rank of
   I_B) in [0, 1] among all clients and layers;
2. y_kl: the weights, a softmax over clients in each layer, with which sum_k y_kl B_k A_k has the least loss on a few
   labelled images of the server (Adam on the softmax's arguments alone). They are test images of the proxy data set;
3. gradient-boosted trees y ~ x (scikit-learn);
4. exact interventional Shapley values of the two inputs: phi_A = 1/2 (v(A) - v() + v(AB) - v(B)), with
   v(S) = mean over the background of f(x_S, others);
5. a cell is the base value plus the mean phi_A and phi_B of the points in its column and its row.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.utils.lora import LoRA
from models.livar import RULE
from models.utils.federated_model import in_place
from utils.errors import RunError, UserError
from utils.files import replacing


def ranks(importances: Tensor) -> np.ndarray:
    """Ranks of the entries of (K x L) among all of them, as quantiles in [0, 1]; equal entries share their mean."""
    from scipy.stats import rankdata

    flat = importances.double().flatten().numpy()
    return ((rankdata(flat) - 1) / max(len(flat) - 1, 1)).reshape(importances.shape)


def best_weights(model, factors, images: Tensor, labels: Tensor, steps: int = 100, lr: float = 0.1) -> Tensor:
    """y (K x L): softmax weights over clients, layer by layer, of the merged update with the least cross-entropy.

    Args:
        model: a LIVAR server whose head is merged. factors: for each client {layer: (A, B)}.
        images, labels: what the server can test on (normalised inputs, class indices of the task).
    """
    net, layers = model.net, list(factors[0])
    rank = sum(f[layers[0]][0].shape[0] for f in factors)
    lora = LoRA(net, layers, rank, share_A=True, init="zeros")
    try:
        lora.reset({n: torch.cat([f[n][0] for f in factors]).detach() for n in layers})
        places = {n: (branch, "B") for n, _, branch in lora.branches()}
        Bs = {n: torch.stack([f[n][1].detach() for f in factors]) for n in layers}  # K x rows x r
        logits = torch.zeros(len(factors), len(layers), device=images.device, requires_grad=True)
        opt = torch.optim.Adam([logits], lr)
        net.eval()
        with model.weights_in_place(model._own_pretrained):  # for the backward passes, too
            for _ in range(steps):
                y = logits.softmax(0)
                scaled = {n: torch.cat(list(y[:, i, None, None] * Bs[n]), 1) for i, n in enumerate(layers)}
                with in_place(places, scaled):
                    loss = F.cross_entropy(model.head(net(images, returnt="features")), labels)
                opt.zero_grad()
                loss.backward()
                opt.step()
        return logits.detach().softmax(0)
    finally:
        lora.remove()


def shapley(predict, x: np.ndarray, background: np.ndarray) -> tuple[float, np.ndarray]:
    """Base value and (n x 2) interventional Shapley values of a function of two inputs; base + sum = f(x).

    Args:
        predict: (n x 2) -> (n,). x: points to explain. background: what unknown inputs are averaged over.
    """
    both, base = predict(x), float(predict(background).mean())
    only = []
    for i in range(2):
        mixed = np.repeat(background[None], len(x), 0)
        mixed[:, :, i] = x[:, None, i]
        only.append(predict(mixed.reshape(-1, 2)).reshape(len(x), -1).mean(1))
    phi_A = (only[0] - base + both - only[1]) / 2
    phi_B = (only[1] - base + both - only[0]) / 2
    return base, np.stack([phi_A, phi_B], 1)


def table_of(x: np.ndarray, phi: np.ndarray, base: float, like: dict = RULE) -> list[list[float]]:
    """The 3 x 3 table: base + mean phi_B of the row + mean phi_A of the column, kept above zero."""
    means = []
    for i, name in enumerate("AB"):
        low, high = like[f"quantiles_{name}"]
        cell = 1 + (x[:, i] > high).astype(int) - (x[:, i] < low).astype(int)
        means.append([float(phi[cell == c, i].mean()) if (cell == c).any() else 0.0 for c in range(3)])
    return [[max(base + b + a, 1e-6) for a in means[0]] for b in means[1]]


def fit(x: np.ndarray, y: np.ndarray, seed: int = 0) -> list[list[float]]:
    """The table of weights y (n,) given ranks x (n x 2) of (I_A, I_B)."""
    from sklearn.ensemble import GradientBoostingRegressor

    trees = GradientBoostingRegressor(n_estimators=100, max_depth=3, random_state=seed).fit(x, y)
    rng = np.random.default_rng(seed)
    background = x[rng.permutation(len(x))[:200]]
    base, phi = shapley(trees.predict, x, background)
    return table_of(x, phi, base)


def collect(args, server_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (n x 2) and weights (n,) of all rounds of a run on the proxy data set."""
    from datasets.utils.partition import Partition
    from federated.clients import Clients, Ledger
    from federated.engines import make_engine
    from main import build
    from utils.conf import set_random_seed

    dataset, model, worker, _ = build(args)
    partition, ledger = Partition.make(dataset, args), Ledger()
    ids = [i for i, n in enumerate(partition.sizes(0)) if n > 0]
    engine = make_engine(worker, partition, {}, args)
    dataset.get_data_loaders()
    test = torch.cat([dataset.task_indices(t, train=False) for t in range(dataset.n_eval_tasks)])
    generator = torch.Generator().manual_seed(args.seed)
    test = test[torch.randperm(len(test), generator=generator)[:server_images]]
    images, labels = next(iter(dataset.loader(test, 0, len(test), train=False, device=model.device)))
    model.omega = lambda replies, shares: shares[:, None].expand(-1, len(model._own_names))  # plain federated LoRA
    points, weights = [], []
    try:
        set_random_seed(args.seed, "server", 0, "begin")
        model.meta_begin_task(dataset)
        model.begin_rounds(Clients(ids, engine, ledger, 0))
        for r in range(args.num_comm_rounds):
            set_random_seed(args.seed, "server", 0, "round", r)
            replies = Clients(ids, engine, ledger, 0, r).call("local_update", model.broadcast())
            model.aggregate(replies)
            factors = [{n: (x[f["A"]], x[f["B"]]) for n, f in model._own_names.items()} for x in replies]
            y = best_weights(model, factors, images, labels)
            I_A, I_B = (ranks(torch.stack([x[f"importance.{f}"] for x in replies]).cpu()) for f in "AB")
            points.append(np.stack([I_A.ravel(), I_B.ravel()], 1))
            weights.append(y.cpu().double().numpy().ravel())
            print(f"round {r + 1}/{args.num_comm_rounds}: {y.numel()} weights between {y.min():.3f} and {y.max():.3f}")
    finally:
        engine.close()
    return np.concatenate(points), np.concatenate(weights)


def main(argv: list[str] | None = None) -> int:
    from utils.args import parse_args

    parser = ArgumentParser(prog="python -m utils.livar_fit_rule", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--server_images", type=int, default=256, help="labelled proxy images (default: %(default)s)")
    options, rest = parser.parse_known_args(argv)
    try:
        if options.server_images < 1:
            raise UserError("--server_images: give 1 or more")
        if not Path(options.out).resolve().parent.is_dir():
            raise UserError(f"--out {options.out}: its folder does not exist; make it first")
        settings = ["--model", "livar", "--joint", "1", "--fl", "--livar_rule", "table"]
        x, y = collect(parse_args([*settings, *rest]), options.server_images)
    except (UserError, RunError) as e:
        print("error:", *str(e).split(), file=sys.stderr)
        return 2
    table = fit(x, y)
    rule = {
        **{k: RULE[k] for k in ("quantiles_A", "quantiles_B")},
        "table": table,
        "fitted_with": rest,
        "points": len(y),
    }
    with replacing(Path(options.out)) as temporary:
        temporary.write_text(json.dumps(rule, indent=1) + "\n")
    for name, row in zip(("I_B low", "I_B mid", "I_B high"), table, strict=True):
        print(f"{name:9}", "  ".join(f"{v:.4f}" for v in row), "  (columns: I_A low, mid, high)")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
