"""Merging by what layers see, against least squares on the inputs of partially merged copies of the network."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from models.utils.task_vectors import read_task_vectors, write_task_vectors
from tests.helpers import rows
from utils.errors import UserError

NET = "--dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu"
SHORT = "--n_epochs 1 --batch_size 16 --lr 0.01 --optimizer adamw --warmup 3 --debug_mode 1 --alpha_share 0"


@pytest.fixture
def experts(rig, nano, float64_images):
    """A rig with random experts, before the merge; in float64."""

    def make(flags="", n=5, size=0.1, same=(), net=NET):
        r = rig(f"--model com {SHORT} --calib_examples 20 {flags}", net)
        for m in (r.model, r.worker):
            m.double()
        r.begin(0)
        g = torch.Generator().manual_seed(0)
        for _ in range(n):
            r.model.taus.append(
                {
                    k: size * torch.randn(p.shape, generator=g, dtype=p.dtype) * (not any(s in k for s in same))
                    for k, p in r.model._own_lin.start().items()
                }
            )
        return r

    return make


@pytest.fixture
def float64_images(monkeypatch):
    """The images of statistics in float64, so that sums can be compared closely."""
    from federated.client import Client

    plain = Client.stat_loader
    monkeypatch.setattr(Client, "stat_loader", lambda self, *a, **k: [(x.double(), y) for x, y in plain(self, *a, **k)])


def theta(r, i):
    return {k: s + r.model.taus[i][k] for k, s in r.model._own_lin.start().items()}


def mean_of(r):
    n = len(r.model.taus)
    return {k: sum(theta(r, i)[k] for i in range(n)) / n for k in r.model.taus[0]}


def images(r, task):
    """Those that client 0 takes its statistics from."""
    clients = r.clients(task)
    client = r.engine.client(0, task, -1, "grams")
    assert len(clients) == 1
    order = torch.randperm(len(client.indices), generator=client.generator)
    client.indices = client.indices[order[: r.args.calib_examples].sort().values]
    return client.stat_loader()[0][0]


def seen(r, weights, layer, x):
    """Inputs of a layer in a copy of the network with other weights, flattened."""
    net, found = copy.deepcopy(r.model.net).eval(), []
    with torch.no_grad():
        for k, t in weights.items():
            net.get_parameter(k).copy_(t)
        net.get_submodule(layer).register_forward_pre_hook(lambda m, a: found.append(a[0]))
        net(x, returnt="features")
    return found[0].flatten(0, -2)


def least_squares(X, Y):
    return torch.linalg.lstsq(torch.cat(X), torch.cat(Y)).solution.T


def merged(r):
    r.model.prepare_merge(r.clients(0))
    return {k: r.model._own_lin.start()[k] + t for k, t in r.model.solved.items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


ORDER = [f"blocks.{b}.{m}" for b in range(3) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def test_layers_in_the_order_of_their_use(experts):
    assert experts().model.groups() == [[m] for m in ORDER]
    from torch import nn

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.q, self.k = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, returnt="out"):
            x = x.flatten(1)[:, :4]
            return self.out(self.q(x) * self.k(x))

    r = experts()
    r.model.net = Three().double()
    r.model._own_lin.places = dict.fromkeys(["out.weight", "q.weight", "k.weight", "k.bias"])
    assert r.model.groups() == [["q", "k"], ["out"]]


@pytest.mark.parametrize("granularity", ["linear", "block", "model"])
def test_each_layer_is_least_squares_on_what_it_is_given(experts, granularity):
    r = experts(f"--com_granularity {granularity}")
    got, xs = merged(r), [images(r, i) for i in range(5)]
    start = mean_of(r)
    for k, t in start.items():  # what is no weight of a linear layer is averaged
        if k.removesuffix(".weight") not in ORDER:
            close(got[k], t)
    for layer in (ORDER[0], ORDER[1], ORDER[6], ORDER[11]):
        X, Y = [], []
        for i, x in enumerate(xs):
            before = ORDER[: ORDER.index(layer)]
            if granularity == "model":
                weights = theta(r, i)
            else:
                weights = start | {f"{m}.weight": got[f"{m}.weight"] for m in before}
            if granularity == "block":
                inside = layer.rpartition(".")[0].rpartition(".")[0]
                weights |= {k: t for k, t in theta(r, i).items() if k.startswith(inside)}
            X.append(seen(r, weights, layer, x))
            Y.append(X[-1] @ theta(r, i)[f"{layer}.weight"].T)
        want, W = least_squares(X, Y), got[f"{layer}.weight"]
        fit = sum((a @ (W - want).T).square().sum() for a in X) / sum(b.square().sum() for b in Y)
        assert fit < 1e-6
        if granularity == "linear":  # nothing fits better
            best = sum((a @ want.T - b).square().sum() for a, b in zip(X, Y))
            assert sum((a @ W.T - b).square().sum() for a, b in zip(X, Y)) <= best * (1 + 1e-5)


def test_first_layer_is_the_same_for_all(experts):
    chains = [merged(experts(f"--com_granularity {g}"))[f"{ORDER[0]}.weight"] for g in ("linear", "model")]
    # what enters it passes norms that are averaged in a chain, and the expert's own in RegMean
    still = [
        merged(experts(f"--com_granularity {g}", same=("norm", "cls_token")))[f"{ORDER[0]}.weight"]
        for g in ("linear", "block", "model")
    ]
    assert not torch.allclose(*chains, atol=1e-6)
    close(still[0], still[1])
    close(still[0], still[2])


def test_expert_outputs_are_what_is_fitted(experts):
    r = experts("--com_target expert_output")
    got, start = merged(r), mean_of(r)
    for layer in (ORDER[1], ORDER[7]):
        before = ORDER[: ORDER.index(layer)]
        weights = start | {f"{m}.weight": got[f"{m}.weight"] for m in before}
        X = [seen(r, weights, layer, images(r, i)) for i in range(5)]
        Y = [seen(r, theta(r, i), layer, images(r, i)) @ theta(r, i)[f"{layer}.weight"].T for i in range(5)]
        W, want = got[f"{layer}.weight"], least_squares(X, Y)
        error = [sum((a @ w.T - b).square().sum() for a, b in zip(X, Y)) for w in (W, want)]
        assert error[0] <= error[1] * (1 + 1e-4)


@pytest.mark.parametrize("flags", ["", "--com_granularity block", "--com_target expert_output", "--merge_bias joint"])
def test_one_expert_comes_out_as_it_went_in(experts, flags):
    r = experts(flags, n=1)
    got = merged(r)
    for k, t in theta(r, 0).items():
        close(got[k], t)


def test_equal_experts_and_layers_that_nobody_changed(experts):
    r = experts()
    r.model.taus = [r.model.taus[0]] * 5
    got = merged(r)
    for k, t in theta(r, 0).items():
        close(got[k], t)
    r = experts("--com_target expert_output", same=("mlp",))
    got, start = merged(r), r.model._own_lin.start()
    assert torch.equal(got["blocks.1.mlp.fc1.weight"], start["blocks.1.mlp.fc1.weight"])
    assert not torch.equal(got["blocks.1.attn.qkv.weight"], start["blocks.1.attn.qkv.weight"])


def test_biases_by_the_same_regression(experts):
    r = experts("--merge_bias joint --com_granularity model")
    got, layer = merged(r), ORDER[2]
    X = [seen(r, theta(r, i), layer, images(r, i)) for i in range(5)]
    one = [torch.cat((x, torch.ones_like(x[:, :1])), 1) for x in X]
    Y = [x @ theta(r, i)[f"{layer}.weight"].T + theta(r, i)[f"{layer}.bias"] for i, x in enumerate(X)]
    want = least_squares(one, Y)
    mine = torch.cat((got[f"{layer}.weight"], got[f"{layer}.bias"][:, None]), 1)
    assert sum((x @ (mine - want).T).square().sum() for x in one) < 1e-6 * sum(y.square().sum() for y in Y)


@pytest.mark.parametrize("weight", ["offdiag", "inv_offdiag"])
def test_weights_of_tasks(experts, weight):
    """By the mean |cosine| between two inputs, over pairs of different tokens."""
    r, plain = experts(f"--com_task_weight {weight} --com_granularity model"), experts("--com_granularity model")
    layer, c = ORDER[5], []
    X = [seen(r, theta(r, i), layer, images(r, i)) for i in range(5)]
    for x in X:
        s = torch.nn.functional.normalize(x, dim=1)
        s = (s @ s.T).abs()
        c.append(float((s.sum() - len(s)) / (len(s) * (len(s) - 1))))
    lam = [v if weight == "offdiag" else 1 / v for v in c]
    root = [(v / sum(lam)) ** 0.5 / len(x) ** 0.5 for v, x in zip(lam, X)]
    Y = [x @ theta(r, i)[f"{layer}.weight"].T for i, x in enumerate(X)]
    want = least_squares([a * x for a, x in zip(root, X)], [a * y for a, y in zip(root, Y)])
    W, other = merged(r)[f"{layer}.weight"], merged(plain)[f"{layer}.weight"]

    def far(V):
        return float(sum((a * x @ (V - want).T).square().sum() for a, x in zip(root, X)))

    assert far(W) < 1e-3 * far(other)


def test_off_diagonal_scaling_zero_is_a_weighted_mean_of_columns(experts):
    r = experts("--com_alpha 0 --com_granularity model")
    got, layer = merged(r), ORDER[3]
    g = [seen(r, theta(r, i), layer, images(r, i)).square().mean(0) for i in range(5)]
    want = sum(theta(r, i)[f"{layer}.weight"] * g[i] for i in range(5)) / sum(g)
    close(got[f"{layer}.weight"], want)


def test_parts_of_a_task_add_up(experts):
    """Images of several clients: the same Gram matrices as of one."""
    one = experts("--calib_examples 0")
    many = experts("--calib_examples 0 --fl --num_clients 3 --partition_mode iid")
    a, b = (r.model.statistics(r.clients(0), 2, [[ORDER[4]]], mean_of(r), None)[0]["gram"] for r in (one, many))
    close(a, b)


def test_a_run_and_its_vectors_merged_again(rig, nano, tmp_path):
    flags = f"{SHORT} --alpha_share 0.1 --save_task_vectors --model"
    r = rig(f"{flags} com", NET).run()
    summary = rows(r.record.path / "summary.csv")[0]
    assert float(summary["absolute_acc"]) > 0 and float(summary["faa_task_il"]) == pytest.approx(
        float(summary["absolute_acc"])
    )
    file = r.record.path / "task_vectors.safetensors"
    again = rig(f"{flags} com --merge_from {file}", NET).run()
    for a, b in zip(r.model.taus, again.model.taus):
        assert all(torch.equal(t, b[n]) for n, t in a.items())
    assert rows(again.record.path / "summary.csv")[0]["absolute_acc"] == summary["absolute_acc"]
    assert not [c for c in again.ledger.rows() if c["call"] == "local_update"]
    other = rig(f"{flags} task_arithmetic --regime full --merging iso_c --merge_from {file}", NET).run()
    assert all(torch.equal(t, other.model.taus[1][n]) for n, t in r.model.taus[1].items())


def test_vectors_of_lora_folders(rig, nano, tmp_path):
    from backbones.utils.lora import LoRA

    r = rig(f"--model com {SHORT}", NET)
    want = []
    for t in range(5):
        net = copy.deepcopy(r.model.net)
        lora = LoRA(net, ["attn.qkv:q,v", "mlp.fc1"], 2)
        for p in lora.parameters():
            p.data = torch.randn_like(p)
        lora.export_peft(tmp_path / str(t))
        deltas = {}
        for name in lora.layer_names:
            before = net.get_submodule(name).weight.detach().clone()
            x = torch.eye(before.shape[1])
            with torch.no_grad():
                deltas[f"{name}.weight"] = (net.get_submodule(name)(x) - r.model.net.get_submodule(name)(x)).T
        want.append(deltas)
    got = read_task_vectors([str(tmp_path / str(t)) for t in range(5)], r.model)
    for a, b in zip(want, got):
        for n, t in b.items():
            torch.testing.assert_close(t, a.get(n, torch.zeros_like(t)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["folder", "file", "torch"])
def test_vectors_of_fine_tuned_networks(rig, nano, tmp_path, form):
    """Their weights less ours, whatever prefix the names have; nothing of a pickle is executed."""
    r = rig(f"--model com {SHORT}", NET)
    start, paths, want = r.model._own_lin.start(), [], []
    for t in range(5):
        want.append({n: torch.randn_like(p) for n, p in start.items()})
        if form == "torch":
            weights = {"state_dict": {n.removeprefix("blocks."): p + want[t][n] for n, p in start.items()}}
            torch.save(weights, tmp_path / f"{t}.pt")
        else:
            weights = {f"model.{n}": p + want[t][n] for n, p in start.items()} | {"model.head.weight": torch.ones(3)}
            file = tmp_path / str(t) / "model.safetensors" if form == "folder" else tmp_path / f"{t}.safetensors"
            file.parent.mkdir(exist_ok=True)
            save_file(weights, file)
        paths.append(str(tmp_path / {"folder": str(t), "file": f"{t}.safetensors", "torch": f"{t}.pt"}[form]))
    for a, b in zip(want, read_task_vectors(paths, r.model)):
        for n, t in b.items():
            torch.testing.assert_close(t, a[n], rtol=1e-4, atol=1e-5)
    if form == "torch":
        torch.save({"state_dict": dict(list(start.items())[1:])}, tmp_path / "3.pt")
        with pytest.raises(UserError, match=f"3.pt has no {next(iter(start))}"):
            read_task_vectors(paths, r.model)
        torch.save({n: p[None] for n, p in start.items()}, tmp_path / "3.pt")
        with pytest.raises(UserError, match="is .*, not"):
            read_task_vectors(paths, r.model)
        torch.save({"state_dict": print}, tmp_path / "3.pt")
        with pytest.raises(UserError, match="no task vectors"):
            read_task_vectors(paths, r.model)


def test_mistakes(rig, nano, tmp_path):
    def make(flags):
        return rig(f"--model com {SHORT} {flags}", NET)

    for flags, said in (
        ("--regime linear", "--regime linear: what layers see"),
        ("--com_target expert_output --com_granularity block", "needs --com_granularity linear"),
        (f"--merge_from {tmp_path}/none.safetensors", "--merge_from .*no task vectors"),
    ):
        with pytest.raises(UserError, match=said):
            make(flags)
    vectors = [{k: torch.zeros_like(t) for k, t in make("").model._own_lin.start().items()} for _ in range(5)]
    file = tmp_path / "v.safetensors"
    write_task_vectors(file, vectors[:3])
    with pytest.raises(UserError, match="gives 3 task vectors, seq-digits has 5 tasks"):
        make(f"--merge_from {file}")
    write_task_vectors(file, vectors)
    with pytest.raises(UserError, match="is no parameter that this run would train"):
        make(f"--regime attention --merge_from {file}")
