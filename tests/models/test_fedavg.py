import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from datasets.utils.partition import Partition
from federated.engines.serial import SerialEngine
from federated.message import Reply
from federated.simulator import participants
from utils.conf import make_generator

FAST = "--fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 16 --debug_mode 1"


def replies_of(wire, task, round_):
    return [w.reply for w in wire if (w.call, w.task, w.round) == ("local_update", task, round_)]


def brute_force(replies, avg_type):
    """Mean of the replies' tensors, entry by entry, in Python's own arithmetic."""
    sizes = [r["n_samples"] if avg_type == "weighted" else 1 for r in replies]
    mean = {}
    for name, like in replies[0].tensors().items():
        columns = zip(*(r[name].flatten().tolist() for r in replies), strict=True)
        values = [sum(n * v for n, v in zip(sizes, column, strict=True)) / sum(sizes) for column in columns]
        mean[name] = torch.tensor(values, dtype=torch.float64).view(like.shape).to(like.dtype)
    return mean


# ---- the mean


@pytest.mark.parametrize("avg_type", ["weighted", "uniform"])
@pytest.mark.parametrize("tuning", ["full", "head"])
def test_the_server_takes_the_mean(rig, wire, avg_type, tuning):
    r = rig(f"--model fedavg {FAST} --tuning {tuning} --avg_type {avg_type}", rig.MLP).begin(0)
    for round_ in range(2):
        r.round(0, round_)
        replies = replies_of(wire, 0, round_)
        assert len({reply["n_samples"] for reply in replies}) > 1
        mean = brute_force(replies, avg_type)
        mine = r.model.trainable()
        assert mine.keys() == mean.keys()
        for name, tensor in mean.items():
            torch.testing.assert_close(mine[name].data, tensor, rtol=0, atol=1e-7)
            assert not torch.equal(mine[name].data, replies[0][name])
    if tuning == "head":
        torch.testing.assert_close(r.model.net.classifier.weight[:2].data, mean["head.weight"], rtol=0, atol=1e-7)
    loss = sum(w * reply["loss"] for w, reply in zip(r.model.client_weights(replies), replies, strict=True))
    assert r.model.last_loss == pytest.approx(loss)


def test_weights_of_the_mean(rig):
    model = rig(f"--model fedavg {FAST}", rig.MLP).model
    replies = [Reply({"n_samples": n}, i) for i, n in enumerate((1, 2, 5))]
    assert model.client_weights(replies) == [1 / 8, 2 / 8, 5 / 8]
    model.args.avg_type = "uniform"
    assert model.client_weights(replies) == [1 / 3] * 3


# ---- what is trained and sent


@pytest.mark.parametrize("tuning", ["full", "head", "lora"])
def test_what_changes_and_what_is_sent(rig, wire, tuning):
    r = rig(f"--model fedavg {FAST} --tuning {tuning}")
    r.begin(0).round(0, 0).end(0)
    before = r.weights
    r.begin(1).round(1, 0)
    after = r.weights
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    head = {"classifier.weight", "classifier.bias"}
    if tuning == "full":
        assert moved == set(before)
    else:
        assert moved == head
        for name in head:
            assert torch.equal(before[name][:2], after[name][:2]) and torch.equal(before[name][4:], after[name][4:])
            assert (before[name][2:4] != after[name][2:4]).any()
    rows = {"head.weight": (2, 128), "head.bias": (2,)}
    layer = "lora.layers.blocks-{}-attn-qkv.{}.{}"
    factors = {layer.format(i, s, f): shape for i in range(4) for s in "qkv" for f, shape in
               (("A", (4, 128)), ("B", (128, 4)))}  # fmt: skip
    expected = {
        "full": {n: tuple(t.shape) for n, t in before.items()},
        "head": rows,
        "lora": {**factors, **rows},
    }[tuning]
    for w in wire:
        if w.call == "local_update":
            sent = {n: tuple(t.shape) for n, t in w.reply.tensors().items()}
            received = {n: tuple(t.shape) for n, t in w.message.tensors().items()}
            assert sent == received == expected
            assert w.reply.numbers().keys() == {"n_samples", "loss"}
            assert w.reply["n_samples"] == r.partition.sizes(w.task)[w.client]
    frozen = [n for n, p in r.worker.net.named_parameters() if tuning != "full" and p.grad is not None]
    assert not frozen


