"""Published cells beside runs written by hand, and the ledgers that ship."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import main
from tests.helpers import SMALL
from utils import compare, ledger
from utils.args import parse_args
from utils.errors import UserError
from utils.ledger import Entry
from utils.loggers import settings_hash
from utils.registry import scan
from utils.report_plots import direction

ROOT = Path(ledger.__file__).parents[1]
PAPERS = ["com", "dolfin", "hgp", "livar", "lorm", "sata", "staer", "tak"]
# data sets whose commands wait for them
NOT_YET = {"seq-imagenet-r", "seq-eurosat-rgb", "seq-cub200"}
FLAGS = {"beta": "distribution_alpha", "T": "T", "buffer": "buffer_size", "clip": "clip_backbone", "alpha": "alpha"}
COMMAND = "python main.py --model fedavg --dataset seq-digits --fl --lr 0.125"
GOOD = {"method": "FedAvg", "dataset": "seq-digits", "metric": "faa", "value": 70.0, "source": "arXiv 0, table 1"}
GOOD |= {"confidence": "certain", "command": COMMAND}


def shipped() -> list[Entry]:
    return [entry for paper in PAPERS for entry in ledger.load(paper)[1]]


def commands() -> list[str]:
    return sorted({entry.command for entry in shipped() if entry.command})


@cache
def parsed(command: str, *more: str):
    return parse_args([*command.split()[2:], *more])


def write(folder: Path, *entries, **head) -> Path:
    file = folder / "made.yaml"
    file.write_text(yaml.safe_dump({"paper": "Made", "entries": list(entries), **head}, sort_keys=False))
    return file


def write_run(root: Path, command: str, seed: int, status: str = "finished", **results) -> None:
    """A run of a command, as its folder would say it: the hash is that of the settings and of no seed."""
    args = parsed(command, "--seed", str(seed))
    row = {"run": f"s{seed}", "model": args.model, "dataset": args.dataset, "seed": seed, "status": status}
    row |= {"settings_hash": settings_hash(args, seed=False), **results}
    folder = root / args.dataset / args.model / f"{seed}-{row['settings_hash']}"
    folder.mkdir(parents=True)
    with open(folder / "summary.csv", "w", newline="") as file:
        csv.writer(file).writerows([row, row.values()])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder of ledgers of our own."""
    (tmp_path / "reproduce").mkdir()
    monkeypatch.setattr(ledger, "LEDGERS", tmp_path / "reproduce")
    return tmp_path / "reproduce"


# ---------------------------------------------------------------- the ledgers that ship


def test_every_paper_has_a_ledger_and_a_script():
    assert ledger.papers() == PAPERS
    for paper in PAPERS:
        assert f" {paper} " in (ROOT / "scripts" / f"reproduce_{paper}.sh").read_text()
        about, entries = ledger.load(paper)
        assert entries or about  # an empty one says why


def test_every_entry_has_a_source_and_a_metric_that_runs_have():
    for entry in shipped():
        assert len(entry.source) > 5 and direction(entry.metric) and 0 <= entry.value <= 100


def test_every_command_parses_but_those_that_wait_for_a_data_set():
    waiting = set()
    for command in commands():
        dataset = re.search(r"--dataset (\S+)", command)[1]
        if dataset not in scan("datasets"):
            waiting.add(dataset)
            with pytest.raises(UserError, match="unknown dataset"):
                parsed(command)
            continue
        assert parsed(command).command == command  # nothing that a shell would see otherwise
    assert waiting == NOT_YET


def test_commands_resolve_to_what_the_cells_say():
    for entry in shipped():
        if entry.command and entry.dataset in scan("datasets"):
            args = parsed(entry.command)
            for key, flag in FLAGS.items():
                if key in entry.setting and entry.setting[key] != "best":
                    assert getattr(args, flag) == entry.setting[key], (entry.method, key)
            assert entry.metric.endswith("_best") == (entry.setting.get("alpha") == "best")


# ---------------------------------------------------------------- files that are wrong


