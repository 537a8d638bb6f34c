"""Folders of runs in, one table out: ``python -m utils.compare results/``.

Runs that differ only by their seed are one row: mean and sample deviation (n - 1) over seeds. The settings shown are
those that tell the rows apart. Also as functions: `load_runs`, `table`, `render`, and `print_run_table` for one run.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, nearest
from utils.report_plots import KINDS, aligned, direction, note, number, plot, read_accuracy, render, text

if TYPE_CHECKING:  # imported where used: --help must not wait for it
    from pandas import DataFrame, Series

    Groups = list[tuple[dict[str, object], DataFrame]]

SETTINGS = ["setting", "backbone", "model_config", "num_clients", "partition_mode", "distribution_alpha"]
SETTINGS += ["num_comm_rounds", "participation_rate", "n_epochs", "batch_size", "optimizer", "lr"]
TEXT = {"run", "model", "dataset", "settings_hash", "status", "command", "git_commit"}  # a hash like 12e4 is no number
NOT_METRICS = TEXT | {*SETTINGS, "seed", "tasks_done", "n_tasks", "path", "args", "group"}
DEFAULT_METRICS = ["faa", "avg_inc_acc", "forgetting", "faa_task_il", "uplink_mb", "total_seconds"]
SUFFIXES = {"class-il": "", "task-il": "_task_il"}


def _read_summary(path: Path) -> list[dict[str, object]]:
    """The rows of one summary.csv with the run's ``path`` and ``args``; [] and a note where it cannot be read yet."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        note(f"skipped {path}: {error}")
        return []
    # DictReader fills a row shorter than the header with None: the file is still being written.
    if not rows or any(None in row.values() or None in row or not row.get("model") for row in rows):
        note(f"skipped {path}: incomplete (is it still being written?)")
        return []
    extra = {"path": path.parent, "args": _read_args(path.parent / "args.yaml")}
    return [{key: value or None for key, value in row.items()} | extra for row in rows]


def _read_args(path: Path) -> dict[str, object]:
    import yaml

    try:
        args = yaml.load(path.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        if not isinstance(error, FileNotFoundError):
            note(f"could not read {path}; going on without it")
        return {}
    return args if isinstance(args, dict) else {}


def load_runs(paths: Iterable[str | Path], unfinished: bool = False) -> DataFrame:
    """The runs under ``paths`` (folders searched for summary.csv, or such files), one row each.

    Args:
        unfinished: keep the runs whose status is not ``finished``.

    Returns:
        The columns of summary.csv, plus ``path`` (the run's folder), ``args`` (its args.yaml as a dict) and ``group``
        (the same for runs that differ only by seed). Of several runs of one group and seed, the newest finished one.

    Raises:
        UserError: a path that does not exist, or nothing to show.
    """
    import pandas as pd

    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give the folder that --results_path named (default: results)")
    where = ", ".join(map(str, paths))
    files = {f.resolve(): f for p in paths for f in (sorted(p.rglob("summary.csv")) if p.is_dir() else [p])}
    runs = pd.DataFrame([row for file in files.values() for row in _read_summary(file)])
    if runs.empty:
        raise UserError(f"no run found under {where}; a run writes results/<dataset>/<model>/<run>/summary.csv")
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, "run", "dataset", "seed", "status", "settings_hash"])))
    for name in set(runs) - TEXT - {"path", "args"}:
        runs[name] = _tidy(runs[name])
    settings = _joined(runs, ["model", *(name for name in SETTINGS if name in runs)])  # where the hash is missing
    settings = runs["settings_hash"].where(runs["settings_hash"].notna(), settings)
    runs["group"] = _joined(runs, ["dataset", "model"]) + "|" + settings

    done = runs["status"].isna() | (runs["status"] == "finished")
    if not (unfinished or done.all()):
        note(f"left out {(~done).sum()} unfinished of {len(runs)} runs (--all shows them)")
        runs = runs[done]
        if runs.empty:
            raise UserError(f"no run under {where} is finished; use --all to see the unfinished ones")
    age = runs["path"].map(lambda path: path.stat().st_mtime if path.exists() else 0)
    age = runs.assign(_done=done, _age=age).sort_values(["_done", "_age", "run"])  # what is kept comes last
    older = age.duplicated(["group", "seed"], keep="last").reindex(runs.index) & runs["seed"].notna()
    if older.any():
        names = ", ".join(map(str, runs.loc[older, "path"]))
        note(f"several runs of one seed: kept the newest finished, left out {older.sum()}: {names}")
    return runs[~older].reset_index(drop=True)


