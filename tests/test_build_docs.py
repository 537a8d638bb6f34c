"""The pages of docs/methods: those committed are those that the code makes, and what they say is true."""

from __future__ import annotations

import csv
import re
import statistics

import pytest

from scripts import build_docs
from utils.args import parse_args
from utils.errors import UserError
from utils.registry import ROOT, scan

METHODS = {name: module for name, module in scan("models").items() if "zz_test_" not in module}  # files of other tests
STALE = "is stale: run `python scripts/build_docs.py` and commit docs/methods"


@pytest.fixture(scope="module")
def record():
    return build_docs.read_record()


def page(name, record):
    try:
        return build_docs.method_page(name, record)
    except UserError as error:
        pytest.skip(str(error))  # an optional package


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_a_method_is_the_one_that_is_made(name, record):
    file = build_docs.PAGES / f"{name}.md"
    made = page(name, record)
    assert file.exists() and file.read_text("utf-8") == made, f"docs/methods/{name}.md {STALE}"


def test_the_index_is_the_one_that_is_made():
    assert (build_docs.PAGES / "README.md").read_text("utf-8") == build_docs.index(METHODS), (
        f"docs/methods/README.md {STALE}"
    )
    pages = {file.stem for file in build_docs.PAGES.glob("*.md")}
    assert pages == {*METHODS, "README"}, f"docs/methods {STALE}"


def test_links_lead_somewhere():
    for file in build_docs.PAGES.glob("*.md"):
        for link in re.findall(r"\]\(([^)]+)\)", file.read_text("utf-8")):
            assert link.startswith("https://arxiv.org/abs/") or (file.parent / link).exists(), (file.name, link)


def test_defaults_are_those_that_a_run_has(record):
    """Flags of a method without settings of its own for a data set, against the parser of main.py."""
    shown = dict(re.findall(r"^\| `--(\w+)`[^|]*\| `([^`]*)` \|", page("livar", record), re.MULTILINE))
    args = vars(parse_args(["--model", "livar", "--dataset", "seq-cifar100", "--fl"]))
    settings = build_docs.ROOT / "models" / "config" / "livar.yaml"
    checked = {name for name in shown if name in args and f"{name}:" not in settings.read_text()}
    assert len(checked) >= 5
    assert {name: shown[name] for name in checked} == {name: f"{args[name]}".removesuffix(".0") for name in checked}


def test_pocket_figures_are_those_of_the_record(record):
    with open(ROOT / "docs" / "pocket.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["row"], r["dataset"], r["beta"]) == ("lorm", "seq-digits", "0.5")]
    faa = [float(row["faa"]) for row in rows]
    line = f"| LoRM | seq-digits | 0.5 | {len(rows)} | {statistics.mean(faa):.1f} ± {statistics.stdev(faa):.1f} |"
    assert len(rows) > 1 and line in page("lorm", record)
    assert "| DOLFIN without projection | seq-digits |" in page("dolfin", record)  # a row of the same --model
    assert "On the pocket suite" not in page("sgd", record)


def test_equations_lead_to_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    (tmp_path / "models" / "utils").mkdir(parents=True)
    (tmp_path / "models" / "utils" / "maths.py").write_text(
        'def f():\n    """Merge (A et al., eq. 2)."""\ndef g():\n    """Eq. 9."""\n'
    )
    file = tmp_path / "models" / "a.py"
    file.write_text(
        '"""A method, eq. 1."""\nfrom models.utils.maths import f\nimport torch\n'
        'class A:\n    def step(self):\n        """The step x | y. Eq. 3 and 4, then\n        Algorithm 1."""\n'
        "    def other(self):\n        pass\n"
    )
    rows = [line for line in build_docs.equations(file) if "](../" in line]
    assert rows == [
        r"| Eq. 3 and 4, Algorithm 1 | [models/a.py](../../models/a.py) `A.step` | Eq. 3 and 4, then Algorithm 1. |",
        r"| eq. 2 | [models/utils/maths.py](../../models/utils/maths.py) `f` | Merge (A et al., eq. 2). |",
    ]
    file.write_text("class A:\n    pass\n")
    assert build_docs.equations(file) == []


def test_a_change_of_default_is_told():
    class Method:
        NAME = "method"

        @staticmethod
        def get_parser(parser):
            parser.add_argument("--gain", type=float, default=0.5, choices=(0.5, 1.0), help="of a | b, %(default)s %%")
            parser.set_defaults(lr=0.1)

    assert build_docs.flag_table(Method) == [
        "| flag | default | meaning |",
        "|---|---|---|",
        r"| `--gain` | `0.5` | of a \| b, 0.5 %; one of `0.5`, `1.0` |",
        "",
        "Other defaults of general flags: `--lr` `0.1`.",
    ]
