"""Measures of spiking networks after a task: by the network's own outputs, and in the files."""

import pytest
import torch

from models.utils.soft_dtw import soft_dtw_divergence
from tests.helpers import only_folder, rows, run
from utils.evaluate import evaluate
from utils.spiking_metrics import logit_drift, spiking_metrics

NET = "--dataset seq-digits --backbone sresnet-pocket --T 4 --device cpu"
SHORT = "--n_epochs 1 --batch_size 8 --debug_mode 1 --stop_after 1 --buffer_size 20"


def test_accuracy_by_time_steps_and_nothing_changed(rig):
    r = rig(f"--model ser {SHORT}", NET).run()
    before = r.weights
    got = spiking_metrics(r.model, r.dataset, 0)
    assert r.model.net.T == 4 and all(torch.equal(t, before[n]) for n, t in r.weights.items())
    for T in (1, 2, 8):
        other = rig(f"--model ser --T {T} {SHORT}", NET)
        other.model.net.load_state_dict(before)
        assert got[f"faa_T{T}"] == pytest.approx(evaluate(other.model, other.dataset, [0])[0][0])
    assert got["faa_T4"] == pytest.approx(r.session.results.class_il[0][0])
    assert 0 < got["firing_rate"] < 1 and "logit_drift" not in got


def test_energy_is_that_of_an_image(rig):
    """4.6 pJ a MAC of the stem, once, and of the head, on means; 0.9 pJ an accumulation."""
    r = rig(f"--model ser {SHORT}", NET)
    got = spiking_metrics(r.model, r.dataset, 0)
    size = r.dataset.SIZE[0]
    stem = r.model.net.conv1
    side = (size + 2 - 3) // stem.stride[0] + 1
    assert got["macs"] == side * side * 16 * 9 + 64 * 10
    assert got["energy_mj"] == pytest.approx(1e-9 * (4.6 * got["macs"] + 0.9 * got["sops"]))
    twin = rig(f"--model er {SHORT}", NET.replace("sresnet-pocket --T 4", "resnet-pocket"))
    other = spiking_metrics(twin.model, twin.dataset, 0)
    assert set(other) == {"macs", "energy_mj"} and other["macs"] > 10 * got["macs"]


@pytest.mark.parametrize("model", ["staer", "sderpp"])
def test_drift_is_the_divergence_from_what_is_kept(rig, model):
    r = rig(f"--model {model} {SHORT}", NET).run()
    buffer = r.model.traces if model == "staer" else r.model.buffer
    then = buffer.logits[:20, 2:6] if model == "staer" else buffer.logits[:20]
    r.model.net.eval()
    with torch.no_grad():
        now = r.model.net.sequence(r.model.normalization_transform(buffer.examples[:20])).transpose(0, 1)
        want = soft_dtw_divergence(now, then).mean()
        got = logit_drift(r.model, 3)
        assert got["logit_drift"] == got["logit_drift_1"] == pytest.approx(float(want), rel=1e-4)
        assert got["logit_drift_2"] is None and got["logit_drift_3"] is None
        assert want > 1e-3
        kept = r.model.kept_traces
        r.model.kept_traces = lambda: (kept()[0], now, torch.arange(20) % 2)
        assert all(abs(d) < 1e-3 for d in logit_drift(r.model, 2).values())
        off = now + torch.arange(20)[:, None, None] % 2  # the images of task 2 say something else
        r.model.kept_traces = lambda: (kept()[0], off, torch.arange(20) % 2)
        apart = logit_drift(r.model, 2)
        assert abs(apart["logit_drift_1"]) < 1e-3 and apart["logit_drift_2"] > 0.1
        assert apart["logit_drift"] == pytest.approx((apart["logit_drift_1"] + apart["logit_drift_2"]) / 2)


def test_columns_and_pictures(tmp_path):
    argv = ["--model=staer", *NET.split(), *SHORT.split(), "--measure_spikes=1", "--plot_spikes=1", "--stop_after=2"]
    assert run(argv, tmp_path) == 0
    folder = only_folder(tmp_path)
    last, summary = rows(folder / "rounds.csv")[-1], rows(folder / "summary.csv")[0]
    for column in ("energy_mj", "macs", "sops", "firing_rate", "faa_T1", "faa_T8", "logit_drift", "logit_drift_2"):
        assert summary[column] == last[column] != ""
    for task in (1, 2):
        assert (folder / f"spikes-{task}.png").read_bytes()[:4] == b"\x89PNG"
