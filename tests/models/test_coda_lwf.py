"""CODA-Prompt with not-true distillation: against loops, the model that was sent, and clients in turn."""

import math

import pytest
import torch
import torch.nn.functional as F

from federated.client import Client
from models.coda_lwf import not_true_divergence
from tests.federated.test_batched_engine import far, state
from utils.args import model_config, parse_args
from utils.errors import UserError

D, CLASSES = 128, 2  # of the pocket transformer and of a task of seq-digits
FLAGS = (
    "--model coda_lwf --pool_size 10 --prompt_len 2 --prompt_blocks 0 2 --fl --num_clients 2 --num_comm_rounds 2 "
    "--n_epochs 1 --batch_size 8 --debug_mode 1 --lr 0.05 --optimizer sgd"
)
PRETRAINED = "--dataset seq-digits --backbone vit-pocket --device cpu"


def images(r, task=0, n=7):
    indices = r.dataset.task_indices(task, train=False)[:n]
    return next(iter(r.dataset.loader(indices, task, n, train=False, device="cpu")))[:2]


def client_of(r, task, i=0, state=None):
    return Client(i, r.dataset, r.partition.indices(task, i), {} if state is None else state, r.args, task, 0, "x")


def training(rig, more=""):
    """A worker in the second task, sent a model and trained away from it, its client, and that model's server."""
    r = rig(f"{FLAGS} {more}", PRETRAINED).begin(0).round(0, 0).end(0).begin(1)
    worker, client, message = r.worker, client_of(r, 1), r.model.broadcast()
    worker.enter_task(1)
    worker.load(message)
    worker.client = client
    worker.before_local(message, client)
    g = torch.Generator().manual_seed(1)
    for p in worker.trainable().values():
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=g)
    worker.zero_grad()
    return r, worker, client


def cos(a, b):
    return float(((a @ b) / a.norm() / b.norm()).detach())


# ---- the loss


