"""Folders of runs in, one HTML page out: ``python -m utils.report results/ -o report.html``.

The page holds everything it needs (style, script and the numbers as JSON), asks no network for anything and opens from
a file. It shows the groups of ``utils.compare`` in a table that sorts and filters, and for each group and run its
arguments, accuracy matrices, curves, what it forgot on request (unlearning.csv) and the command. Where one stands in it
is part of the address, after ``#``. The page itself is ``report_template.html``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.compare import DEFAULT_METRICS, comma_list, groups, load_runs, metric_names
from utils.errors import RunError, UserError, nearest
from utils.files import replacing
from utils.report_plots import direction, mean_std, note, padded, read_accuracy, read_rounds, row_names, text

if TYPE_CHECKING:  # imported where used: --help must not wait for it
    import numpy as np
    from pandas import DataFrame, Series

TEMPLATE = Path(__file__).with_name("report_template.html")
CURVES = ["faa", "faa_task_il", "loss", "uplink_mb"]  # columns of rounds.csv that are drawn
MOST_ROUNDS = 300  # of rounds.csv; of longer ones every so-many-th row and the last


def _plain(value: object) -> object:
    """A number in six digits, None for what JSON lacks (nan); arrays as lists of these; anything else as text."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = float(f"{value:.6g}")
        return int(value) if value.is_integer() else value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, int) else text(value)


def _one(values: Series) -> str:
    """The value that a group's runs have in common."""
    found = set(map(text, values))
    return found.pop() if len(found) == 1 else "several"


def _shared(dicts: list[dict[str, str]]) -> dict[str, str]:
    """What all of them hold with the same value."""
    first = dicts[0] if dicts else {}
    return {k: v for k, v in first.items() if all(k in d and d[k] == v for d in dicts)}


def _matrices(run_dir: Path) -> dict[str, np.ndarray]:
    try:
        return read_accuracy(run_dir)
    except UserError as error:
        note(f"left out: {error}")
        return {}


