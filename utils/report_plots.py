"""How results are shown: tables as text, and figures. Used by ``utils.compare`` and ``utils.report``."""

from __future__ import annotations

import csv
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:  # imported where used
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage
    from pandas import DataFrame, Series

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
    print(f"note: {message}", file=sys.stderr)


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


def p_value(p: float, n: float) -> str:
    """A paired test as it is shown, with its number of pairs; ``-`` for a row that was not tested."""
    if n != n:
        return "-"
    return f"{'-' if p != p else '<0.001' if p < 0.001 else f'{p:.3f}'} (n={n:.0f})"


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
        rows.append(cells + [escape(p_value(row[name], row[f"{name}_n"])) for name in p])
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


def plot(groups: list[tuple[dict[str, object], DataFrame]], path: Path, kind: str = "overview") -> list[Path]:
    """Draws the rows of `utils.compare.groups`, a figure per dataset: means over seeds, one sample deviation.

    Args:
        path: where to; the suffix says the format. With several datasets, ``-<dataset>`` is put before the suffix.
        kind: ``tasks``, accuracy on the tasks seen so far, while learning; ``bytes``, the same over what the clients
            have sent; ``matrix``, the class-il accuracy matrices; ``overview``, tasks and matrices side by side;
            ``tradeoff``, accuracy after the last task against what was sent. Tasks are numbered from 1, as in papers.

    Returns:
        The files written.

    Raises:
        UserError: no run has what is to be drawn, or an unknown format.
        OSError: a file that cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system is looked for, and Agg draws

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"--plot: cannot draw {path.name!r}; end the name in one of .{', .'.join(sorted(formats))}")
    read, draw, needed = KINDS[kind]
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    for name, (label, runs) in zip(row_names([label for label, _ in groups]), groups):
        values = read(runs)
        if len(values):
            dataset = text(runs["dataset"].iloc[0] if "dataset" not in label else label["dataset"])
            found.setdefault(dataset, []).append((name, values))
    if not found:
        raise UserError(f"--plot: none of these runs has {needed}")
    written = []
    for dataset, rows in found.items():
        figure = draw(dataset, rows)
        file = path if len(found) == 1 else path.with_name(f"{path.stem}-{dataset}{path.suffix}")
        figure.savefig(file)
        written.append(file)
    return written


def row_names(labels: list[dict[str, object]]) -> list[str]:
    """``model (setting=value)`` for each row, with few settings that tell it from others of its model and dataset."""
    shown = [{key: text(value) for key, value in label.items()} for label in labels]
    peers: dict[tuple[str | None, ...], list[dict[str, str]]] = {}
    for row in shown:
        peers.setdefault((row.get("model"), row.get("dataset")), []).append(row)
    telling = {}
    for key, rows in peers.items():
        left, chosen, told = [name for name in rows[0] if name not in ("model", "dataset")], [], 1
        while told < len(rows) and left:  # the setting that tells most rows apart, then the one that adds most to it
            counts = [len({tuple(row[name] for name in [*chosen, more]) for row in rows}) for more in left]
            if max(counts) <= told:
                break
            told = max(counts)
            chosen.append(left.pop(counts.index(told)))
        telling[key] = chosen
    names = []
    for row in shown:
        key = row.get("model"), row.get("dataset")
        told = [row[name] if name == "model_config" else f"{name}={row[name]}" for name in telling[key]]
        names.append((key[0] or "all") + (f" ({', '.join(told)})" if told else ""))
    return names


def padded(stack: list[np.ndarray]) -> np.ndarray:
    """Arrays of different lengths as one, with nan where one has no value."""
    import numpy as np

    shape = np.max([values.shape for values in stack], axis=0)
    return np.stack([np.pad(v, [(0, n - k) for n, k in zip(shape, v.shape)], constant_values=np.nan) for v in stack])


def _readable(runs: DataFrame, read: Callable) -> Iterator:
    """What ``read`` finds in the folder of each run; a note for those where it cannot."""
    for run_dir in runs["path"]:
        try:
            found = read(run_dir)
        except UserError as error:
            note(f"left out of the plot: {error}")
            continue
        yield found


def _matrices(runs: DataFrame) -> np.ndarray:
    """The class-il accuracy matrices of the runs, (seeds, T, T); of joint training (seeds, 1, T); (0,) without any."""
    import numpy as np

    stack = []
    for matrices in _readable(runs, read_accuracy):
        stack += [matrices["class-il"]] if "class-il" in matrices else list(matrices.values())[:1]
    return padded(stack) if stack else np.empty(0)


def read_rounds(run_dir: str | Path) -> DataFrame:
    """rounds.csv, a row per evaluation; numbers as floats, without rows where there is no such file.

    ``uplink_mb`` counts what all clients have sent by then (the sum of traffic.csv so far), in MB of 10^6 bytes.

    Raises:
        UserError: the file is not complete, or not such a file.
    """
    import pandas as pd

    path = Path(run_dir) / "rounds.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if rows and not {"task", "faa"} <= set(header) or any(len(row) != len(header) for row in rows):
            raise ValueError("columns are missing")
        rows = [[float(value or "nan") for value in row] for row in rows]
    except FileNotFoundError:
        header, rows = [], []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}); is it still being written?") from error
    return pd.DataFrame(rows, columns=header if rows else [])


def _bytes(runs: DataFrame) -> np.ndarray:
    """MB sent and accuracy at the evaluations of the runs, (seeds, evaluations, 2); (0,) without any."""
    import numpy as np

    stack = [
        rounds[["uplink_mb", "faa"]].to_numpy()
        for rounds in _readable(runs, read_rounds)
        if "uplink_mb" in rounds and rounds["uplink_mb"].notna().any()
    ]
    return padded(stack) if stack else np.empty(0)


def _ends(runs: DataFrame) -> np.ndarray:
    """MB sent (nan: central) and accuracy at the end of the runs, (seeds, 1, 2); (0,) without any."""
    values = runs.reindex(columns=["uplink_mb", "faa"]).astype(float)
    return values[values["faa"].notna()].to_numpy()[:, None]


def mean_std(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample deviation over axis 0 of what is not nan; nan where nothing (for the deviation: one value) is."""
    import numpy as np

    known = np.isfinite(stack)
    n = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, stack, 0).sum(axis=0) / n
        std = np.sqrt(np.where(known, (stack - mean) ** 2, 0).sum(axis=0) / np.where(n > 1, n - 1, np.nan))
    return mean, std


