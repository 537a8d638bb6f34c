"""What is measured of task vectors once they are all there: addition over coefficients, negation, disentanglement.

A *method* here is a ``TaskArithmetic``: ``along(x, vectors)`` gives f(x) at any combination of vectors, ``head_logits``
the logits of features.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backbones.utils import peft_files
from datasets import get_dataset
from datasets.utils import seeded, stratified_split
from datasets.utils.continual_dataset import ContinualDataset
from models.utils.merging import dare, iso_c, iso_cts, ties_merge, tsv_m, weighted_mean, wudi
from utils.conf import make_generator
from utils.errors import UserError
from utils.evaluate import evaluating, evaluation_batches
from utils.files import replacing
from utils.loggers import write_csv

Vector = Mapping[str, Tensor]

GRID = [x / 2 for x in range(-6, 7)]  # coefficients of disentanglement error, -3 to 3 (arXiv 2305.12827, fig. 3)
LAYER_BATCH = 32  # images whose outputs of all layers are held at once
KEPT = 0.95  # share of the control data set's accuracy that negation must leave (arXiv 2212.04089, sec. 3)


# ---------------------------------------------------------------- mergers


def combined(vectors: Sequence[Vector], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """sum_i c_i v_i."""
    return {n: weighted_mean([v[n] for v in vectors], coefficients) for n in vectors[0]}


def _matrices(rule: Callable[[Sequence[Tensor]], Tensor]) -> Callable:
    """A merger of matrices; what is no matrix is averaged."""

    def merger(taus, generator):
        return {
            n: rule([t[n] for t in taus]) if tau.dim() == 2 else mean
            for (n, tau), mean in zip(taus[0].items(), _mean(taus, generator).values())
        }

    return merger


def _sum(taus, generator):
    return combined(taus, [1.0] * len(taus))


def _mean(taus, generator):
    return combined(taus, [1 / len(taus)] * len(taus))


def _ties(taus, generator):
    """Over the whole vector, 20 % kept, mean of those that agree."""
    whole = ties_merge([torch.cat([t.flatten() for t in tau.values()]) for tau in taus])
    parts = whole.split([t.numel() for t in taus[0].values()])
    return {n: part.view_as(t) for (n, t), part in zip(taus[0].items(), parts)}


def _dare(taus, generator):
    """Half of the entries, then the sum."""
    return _sum([{n: dare(t, 0.5, generator) for n, t in tau.items()} for tau in taus], generator)


MERGERS: dict[str, Callable] = {
    "ta": _sum,
    "mean": _mean,
    "ties": _ties,
    "dare": _dare,
    "iso_c": _matrices(iso_c),
    "iso_cts": _matrices(iso_cts),
    "tsv_m": _matrices(tsv_m),
    "wudi": _matrices(wudi),
}


@torch.no_grad()
def merge(taus: Sequence[Vector], how: str, seed: int | None) -> dict[str, Tensor]:
    """One vector from several, {name: tensor}, by a rule of :data:`MERGERS`; draws are seeded by ``seed``."""
    return MERGERS[how](taus, make_generator(seed, "merge", len(taus)))


# ---------------------------------------------------------------- on disk


def write_task_vectors(file: Path, taus: Sequence[Vector]) -> None:
    """All task vectors in one file: tensors '<task>.<parameter>'."""
    with replacing(file) as temporary:
        save_file({f"{t}.{n}": v.cpu().contiguous() for t, tau in enumerate(taus) for n, v in tau.items()}, temporary)


def read_task_vectors(paths: Sequence[str], method) -> list[dict[str, Tensor]]:
    """One task vector for each task of a method.

    Args:
        paths: a file of :func:`write_task_vectors`, or for each task in order a LoRA folder or a fine-tuned network
            (:func:`of_checkpoint`). Parameters that a LoRA folder says nothing of are zero.

    Raises:
        UserError: nothing readable there, too few or too many tasks, or parameters that this method does not train.
    """
    like, n = method._own_lin.zeros(), method.n_tasks
    files = [Path(p) for p in paths]
    try:
        if len(files) == 1 and files[0].is_file():
            stored = load_file(files[0])
            taus: list[dict[str, Tensor]] = [{} for _ in range(1 + max(int(k.split(".")[0]) for k in stored))]
            for k, t in stored.items():
                task, _, name = k.partition(".")
                taus[int(task)][name] = t
        else:
            taus = [
                {f"{layer}.weight": scale * B @ A for layer, (A, B, scale) in peft_files.read(f).items()}
                if (f / "adapter_config.json").exists()
                else of_checkpoint(f, method._own_lin.start())
                for f in files
            ]
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as e:
        raise UserError(
            f"--merge_from {' '.join(paths)}: no task vectors ({' '.join(str(e).split())[:150]}); give the "
            "task_vectors.safetensors of a run with --save_task_vectors, or for each task a PEFT folder, a folder with "
            "model.safetensors, or a file of weights"
        ) from e
    if len(taus) != n:
        raise UserError(f"--merge_from gives {len(taus)} task vectors, {method.args.dataset} has {n} tasks")
    for tau in taus:
        odd = [k for k, t in tau.items() if k not in like or t.shape != like[k].shape]
        if odd:
            raise UserError(
                f"--merge_from: {odd[0]} {tuple(tau[odd[0]].shape)} is no parameter that this run would train; use the "
                "--backbone, --regime and --ft_... with which the vectors were made"
            )
    return [{k: tau[k].to(z) if k in tau else z for k, z in like.items()} for tau in taus]


def of_checkpoint(path: Path, start: Vector) -> dict[str, Tensor]:
    """theta_t - theta_0 of a fine-tuned network, in the parameters of ``start``, theta_0.

    Args:
        path: a file of weights (.safetensors, or what ``torch.save`` wrote, of which nothing is executed), or a folder
            with model.safetensors or pytorch_model.bin, as the hub has them. Names may have prefixes that ours do not
            have, or lack ours (``vision_model.``).

    Raises:
        ValueError: a parameter is missing, ambiguous, or of another shape. OSError: no such file.
    """
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((path / n for n in names if (path / n).exists()), path / names[0]) if path.is_dir() else path
    if file.suffix == ".safetensors":
        stored = load_file(file)
    else:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        stored = stored.get("state_dict", stored)
    tau = {}
    for name, before in start.items():
        found = [k for k in stored if k == name or k.endswith(f".{name}") or name.endswith(f".{k}")]
        if len(found) != 1:
            raise ValueError(f"{file} has {'several' if found else 'no'} {name}")
        if stored[found[0]].shape != before.shape:
            raise ValueError(f"{file}: {name} is {tuple(stored[found[0]].shape)}, not {tuple(before.shape)}")
        tau[name] = stored[found[0]].to(before) - before
    return tau


# ---------------------------------------------------------------- accuracies


@torch.no_grad()
def right(
    method, batches: Iterable, classes: tuple[int, int], vectors: Sequence[Vector], grid: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Images that are right among ``classes``, (grid,) at each coefficient of the first vector; with the second vector
    alone, a number; and how many there are."""
    found, alone, n = (torch.zeros(k, device=method.device) for k in (len(grid), 1, 1))
    for x, y in batches:
        f, y = method.along(x, list(vectors)), y - classes[0]

        def hits(*c, f=f, y=y):
            return (method.head_logits(f(*c), *classes).argmax(1) == y).sum()

        rest = [0.0] * (len(vectors) - 1)
        found += torch.stack([hits(c, *rest) for c in grid])
        alone += hits(0.0, 1.0) if rest else 0
        n += len(y)
    return found, alone[0], n[0]


