"""FedProx, SCAFFOLD, FedSum, TIES, FisherAvg: their servers and clients against loops and closed forms."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from federated.client import Client
from models import get_model_names
from models.utils.fisher import fisher_diagonal

FAST = "--fl --num_clients 3 --num_comm_rounds 2 --n_epochs 2 --batch_size 16 --debug_mode 1 --distribution_alpha 0.5"
SGD = "--optimizer sgd --lr 0.05"


def calls(wire, task, round_):
    return [w for w in wire if (w.call, w.task, w.round) == ("local_update", task, round_)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_they_are_all_there():
    names = ("lorm", "regmean", "livar", "fisheravg", "fedsum", "ties_merging", "fedprox", "scaffold")
    assert set(names) <= set(get_model_names())


# ---- FedProx


def test_fedprox_without_weight_is_fedavg(rig):
    prox = rig(f"--model fedprox --fedprox_mu 0 {FAST} {SGD} --stop_after 2", rig.MLP).run()
    assert same(prox.weights, rig(f"--model fedavg {FAST} {SGD} --stop_after 2", rig.MLP).run().weights)


def test_the_proximal_term(rig):
    """Steps of plain SGD on the loss, plus mu (theta - theta^t), written out."""
    r = rig(f"--model fedprox --fedprox_mu 0.7 {FAST} {SGD} --tuning head", rig.MLP).begin(0)
    message = r.model.broadcast()
    client = Client(1, r.dataset, r.partition.indices(0, 1), {}, r.args, 0, 0, "x")
    r.worker.enter_task(0)
    got = r.worker.local_update(message, client)
    W, b = message["head.weight"].clone(), message["head.bias"].clone()
    again = Client(1, r.dataset, r.partition.indices(0, 1), {}, r.args, 0, 0, "x")
    loader = again.train_loader()
    for _ in range(2):
        for i, (x, y, _) in enumerate(loader):
            if i >= r.worker.get_debug_iters():
                break
            z = r.worker.net(x, returnt="features").detach()
            p = (z @ W.T + b).softmax(1) - F.one_hot(y, 2)
            gW = p.T @ z / len(x) + 0.7 * (W - message["head.weight"])
            gb = p.mean(0) + 0.7 * (b - message["head.bias"])
            W, b = W - 0.05 * gW, b - 0.05 * gb
    torch.testing.assert_close(got["head.weight"], W, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["head.bias"], b, rtol=1e-4, atol=1e-5)


# ---- SCAFFOLD


def test_scaffolds_first_round_is_fedavgs(rig):
    flags = f"{FAST} {SGD} --avg_type uniform --num_comm_rounds 1 --stop_after 1"
    mine, theirs = (rig(f"--model {m} {flags}", rig.MLP).run().weights for m in ("scaffold", "fedavg"))
    for name, t in mine.items():
        torch.testing.assert_close(t, theirs[name], rtol=0, atol=1e-6)


def test_control_variates_are_those_of_option_two(rig, wire):
    """c_i+ = c_i - c + (x - y_i) / (K eta), and c moves by the mean over all clients, with clients away."""
    r = rig(f"--model scaffold {FAST} {SGD} --num_comm_rounds 3", rig.MLP).begin(0)
    steps = {i: 2 * min(r.model.get_debug_iters(), -(-n // 16)) for i, n in enumerate(r.partition.sizes(0))}
    own = {i: {} for i in range(3)}
    server: dict = {}
    for k, ids in enumerate(([0, 1, 2], [0, 2], [1, 2])):
        r.round(0, k, ids)
        change: dict = {}
        for w in calls(wire, 0, k):
            assert w.message.tensors("c.").keys() == server.keys()
            for n in r.model.trainable():
                c, old = server.get(n, 0), own[w.client].get(n, 0)
                new = old - c + (w.message[n].double() - w.reply[n].double()) / (steps[w.client] * 0.05)
                torch.testing.assert_close(w.reply[f"dc.{n}"].double(), new - old, rtol=1e-3, atol=1e-4)
                change[n] = change.get(n, 0) + (new - old)
                own[w.client][n] = new
        for n, d in change.items():
            server[n] = server.get(n, 0) + d / 3
            torch.testing.assert_close(r.model.control[n].double(), server[n], rtol=1e-3, atol=1e-4)
    assert r.states[0].keys() == {"task", "control"}  # nothing of a round stays
    r.end(0).begin(1).round(1, 0)
    assert not calls(wire, 1, 0)[0].message.tensors("c.")


def test_the_correction_is_in_the_gradient(rig):
    """One step with c and c_i set by hand: y = x - eta (g + c - c_i)."""
    one = "--n_epochs 1 --batch_size 512 --debug_mode 0"
    r = rig(f"--model scaffold {FAST} {SGD} {one}", rig.MLP).begin(0)
    r.model.control = {n: torch.full_like(p, 0.3) for n, p in r.model.trainable().items()}
    r.worker.enter_task(0)

    def step(own):
        control = {n: torch.full_like(p, own) for n, p in r.model.trainable().items()}
        client = Client(0, r.dataset, r.partition.indices(0, 0), {"task": 0, "control": control}, r.args, 0, 0, "x")
        return r.worker.local_update(r.model.broadcast(), client)

    a, b = step(0.1), step(0.3)
    for n, p in r.model.trainable().items():
        torch.testing.assert_close(b[n] - a[n], torch.full_like(p, 0.05 * 0.2), rtol=0, atol=1e-6)


def test_the_servers_step(rig, wire):
    r = rig(f"--model scaffold {FAST} {SGD} --scaffold_lr 0.5", rig.MLP).begin(0)
    before = r.weights
    r.round(0, 0)
    n = [w.reply["n_samples"] for w in calls(wire, 0, 0)]
    for name, p in r.model.trainable().items():
        mean = sum(k * w.reply[name].double() for k, w in zip(n, calls(wire, 0, 0), strict=True)) / sum(n)
        torch.testing.assert_close(p.detach().double(), (before[name].double() + mean) / 2, rtol=1e-5, atol=1e-7)


# ---- FedSum


def test_fedsum_by_one_over_n_is_fedavg(rig):
    flags = f"{FAST} {SGD} --avg_type uniform --stop_after 1"
    a = rig(f"--model fedsum --fedsum_lambda {1 / 3} {flags}", rig.MLP).run().weights
    b = rig(f"--model fedavg {flags}", rig.MLP).run().weights
    for name, t in a.items():
        torch.testing.assert_close(t, b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("raw", [0, 1])
def test_the_sum(rig, wire, raw):
    r = rig(f"--model fedsum --fedsum_lambda 0.4 --fedsum_raw {raw} {FAST} {SGD}", rig.MLP).begin(0)
    before = r.weights
    r.round(0, 0)
    for name, p in r.model.trainable().items():
        sent = [w.reply[name] for w in calls(wire, 0, 0)]
        expected = sum(sent) if raw else before[name] + 0.4 * sum(t - before[name] for t in sent)
        torch.testing.assert_close(p.data, expected, rtol=1e-5, atol=1e-6)


# ---- TIES


def test_ties_by_a_loop(rig, wire):
    """fed-mammoth's: the 0.7 quantile of the whole vector, signs of the sum, mean of those that agree, times 0.4."""
    r = rig(f"--model ties_merging {FAST} {SGD}", rig.MLP).begin(0)
    before = r.weights
    r.round(0, 0)
    names = list(r.model.trainable())
    start = np.concatenate([before[n].numpy().ravel() for n in names])
    deltas = [np.concatenate([w.reply[n].numpy().ravel() for n in names]) - start for w in calls(wire, 0, 0)]
    kept = np.stack([np.where(np.abs(d) < np.quantile(np.abs(d), 0.7), 0, d) for d in deltas])
    sign = np.sign(kept.sum(0))
    agree = (np.sign(kept) == sign) & (kept != 0)
    merged = np.where(agree, kept, 0).sum(0) / np.maximum(agree.sum(0), 1)
    found = np.concatenate([p.data.numpy().ravel() for p in r.model.trainable().values()])
    wrong = np.abs(found - (start + 0.4 * merged)) > 1e-6
    assert wrong.mean() < 1e-4  # rounding moves a value or two across the quantile
    assert (sign == 0).any() and np.array_equal(found[sign == 0], start[sign == 0])


