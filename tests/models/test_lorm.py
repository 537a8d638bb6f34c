"""LoRM against its equations: materialised weights, inputs caught by hooks, pseudo-inverses in float64."""

import copy
import shlex

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from federated.client import Client
from models.utils.merging import regression_merge
from tests.helpers import inputs_of
from utils.args import parse_args
from utils.errors import UserError

FAST = "--model lorm --fl --num_clients 3 --num_comm_rounds 3 --n_epochs 1 --batch_size 16 --debug_mode 1 --lora_r 2"
SMALL = "--optimizer adam --lr 0.002"
SHAPES = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (128, 32), "mlp.fc2": (32, 128)}
LAYERS = {f"blocks.{i}.{n}": s for i in range(3) for n, s in SHAPES.items()}
BASE = "--dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu"
pytestmark = pytest.mark.usefixtures("nano")


def local_calls(wire, task, round_):
    return [w for w in wire if (w.call, w.task, w.round) == ("local_update", task, round_)]


def parameter(layer, factor):
    return f"lora.layers.{layer.replace('.', '-')}.all.{factor}"


def pairs_of(w):
    """(A, B) of every layer as a client has them after training."""
    pairs = {}
    for layer in LAYERS:
        pairs[layer] = tuple(
            w.reply[parameter(layer, f)].double()
            if f == w.message["factor"]
            else w.message[f"{f}{w.task}.{layer}"].double()
            for f in "AB"
        )
    return pairs


def with_update(net, deltas):
    """A copy of the network with W0 + delta and nothing grafted on it."""
    net = copy.deepcopy(net)
    for layer, delta in deltas.items():
        linear = net.get_submodule(layer)
        linear._forward_hooks.clear()
        linear.weight.data = (linear.weight.data.double() + delta).float()
    return net


def gram(X, alpha):
    G = X.T @ X
    return alpha * G + (1 - alpha) * torch.diag(G.diagonal())


@pytest.mark.parametrize(
    "flags, body, head, model",
    [
        ("", 0.0, 0.5, "mean"),
        ("--alpha_regmean_backbone 0.5 --alpha_regmean_head 0", 0.5, 0.0, "mean"),
        ("--alpha_regmean_backbone -1 --alpha_regmean_head 0.9 --lorm_gram_model local", 0.9, 0.9, "local"),
    ],
)
def test_the_run_equals_its_equations(rig, wire, flags, body, head, model):
    """Two tasks of three rounds: every merge, the head, and what is tested between rounds and after tasks."""
    r = rig(f"{FAST} {SMALL} {flags}", BASE)
    pretrained = copy.deepcopy(r.worker.net)
    W0 = {n: pretrained.get_submodule(n).weight.data.double() for n in LAYERS}

    def tested():
        return {n: r.model.net.get_submodule(n).weight.data.double() - W0[n] for n in LAYERS}

    def check(found, wanted, tolerance=1e-4):
        assert (found - wanted).norm() <= tolerance * wanted.norm() + 1e-7

    def weights_of_grams(task, pairs):
        here = {n: B @ A for n, (A, B) in pairs.items()}
        if task and model == "mean":
            return {n: (sum(d[n] for d in past) + here[n]) / (task + 1) for n in LAYERS}
        return here

    past, past_grams = [], []
    for task in range(2):
        r.begin(task)
        for k in range(3):
            before = {n: p.detach().clone() for n, p in r.model.head.named_parameters()}
            r.round(task, k)
            calls = local_calls(wire, task, k)
            factor = calls[0].message["factor"]
            grams, weights = [], []
            for w in calls:
                client = Client(w.client, r.dataset, r.partition.indices(task, w.client), {}, r.args, task, k, "x")
                X = inputs_of(with_update(pretrained, weights_of_grams(task, pairs_of(w))), client.stat_loader())
                grams.append({n: gram(x, head if n == "head" else body) for n, x in X.items()})
                weights.append(pairs_of(w))
            for layer, pair in r.model.factors().items():
                G, (A, _) = [g[layer] for g in grams], weights[0][layer]
                if factor == "B":
                    num = sum(p[layer][1] @ A @ g for p, g in zip(weights, G, strict=True)) @ A.T
                    check(pair[1].double(), num @ torch.linalg.pinv(A @ sum(G) @ A.T))
                    assert torch.equal(pair[0].double(), A)
                else:
                    num = sum(p[layer][0] @ g for p, g in zip(weights, G, strict=True))
                    check(pair[0].double(), num @ torch.linalg.pinv(sum(G), rtol=1e-12))
            G = [g["head"] for g in grams]
            num = sum(w.reply["head.weight"].double() @ g for w, g in zip(calls, G, strict=True))
            check(r.model.head.weight.double(), num @ torch.linalg.inv(sum(G)))
            n = [w.reply["n_samples"] for w in calls]
            bias = sum(k * w.reply["head.bias"].double() for k, w in zip(n, calls, strict=True)) / sum(n)
            check(r.model.head.bias.double(), bias)
            assert not torch.equal(r.model.head.weight, before["weight"])
            now = {n: (B @ A).detach().double() for n, (A, B) in r.model.factors().items()}
            for layer, delta in tested().items():
                check(delta, (sum((d[layer] for d in past), 0) + now[layer]) / (task + 1))
        merged = {n: (A.detach().double(), B.detach().double()) for n, (A, B) in r.model.factors().items()}
        r.end(task)
        G = 0
        for i in range(3):
            client = Client(i, r.dataset, r.partition.indices(task, i), {}, r.args, task, -1, "x")
            X = inputs_of(with_update(pretrained, weights_of_grams(task, merged)), client.stat_loader())
            own = {n: gram(x, body) for n, x in X.items() if n != "head"}
            G = own if not G else {n: G[n] + own[n] for n in own}
        past.append({n: B @ A for n, (A, B) in merged.items()})
        past_grams.append(G)
        for layer, delta in tested().items():
            if task == 0:
                check(delta, past[0][layer])
            else:
                num = sum(d[layer] @ g[layer] for d, g in zip(past, past_grams, strict=True))
                check(delta, num @ torch.linalg.pinv(past_grams[0][layer] + past_grams[1][layer], rtol=1e-13), 1e-3)


