"""A page for each method, docs/methods/<model>.md, and their index: what the code says of itself, in one place.

    python scripts/build_docs.py            # after a change of a method, its flags or settings, or of docs/pocket.csv

A page has the docstring of the method's file, where it runs, its flags with defaults, the settings of
models/config/<model>.yaml with their sources, what docs/pocket.csv measured, and which function is which equation,
where docstrings name equations. The tests compare the committed pages with those made anew.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from scripts.pocket_report import RECORD, TITLES, cells, commits, spread
from utils.args import HerdParser, add_general_args, add_method_args
from utils.errors import UserError
from utils.files import replacing
from utils.registry import ROOT, load_class, scan
from utils.report_plots import text

PAGES = ROOT / "docs" / "methods"
MADE = "<!-- made by scripts/build_docs.py; do not edit -->\n"
EQUATION = re.compile(r"\b(?:eq|eqs|equation|alg|algorithm)\b\.? ?\d+(?:(?:, | and | to |-)\d+)*", re.IGNORECASE)


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def summary(docstring: str) -> str:
    """The first sentence of a docstring, on one line."""
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])|$", " ".join(docstring.split("\n\n")[0].split()), maxsplit=1)[0]


def runs_where(cls: type) -> str:
    if getattr(cls, "FEDERATED_ONLY", False):
        return "`--fl` only"
    return "central only" if getattr(cls, "CENTRAL_ONLY", False) else "central and `--fl`"


def flags(cls: type) -> tuple[list[argparse.Action], dict[str, object]]:
    """The method's own flags, and general flags whose default it changes."""
    parser = HerdParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    add_general_args(parser)
    general = {action.dest: action.default for action in parser._actions}
    known = list(parser._actions)
    add_method_args(cls, parser)
    changed = {a.dest: a.default for a in known if a in parser._actions and a.default != general[a.dest]}
    return [action for action in parser._actions if action not in known], changed


