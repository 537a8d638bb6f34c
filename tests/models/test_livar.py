"""LIVAR's weights by hand, its signals by brute force, and the options of its two modes."""

import copy
import itertools
import json

import pytest
import torch

from federated.message import Message
from models.livar import RULE, head_weights, read_rule, scores
from utils.errors import UserError

FAST = "--model livar --fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 16 --debug_mode 1 --lora_r 2"
SMALL = "--optimizer adam --lr 0.002"
BASE = "--dataset seq-digits --backbone vit-pocket --pretrained 1 --device cpu"
C = 2


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- the table


@pytest.mark.parametrize("b, a", itertools.product(range(3), range(3)))
def test_every_cell_of_the_table(b, a):
    """One entry far below, at, or far above the thresholds of a pool of a hundred."""
    pool = torch.arange(100.0).view(4, 25)
    I_A, I_B = pool.clone(), pool.clone()
    q25, q50 = torch.quantile(pool.double(), 0.25), torch.quantile(pool.double(), 0.5)
    q60, q80 = torch.quantile(pool.double(), 0.6), torch.quantile(pool.double(), 0.8)
    q = scores(I_A, I_B)
    for x, found in zip(pool.flatten().double(), q.flatten(), strict=True):
        row = 0 if x < q60 else 2 if x > q80 else 1
        column = 0 if x < q25 else 2 if x > q50 else 1
        assert found == RULE["table"][row][column]
    # the two importances are looked up apart
    levels_A, levels_B = (10.0, 30.0, 90.0), (10.0, 70.0, 90.0)
    I_A, I_B = pool.clone(), pool.clone()
    k, col = 2, 7
    I_A[k, col], I_B[k, col] = levels_A[a], levels_B[b]
    assert scores(I_A, I_B)[k, col] == RULE["table"][b][a]


def test_a_threshold_itself_is_within():
    """Strict comparisons: five values whose quantiles are values themselves."""
    I = f64(0, 1, 2, 3, 4).view(1, 5)  # noqa: E741 - the paper's letter
    assert scores(I, torch.zeros(1, 5)).tolist() == [[RULE["table"][1][c] for c in (0, 1, 1, 2, 2)]]
    five = f64(0, 1, 2, 3, 4, 5).view(1, 6)  # 60 % is 3, 80 % is 4
    assert scores(torch.zeros(1, 6), five).tolist() == [[RULE["table"][r][1] for r in (0, 0, 0, 1, 1, 2)]]
    same = torch.full((4, 3), 7.0)
    assert (scores(same, same) == RULE["table"][1][1]).all()


def test_scores_know_ranks_only():
    I_A, I_B = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(scores(I_A, I_B), scores(1000 * I_A, I_B))
    assert torch.equal(scores(I_A, I_B), scores(I_A, 1e-6 * I_B))
    order = torch.tensor([3, 1, 0, 4, 2])
    assert torch.equal(scores(I_A, I_B)[order], scores(I_A[order], I_B[order]))
    assert len(scores(I_A, I_B).unique()) > 4


# ---- the head


def test_weights_of_rows():
    s = f64([1, 0, 0.5], [3, 0, 0.5], [0, 0, 1]).view(3, 3)
    n = f64([10, 1, 4], [10, 0, 2], [1, 1, 2]).view(3, 3)
    assert head_weights("var", s, n).tolist() == [[0.25, 0, 0.25], [0.75, 0, 0.25], [0, 0, 0.5]]
    torch.testing.assert_close(head_weights("var_count", s, n)[:, 2], f64(2, 1, 2) / 5)
    torch.testing.assert_close(head_weights("inv_var", s, n)[:, 0], f64(0.75, 0.25, 0))
    for rule in ("var", "var_count", "inv_var"):
        w = head_weights(rule, s, n)
        torch.testing.assert_close(w.sum(0), f64(1, 0, 1))
        torch.testing.assert_close(head_weights(rule, 9 * s, n), w)  # features times three
        order = [2, 0, 1]
        torch.testing.assert_close(head_weights(rule, s[order], n[order]), w[order])