def test_what_is_trained(rig, wire):
    """B A B in every task; a frozen factor does not move; training starts from the pretrained weights each time."""
    r = rig(f"{FAST} {SMALL}", BASE)
    W0 = {n: r.worker.net.get_submodule(n).weight.data.clone() for n in LAYERS}
    for task in range(2):
        r.begin(task)
        first = {n: (A.detach().clone(), B.detach().clone()) for n, (A, B) in r.model.factors().items()}
        assert all(B.abs().max() == 0 and 0 < A.abs().max() <= A.shape[1] ** -0.5 for A, B in first.values())
        for k in range(3):
            held = {n: {"A": A.detach().clone(), "B": B.detach().clone()} for n, (A, B) in r.model.factors().items()}
            r.round(task, k)
            factor, other = ("B", "A") if k % 2 == 0 else ("A", "B")
            for w in local_calls(wire, task, k):
                assert w.message["factor"] == factor
                assert parameter("blocks.0.attn.qkv", other) not in w.reply
                for layer in LAYERS:
                    for f in "AB":  # all start from the same
                        assert torch.equal(w.message[f"{f}{task}.{layer}"], held[layer][f])
                    assert not torch.equal(w.reply[parameter(layer, factor)], held[layer][factor])
            for layer, (A, B) in r.model.factors().items():
                now = {"A": A, "B": B}
                assert torch.equal(now[other], held[layer][other]) and not torch.equal(now[factor], held[layer][factor])
            for layer in LAYERS:  # the server's storage was not written to, and clients train over W0
                assert torch.equal(r.worker.net.get_submodule(layer).weight, W0[layer])
                assert torch.equal(r.model._own_pretrained[layer], W0[layer])
        r.end(task)
    assert r.model.factors()["blocks.0.attn.qkv"][0].shape == (2, 32)


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_one_factor_alone(rig, wire, matrix):
    r = rig(f"{FAST} {SMALL} --train_matrix {matrix} --num_comm_rounds 2", BASE).begin(0)
    start = {n: (A.detach().clone(), B.detach().clone()) for n, (A, B) in r.model.factors().items()}
    for k in range(2):
        r.round(0, k)
    assert {w.message["factor"] for w in wire} == {matrix}
    for layer, (A, B) in r.model.factors().items():
        assert (B @ A).abs().max() > 0
        fixed = 1 if matrix == "A" else 0
        assert torch.equal((A, B)[fixed], start[layer][fixed]) and start[layer][fixed].abs().max() > 0


