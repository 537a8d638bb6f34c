"""Published results beside ours: ``python -m utils.compare results/ --paper lorm``.

``reproduce/<paper>.yaml`` has one entry for each published cell (docs/reproduction.md): what was reported, by whom, and
the command that measures it here. ``python -m utils.ledger lorm`` prints these commands, one for each seed.

A run belongs to an entry if its settings, the seed aside, are those that the entry's command resolves to. With mean m,
sample deviation s and number of runs n, theirs and ours, an entry is

    verified    |m_ours - m_theirs| <= max(1 point, 2 sqrt(s_theirs^2 / n_theirs + s_ours^2 / n_ours))
    off         otherwise

A deviation that is not known counts as 0 (papers without one, a single run of ours); n_theirs is 1 where the paper does
not say.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, nearest
from utils.registry import ROOT, find
from utils.report_plots import direction, note, text

if TYPE_CHECKING:  # imported where used
    from pandas import DataFrame

LEDGERS = ROOT / "reproduce"
POINTS = 1.0  # a difference that is no news: one run of a public code differs by as much from the next
CONFIDENCE = ("certain", "UNCONFIRMED")
HEAD = ("paper", "arxiv", "about", "seeds", "shared", "entries")  # shared: a place for anchors
COLUMNS = ["method", "dataset", "setting", "metric", "confidence", "status", "n"]
COLUMNS += [f"{who}_{what}" for who in ("paper", "ours", "difference") for what in ("mean", "std", "n")]
COLUMNS += ["source", "command", "seeds", "why_not", "note"]
OURS = ("--seed", "--results_path", "--loadcheck", "--savecheck")  # flags that scripts add to a command


@dataclass(frozen=True)
class Entry:
    """One published cell.

    Attributes:
        method: as the paper names the row. dataset: our name, or what the paper says where it is not here.
        metric: column of summary.csv. value: in its unit, mostly %. spread: published deviation, over ``runs`` runs.
        source: paper and table, or whatever has shown the number. confidence: ``certain``, or ``UNCONFIRMED`` where the
            number or the setting it belongs to is known at second hand only.
        setting: what tells the cell from others of its row. command: what runs it here, without a seed.
        needs: what is missing here, for cells without a command. note: what a reader must know to compare.
    """

    method: str
    dataset: str
    metric: str
    value: float
    source: str
    confidence: str
    setting: dict[str, Any] = field(default_factory=dict)
    spread: float | None = None
    runs: int = 1
    command: str | None = None
    needs: str | None = None
    seeds: tuple[int, ...] = (0,)
    note: str | None = None

    @property
    def shown_setting(self) -> str:
        return ", ".join(f"{k}={text(v)}" for k, v in self.setting.items()) or "-"

    @property
    def argv(self) -> list[str]:
        """The command's flags."""
        return shlex.split(self.command or "")[2:]

    def missing(self) -> str | None:
        """Why this cannot be run here; None if it can. Nothing is imported."""
        if self.needs:
            return f"needs {self.needs}"
        try:
            for flag, package, kind in (("--model", "models", "model"), ("--dataset", "datasets", "data set")):
                find(package, _value(self.argv, flag) or "", kind)
        except UserError as error:
            return str(error).partition(":")[0]
        return None


