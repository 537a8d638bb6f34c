"""Tables and figures over folders of runs, on runs written by hand."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from utils import compare, report_plots
from utils.errors import UserError
from utils.report_plots import read_accuracy

ROOT = Path(compare.__file__).parents[1]
NOT_HASHED = {"seed", "status", "faa", "forgetting", "uplink_mb", "note_to_self", "command"}


def write_csv(path, header, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_run(root, model, seed, faa=50.0, run=None, dataset="seq-digits", matrix=None, args=None, age=None, **more):
    """A run folder as the loggers write it; ``age`` in seconds before some fixed time."""
    row = {"model": model, "dataset": dataset, "setting": "federated", "backbone": "mlp", "n_epochs": 5, "lr": 0.1}
    row |= more
    args = {"model": model, "dataset": dataset, "seed": seed, "lr": row["lr"]} | (args or {})
    hashed = {k: v for k, v in (row | args).items() if k not in NOT_HASHED}
    digest = f"{zlib.crc32(str(hashed).encode()):08x}"
    row = {"run": run or f"s{seed}-{digest}", "seed": seed, "status": "finished", "settings_hash": digest} | row
    row = {"faa": faa, "forgetting": 100 - faa} | row
    row = row | {"uplink_mb": row.get("uplink_mb", 3.5), "fwt": "", "version_torch": "2.12"}
    folder = root / dataset / model / str(row["run"])
    folder.mkdir(parents=True)
    write_csv(folder / "summary.csv", row, row.values())
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    if matrix is not None:
        header = ["after_task", "setting", *(f"task_{j}" for j in range(len(matrix[0])))]
        lines = [
            [i, setting, *("" if np.isnan(value) else repr(float(value) + shift) for value in line)]
            for shift, setting in enumerate(["class-il", "task-il"])
            for i, line in enumerate(matrix)
        ]
        write_csv(folder / "accuracy.csv", header, *lines)
    if age is not None:
        os.utime(folder / "summary.csv", (1e9 - age, 1e9 - age))
    return folder


def matrix(T, seed, keep=0.9):
    rng = np.random.default_rng(seed)
    R = np.full((T, T), np.nan)
    for i in range(T):
        for j in range(i + 1):
            R[i, j] = 95 * keep ** (i - j) + rng.uniform(-3, 3)
    return R


@pytest.fixture
def results(tmp_path):
    root = tmp_path / "results"
    for seed in range(3):
        write_run(root, "fedavg", seed, 40 + seed**2)
        write_run(root, "dolfin", seed, 70 + 1.5 * seed, lr=0.3, uplink_mb=1)
        write_run(root, "dolfin", seed, 60 + seed, lr=0.03, uplink_mb=1)
    write_run(root, "fedavg", 0, 30, dataset="seq-glyphs")
    return root


def run(capsys, *argv):
    code = compare.main([str(arg) for arg in argv])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return code, out.out, out.err


def test_groups_by_everything_but_the_seed(results):
    found = compare.table(compare.load_runs([results]), ["faa", "forgetting"])
    assert list(found.columns[:4]) == ["dataset", "model", "lr", "n"]  # lr is all that differs
    assert found[["dataset", "model", "lr", "n"]].values.tolist() == [
        ["seq-digits", "dolfin", 0.03, 3],
        ["seq-digits", "dolfin", 0.3, 3],
        ["seq-digits", "fedavg", 0.1, 3],
        ["seq-glyphs", "fedavg", 0.1, 1],
    ]
    for i, values in enumerate([[60, 61, 62], [70, 71.5, 73], [40, 41, 44]]):
        assert found["faa_mean"][i] == pytest.approx(np.mean(values))
        assert found["faa_std"][i] == pytest.approx(np.std(values, ddof=1))
        assert found["forgetting_mean"][i] == pytest.approx(100 - np.mean(values))
    assert np.isnan(found["faa_std"][3])


def test_settings_of_a_method_are_found_in_its_args(tmp_path):
    for seed in range(2):
        for rank in (2, 16):
            write_run(tmp_path, "dolfin", seed, args={"rank": rank, "note_to_self": seed, "results_path": f"/{rank}"})
        write_run(tmp_path, "fedavg", seed, args={"momentum": 0.9})
    found = compare.table(compare.load_runs([tmp_path]), ["faa"])
    assert list(found.columns[:4]) == ["dataset", "model", "rank", "n"]
    assert [compare.text(v) for v in found["rank"]] == ["2", "16", "-"]
    assert found["n"].tolist() == [2, 2, 2]
    by = compare.table(compare.load_runs([tmp_path]), ["faa"], by=["rank"])
    assert by["n"].tolist() == [2, 2, 2]


def test_what_is_forgotten_afterwards_is_no_setting(tmp_path):
    """One training, whatever is asked of it later; who never took part is one."""
    for asked, excluded in ((["3"], None), (None, [3]), (None, None)):
        write_run(tmp_path, "sata", 0, args={"unlearn_client": asked, "exclude_clients": excluded})
    found = compare.table(compare.load_runs([tmp_path]), ["faa"])
    assert "unlearn_client" not in found and "exclude_clients" in found


def test_bars_of_a_way_to_forget_are_told_apart_by_its_settings():
    from utils.report_plots import _ways

    rows = [("sata", "0", "one"), ("sata", "1", "p"), ("pga", "0", ""), ("pga", "0", "")]
    table = pd.DataFrame(rows, columns=["method", "recover_rounds", "sata_lambda"]).assign(seed=range(4), FA=1.0)
    table = table[["seed", "method", "recover_rounds", "sata_lambda", "FA"]]
    assert list(_ways(table)) == ["sata\nrecover 0\nlambda one", "sata\nrecover 1\nlambda p", "pga", "pga"]


def test_without_a_hash_settings_group_the_runs(tmp_path):
    for seed in range(2):
        for lr in (0.1, 0.2):
            write_run(tmp_path, "er", seed, lr=lr, settings_hash="", run=f"{seed}-{lr}")
    found = compare.table(compare.load_runs([tmp_path]), ["faa"])
    assert found[["lr", "n"]].values.tolist() == [[0.1, 2], [0.2, 2]]


def test_a_hash_is_not_a_number(tmp_path):
    write_run(tmp_path, "er", 0, settings_hash="1e5", run="a")
    write_run(tmp_path, "er", 1, settings_hash="100000", run="b")
    found = compare.table(compare.load_runs([tmp_path]), ["faa"])
    assert found["settings_hash"].tolist() == ["100000", "1e5"]  # shown, as nothing else tells them apart


def test_terminal_table_is_bold_only_with_ansi(results, capsys):
    result = compare.table(compare.load_runs([results]), ["faa", "uplink_mb"])
    shown = compare.render(result, ansi=True)
    bold = re.findall("\033\\[1m(.*?)\033\\[0m", shown)
    assert bold == ["1.00 ± 0.00", "71.50 ± 1.50", "1.00 ± 0.00"]  # a tie is marked twice, a single row not at all
    plain = compare.render(result)
    assert plain == re.sub("\033\\[\\dm", "", shown)
    code, out, err = run(capsys, results, "--metric", "faa,uplink_mb")
    assert (code, out, err) == (0, plain, "")
    lines = plain.splitlines()
    assert {line.index("seq-") for line in lines[2:]} == {0}
    assert len({len(line) for line in lines if line.endswith("0.00")}) == 1  # columns line up


def test_best_follows_the_direction_of_the_metric(tmp_path):
    for model, faa, extra in (("a", 80.0, 1.0), ("b", 60.0, 2.0)):
        write_run(tmp_path, model, 0, faa, total_seconds=faa, n_merged=extra)
    result = compare.table(compare.load_runs([tmp_path]), ["faa", "forgetting", "total_seconds", "n_merged"])
    lines = compare.render(result, "md").splitlines()
    assert lines[0] == "| dataset | model | n | faa ↑ | forgetting ↓ | total_seconds ↓ | n_merged |"
    assert lines[2] == "| seq-digits | a | 1 | **80.00** | **20.00** | 80.00 | 1.00 |"
    assert lines[3] == "| seq-digits | b | 1 | 60.00 | 40.00 | **60.00** | 2.00 |"


def test_a_terminal_without_special_signs(results):
    command = [sys.executable, "-m", "utils.compare", str(results), "--format", "md"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert out.returncode == 0 and b"71.50 +/- 1.50" in out.stdout


def test_nothing_is_best_where_all_are_equal(tmp_path):
    for model in "ab":
        write_run(tmp_path, model, 0, 50.0)
    assert "**" not in compare.render(compare.table(compare.load_runs([tmp_path])), "md")


def test_latex_is_balanced_and_escaped(results):
    write_run(results, "my_model", 0, 99.0, model_config="100%_a&b")
    result = compare.table(compare.load_runs([results]), ["faa", "uplink_mb"])
    lines = compare.render(result, "latex").splitlines()
    spec = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[0]).group(1)
    assert lines[1] == r"\toprule" and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 1 + len(result)
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(spec)}
    assert lines.count(r"\midrule") == 2  # under the header and between the datasets
    assert lines[3] == r"\midrule" and "seq-glyphs" in lines[lines.index(r"\midrule", 4) + 1]
    body = "\n".join(rows)
    assert body.count("{") == body.count("}") and body.count("$") % 2 == 0
    assert r"my\_model" in body and r"\textbf{99.00}" in body and r"71.50 $\pm$ 1.50" in body
    assert r"uplink\_mb $\downarrow$" in body
    assert not re.search(r"(?<!\\)[_%#]", body)


def test_csv_has_raw_numbers_and_reads_back(results, tmp_path, capsys):
    out = tmp_path / "table.csv"
    options = ["--format", "csv", "--metric", "faa", "--metric", "uplink_mb", "--output", out]
    code, shown, _ = run(capsys, results, *options)
    assert (code, shown) == (0, "")
    result = compare.table(compare.load_runs([results]), ["faa", "uplink_mb"])
    pd.testing.assert_frame_equal(pd.read_csv(out), pd.read_csv(io.StringIO(result.to_csv(index=False))))
    back = pd.read_csv(out)
    assert list(back.columns[4:]) == [f"{m}_{part}" for m in ("faa", "uplink_mb") for part in ("mean", "std", "n")]
    np.testing.assert_allclose(back["faa_mean"], result["faa_mean"], rtol=1e-12)


def test_by_sort_and_mixed_settings(results, capsys):
    code, out, err = run(capsys, results, "--by", "model", "--metric", "faa", "--sort", "faa", "--format", "csv")
    assert code == 0
    found = pd.read_csv(io.StringIO(out))
    assert found["model"].tolist() == ["dolfin", "fedavg"] and found["n"].tolist() == [6, 4]
    assert "2 different settings are mixed in model=dolfin" in err
    by_lr = compare.table(compare.load_runs([results]), ["faa"], by=["dataset", "lr"], sort="forgetting")
    assert by_lr["lr"].tolist() == [0.3, 0.03, 0.1, 0.1]


def test_paired_test_over_common_seeds(results):
    from scipy import stats

    write_run(results, "dolfin", 9, 1.0, lr=0.3)  # a seed the baseline lacks
    found = compare.table(compare.load_runs([results]), ["faa"], baseline="fedavg")
    p = found.set_index(["dataset", "model", "lr"])["p_faa"]
    assert p["seq-digits", "dolfin", 0.3] == pytest.approx(stats.ttest_rel([70, 71.5, 73], [40, 41, 44]).pvalue)
    assert p["seq-digits", "dolfin", 0.03] == pytest.approx(stats.ttest_rel([60, 61, 62], [40, 41, 44]).pvalue)
    assert p["seq-digits", "fedavg"].isna().all() and p["seq-glyphs"].isna().all()
    assert "p_faa" in compare.render(found, "md")


def test_paired_test_against_a_row_named_by_its_settings(results, capsys):
    found = compare.table(compare.load_runs([results]), ["faa"], baseline="model=dolfin, lr=3e-2")
    p = found.set_index(["dataset", "model", "lr"])[["p_faa", "p_faa_n"]]
    # by hand: the differences 10, 10.5, 11 have mean 10.5 and deviation 0.5, and with two degrees of freedom
    # P(|T| > t) = 1 - t / sqrt(t^2 + 2)
    t = 10.5 / (0.5 / 3**0.5)
    assert p.loc["seq-digits", "dolfin", 0.3].tolist() == [pytest.approx(1 - t / (t**2 + 2) ** 0.5), 3]
    assert p.loc["seq-digits", "dolfin", 0.03].isna().all()  # the baseline itself
    assert p.loc["seq-glyphs", "fedavg", 0.1].isna().all()  # has no such row
    shown = compare.render(found, "md").splitlines()
    assert [line.split("|")[-2].strip() for line in shown[2:]] == ["-", "<0.001 (n=3)", "0.001 (n=3)", "-"]
    code, out, _ = run(capsys, results, "--metric", "faa", "--baseline", "model=dolfin,lr=0.03", "--format", "csv")
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(out)), found)


def test_paired_test_needs_two_common_seeds(results):
    for seed in (2, 3, 4):
        write_run(results, "er", seed, 50.0 + seed)
    write_run(results, "sgd", 7, 50.0)
    found = compare.table(compare.load_runs([results]), ["faa"], baseline="fedavg")
    lines = {line.split()[1]: line for line in compare.render(found).splitlines() if line.startswith("seq-digits")}
    assert lines["er"].endswith(" - (n=1)") and lines["sgd"].endswith(" - (n=0)")
    assert lines["dolfin"].endswith("(n=3)") and lines["fedavg"].endswith(" -")


def test_equal_runs_have_no_p(tmp_path):
    for model in "ab":
        for seed in range(3):
            write_run(tmp_path, model, seed, 50.0 + seed)
    found = compare.table(compare.load_runs([tmp_path]), ["faa"], baseline="a")
    assert compare.render(found).splitlines()[3].endswith(" - (n=3)")


def test_unknown_names_are_one_line_and_exit_code_2(results, capsys):
    for argv, message in [
        (["--metric", "forgeting"], "did you mean 'forgetting'"),
        (["--sort", "fa"], "did you mean 'faa'"),
        (["--by", "modle"], "did you mean 'model'"),
        (["--baseline", "fedavgg"], "did you mean 'fedavg'"),
        (["--baseline", "dolfin"], "fits 2 rows of seq-digits: model=dolfin,lr=0.03; model=dolfin,lr=0.3"),
        (["--baseline", "model=dolfin,lr=0.5"], "no row with lr '0.5'; did you mean '0.3' or '0.1'?"),
        (["--baseline", "model=fedavg,lr=0.3"], "no row is 'model=fedavg,lr=0.3' alone; choose from dataset="),
        (["--baseline", "model=dolfin,rate=0.3"], "no setting 'rate'"),
        (["--by", "backbone", "--baseline", "fedavg"], "no row is 'fedavg' alone; choose from backbone=mlp"),
        (["--kind", "bytes"], "add --plot"),
        (["--plot", "x.xyz"], "end the name in"),
        (["--plot", "x.png"], "none of these runs has an accuracy.csv"),
        (["--plot", "x.png", "--kind", "bytes"], "none of these runs has a rounds.csv"),
        (["--output", results / "no" / "table.md"], "cannot write"),
    ]:
        code, _, err = run(capsys, results, *argv)
        assert code == 2 and message in err.splitlines()[-1], err
    assert run(capsys, results / "nowhere")[0] == 2
    (results / "empty").mkdir()
    code, out, err = run(capsys, results / "empty")
    assert code == 2 and out == "" and err.startswith("error: no run found") and err.count("\n") == 1


def test_unfinished_runs_are_left_out_and_said(results, capsys):
    write_run(results, "er", 0, status="interrupted")
    write_run(results, "er", 1, status="stopped")
    code, out, err = run(capsys, results)
    assert code == 0 and "er " not in out and "left out 2 unfinished of 12 runs" in err and err.count("\n") == 1
    code, out, err = run(capsys, results, "--all")
    assert code == 0 and re.search(r"seq-digits +er ", out) and err == ""
    code, _, err = run(capsys, results / "seq-digits" / "er")
    assert code == 2 and "--all" in err.splitlines()[-1]


def test_of_two_runs_of_a_seed_the_newest_finished_one_counts(tmp_path, capsys):
    write_run(tmp_path, "er", 0, 10.0, run="a", age=50)
    write_run(tmp_path, "er", 0, 20.0, run="b", age=10)
    write_run(tmp_path, "er", 0, 30.0, run="c", age=0, status="stopped")
    write_run(tmp_path, "er", 1, 40.0, run="d", age=99)
    for option in ([], ["--all"]):
        code, out, err = run(capsys, tmp_path, "--metric", "faa", "--format", "csv", *option)
        found = pd.read_csv(io.StringIO(out))
        assert code == 0 and found["n"].tolist() == [2] and found["faa_mean"].tolist() == [30.0]
        line = next(line for line in err.splitlines() if "several runs of one seed" in line)
        assert str(Path("er/a")) in line and str(Path("er/b")) not in line


def test_files_being_written_are_skipped(results, capsys):
    text = next((results / "seq-glyphs/fedavg").glob("*/summary.csv")).read_text()
    half = results / "seq-glyphs" / "half"
    for i, content in enumerate(["", text[:40], text.splitlines()[0] + "\n", text[: -len(text) // 4], "\0\xff"]):
        (half / str(i)).mkdir(parents=True)
        (half / str(i) / "summary.csv").write_text(content, "latin-1")
    (half / "yaml").mkdir()
    (half / "yaml" / "summary.csv").write_text(text.replace("fedavg", "other"))
    (half / "yaml" / "args.yaml").write_text("lr: [0.1")
    code, out, err = run(capsys, results)
    assert code == 0 and err.count("skipped") == 5 and "going on without it" in err
    assert out.count("seq-glyphs") == 2


def test_missing_values_and_the_same_folder_twice(results):
    runs = compare.load_runs([results, results / "seq-digits", results / "seq-digits"])
    assert len(runs) == 10
    found = compare.table(runs, ["fwt", "faa"])
    assert found["fwt_n"].sum() == 0
    assert compare.render(found).splitlines()[2].split()[4] == "-"
    runs.loc[runs.index[0], "faa"] = np.nan
    assert "(n=2)" in compare.render(compare.table(runs, ["faa"]))
    assert "fwt" not in " ".join(compare.table(runs))  # by default, only what has values


def test_matrices_are_read_in_full_precision(tmp_path):
    R = matrix(4, 0)
    found = read_accuracy(write_run(tmp_path, "er", 0, matrix=R))
    np.testing.assert_array_equal(found["class-il"], R)
    np.testing.assert_array_equal(found["task-il"], R + 1)
    assert read_accuracy(write_run(tmp_path, "joint", 0, matrix=[[90.0, 80.0, 70.0]]))["class-il"].shape == (1, 3)
    assert read_accuracy(tmp_path) == {}
    (tmp_path / "accuracy.csv").write_text("after_task,setting,task_0,task_1\n0,class-il,3")
    with pytest.raises(UserError, match="still being written"):
        read_accuracy(tmp_path)


def test_plot(tmp_path, capsys):
    from matplotlib.image import imread

    for seed in range(3):
        for i, model in enumerate(["fedavg", "ewc", "dolfin"]):
            write_run(tmp_path / "r", model, seed, matrix=matrix(5, 10 * i + seed, 0.7 + 0.1 * i))
        write_run(tmp_path / "r", "joint", seed, matrix=[[90.0 + seed] * 5])
    write_run(tmp_path / "r", "er", 0, matrix=matrix(12, 1)[:7], dataset="seq-glyphs")
    half = write_run(tmp_path / "r", "er", 1, matrix=matrix(12, 1), dataset="seq-glyphs") / "accuracy.csv"
    half.write_text(half.read_text().rsplit(",", 2)[0])
    code, _, err = run(capsys, tmp_path / "r", "--plot", tmp_path / "all.png")
    assert code == 0 and err.count("wrote") == 2 and err.count("left out of the plot") == 1
    code, _, _ = run(capsys, tmp_path / "r" / "seq-digits", "--plot", tmp_path / "one.png")
    assert code == 0
    for name in ("all-seq-digits.png", "all-seq-glyphs.png", "one.png"):
        image = imread(tmp_path / name)
        assert image.shape[0] > 400 and image.shape[1] > 800 and image[..., :3].std() > 0.01


def write_rounds(folder, *rows):
    write_csv(folder / "rounds.csv", ["task", "round", "faa", "loss", "uplink_mb"], *rows)
    return folder


def test_accuracy_over_bytes_is_the_mean_over_seeds(tmp_path, capsys, monkeypatch):
    for seed, (mb, faa) in enumerate([(2.0, 80.0), (4.0, 90.0)]):
        folder = write_run(tmp_path, "fedavg", seed)
        write_rounds(folder, [0, 0, faa, 0.1, mb], [0, -1, faa + 5, "", 2 * mb], [1, -1, faa - 20, 0.3, 3 * mb])
    write_rounds(write_run(tmp_path, "sgd", 0), [0, -1, 50.0, 1.0, ""])  # central
    write_run(tmp_path, "er", 0)
    half = write_rounds(write_run(tmp_path, "fedavg", 2), [0, 0, 80.0, 1.0, 2.0]) / "rounds.csv"
    half.write_text("task,round,faa,loss,uplink_mb\n0,0,80.0,1.0,2.0\n0,1,8")
    drawn = []
    monkeypatch.setattr(report_plots, "_finish", drawn.append)
    code, _, err = run(capsys, tmp_path, "--plot", tmp_path / "x.png", "--kind", "bytes")
    assert code == 0 and err.count("left out of the plot") == 1 and "rounds.csv" in err
    (line,) = drawn[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[3, 85], [6, 90], [9, 65]])


@pytest.mark.parametrize("kind", report_plots.KINDS)
def test_what_was_never_evaluated_is_drawn_as_nothing(tmp_path, capsys, kind):
    folder = write_run(tmp_path, "er", 0, matrix=np.full((2, 2), np.nan))
    write_rounds(folder, [0, -1, "", 0.1, 5.0])
    code, _, err = run(capsys, tmp_path, "--metric", "uplink_mb", "--plot", tmp_path / "x.png", "--kind", kind)
    assert code == 0 and "wrote" in err


@pytest.mark.parametrize("kind", report_plots.KINDS)
def test_names_in_plots_do_not_overlap(tmp_path, capsys, monkeypatch, kind):
    """Twelve methods, most of which end within a point of each other."""
    from matplotlib.figure import Figure

    for i in range(12):
        faa = 50 + 0.1 * i if i < 9 else 4 * i
        folder = write_run(tmp_path, f"a_long_name_{i}", 0, faa, matrix=matrix(3, i), uplink_mb=10 + i % 3)
        write_rounds(folder, [0, -1, 90.0, 0.1, 5.0], [1, -1, faa, 0.1, 10 + i % 3])
    write_run(tmp_path, "joint", 0, 55.0, matrix=[[55.0] * 3], uplink_mb="")
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args: (figures.append(self), save(self, *args)))
    code, _, _ = run(capsys, tmp_path, "--plot", tmp_path / "x.png", "--kind", kind)
    assert code == 0 and len(figures) == 1
    figure = figures[0]
    names = figure.findobj(lambda a: hasattr(a, "get_text") and a.get_text().startswith(("a_", "joint")))
    assert len(names) == {"overview": 26, "bytes": 12}.get(kind, 13)
    figure.draw_without_rendering()
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(name) for name in names]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), names[i].get_text()
        assert box.min.min() >= 0 and (box.max <= figure.bbox.max).all()


def test_positions_are_spread_with_the_least_shift():
    from scipy.optimize import minimize

    gap = 0.15
    for seed in range(5):
        wanted = np.random.default_rng(seed).uniform(0, 1, 6)
        found = np.array(report_plots.spread_out(wanted.tolist(), gap))
        order = np.argsort(wanted)
        apart = {"type": "ineq", "fun": lambda x, order=order: np.diff(x[order]) - gap}
        best = minimize(lambda x, wanted=wanted: ((x - wanted) ** 2).sum(), found * 1.1, constraints=apart, tol=1e-14)
        assert best.success and (np.diff(found[order]) >= gap - 1e-9).all()
        np.testing.assert_allclose(found, best.x, atol=1e-4)


def test_names_of_rows_are_as_short_as_they_can_be():
    def names(*labels):
        return report_plots.row_names([{"dataset": "d"} | label for label in labels])

    one, two = {"model": "a", "model_config": "head", "lr": 0.1}, {"model": "a", "model_config": "lora", "lr": 0.2}
    assert names(one) == ["a"] and names(one, two) == ["a (head)", "a (lora)"]
    assert names(one, two | {"model_config": "head"}) == ["a (lr=0.1)", "a (lr=0.2)"]
    three = two | {"lr": 0.1}
    assert names(one, two, three) == ["a (head, lr=0.1)", "a (lora, lr=0.2)", "a (lora, lr=0.1)"]
    b = {"model": "b", "model_config": "x", "lr": 9.0}
    assert names(one, b, one) == ["a", "b", "a"]  # nothing to tell them apart by
    assert report_plots.row_names([{"lr": 0.1}, {"lr": 0.2}]) == ["all (lr=0.1)", "all (lr=0.2)"]


def test_table_of_one_run(tmp_path, capsys):
    more = {"faa_task_il": 62.25, "forgetting_task_il": ""}
    folder = write_run(tmp_path, "er", 3, 61.25, matrix=matrix(12, 0), **more)
    compare.print_run_table(folder)
    out = capsys.readouterr().out
    R = matrix(12, 0)
    assert "er on seq-digits, seed 3" in out
    assert re.search(rf"class-il, just learned +{R[0, 0]:.2f} +{R[1, 1]:.2f}", out)
    assert re.search(rf"task-il, at the end +{R[11, 10] + 1:.2f} +{R[11, 11] + 1:.2f}\n", out)
    assert re.search(r"\n +faa +forgetting\n-+\nclass-il +61\.25 +38\.75\ntask-il +62\.25 +-\n", out)
    assert re.search(r"\nuplink_mb\n-+\n +3.50\n", out) and "fwt" not in out
    compare.print_run_table(write_run(tmp_path, "joint", 0, matrix=[[90.0, 80.0]]))
    assert "just learned" not in capsys.readouterr().out
    with pytest.raises(UserError):
        compare.print_run_table(tmp_path)


def test_help_imports_nothing_heavy():
    code = "import sys, utils.compare as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('numpy', 'pandas', 'scipy', 'matplotlib', 'torch', 'yaml') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--baseline" in out and out.strip().endswith("[]")
