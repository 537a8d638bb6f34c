"""How results are shown: tables as text, and figures of the accuracy matrices. Used by ``utils.compare``."""

from __future__ import annotations

import csv
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:  # imported where used
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from pandas import DataFrame

LOWER_IS_BETTER = re.compile(
    r"forgetting|.*_mb$|.*_seconds$|.*memory|trainable_params$|(\w+_)?incremental_bias|(\w+_)?prediction_kl|federated_bias$|energy_mj|macs$|sops$|firing_rate|logit_drift|negation_target|disentanglement|layer_error"
)
HIGHER_IS_BETTER = re.compile(
    r"faa|avg_inc_acc|bwt|fwt|(ncm|probe)_accuracy|\w+_acc(_best)?$|localisation_auroc|negation_control|control_zero"
)
ANSI = re.compile(r"\033\[\dm")
# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles and markers tell its repeats apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS, DASHES = "osD^vPX", ["-", "--", ":", "-."]


def note(message: str) -> None:
    print(f"compare: {message}", file=sys.stderr)


def direction(metric: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where that is not known (no best is marked then)."""
    return -1 if LOWER_IS_BETTER.match(metric) else int(bool(HIGHER_IS_BETTER.match(metric)))


def text(value: object) -> str:
    """A setting as it is shown: ``-`` for none, 10.0 as 10."""
    if value is None or value != value or value == "":
        return "-"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """A result as it is shown; ``-`` for nan."""
    if value != value:
        return "-"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def latex(value: str) -> str:
    """``value`` with what is special to LaTeX escaped."""
    special = {c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    special |= {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    return "".join(special.get(c, c) for c in value)


def aligned(rows: list[list[str]], left: int) -> str:
    """Rows in columns, a rule under the first row; the first ``left`` columns to the left, the others to the right."""
    sizes = [[len(ANSI.sub("", value)) for value in row] for row in rows]
    widths = [max(column) for column in zip(*sizes)]
    lines = []
    for row, size in zip(rows, sizes):
        gaps = [" " * (w - s) for w, s in zip(widths, size)]
        lines.append("  ".join(v + g if i < left else g + v for i, (v, g) in enumerate(zip(row, gaps))).rstrip())
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], ""])


def spread(std: float, mean: str) -> str:
    """A deviation with the decimals of the mean it stands beside."""
    return number(std) if "e" in mean else f"{std:.{len(mean.partition('.')[2])}f}"


def render(result: DataFrame, fmt: str = "table", ansi: bool = False) -> str:
    """A table of ``utils.compare.table`` as text.

    Args:
        fmt: ``table`` (for a terminal; bold only with ``ansi``), ``md``, ``csv`` (raw numbers) or ``latex`` (booktabs).

    Returns:
        Lines. The best mean of each dataset, at the precision shown, is bold where the dataset has several values.
    """
    if fmt == "csv":
        return result.to_csv(index=False)
    bold = {"table": "\033[1m%s\033[0m" if ansi else "%s", "md": "**%s**", "latex": r"\textbf{%s}"}[fmt]
    escape = {"table": str, "md": lambda value: value.replace("|", r"\|"), "latex": latex}[fmt]
    metrics = [name[:-5] for name in result if name.endswith("_mean")]
    labels = list(result.columns[: result.columns.get_loc("n")])
    p = [name for name in result if name.startswith("p_") and not name.endswith(("_mean", "_std", "_n"))]
    dataset = [text(value) for value in result["dataset"]] if "dataset" in result else ["-"] * len(result)
    best: dict[tuple[str, str], str] = {}
    for name in filter(direction, metrics):
        for key, means in result[f"{name}_mean"].groupby(dataset):
            if means.dropna().map(number).nunique() > 1:
                best[name, key] = number(means.max() if direction(name) > 0 else means.min())
    arrow = {0: "", 1: " ↑", -1: " ↓"} if fmt != "table" else {0: "", 1: "", -1: ""}
    rows = [[escape(name) for name in [*labels, "n", *(name + arrow[direction(name)] for name in metrics), *p]]]
    for row, key in zip(result.to_dict("records"), dataset):
        cells = [escape(text(row[name])) for name in [*labels, "n"]]
        for name in metrics:
            mean, std, n = (row[f"{name}_{part}"] for part in ("mean", "std", "n"))
            shown = number(mean) + (f" ± {spread(std, number(mean))}" if std == std else "")
            shown = escape(shown + (f" (n={n})" if 0 < n < row["n"] else ""))
            cells.append(bold % shown if best.get((name, key)) == number(mean) else shown)
        tests = (row[name] for name in p)
        rows.append(cells + [escape("<0.001" if v < 0.001 else "-" if v != v else f"{v:.3f}") for v in tests])
    if fmt == "table":
        return aligned(rows, len(labels))
    rule = ["---"] * len(labels) + ["---:"] * (len(rows[0]) - len(labels))
    if fmt == "md":
        return "".join("| " + " | ".join(row) + " |\n" for row in [rows[0], rule, *rows[1:]])
    lines = [" & ".join(row) + r" \\" for row in rows]
    for i in range(len(dataset), 0, -1):  # from the end: a line more moves those after it
        if i == 1 or dataset[i - 1] != dataset[i - 2]:
            lines.insert(i, r"\midrule")
    spec = "".join("r" if column.endswith(":") else "l" for column in rule)
    lines = [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def read_accuracy(run_dir: str | Path) -> dict[str, np.ndarray]:
    """The matrices of accuracy.csv, in per cent: ``{"class-il": (T, T), "task-il": (T, T)}``, nan where not evaluated.

    A setting with one complete row (joint training) gives shape ``(1, T)``; a missing file no settings.

    Raises:
        UserError: the file is not complete, or not such a file.
    """
    import numpy as np

    path = Path(run_dir) / "accuracy.csv"
    matrices: dict[str, np.ndarray] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                tasks = sorted((key for key in row if key.startswith("task_")), key=lambda key: int(key[5:]))
                matrix = matrices.setdefault(row["setting"], np.full((len(tasks), len(tasks)), np.nan))
                if (i := int(row["after_task"])) >= 0:  # below: before training
                    matrix[i] = [float(row[key]) if row[key] != "" else np.nan for key in tasks]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}); is it still being written?") from error
    for setting, matrix in matrices.items():
        rows = np.isfinite(matrix).any(axis=1)
        if rows.sum() == 1 and np.isfinite(matrix[rows]).all():
            matrices[setting] = matrix[rows]
    return matrices


def plot(groups: list[tuple[dict[str, object], DataFrame]], path: Path) -> list[Path]:
    """Draws the rows of `utils.compare.groups`, a figure per dataset.

    Left, the accuracy on the tasks seen so far while learning: mean over seeds, band of one sample deviation. Right,
    the class-il accuracy matrix of each row (mean over seeds). Tasks are numbered from 1, as in papers.

    Args:
        path: where to; the suffix says the format. With several datasets, ``-<dataset>`` is put before the suffix.

    Returns:
        The files written.

    Raises:
        UserError: no run has accuracies, or an unknown format.
        OSError: a file that cannot be written.
    """
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: no window system is looked for, and Agg draws

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"--plot: cannot draw {path.name!r}; end the name in one of .{', .'.join(sorted(formats))}")
    curves: dict[str, list[tuple[str, np.ndarray]]] = {}
    for label, runs in groups:
        stack = []
        for run_dir in runs["path"]:
            try:
                matrices = read_accuracy(run_dir)
            except UserError as error:
                note(f"left out of the plot: {error}")
                continue
            stack += [matrices["class-il"]] if "class-il" in matrices else list(matrices.values())[:1]
        if stack:
            dataset = text(runs["dataset"].iloc[0] if "dataset" not in label else label["dataset"])
            shape = np.max([m.shape for m in stack], axis=0)
            padded = [np.pad(m, [(0, n - k) for n, k in zip(shape, m.shape)], constant_values=np.nan) for m in stack]
            curves.setdefault(dataset, []).append((_name(label, groups), np.stack(padded)))
    if not curves:
        raise UserError("--plot: none of these runs has an accuracy.csv")
    written = []
    for dataset, rows in curves.items():
        n_cols = min(len(rows), 3 if len(rows) in (3, 5, 6, 9) else 4)
        n_rows = -(-len(rows) // n_cols)
        left, height = 4.8, max(4.0, 3.1 * n_rows + 0.3)
        figure = Figure(figsize=(left + 2.6 * n_cols + 0.8, height), dpi=150, layout="constrained")
        figure.suptitle(dataset, fontsize=12)
        sides = figure.subfigures(1, 2, width_ratios=[left, 2.6 * n_cols + 0.8])
        axes = sides[0].subplots()
        _draw_curves(axes, rows)
        columns = 2 if max(len(name) for name, _ in rows) < 25 else 1
        sides[0].legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
        grid = sides[1].subplots(n_rows, n_cols, squeeze=False)
        for ax in grid.flat[len(rows) :]:
            ax.set_visible(False)
        for ax, (name, stack) in zip(grid.flat, rows):
            image = _draw_matrix(ax, name, stack)
        bar = sides[1].colorbar(image, ax=grid, shrink=0.8, aspect=30)
        bar.set_label("Accuracy (%)", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        file = path if len(curves) == 1 else path.with_name(f"{path.stem}-{dataset}{path.suffix}")
        figure.savefig(file)
        written.append(file)
    return written


def _name(label: dict[str, object], groups: list[tuple[dict[str, object], DataFrame]]) -> str:
    """``model (setting=value)`` with the settings that tell a row from the others of its model and dataset."""
    own = {key: label[key] for key in ("model", "dataset") if key in label}
    peers = [other for other, _ in groups if all(other[key] == value for key, value in own.items())]
    differing = [key for key in label if key not in own and len({text(peer[key]) for peer in peers}) > 1]
    settings = ", ".join(f"{key}={text(label[key])}" for key in differing)
    return f"{text(own.get('model', 'all'))} ({settings})" if settings else text(own.get("model", "all"))


def _mean_std(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample deviation over axis 0 of what is not nan; nan where nothing (for the deviation: one value) is."""
    import numpy as np

    known = np.isfinite(stack)
    n = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, stack, 0).sum(axis=0) / n
        std = np.sqrt(np.where(known, (stack - mean) ** 2, 0).sum(axis=0) / np.where(n > 1, n - 1, np.nan))
    return mean, std


