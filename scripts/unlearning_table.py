"""The record of what was forgotten on the pocket suite, docs/unlearning.csv, and Markdown tables out of it.

    python scripts/unlearning_table.py collect results/unlearning     # add every unlearning.csv below a folder
    python scripts/unlearning_table.py table --dataset seq-digits --tasks single --beta 0.5
    python scripts/unlearning_table.py page                           # all tables: docs/unlearning.md, and .png

``--record FOLDER`` keeps ``unlearning.csv``, ``unlearning.md`` and ``unlearning.png`` there instead.

A line of the record is one request: whom, how, from which run, and what came of it. The same request takes the place of
an older one. Tables are means and sample deviations over clients and seeds. Rebound is what the client's data gained by
rounds of recovery, over the same without any, whose model counts in the time without a usable one too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from scripts.pocket_report import ROOT, cells, commits, spread
from utils.compare import load_runs
from utils.errors import UserError
from utils.files import replacing
from utils.unlearning_metrics import AVERAGED, USABLE, gap, outage

DOCS = ROOT / "docs"
SETTING = ["dataset", "tasks", "beta"]
TEXT = {"client": str, "commit": str}  # a commit may be all digits
MODEL = ["model", "regime"]
WAY = [*MODEL, "method", "sata_lambda", "sata_renorm", "recover_rounds"]
KEY = ["dataset", "tasks", "K", "beta", "T", "E", "seed", "client", *WAY]
METRICS = [f"{p}{k}" for k in ("FA", "RA", "FTA", "TA") for p in ("", "O_", "R_")]
METRICS += ["mia_loss_auc", "O_mia_loss_auc", "R_mia_loss_auc", "avg_gap", "relD", "relearn", "R_relearn"]
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
INTRODUCTION = f"""<!-- made by scripts/unlearning_table.py page; do not edit -->

# Forgetting a client on the pocket suite: all tables

