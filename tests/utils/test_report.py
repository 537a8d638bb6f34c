"""The page of runs: its JSON against the CSV files, text that wants to be HTML, and the page in a browser, if any.

The browser is one of the Chromium family: the command in HERD_BROWSER, or what is on the PATH. Nothing of the page is
made for tests: a script that is added to a copy of it filters, sorts, clicks and writes what it saw into the document.
"""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.utils.test_compare import ROOT, matrix, write_csv, write_rounds, write_run
from utils import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("HERD_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(BROWSERS)}, no HERD_BROWSER")
HOSTILE = '</script><!--<script>"\'><img src=x onerror="window.hacked=1"><b id=bold>&amp;\u2028{{data}}'


class Elements(HTMLParser):
    """How many elements there are of each name, and the text of the script called data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.data, self._inside = "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self._inside = ("id", "data") in attrs

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.data += data if self._inside else ""


@pytest.fixture
def results(tmp_path):
    root = tmp_path / "results"
    for seed in range(3):
        for lr in (0.3, 0.03):
            more = {"lr": lr, "uplink_mb": 1, "command": f"python main.py --model dolfin --lr {lr} --seed {seed}"}
            folder = write_run(root, "dolfin", seed, 60 + 100 * lr + seed, matrix=matrix(4, seed), **more)
            write_rounds(folder, [0, 0, 95.0 + seed, 0.5, 0.25], [0, -1, 96.0, "", 0.5], [1, -1, 80.25, 0.125, 1.0])
        write_run(root, "fedavg", seed, 40 + seed**2)
    write_run(root, "sgd", 0, 30, dataset="seq-glyphs", setting="central", uplink_mb="")
    return root


def make(capsys, *argv):
    code = report.main([str(arg) for arg in argv])
    out = capsys.readouterr()
    assert "Traceback" not in out.err and out.out == ""
    return code, out.err


def data_of(page):
    return json.loads(Elements(page).data)


def summaries(root):
    for file in root.rglob("summary.csv"):
        with open(file, newline="") as f:
            yield file.parent, next(csv.DictReader(f))


def test_the_data_of_the_page_is_that_of_the_files(results, tmp_path, capsys):
    code, err = make(capsys, results, "-o", tmp_path / "report.html")
    assert code == 0 and "4 rows, 10 runs" in err and err.count("\n") == 1
    data = data_of((tmp_path / "report.html").read_text("utf-8"))
    assert data["labels"] == ["dataset", "model", "lr"] and data["cut"] == data["thinned"] == 0
    assert data["metrics"]["faa"] == 1 and data["metrics"]["forgetting"] == -1
    runs = {run["path"]: run for run in data["runs"]}
    found: dict[tuple, list[float]] = {}
    for folder, row in summaries(results):
        run = runs.pop(str(folder))
        group = data["groups"][run["group"]]
        assert group["labels"] == [row["dataset"], row["model"], row["lr"]]
        assert (run["run"], run["seed"], run["status"]) == (row["run"], int(row["seed"]), "finished")
        assert run["values"]["faa"] == pytest.approx(float(row["faa"]), rel=1e-6)
        assert {**data["args"], **group["args"], **run["args"]}["lr"] == row["lr"]
        found.setdefault(tuple(group["labels"]), []).append(float(row["faa"]))
        if row["model"] == "dolfin":
            assert run["command"] == row["command"]
            R = matrix(4, run["seed"])
            for shift, setting in enumerate(["class-il", "task-il"]):
                for i in range(4):
                    assert run["accuracy"][setting][i][: i + 1] == pytest.approx(R[i, : i + 1] + shift, abs=0.005)
                    assert run["accuracy"][setting][i][i + 1 :] == [None] * (3 - i)
            assert run["rounds"]["uplink_mb"] == [0.25, 0.5, 1.0] and run["rounds"]["loss"] == [0.5, None, 0.125]
            assert run["rounds"]["faa"] == [95.0 + run["seed"], 96.0, 80.25]
    assert not runs
    for group in data["groups"]:
        mean, std, n = group["values"]["faa"]
        values = found.pop(tuple(group["labels"]))
        assert (mean, n) == (pytest.approx(statistics.mean(values), rel=1e-5), len(values)) and n == len(group["runs"])
        assert std == (pytest.approx(statistics.stdev(values), rel=1e-5) if n > 1 else None)
    assert not found
    dolfin = next(group for group in data["groups"] if group["labels"][1] == "dolfin")
    diagonal = statistics.mean(matrix(4, seed)[2, 2] for seed in range(3))
    assert dolfin["accuracy"]["class-il"][2][2] == pytest.approx(diagonal, abs=0.01)
    assert dolfin["bytes"] == [[0.25, 96.0], [0.5, 96.0], [1.0, 80.25]]


def write_hostile(root):
    """A run whose every text would like to be HTML."""
    more = {"model_config": HOSTILE, "command": HOSTILE, "status": "finished"}
    folder = write_run(root, "er", 0, args={"notes": HOSTILE, HOSTILE.replace("/", ""): 1}, **more)
    write_csv(folder / "unlearning.csv", ["method", HOSTILE, "FA"], [HOSTILE, "3+7", "12.3456"])
    return folder


def test_text_of_runs_never_becomes_html(tmp_path, capsys):
    write_hostile(tmp_path / "r")
    write_run(tmp_path / "r", "er", 1, model_config="lora")
    assert make(capsys, tmp_path / "r", "-o", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text("utf-8")
    found, template = Elements(page), Elements(report.TEMPLATE.read_text("utf-8"))
    assert found.count == template.count and found.count["script"] == 2
    data = data_of(page)
    run = next(run for run in data["runs"] if run["command"] == HOSTILE)
    assert {**data["args"], **data["groups"][run["group"]]["args"], **run["args"]}["notes"] == HOSTILE
    assert HOSTILE in data["groups"][run["group"]]["labels"]
    assert run["unlearning"] == {"columns": ["method", HOSTILE, "FA"], "rows": [[HOSTILE, "3+7", 12.3456]]}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", page)


def test_the_page_asks_no_network_for_anything():
    template = report.TEMPLATE.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name
    assert not re.search(r"https?:|[\"'(]//\w|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|\ssrc=", template)
    assert "default-src 'none'" in template
    assert re.findall(r'href="([^"]*)"', template) == ["data:,", "#"]


def test_details_of_many_runs_are_cut_and_said(results, tmp_path, capsys):
    whole = make(capsys, results, "-o", tmp_path / "whole.html")
    size = len(json.dumps(data_of((tmp_path / "whole.html").read_text("utf-8")), separators=(",", ":")))
    assert "left out" not in whole[1]
    code, err = make(capsys, results, "-o", tmp_path / "cut.html", "--max_mb", (size - 1200) / 1e6)
    data = data_of((tmp_path / "cut.html").read_text("utf-8"))
    kept = [run for run in data["runs"] if "command" in run]
    assert code == 0 and 0 < data["cut"] == 10 - len(kept) < 10
    assert f"left out the details of {data['cut']} of 10 runs" in err
    assert {run["seed"] for run in data["runs"] if "command" not in run} <= {1, 2}  # first seeds stay
    assert len(json.dumps(data, separators=(",", ":"))) <= size - 1200
    assert all("values" in run and "path" in run for run in data["runs"])


def test_long_curves_are_thinned_and_end_where_they_end(tmp_path, capsys):
    n = 2 * report.MOST_ROUNDS + 7
    write_rounds(write_run(tmp_path / "r", "er", 0), *([0, i, float(i % 100), 0.1, float(i)] for i in range(n)))
    assert make(capsys, tmp_path / "r", "-o", tmp_path / "x.html")[0] == 0
    data = data_of((tmp_path / "x.html").read_text("utf-8"))
    sent = data["runs"][0]["rounds"]["uplink_mb"]
    assert data["thinned"] == 1 and len(sent) <= report.MOST_ROUNDS and sent[-1] == n - 1
    assert {b - a for a, b in zip(sent, sent[1:])} == {3}


def test_mistakes_are_one_line_and_nothing_is_written(results, tmp_path, capsys):
    page = tmp_path / "report.html"
    for argv, message in [
        ([tmp_path / "nowhere"], "does not exist"),
        ([results, "--metric", "forgeting"], "did you mean 'forgetting'"),
        ([results, "--by", "modle"], "did you mean 'model'"),
        ([results, "-o", tmp_path / "no" / "report.html"], "cannot write"),
    ]:
        code, err = make(capsys, "-o", page, *argv)
        assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
        assert not page.exists()


def test_help_imports_nothing_heavy():
    code = "import sys, utils.report as r\ntry: r.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('numpy', 'pandas', 'scipy', 'matplotlib', 'torch', 'yaml') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--output" in out and out.strip().endswith("[]")


# ---- in a browser

SCRIPT = """
const texts = selector => [...document.querySelectorAll(selector)].map(node => node.textContent.trim());
const rows = id => [...document.querySelectorAll(`#${id} tbody tr`)].map(tr => [...tr.cells].map(td => td.textContent));
const changed = () => new Promise(done => addEventListener("hashchange", () => setTimeout(done), { once: true }));
const go = async hash => { const done = changed(); location.hash = hash; await done; };
const click = async selector => { const done = changed(); document.querySelector(selector).click(); await done; };
const write = async (id, value, event) => {
  const done = changed(), node = document.getElementById(id);
  node.value = value;
  node.dispatchEvent(new Event(event));
  await done;
};
(async () => {
  const seen = { errors: [] };
  addEventListener("error", event => seen.errors.push(event.message));
  addEventListener("securitypolicyviolation", event => seen.errors.push(event.blockedURI));
  try { %s } catch (error) { seen.errors.push(String(error)); }
  document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
})();
"""


def browse(page, steps, tmp_path):
    """What ``steps`` put into ``seen``, run in a copy of the page."""
    copy = tmp_path / "copy.html"
    before, _, after = page.read_text("utf-8").rpartition("</body>")
    copy.write_text(f"{before}<script>{SCRIPT % steps}</script></body>{after}", "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", copy.as_uri()]
    out = subprocess.run(command, capture_output=True, timeout=120).stdout.decode("utf-8", "replace")
    found = re.search(r'<pre id="seen">(.*?)</pre>', out, re.DOTALL)
    assert found, f"the browser shows nothing: {out[:500]}"
    seen = json.loads(html.unescape(found.group(1)))
    assert seen.pop("errors") == []
    return seen


@needs_browser
def test_filter_sort_and_panels_in_a_browser(results, tmp_path, capsys):
    page = tmp_path / "report.html"
    run = next(f for f, row in summaries(results) if (row["model"], row["lr"], row["seed"]) == ("dolfin", "0.3", "1"))
    columns = ["client", "FA", "method"]
    write_csv(run / "unlearning.csv", columns, ["3", "12.5", "pga"], ["7", "", "own"])
    assert make(capsys, results, "-o", page, "--metric", "faa")[0] == 0
    runs = data_of(page.read_text("utf-8"))["runs"]
    number = next(i for i, r in enumerate(runs) if r["path"] == str(run))
    steps = """
  seen.all = rows("groups");
  document.getElementById("q").focus();
  await write("q", "lr=0.03 DOL", "input");
  seen.words = rows("groups"); seen.focus = document.activeElement.id;
  await write("q", "", "input");
  await write("dataset", "seq-glyphs", "change"); seen.dataset = rows("groups");
  await write("dataset", "", "change");
  await write("setting", "federated", "change"); seen.setting = rows("groups").length;
  await write("setting", "", "change");
  const head = 'th:nth-child(5) a';
  seen.head = document.querySelector(head).textContent;
  await click(head); seen.best = rows("groups").map(r => r[4]);
  await click(head); seen.worst = rows("groups").map(r => r[4]); seen.order = texts("th[aria-sort=ascending]");
  await click('th:nth-child(3) a'); seen.lr = rows("groups").map(r => r[2]);
  await go("#sort=uplink_mb&order=up&columns=uplink_mb,forgetting"); seen.last = rows("groups").at(-1);
  await click("#more input"); seen.columns = texts("#groups th").length;
  await go("#q=dolfin&over=bytes"); seen.curves = document.querySelectorAll("svg path.curve").length;
  await click("#groups tbody a"); seen.runs = rows("runs");
  await click("#runs tbody tr:nth-child(2) a"); seen.title = document.querySelector("main h1").textContent;
  await go("#run=%d");
  seen.command = texts("#command")[0];
  seen.cells = [...document.querySelectorAll("svg:has(.cell)")].map(svg => svg.querySelectorAll(".cell").length);
  seen.values = [...document.querySelector("svg:has(.cell)").querySelectorAll("title")].map(t => t.textContent);
  seen.charts = [...document.querySelectorAll("svg:has(.curve)")].map(svg => svg.querySelectorAll(".curve").length);
  seen.unlearning = rows("unlearning");
  seen.details = texts("details div");
  Object.defineProperty(navigator, "clipboard", { value: { writeText: async text => { seen.copied = text; } } });
  document.getElementById("copy").click();
  await new Promise(done => setTimeout(done, 10));
  seen.button = texts("#copy")[0];
