"""The record of requests to forget: what is in it, what replaces what, and the numbers of its tables."""

from __future__ import annotations

import pandas as pd
import pytest

from scripts import unlearning_table as script
from tests.helpers import run
from utils.errors import UserError


def made(**given) -> dict:
    usual = {"dataset": "d", "tasks": "single", "K": 10, "beta": 0.5, "T": 3, "E": 2, "seed": 0, "client": "0"}
    row = usual | {
        "commit": "4682847",  # no number
        "command": "python main.py --device cpu",
        "model": "fedavg",
        "method": "pga",
        "recover_rounds": 0,
        "R_FA": 50.0,
        "R_RA": 90.0,
        "R_TA": 80.0,
        "R_mia_loss_auc": 0.5,
        "avg_gap": 1.0,
    }
    return {c: (row | given).get(c) for c in script.COLUMNS}


def record_of(rows: list[dict], folder) -> pd.DataFrame:
    """The rows as a record that was read."""
    pd.DataFrame(rows).to_csv(folder / "unlearning.csv", index=False)
    return script.read(folder / "unlearning.csv")


def test_requests_of_a_real_run(tmp_path):
    argv = "--model fedavg --dataset seq-digits --backbone mnistmlp --joint 1 --fl --num_clients 4 --num_comm_rounds 1"
    argv += " --device cpu --n_epochs 1 --unlearn noop --unlearn_client 1 2+3"
    assert run(argv.split(), tmp_path / "runs") == 0
    rows = script.collect([str(tmp_path / "runs")], tmp_path / "unlearning.csv")
    assert list(rows["client"]) == ["1", "2+3"] and set(rows["tasks"]) == {"single"}
    assert rows["command"].str.contains("--joint 1").all() and (rows["FA"] == rows["O_FA"]).all()
    rows.to_csv(tmp_path / "unlearning.csv", index=False)
    assert len(script.collect([str(tmp_path / "runs")], tmp_path / "unlearning.csv")) == 2  # the same requests again


def test_means_gaps_rebound_and_outage(tmp_path):
    rows = [
        made(client="0", FA=40.0, RA=91.0, TA=75.0, seconds=1.0),
        made(client="3", FA=60.0, RA=91.0, TA=85.0, seconds=2.0),
        made(client="0", FA=55.0, RA=91.0, TA=80.0, seconds=5.0, recover_rounds=1, avg_gap=0.5),
        made(client="3", FA=55.0, RA=91.0, TA=80.0, seconds=6.0, recover_rounds=1, avg_gap=0.5),
        made(
            client="0",
            FA=50.0,
            RA=90.0,
            TA=70.0,
            model="sata",
            method="sata",
            sata_lambda="p",
            sata_renorm=1.0,
            regime="full",
        ),
    ]
    record = record_of(rows, tmp_path)
    said = script.table(record, "d", "single", 0.5).splitlines()
    assert said[2].startswith("| pga, 1 more | 2 | 0.5 ± 0.0 | 55.0 ± 0.0 | 5.0 ± 0.0 | 91.0 ± 0.0 | 1.0 ± 0.0 |")
    assert "| 5.0 ± 14.1 |" in said[2] and said[2].endswith("| 5.5 | 3.5 |")  # 3's model was good before recovery
    assert said[3].startswith("| pga | 2 | 1.0 ± 0.0 | 50.0 ± 14.1 | 10.0 ± 0.0 |")
    assert said[3].endswith("| 1.5 | 2.0 (1) |")
    assert said[4].startswith("| sata, full, exact1 | 1 |") and said[4].endswith("| never |")
    assert said[-2] == "| fedavg | 50.0 ± 0.0 | 90.0 ± 0.0 | 80.0 ± 0.0 | - | - | - | - |"
    assert said[-1] == "| sata, full | 50.0 | 90.0 | 80.0 | - | - | - | - |"
    with pytest.raises(UserError, match="nothing of d, continual"):
        script.table(record, "d", "continual", 0.5)


def test_a_summary_has_a_column_for_each_setting(tmp_path):
    """Ways that rank best on average come first, whatever the scale of a column; what is missing is said."""
    rows = [made(method="pga", client=c, avg_gap=1.0) for c in "03"]
    rows += [made(method="not", client=c, avg_gap=0.5) for c in "03"]
    rows += [made(method="pga", tasks="continual", client="0", avg_gap=90.0)]
    rows += [made(method="not", tasks="continual", client=c, avg_gap=80.0) for c in "03"]
    rows += [made(method="noop", client="0", avg_gap=7.0)]
    before = {"O_FA": 56.0, "O_RA": 89.0, "O_TA": 80.0, "O_mia_loss_auc": 0.55}  # 6, 1, 0 and 5 from R
    rows += [made(model="sata", regime="full", method="sata", sata_lambda="one", avg_gap=9.0, **before)]
    said = script.summary(record_of(rows, tmp_path)).splitlines()
    assert said[0] == "| mean gap to retraining, points | d, single, 0.5 (n = 2) | d, continual, 0.5 (n = 2) |"
    assert said[2:] == [
        "| not | 0.5 ± 0.0 | 80.0 ± 0.0 |",
        "| (sata, full: nothing done) | 3.0 (1) | - |",  # third of five; pga is second of five and last of two
        "| pga | 1.0 ± 0.0 | 90.0 (1) |",
        "| noop | 7.0 (1) | - |",
        "| sata, full, one | 9.0 (1) | - |",
    ]


def test_the_page_is_that_of_the_record():
    """docs/unlearning.md holds every request of docs/unlearning.csv."""
    page = (script.DOCS / "unlearning.md").read_text("utf-8")
    record = script.read(script.DOCS / "unlearning.csv")
    assert page == script.page(record), "is stale: run `python scripts/unlearning_table.py page` and commit it"


def test_a_record_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["unlearning_table.py", "--record", str(tmp_path), "page"])
    assert script.main() == 2 and "unlearning.csv is not there" in capsys.readouterr().err
    record_of([made()], tmp_path)
    assert script.main() == 0
    page = (tmp_path / "unlearning.md").read_text()
    assert "## d, one task, Dirichlet 0.5" in page and "on cpu; commit 4682847." in page
    assert (tmp_path / "unlearning.png").stat().st_size > 5000