def _rounds(run_dir: Path) -> DataFrame:
    import pandas as pd

    try:
        rounds = read_rounds(run_dir)
    except UserError as error:
        note(f"left out: {error}")
        return pd.DataFrame()
    step = -(-len(rounds) // MOST_ROUNDS) if len(rounds) else 1
    return rounds[(len(rounds) - 1) % step :: step]  # the last row is always there


def _unlearning(run_dir: Path) -> dict[str, list]:
    """The columns and rows of unlearning.csv; {} without one."""
    try:
        with open(run_dir / "unlearning.csv", newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        note(f"left out: cannot read {run_dir / 'unlearning.csv'} ({error})")
        return {}
    return {"columns": header, "rows": [[_number(value) for value in row] for row in rows]} if header else {}


def _number(value: str) -> object:
    try:
        return _plain(float(value)) if "." in value or "e" in value else value
    except ValueError:
        return value


def collect(runs: DataFrame, metrics: list[str] | None = None, by: list[str] | None = None, max_mb: float = 4) -> dict:
    """What the page shows, as plain data.

    Args:
        runs: of `utils.compare.load_runs`.
        metrics: columns that are shown at first. None: the usual ones that have values; all can be chosen in the page.
        by: as in `utils.compare.groups`.
        max_mb: details of runs (arguments, command, matrices, curves, unlearning) are left out where the data would
            grow beyond this, later seeds of each group first; table rows and the means of groups always stay.

    Raises:
        UserError: an unknown metric or column.
    """
    import numpy as np

    allowed = metric_names(runs)
    for name in metrics or []:
        if name not in allowed:
            raise UserError(f"no metric {name!r} in these runs; {nearest(name, allowed)}")
    allowed = [name for name in allowed if runs[name].notna().any()]
    found = groups(runs, by)
    data: dict = {
        "metrics": {name: direction(name) for name in allowed},
        "shown": metrics or [name for name in DEFAULT_METRICS if name in allowed],
        "labels": list(found[0][0]),
        "groups": [],
        "runs": [],
        "cut": 0,
        "thinned": 0,
    }
    args = {i: {str(k): text(v) for k, v in row.items()} for i, row in runs["args"].items()}
    data["args"] = everywhere = _shared(list(args.values()))
    details = []
    for name, (label, group) in zip(row_names([label for label, _ in found]), found):
        shared = _shared([args[i] for i in group.index])
        entry = {
            "name": name,
            "labels": [text(value) for value in label.values()],
            "dataset": _one(group["dataset"]),
            "setting": _one(group["setting"]) if "setting" in group else "-",
            "args": {k: v for k, v in shared.items() if k not in everywhere},
            "values": {},
            "accuracy": {},
            "runs": [],
        }
        group = group.sort_values("seed")
        measured = group[allowed].to_numpy()
        for metric, mean, std, n in zip(allowed, *mean_std(measured), np.isfinite(measured).sum(axis=0)):
            if n:
                entry["values"][metric] = [_plain(mean), _plain(std), int(n)]
        matrices, curves = [], []
        for place, (i, row) in enumerate(zip(group.index, group.to_dict("records"))):
            accuracy, rounds = _matrices(row["path"]), _rounds(row["path"])
            matrices.append(accuracy)
            curves += [rounds[["uplink_mb", "faa"]].to_numpy()] if "uplink_mb" in rounds else []
            data["thinned"] += int(len(rounds) > 1 and rounds.index[1] - rounds.index[0] > 1)
            own = {k: v for k, v in args[i].items() if k not in shared}
            details.append((place, len(data["runs"]), _details(row, own, accuracy, rounds)))
            entry["runs"].append(len(data["runs"]))
            run = {"run": text(row["run"]), "group": len(data["groups"]), "seed": _plain(row["seed"])}
            run |= {"status": text(row["status"]), "path": str(row["path"])}
            data["runs"].append(run | {"values": {m: _plain(row[m]) for m in allowed if row[m] == row[m]}})
        for setting in sorted({name for accuracy in matrices for name in accuracy}):
            stack = padded([accuracy[setting] for accuracy in matrices if setting in accuracy])
            entry["accuracy"][setting] = _plain(mean_std(stack)[0].round(2))
        entry["bytes"] = _plain(mean_std(padded(curves))[0]) if curves else []
        data["groups"].append(entry)
    left = max_mb * 1e6 - len(_dump(data))
    for _, i, more in sorted(details, key=lambda detail: detail[:2]):
        left -= len(_dump(more))
        if left < 0:
            data["cut"] += 1
        else:
            data["runs"][i] |= more
    return data


def _details(row: dict, args: dict[str, str], accuracy: dict[str, np.ndarray], rounds: DataFrame) -> dict:
    """What the page of a run shows beyond its row."""
    drawn = [c for c in CURVES if c in rounds and rounds[c].notna().any()]
    return {
        "command": text(row.get("command")),
        "args": args,
        "accuracy": {setting: _plain(matrix.round(2)) for setting, matrix in accuracy.items()},
        "rounds": {c: _plain(rounds[c].to_numpy()) for c in ["task", *drawn]} if drawn else {},
        "unlearning": _unlearning(row["path"]),
    }


def _dump(data: object) -> str:
    """JSON that may stand inside a script element: no text in it can end that element or begin a comment."""
    dumped = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(data: dict) -> str:
    """The page that shows what `collect` found."""
    before, after = TEMPLATE.read_text("utf-8").split("{{data}}")
    return before + _dump(data) + after


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after a one-line message on a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m utils.report", description="A page of runs, to open in a browser.")
    add = parser.add_argument
    add("results", nargs="*", default=["results"], help="folders searched for summary.csv, or such files")
    add("-o", "--output", default="report.html", metavar="FILE.html", help="default: report.html")
    add("--metric", action="append", metavar="NAME", help="repeatable or comma list: columns shown at first")
    add("--by", action="append", metavar="COLUMN", help="repeatable or comma list: group by these columns instead")
    add("--all", action="store_true", help="show unfinished runs too")
    add("--max_mb", type=float, default=4.0, help="leave out details of runs beyond this size of the page; default: 4")
    args = parser.parse_args(argv)
    try:
        runs = load_runs(args.results, unfinished=args.all)
        data = collect(runs, comma_list(args.metric), comma_list(args.by), args.max_mb)
        html, output = page(data), Path(args.output)
        with replacing(output) as temporary:
            temporary.write_text(html, "utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}; give a file in a folder that exists", file=sys.stderr)
        return 2
    if data["cut"]:
        note(f"left out the details of {data['cut']} of {len(runs)} runs (--max_mb, or fewer folders, for more)")
    note(f"wrote {output}: {len(data['groups'])} rows, {len(runs)} runs, {len(html) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
