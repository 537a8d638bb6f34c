"""PILoRA: distances, losses and the re-weighting against loops, pairs of tasks against their sum, and the wire."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from backbones.utils.client_batch import client_batch
from federated.client import Client
from federated.message import Message
from models.pilora import ClassPrototypes, reweight
from tests.federated.test_batched_engine import far, state
from utils.args import model_config, parse_args
from utils.errors import UserError

D, CLASSES, TOTAL, R = 128, 2, 10, 4  # of the pocket transformer, of a task of seq-digits, of all, the rank
LAYER = "blocks.0.attn.qkv"
FLAGS = (
    "--model pilora --fl --num_clients 2 --num_comm_rounds 2 --n_epochs 1 --batch_size 8 --debug_mode 1 "
    "--partition_mode iid --lr 0.05 --lr_back 0.01 --pilora_l1 0"
)
PRETRAINED = "--dataset seq-digits --backbone vit-pocket --device cpu"


def images(r, task=0, n=7):
    indices = r.dataset.task_indices(task, train=False)[:n]
    return next(iter(r.dataset.loader(indices, task, n, train=False, device="cpu")))[:2]


def client_of(r, task, i=0, round_=0):
    return Client(i, r.dataset, r.partition.indices(task, i), {}, r.args, task, round_, "x")


def after_a_task(rig, more="", base=PRETRAINED):
    """An experiment at the first round of task 1, with the worker there too."""
    r = rig(f"{FLAGS} {more}", base).begin(0).round(0, 0).end(0).begin(1)
    r.worker.enter_task(1)
    r.worker.load(r.model.broadcast())
    return r


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- distances and losses


@pytest.mark.parametrize("root", [0, 1])
def test_the_loss_is_its_equations(rig, root):
    """Sample by sample, over the prototypes of all classes, those of earlier and later tasks too."""
    r = after_a_task(rig, f"--pilora_sqrt {root} --temp 0.5 --pilora_pull 0.3")
    worker, (x, y) = r.worker, images(r, 1)
    worker.head.weight.data += random(CLASSES, D)
    features = worker.features(x).detach()
    prototypes = torch.cat([worker.head.everyone[:2], worker.head.weight.detach(), worker.head.everyone[4:]])
    got = worker.local_loss(x, y, None)
    for b in range(len(x)):
        dist = torch.stack([sum((features[b, j] - p[j]) ** 2 for j in range(D)) / D for p in prototypes])
        dist = dist.sqrt() if root else dist
        expected = -torch.log(torch.exp(-dist[y[b]] / 0.5) / torch.exp(-dist / 0.5).sum()) + 0.3 * dist[y[b]]
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(worker(x)[b], -dist, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(worker.task_logits(x)[b], -dist[2:4], rtol=1e-4, atol=1e-5)
    worker.zero_grad()
    got.sum().backward()
    moved = {n for n, p in worker.named_parameters() if p.grad is not None and p.grad.any()}
    # B is zero at first, and with it the gradient of A
    assert moved == {"head.weight"} | {f"lora.layers.blocks-0-attn-qkv.{s}.B" for s in "qv"}


def test_a_root_of_zero_has_a_gradient(rig):
    r = rig(f"{FLAGS} --pilora_sqrt 1").begin(0)
    x, y = images(r, n=1)
    r.model.head.weight.data[int(y)] = r.model.features(x)[0].detach()
    r.model.local_loss(x, y, None).sum().backward()
    assert all(p.grad.isfinite().all() for p in r.model.trainable().values())


def test_the_server_predicts_the_nearest_prototype(rig):
    r = after_a_task(rig)
    x, _ = images(r, 1)
    f, everyone = r.model.features(x), r.model.head.everyone
    nearest = [min(range(4), key=lambda c: float((one - everyone[c]).norm().detach())) for one in f]
    assert r.model(x)[:, :4].argmax(1).tolist() == nearest
    assert r.model(x).shape == (7, TOTAL)
    assert rig(FLAGS).model(x).isfinite().all()  # before any task has begun


def test_stacked_prototypes():
    """Two clients' prototypes in one batch: each sample meets its client's, and all meet the frozen ones."""
    head = ClassPrototypes(6, 5, torch.zeros(1))
    head.take(None, 2, 4)
    mine, f = random(2, 2, 5), random(4, 5, seed=1)
    head._parameters["weight"] = mine
    with client_batch([3, 1]):
        got = head(f)
    for b, client in enumerate([0, 0, 0, 1]):
        whole = torch.cat([head.everyone[:2], mine[client], head.everyone[4:]])
        torch.testing.assert_close(got[b], (f[b] - whole).square().mean(1))


def test_the_penalty(rig):
    """Overlap with the A of both earlier tasks, and absolute values, for q and v by themselves."""
    r = after_a_task(rig, "--pilora_ortho 0.7 --pilora_l1 0.03").round(1, 0).end(1).begin(2)
    r.worker.enter_task(2)
    r.worker.load(r.model.broadcast())
    trained, expected = r.worker.trainable(), 0.0
    assert len(r.worker.folds) == 2
    for s in "qv":
        A = trained[f"lora.layers.blocks-0-attn-qkv.{s}.A"].detach()
        for pair in r.worker.folds:
            old = pair[f"lora.layers.blocks-0-attn-qkv.{s}.A"]
            assert not torch.equal(old, A)
            expected += 0.7 * sum(abs(float(a @ o)) for a in A for o in old)
        expected += 0.03 * sum(abs(v) for v in A.flatten().tolist())
    assert float(r.worker.local_penalty(trained, None).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_penalty_does_what_it_is_for(rig):
    """A new A turns away from the earlier ones."""
    overlap = {}
    for weight in (0, 0.5):
        r = after_a_task(rig, f"--pilora_ortho {weight}").round(1, 0).round(1, 1)
        A = {n: p for n, p in r.model.trainable().items() if n.endswith(".A")}
        overlap[weight] = sum(float((a.detach() @ r.model.folds[0][n].T).abs().sum()) for n, a in A.items())
    assert overlap[0.5] < 0.7 * overlap[0]


# ---- the re-weighting


def by_hand(prototypes, features):
    s = [sum(math.dist(p, f) for f in features) for p in prototypes]
    u = [1 / value for value in s]
    u = [(value - min(u)) / (max(u) - min(u)) for value in u]
    e = [math.exp(5 * value) for value in u]
    return [value / sum(e) for value in e]


def test_reweighting_by_hand():
    P, Z = random(4, 3).double(), random(2, 3, seed=1).double()
    w = reweight(P, Z)
    assert w.tolist() == pytest.approx(by_hand(P.tolist(), Z.tolist())) and float(w.sum()) == pytest.approx(1)
    s = torch.cdist(P, Z).sum(1)
    assert w.argmax() == s.argmin() and float(w.max() / w.min()) == pytest.approx(math.exp(5))


@pytest.mark.parametrize(
    "prototypes, features",
    [
        ([[1.0, 2.0]], [[0.0, 0.0]]),  # one client
        ([[1.0, 2.0]], [[1.0, 2.0]]),
        ([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [[0.0, 0.0]]),  # all as far
        ([[1.0, 0.0], [3.0, 1.0]], []),  # nobody has the class
        ([[0.3, 0.1]] * 3, [[0.7, 0.2], [0.1, 0.5]]),
    ],
)
def test_degenerate_cases_are_uniform(prototypes, features):
    w = reweight(torch.tensor(prototypes).double(), torch.tensor(features).double().reshape(-1, 2))
    assert w.tolist() == pytest.approx([1 / len(prototypes)] * len(prototypes))


def test_a_prototype_at_the_feature_takes_the_most():
    w = reweight(torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    e = math.exp(5)
    assert w.tolist() == pytest.approx([e / (e + 2), 1 / (e + 2), 1 / (e + 2)])


def test_the_server_aggregates(rig, wire):
    """A and B by weighted means, each class's prototype by the distances to the features that were sent for it."""
    r = rig(f"{FLAGS} --num_clients 4 --partition_mode distribution --distribution_alpha 0.3", PRETRAINED).begin(0)
    r.round(0, 0)
    replies, counts = [w.reply for w in wire], [w.reply["n_samples"] for w in wire]
    senders = [[1 for x in replies if c in x["proto.classes"].tolist()] for c in range(CLASSES)]
    assert len(set(counts)) > 1 and any(0 < len(s) < 4 for s in senders)
    for name, p in r.model.trainable().items():
        if name.startswith("lora."):
            mean = sum(n * x[name].double() for n, x in zip(counts, replies, strict=True)) / sum(counts)
            torch.testing.assert_close(p.detach().double(), mean, rtol=1e-5, atol=1e-6)
    for c in range(CLASSES):
        prototypes = [x["head.weight"][c].double() for x in replies]
        means = [x["proto.means"][i].tolist() for x in replies for i, k in enumerate(x["proto.classes"]) if k == c]
        weights = by_hand([p.tolist() for p in prototypes], means)
        expected = sum(w * p for w, p in zip(weights, prototypes, strict=True)).float()
        torch.testing.assert_close(r.model.head.weight[c], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(r.model.head.everyone[c], expected, rtol=1e-4, atol=1e-5)


def test_mean_features_are_the_trained_models(rig):
    """Of classes with more samples than the flag says, over the client's images as they are."""
    r = rig(f"{FLAGS} --partition_mode distribution --distribution_alpha 0.3", PRETRAINED).begin(0)
    worker = r.worker
    worker.enter_task(0)
    client = client_of(r, 0)
    labels = r.dataset.train_labels[client.indices]
    n = [int((labels == c).sum()) for c in range(CLASSES)]
    r.args.pilora_min_samples = max(n) - 1
    reply = worker.local_update(r.model.broadcast(), client)
    chosen = [c for c in range(CLASSES) if n[c] == max(n)]
    assert min(n) < max(n) and reply["proto.classes"].tolist() == chosen
    with torch.no_grad():
        f = torch.cat([worker.features(x) for x, _ in client.stat_loader()])
    torch.testing.assert_close(reply["proto.means"][0], f[labels == chosen[0]].mean(0), rtol=1e-4, atol=1e-5)


# ---- tasks


def test_folded_pairs_are_their_sum(rig):
    """The weights are W0 + sum_t B_t A_t in the rows of q and v of the first block; the rest stays as it was."""
    r = rig(FLAGS, PRETRAINED)
    start = {n: t.clone() for n, t in r.model.net.state_dict().items()}
    pairs = []
    for task in range(2):
        r.begin(task).round(task, 0).round(task, 1)
        pairs.append({n: p.detach().clone() for n, p in r.model.trainable().items() if n.startswith("lora.")})
        r.end(task)
    W = start[f"{LAYER}.weight"].double()
    for pair in pairs:
        for rows, s in ((slice(0, D), "q"), (slice(2 * D, 3 * D), "v")):
            A, B = (pair[f"lora.layers.blocks-0-attn-qkv.{s}.{f}"].double() for f in "AB")
            assert B.any() and A.shape == (R, D)
            W[rows] += B @ A
    r.begin(2)
    r.worker.enter_task(2)
    r.worker.load(r.model.broadcast())
    for part in (r.model, r.worker):
        now = part.net.state_dict()
        torch.testing.assert_close(now[f"{LAYER}.weight"].double(), W, rtol=0, atol=1e-6)
        assert all(torch.equal(t, now[n]) for n, t in start.items() if n != f"{LAYER}.weight")
    # a pair of the summed rank does the same on pretrained weights
    other, x = rig(FLAGS, PRETRAINED), images(r)[0]
    whole = r.model.adapter_over_pretrained()
    for name, slices, A, B in other.model.lora:
        mine = {(n, s): (a, b) for n, s, a, b in whole}[name, slices]
        A.data, B.data = (t.data for t in mine)
        assert A.shape == (2 * R, D)
    torch.testing.assert_close(other.model.features(x), r.model.features(x), rtol=1e-4, atol=1e-4)


def test_prototypes_of_other_tasks_stay(rig):
    r = rig(f"{FLAGS} --optim_wd 0.5")
    drawn = r.model.head.everyone.clone()
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.1)
    r.begin(0).round(0, 0).end(0)
    left = r.model.head.everyone.clone()
    assert torch.equal(left[2:], drawn[2:]) and (left[:2] != drawn[:2]).any(1).all()
    r.begin(1).round(1, 0).round(1, 1)
    now = r.model.head.everyone
    assert torch.equal(now[:2], left[:2]) and torch.equal(now[4:], drawn[4:]) and (now[2:4] != drawn[2:4]).any(1).all()