def wrong(file: Path) -> str:
    with pytest.raises(UserError) as error:
        ledger.read(file)
    assert "\n" not in str(error.value) and "made.yaml" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": None}, "source must be text"),
        ({"value": "70"}, "value must be a number"),
        ({"value": True}, "value must be a number"),
        ({"value": float("nan")}, "value must be a number"),
        ({"spread": -1}, "spread must be at least 0"),
        ({"runs": 0}, "runs must be a whole number"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": [0.5]}, "seeds must be a list"),
        ({"setting": "beta 0.5"}, "setting must be a mapping"),
        ({"confidence": "sure"}, "choose from certain, UNCONFIRMED"),
        ({"metric": "fa"}, "no result that a run has"),
        ({"metrik": "faa"}, "did you mean 'metric'?"),
        ({"needs": "a network"}, "and not both"),
        ({"command": "main.py --model er"}, "must begin with"),
        ({"command": COMMAND + " --seed 3"}, "leave out --seed"),
        ({"dataset": "seq-glyphs"}, "must say --dataset seq-glyphs"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, said):
    message = wrong(write(tmp_path, GOOD, GOOD | {"metric": "forgetting"} | change))
    assert "entry 2 (FedAvg" in message and said in message


@pytest.mark.parametrize("key", ["method", "dataset", "metric", "value", "source", "confidence", "command"])
def test_a_missing_key_is_named(tmp_path, key):
    message = wrong(write(tmp_path, {k: v for k, v in GOOD.items() if k != key}))
    assert "entry 1" in message and key in message


def test_a_wrong_file_is_named(tmp_path):
    assert "list of entries" in wrong(write(tmp_path, entries="none"))
    assert "did you mean 'about'?" in wrong(write(tmp_path, GOOD, abuot="text"))
    assert "entry 2 (FedAvg, seq-digits, faa): the same cell as entry 1" in wrong(write(tmp_path, GOOD, GOOD))
    assert "entry 1: must be a mapping" in wrong(write(tmp_path, "FedAvg 70"))
    (tmp_path / "made.yaml").write_text("entries: [")
    assert "cannot be read" in wrong(tmp_path / "made.yaml")
    with pytest.raises(UserError, match="did you mean 'lorm'"):
        ledger.load("lrom")


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ((70, None, 1), [], "not run"),
        ((70, None, 1), [71.0], "verified"),  # one point is allowed
        ((70, None, 1), [71.01], "off"),
        ((70, None, 1), [68.9, 69.1], "verified"),
        ((70, None, 1), [72.0, 74.0], "off"),  # s = sqrt 2, so 2 s / sqrt 2 = 2 < 3
        ((70, None, 1), [71.0, 75.0], "verified"),  # s = 2 sqrt 2, so 4 > 3
        ((70, 3, 1), [75.9], "verified"),  # 2 x 3
        ((70, 3, 1), [76.1], "off"),
        ((70, 3, 9), [71.9], "verified"),  # 2 x 3 / sqrt 9
        ((70, 3, 9), [72.1], "off"),
        ((70, 4, 4), [74.0, 76.0, 75.0], "off"),  # 2 sqrt(16 / 4 + 1 / 3) = 4.16
        ((70, 4, 4), [73.0, 75.0, 74.0], "verified"),
    ],
)
def test_status(theirs, ours, expected):
    value, spread, runs = theirs
    entry = Entry("m", "d", "faa", value, "s", "certain", spread=spread, runs=runs)
    assert ledger.status(entry, ours)[2] == expected


# ---------------------------------------------------------------- runs beside cells


def show(capsys, *argv) -> tuple[list[dict], str]:
    """The rows of ``utils.compare --paper made --format csv``, and stderr."""
    assert compare.main([*map(str, argv), "--paper", "made", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(out))), err


def test_runs_are_matched_by_their_settings_and_pooled_over_seeds(made, tmp_path, capsys):
    other = COMMAND + " --distribution_alpha 0.1"
    entries = [GOOD | {"spread": 2.0}, GOOD | {"metric": "forgetting", "value": 11.5}]
    entries += [GOOD | {"command": other, "setting": {"beta": 0.1}}]
    entries += [GOOD | {"command": COMMAND + " --lr 0.5", "setting": {"lr": 0.5}}]
    write(made, *entries)
    results = tmp_path / "results"
    for seed, faa in ((0, 70.0), (3, 73.0), (11, 76.0)):
        write_run(results, COMMAND, seed, faa=faa, forgetting=10.0)
    write_run(results, COMMAND, 12, "interrupted", faa=1.0)
    # said in another way, and with settings that change no numbers
    write_run(
        results, other.replace("--distribution_alpha 0.1", "--beta=0.1 --device cpu --savecheck task"), 0, faa=60.0
    )
    write_run(results, COMMAND + " --n_epochs 9", 0, faa=99.0)
    rows, err = show(capsys, results)
    assert [row["n"] for row in rows] == ["3", "3", "1", "0"]
    assert [row["status"] for row in rows] == ["verified", "off", "off", "not run"]  # 3 <= 2 sqrt(4 + 9 / 3); 1.5 > 1
    assert [float(rows[0][k]) for k in ("ours_mean", "ours_std", "difference_mean")] == pytest.approx([73.0, 3.0, 3.0])
    assert float(rows[1]["difference_mean"]) == pytest.approx(-1.5)
    assert float(rows[2]["ours_mean"]) == 60.0 and rows[2]["ours_std"] == "" and rows[3]["ours_mean"] == ""
    assert "left out 1 unfinished" in err


