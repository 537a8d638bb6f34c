"""The record of pocket runs, docs/pocket.csv, and the tables of docs/pocket.md out of it.

    python scripts/pocket_report.py collect results/pocket      # add what scripts/pocket_table.sh has finished
    python scripts/pocket_report.py table --dataset seq-glyphs --beta 0.5 [--rows lorm livar] [--bias]

A line of the record is one run: the row of scripts/pocket_methods.sh it belongs to, what it measured, the commit and
the command. A run with the same row, data set, beta and seed takes the place of an older one.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from utils.compare import load_runs
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "pocket.csv"
KEY = ["row", "dataset", "beta", "seed"]
METRICS = ["faa", "forgetting", "faa_task_il", "incremental_bias", "federated_bias", "uplink_mb", "downlink_mb"]
SECONDS = ["train_seconds", "train_cpu_seconds"]
COLUMNS = [*KEY, *METRICS, *SECONDS, "commit", "command"]
TITLES = {
    "ncm": "nearest class mean",
    "joint": "joint, central (upper bound)",
    "er": "ER, private buffers of 200",
    "derpp": "DER++, private buffers of 200",
    "sgd": "SGD, averaged",
    "lwf": "LwF, averaged, private teachers",
    "ewc_on": "online EWC, averaged, private Fisher",
    "full": "FedAvg, full",
    "fedprox": "FedProx, full, mu 0.01",
    "scaffold": "SCAFFOLD, full",
    "fedsum": "FedSum, full, lambda 0.3",
    "ties": "TIES, full",
    "fisheravg": "FisherAvg, full",
    "regmean": "RegMean, full",
    "head": "FedAvg, head only",
    "lora": "FedAvg, LoRA r=4",
    "ffa_lora": "FFA-LoRA r=4",
    "livar": "LIVAR",
    "lorm": "LoRM",
    "l2p": "L2P",
    "dualprompt": "DualPrompt",
    "coda_prompt": "CODA-Prompt",
    "coda_lwf": "CODA-LwF",
    "hgp": "HGP",
    "ccvr": "CCVR over FedAvg, full",
    "slca": "SLCA, full",
    "ranpac": "RanPAC, M = 1000",
    "pilora": "PILoRA",
    "fedproto": "FedProto, personal models",
    "fedproto_fm": "FedProto, shared model (`--preset fm`)",
    "ewc": "EWC, one Fisher matrix",
    "target": "TARGET",
    "dolfin": "DOLFIN",
    "paper_energy": "DOLFIN, `--gpm_energy paper`",
    "unprojected": "DOLFIN without projection",
}


def rows_by_flags() -> dict[str, str]:
    """{flags: row} of scripts/pocket_methods.sh."""
    text = (ROOT / "scripts" / "pocket_methods.sh").read_text()
    return {" ".join(flags.split()): name.strip() for name, flags in re.findall(r'^  "([^|]+)\|([^|]+)\|', text, re.M)}


def collect(folders: list[str]) -> pd.DataFrame:
    """The record with the runs under ``folders`` in it. UserError for a run of no row."""
    runs, rows = load_runs(folders), rows_by_flags()
    flags = runs["command"].str.extract(r"main\.py\s+(.*?)\s+--dataset ")[0].str.split().str.join(" ")
    runs["row"] = flags.map(rows)
    if runs["row"].isna().any():
        raise UserError(f"no row of scripts/pocket_methods.sh has the flags {flags[runs['row'].isna()].iloc[0]!r}")
    runs["beta"] = runs["distribution_alpha"].where(runs["setting"] == "federated")
    runs["commit"] = runs["git_commit"].str[:7]
    new = runs.reindex(columns=COLUMNS)
    known = pd.read_csv(RECORD, dtype={"commit": str}) if RECORD.exists() else new[:0]
    together = pd.concat([known, new]) if len(known) else new
    return together.drop_duplicates(KEY, keep="last").sort_values(KEY)


def table(dataset: str, beta: float, rows: list[str] | None, bias: bool) -> str:
    """A Markdown table: mean and sample deviation over seeds, best FAA first."""
    record = pd.read_csv(RECORD, dtype={"commit": str})
    mine = record[(record["dataset"] == dataset) & ((record["beta"] == beta) | record["beta"].isna())]
    mine = mine[mine["row"].isin(rows)] if rows else mine
    if mine.empty:
        raise UserError(f"docs/pocket.csv has no run of {dataset} at {beta}: run scripts/pocket_table.sh, then collect")

    head = [dataset, "seeds", "FAA %", "forgetting", "task-IL %"]
    head += ["incremental bias %", "federated bias %"] if bias else []
    head += ["MB up", "MB down", "CPU s", "commit"]
    lines = [cells(*head), "|---|" + "---:|" * (len(head) - 2) + "---|"]
    order = mine.groupby("row")["faa"].mean().sort_values(ascending=False).index
    for row in order:
        runs = mine[mine["row"] == row]
        said = [TITLES.get(row, row), len(runs), *(spread(runs[m]) for m in ("faa", "forgetting", "faa_task_il"))]
        said += [spread(100 * runs[m]) for m in ("incremental_bias", "federated_bias")] if bias else []
        said += [f"{runs[m].mean():.1f}" if runs[m].notna().any() else "-" for m in ("uplink_mb", "downlink_mb")]
        cpu = runs["train_cpu_seconds"].dropna()
        lines.append(cells(*said, f"{cpu.mean():.0f}" if len(cpu) else "-", commits(runs)))
    return "\n".join(lines)


def cells(*values: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(str(value).replace("|", r"\|").replace("\n", " ") for value in values) + " |"


def spread(values: pd.Series, digits: int = 1) -> str:
    """Mean ± sample deviation of what is known; without a deviation for one value."""
    values = values.dropna()
    if values.empty:
        return "-"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def commits(runs: pd.DataFrame) -> str:
    return ", ".join(sorted(runs["commit"].dropna().unique()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    collecting = what.add_parser("collect")
    collecting.add_argument("folders", nargs="+")
    tabling = what.add_parser("table")
    tabling.add_argument("--dataset", required=True)
    tabling.add_argument("--beta", type=float, required=True)
    tabling.add_argument("--rows", nargs="+")
    tabling.add_argument("--bias", action="store_true", help="with the columns on bias")
    args = parser.parse_args()
    try:
        if args.what == "collect":
            record = collect(args.folders)
            record.to_csv(RECORD, index=False, float_format="%.6g")
            print(f"{len(record)} runs in {RECORD.relative_to(ROOT)}")
        else:
            print(table(args.dataset, args.beta, args.rows, args.bias))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