def test_what_travels(rig, wire):
    """Both ways the pair and two prototypes; up also two mean features; down once what others have learned."""
    r = rig(FLAGS)
    for task in range(2):
        r.begin(task).round(task, 0).round(task, 1).end(task)
    pair, own, held = 2 * 2 * R * D, CLASSES * D, {c: {} for c in range(2)}
    for w, row in zip(wire, r.ledger.rows(), strict=True):
        new = {n for n, version in w.message.keep.items() if held[w.client].get(n) != version}
        held[w.client] |= w.message.keep
        once = sum(w.message[n].numel() for n in new)
        assert once == (0 if w.round else (TOTAL - CLASSES) * D if w.task == 0 else pair + own)
        assert w.reply.payload_bytes == 4 * (pair + own + own) + 8 * CLASSES
        sent = w.message.without(set(w.message.keep) - new)
        assert sent.payload_bytes == 4 * (pair + own + once)
        assert row["downlink_bytes"] == sent.nbytes and row["uplink_bytes"] == w.reply.nbytes
    assert len(wire) == 2 * 2 * 2


def test_a_worker_that_starts_late_knows_everything(rig):
    r = after_a_task(rig).round(1, 0)
    message = Message.from_bytes(r.model.broadcast().to_bytes())
    torch.manual_seed(12345)
    other = rig(FLAGS, PRETRAINED).worker
    other.head.everyone = random(TOTAL, D)
    for p in other.lora.parameters():
        p.data = torch.randn(p.shape)
    replies = []
    for worker in (r.worker, other):
        worker.enter_task(1)
        replies.append(worker.local_update(message, client_of(r, 1)))
    assert set(replies[0]) == set(replies[1]) and far(*(x.tensors() for x in replies)) == 0