def replies_of(r, wire, round_=0, task=0):
    return [w for w in wire if (w.call, w.task, w.round) == ("local_update", task, round_)]


@pytest.mark.parametrize("features", ["frozen_raw", "frozen", "adapted"])
def test_variances_by_brute_force(rig, wire, features):
    """torch.var of each class's features; from the frozen or the client's own network, normalised or not."""
    r = rig(f"{FAST} {SMALL} --livar_features {features} --distribution_alpha 0.2", BASE).begin(0)
    r.round(0, 0).round(0, 1)
    for w in replies_of(r, wire, 1):
        indices = r.partition.indices(0, w.client)
        images = r.dataset.train_images[indices].float() / 255
        inputs = images if features == "frozen_raw" else (images - 0.5) / 0.5
        net = copy.deepcopy(r.worker.net).eval()
        for module in net.modules():
            module._forward_hooks.clear()
        if features == "adapted":
            for layer, name in r.model._own_names.items():
                linear = net.get_submodule(layer)
                linear.weight.data = linear.weight.data + w.reply[name["B"]] @ w.reply[name["A"]]
        with torch.no_grad():
            z = net(inputs, returnt="features").double()
        labels = r.dataset.train_labels[indices]
        for c in range(C):
            mine = z[labels == c]
            expected = mine.var(0).mean() if len(mine) > 1 else f64(0.0)[0]
            assert float(w.reply["variance"][c]) == pytest.approx(float(expected), rel=1e-4)
            assert w.reply["counts"][c] == len(mine)
    s = torch.stack([w.reply["variance"] for w in replies_of(r, wire, 0)])
    again = torch.stack([w.reply["variance"] for w in replies_of(r, wire, 1)])
    assert torch.equal(s, again) == (features != "adapted")


def reply(r, value, **more):
    """A reply whose tensors are all ``value`` (a number, or by name)."""
    sent = {n: torch.full_like(p, value) for n, p in r.model.trainable().items()}
    L = len(r.model._own_names)
    signals = {
        "importance.A": torch.ones(L),
        "importance.B": torch.ones(L),
        "variance": torch.ones(C),
        "counts": torch.ones(C),
    }
    return Message({**sent, **signals, "n_samples": 10, "loss": 0.0, **more})


def test_rows_of_the_head(rig):
    """By variance; a class that a client has seen once weighs nothing; one that nobody covers keeps its row."""
    r = rig(f"{FAST} {SMALL}", BASE).begin(0)
    before = r.model.head.weight.detach().clone()
    r.model.aggregate([reply(r, 1.0, variance=torch.tensor([1.0, 0])), reply(r, 3.0, variance=torch.tensor([3.0, 0]))])
    torch.testing.assert_close(r.model.head.weight[0].detach(), torch.full((128,), 2.5))
    assert torch.equal(r.model.head.weight[1], before[1])
    torch.testing.assert_close(r.model.head.bias[0].detach(), torch.tensor(2.5))
    assert torch.equal(r.model.net.classifier.weight[:2], r.model.head.weight)


# ---- LoRA


def options(name, *values):
    return [f"--livar_{name} {v}" for v in values]


ALL = [
    *options("mode", "released", "principled"),
    *options("broadcast", "factors", "product_svd", "product_fold"),
    *options("eval", "count_product", "omega_product", "broadcast"),
    *options("rule", "table", "uniform", "count"),
    *options("head", "var", "count", "uniform", "var_count", "inv_var"),
]


def random_reply(r, seed, n_samples=10):
    g = torch.Generator().manual_seed(seed)
    sent = {n: torch.randn(p.shape, generator=g) for n, p in r.model.trainable().items()}
    L = len(r.model._own_names)
    signals = {f"importance.{f}": torch.rand(L, generator=g) for f in "AB"}
    seen = {"variance": torch.rand(C, generator=g), "counts": torch.randint(2, 9, (C,), generator=g).float()}
    return Message({**sent, **signals, **seen, "n_samples": n_samples, "loss": 0.0})