def test_the_other_rows_of_the_head_stay(rig):
    """Bit for bit, under weight decay too."""
    r = rig(f"{FAST} --optimizer adamw --lr 0.01 --optim_wd 0.5", BASE)
    r.begin(0).round(0, 0).end(0)
    before = r.weights
    r.begin(1).round(1, 0).round(1, 1).end(1)
    for name in ("classifier.weight", "classifier.bias"):
        keep = [0, 1, *range(4, 10)]
        assert torch.equal(before[name][keep], r.weights[name][keep])
        assert not torch.equal(before[name][2:4], r.weights[name][2:4])


# ---- what crosses the wire


def floats(ledger_bytes, message_or_reply):
    return ledger_bytes, sum(t.numel() for t in message_or_reply.tensors().values())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_only_the_table_of_the_wire(rig, wire, alpha):
    """Up: the trained factor, the head, its Gram and the body's (r x r, or its diagonal). Down: what has changed."""
    r_, C, d = 2, 2, 32
    size = {"A": sum(r_ * i for _, i in LAYERS.values()), "B": sum(o * r_ for o, _ in LAYERS.values())}
    head, of_head = C * (d + 1), d * (d + 1) // 2
    body = {
        "B": len(LAYERS) * r_ * (r_ + 1) // 2,
        "A": sum(i if alpha == 0 else i * (i + 1) // 2 for _, i in LAYERS.values()),
    }
    r = rig(f"{FAST} {SMALL} --alpha_regmean_backbone {alpha}", BASE)
    for task in range(2):
        r.begin(task)
        for k in range(3):
            r.round(task, k)
        r.end(task)
    down = {(0): size["A"] + size["B"] + head, (1): size["B"] + head, (2): size["A"] + head, (-1): size["B"]}
    for row in r.ledger.rows():
        k = row["round"]
        (w,) = [
            x
            for x in wire
            if (x.task, x.round, x.client, x.call) == tuple(row[c] for c in ("task", "round", "client", "call"))
        ]
        up = body["A"] if k < 0 else size["BAB"[k]] + head + of_head + body["BAB"[k]]
        assert sum(t.numel() for t in w.reply.tensors().values()) == up
        header = 3000 if k < 0 or k % 2 else 4500  # names, shapes and offsets
        assert 4 * up < row["uplink_bytes"] < 4 * up + header + 2000
        assert 4 * down[k] < row["downlink_bytes"] < 4 * down[k] + 2 * header + 2000, (task, k)
        assert w.reply.numbers().keys() <= {"n_samples", "loss"}


def test_a_client_that_was_away_gets_what_it_has_missed(rig):
    r = rig(f"{FAST} {SMALL}", BASE).begin(0)
    r.round(0, 0, ids=[0, 1]).round(0, 1, ids=[0, 2])
    down = {(w["round"], w["client"]): w["downlink_bytes"] for w in r.ledger.rows()}
    assert down[0, 0] == down[0, 1] > down[1, 0]
    assert abs(down[1, 2] - down[0, 0]) < 100  # both factors: nothing before
    r.round(0, 2, ids=[0, 1])
    assert r.ledger.rows()[-1]["client"] == 1  # has the first A, misses the second A and the merged B
    assert abs(r.ledger.rows()[-1]["downlink_bytes"] - down[0, 0]) < 100


class Shapes(TorchDispatchMode):
    """Every shape that any operation produces."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.seen.add(tuple(t.shape[-2:]))
        return out


@pytest.mark.parametrize("alpha, dense", [(0.0, False), (0.5, True)])
def test_no_square_matrix_with_diagonal_grams(rig, alpha, dense):
    """128 x 128 is the Gram of fc2's inputs; nothing else has that shape."""
    r = rig(f"{FAST} {SMALL} --num_comm_rounds 2 --alpha_regmean_backbone {alpha}", BASE)
    with Shapes() as shapes:
        for task in range(2):
            r.begin(task).round(task, 0).round(task, 1).end(task)
    assert ((128, 128) in shapes.seen) == dense
    assert (32, 128) in shapes.seen


# ---- over tasks


def test_the_merge_of_tasks_does_not_depend_on_their_order(rig):
    r = rig(f"{FAST} {SMALL} --num_comm_rounds 2", BASE)
    for task in range(3):
        r.begin(task).round(task, 0).round(task, 1).end(task)
    model = r.model
    merged = model.merged_tasks()
    model.past, model.past_grams = model.past[::-1], model.past_grams[::-1]
    for layer, delta in model.merged_tasks().items():
        torch.testing.assert_close(delta, merged[layer], rtol=1e-9, atol=1e-12)
        assert delta.abs().max() > 0
    dense = [{n: torch.diag(g) for n, g in grams.items()} for grams in model.past_grams]
    for layer in list(LAYERS)[:4]:
        deltas = [model.product([p[layer][0]], [p[layer][1]]) for p in model.past]
        torch.testing.assert_close(
            regression_merge(deltas, [g[layer] for g in dense]), merged[layer], rtol=1e-7, atol=1e-10
        )
    model.past, model.past_grams = [model.past[0]] * 3, model.past_grams
    for layer, delta in model.merged_tasks().items():
        A, B = model.past[0][layer]
        torch.testing.assert_close(delta, B.double() @ A.double(), rtol=1e-12, atol=1e-15)


def test_the_mean_over_tasks_is_an_option(rig):
    r = rig(f"{FAST} {SMALL} --num_comm_rounds 2 --lorm_task_merge mean", BASE)
    for task in range(2):
        r.begin(task).round(task, 0).round(task, 1).end(task)
    assert not any(row["call"] == "task_grams" for row in r.ledger.rows())
    for layer, delta in r.model.merged_tasks().items():
        mean = sum(B.double() @ A.double() for A, B in (p[layer] for p in r.model.past)) / 2
        torch.testing.assert_close(delta, mean, rtol=1e-12, atol=1e-15)


def test_without_regression_factors_are_averaged(rig, wire):
    r = rig(f"{FAST} {SMALL} --regmean_all 0", BASE).begin(0).round(0, 0)
    calls = local_calls(wire, 0, 0)
    n = [w.reply["n_samples"] for w in calls]
    for layer, (_, B) in r.model.factors().items():
        mean = sum(k * w.reply[parameter(layer, "B")].double() for k, w in zip(n, calls, strict=True)) / sum(n)
        torch.testing.assert_close(B.detach(), mean.float())
    assert not any(name.startswith("gram.blocks") for name in calls[0].reply)


def test_rates_of_the_factors(rig):
    r = rig(f"{FAST} --optimizer adamw --lr 0.1 --lr_A 0.01 --lr_B -1", BASE).begin(0)
    groups = r.model.get_optimizer().param_groups
    assert [g["lr"] for g in groups] == [0.1] and len(groups[0]["params"]) == len(LAYERS) + 2
    r.model.train_factor("A")
    groups = r.model.get_optimizer().param_groups
    assert [(g["lr"], len(g["params"])) for g in groups] == [(0.01, len(LAYERS)), (0.1, 2)]


# ---- command lines

FED_MAMMOTH = (
    "--model=lorm --dataset=seq-cifar100 --network=vit --batch_size=16 --lr={lr} --distribution_alpha={beta} "
    "--num_epochs=5 --num_comm_rounds=5 --num_clients=10 --wd_reg=0 --lora_head=False --regmean_all=True "
    "--gram_dtype=32 --reg_dtype_64=True --alpha_regmean_head=0.5 --alpha_regmean_backbone=0 --train_matrix=alt "
    "--lr_B=-1 --lr_A=-1 --r={r}"
)


@pytest.mark.parametrize("beta, lr, r", [(0.5, 0.003, 1), (0.1, 0.0003, 16), (0.05, 0.0005, 16)])
def test_fed_mammoths_command_lines_are_the_published_settings(beta, lr, r):
    theirs = parse_args(shlex.split(FED_MAMMOTH.format(beta=beta, lr=lr, r=r)))
    ours = parse_args(f"--model lorm --dataset seq-cifar100 --fl --model_config paper-beta{beta}".split())
    assert theirs.fl and (theirs.lr, theirs.lora_r, theirs.optim_wd, theirs.n_epochs) == (lr, r, 0, 5)
    skip = {"asked", "given", "command", "model_config"}
    assert {k: v for k, v in vars(theirs).items() if k not in skip} == {
        k: v for k, v in vars(ours).items() if k not in skip
    }
    assert ours.lora_targets == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"] and ours.optimizer == "adamw"


def test_settings_that_were_not_published():
    with pytest.raises(UserError, match="no published settings for 'seq-cifar100'.*seq-eurosat-rgb"):
        parse_args(["--model", "lorm", "--dataset", "seq-cifar100", "--fl", "--model_config", "paper-beta1.0"])
    with pytest.raises(UserError, match="head as a whole"):
        import main

        main.build(parse_args(shlex.split(f"{BASE} {FAST} --lora_head True")))
