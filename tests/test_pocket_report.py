"""The record of pocket runs: what is in it, what replaces what, and the numbers of its tables."""

import re
import statistics

import pytest

from scripts import pocket_report
from tests.helpers import run
from utils.errors import UserError
from utils.registry import ROOT, scan


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket_report, "RECORD", tmp_path / "pocket.csv")
    return pocket_report


def test_a_row_over_seeds(report, tmp_path, monkeypatch):
    for seed in (0, 1):
        argv = [
            "--model",
            "ncm",
            "--fl",
            "--dataset",
            "seq-digits",
            "--distribution_alpha",
            "0.5",
            "--num_clients",
            "4",
        ]
        assert run([*argv, "--device", "cpu", "--pretrained", "0", "--seed", str(seed)], tmp_path / "runs") == 0
    record = report.collect([tmp_path / "runs"])
    assert list(record["row"]) == ["ncm", "ncm"] and list(record["seed"]) == [0, 1]
    record.to_csv(report.RECORD, index=False)
    again = report.collect([tmp_path / "runs"])
    assert len(again) == 2  # the same runs are not there twice
    head, _, line = report.table("seq-digits", 0.5, None, True).split("\n")
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[:2] == ["nearest class mean", "2"] and len(cells) == len(head.strip("|").split("|"))
    faa = list(record["faa"])
    assert cells[2] == f"{statistics.mean(faa):.1f} ± {statistics.stdev(faa):.1f}"
    assert float(cells[5].split(" ±")[0]) == pytest.approx(100 * record["incremental_bias"].mean(), abs=0.06)
    with pytest.raises(UserError, match="scripts/pocket_table.sh"):
        report.table("seq-glyphs", 0.5, None, False)


def test_every_row_has_a_title_and_the_record_fits(report):
    rows = report.rows_by_flags()
    assert set(rows.values()) == set(report.TITLES) and rows["--model fedavg --model_config head --fl"] == "head"
    committed = ROOT / "docs" / "pocket.csv"
    import pandas as pd

    record = pd.read_csv(committed)
    assert set(record["row"]) <= set(report.TITLES) and not record.duplicated(report.KEY).any()


def test_runs_of_no_row_are_refused(report, tmp_path):
    argv = ["--model", "ncm", "--dataset", "seq-digits", "--fl", "--num_clients", "2", "--device", "cpu"]
    assert run([*argv, "--pretrained", "0"], tmp_path / "runs") == 0
    with pytest.raises(UserError, match="no row"):
        report.collect([tmp_path / "runs"])


def test_every_method_is_in_the_suite():
    """Whatever is in models/ is run by one of the scripts that scripts/pocket_suite.sh calls."""
    scripts = ROOT / "scripts"
    called = re.findall(r"bash scripts/(\w+\.sh)", (scripts / "pocket_suite.sh").read_text().partition("began=")[2])
    assert len(called) == 4
    text = "".join((scripts / name).read_text() for name in [*called, "pocket_methods.sh"])
    assert set(re.findall(r"--model ([\w-]+)", text)) >= set(scan("models"))
