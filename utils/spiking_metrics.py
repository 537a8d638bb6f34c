"""What a spiking network costs and how it depends on time, measured after each task (``--measure_spikes 1``).

Networks with ReLUs have the costs too, of the multiply-accumulates that their spiking twin is compared with.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from backbones.utils.spikes import SpikeMeter, SpikeRecorder, neuron_layers
from models.utils.soft_dtw import soft_dtw_divergence
from utils.evaluate import EVAL_BATCH, evaluate, evaluating, evaluation_batches

STEPS = (1, 2, 4, 8)  # time steps to test with, whatever the network was trained with


@torch.no_grad()
def spiking_metrics(model, dataset, after: int) -> dict[str, float]:
    """Over the test images of all tasks up to ``after``, with the network as it is.

    Returns:
        ``energy_mj``, ``macs``, ``sops`` (for each image) and ``firing_rate`` (spikes for each neuron and step) of
        :class:`SpikeMeter`; for networks over time ``faa_T1`` ... ``faa_T8``, class-IL accuracy in % (mean over tasks)
        with so many steps (of events: where their frames can be counted into so many); for methods that keep logits in
        time ``logit_drift``, the mean Soft-DTW divergence between what the network says of its stored images now and
        what it said then, also for the images of each task.
    """
    net, tasks = model.net, list(range(after + 1))

    def faa() -> float:
        return sum(evaluate(model, dataset, tasks)[0]) / len(tasks)

    with SpikeMeter(net) as meter:
        as_trained = faa()
    out = {k: v for k, v in meter.energy().items() if k != "dense_macs"}
    if not neuron_layers(net):
        del out["firing_rate"], out["sops"]
    if hasattr(net, "sequence"):
        trained_with = net.T
        try:
            for steps in STEPS:
                net.T = steps
                with dataset.steps(steps) if dataset.FRAMES else nullcontext(True) as possible:
                    if possible:
                        out[f"faa_T{steps}"] = as_trained if steps == trained_with else faa()
        finally:
            net.T = trained_with
        with evaluating(model):
            out |= logit_drift(model, dataset.n_eval_tasks)
    return out


def logit_drift(model, n_tasks: int) -> dict[str, float | None]:
    """Mean divergence of the traces over T steps that the method keeps (``kept_traces``); nothing if it keeps none.

    Returns:
        ``logit_drift`` over all that is kept, and ``logit_drift_1`` ... ``logit_drift_<n_tasks>`` over each task's
        (None: nothing kept).
    """
    kept = model.kept_traces() if hasattr(model, "kept_traces") else None
    if kept is None:
        return {}
    images, then, tasks = kept
    parts = [
        soft_dtw_divergence(model.net.sequence(x).transpose(0, 1), p)
        for x, p in zip(images.split(EVAL_BATCH), then.split(EVAL_BATCH))
    ]
    drift = torch.cat(parts)
    of_tasks = [drift[tasks == t] for t in range(n_tasks)]
    by_task = {f"logit_drift_{t + 1}": float(d.mean()) if len(d) else None for t, d in enumerate(of_tasks)}
    return {"logit_drift": float(drift.mean()), **by_task}


def plot_spikes(model, dataset, after: int, file: str | Path) -> None:
    """A picture of one test image of each task so far: rasters of the first, a middle and the last layer, and rates.

    A raster has a row for each of at most 200 neurons (those that fire most) and a column for each time step.
    """
    from matplotlib.figure import Figure  # not pyplot, as in utils/report_plots.py

    layers = list(neuron_layers(model.net))
    shown = list(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]))
    firsts = [x for t in range(after + 1) for x, _ in evaluation_batches(dataset, t, model.device, slice(1))]
    with (
        torch.no_grad(),
        evaluating(model),
        SpikeMeter(model.net) as meter,
        SpikeRecorder(model.net, shown) as recorder,
    ):
        for x in firsts:
            model(x)
    fig = Figure(figsize=(8, 2.2 * (len(shown) + 1)), layout="constrained")
    axes = fig.subplots(len(shown) + 1, 1, squeeze=False)
    for ax, name in zip(axes[:, 0], shown):
        spikes = recorder[name].flatten(2).float()  # (T, images, neurons)
        T, n, _ = spikes.shape
        most = spikes.sum((0, 1)).argsort(descending=True)[:200].sort().values
        ax.imshow(spikes[..., most].permute(2, 1, 0).flatten(1), aspect="auto", cmap="Greys", interpolation="nearest")
        for i in range(1, n):
            ax.axvline(i * T - 0.5, color="#D55E00", lw=0.8)
        ax.set_xticks([i * T + (T - 1) / 2 for i in range(n)], [f"task {i + 1}" for i in range(n)])
        ax.set_ylabel(f"{name}\n{len(most)} neurons")
    rates = meter.rates()
    axes[-1, 0].bar(range(len(rates)), list(rates.values()), color="#0072B2")
    axes[-1, 0].set_xticks(range(len(rates)), list(rates), rotation=60, ha="right", fontsize=7)
    axes[-1, 0].set_ylabel("firing rate")
    axes[0, 0].set_title(f"spikes of one test image per task over {T} steps, after task {after + 1}")
    fig.savefig(file, dpi=120)