def shown(r):
    W0 = r.model._own_pretrained
    return {n: r.model.net.get_submodule(n).weight.data.double() - W0[n].double() for n in W0}


def close(a, b, tolerance=1e-4):
    assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-6


@pytest.mark.parametrize("flags", ALL)
def test_equal_clients_and_one_client_are_fixed_points(rig, flags):
    for K in (1, 3):
        r = rig(f"{FAST} {SMALL} {flags}", BASE).begin(0)
        one = random_reply(r, 1)
        r.model.aggregate([one] * K)
        for layer, name in r.model._own_names.items():
            product = one[name["B"]].double() @ one[name["A"]].double()
            close(shown(r)[layer], product)
            A, B = r.model.factors()[layer]
            close(r.model.folded.get(layer, 0) + B.detach().double() @ A.detach().double(), product)
        torch.testing.assert_close(r.model.head.weight.detach(), one["head.weight"])
        torch.testing.assert_close(r.model.head.bias.detach(), one["head.bias"])


@pytest.mark.parametrize("flags", ALL)
def test_the_order_of_clients_does_not_matter(rig, flags):
    ends = []
    for order in ([0, 1, 2], [2, 0, 1]):
        r = rig(f"{FAST} {SMALL} {flags}", BASE).begin(0)
        replies = [random_reply(r, i, 10 + i) for i in range(3)]
        r.model.aggregate([replies[i] for i in order])
        products = {n: (B @ A).detach() for n, (A, B) in r.model.factors().items()}
        ends.append([shown(r), products, {"head": r.model.head.weight.detach()}])
    for a, b in zip(*ends, strict=True):
        for name in a:
            close(a[name], b[name])


@pytest.mark.parametrize("mode", ["released", "principled"])
def test_what_is_tested_and_what_is_sent(rig, mode):
    """Released: sent are the omega-weighted factors, tested the products by samples. Principled: one merge for both,
    sent as the nearest product of its rank."""
    r = rig(f"{FAST} {SMALL} --livar_mode {mode}", BASE).begin(0)
    replies = [random_reply(r, i, n) for i, n in enumerate((10, 20, 70))]
    q = scores(*(torch.stack([x[f"importance.{f}"] for x in replies]) for f in "AB"))
    omega = q / q.sum(0)
    torch.testing.assert_close(omega.sum(0), torch.ones(16, dtype=torch.float64))
    assert (omega - 1 / 3).abs().max() > 0.1
    r.model.aggregate(replies)
    for i, (layer, name) in enumerate(r.model._own_names.items()):
        A, B = r.model.factors()[layer]
        if mode == "released":
            close(B.detach(), sum(w * x[name["B"]] for w, x in zip(omega[:, i], replies, strict=True)))
            close(A.detach(), sum(w * x[name["A"]] for w, x in zip(omega[:, i], replies, strict=True)))
            by_samples = zip((0.1, 0.2, 0.7), replies, strict=True)
            close(shown(r)[layer], sum(w * x[name["B"]] @ x[name["A"]] for w, x in by_samples))
        else:
            whole = sum(w * x[name["B"]] @ x[name["A"]] for w, x in zip(omega[:, i], replies, strict=True))
            U, S, Vh = torch.linalg.svd(whole)
            close((B @ A).detach(), (U[:, :2] * S[:2]) @ Vh[:2])
            close(shown(r)[layer], whole)