def _tidy(values: Series) -> Series:
    """Numbers (float) where all known values are numbers, text elsewhere."""
    import pandas as pd

    try:
        if not any(isinstance(value, bool) for value in values):
            return pd.to_numeric(values).astype(float)
    except (ValueError, TypeError):
        pass
    return values.map(text)


def _column(runs: DataFrame, name: str) -> Series:
    """A column of summary.csv, or else a setting of args.yaml."""
    return runs[name] if name in runs else _tidy(runs["args"].map(lambda args: args.get(name)))


def _joined(runs: DataFrame, names: list[str]) -> Series:
    """The named columns as one text per run, to group by."""
    import pandas as pd

    rows = zip(*(_column(runs, name).map(text) for name in names))
    return pd.Series(["|".join(row) for row in rows], index=runs.index, dtype=object)


def groups(runs: DataFrame, by: list[str] | None = None) -> Groups:
    """The rows of the table: the columns that identify each, and its runs; ordered by these columns.

    Args:
        by: columns of summary.csv or keys of args.yaml to group by. None: group by dataset, model and all settings, and
            show the settings that tell apart the groups of a dataset (from args.yaml: of a dataset and model).

    Raises:
        UserError: an unknown column in ``by``.
    """
    from utils.args import UNLEARNING_FLAGS
    from utils.loggers import NOT_IDENTITY

    keys = {key for args in runs["args"] for key in args if not key.startswith("version_")}
    shown, group = by or ["dataset", "model"], runs["group"]
    if by:
        allowed = (set(runs) - {"path", "args", "group"}) | keys
        for name in by:
            if name not in allowed:
                raise UserError(f"--by: no column {name!r}; {nearest(name, allowed)}")
        group = _joined(runs, by)
    else:
        others = sorted(keys - NOT_METRICS - NOT_IDENTITY - {*UNLEARNING_FLAGS, "platform"})
        for name in [*(name for name in SETTINGS if name in keys.union(runs)), *others]:
            values = _column(runs, name).map(text)
            if (values.groupby(group).nunique() > 1).any():  # no setting: it varies between the seeds of a group
                continue
            # '-' alone is no difference in summary.csv: a central run has no clients, and `setting` says so.
            values = values[values != "-"] if name in SETTINGS else values
            within = _joined(runs, ["dataset"] if name in SETTINGS else ["dataset", "model"])
            if (values.groupby(within).nunique() > 1).any():
                shown.append(name)
        if _joined(runs, shown).nunique() < group.nunique():  # something else differs: at least say that it does
            shown.append("settings_hash" if runs["settings_hash"].notna().any() else "run")
    columns = {name: _column(runs, name) for name in shown}
    found = [
        ({name: column[index[0]] for name, column in columns.items()}, runs.loc[index])
        for index in runs.groupby(group).groups.values()
    ]
    # Numbers by value, before text.
    found.sort(key=lambda f: [(0, v) if isinstance(v, float) and v == v else (1, text(v)) for v in f[0].values()])
    return found


def metric_names(runs: DataFrame) -> list[str]:
    """The columns of summary.csv that are numbers and no settings."""
    settings = NOT_METRICS.union(*runs["args"])
    return [name for name in runs if name not in settings and runs[name].dtype.kind == "f"]


def table(
    runs: DataFrame,
    metrics: list[str] | None = None,
    by: list[str] | None = None,
    sort: str | None = None,
    baseline: str | None = None,
) -> DataFrame:
    """One row per group of `groups`: its columns, ``n`` runs, and ``_mean``, ``_std`` (sample), ``_n`` of metrics.

    Args:
        metrics: columns of summary.csv. None: the usual ones that have values.
        sort: a metric to order the rows of a dataset by, best first.
        baseline: a model, or settings (``model=lorm,lr=0.003``) that single out one row of each dataset. Adds, for the
            first metric, ``p_<metric>``, a paired two-sided t-test over the seeds that a row shares with that row (not
            corrected for the number of rows; nan with fewer than two such seeds), and ``p_<metric>_n``, their number.

    Raises:
        UserError: an unknown metric or column; a baseline that no row or several rows of a dataset fit.
    """
    import pandas as pd

    allowed = metric_names(runs)
    for name in [*(metrics or []), *([sort] if sort else [])]:
        if name not in allowed:
            raise UserError(f"no metric {name!r} in these runs; {nearest(name, allowed)}")
    metrics = metrics or [name for name in DEFAULT_METRICS if name in allowed and runs[name].notna().any()]
    found = groups(runs, by)
    if sort:
        found.sort(key=lambda f: (text(f[0].get("dataset")), _rank(f[1], sort)))
    rows = []
    for label, group in found:
        if (n := group["group"].nunique()) > 1:
            note(f"{n} different settings are mixed in " + ", ".join(f"{k}={text(v)}" for k, v in label.items()))
        rows.append(label | {"n": len(group)})
        for name in metrics:
            values = group[name].dropna()
            rows[-1] |= {f"{name}_mean": values.mean(), f"{name}_std": values.std(ddof=1), f"{name}_n": len(values)}
    result = pd.DataFrame(rows)
    if baseline and metrics:
        result[f"p_{metrics[0]}"], result[f"p_{metrics[0]}_n"] = zip(*_paired_tests(found, metrics[0], baseline))
    return result