def _figure(dataset: str, rows: list[tuple[str, np.ndarray]], width: float, height: float = 4.0) -> Figure:
    """An empty figure, high enough for as many names as there are rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, max(height, 1.3 + 0.17 * len(rows))), dpi=150, layout="constrained")
    figure.suptitle(dataset, fontsize=12)
    return figure


def _draw_overview(dataset: str, rows: list[tuple[str, np.ndarray]]) -> Figure:
    n_cols, n_rows = _grid(len(rows))
    left, right = 6.2, 2.6 * n_cols + 0.8
    figure = _figure(dataset, rows, left + right, 3.1 * n_rows + 0.3)
    sides = figure.subfigures(1, 2, width_ratios=[left, right])
    _curves(sides[0], rows)
    _draw_grid(sides[1], rows)
    return figure


def _draw_tasks(dataset: str, rows: list[tuple[str, np.ndarray]]) -> Figure:
    figure = _figure(dataset, rows, 7.2)
    _curves(figure, rows)
    return figure


def _draw_matrices(dataset: str, rows: list[tuple[str, np.ndarray]]) -> Figure:
    n_cols, n_rows = _grid(len(rows))
    figure = _figure(dataset, [], 2.6 * n_cols + 1.2, 3.1 * n_rows + 0.3)
    _draw_grid(figure, rows)
    return figure


def _grid(n: int) -> tuple[int, int]:
    """Columns and rows of small multiples."""
    n_cols = min(n, 3 if n in (3, 5, 6, 9) else 4 if n <= 12 else 6)
    return n_cols, -(-n // n_cols)


def _style(i: int) -> dict[str, object]:
    """Colour, marker and dashes of the i-th row: no two of 28 are the same."""
    turn = i // len(COLOURS)
    marker = MARKERS[(i + 3 * turn) % len(MARKERS)]
    return {"color": COLOURS[i % len(COLOURS)], "ls": DASHES[turn % len(DASHES)], "marker": marker, "ms": 4.5}


def _seeds(rows: list[tuple[str, np.ndarray]]) -> tuple[str, list[str]]:
    """What is shown, to be written under the figure, and names, with the number of seeds where rows differ in it."""
    numbers = {len(values) for _, values in rows}
    if len(numbers) > 1:
        return "mean over n seeds, one sample deviation", [f"{name}, n={len(values)}" for name, values in rows]
    n = numbers.pop()
    return "one seed" if n == 1 else f"mean over {n} seeds, one sample deviation", [name for name, _ in rows]


def _curves(figure: Figure | SubFigure, rows: list[tuple[str, np.ndarray]]) -> None:
    """Accuracy on the tasks seen so far, after each task, of (seeds, T, T) accuracy matrices."""
    import numpy as np

    ax = figure.subplots()
    n_tasks = max(stack.shape[2] for _, stack in rows)
    (what, names), ends = _seeds(rows), []
    for i, (name, (_, stack)) in enumerate(zip(names, rows)):
        style = _style(i)
        if stack.shape[1] == 1 < stack.shape[2]:  # joint: one value, for all tasks at once: a line to compare with
            stack = np.repeat(stack, n_tasks, axis=1)
            style = {"color": "0.4", "ls": (0, (5, 2)), "lw": 1.2}
        else:
            stack = np.where(np.tri(*stack.shape[1:], dtype=bool), stack, np.nan)
        seen = np.stack([mean_std(run.T)[0] for run in stack])  # (seeds, rows)
        mean, std = mean_std(seen)
        x = np.arange(1, len(mean) + 1)
        ax.plot(x, mean, **style)
        ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=_faint(rows), lw=0)
        if len(known := np.flatnonzero(np.isfinite(mean))):
            ends.append((name, x[known[-1]], mean[known[-1]], style["color"]))
    ax.set_xlabel(f"Tasks learned ({what})", fontsize=9)
    ax.set_ylabel("Accuracy on tasks seen so far (%)", fontsize=9)
    ax.set_xlim(0.75, n_tasks + 0.25)
    ax.set_xticks(_ticks(n_tasks) + 1)
    _finish(ax)
    _name_ends(ax, ends)


def _draw_bytes(dataset: str, rows: list[tuple[str, np.ndarray]]) -> Figure:
    import numpy as np

    figure = _figure(dataset, rows, 7.2)
    ax = figure.subplots()
    (what, names), ends = _seeds(rows), []
    for i, (name, (_, stack)) in enumerate(zip(names, rows)):
        style = _style(i)
        mean, std = mean_std(stack)  # (evaluations, 2) over seeds
        (x, y), dy = mean.T, std[:, 1]
        ax.plot(x, y, **{**style, "ms": 3.5, "markevery": max(1, len(x) // 12)})
        ax.fill_between(x, y - dy, y + dy, color=style["color"], alpha=_faint(rows), lw=0)
        if len(known := np.flatnonzero(np.isfinite(x) & np.isfinite(y))):
            ends.append((name, x[known[-1]], y[known[-1]], style["color"]))
    _scale_bytes(ax, [x for _, x, _, _ in ends])
    ax.set_xlabel(f"Sent by the clients so far, MB ({what})", fontsize=9)
    ax.set_ylabel("Accuracy on tasks seen so far (%)", fontsize=9)
    _finish(ax)
    _name_ends(ax, ends)
    return figure


def _draw_tradeoff(dataset: str, rows: list[tuple[str, np.ndarray]]) -> Figure:
    import numpy as np

    figure = _figure(dataset, rows, 7.2, 4.6)
    ax = figure.subplots()
    (what, names), points, lines = _seeds(rows), [], []
    for i, (name, (_, values)) in enumerate(zip(names, rows)):
        mean, std = mean_std(values[:, 0])
        style = _style(i)
        if np.isfinite(mean[0]):
            ax.errorbar(*mean, yerr=std[1], color=style["color"], marker=style["marker"], ms=7, elinewidth=1, capsize=2)
            points.append((name, *mean, std[1] if std[1] == std[1] else 0.0))
        else:  # central: nothing is sent, so there is a height only
            ax.axhline(mean[1], color="0.4", ls=(0, (5, 2)), lw=1.2)
            lines.append((f"{name}, central", mean[1]))
    _scale_bytes(ax, [x for _, x, *_ in points])
    ax.margins(x=0.14, y=0.1)
    ax.set_xlabel(f"Sent by all clients, MB ({what})", fontsize=9)
    ax.set_ylabel("Accuracy after the last task (%)", fontsize=9)
    _finish(ax)
    _name_points(ax, points, lines)
    return figure


def _faint(rows: list) -> float:
    """Opacity of a band: many bands would hide one another."""
    return 0.18 if len(rows) <= 5 else 0.07


def _scale_bytes(ax: Axes, values: list[float]) -> None:
    """A logarithmic axis where methods differ more than twentyfold."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values) > 1 and max(positive) > 20 * min(positive):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")