def final_metrics(method, dataset, folder: Path) -> dict[str, float]:
    """Everything below, for the tasks learnt; figures and tables go to ``folder``.

    Returns:
        Accuracies in %, of images among the classes of their own task, means over tasks: ``zero_shot_acc`` at theta_0,
        ``individual_acc`` with tau_t alone, ``absolute_acc`` at ``--alpha``, ``absolute_acc_best`` at ``best_alpha``
        (chosen with images held out), and ``normalized_acc``, ``normalized_acc_best``, the mean over tasks of 100 *
        merged / individual. alpha.csv has the sweep over coefficients.
    """
    grid = sorted({round(a, 9) for a in [*method.coefficients(), 0.0, method.args.alpha]})
    merged, tasks = method.merged_vector(), range(len(method.taus))
    found, alone = [], []
    for t in tasks:
        batches = evaluation_batches(dataset, t, method.device)
        hits, single, n = right(method, batches, dataset.get_offsets(t), [merged, method.taus[t]], grid)
        found.append(100 * hits.cpu().double() / float(n))
        alone.append(100 * float(single) / float(n))
    accuracy = torch.stack(found, 1)  # (grid, tasks)
    share = 100 * accuracy / torch.tensor(alone, dtype=torch.float64).clamp(min=1e-9)
    rows = [
        {"alpha": a, "absolute_acc": float(acc.mean()), "normalized_acc": float(s.mean())}
        | {f"task_{t + 1}": float(acc[t]) for t in tasks}
        for a, acc, s in zip(grid, accuracy, share)
    ]
    write_csv(folder / "alpha.csv", rows)
    _plot_alpha(rows, folder / "alpha.png")

    def at(a: float) -> dict:
        return rows[min(range(len(grid)), key=lambda i: abs(grid[i] - a))]

    out = {
        "zero_shot_acc": at(0.0)["absolute_acc"],
        "individual_acc": sum(alone) / len(alone),
        "absolute_acc": at(method.args.alpha)["absolute_acc"],
        "normalized_acc": at(method.args.alpha)["normalized_acc"],
    }
    best = best_coefficient(method)
    if best is not None:
        out |= {"best_alpha": best}
        out |= {f"{k}_best": at(best)[k] for k in ("absolute_acc", "normalized_acc")}
    if method.args.layer_errors:
        out["layer_error"] = layer_errors(method, dataset, folder)
    if method.args.localisation:
        out["localisation_auroc"] = localisation(method, dataset, folder)
    for a, b in zip(method.args.disentanglement[::2], method.args.disentanglement[1::2]):
        out[f"disentanglement_{a}_{b}"] = disentanglement(method, dataset, (a, b), folder)
    if method.args.control_dataset:
        out |= negation(method, dataset)
    return out