def test_the_dense_update_is_exact(rig, wire):
    """product_fold: B starts at zero again, over weights that hold all of sum_k omega_k B_k A_k."""
    r = rig(
        f"{FAST} {SMALL} --livar_broadcast product_fold --livar_eval omega_product --num_comm_rounds 3", BASE
    ).begin(0)
    whole = dict.fromkeys(r.model._own_names, 0)
    for k in range(3):
        r.round(0, k)
        omega = r.model.omega([w.reply for w in replies_of(r, wire, k)], None)
        for i, (layer, name) in enumerate(r.model._own_names.items()):
            here = zip(omega[:, i], replies_of(r, wire, k), strict=True)
            whole[layer] = whole[layer] + sum(
                w * x.reply[name["B"]].double() @ x.reply[name["A"]].double() for w, x in here
            )
            close(shown(r)[layer], whole[layer])
            assert r.model.factors()[layer][1].abs().max() == 0
            if k < 2:  # what the next round trains over
                r.worker.enter_task(0)
                r.worker.load(r.model.broadcast())
                close(r.worker.net.get_submodule(layer).weight.data - r.model._own_pretrained[layer], whole[layer])
    down = [row["downlink_bytes"] for row in r.ledger.rows() if row["client"] == 0]
    dense = 4 * sum(t.numel() for t in r.model._own_pretrained.values())
    assert down[0] < dense < down[1] and abs(down[2] - down[1]) < 200
    r.end(0).begin(1)  # the next task starts from the pretrained network
    r.worker.enter_task(1)
    r.worker.load(r.model.broadcast())
    for layer, W in r.model._own_pretrained.items():
        assert torch.equal(r.worker.net.get_submodule(layer).weight, W)


def test_by_samples_it_is_federated_lora(rig):
    """Count-weighted factors and head, tested as sent: the baseline, to the bit in what is trained."""
    common = f"--fl --num_clients 3 --num_comm_rounds 2 --debug_mode 1 --lora_r 2 {SMALL} --stop_after 1"
    livar = rig(f"--model livar {common} --livar_rule count --livar_head count --livar_eval broadcast", BASE).run()
    targets = "--lora_targets attn.qkv attn.proj mlp.fc1 mlp.fc2"
    lora = rig(f"--model fedavg --tuning lora {targets} {common}", BASE).run()
    mine, theirs = livar.model.trainable(), lora.model.trainable()
    assert mine.keys() == theirs.keys() and len(mine) == 34
    for name, p in mine.items():
        assert torch.equal(p, theirs[name]), name
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    livar.model.eval(), lora.model.eval()
    torch.testing.assert_close(livar.model(x), lora.model(x), rtol=1e-4, atol=1e-4)


# ---- importances


def test_with_sgd_the_importance_is_the_squared_gradient(rig, monkeypatch):
    """G . (before - after) = eta |G|^2 for one step of plain SGD; summed over steps, and monotone."""
    r = rig(f"{FAST} --optimizer sgd --lr 0.1 --livar_mode released", BASE).begin(0)
    sums, seen = {}, {}
    plain = type(r.worker).on_step

    def on_step(self, client, before, after):
        old = client.state["importance"].clone()
        plain(self, client, before, after)
        assert (client.state["importance"] >= old).all()
        squares = [
            float(0.1 * after[name[f]].grad.double().square().sum()) for f in "AB" for name in self._own_names.values()
        ]
        sums[client.id] = [a + b for a, b in zip(sums.get(client.id, [0] * 32), squares, strict=True)]
        seen[client.id] = client.state["importance"].flatten().tolist()

    monkeypatch.setattr(type(r.worker), "on_step", on_step)
    r.round(0, 0).round(0, 1)
    assert len(sums) == 3
    for i, expected in sums.items():  # never reset: both rounds
        assert seen[i] == pytest.approx(expected, rel=1e-3, abs=1e-12)
        assert max(expected) > 0