def _rank(group: DataFrame, metric: str) -> float:
    """Sorts best first, and groups without a value last."""
    mean = group[metric].mean()
    return float("inf") if mean != mean else -mean * (direction(metric) or 1)


def _paired_tests(found: Groups, metric: str, baseline: str) -> list[tuple[float, float]]:
    """p and number of pairs for each row; nan for the baseline itself and where its dataset has none."""
    from scipy import stats

    chosen, tests = _baselines(found, baseline), []
    for label, group in found:
        rival = chosen.get(text(label.get("dataset")))
        if rival is None or rival is group:
            tests.append((float("nan"), float("nan")))
            continue
        # One value per seed: a row of --by may hold several runs of a seed.
        a, b = (g.groupby("seed")[metric].mean().dropna() for g in (group, rival))
        a, b = a.align(b, join="inner")
        p = float("nan")
        if len(a) > 1:
            with warnings.catch_warnings():  # scipy warns where all differences are equal
                warnings.simplefilter("ignore", RuntimeWarning)
                p = float(stats.ttest_rel(a, b).pvalue)
        tests.append((p, float(len(a))))
    return tests


def _baselines(found: Groups, baseline: str) -> dict[str, DataFrame]:
    """The row that ``baseline`` names in each dataset."""
    wanted = [part.partition("=")[::2] if "=" in part else ("model", part) for part in comma_list([baseline])]
    every = [group for _, group in found]
    known = {name for group in every for name in set(group).union(*group["args"])} - {"path", "args", "group"}
    for key, value in wanted:
        if key not in known:
            raise UserError(f"--baseline: no setting {key!r}; {nearest(key, known)}")
        values = {text(v) for group in every for v in _column(group, key)}
        if not any(_equal(v, value) for v in values):
            raise UserError(f"--baseline: no row with {key} {value!r}; {nearest(value, values)}")
    chosen: dict[str, DataFrame] = {}
    names: dict[str, list[str]] = {}
    for label, group in found:
        if all(_equal(text(v), value) for key, value in wanted for v in _column(group, key)):
            key = text(label.get("dataset"))
            chosen[key] = group
            names.setdefault(key, []).append(",".join(f"{k}={text(v)}" for k, v in label.items() if k != "dataset"))
    if not chosen:
        rows = "; ".join(",".join(f"{k}={text(v)}" for k, v in label.items()) for label, _ in found)
        raise UserError(f"--baseline: no row is {baseline!r} alone; choose from {rows}")
    for dataset, rows in names.items():
        if len(rows) > 1:
            raise UserError(f"--baseline: {baseline!r} fits {len(rows)} rows of {dataset}: {'; '.join(rows)}; add one")
    return chosen


def _equal(value: str, wanted: str) -> bool:
    """Whether a setting is what the user wrote: the same text, or the same number (3e-3 for 0.003)."""
    try:
        return value == wanted or float(value) == float(wanted)
    except ValueError:
        return False


def read_run(run_dir: str | Path) -> dict[str, object]:
    """What one run found: its row of summary.csv, numbers as int or float and None for what is empty, the folder
    (``path``), and the matrices of :func:`read_accuracy` (``accuracy``).

    Raises:
        UserError: the folder has no summary.csv that can be read.
    """
    row = next(iter(_read_summary(Path(run_dir) / "summary.csv")), None)
    if row is None:
        raise UserError(f"no results in {run_dir}; give a folder with a summary.csv")
    del row["args"]
    return {k: v if k in TEXT else _number(v) for k, v in row.items()} | {"accuracy": read_accuracy(run_dir)}


def _number(value: object) -> object:
    for kind in (int, float):
        try:
            return kind(value)
        except (ValueError, TypeError):
            pass
    return value


