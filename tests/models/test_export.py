"""Trained adapters leave as PEFT folders: the pretrained network with one must be the trained network."""

from __future__ import annotations

import warnings

import pytest
import torch

import main
from utils.args import parse_args

FLAGS = (
    "--dataset seq-digits --fl --device cpu --num_clients 2 --partition_mode iid --num_comm_rounds 1 --n_epochs 1 "
    "--stop_after 2 --lr 0.01 --optimizer adam"
)


@pytest.mark.parametrize("model", ["fedavg --tuning lora", "ffa_lora", "dolfin --lora_r 3"])
def test_peft_loads_what_a_run_exports(model, tmp_path, monkeypatch, capsys):
    built = {}
    build = main.build

    def keep(args):
        built["dataset"], built["model"], worker, built["fresh"] = parts = build(args)
        return parts

    monkeypatch.setattr(main, "build", keep)
    folder = tmp_path / "adapter"
    argv = f"--model {model} {FLAGS} --results_path {tmp_path} --export_adapter {folder}".split()
    assert main.main(argv) == 0

    from peft import PeftModel

    images = torch.rand(4, 1, 28, 28)
    pretrained = built["fresh"]().eval()
    before = pretrained(images, returnt="features")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(pretrained, str(folder)).base_model.model.eval()
    trained = built["model"].net.eval()(images, returnt="features")
    assert (before - trained).abs().max() > 1e-3  # it learned something
    torch.testing.assert_close(adapted(images, returnt="features"), trained, rtol=0, atol=2e-5)


def test_a_run_without_adapters_says_so(tmp_path, capsys):
    argv = (
        f"--model fedavg --tuning head {FLAGS} --debug_mode 1 --results_path {tmp_path} --export_adapter {tmp_path}/a"
    )
    assert main.main(argv.split()) == 2
    assert "--tuning lora" in capsys.readouterr().err
    assert parse_args(argv.split()).export_adapter
