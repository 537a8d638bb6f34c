"""The command line as a user meets it: one line for every mistake, help at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

import main
from tests.helpers import folders, only_folder, run, small_args
from utils.errors import RunError, UserError

ROOT = Path(__file__).resolve().parent.parent
ER = "--model er --dataset seq-digits --backbone mnistmlp"
FL = f"{ER} --fl"
VIT = "--model er --dataset seq-digits --backbone vit-pocket"

MISTAKES = [
    # names
    ("--model err --dataset seq-digits", "unknown model 'err': did you mean 'er'"),
    ("--model dolfim --dataset seq-digits", "did you mean 'dolfin'?"),
    ("--model xyzzy --dataset seq-digits", "unknown model 'xyzzy': choose from ccvr, coda_"),
    ("--model er --dataset seq-digit", "unknown dataset 'seq-digit': did you mean 'seq-digits'"),
    (
        "--model er --dataset seq-digits --backbone resnet81",
        "unknown backbone 'resnet81': did you mean 'resnet19' or 'resnet18'",
    ),
    ("--model er --dataset seq-digits --network vit_pockett", "did you mean 'vit-pocket' or "),
    (f"{ER} --bufer_size 3", "unknown flag '--bufer_size' for model 'er': did you mean '--buffer_size'"),
    (f"{ER} --batchsize=3", "unknown flag '--batchsize' for model 'er': did you mean '--batch_size'"),
    ("--model sgd --dataset seq-digits --buffer_size 3", "unknown flag '--buffer_size' for model 'sgd'"),
    (f"{ER} --batch 3", "unknown flag '--batch'"),
    (f"{ER} er", "cannot place the argument 'er'"),
    (f"{ER} -x", "unknown flag '-x'"),
    # missing
    ("", "--model is missing: choose from ccvr, coda_"),
    ("--dataset seq-digits", "--model is missing"),
    ("--model er", "--dataset is missing: choose from "),
    ("--model", "--model is missing"),
    (f"{ER} --lr", "--lr: expected one argument"),
    # types and ranges
    (f"{ER} --lr fast", "--lr: 'fast' is not a number at least 0"),
    (f"{ER} --lr nan", "--lr: 'nan' is out of range"),
    (f"{ER} --lr inf", "--lr: 'inf' is out of range"),
    (f"{ER} --lr -1", "--lr: '-1' is out of range"),
    (f"{ER} --lr 1e300", "--lr: '1e300' is out of range"),
    (f"{ER} --num_threads 1000000", "--num_threads: '1000000' is out of range"),
    (f"{ER} --batch_size 0", "--batch_size: '0' is out of range: give a whole number at least 1"),
    (f"{ER} --batch_size 1.5", "--batch_size: '1.5' is not a whole number"),
    (f"{ER} --n_epochs -1", "--n_epochs/--num_epochs: '-1' is out of range"),
    (f"{ER} --seed -1", "--seed: '-1' is out of range"),
    (f"{ER} --buffer_size 0", "--buffer_size: '0' is out of range"),
    (f"{ER} --optim_mom 1.5", "--optim_mom: '1.5' is out of range: give a number at least 0 and at most 1"),
    (f"{ER} --clip_grad 0", "--clip_grad: '0' is out of range: give a number above 0"),
    (f"{ER} --validation 100", "--validation: '100' is out of range"),
    (f"{ER} --optimizer lion", "--optimizer: invalid choice: 'lion'"),
    (f"{ER} --joint maybe", "--joint: 'maybe' is neither true nor false: give 0 or 1"),
    (f"{FL} --num_clients 0", "--num_clients: '0' is out of range: give a whole number at least 1"),
    (f"{FL} --num_comm_rounds 0", "--num_comm_rounds: '0' is out of range"),
    (f"{FL} --participation_rate 0", "--participation_rate: '0' is out of range: give a number above 0 and at most 1"),
    (f"{FL} --participation_rate 1.5", "--participation_rate: '1.5' is out of range"),
    (f"{FL} --participation_rate nan", "--participation_rate: 'nan' is out of range"),
    (f"{FL} --distribution_alpha 0", "--distribution_alpha/--beta: '0' is out of range: give a number above 0"),
    (f"{FL} --partition_mode random", "--partition_mode: invalid choice: 'random'"),
    (f"{FL} --engine warp", "--engine: invalid choice: 'warp' (choose from"),
    (f"{FL} --engine batched --clients_per_batch 0", "--clients_per_batch: '0' is out of range"),
    (f"{FL} --engine ray --workers 0", "--workers: '0' is out of range: give a whole number at least 1"),
    (f"{FL} --engine ray --num_gpus -1", "--num_gpus: '-1' is out of range"),
    (f"{ER} --precision int8", "--precision: invalid choice: 'int8'"),
    # together
    (f"{FL} --clients_per_batch 3", "--clients_per_batch needs --engine batched or ray, this run has --engine serial"),
    (f"{FL} --engine batched --workers 2", "--workers needs --engine ray, this run has --engine batched"),
    (f"{ER} --engine batched", "--engine only make sense with --fl: add --fl or drop them"),
    (f"{FL} --precision fp16", "--precision fp16: er has a training step of its own, without loss scaling; use bf16"),
    (f"{ER} --precision fp16", "--precision fp16: er has a training step of its own"),
    (f"{ER} --num_clients 3", "--num_clients only make sense with --fl: add --fl or drop them"),
    ("--model fedavg --dataset seq-digits", "model 'fedavg' is a federated method: add --fl"),
    (f"{ER} --optim_nesterov 1", "--optim_nesterov needs --optimizer sgd and --optim_mom above 0"),
    (f"{FL} --num_clients 1000", "--num_clients 1000 is too many: a task has "),
    (f"{FL} --num_clients 300 --partition_mode iid", "--num_clients 300 is too many"),
    (f"{FL} --partition_mode quantity --class_quantity 3", "--class_quantity 3: a task has 2 classes"),
    (f"{FL} --num_clients 40 --distribution_alpha 1e-6", "give a larger alpha or fewer clients"),
    ("--model dolfin --dataset seq-digits --backbone mnistmlp", "no linear layer matches target 'attn.qkv:k,v'"),
    ("--model lwf --dataset rot-mnist", "does not support domain-il benchmarks"),
    # what is not there
    (f"{ER} --model_config bset", "--model_config 'bset': er.yaml has no such section: choose from default"),
    (f"{ER} --dataset_config nope", "--dataset_config 'nope': there is no datasets/configs/seq-digits/nope.yaml"),
    (f"{VIT} --backbone_weights nowhere.safetensors", "nowhere.safetensors"),
    (f"{ER} --device cuda:7", "--device 'cuda:7' is not available: this machine has cpu"),
    (f"{ER} --device gpu", "--device 'gpu' is not available"),
    (f"{ER} --loadcheck nowhere", "--loadcheck: there is nothing at nowhere; give a run folder"),
    (f"{ER} --nowand 0", "--nowand 0 needs the package wandb: pip install wandb"),
    (f"{ER} --tensorboard", "--tensorboard 1 needs the package tensorboard: pip install tensorboard"),
    (f"{ER} --wandb_mode of", "--wandb_mode: invalid choice: 'of'"),
    ("--model er --dataset seq-cifar10 --backbone resnet18 --base_path {tmp}", "{tmp}"),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[m[0] or "nothing" for m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setattr("utils.args.find_spec", lambda name: None)  # whether or not wandb is there
    (tmp_path / "data").write_text("a file where data sets should be")
    argv, message = argv.replace("{tmp}", str(tmp_path / "data")), message.replace("{tmp}", str(tmp_path / "data"))
    more = [f"--results_path={tmp_path / 'results'}"] if argv else []
    assert main.main([*argv.split(), *more] if argv != "--model" else [*more, "--model"]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and out.err.endswith("\n"), out.err
    assert message in out.err
    assert out.out == "" and not (tmp_path / "results").exists()


def test_a_checkpoint_of_something_else_is_one_line(tmp_path, capsys):
    foreign, broken = tmp_path / "foreign.safetensors", tmp_path / "broken.safetensors"
    save_file({"t": torch.zeros(1)}, foreign)
    broken.write_bytes(b"not a checkpoint")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (foreign, "no checkpoint of Herd"),
        (broken, "cannot be read"),
        (empty, "there is no checkpoint"),
    ):
        assert run(small_args("er", False), tmp_path / "r", f"--loadcheck={path}") == 2
        out = capsys.readouterr()
        assert (
            out.err.startswith("error: ") and out.err.count("\n") == 1 and message in out.err and str(path) in out.err
        )
    assert folders(tmp_path / "r") == []


def test_a_checkpoint_of_another_method_is_one_line(tmp_path, capsys):
    assert run([*small_args("sgd", False), "--savecheck=task", "--stop_after=1"], tmp_path) == 0
    folder = only_folder(tmp_path)
    capsys.readouterr()
    assert run(small_args("er", False), tmp_path / "r", f"--loadcheck={folder}") == 2
    out = capsys.readouterr()
    assert (
        out.err.startswith("error: --loadcheck: the checkpoint belongs to another run (") and out.err.count("\n") == 1
    )
    assert "--model 'sgd' there and 'er' here" in out.err


@pytest.mark.parametrize("in_the_way", ["", "seq-digits", "seq-digits/er"])
def test_results_that_cannot_be_written_are_one_line(tmp_path, capsys, in_the_way):
    path = tmp_path / "results" / in_the_way
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    assert run(small_args("er", False), tmp_path / "results") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot create ") and "give another --results_path" in error
    assert error.count("\n") == 1


def test_weights_of_another_network_are_one_line(tmp_path, capsys):
    file = tmp_path / "w.safetensors"
    save_file({"t": torch.zeros(1)}, file)
    assert run([*VIT.split(), f"--backbone_weights={file}"], tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and file.name in error


def test_what_a_library_says_in_many_lines_is_one_line_here(capsys, monkeypatch):
    for error, code in ((UserError("this\n  failed: <b>\n\nthere"), 2), (RunError("this\n  failed: <b>\n\nthere"), 1)):
        with monkeypatch.context() as m:
            m.setattr(main, "execute", Mock(side_effect=error))
            assert main.main(ER.split()) == code
        assert capsys.readouterr().err.endswith(": this failed: <b> there\n")


def test_names_are_read_leniently(tmp_path):
    """``-`` and ``_`` are the same, as in Mammoth, and fed-mammoth's spellings are known."""
    argv = ["--model=ewc-on", "--dataset=seq_digits", "--network", "MNISTMLP", "--num_epochs", "1", "--debug_mode=1"]
    assert run([*argv, "--stop_after=1"], tmp_path) == 0
    assert only_folder(tmp_path).parent == tmp_path / "seq-digits" / "ewc_on"