def _finish(ax: Axes) -> None:
    """What all axes have in common; no accuracy is above 100."""
    ax.tick_params(labelsize=8)
    ax.set_ylim(top=min(ax.get_ylim()[1], 101))
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def spread_out(wanted: list[float], gap: float) -> list[float]:
    """Positions at least ``gap`` apart, in the order of ``wanted``, with the least sum of squared shifts.

    Shifted by ``k gap``, the k-th in order, they need only be non-decreasing: isotonic regression.
    """
    import numpy as np
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(order))
    placed = np.empty(len(order))
    placed[order] = isotonic_regression(np.asarray(wanted, float)[order] - steps).x + steps
    return placed.tolist()


def _name_ends(ax: Axes, ends: list[tuple[str, float, float, object]]) -> None:
    """Names beside the axes, each as near the height of its curve's end as the others leave room.

    Args:
        ends: name, x, y and colour of each curve's last point.
    """
    if not ends:
        return
    root = ax.get_figure(root=True)
    root.draw_without_rendering()  # the layout settles how high the axes are
    height = ax.get_window_extent().height * 72 / root.dpi  # points
    heights = ax.transAxes.inverted().transform(ax.transData.transform([end[1:3] for end in ends]))[:, 1]
    for (name, x, y, colour), at in zip(ends, spread_out(heights, 10.5 / height)):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4}
        where = {"xytext": (1.04, at), "textcoords": "axes fraction", "annotation_clip": False}
        ax.annotate(name, (x, y), **where, va="center", fontsize=8, arrowprops=line)