def test_clients_leave_the_server_alone(rig):
    r = after_a_task(rig)
    before = copy.deepcopy(state(r))
    message = r.model.broadcast()
    for i in range(2):
        r.worker.local_update(message, client_of(r, 1, i))
    assert far(before, state(r)) == 0


# ---- rates


def rates(r, round_=0):
    r.model.client = client_of(r, 0, 0, round_)
    groups = r.model.get_optimizer().param_groups
    names = {id(p): n for n, p in r.model.trainable().items()}
    return {names[id(p)].partition(".")[0]: g["lr"] for g in groups for p in g["params"]}


def test_two_rates_over_the_rounds(rig):
    r = rig(f"{FLAGS} --lr 0.4 --lr_back 0.2 --num_comm_rounds 4 --pilora_schedule cosine").begin(0)
    for k in range(4):
        factor = (1 + math.cos(math.pi * k / 4)) / 2
        assert rates(r, k) == pytest.approx({"head": 0.4 * factor, "lora": 0.2 * factor})
    r = rig(f"{FLAGS} --lr 0.4 --lr_back -1 --pilora_schedule none").begin(0)
    assert rates(r, 1) == {"head": 0.4, "lora": 0.4}


def test_the_rates_must_not_be_swapped(rig):
    """LoRA at the prototypes' rate and prototypes at LoRA's: what is reported to ruin a first task of many classes."""
    flags = (
        f"{FLAGS} --joint 1 --optimizer adam --num_clients 10 --participation_rate 0.2 --num_comm_rounds 3 "
        "--n_epochs 2 --batch_size 16"
    )
    right, wrong = (
        torch.tensor(rig(f"{flags} --lr {a} --lr_back {b}", PRETRAINED).run().session.results.class_il[0]).mean()
        for a, b in ((0.1, 0.0005), (0.0005, 0.1))
    )
    assert right > 80 and wrong < right - 20