"""
    seen = browse(page, steps.replace("%d", str(number)), tmp_path)
    rows = [
        ["seq-digits", "dolfin", "0.03", "3", "64.00 ± 1.00"],
        ["seq-digits", "dolfin", "0.3", "3", "91.00 ± 1.00"],
        ["seq-digits", "fedavg", "0.1", "3", "41.67 ± 2.08"],
        ["seq-glyphs", "sgd", "0.1", "1", "30.00"],
    ]
    assert seen["all"] == rows
    assert seen["words"] == rows[:1] and seen["focus"] == "q"
    assert seen["dataset"] == rows[3:] and seen["setting"] == 3
    ordered = [rows[i][4] for i in (1, 0, 2, 3)]
    assert seen["head"] == "faa ↑" and seen["best"] == ordered and seen["worst"] == ordered[::-1]
    assert seen["order"] == ["faa ↑ ▴"] and seen["lr"] == ["0.03", "0.1", "0.1", "0.3"]
    assert seen["last"][:2] == ["seq-glyphs", "sgd"] and seen["last"][-1] == "-"  # central: nothing sent
    assert seen["columns"] == 7  # three labels, n, three metrics
    assert seen["curves"] == 2
    assert [r[0] for r in seen["runs"]] == ["0", "1", "2"] and seen["title"].startswith("dolfin (lr=0.03)")
    assert seen["title"].endswith("seed 1") and seen["command"] == "python main.py --model dolfin --lr 0.3 --seed 1"
    assert seen["cells"] == [10, 10] and seen["charts"] == [2, 1, 1, 1]  # tasks (class-il, task-il), rounds, MB, loss
    R = matrix(4, 1)
    told = [f"task {j + 1} after {i + 1}: {round(R[i, j], 2):.10g}" for i in range(4) for j in range(i + 1)]
    assert seen["values"] == told
    assert seen["unlearning"] == [["3", "12.50", "pga"], ["7", "-", "own"]]
    assert "lr: 0.3" in seen["details"] and "faa: 91.00" in seen["details"]
    assert seen["copied"] == seen["command"] and seen["button"] == "copied"


@needs_browser
def test_hostile_text_stays_text_in_a_browser(tmp_path, capsys):
    folder = write_hostile(tmp_path / "r")
    write_rounds(folder, [0, -1, 90.0, 0.1, 1.0], [1, -1, 80.0, 0.1, 2.0])
    write_run(tmp_path / "r", "er", 1, matrix=matrix(3, 0), model_config="lora")
    page = tmp_path / "report.html"
    assert make(capsys, tmp_path / "r", "-o", page)[0] == 0
    steps = """
  const look = () => [window.hacked === undefined, document.querySelectorAll("img, #bold").length];
  seen.safe = [look()]; seen.shown = [document.body.textContent.includes("<img src=x")];
  for (const view of ["#group=0", "#group=1", "#run=0", "#run=1", "#q=%3Cimg%20src%3Dx&sort=%3Cb%20id%3Dbold%3E"]) {
    await go(view); seen.safe.push(look());
  }
  await go("#run=" + data.runs.findIndex(run => run.unlearning && run.unlearning.columns));
  seen.command = texts("#command")[0]; seen.unlearning = texts("#unlearning th, #unlearning td");
"""
    seen = browse(page, steps, tmp_path)
    assert seen["safe"] == [[True, 0]] * 6 and seen["shown"] == [True]
    assert seen["command"] == HOSTILE and seen["unlearning"] == ["method", HOSTILE, "FA", HOSTILE, "3+7", "12.35"]