def _name_points(ax: Axes, points: list[tuple[str, float, float, float]], lines: list[tuple[str, float]]) -> None:
    """Names beside points (name, x, y, deviation) and on lines (name, y), clear of points and of one another."""
    import numpy as np
    from matplotlib.transforms import Bbox

    root = ax.get_figure(root=True)
    root.draw_without_rendering()
    room, px = ax.get_window_extent(), root.dpi / 72
    taken = []
    for name, y in lines:
        above = {"xytext": (0, 3), "textcoords": "offset points", "in_layout": False}
        line = ax.annotate(name, (0.01, y), xycoords=("axes fraction", "data"), **above, fontsize=8, color="0.3")
        taken.append(line.get_window_extent())
    for _, x, y, dy in points:  # the marker, and its error bar
        (left, middle), (_, low), (_, high) = ax.transData.transform([(x, y), (x, y - dy), (x, y + dy)])
        taken.append(Bbox.from_bounds(left - 5 * px, middle - 5 * px, 10 * px, 10 * px))
        taken.append(Bbox.from_extents(left - px, low, left + px, high))
    for name, x, y, _ in sorted(points, key=lambda point: -point[2]):
        label = ax.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, in_layout=False)
        for distance, angle in [(r, a) for r in range(8, 200, 6) for a in (0, 180, 30, -30, 150, -150, 90, -90)]:
            dx, dy = distance * np.cos(np.radians(angle)), distance * np.sin(np.radians(angle))
            label.set(ha={1: "left", 0: "center", -1: "right"}[round(np.sign(round(dx)))])
            label.set(va={1: "bottom", 0: "center", -1: "top"}[round(np.sign(round(dy)))], position=(dx, dy))
            box = label.get_window_extent().padded(1.5 * px)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        if distance > 8:
            line = {"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 1, "shrinkB": 4}
            ax.annotate("", (x, y), xytext=(dx, dy), textcoords="offset points", arrowprops=line, in_layout=False)
        taken.append(box)


def _draw_grid(figure: Figure | SubFigure, rows: list[tuple[str, np.ndarray]]) -> None:
    """A small accuracy matrix for each row, one scale for all."""
    n_cols, n_rows = _grid(len(rows))
    grid = figure.subplots(n_rows, n_cols, squeeze=False)
    for ax in grid.flat[len(rows) :]:
        ax.set_visible(False)
    for ax, (name, stack) in zip(grid.flat, rows):
        image = _draw_matrix(ax, name, stack)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30)
    bar.set_label("Accuracy (%)", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _draw_matrix(ax: Axes, name: str, stack: np.ndarray) -> AxesImage:
    import numpy as np

    mean = mean_std(stack)[0]
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


# what is read of the runs of a row, how it is drawn, and what a row must have
KINDS = {
    "overview": (_matrices, _draw_overview, "an accuracy.csv"),
    "tasks": (_matrices, _draw_tasks, "an accuracy.csv"),
    "bytes": (_bytes, _draw_bytes, "a rounds.csv with uplink_mb (central runs send nothing)"),
    "matrix": (_matrices, _draw_matrices, "an accuracy.csv"),
    "tradeoff": (_ends, _draw_tradeoff, "a final accuracy"),
}


def _ways(table: DataFrame) -> Series:
    """A name for each row of unlearning.csv: the method, and below it those of its settings that it has several of."""
    settings, names = list(table.loc[:, "recover_rounds":"FA"])[:-1], table["method"].astype(str)
    for method, mine in table.groupby("method", sort=False):
        for key in settings:
            values = mine[key].map(text)
            if values.nunique() > 1:
                short = key.removeprefix(f"{method}_").removesuffix("_rounds")
                names.loc[mine.index] += f"\n{short} " + values.str.removesuffix(".0")
    return names


def plot_unlearning(rows: list[dict], file: Path) -> None:
    """Bars of unlearning.csv: accuracies of each way to forget and its settings, means over clients, with marks at
    those of the model retrained without the client (black) and of the one with everybody (grey)."""
    import pandas as pd
    from matplotlib.figure import Figure

    table = pd.DataFrame(rows)
    shown = {"FA": "the client's data", "RA": "the others'", "FTA": "unseen, the client's mix", "TA": "test"}
    columns = [p + k for k in shown for p in ("", "O_", "R_") if p + k in table]
    table[columns] = table[columns].apply(pd.to_numeric, errors="coerce")
    means = table.groupby(_ways(table), sort=False)[columns].mean()
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
    ax.set_xticks(range(len(means)), list(means.index), fontsize=8)
    ax.set(ylabel="accuracy (%)", ylim=(0, 101))
    ax.plot([], [], color="black", lw=2, label="retrained without it")
    ax.plot([], [], color="#999999", lw=2, label="with everybody")
    fig.legend(ncol=3, fontsize=8, loc="outside upper center")
    fig.savefig(file, dpi=120)