def best_coefficient(method) -> float | None:
    """The coefficient with the best mean normalised accuracy on the images held out; None without any."""
    said = [s for s in method.held_out.values() if s[-1] > 0]
    if not said:
        return None
    score = sum(s[:-2].cpu() / s[-2].cpu().clamp(min=1) for s in said) / len(said)
    return round(method.coefficients()[int(score.argmax())], 9)


def _plot_alpha(rows: list[dict], file: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5, 3.2), layout="constrained")
    ax, xs = fig.subplots(), [r["alpha"] for r in rows]
    for name in [k for k in rows[0] if k.startswith("task_")]:
        ax.plot(xs, [r[name] for r in rows], color="#999999", lw=0.7)
    ax.plot(xs, [r["absolute_acc"] for r in rows], color="#0072B2", lw=2, label="mean over tasks")
    ax.set(xlabel="coefficient of the merged vector", ylabel="accuracy, own classes (%)", ylim=(0, 101))
    ax.legend()
    fig.savefig(file, dpi=120)


# ---------------------------------------------------------------- negation


def control_dataset(method) -> tuple[ContinualDataset, Tensor, Tensor]:
    """``--control_dataset``, and its training samples in two parts: nine tenths, and those that choose coefficients."""
    other = ("n_epochs", "validation", "joint", "dataset_attributes")
    args = {k: v for k, v in vars(method.args).items() if k not in other}
    control = get_dataset(Namespace(**{**args, "dataset": method.args.control_dataset, "joint": 0})).to(method.device)
    parts = stratified_split(control.train_labels.cpu().numpy(), 0.1, seeded(method.args.seed, "control"))
    return control, *map(torch.from_numpy, parts)