@pytest.mark.parametrize("ce_classes", ["current", "seen"])
def test_columns_of_the_softmax(rig, ce_classes):
    r = rig(f"--model fedavg {FAST} --ce_classes {ce_classes}", rig.MLP).begin(0).end(0).begin(1)
    x, y = torch.randn(5, 1, 28, 28), torch.tensor([2, 3, 2, 2, 3])
    first = 0 if ce_classes == "seen" else 2
    loss = r.model.local_loss(x, y, None)
    log_p = r.model.net(x)[:, first:4].log_softmax(1)
    torch.testing.assert_close(loss, -log_p[range(5), y - first])
    loss.mean().backward()
    rows = r.model.net.classifier.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [first <= c < 4 for c in range(10)]


def test_statistics_of_batch_norm_are_averaged(rig, wire):
    r = rig(
        f"--model fedavg {FAST} --num_clients 2 --backbone resnet18 --batch_size 4", "--dataset seq-digits --device cpu"
    )
    r.worker.get_debug_iters = lambda: 1
    r.begin(0)
    before = {n: b.clone() for n, b in r.model.net.named_buffers()}
    r.round(0, 0)
    replies = replies_of(wire, 0, 0)
    total = sum(reply["n_samples"] for reply in replies)
    assert len([n for n in before if "running_" in n]) == 40
    for name, buffer in r.model.net.named_buffers():
        if "running_" not in name:
            assert torch.equal(buffer, before[name])  # counters of batches stay where they are
            continue
        mean = sum(reply["n_samples"] / total * reply[name].double() for reply in replies)
        torch.testing.assert_close(buffer, mean.float(), rtol=0, atol=1e-7)
        assert not torch.equal(buffer, before[name]) and not torch.equal(replies[0][name], replies[1][name])


def test_mean_of_factors_is_not_the_mean_of_products(rig, wire):
    distance = {}
    for model in ("fedavg --tuning lora", "ffa_lora"):
        wire.clear()
        r = rig(f"--model {model} {FAST} --lr 0.3").begin(0).round(0, 0).round(0, 1)
        replies = replies_of(wire, 0, 1)
        total = sum(reply["n_samples"] for reply in replies)
        far = []
        for layer, s, A, B in r.model.lora:
            name = f"lora.layers.{layer.replace('.', '-')}.{s}."
            products = sum(
                reply["n_samples"] / total * (reply[f"{name}B"].double() @ reply.get(f"{name}A", A).detach().double())
                for reply in replies
            )
            far.append(float((B.detach().double() @ A.detach().double() - products).norm() / products.norm()))
        distance[model] = far
    assert max(distance["ffa_lora"]) < 1e-6
    assert min(distance["fedavg --tuning lora"]) > 1e-4


def test_ffa_lora_draws_A_once_and_sends_it_once(rig, wire):
    r = rig(f"--model ffa_lora {FAST} --stop_after 2")
    A = [a.clone() for _, _, a, _ in r.model.lora]
    r.run()
    assert all(torch.equal(a, b) for a, (_, _, b, _) in zip(A, r.model.lora, strict=True))
    size = 4 * sum(a.numel() for a in A)
    first, *later = [row["downlink_bytes"] for row in r.ledger.rows() if row["client"] == 1]
    assert len(set(later)) == 1 and 0 < first - later[0] - size < 4000  # the rest are names in the header
    assert all(".A" not in name for w in wire for name in w.reply.tensors())


# ---- one client