def test_a_real_run_is_found(made, tmp_path, capsys):
    command = f"python main.py --model fedavg {' '.join(SMALL[:-1])} --backbone mnistmlp --fl --num_clients 2"
    command = command.replace("--dataset=", "--dataset ")
    write(made, GOOD | {"command": f"{command} --num_comm_rounds 1"})
    results = tmp_path / "results"
    line = ledger.commands(ledger.load("made")[1], seeds=[5])[0]
    assert main.main([*line.split()[2:], "--loadcheck", "auto", "--results_path", str(results), "--device", "cpu"]) == 0
    capsys.readouterr()
    rows, _ = show(capsys, results)
    with open(next(results.rglob("summary.csv"))) as file:
        found = next(csv.DictReader(file))
    assert rows[0]["n"] == "1" and float(rows[0]["ours_mean"]) == pytest.approx(float(found["faa"]))


def test_what_cannot_be_run_is_told(made, tmp_path, capsys):
    gone = {"dataset": "seq-nowhere", "command": COMMAND.replace("seq-digits", "seq-nowhere")}
    text = {k: v for k, v in GOOD.items() if k != "command"} | {"needs": "text", "dataset": "CLINC"}
    write(made, GOOD, GOOD | gone, text, GOOD | {"command": COMMAND + " --unheard_of 1", "setting": {"a": 1}})
    rows, err = show(capsys, tmp_path)
    assert [row["status"] for row in rows] == ["not run", "cannot run", "cannot run", "cannot run"]
    assert "cannot run 1 of 4 cells: needs text" in err and "'seq-nowhere'" in err and "--unheard_of" in err
    assert ledger.main(["made", "--seeds", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == COMMAND + " --seed 4" and "seq-nowhere" not in out
    assert "cannot run: FedAvg, CLINC, -, faa: needs text" in err


@pytest.mark.parametrize("fmt", ["table", "md", "latex"])
def test_the_table_has_both_numbers(made, tmp_path, capsys, fmt):
    write(made, GOOD | {"spread": 1.5, "setting": {"beta": 0.5, "T": 4}})
    write_run(tmp_path / "results", COMMAND, 0, faa=71.25)
    assert compare.main([str(tmp_path / "results"), "--paper", "made", "--format", fmt]) == 0
    out = capsys.readouterr().out.replace(r"$\pm$", "±")
    for part in ("FedAvg", "beta=0.5, T=4", "certain", "verified", "70.00 ± 1.50", "71.25", "1.25"):
        assert part in out
    assert "arXiv 0" not in out  # sources and commands: csv


def test_wrong_use_of_the_flag(made, tmp_path, capsys):
    write(made, about="Nothing is public.")
    for argv, said in ((["--paper", "mde"], "did you mean 'made'?"), (["--paper", "made", "--sort", "faa"], "--sort")):
        assert compare.main([str(tmp_path), *argv]) == 2
        assert said in capsys.readouterr().err
    rows, err = show(capsys, tmp_path)
    assert rows == [] and "Nothing is public." in err


# ---------------------------------------------------------------- the scripts


@pytest.mark.parametrize("paper", ["lorm", "livar"])
def test_a_dry_run_prints_each_command(paper):
    env = os.environ | {"PYTHON": sys.executable, "OUT": "somewhere", "SEEDS": "5 6"}
    script = [ROOT / "scripts" / f"reproduce_{paper}.sh", "--dry-run"]
    done = subprocess.run(["bash", *script], env=env, capture_output=True, text=True, check=True)
    entries = ledger.load(paper)[1]
    here = dict.fromkeys(e.command for e in entries if e.command and e.dataset in scan("datasets"))
    lines = [f"{c.replace('python', sys.executable, 1)} --seed {s}" for c in here for s in (5, 6)]
    assert [x.strip() for x in done.stdout.splitlines()] == [
        f"{x} --loadcheck auto --results_path somewhere" for x in lines
    ]
    assert all(e.method in done.stderr for e in entries if e.needs)


def test_without_seeds_those_of_the_ledger_are_taken(made, capsys):
    write(made, GOOD, GOOD | {"metric": "forgetting", "seeds": [2, 7]}, seeds=[0, 2])
    assert ledger.main(["made"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{COMMAND} --seed {s}" for s in (0, 2, 7)]


def test_the_script_says_how_it_is_used():
    for argv in ([], ["lorm", "--now"], ["lrom"]):
        env = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", ROOT / "scripts/reproduce.sh", *argv], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and re.search("usage|did you mean 'lorm'", done.stderr)