def shown(value: object) -> str:
    """A default as one would type it."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return "-" if value is None else " ".join(f"`{text(v)}`" for v in values)


def flag_table(cls: type) -> list[str]:
    own, changed = flags(cls)
    lines = []
    if own:
        lines += [cells("flag", "default", "meaning"), "|---|---|---|"]
    for action in own:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        meaning = (action.help or "").replace("%(default)s", text(action.default)).replace("%%", "%")
        choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
        lines.append(
            cells(names, shown(action.default), "; ".join(filter(None, [meaning, choices and f"one of {choices}"])))
        )
    if not own:
        lines.append("None of its own.")
    if changed:
        lines += [
            "",
            "Other defaults of general flags: " + ", ".join(f"`--{k}` {shown(v)}" for k, v in changed.items()) + ".",
        ]
    return lines


def settings(name: str) -> list[str]:
    """models/config/<model>.yaml as it stands: its comments are the sources."""
    import yaml

    file = ROOT / "models" / "config" / f"{name.replace('-', '_')}.yaml"
    if not file.exists():
        return ["No file of settings: the defaults above and those of the data set."]
    written = file.read_text("utf-8").rstrip()
    sections = ", ".join(f"`{section}`" for section in yaml.safe_load(written) or {})
    where = (
        f"`--model_config` takes a section of [{file.relative_to(ROOT)}](../../{file.relative_to(ROOT)}): {sections}."
    )
    return [where, "", "```yaml", *written.splitlines(), "```"]


def pocket(name: str, record: pd.DataFrame) -> list[str]:
    """What docs/pocket.csv has of a method: mean and sample deviation over seeds."""
    mine = record[record["command"].str.contains(rf"--model {re.escape(name)}(?: |$)")]
    if mine.empty:
        return []
    lines = [
        "## On the pocket suite",
        "",
        "From [docs/pocket.csv](../pocket.csv), which has the command of every run; mean and deviation over seeds.",
        "",
        cells("row", "data set", "Dirichlet", "seeds", "FAA %", "forgetting", "task-IL %", "MB up", "commit"),
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (row, dataset, beta), runs in mine.groupby(["row", "dataset", "beta"], dropna=False):
        where = [TITLES.get(row, row), dataset, "central" if beta != beta else text(beta), len(runs)]
        measured = [spread(runs[metric]) for metric in ("faa", "forgetting", "faa_task_il", "uplink_mb")]
        lines.append(cells(*where, *measured, commits(runs)))
    return [*lines, ""]


def documented(module: ast.Module) -> list[tuple[str, str]]:
    """Functions, classes and their methods, by qualified name, with their docstrings."""
    found = []
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node.name, ast.get_docstring(node) or ""))
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found += [(f"{node.name}.{method.name}", ast.get_docstring(method) or "") for method in methods]
    return found


def equations(file: Path) -> list[str]:
    """Functions of a method's file, and of Herd's files that it imports names from, whose docstrings name equations."""
    module = tree(file)
    found = [(file, name, docstring) for name, docstring in documented(module)]
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            other = ROOT / (node.module.replace(".", "/") + ".py")
            if other.exists():
                wanted = {alias.name for alias in node.names}
                found += [(other, n, d) for n, d in documented(tree(other)) if n.split(".")[0] in wanted]
    rows = []
    for where, name, docstring in found:
        for sentence in re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])|\n\n", docstring):
            if named := list(dict.fromkeys(EQUATION.findall(" ".join(sentence.split())))):
                path = where.relative_to(ROOT)
                rows.append(cells(", ".join(named), f"[{path}](../../{path}) `{name}`", " ".join(sentence.split())))
    if not rows:
        return []
    lines = [
        "## Equations in the code",
        "",
        "Those that docstrings name; formulas without a number are in the text above.",
    ]
    return [*lines, "", cells("equation", "where", "what it says"), "|---|---|---|", *dict.fromkeys(rows), ""]


def method_page(name: str, record: pd.DataFrame) -> str:
    """docs/methods/<name>.md.

    Raises:
        UserError: the method's file needs a package that is not installed.
    """
    cls = load_class("models", name, "model")
    file = Path(inspect.getfile(cls))
    path = file.relative_to(ROOT)
    docstring = ast.get_docstring(tree(file)) or ""
    papers = list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", docstring)))
    lines = [MADE, f"# {name}", "", docstring.replace("``", "`"), ""]
    if papers:
        lines += ["arXiv: " + ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers), ""]
    lines += [
        f"Code: [{path}](../../{path}), class `{cls.__name__}`",
        "",
        f"Runs: {runs_where(cls)}, on {', '.join(getattr(cls, 'COMPATIBILITY', []))} data sets",
        "",
        "## Flags",
        "",
        *flag_table(cls),
        "",
        "## Settings",
        "",
        *settings(file.stem),
        "",
        *pocket(name, record),
        *equations(file),
    ]
    return "\n".join(lines).rstrip() + "\n"


def index(methods: dict[str, str]) -> str:
    """docs/methods/README.md of ``{name: module}``; no method is imported for it."""
    lines = [MADE, "# Methods", "", "`python main.py --model <method>`; a page each, made of the code.", ""]
    lines += [cells("method", "what it is"), "|---|---|"]
    for name, module in methods.items():
        docstring = ast.get_docstring(tree(ROOT / (module.replace(".", "/") + ".py"))) or ""
        lines.append(cells(f"[{name}]({name}.md)", summary(docstring).replace("``", "`")))
    return "\n".join(lines) + "\n"


def read_record() -> pd.DataFrame:
    return pd.read_csv(RECORD, dtype={"commit": str})


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        record = read_record()
        pages = {name: method_page(name, record) for name in scan("models")} | {"README": index(scan("models"))}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    PAGES.mkdir(exist_ok=True)
    for file in PAGES.glob("*.md"):  # of methods that are gone
        if file.stem not in pages:
            file.unlink()
    for name, content in pages.items():
        with replacing(PAGES / f"{name}.md") as temporary:
            temporary.write_text(content, "utf-8")
    print(f"{len(pages)} pages in {PAGES.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