def print_run_table(run_dir: str | Path) -> None:
    """Prints what one run found: accuracy per task, when just learned and at the end, and the summary metrics.

    Tasks are numbered from 1, as in papers (columns of accuracy.csv: from 0).

    Raises:
        UserError: the folder has no summary.csv that can be read.
    """
    row = next(iter(_read_summary(Path(run_dir) / "summary.csv")), None)
    if row is None:
        raise UserError(f"no results in {run_dir}; give a folder with a summary.csv")
    rows: dict[str, list[float]] = {}
    for setting, matrix in read_accuracy(run_dir).items():
        if len(matrix) > 1:
            rows[f"{setting}, just learned"] = list(matrix.diagonal())
        last = [line for line in matrix if (line == line).any()][-1:]
        rows |= {f"{setting}, at the end": list(line) for line in last}
    print(f"\n{row['model']} on {row.get('dataset')}, seed {row.get('seed')}: accuracy (%)")
    n_tasks = max(map(len, rows.values()), default=0)
    for start in range(0, n_tasks, 10):  # ten tasks fit a terminal
        tasks = range(start, min(start + 10, n_tasks))
        lines = [[name, *(number(values[t]) for t in tasks)] for name, values in rows.items()]
        print(aligned([["task", *(str(t + 1) for t in tasks)], *lines], 1))
    known = {name: number(float(value)) for name, value in row.items() if direction(name) and value is not None}
    scores = [name for name in known if f"{name}_task_il" in row]
    lines = [[setting, *(known.get(name + end, "-") for name in scores)] for setting, end in SUFFIXES.items()]
    print(aligned([["", *scores], *lines], 1))
    costs = [name for name in known if name.removesuffix("_task_il") not in scores]
    print(aligned([costs, [known[name] for name in costs]], 0))


def comma_list(values: list[str] | None) -> list[str]:
    """The names of a flag that may be repeated and may hold several, separated by commas."""
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after a one-line message on a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m utils.compare", description="A table of runs, over seeds.")
    add = parser.add_argument
    add("results", nargs="*", default=["results"], help="folders searched for summary.csv, or such files")
    add("--format", choices=("table", "md", "csv", "latex"), default="table", help="csv: raw numbers; latex: booktabs")
    add("--metric", action="append", metavar="NAME", help="repeatable or comma list: columns of summary.csv")
    add("--by", action="append", metavar="COLUMN", help="repeatable or comma list: group by these columns instead")
    add("--sort", metavar="METRIC", help="order the rows of each dataset by this metric, best first")
    add(
        "--baseline",
        metavar="ROW",
        help="p of a paired two-sided t-test of each row against this one over their common seeds (n), on the first "
        'metric: a model (fedavg) or settings that single out a row ("model=lorm,lr=0.003")',
    )
    add("--all", action="store_true", help="show unfinished runs too")
    add("--plot", metavar="FILE.png", help="draw the rows (a file per dataset)")
    add(
        "--kind",
        choices=tuple(KINDS),
        help="of plot: accuracy while learning (tasks), accuracy matrices (matrix), both (overview, the default), "
        "accuracy over what clients have sent so far (bytes), final accuracy against what they sent (tradeoff)",
    )
    add("--output", metavar="FILE", help="write the table there instead of printing it")
    add("--paper", help="what a paper has published beside these runs (reproduce/<paper>.yaml)")
    args = parser.parse_args(argv)
    try:
        if args.kind and not args.plot:
            raise UserError("--kind says what --plot draws: add --plot FILE.png")
        if args.paper:
            from utils.ledger import report

            result = report(args)
        else:
            runs = load_runs(args.results, unfinished=args.all)
            result = table(runs, comma_list(args.metric), comma_list(args.by), args.sort, args.baseline)
        if args.output:
            Path(args.output).write_text(render(result, args.format), "utf-8")
            note(f"wrote {args.output}")
        else:
            shown = render(result, args.format, ansi=sys.stdout.isatty())
            if "utf" not in (encoding := sys.stdout.encoding or "utf-8").lower():  # no traceback for want of a sign
                shown = shown.replace("±", "+/-").encode(encoding, "ignore").decode(encoding)
            print(shown, end="")
        if args.plot:
            for path in plot(groups(runs, comma_list(args.by)), Path(args.plot), args.kind or "overview"):
                note(f"wrote {path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        name, why = error.filename, error.strerror
        print(f"error: cannot write {name}: {why}; give a file in a folder that exists", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
