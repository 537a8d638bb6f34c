"""Every unlearning.csv below a folder as one table in Markdown: means and deviations over clients and seeds.

python scripts/unlearning_table.py results/unlearning
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

SHOWN = {
    "FA": "forgotten %",
    "RA": "retained %",
    "TA": "test %",
    "FA_gap": "forgotten gap",
    "RA_gap": "retained gap",
    "TA_gap": "test gap",
    "mia_loss_auc": "MIA AUC",
    "relD": "relative distance",
    "rounds": "rounds",
    "mb_up": "MB up",
    "seconds": "seconds",
}
PLAIN = ("rounds", "mb_up", "seconds")  # costs, without a deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    files = sorted(folder.rglob("unlearning.csv"))
    if not files:
        sys.exit(f"error: no unlearning.csv below {folder}; make some with scripts/pocket_unlearning.sh")
    table = pd.concat([pd.read_csv(f) for f in files], ignore_index=True)
    extra = [c for c in ("regime", "sata_lambda", "sata_renorm", "recover_rounds") if c in table]
    by = ["dataset", "beta", "method", *extra]
    columns = [c for c in SHOWN if c in table]
    print("| " + " | ".join([*by, "n", *(SHOWN[c] for c in columns)]) + " |")
    print("|" + "---|" * len(by) + "---:|" * (1 + len(columns)))
    for key, rows in table.groupby(by, dropna=False):
        cells = ["-" if k != k else f"{k:g}" if isinstance(k, float) else str(k) for k in key]
        for c in columns:
            mean, spread = rows[c].mean(), rows[c].std()
            digits = 2 if c in ("mia_loss_auc", "relD") else 1
            spread = "" if c in PLAIN or spread != spread else f" ± {spread:.{digits}f}"
            cells.append("-" if mean != mean else f"{mean:.{digits}f}{spread}")
        print("| " + " | ".join([*cells[: len(by)], str(len(rows)), *cells[len(by) :]]) + " |")


if __name__ == "__main__":
    main()
