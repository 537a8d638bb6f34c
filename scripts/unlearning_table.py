"""The record of what was forgotten on the pocket suite, docs/unlearning.csv, and Markdown tables out of it.

    python scripts/unlearning_table.py collect results/unlearning     # add every unlearning.csv below a folder
    python scripts/unlearning_table.py table --dataset seq-digits --tasks single --beta 0.5

A line of the record is one request: whom, how, from which run, and what came of it. The same request takes the place of
an older one. Tables are means and sample deviations over clients and seeds. Rebound is what the client's data gained by
rounds of recovery, over the same without any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from scripts.pocket_report import ROOT, spread
from utils.compare import load_runs
from utils.errors import UserError

RECORD = ROOT / "docs" / "unlearning.csv"
MODEL = ["model", "regime"]
WAY = [*MODEL, "method", "sata_lambda", "sata_renorm", "recover_rounds"]
KEY = ["dataset", "tasks", "K", "beta", "T", "E", "seed", "client", *WAY]
METRICS = [f"{p}{k}" for k in ("FA", "RA", "FTA", "TA") for p in ("", "O_", "R_")]
METRICS += ["mia_loss_auc", "R_mia_loss_auc", "avg_gap", "relD", "relearn", "R_relearn"]
COSTS = ["rounds", "mb_up", "seconds"]
COLUMNS = [*KEY, "n_forget", *METRICS, *COSTS, "commit", "command"]
SHOWN = {
    "FA": ("forgotten %", 1),
    "FA_gap": ("gap", 1),
    "RA": ("retained %", 1),
    "RA_gap": ("gap", 1),
    "TA": ("test %", 1),
    "TA_gap": ("gap", 1),
    "mia_loss_auc": ("MIA AUC", 2),
    "relD": ("distance", 2),
    "relearn": ("relearn", 1),
    "rebound": ("rebound", 1),
}


def collect(folders: list[str]) -> pd.DataFrame:
    """The record with every request under ``folders`` in it. UserError: there is none."""
    runs, new = load_runs(folders), []
    for _, run in runs.iterrows():
        file = run["path"] / "unlearning.csv"
        if file.exists():
            tasks = "single" if int(run["args"].get("joint", 0)) else "continual"
            more = {"tasks": tasks, "commit": str(run["git_commit"])[:7], "command": run["command"]}
            new.append(pd.read_csv(file).assign(**more))
    if not new:
        raise UserError(f"no unlearning.csv below {' '.join(folders)}; make some with scripts/pocket_unlearning.sh")
    rows = pd.concat(new, ignore_index=True).reindex(columns=COLUMNS)
    if RECORD.exists():
        rows = pd.concat([pd.read_csv(RECORD), rows], ignore_index=True)
    rows["client"] = rows["client"].astype(str)
    return rows.drop_duplicates(KEY, keep="last").sort_values(KEY)


def with_rebound(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the gaps to R, and ``rebound`` where there is the same request without recovery."""
    rows = rows.assign(**{f"{k}_gap": (rows[k] - rows[f"R_{k}"]).abs() for k in ("FA", "RA", "TA")})
    same = [k for k in KEY if k != "recover_rounds"]
    at_once = rows[rows["recover_rounds"] == 0][[*same, "FA"]].rename(columns={"FA": "FA_at_once"})
    rows = rows.merge(at_once, on=same, how="left")
    return rows.assign(rebound=(rows["FA"] - rows["FA_at_once"]).where(rows["recover_rounds"] > 0))


def name(way: tuple) -> str:
    """A way to forget, as a table names it."""
    said = dict(zip(WAY, way))
    text = str(said["method"])
    if said["sata_lambda"] == said["sata_lambda"]:
        rule = "exact1" if (said["sata_lambda"], said["sata_renorm"]) == ("p", 1) else said["sata_lambda"]
        text += f", {said['regime']}, {rule}"
    return text + (f", {said['recover_rounds']:.0f} more" if said["recover_rounds"] else "")


def table(dataset: str, tasks: str, beta: float) -> str:
    """Two Markdown tables: what was tried, the smallest mean gap first, and what it is judged by.

    Raises:
        UserError: nothing is known of that.
    """
    record = pd.read_csv(RECORD) if RECORD.exists() else pd.DataFrame(columns=COLUMNS)
    rows = record[(record["dataset"] == dataset) & (record["tasks"] == tasks) & (record["beta"] == beta)]
    if rows.empty:
        raise UserError(f"docs/unlearning.csv has nothing of {dataset}, {tasks}, {beta}: run the script, then collect")
    rows = with_rebound(rows)
    head = [f"{dataset}, {tasks}, {beta:g}", "n", "mean gap", *(title for title, _ in SHOWN.values())]
    lines = ["| " + " | ".join([*head, "rounds", "MB up", "s"]) + " |", "|---|" + "---:|" * (len(head) + 2)]

    groups = sorted(rows.groupby(WAY, dropna=False), key=lambda g: (g[1]["avg_gap"].mean(), name(g[0])))
    for way, mine in groups:
        cells = [name(way), str(len(mine)), spread(mine["avg_gap"])]
        cells += [spread(mine[c], digits) for c, (_, digits) in SHOWN.items()]
        lines.append("| " + " | ".join([*cells, *(f"{mine[c].mean():.1f}" for c in COSTS)]) + " |")
    lines += ["", "| what R and O are | R: forgotten % | retained % | test % | O: forgotten % | retained % | test % |"]
    lines += ["|---|" + "---:|" * 6]
    for key, mine in rows.drop_duplicates(["seed", "client", *MODEL]).groupby(MODEL, dropna=False):
        figures = [spread(mine[prefix + k]) for prefix in ("R_", "O_") for k in ("FA", "RA", "TA")]
        lines.append("| " + " | ".join([", ".join(str(k) for k in key if k == k), *figures]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("collect").add_argument("folders", nargs="+")
    tabling = what.add_parser("table")
    tabling.add_argument("--dataset", required=True)
    tabling.add_argument("--tasks", choices=("single", "continual"), required=True)
    tabling.add_argument("--beta", type=float, required=True)
    args = parser.parse_args()
    try:
        if args.what == "collect":
            record = collect(args.folders)
            record.to_csv(RECORD, index=False, float_format="%.6g")
            print(f"{len(record)} requests in {RECORD.relative_to(ROOT)}")
        else:
            print(table(args.dataset, args.tasks, args.beta))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