# ---- help


def python(*argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_help_imports_no_torch():
    done = python("-X", "importtime", "main.py", "--help")
    assert done.returncode == 0 and "--num_comm_rounds" in done.stdout and "dolfin" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy", "timm", "pandas", "matplotlib", "sklearn"}


def test_wrong_names_import_no_torch():
    done = python("-X", "importtime", "main.py", "--model", "nothing", "--dataset", "seq-digits")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and [x for x in lines if not x.startswith("import time:")] == [lines[-1]]
    assert "torch" not in {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "argv, flags",
    [
        ("--help", ["--lr ", "--participation_rate", "--savecheck"]),
        ("--model dolfin --help", ["--lr ", "--dolfin_basis", "--gpm_lamb"]),
        ("--model er -h", ["--buffer_size", "--minibatch_size"]),
        ("--help --model=er --dataset seq-digits --backbone vit-pocket", ["--buffer_size", "--backbone_weights"]),
    ],
)
def test_help_lists_the_flags(capsys, argv, flags):
    with pytest.raises(SystemExit) as stop:
        main.main(argv.split())
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in flags)
    assert ("--dolfin_basis" in shown) == ("dolfin" in argv)


def test_a_mistake_has_no_traceback_and_code_2_in_a_process_of_its_own(tmp_path):
    done = python("main.py", "--model", "er", "--dataset", "seq-digits", "--lr", "nan", "--results_path", str(tmp_path))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --lr")