def test_the_divergence_is_its_sum():
    g = torch.Generator().manual_seed(0)
    z, old, y = torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g), torch.tensor([0, 3, 1, 1, 2])
    got = not_true_divergence(z, old, y)
    for b in range(5):
        s, o = z[b].exp() / z[b].exp().sum(), old[b].exp() / old[b].exp().sum()
        expected = sum(float(s[j] * (s[j] / o[j]).log()) for j in range(4) if j != y[b])
        assert float(got[b]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not_true_divergence(z, z, y).abs().max() < 1e-6
    # with the true class it would be torch's divergence
    true = not_true_divergence(z, old, y) + (z.softmax(1) * (z.log_softmax(1) - old.log_softmax(1)))[range(5), y]
    torch.testing.assert_close(true, F.kl_div(old.log_softmax(1), z.softmax(1), reduction="none").sum(1))


def test_the_divergence_is_finite_where_probabilities_vanish():
    z = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    value = not_true_divergence(z, torch.tensor([[0.0, 200.0, -200.0]]), torch.tensor([0]))
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all()


def test_the_loss_is_its_equation(rig):
    r, worker, client = training(rig, "--kd_weight 0.7")
    x, y = images(r, 1)
    got = worker.local_loss(x, y, client)
    s, o = worker.task_logits(x).softmax(1), r.model.task_logits(x).softmax(1)
    assert (s - o).abs().max() > 0.01
    for b in range(len(x)):
        c = int(y[b]) - CLASSES
        beta = sum(float(client.state["b"][j]) for j in range(CLASSES) if j != c)
        kl = sum(s[b, j] * (s[b, j] / o[b, j]).log() for j in range(CLASSES) if j != c)
        torch.testing.assert_close(got[b], -s[b, c].log() + 0.7 * beta * kl, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    moved = {n for n, p in worker.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(worker.trainable())
    # the gradient is that of the student alone
    p, eps, at = worker.head.weight, 1e-3, (1, 5)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            p[at] += sign * eps
            values.append(worker.local_loss(x, y, client).sum())
            p[at] -= sign * eps
    assert float(p.grad[at]) == pytest.approx(float(values[0] - values[1]) / (2 * eps), rel=0.05, abs=1e-3)


def test_the_teacher_is_the_model_that_was_sent(rig):
    """And it stays so while the worker trains; the query is computed once for both."""
    r, worker, client = training(rig)
    x, y = images(r, 1)
    expected = r.model.task_logits(x)
    assert (worker.task_logits(x) - expected).abs().max() > 0.01
    torch.testing.assert_close(worker.teacher(x), expected, rtol=1e-4, atol=1e-5)
    assert not worker.teacher(x).requires_grad
    before = worker.trainable()
    calls = []
    hook = worker.net.register_forward_hook(lambda *_: calls.append(worker.pool.enabled))
    worker.local_loss(x.clone(), y, client)  # a copy: nobody knows its queries
    assert calls == [False, True, True]
    worker.local_loss(x, y, client)
    hook.remove()
    assert calls[3:] == [True, True]  # of these they were known
    assert all(p is before[n] for n, p in worker.trainable().items())


def test_a_round_begins_without_distillation(rig):
    r, worker, client = training(rig)
    message = r.model.broadcast()
    worker.load(message)
    x, y = images(r, 1)
    ce = F.cross_entropy(worker.task_logits(x), y - CLASSES, reduction="none")
    torch.testing.assert_close(worker.local_loss(x, y, client), ce, rtol=1e-5, atol=1e-6)


def test_where_the_divergence_leads():
    """Alone it pulls s_j to o_j / e, the minimum of each term s_j log(s_j / o_j)."""
    old = torch.tensor([[1.0, 0.5, -0.3, 0.2]], dtype=torch.float64)
    o = old.softmax(1)
    s = o / math.e
    s[0, 1] += 1 - s.sum()
    z = s.log().requires_grad_()
    value = not_true_divergence(z, old, torch.tensor([1]))
    assert float(value.detach()) == pytest.approx(-float(1 - o[0, 1]) / math.e)
    value.sum().backward()
    assert z.grad.abs().max() < 1e-12


# ---- beta


def test_class_weights_by_hand(rig):
    """Sums over the task's components, means over blocks and over the images of a class, softmax over classes."""
    r, worker, _ = training(rig)
    r.args.debug_mode = 0
    worker.load(r.model.broadcast())
    client = client_of(r, 1)
    client.indices = torch.cat(
        [client.indices[r.dataset.train_labels[client.indices] == c][:n] for c, n in ((2, 3), (3, 2))]
    )
    assert len(client.indices) == 5
    b, pool, scores = worker.class_weights(client), worker.pool, {2: [], 3: []}
    assert pool.n_frozen == 2 and pool.blocks == [0, 2]
    for x, labels in client.stat_loader():
        for q, y in zip(worker.query(x), labels.tolist(), strict=True):
            of_block = [
                sum(cos(q * a, k) for a, k in zip(pool.attention[str(i)], pool.keys[str(i)], strict=True))
                for i in pool.blocks
            ]
            scores[y].append(sum(of_block) / 2)
    means = [sum(scores[c]) / len(scores[c]) for c in (2, 3)]
    expected = [math.exp(m) / sum(math.exp(v) for v in means) for m in means]
    assert b.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_client_with_one_class(rig):
    """b is 1 there, so nothing is distilled."""
    r, worker, client = training(rig)
    client.indices = client.indices[r.dataset.train_labels[client.indices] == 3]
    client.state["b"] = worker.class_weights(client)
    assert client.state["b"].tolist() == [0, 1]
    x, y = images(r, 1)
    ce = F.cross_entropy(worker.task_logits(x), y - CLASSES, reduction="none")
    got = worker.local_loss(x, y, client)
    assert torch.equal(got[y == 3], ce[y == 3]) and not torch.equal(got[y == 2], ce[y == 2])


def test_class_weights_are_computed_once_in_a_task(rig):
    r = rig(f"{FLAGS} --partition_mode iid", PRETRAINED)
    seen = []
    for task in range(2):
        r.begin(task)
        for k in range(2):
            r.round(task, k)
            seen.append({i: s["b"].clone() for i, s in r.states.items()})
        r.end(task)
    assert all(set(s) == {0, 1} and float(b.sum()) == pytest.approx(1) for s in seen for b in s.values())
    for i in range(2):
        assert torch.equal(seen[0][i], seen[1][i]) and torch.equal(seen[2][i], seen[3][i])
        assert not torch.equal(seen[1][i], seen[2][i])
        assert r.states[i]["task"] == 1


# ---- runs


def test_without_weight_it_is_coda_prompt(rig):
    plain = FLAGS.replace("coda_lwf", "coda_prompt")
    ends = [state(rig(f"{f} --stop_after 1", PRETRAINED).run()) for f in (f"{FLAGS} --kd_weight 0", plain)]
    assert far(*ends) == 0
    assert far(ends[0], state(rig(f"{FLAGS} --stop_after 1", PRETRAINED).run())) > 1e-4


@pytest.mark.parametrize("kd_weight", [1, 20])
def test_both_engines_give_the_same(rig, capsys, kd_weight):
    """Clients of different sizes, whose classes weigh differently."""
    more = f"--kd_weight {kd_weight} --num_clients 3 --distribution_alpha 0.5 --stop_after 2"
    serial, stacked = (
        rig(f"{FLAGS} {more} --num_comm_rounds 1 --engine {e}", PRETRAINED).run()
        for e in ("serial", "batched --clients_per_batch 3")
    )
    assert "one at a time" not in capsys.readouterr().out
    assert far(state(serial), state(stacked)) <= 2e-6
    for i, kept in serial.states.items():
        assert far({"b": kept["b"]}, {"b": stacked.states[i]["b"]}) <= 1e-6 and kept["task"] == 1
    assert len({round(float(s["b"][0]), 4) for s in serial.states.values()}) > 1


def test_nothing_of_the_teacher_is_saved(rig):
    from utils.checkpoints import model_attributes

    r, worker, _ = training(rig)
    assert "_own_sent" in vars(worker) and "_own_sent" not in vars(r.model)
    assert not any(n.startswith("_own") for n in model_attributes(worker)["attrs"])


def test_without_clients_it_learns(rig):
    flags = "--model coda_lwf --pool_size 10 --n_epochs 2 --optimizer adam --lr 0.02 --stop_after 1 --debug_mode 1"
    assert rig(flags, PRETRAINED).run().session.results.task_il[0][0] > 85


@pytest.mark.parametrize("section", ["default", "fm"])
def test_every_section_is_valid(section):
    settings = model_config("coda_lwf", "seq-glyphs", section, True)
    args = parse_args(["--model", "coda_lwf", "--dataset", "seq-glyphs", "--fl", "--model_config", section])
    assert args.lr == settings["lr"] and args.optimizer == ("adamw" if section == "fm" else "adam")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--backbone mnistmlp", "--backbone mnistmlp: coda_lwf needs a transformer of timm: vit or vit-pocket"),
        ("--pretrained 0 --kd_weight -1", "--kd_weight: '-1' is out of range"),
        ("--pretrained 0 --pool_size 3", "--pool_size 3: there are 5 tasks"),
    ],
)
def test_mistakes(rig, argv, message):
    with pytest.raises(UserError) as e:
        rig(f"--model coda_lwf --fl {argv}", "--dataset seq-digits")
    assert message in str(e.value) and "\n" not in str(e.value)