def _draw_curves(ax: Axes, rows: list[tuple[str, np.ndarray]]) -> None:
    import numpy as np

    n_tasks = max(stack.shape[2] for _, stack in rows)
    for i, (name, stack) in enumerate(rows):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        label = f"{name}, {len(stack)} seed{'s' if len(stack) > 1 else ''}"
        if joint := stack.shape[1] == 1 < stack.shape[2]:  # one value, for all tasks at once: a line to compare with
            stack = np.repeat(stack, n_tasks, axis=1)
        else:
            stack = np.where(np.tri(*stack.shape[1:], dtype=bool), stack, np.nan)
        seen = np.stack([_mean_std(run.T)[0] for run in stack])  # (seeds, rows)
        mean, std = _mean_std(seen)
        x = np.arange(1, len(mean) + 1)
        if joint:
            colour, style = "0.4", {"ls": (0, (5, 2)), "lw": 1.2}
        else:
            style = {"ls": dash, "marker": MARKERS[(i + 3 * (i // len(COLOURS))) % len(MARKERS)], "ms": 4.5}
        ax.plot(x, mean, color=colour, label=label, **style)
        ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.18, lw=0)
    ax.set_xlabel("Tasks learned", fontsize=9)
    ax.set_ylabel("Accuracy on tasks seen so far (%)", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.set_xlim(0.75, n_tasks + 0.25)
    ax.set_xticks(_ticks(n_tasks) + 1)
    ax.set_ylim(top=min(ax.get_ylim()[1], 101))
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_matrix(ax: Axes, name: str, stack: np.ndarray) -> AxesImage:
    import numpy as np

    mean = _mean_std(stack)[0]
    n_rows, n_tasks = mean.shape
    ax.set_facecolor("0.94")  # what was not evaluated
    image = ax.imshow(np.ma.masked_invalid(mean), vmin=0, vmax=100, cmap="cividis", aspect="equal")
    ax.set_title(textwrap.fill(name, 30), fontsize=9)
    ax.set_xlabel("Accuracy on task", fontsize=8)
    ax.set_xticks(_ticks(n_tasks), _ticks(n_tasks) + 1)
    if n_rows == 1 < n_tasks:
        ax.set_yticks([0], ["all"])
    else:
        ax.set_yticks(_ticks(n_rows), _ticks(n_rows) + 1)
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel("After task", fontsize=8)
    ax.tick_params(labelsize=7, length=2)
    if n_tasks <= 10:
        for (i, j), value in np.ndenumerate(mean):
            if np.isfinite(value):
                size, colour = 9.5 - 0.45 * n_tasks, "white" if value < 55 else "black"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)
    return image


def _ticks(n: int) -> np.ndarray:
    """At most about ten of ``0 .. n - 1``."""
    import numpy as np

    return np.arange(0, n, -(-n // 10))


def plot_unlearning(rows: list[dict], file: Path) -> None:
    """Bars of unlearning.csv: accuracies of each way to forget, means over clients, with marks at those of the model
    retrained without the client (black) and of the one with everybody (grey)."""
    import pandas as pd
    from matplotlib.figure import Figure

    table = pd.DataFrame(rows)
    shown = {"FA": "the client's data", "RA": "the others'", "FTA": "unseen, the client's mix", "TA": "test"}
    columns = [p + k for k in shown for p in ("", "O_", "R_") if p + k in table]
    table[columns] = table[columns].apply(pd.to_numeric, errors="coerce")
    means = table.groupby("method", sort=False)[columns].mean()
    fig = Figure(figsize=(max(5.0, 1.6 + 1.1 * len(means)), 3.4), layout="constrained")
    ax, width = fig.subplots(), 0.8 / len(shown)
    for i, (k, name) in enumerate(shown.items()):
        xs = [j + (i - 1.5) * width for j in range(len(means))]
        ax.bar(xs, means[k], width, color=COLOURS[i], label=name)
        for prefix, colour in (("O_", "#999999"), ("R_", "black")):
            if prefix + k in means:
                ax.hlines(
                    means[prefix + k], [x - width / 2 for x in xs], [x + width / 2 for x in xs], colors=colour, lw=2
                )
    ax.set_xticks(range(len(means)), list(means.index))
    ax.set(ylabel="accuracy (%)", ylim=(0, 101))
    ax.plot([], [], color="black", lw=2, label="retrained without it")
    ax.plot([], [], color="#999999", lw=2, label="with everybody")
    fig.legend(ncol=3, fontsize=8, loc="outside upper center")
    fig.savefig(file, dpi=120)
