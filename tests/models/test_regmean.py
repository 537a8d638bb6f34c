"""RegMean: the server's merge from what was sent, the Grams from the data, tasks merged after the fact."""

import copy

import pytest
import torch

from models.utils.gpm import unpack_triu
from tests.helpers import inputs_of

FAST = "--model regmean --fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 16 --debug_mode 1"
SMALL = "--optimizer adam --lr 0.002"
VIT = "--dataset seq-digits --backbone vit-pocket --pretrained 1 --device cpu"


def calls(wire, round_, task=0, call="local_update"):
    return [w for w in wire if (w.call, w.task, w.round) == (call, task, round_)]


def scaled(G, alpha):
    return alpha * G + (1 - alpha) * torch.diag(G.diagonal())


def anchored(W, G):
    """Inputs that nobody has seen (dead units) keep the mean of the models."""
    mean = sum(W) / len(W)
    return mean + (sum(w @ g for w, g in zip(W, G, strict=True)) - mean @ sum(G)) @ torch.linalg.pinv(
        sum(G), rtol=1e-13
    )


def dense(sent, d):
    return unpack_triu(sent.double()) if sent.numel() == d * (d + 1) // 2 else torch.diag(sent.double())


@pytest.mark.parametrize(
    "flags, body, head",
    [("", 0.5, 0.5), ("--alpha_regmean_backbone 0 --alpha_regmean_head 0.9 --gram_norm mean", 0.0, 0.9)],
)
@pytest.mark.parametrize("base", ["vit", "mlp"])
def test_a_round_by_brute_force(rig, wire, flags, body, head, base):
    r = rig(f"{FAST} {SMALL} {flags}", VIT if base == "vit" else rig.MLP).begin(0)
    r.round(0, 0)
    expected = {"vit": 16, "mlp": 2}[base]
    assert len(r.model.layers) == expected and "classifier" not in r.model.layers
    weights, grams, n = [], [], []
    for w in calls(wire, 0):
        net = copy.deepcopy(r.worker.net)
        for name, p in net.named_parameters():
            p.data = w.reply[name].clone() if name in w.reply else p.data
        indices = r.partition.indices(0, w.client)
        X = inputs_of(net, r.dataset.loader(indices, 0, 64, False, split="train"))
        own = {}
        for layer, x in X.items():
            G = x.T @ x / (len(x) if "mean" in flags else 1)
            sent = dense(w.reply[f"gram.{layer}"], x.shape[1])
            alpha = head if layer == "head" else body
            want = G if alpha else torch.diag(G.diagonal())
            assert (sent - want).norm() < 1e-4 * want.norm(), layer
            own[layer] = scaled(G, alpha)
        weights.append(w.reply)
        grams.append(own)
        n.append(w.reply["n_samples"])
    for name, p in r.model.trainable().items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in grams[0]:
            want = anchored([w[name].double() for w in weights], [g[layer] for g in grams])
            assert (p.double() - want).norm() < 2e-3 * want.norm(), name
        else:
            mean = sum(k * w[name].double() for k, w in zip(n, weights, strict=True)) / sum(n)
            torch.testing.assert_close(p.data.double(), mean, rtol=1e-5, atol=1e-7)
    assert torch.equal(r.model.net.classifier.weight[:2], r.model.head.weight)


def test_the_head_alone(rig, wire):
    r = rig(f"{FAST} {SMALL} --regmean_all 0", VIT).begin(0)
    r.round(0, 0)
    assert {n for n in calls(wire, 0)[0].reply if n.startswith("gram")} == {"gram.head"}
    n = [w.reply["n_samples"] for w in calls(wire, 0)]
    name = "blocks.0.mlp.fc1.weight"
    mean = sum(k * w.reply[name].double() for k, w in zip(n, calls(wire, 0), strict=True)) / sum(n)
    torch.testing.assert_close(r.model.trainable()[name].data.double(), mean, rtol=1e-5, atol=1e-7)


def test_only_square_layers(rig):
    r = rig(f"{FAST} --only_square 128", VIT)
    assert r.model.layers == [f"blocks.{i}.attn.{n}" for i in range(4) for n in ("qkv", "proj")]


def test_two_rates(rig):
    r = rig(f"{FAST} --lr 0.1 --lr_back 0.001", VIT).begin(0)
    groups = r.model.get_optimizer().param_groups
    body = len([p for p in r.model.net.body_parameters().values() if p.requires_grad])
    assert [(g["lr"], len(g["params"])) for g in groups] == [(0.001, body), (0.1, 2)]
    assert len(rig(f"{FAST} --lr 0.1", VIT).begin(0).model.get_optimizer().param_groups) == 1


def test_passes_over_the_data_add_up(rig, wire):
    sent = []
    for passes in (1, 2):
        wire.clear()
        rig(f"{FAST} {SMALL} --regmean_rounds {passes}", rig.MLP).begin(0).round(0, 0)
        sent.append(calls(wire, 0)[0].reply["gram.fc1"])
    torch.testing.assert_close(sent[1], 2 * sent[0], rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("base", ["vit", "mlp"])
@pytest.mark.parametrize("fl", [True, False])
def test_tasks_merged_after_the_fact(rig, base, fl):
    """Every task starts from the pretrained network; what is tested is all experts merged at once."""
    flags = (
        f"{FAST} --regmean_tasks individual" if fl else "--model regmean --n_epochs 1 --batch_size 16 --debug_mode 1"
    )
    r = rig(f"{flags} {SMALL} --alpha_regmean_backbone 0.5", rig.POCKET if base == "vit" else rig.MLP)
    start = {n: p.detach().clone() for n, p in r.model.net.body_parameters().items()}
    experts, grams, tested = [], [], []
    for task in range(3):
        r.begin(task)
        for name, p in r.model.net.body_parameters().items():
            assert torch.equal(p, start[name])
        r.round(task, 0)
        experts.append({n: p.detach().clone().double() for n, p in r.model.net.body_parameters().items()})
        net = copy.deepcopy(r.model.net)
        indices = r.dataset.task_indices(task)
        X = inputs_of(net, r.dataset.loader(indices, task, 64, False, split="train"))
        norm = {n: 1 if fl else len(x) for n, x in X.items()}
        grams.append({n: scaled(x.T @ x / norm[n], 0.5) for n, x in X.items()})
        r.end(task)
        tested.append({n: p.detach().clone().double() for n, p in r.model.net.body_parameters().items()})
    for task in range(3):
        for name, found in tested[task].items():
            layer = name.removesuffix(".weight")
            so_far = list(zip(experts, grams, strict=True))[: task + 1]
            if name.endswith(".weight") and layer in grams[0]:
                want = anchored([e[name] for e, _ in so_far], [g[layer] for _, g in so_far])
                assert (found - want).norm() < 2e-3 * want.norm(), (task, name)
            else:
                torch.testing.assert_close(found, sum(e[name] for e, _ in so_far) / (task + 1), rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(experts[1][n], experts[0][n]) for n in experts[0])