What they say is in [pocket.md](pocket.md#forgetting-a-client); each request, with its command, is a line of
[unlearning.csv](unlearning.csv). Means and sample deviations over n requests: clients times seeds. R is the model
that was trained again without the client, O the one with everybody. Mean gap: how far the accuracies on the client's
data, on the others' and on the test set, and the AUC of membership inference by loss (times 100), are from R's, on
average. Distance: of the weights to R's, in units of O's. Relearn: epochs until the client alone has O's accuracy on
its data again (mean over those that needed at most ten). `1 more`: with a round of recovery; rebound: what the
client's data gained in it. s: seconds of unlearning and recovery, or of training again, on the device that is named.
Outage: how many of them pass before there is a model with {USABLE:.0%} of R's test accuracy; the mean over requests
that come to one, with their number where it is not all; never: none does."""


def collect(folders: list[str], known: Path) -> pd.DataFrame:
    """The record ``known``, if the file is there, with all requests under ``folders``. UserError: there are none."""
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
    if known.exists():
        rows = pd.concat([pd.read_csv(known, dtype=TEXT), rows], ignore_index=True)
    rows["client"] = rows["client"].astype(str)
    return rows.drop_duplicates(KEY, keep="last").sort_values(KEY)


def completed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the gaps to R, ``outage``, and ``rebound`` where there is the same request without recovery."""
    rows = rows.assign(**{f"{k}_gap": gap(k, rows[k], rows[f"R_{k}"]) for k in ("FA", "RA", "TA")})
    same, seen = [k for k in KEY if k != "recover_rounds"], ["FA", "TA", "seconds"]
    at_once = rows[rows["recover_rounds"] == 0][[*same, *seen]].rename(columns={k: f"{k}_at_once" for k in seen})
    rows = rows.merge(at_once, on=same, how="left")
    moments = zip(zip(rows["seconds_at_once"], rows["TA_at_once"]), zip(rows["seconds"], rows["TA"]))
    outages = [outage(when, target) for when, target in zip(moments, rows["R_TA"])]
    rebound = (rows["FA"] - rows["FA_at_once"]).where(rows["recover_rounds"] > 0)
    return rows.assign(rebound=rebound, outage=pd.Series(outages, rows.index, dtype=float))


def name(way: tuple) -> str:
    """A way to forget, as a table names it."""
    said = dict(zip(WAY, way))
    text = str(said["method"])
    if said["sata_lambda"] == said["sata_lambda"]:
        rule = "exact1" if (said["sata_lambda"], said["sata_renorm"]) == ("p", 1) else said["sata_lambda"]
        text += f", {said['regime']}, {rule}"
    return text + (f", {said['recover_rounds']:.0f} more" if said["recover_rounds"] else "")


def read(file: Path) -> pd.DataFrame:
    """A record, with gaps, rebound and outage.

    Raises:
        UserError: there is none.
    """
    if not file.exists():
        raise UserError(f"{file} is not there: run scripts/pocket_unlearning.sh, then collect")
    return completed(pd.read_csv(file, dtype=TEXT))


def mean_outage(seconds: pd.Series) -> str:
    """Over the requests that come to a usable model, with (their number) if some do not."""
    known = seconds.dropna()
    if known.empty:
        return "never"
    return f"{known.mean():.1f}" + (f" ({len(known)})" if len(known) < len(seconds) else "")


def of_nothing(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each model, seed and client of ``rows``: what doing nothing is from retraining (``avg_gap``)."""
    rows = rows.drop_duplicates([*SETTING, *MODEL, "seed", "client"])
    return rows.assign(avg_gap=sum(gap(k, rows[f"O_{k}"], rows[f"R_{k}"]) for k in AVERAGED) / len(AVERAGED))


def header(first: str, others: list[str]) -> list[str]:
    """The first two lines of a Markdown table with numbers in all columns but the first."""
    return [cells(first, *others), "|---|" + "---:|" * len(others)]


def table(record: pd.DataFrame, dataset: str, tasks: str, beta: float) -> str:
    """Two Markdown tables: what was tried, the smallest mean gap first, and what it is judged by.

    Raises:
        UserError: nothing is known of that.
    """
    rows = record[(record["dataset"] == dataset) & (record["tasks"] == tasks) & (record["beta"] == beta)]
    if rows.empty:
        raise UserError(f"the record has nothing of {dataset}, {tasks}, {beta}: run the script, then collect")
    titles = [title for title, _ in SHOWN.values()]
    lines = header(f"{dataset}, {tasks}, {beta:g}", ["n", "mean gap", *titles, "rounds", "MB up", "s", "outage"])
    groups = sorted(rows.groupby(WAY, dropna=False), key=lambda g: (g[1]["avg_gap"].mean(), name(g[0])))
    for way, mine in groups:
        figures = [spread(mine[c], digits) for c, (_, digits) in SHOWN.items()]
        costs = [*(f"{mine[c].mean():.1f}" for c in COSTS), mean_outage(mine["outage"])]
        lines.append(cells(name(way), len(mine), spread(mine["avg_gap"]), *figures, *costs))
    titles = [f"{who}: {what} %" for who in "RO" for what in ("forgotten", "retained", "test")]
    lines += ["", *header("what R and O are", [*titles, "O's mean gap"])]
    for key, mine in of_nothing(rows).groupby(MODEL, dropna=False):
        figures = [spread(mine[prefix + k]) for prefix in ("R_", "O_") for k in ("FA", "RA", "TA")]
        lines.append(cells(", ".join(str(k) for k in key if k == k), *figures, spread(mine["avg_gap"])))
    return "\n".join(lines)


def place(setting: tuple[str, str, float]) -> tuple:
    """Where a setting comes among others."""
    dataset, tasks, beta = setting
    return dataset != "seq-glyphs", tasks != "single", beta


def gaps_by_way(record: pd.DataFrame) -> dict[tuple, dict[str, pd.Series]]:
    """{setting: {way, as named, or nothing done to a model with task vectors: mean gaps of its requests}}."""
    found = {}
    for setting, rows in sorted(record.groupby(SETTING), key=lambda g: place(g[0])):
        here = {name(way): mine["avg_gap"] for way, mine in rows.groupby(WAY, dropna=False)}
        vectors = rows[rows["model"] != "fedavg"]  # nothing done to FedAvg is noop
        for (model, regime), mine in of_nothing(vectors).groupby(MODEL):
            here[f"({model}, {regime}: nothing done)"] = mine["avg_gap"]
        found[setting] = here
    return found


def best_first(known: dict[tuple, dict[str, pd.Series]]) -> pd.DataFrame:
    """Means of :func:`gaps_by_way`, ways by settings, best mean rank first."""
    means = pd.DataFrame({s: {way: gaps.mean() for way, gaps in here.items()} for s, here in known.items()})
    order = means.rank(pct=True).mean(axis=1).sort_values(kind="stable").index
    return means.loc[order]


def summary(record: pd.DataFrame) -> str:
    """A Markdown table of mean gaps, ways by settings, best mean rank first; (n) where some requests are missing."""
    known = gaps_by_way(record)
    most = {s: max(map(len, here.values())) for s, here in known.items()}
    titles = [f"{dataset}, {tasks}, {beta:g} (n = {most[dataset, tasks, beta]})" for dataset, tasks, beta in known]
    lines = header("mean gap to retraining, points", titles)
    for way in best_first(known).index:
        row = []
        for s, here in known.items():
            gaps = here.get(way)
            missing = gaps is not None and len(gaps) < most[s]
            row.append("-" if gaps is None else spread(gaps) + (f" ({len(gaps)})" if missing else ""))
        lines.append(cells(way, *row))
    return "\n".join(lines)


def figure(record: pd.DataFrame, file: Path) -> None:
    """The same as dots: a line for each way, a panel for one task and one for tasks in sequence, betas in colour."""
    from matplotlib.figure import Figure

    from utils.report_plots import COLOURS, MARKERS

    means = best_first(gaps_by_way(record))
    means = means[means.index != "retrain"]  # 0 by definition
    panels = sorted({s[:2] for s in means.columns}, key=lambda p: place((*p, 0.0)))
    betas = sorted({s[2] for s in means.columns})
    fig = Figure(figsize=(2.2 + 2.9 * len(panels), 1.3 + 0.24 * len(means)), layout="constrained")
    for ax, (dataset, tasks) in zip(fig.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0], panels):
        for i, beta in enumerate(betas):
            if (dataset, tasks, beta) in means:
                ax.plot(means[dataset, tasks, beta], range(len(means)), MARKERS[i], color=COLOURS[i], ms=6, alpha=0.85)
        ax.set_xscale("log")
        ax.set_xticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
        ax.set_title(f"{dataset}, {'one task' if tasks == 'single' else 'tasks in sequence'}", fontsize=9)
        ax.set_xlabel("mean gap to retraining, points", fontsize=9)
        ax.grid(color="#dddddd", lw=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    ax.set_yticks(range(len(means)), means.index)
    ax.invert_yaxis()
    for i, beta in enumerate(betas):
        ax.plot([], [], MARKERS[i], color=COLOURS[i], label=f"Dirichlet {beta:g}")
    fig.legend(ncol=len(betas), fontsize=8, loc="outside upper center")
    fig.savefig(file, dpi=110)


def page(record: pd.DataFrame) -> str:
    """unlearning.md: the summary and every table, with how each was made."""
    parts = [INTRODUCTION, "![mean gaps to retraining](unlearning.png)", summary(record)]
    for (dataset, tasks, beta), rows in sorted(record.groupby(SETTING), key=lambda g: place(g[0])):
        seeds, clients = (", ".join(map(str, sorted(rows[c].unique()))) for c in ("seed", "client"))
        rounds = ", ".join(f"{t:g} x {e:g}" for t, e in sorted(set(zip(rows["T"], rows["E"]))))
        devices = sorted(rows["command"].str.extract(r"--device (\S+)")[0].dropna().unique())
        title = {"single": "one task", "continual": "tasks in sequence"}[tasks]
        parts.append(f"## {dataset}, {title}, Dirichlet {beta:g}")
        parts.append(
            f"{rows['K'].iloc[0]} clients; rounds x epochs {rounds}; seed {seeds}; forgotten: client {clients}, each "
            f"in turn; on {' and '.join(devices)}; commit {commits(rows)}."
        )
        parts.append(table(record, dataset, tasks, beta))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=DOCS, metavar="FOLDER")
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("collect").add_argument("folders", nargs="+")
    tabling = what.add_parser("table")
    tabling.add_argument("--dataset", required=True)
    tabling.add_argument("--tasks", choices=("single", "continual"), required=True)
    tabling.add_argument("--beta", type=float, required=True)
    what.add_parser("page")
    args = parser.parse_args()
    file = args.record / "unlearning.csv"
    try:
        if args.what == "collect":
            record = collect(args.folders, file)
            with replacing(file) as temporary:
                record.to_csv(temporary, index=False, float_format="%.6g")
            print(f"{len(record)} requests in {file}")
        elif args.what == "page":
            made = page(record := read(file))
            figure(record, file.with_suffix(".png"))
            with replacing(file.with_suffix(".md")) as temporary:
                temporary.write_text(made, "utf-8")
            print(file.with_suffix(".md"))
        else:
            print(table(read(file), args.dataset, args.tasks, args.beta))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