@torch.no_grad()
def negation(method, dataset) -> dict[str, float]:
    """f(x, theta_0 - alpha tau_t) for each task: the lowest target accuracy that leaves 95 % of the control's.

    alpha is chosen by images held out of the target's training set and by a tenth of the control data set's; reported
    are both test sets (arXiv 2212.04089, sec. 3). Returns means over tasks: ``negation_target``, ``negation_control``,
    ``control_zero_shot``, and ``negation_alpha``.
    """
    control, rest, chosen = control_dataset(method)
    text, mine = getattr(method.net, "rows_of", None), method.rows
    rows = text(control) if text else None
    if rows is None:
        batches = control.loader(rest, 0, 256, False, device=method.device, split="train")
        rows = F.normalize(method.sums_of_classes(batches, control.N_CLASSES), dim=1)
    grid = method.negative_coefficients()  # the first is 0

    def control_right(tau, batches) -> Tensor:
        method.rows = rows
        try:
            hits, _, n = right(method, batches, (0, control.N_CLASSES), [tau], grid)
        finally:
            method.rows = mine
        return (100 * hits / n).cpu()

    def control_test():
        for t in range(control.n_eval_tasks):
            yield from evaluation_batches(control, t, method.device)

    targets, controls, alphas, zero = [], [], [], 0.0
    for t, tau in enumerate(method.taus):
        validation = control.loader(chosen, 0, 256, False, device=method.device, split="train")
        kept = control_right(tau, validation)
        allowed = kept >= KEPT * kept[0]
        best = int(torch.where(allowed, method.negated[t][:-2].cpu(), torch.inf).argmin())
        hits, _, n = right(method, evaluation_batches(dataset, t, method.device), dataset.get_offsets(t), [tau], grid)
        on_test = control_right(tau, control_test())
        targets.append(float(100 * hits[best] / n))
        controls.append(float(on_test[best]))
        alphas.append(-grid[best])
        zero = float(on_test[0])
    k = len(targets)
    return {
        "negation_target": sum(targets) / k,
        "negation_control": sum(controls) / k,
        "negation_alpha": sum(alphas) / k,
        "control_zero_shot": zero,
    }


# ---------------------------------------------------------------- disentanglement and localisation


@torch.no_grad()
def disentanglement(method, dataset, pair: tuple[int, int], folder: Path) -> float:
    """xi(a, b) = sum_t P_{x of task t}[argmax f(x; a_t tau_t) != argmax f(x; a tau_1 + b tau_2)] (2305.12827, eq. 8).

    Writes the map over coefficients from -3 to 3 as disentanglement_<pair>.csv and .png.

    Returns:
        xi at (1, 1), in % (of 200).
    """
    taus = [method.taus[t] for t in pair]
    error = torch.zeros(len(GRID), len(GRID))
    for i, t in enumerate(pair):
        classes, n, wrong = dataset.get_offsets(t), 0, torch.zeros_like(error, device=method.device)
        for x, _ in evaluation_batches(dataset, t, method.device, slice(1024)):
            f = method.along(x, taus)

            def said(a, b, f=f, classes=classes):
                return method.head_logits(f(a, b), *classes).argmax(1)

            alone = [said(*((c, 0.0) if i == 0 else (0.0, c))) for c in GRID]
            for j, a in enumerate(GRID):
                for k, b in enumerate(GRID):
                    wrong[j, k] += (said(a, b) != alone[j if i == 0 else k]).sum()
            n += len(x)
        error += wrong.cpu() / n
    name = f"disentanglement_{pair[0]}_{pair[1]}"
    write_csv(
        folder / f"{name}.csv",
        [{"a": a, "b": b, "error": float(error[j, k])} for j, a in enumerate(GRID) for k, b in enumerate(GRID)],
    )
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.8, 3.6), layout="constrained")  # a square, its labels and the bar
    ax = fig.subplots()
    shown = ax.imshow(
        100 * error.T, origin="lower", extent=(-3.25, 3.25, -3.25, 3.25), vmin=0, vmax=200, cmap="viridis"
    )
    ax.set(xlabel=f"coefficient of task {pair[0] + 1}", ylabel=f"coefficient of task {pair[1] + 1}")
    fig.colorbar(shown, label="disentanglement error (%)")
    fig.savefig(folder / f"{name}.png", dpi=120)
    return 100 * float(error[GRID.index(1.0), GRID.index(1.0)])


