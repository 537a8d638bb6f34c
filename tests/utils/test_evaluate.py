"""Accuracies, with and without remembered features, in every precision."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from federated.client import Client
from tests.helpers import only_folder, rows, run, small_args
from utils.bias_source import bias_source
from utils.evaluate import Features, evaluate

FAST = "--fl --num_clients 3 --num_comm_rounds 1 --n_epochs 1 --batch_size 16 --debug_mode 1"
HEAD = f"--model fedavg --tuning head {FAST}"


@pytest.fixture
def forwards(monkeypatch):
    """How many batches have gone through the network."""
    from backbones.vit import ViT

    seen, plain = [], ViT._features
    monkeypatch.setattr(ViT, "_features", lambda self, x: (seen.append(len(x)), plain(self, x))[1])
    return seen


def by_hand(model, dataset, task):
    """Class-IL accuracy, image by image."""
    right = []
    for i in dataset.task_indices(task, train=False).tolist():
        x = dataset.get_test_transform()(dataset.eval_images[i].float()[None] / 255)
        right.append(int(model.net.eval()(x)[0, : model.n_seen_classes].argmax()) == int(dataset.eval_labels[i]))
    return 100 * sum(right) / len(right)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_remembered_features_change_nothing(rig, forwards, precision):
    r = rig(f"{HEAD} --pretrained 1 --precision {precision}").begin(0)
    features, once = Features(), []
    for task in (0, 1):
        if task:
            r.end(0).begin(1)
        for round_ in range(2):
            r.round(task, round_)
            tasks = list(range(task + 1))
            plain = evaluate(r.model, r.dataset, tasks)
            before = len(forwards)
            assert evaluate(r.model, r.dataset, tasks, features) == plain
            once.append(len(forwards) - before)
    assert once == [1, 0, 1, 0]  # a batch for each task's test set, the first time it is tested
    if precision == "fp32":
        assert plain[0] == pytest.approx([by_hand(r.model, r.dataset, t) for t in (0, 1)])


def test_features_are_forgotten_when_the_body_changes(rig, forwards):
    r = rig(HEAD).begin(0)
    features = Features()

    def fresh():
        before = len(forwards)
        evaluate(r.model, r.dataset, [0], features)
        return len(forwards) > before

    assert [fresh(), fresh()] == [True, False]
    weight = r.model.net.blocks[1].mlp.fc1.weight
    weight.data = weight.data.clone()
    assert not fresh()  # another tensor with the same content
    with torch.no_grad():
        weight[0, 0] += 1e-3  # written in place
    assert [fresh(), fresh()] == [True, False]
    r.model.net.set_precision("bf16")
    assert [fresh(), fresh()] == [True, False]
    r.model.net.classifier.weight.data.zero_()
    assert not fresh()


@pytest.mark.parametrize("flags", [f"--model fedavg --tuning lora {FAST}", f"--model fedavg {FAST}"])
def test_features_are_not_kept_where_they_may_change(rig, forwards, flags):
    r = rig(flags).begin(0)
    features = Features()
    for n in (1, 2):
        evaluate(r.model, r.dataset, [0], features)
        assert len(forwards) == n and not features.kept


def test_a_method_that_predicts_by_itself_is_asked(rig, monkeypatch):
    r = rig(HEAD).begin(0)
    assert Features().usable(r.model)
    monkeypatch.setattr(type(r.model), "forward", lambda self, x: self.net(x), raising=False)
    assert not Features().usable(r.model)


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_what_precision_touches(rig, precision, dtype):
    """Inside the network the chosen type, outside float32; weights keep theirs."""
    net = rig(f"--model fedavg --tuning lora {FAST} --precision {precision}").model.net
    inside = []
    net.blocks[2].mlp.fc1.register_forward_hook(lambda m, a, out: inside.append(out.dtype))
    logits, features = net(torch.randn(3, 1, 28, 28), returnt="both")
    assert inside == [dtype] and logits.dtype == features.dtype == torch.float32
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_is_the_same(rig):
    """Trained in batches of one size and not tested, each of which would be compiled again."""
    flags = f"--model fedavg --lr 0.01 --optimizer sgd {FAST} --batch_size 4"
    plain, compiled = (rig(f, rig.MLP).begin(0).round(0, 0) for f in (flags, f"{flags} --compile"))
    assert compiled.worker.net._compiled_call_impl is not None and plain.worker.net._compiled_call_impl is None
    assert compiled.model.net.state_dict().keys() == plain.model.net.state_dict().keys()
    for a, b in zip(plain.weights.values(), compiled.weights.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_adapters_are_part_of_the_compiled_network(rig):
    """Traced, not compiled, which takes a compiler most of a minute."""
    worker = rig(f"--model fedavg --tuning lora {FAST}").begin(0).model
    for _, _, _, B in worker.lora:
        nn.init.normal_(B)
    x = torch.randn(4, 1, 28, 28)
    plain = worker.net(x)
    worker.net.compile(backend="eager")
    with_adapter = worker.net(x)
    with worker.lora.disabled():
        without = worker.net(x)
    torch.testing.assert_close(with_adapter, plain)
    assert (without - plain).abs().max() > 0.1
    grads = torch.autograd.grad(worker.net(x).sum(), [p for *_, p in worker.lora])
    assert all(g.abs().sum() > 0 for g in grads)


def test_shares_of_predictions_count_every_class_the_same(rig):
    """Against a loop over test images, with a test set of unequal classes."""
    r = rig(HEAD).begin(0).round(0, 0).end(0).begin(1).round(1, 0)
    *_, share = evaluate(r.model, r.dataset, [0, 1])
    want = np.zeros(4)
    labels = np.concatenate([r.dataset.eval_labels[r.dataset.task_indices(t, train=False)] for t in (0, 1)])
    for t in (0, 1):
        indices = r.dataset.task_indices(t, train=False)
        with torch.no_grad():
            for x, y in r.dataset.loader(indices, t, 7, train=False, device=r.model.device):
                for p, c in zip(r.model(x)[:, :4].argmax(1).tolist(), y.tolist(), strict=True):
                    want[p] += 1 / (labels == c).sum() / 4
    assert share == pytest.approx(want.tolist(), abs=1e-5) and sum(share) == pytest.approx(1)


def test_bias_is_in_the_csv(tmp_path):
    argv = [*small_args("fedavg", True), "--stop_after=2", "--measure_federated_bias=1"]
    assert run(argv, tmp_path) == 0
    table = rows(only_folder(tmp_path) / "rounds.csv")
    assert table[0]["incremental_bias"] == "" and -0.5 <= float(table[1]["incremental_bias"]) <= 0.5
    assert all(
        0 <= float(row[c]) <= 1 for row in table for c in ("prediction_kl", "federated_bias", "federated_bias_js")
    )
    summary = rows(only_folder(tmp_path) / "summary.csv")[0]
    assert summary["incremental_bias"] == table[1]["incremental_bias"]
    mean = (float(table[0]["federated_bias"]) + float(table[1]["federated_bias"])) / 2
    assert float(summary["federated_bias"]) == pytest.approx(mean)


def test_federated_bias_is_that_of_the_clients_own_model(rig):
    """By hand: predictions of one client's model after its training on test images of the task."""
    r = rig(f"{HEAD} --measure_federated_bias 1").begin(0)
    r.worker.enter_task(0)
    client = Client(1, r.dataset, r.partition.indices(0, 1), {}, r.args, 0, 0, "x")
    reply = r.worker.local_update(r.model.broadcast(), client)
    W, b = reply["head.weight"], reply["head.bias"]
    said = np.zeros((2, 2))
    with torch.no_grad():
        for x, y in r.dataset.loader(r.dataset.task_indices(0, train=False), 0, 50, train=False, device="cpu"):
            for p, c in zip(
                (r.worker.net(x, returnt="features") @ W.T + b).argmax(1).tolist(), y.tolist(), strict=True
            ):
                said[c, p] += 1
    share = (said / said.sum(1, keepdims=True)).mean(0)
    want = sum(p * np.log2(2 * p) for p in share if p)
    assert reply["federated_bias"] == pytest.approx(want, abs=1e-6)


