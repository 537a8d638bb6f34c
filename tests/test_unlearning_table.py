"""The table of unlearning.csv files."""

from __future__ import annotations

import subprocess
import sys

from utils.loggers import write_csv
from utils.registry import ROOT


def table(folder):
    command = [sys.executable, str(ROOT / "scripts" / "unlearning_table.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_means_over_clients_and_seeds(tmp_path):
    for seed, (a, b) in enumerate(((10.0, 20.0), (30.0, 40.0))):
        (tmp_path / str(seed)).mkdir()
        rows = [
            {"dataset": "d", "beta": 0.5, "method": "noop", "FA": v, "relD": 1.0, "rounds": 0, "mb_up": 0.0}
            for v in (a, b)
        ]
        write_csv(tmp_path / str(seed) / "unlearning.csv", rows)
    done = table(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "| d | 0.5 | noop | 4 | 25.0 ± 12.9 | 1.00 ± 0.00 | 0.0 | 0.0 |"


def test_nothing_there(tmp_path):
    done = table(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no unlearning.csv below")