@torch.no_grad()
def localisation(method, dataset, folder: Path) -> float:
    """AUROC of |J(x) tau_t|^2 at telling test images of task t from those of the others, the mean over t (in %)."""
    from sklearn.metrics import roc_auc_score

    scores, owners = [], []
    for t in range(len(method.taus)):
        for x, _ in evaluation_batches(dataset, t, method.device, slice(1024)):
            _, products = method._own_lin.expansion(x, method.taus)
            scores.append(torch.stack([p.square().sum(1) for p in products], 1).cpu())
            owners += [t] * len(x)
    score, owner = torch.cat(scores), torch.tensor(owners)
    area = [100 * float(roc_auc_score((owner == t).numpy(), score[:, t].numpy())) for t in range(len(method.taus))]
    write_csv(folder / "localisation.csv", [{"task": t + 1, "auroc": a} for t, a in enumerate(area)])
    return sum(area) / len(area)


# ---------------------------------------------------------------- layers


def layer_outputs(method, theta: Vector, x: Tensor) -> dict[str, Tensor]:
    """What each linear layer that is trained gives for images x with weights ``theta``, in the order of their use."""
    names = [n.removesuffix(".weight") for n in method._own_lin.places if n.endswith(".weight")]
    found: dict[str, Tensor] = {}
    handles = [
        method.net.get_submodule(n).register_forward_hook(lambda module, args, y, n=n: found.__setitem__(n, y))
        for n in names
        if isinstance(method.net.get_submodule(n), nn.Linear)
    ]
    try:
        with evaluating(method.net):
            method._own_lin.at(theta, x)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def layer_errors(method, dataset, folder: Path) -> float:
    """How far layers are from the experts': |Y - Y_t|^2 / |Y_t|^2 over test images of task t, in %.

    Y are the outputs of a linear layer in the merged network (at ``--alpha``), Y_t in expert t, each given what comes
    out of its own layers before. Writes layer_errors.csv, a row for each layer, and .png.

    Returns:
        The mean over layers and tasks.
    """
    start = method._own_lin.start()
    merged = {n: start[n] + method.args.alpha * t for n, t in method.merged_vector().items()}
    rows: dict[str, dict] = {}
    for t, tau in enumerate(method.taus):
        expert, off, size = {n: start[n] + d for n, d in tau.items()}, {}, {}
        for batch, _ in evaluation_batches(dataset, t, method.device, slice(1024)):
            for x in batch.split(LAYER_BATCH):
                theirs = layer_outputs(method, expert, x)
                for n, y in layer_outputs(method, merged, x).items():
                    off[n] = off.get(n, 0.0) + float((y - theirs[n]).double().square().sum())
                    size[n] = size.get(n, 0.0) + float(theirs[n].double().square().sum())
        for n in off:
            rows.setdefault(n, {"layer": n})[f"task_{t + 1}"] = 100 * off[n] / max(size[n], 1e-30)
    table = [r | {"mean": sum(list(r.values())[1:]) / len(method.taus)} for r in rows.values()]
    write_csv(folder / "layer_errors.csv", table)
    from matplotlib.figure import Figure

    fig = Figure(figsize=(max(5, 0.18 * len(table)), 3.6), layout="constrained")
    ax = fig.subplots()
    for t in range(len(method.taus)):
        ax.plot([r[f"task_{t + 1}"] for r in table], color="#999999", lw=0.7)
    ax.plot([r["mean"] for r in table], color="#0072B2", lw=2, label="mean over tasks")
    ax.set_xticks(range(len(table)), [r["layer"] for r in table], rotation=90, fontsize=6)
    ax.set(ylabel="error of the layer's outputs (%)", ylim=(0, None))
    ax.legend()
    fig.savefig(folder / "layer_errors.png", dpi=120)
    return sum(r["mean"] for r in table) / len(table)