def test_one_client_at_full_size_is_itself(rig, wire):
    r = rig(f"--model ties_merging --ties_keep 1 --ties_lambda 1 {FAST} {SGD}", rig.MLP).begin(0)
    r.round(0, 0, ids=[1])
    for name, p in r.model.trainable().items():
        torch.testing.assert_close(p.data, wire[0].reply[name], rtol=0, atol=1e-7)


# ---- Fisher


@pytest.mark.parametrize("inputs", ["test", "raw"])
def test_fisher_sample_by_sample(rig, wire, inputs):
    """One image at a time, autograd, squared, times p(y|x): what the client sends and what the server makes of it."""
    r = rig(f"--model fisheravg --fisher_inputs {inputs} {FAST} {SGD} --num_comm_rounds 1", rig.MLP).begin(0)
    r.round(0, 0)
    fishers = []
    for w in calls(wire, 0, 0):
        net = copy.deepcopy(r.worker.net).eval()
        for n, p in net.named_parameters():
            p.data = w.reply[n].clone()
        total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
        for i in r.partition.indices(0, w.client):
            x = r.dataset.train_images[i][None].float() / 255
            x = x if inputs == "raw" else r.dataset.get_test_transform()(x)
            logp = net(x)[:, :2].log_softmax(1)[0, int(r.dataset.train_labels[i])]
            net.zero_grad()
            logp.backward()
            for n, p in net.named_parameters():
                total[n] += logp.exp().detach() * p.grad.square()
        for n, f in total.items():
            torch.testing.assert_close(w.reply[f"fisher.{n}"], f, rtol=1e-3, atol=1e-7)
        fishers.append(total)
    for name, p in r.model.trainable().items():
        shares = [f[name].double() + 1e-12 for f in fishers]
        expected = sum(s * w.reply[name].double() for s, w in zip(shares, calls(wire, 0, 0), strict=True)) / sum(shares)
        torch.testing.assert_close(p.data.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_fisher_of_logistic_regression():
    """p(y|x) (1 - p(y|x))^2 x^2 in closed form, whatever the size of batches."""
    g = torch.Generator().manual_seed(0)
    x, y, w = torch.randn(150, 3, generator=g), torch.randint(2, (150,), generator=g), torch.randn(3, generator=g)

    def log_likelihood(params, x, y):
        return F.logsigmoid((2 * y - 1) * (x @ params["w"])).sum()

    p = torch.sigmoid((2 * y - 1) * (x @ w))
    expected = (p * (1 - p).square())[:, None] * x.square()
    for size in (1, 70, 150):
        batches = zip(x.split(size), y.split(size), strict=True)
        torch.testing.assert_close(fisher_diagonal(log_likelihood, {"w": w}, batches)["w"], expected.sum(0))


@pytest.mark.parametrize("model", ["fedprox", "scaffold", "fedsum", "ties_merging", "fisheravg"])
@pytest.mark.parametrize("tuning", ["head", "lora"])
def test_they_take_whatever_is_trained(rig, model, tuning):
    r = rig(f"--model {model} --tuning {tuning} {FAST} {SGD}").begin(0)
    before = {n: p.detach().clone() for n, p in r.model.trainable().items()}
    r.round(0, 0)
    assert all(n.startswith(("head.", "lora.")) for n in before)
    moved = {n for n, p in r.model.trainable().items() if not torch.equal(p, before[n])}
    assert {"head.weight", "head.bias"} <= moved and (tuning == "head" or len(moved) > 2)
    assert torch.equal(r.model.net.classifier.weight[:2], r.model.head.weight)
