"""On a GPU every method learns what it learns on the CPU, and a run that was killed ends as one that was not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import CASES, FEDERATED, SMALL, Mortal, assert_same_run, finished, only_folder, run, small_args
from utils.errors import UserError

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

FAR = 0.02  # of a tensor's norm: Adam turns rounding of small gradients into steps
ELSEWHERE = {  # what makes a run on a GPU another than one on the CPU
    "ccvr": "prototypes are drawn on the device",
    "hgp": "prototypes are drawn on the device",
    "slca": "prototypes are drawn on the device",
    "sderpp": "rounding flips a spike of a stored logit",
}
INEXACT = {"target": "losses differ in the last digits, presumably by kernels that add up in any order"}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """cuDNN rounds to TF32 by default, which is another network's worth of noise after some layers."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def flags(model: str, fl: bool) -> list[str]:
    try:
        argv = small_args(model, fl)
    except UserError as e:
        pytest.skip(f"an optional package is missing: {e}")
    return [*argv, "--stop_after=2", "--savecheck=round", *(["--participation_rate=0.7"] if fl else ["--n_epochs=2"])]


def saved(results) -> dict[str, torch.Tensor]:
    return load_file(only_folder(results) / "checkpoint" / "last.safetensors")


def assert_close(one: dict, two: dict) -> None:
    """The floating-point tensors of two checkpoints, each within rounding of the other."""
    assert one.keys() == two.keys()
    for name, a in one.items():
        if a.is_floating_point():
            a, b = a.double(), two[name].double()
            assert (a - b).norm() <= FAR * a.norm() + 1e-4 * a.numel() ** 0.5, name


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("model, fl", CASES)
def test_every_method(monkeypatch, tmp_path, model, fl):
    argv, mortal = flags(model, fl), Mortal(monkeypatch)
    assert mortal.run(argv, tmp_path / "cpu") == 0
    assert mortal.run(argv, tmp_path / "gpu", "--device=cuda") == 0
    moment = next(m for m in mortal.moments if m[0] == 1 and m[2] == "second batch" or m[2] == "after the test")
    hard = ["--device=cuda", "--loadcheck=auto"]
    assert mortal.run(argv, tmp_path / "hard", *hard, die_at=moment) is None
    assert mortal.run(argv, tmp_path / "hard", *hard) == 0
    (done,) = finished(tmp_path / "hard")
    if model in INEXACT:
        assert (only_folder(tmp_path / "gpu") / "accuracy.csv").read_text() == (done / "accuracy.csv").read_text()
    else:
        assert_same_run(only_folder(tmp_path / "gpu"), done)
    if model not in ELSEWHERE:
        assert_close(saved(tmp_path / "cpu"), saved(tmp_path / "gpu"))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_stacked_clients_learn_the_same(tmp_path, tuning, precision):
    argv = ["--model=fedavg", f"--tuning={tuning}", *SMALL, "--backbone=vit-pocket", "--pretrained=0", *FEDERATED]
    argv += ["--partition_mode=distribution", "--distribution_alpha=1", "--stop_after=1", "--savecheck=round"]
    argv += ["--device=cuda", f"--precision={precision}", "--optimizer=sgd"]
    assert run(argv, tmp_path / "one", "--engine=serial") == 0
    assert run(argv, tmp_path / "many", "--engine=batched", "--clients_per_batch=3") == 0
    assert_close(saved(tmp_path / "one"), saved(tmp_path / "many"))