def _value(argv: list[str], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv[:-1] else None


# ---------------------------------------------------------------- the file


def papers() -> list[str]:
    """Names of the papers that have a ledger."""
    return sorted(file.stem for file in LEDGERS.glob("*.yaml"))


def load(paper: str) -> tuple[str, list[Entry]]:
    """What a paper's ledger says of itself, and its entries.

    Raises:
        UserError: no such paper, or a file or an entry that is not as it should be; one line that names both.
    """
    if paper.lower() not in papers():
        raise UserError(f"there is no ledger reproduce/{paper}.yaml; {nearest(paper, papers())}")
    return read(LEDGERS / f"{paper.lower()}.yaml")


def read(file: Path) -> tuple[str, list[Entry]]:
    """:func:`load` of a file anywhere."""
    import yaml

    name = f"{file.parent.name}/{file.name}"
    try:
        data = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
        raise UserError(f"{name}: must be a mapping with a list of entries")
    if odd := [str(k) for k in data if k not in HEAD]:
        raise UserError(f"{name}: unknown key {odd[0]!r}; {nearest(odd[0], HEAD)}")
    seeds, about = data.get("seeds", [0]), str(data.get("about", ""))
    entries, seen = [], {}
    for i, raw in enumerate(data["entries"], 1):
        told = [str(raw[k]) for k in ("method", "dataset", "metric") if k in raw] if isinstance(raw, dict) else []
        where = f"{name}, entry {i}" + (f" ({', '.join(told)})" if told else "")
        try:
            entry = _entry({"seeds": seeds, **raw} if isinstance(raw, dict) else raw)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        key = (entry.method, entry.dataset, entry.shown_setting, entry.metric, entry.source)
        if key in seen:
            raise UserError(f"{where}: the same cell as entry {seen[key]}; tell them apart by their setting")
        seen[key] = i
        entries.append(entry)
    return " ".join(about.split()), entries


def _entry(raw: Any) -> Entry:
    """An entry from what YAML gives. ValueError: what is wrong with it."""
    if not isinstance(raw, dict):
        raise ValueError("must be a mapping")
    fields = Entry.__dataclass_fields__
    if odd := [str(k) for k in raw if k not in fields]:
        raise ValueError(f"unknown key {odd[0]!r}; {nearest(odd[0], fields)}")
    for key in ("method", "dataset", "metric", "source", "confidence", "command", "needs", "note"):
        if key in raw and (not isinstance(raw[key], str) or not raw[key].strip()):
            raise ValueError(f"{key} must be text, not {raw[key]!r}")
    for key in ("method", "dataset", "metric", "value", "source", "confidence"):
        if key not in raw:
            raise ValueError(f"no {key}")
    for key in ("value", "spread"):
        if key in raw and (type(raw[key]) not in (int, float) or not math.isfinite(raw[key])):
            raise ValueError(f"{key} must be a number, not {raw[key]!r}")
    if raw.get("spread", 0) < 0:
        raise ValueError(f"spread must be at least 0, not {raw['spread']}")
    if not _whole(raw.get("runs", 1), 1):
        raise ValueError(f"runs must be a whole number of at least 1, not {raw['runs']!r}")
    if not isinstance(raw["seeds"], list) or not raw["seeds"] or not all(_whole(s, 0) for s in raw["seeds"]):
        raise ValueError(f"seeds must be a list of whole numbers, not {raw['seeds']!r}")
    if not isinstance(raw.get("setting", {}), dict):
        raise ValueError(f"setting must be a mapping, not {raw['setting']!r}")
    if raw["confidence"] not in CONFIDENCE:
        raise ValueError(f"confidence {raw['confidence']!r}; choose from {', '.join(CONFIDENCE)}")
    if not direction(raw["metric"]):
        raise ValueError(f"metric {raw['metric']!r} is no result that a run has; give a column of summary.csv")
    if ("command" in raw) == ("needs" in raw):
        raise ValueError("give a command, or what it needs to have one (needs), and not both")
    entry = Entry(**{**raw, "seeds": tuple(raw["seeds"])})
    if entry.command is not None:
        if not entry.command.startswith("python main.py --"):
            raise ValueError("command must begin with 'python main.py --'")
        if added := [flag for flag in OURS if flag in entry.command]:
            raise ValueError(f"command must leave out {added[0]}: it is added for each run")
        if _value(entry.argv, "--dataset") != entry.dataset:
            raise ValueError(f"command must say --dataset {entry.dataset}")
    return entry


def _whole(value: Any, low: int) -> bool:
    return type(value) is int and value >= low


# ---------------------------------------------------------------- beside our runs


@cache
def settings(command: str) -> tuple[str, str | None]:
    """The hash, without the seed, of the settings that a command resolves to, and why ``main.py`` does not take it."""
    from utils.args import parse_args
    from utils.loggers import settings_hash

    try:
        return settings_hash(parse_args(shlex.split(command)[2:]), seed=False), None
    except UserError as error:  # a package that is not installed, for one
        return "", str(error)


def status(entry: Entry, values: Sequence[float]) -> tuple[float, float, str]:
    """Mean and sample deviation of our values, and ``verified``, ``off`` or ``not run`` (see above)."""
    import numpy as np

    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    std = float(np.std(values, ddof=1)) if n > 1 else float("nan")
    if not n:
        return mean, std, "not run"
    variance = (entry.spread or 0.0) ** 2 / entry.runs + (std**2 / n if n > 1 else 0.0)
    tolerance = max(POINTS, 2 * variance**0.5)
    return mean, std, "verified" if abs(mean - entry.value) <= tolerance + 1e-9 else "off"


def compared(entries: Sequence[Entry], runs: DataFrame) -> DataFrame:
    """A row for each entry, in the columns that ``utils.report_plots.render`` shows; the others are for csv.

    Args:
        runs: of ``utils.compare.load_runs``; may be empty.
    """
    import pandas as pd

    rows = []
    for entry in entries:
        why, values = entry.missing(), pd.Series(dtype=float)
        if why is None:
            found, why = settings(entry.command)
            if entry.metric in runs:
                values = pd.to_numeric(runs.loc[runs["settings_hash"] == found, entry.metric], errors="coerce").dropna()
        mean, std, verdict = status(entry, list(values))
        n = len(values)
        rows.append(
            {
                "method": entry.method,
                "dataset": entry.dataset,
                "setting": entry.shown_setting,
                "metric": entry.metric,
                "confidence": entry.confidence,
                "status": "cannot run" if why else verdict,
                "n": n,
                "paper_mean": entry.value,
                "paper_std": entry.spread,
                "ours_mean": mean,
                "ours_std": std,
                "difference_mean": mean - entry.value,
                **dict.fromkeys(("paper_n", "ours_n", "difference_n"), n),  # as n: render says only where they differ
                "source": entry.source,
                "command": entry.command,
                "seeds": " ".join(map(str, entry.seeds)),
                "why_not": why,
                "note": entry.note,
            }
        )
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({c: float for c in COLUMNS if c.endswith(("_mean", "_std"))})


def report(args: argparse.Namespace) -> DataFrame:
    """The table of ``utils.compare --paper``. What is left out, and why, goes to stderr.

    Raises:
        UserError: no such paper, a ledger that is not as it should be, or flags that do not go with ``--paper``.
    """
    import pandas as pd

    from utils.compare import load_runs

    for flag in ("metric", "by", "sort", "baseline", "all", "plot"):
        if getattr(args, flag):
            raise UserError(f"--{flag} does not go with --paper, whose rows and columns are those of the ledger")
    about, entries = load(args.paper)
    try:
        runs = load_runs(args.results)
    except UserError as error:
        note(f"{error}; showing what is published")
        runs = pd.DataFrame(columns=["settings_hash"])
    table = compared(entries, runs)
    if about:
        note(about)
    for why, n in table["why_not"].value_counts().items():
        note(f"cannot run {n} of {len(table)} cells: {why}")
    return table


# ---------------------------------------------------------------- what to run


def commands(entries: Sequence[Entry], seeds: Sequence[int] | None = None) -> list[str]:
    """The command lines of all entries that can be run, each once for each of its seeds (or of ``seeds``)."""
    lines = (
        f"{entry.command} --seed {seed}"
        for entry in entries
        if entry.missing() is None
        for seed in (entry.seeds if seeds is None else seeds)
    )
    return list(dict.fromkeys(lines))


def main(argv: list[str] | None = None) -> int:
    """Prints a paper's commands; cells that cannot be run are named on stderr. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m utils.ledger", description="The commands of a paper's ledger.")
    parser.add_argument("paper", help=", ".join(papers()))
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="instead of the ledger's")
    args = parser.parse_args(argv)
    try:
        about, entries = load(args.paper)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if about:
        print(about, file=sys.stderr)
    for entry in entries:
        if (why := entry.missing()) is not None:
            said = f"{entry.method}, {entry.dataset}, {entry.shown_setting}, {entry.metric}"
            print(f"cannot run: {said}: {why}", file=sys.stderr)
    for line in commands(entries, args.seeds):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