@pytest.mark.parametrize("section", ["default", "paper", "fm", "fm-lorm"])
def test_every_section_is_valid(section):
    dataset = "seq-cifar100" if section == "paper" else "seq-glyphs"
    settings = model_config("pilora", dataset, section, True)
    args = parse_args(["--model", "pilora", "--dataset", dataset, "--fl", "--model_config", section])
    assert (args.lr, args.lr_back, args.optimizer) == (settings["lr"], settings["lr_back"], "adam")
    assert args.pilora_sqrt == section.startswith("fm")


@pytest.mark.parametrize(
    "more", ["--pilora_sqrt 1 --pilora_schedule cosine", "--lora_targets attn.qkv --pilora_l1 0.1"]
)
def test_both_engines_give_the_same(rig, capsys, more):
    sgd = "--optimizer sgd --partition_mode distribution --distribution_alpha 0.5 --stop_after 2 --num_comm_rounds 1"
    ends = [
        state(rig(f"{FLAGS} {more} {sgd} --engine {e}", PRETRAINED).run())
        for e in ("serial", "batched --clients_per_batch 3")
    ]
    assert "one at a time" not in capsys.readouterr().out
    assert far(*ends) <= 2e-6


def test_cross_entropy_is_over_all_classes(rig):
    """Moving the prototype of a class to come moves the loss."""
    r = rig(FLAGS, PRETRAINED).begin(0)
    x, y = images(r)
    D0 = r.model.distances(x)
    torch.testing.assert_close(
        r.model.local_loss(x, y, None), F.cross_entropy(-D0, y, reduction="none") + 0.001 * D0[range(7), y]
    )
    before = r.model.local_loss(x, y, None)
    r.model.head.everyone[9] = r.model.features(x).mean(0).detach()
    assert (r.model.local_loss(x, y, None) > before).all()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--backbone mnistmlp", "no linear layer matches target 'blocks.0.attn.qkv:q,v'"),
        ("--lora_targets mlp.fc1:q", "not divisible"),
        ("--temp 0", "--temp: '0' is out of range"),
        ("--pilora_l1 -1", "--pilora_l1: '-1' is out of range"),
    ],
)
def test_mistakes(rig, argv, message):
    with pytest.raises(UserError) as e:
        rig(
            f"--model pilora --fl {argv}",
            "--dataset seq-digits --pretrained 0" if "backbone" not in argv else "--dataset seq-digits",
        )
    assert message in str(e.value) and "\n" not in str(e.value)