@pytest.mark.parametrize("flags", ["--optimizer sgd --lr 0.1 --optim_mom 0.9", "--optimizer adam --lr 0.001"])
def test_one_client_is_plain_training(rig, flags):
    r = rig(
        f"--model fedavg --fl --num_clients 1 --partition_mode iid --num_comm_rounds 2 --n_epochs 2 {flags}", rig.MLP
    )
    net = copy.deepcopy(r.model.net)
    r.run(stop_after=2)
    for task in range(2):
        for round_ in range(2):
            opt = (
                torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
                if "sgd" in flags
                else torch.optim.Adam(net.parameters(), lr=0.001)
            )
            generator = make_generator(0, "client", task, round_, 0, "local_update")
            indices = r.dataset.task_indices(task)
            for _ in range(2):
                for batch in torch.randperm(len(indices), generator=generator).split(16):
                    x = r.dataset.train_images[indices[batch]].float() / 255
                    y = r.dataset.train_labels[indices[batch]]
                    loss = F.cross_entropy(net((x - 0.5) / 0.5)[:, 2 * task : 2 * task + 2], y - 2 * task)
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
    for mine, theirs in zip(r.model.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ---- who takes part, and in which order


def test_participation(rig, wire):
    r = rig(f"--model fedavg {FAST} --num_clients 6 --participation_rate 0.5 --stop_after 2", rig.MLP).run()
    drawn = {}
    for w in wire:
        drawn.setdefault((w.task, w.round), []).append(w.client)
    assert len(drawn) == 4 and all(len(set(ids)) == 3 for ids in drawn.values())
    assert len({tuple(ids) for ids in drawn.values()}) > 1
    for (task, round_), ids in drawn.items():
        assert sorted(ids) == participants(r.args, list(range(6)), task, round_)
    last = brute_force(replies_of(wire, 1, 1), "weighted")
    for name, p in r.model.trainable().items():
        torch.testing.assert_close(p.data, last[name], rtol=0, atol=1e-7)
    args = SimpleNamespace(seed=3, participation_rate=0.01)
    assert len(participants(args, [4, 9], 0, 0)) == 1
    args.participation_rate = 1.0
    assert participants(args, [4, 9], 0, 0) == [4, 9]
    args.participation_rate = 0.5
    counts = torch.zeros(4)
    for round_ in range(400):
        counts[participants(args, [0, 1, 2, 3], 0, round_)] += 1
    assert counts.sum() == 800 and (counts - 200).abs().max() < 50  # five standard deviations


@pytest.mark.parametrize("model", ["fedavg --tuning full", "fedavg --tuning lora", "dolfin", "er"])
def test_the_order_of_the_clients_is_irrelevant(rig, monkeypatch, model):
    """Any order of work gives the same bits, as long as the engine hands replies over in client order."""
    flags = f"--model {model} {FAST} --stop_after 1"
    plain = rig(flags).run()
    normal = SerialEngine.run

    def backwards(self, call, message, ids, task, round_):
        done = [(i, reply) for i, reply in normal(self, call, message, list(ids)[::-1], task, round_)]
        yield from sorted(done, key=lambda pair: pair[0])

    monkeypatch.setattr(SerialEngine, "run", backwards)
    turned = rig(flags).run()
    assert all(torch.equal(a, b) for a, b in zip(plain.weights.values(), turned.weights.values(), strict=True))


def test_a_client_learns_from_its_own_samples(rig, wire):
    """Other clients' data changes the others' replies, never its own."""
    flags = f"--model fedavg {FAST}"
    rig(flags, rig.MLP).begin(0).round(0, 0)
    first = replies_of(wire, 0, 0)
    wire.clear()
    r = rig(flags, rig.MLP)
    r.partition = Partition([[c if i == 1 else c[:7] for i, c in enumerate(r.partition.tasks[0])]])
    r.begin(0).round(0, 0)
    second = replies_of(wire, 0, 0)
    same = [all(torch.equal(a[n], b[n]) for n in a.tensors()) for a, b in zip(first, second, strict=True)]
    assert same == [False, True, False]