def test_bias_source_looks_at_features_alone(rig):
    """Nearest class means by hand on as many images of each class; the classifier's own bias is not in it."""
    r = rig(HEAD)
    r.begin(0).end(0).begin(1)
    before = bias_source(r.model, r.dataset, 1)
    bias = r.model.net.classifier.bias.data.clone()
    bias[3] = 1e4  # everything is called a 3
    r.model.net.classifier.bias.data = bias
    *_, share = evaluate(r.model, r.dataset, [0, 1])
    assert share == [0, 0, 0, 1] and bias_source(r.model, r.dataset, 1) == before

    labels = r.dataset.train_labels
    fewest = min(100, *(int((labels == c).sum()) for c in range(4)))
    means, right, said = [], [], np.zeros(4)
    with torch.no_grad():
        for c in range(4):
            own = (labels == c).nonzero()[:, 0]
            own = own[torch.isin(own, r.dataset.task_indices(c // 2, train=True))][:fewest]
            (batch,) = r.dataset.loader(own, c // 2, 1000, train=False, split="train", device="cpu")
            means.append(r.model.net.features(batch[0]).double().mean(0))
        for t in (0, 1):
            (batch,) = r.dataset.loader(r.dataset.task_indices(t, train=False), t, 1000, train=False, device="cpu")
            z, y = r.model.net.features(batch[0]).double(), batch[1]
            near = torch.stack([(z - m).square().sum(1) for m in means], 1).argmin(1)
            for c in (2 * t, 2 * t + 1):
                right.append(float((near[y == c] == c).double().mean()))
                said += torch.bincount(near[y == c], minlength=4).numpy() / int((y == c).sum()) / 4
    assert before["ncm_accuracy"] == pytest.approx(100 * np.mean(right))
    assert before["ncm_incremental_bias"] == pytest.approx(said[2:].sum() - 0.5)
    assert before["probe_accuracy"] > before["ncm_accuracy"] - 5 and before["probe_accuracy"] > 50


def test_bias_source_is_in_the_csv(tmp_path):
    argv = [*small_args("sgd", False), "--stop_after=2", "--measure_bias_source=1", "--eval_every=1"]
    assert run(argv, tmp_path) == 0
    last = rows(only_folder(tmp_path) / "rounds.csv")[-1]
    summary = rows(only_folder(tmp_path) / "summary.csv")[0]
    for head in ("ncm", "probe"):
        for column in ("accuracy", "incremental_bias", "prediction_kl"):
            assert summary[f"{head}_{column}"] == last[f"{head}_{column}"] != ""