@pytest.mark.parametrize("reset", ["never", "round"])
def test_importances_return_to_zero_as_told(rig, wire, reset):
    r = rig(f"{FAST} {SMALL} --livar_imp_reset {reset}", BASE)
    r.begin(0).round(0, 0).round(0, 1).end(0)
    first, second = ([w.reply["importance.B"] for w in replies_of(r, wire, k)] for k in range(2))
    grown = all((b > a).all() for a, b in zip(first, second, strict=True))
    assert grown == (reset == "never")
    r.begin(1).round(1, 0)  # a new task starts anew
    state = r.states[0]
    assert state["task"] == 1 and torch.equal(
        state["importance"][1], replies_of(r, wire, 0, 1)[0].reply["importance.B"]
    )


def test_only_the_signals_that_are_used_travel(rig, wire):
    r = rig(f"{FAST} {SMALL} --livar_rule uniform --livar_head uniform", BASE).begin(0).round(0, 0)
    assert wire[0].reply.keys() == r.model.trainable().keys() | {"n_samples", "loss"}
    wire.clear()
    r = rig(f"{FAST} {SMALL}", BASE).begin(0).round(0, 0)
    extra = {n: t.numel() for n, t in wire[0].reply.tensors().items() if n not in r.model.trainable()}
    assert extra == {"importance.A": 16, "importance.B": 16, "variance": C, "counts": C}


# ---- over tasks, and rules from a file


def test_the_mean_over_tasks_is_tested(rig, wire):
    r = rig(f"{FAST} {SMALL}", BASE)
    deltas = []
    for task in range(3):
        r.begin(task).round(task, 0).round(task, 1)
        now = [w.reply for w in replies_of(r, wire, 1, task)]
        n = [x["n_samples"] for x in now]
        deltas.append(
            {
                layer: sum(k * x[name["B"]].double() @ x[name["A"]].double() for k, x in zip(n, now, strict=True))
                / sum(n)
                for layer, name in r.model._own_names.items()
            }
        )
        for layer, delta in shown(r).items():
            close(delta, sum(d[layer] for d in deltas) / (task + 1), 1e-3)
        r.end(task)


def test_a_rule_from_a_file(rig, tmp_path):
    rule = {"quantiles_A": [0.1, 0.2], "quantiles_B": [0.3, 0.4], "table": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    file = tmp_path / "rule.json"
    file.write_text(json.dumps(rule))
    assert read_rule(str(file)) == rule
    r = rig(f"{FAST} {SMALL} --livar_rule fitted:{file}", BASE).begin(0)
    assert r.model._own_rule == rule
    q = scores(torch.arange(10.0).view(1, 10), torch.arange(10.0).view(1, 10), rule)[0].tolist()
    assert q == [1, 2, 3, 6, 9, 9, 9, 9, 9, 9]


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "not a rule"),
        ('{"quantiles_A": [0.1, 0.2], "quantiles_B": [0.3, 0.4], "table": [[1, 2, 3], [4, 5, 6]]}', "3 x 3"),
        ('{"quantiles_A": [0.4, 0.2], "quantiles_B": [0.3, 0.4], "table": [[1,1,1],[1,1,1],[1,1,1]]}', "smaller first"),
        ('{"quantiles_A": [0.1, 0.2], "quantiles_B": [0.3, 0.4], "table": [[1,1,1],[1,0,1],[1,1,1]]}', "above zero"),
        ('{"table": 3}', "KeyError"),
    ],
)
def test_what_is_no_rule(tmp_path, text, match):
    (tmp_path / "rule.json").write_text(text)
    with pytest.raises(UserError, match=match):
        read_rule(str(tmp_path / "rule.json"))


@pytest.mark.parametrize("rule", ["shap", "fitted", "fitted:", "table:x", "fitted:/nowhere/rule.json"])
def test_wrong_rules(rig, rule):
    with pytest.raises(UserError, match="--livar_rule"):
        rig(f"{FAST} --livar_rule {rule}", BASE)


def test_flags_win_over_the_mode(rig):
    r = rig(f"{FAST} --livar_mode principled --livar_imp_reset never", BASE)
    assert (r.args.livar_imp_reset, r.args.livar_eval, r.args.livar_features) == ("never", "omega_product", "adapted")
