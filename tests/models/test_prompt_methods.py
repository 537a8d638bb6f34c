"""L2P, DualPrompt, CODA-Prompt: against loops over samples and closed forms, and what crosses the wire."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from backbones.utils.client_batch import client_batch
from datasets.utils.transforms import Compose, RandomHorizontalFlip
from federated.client import Client
from federated.message import Message
from models.dualprompt import legacy_reshape
from models.utils.prompt_method import PromptMethod
from tests.federated.test_batched_engine import far, state
from utils.args import model_config, parse_args
from utils.errors import UserError
from utils.evaluate import evaluating

D, DEPTH, CLASSES = 128, 4, 2  # of the pocket transformer and of a task of seq-digits
METHODS = ("l2p", "dualprompt", "coda_prompt")
FAST = (
    "--fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 8 --debug_mode 1 --optimizer adam --lr 0.01 "
    "--partition_mode iid"
)
SMALL = {"l2p": "--pool_size 6 --prompt_len 2 --top_k 3", "dualprompt": "--e_len 3", "coda_prompt": "--pool_size 20"}


def flags(model, more=""):
    return f"--model {model} {FAST} {SMALL[model]} {more}"


def images(r, task=0, n=7):
    """Some test images of a task, with labels."""
    indices = r.dataset.task_indices(task, train=False)[:n]
    return next(iter(r.dataset.loader(indices, task, n, train=False, device="cpu")))[:2]


def client_of(r, task, i=0, round_=0):
    return Client(i, r.dataset, r.partition.indices(task, i), {}, r.args, task, round_, "x")


def shaken(r):
    """The worker with the server's state and anything trained away from where it started, ready for task 0."""
    r.begin(0)
    r.worker.enter_task(0)
    r.worker.load(r.model.broadcast())
    g = torch.Generator().manual_seed(1)
    for p in r.worker.trainable().values():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=g)
    return r.worker


def bare(net):
    """A copy of the network without grafts."""
    net = copy.deepcopy(net)
    net.__dict__.pop("pool", None)
    for block in net.blocks:
        block.attn.__dict__.pop("forward", None)
        block._forward_pre_hooks.clear()
    return net


def with_prefixes(net, x, prefixes):
    """Features of one image (1, ...) with keys and values (length x d) in some blocks, written out."""
    t = net._pos_embed(net.patch_embed(x))[0]
    for i, block in enumerate(net.blocks):
        attn, h = block.attn, block.norm1(t)
        q, k, v = (h @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1)
        keys, values = prefixes.get(i, (k[:0], v[:0]))
        k, v = torch.cat([keys, k]), torch.cat([values, v])
        d = D // attn.num_heads
        heads = [slice(j * d, (j + 1) * d) for j in range(attn.num_heads)]
        y = torch.cat([(q[:, s] @ k[:, s].T / d**0.5).softmax(1) @ v[:, s] for s in heads], 1)
        t = t + attn.proj(y)
        t = t + block.mlp(block.norm2(t))
    return net.norm(t)[0]


def cos(a, b):
    return (a @ b) / a.norm() / b.norm()


# ---- L2P


@pytest.mark.parametrize("preset, pull, first", [("default", 0.1, 1), ("fm", 0.0, 0)])
def test_l2p_is_its_equations(rig, preset, pull, first):
    """Sample by sample: query, three keys of six, tokens behind the class token, mean of their outputs, pull term."""
    r = rig(flags("l2p", f"--preset {preset}"))
    worker, (x, y) = shaken(r), images(r)
    got = worker.local_loss(x, y, None)
    net, pool = bare(worker.net), worker.pool
    picked = set()
    for b in range(len(x)):
        q = net(x[b : b + 1], returnt="features")[0]
        each = torch.stack([cos(q, k) for k in pool.keys])
        best = each.sort(descending=True).indices[:3]
        picked |= set(best.tolist())
        tokens = torch.cat([pool.prompts[m] for m in best])[None]
        if preset == "fm":  # [class; prompts; patches] + [random; the network's own table]
            t = torch.cat([net.cls_token, tokens, net.patch_embed(x[b : b + 1])], 1)
            t = t + torch.cat([worker.front.shifted[None], net.pos_embed], 1)
        else:
            t = net._pos_embed(net.patch_embed(x[b : b + 1]))
            t = torch.cat([t[:, :1], tokens + net.pos_embed[0, 0], t[:, 1:]], 1)
        t = net.norm(net.blocks(t))
        logits = worker.head(t[:, first:7].mean(1))
        expected = F.cross_entropy(logits, y[b : b + 1]) - pull * each[best].sum()
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-5)
        assert abs(float(each[best].sum().detach())) <= 3
    got.sum().backward()
    moved = {n for n, p in worker.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"pool.prompts", "head.weight", "head.bias"} | ({"pool.keys"} if pull else set())
    if pull:
        assert {m for m in range(6) if pool.keys.grad[m].any()} == picked


def test_l2p_legacy_positions(rig):
    """Random ones of the run's seed, the same on server and workers, and no part of what travels."""
    r, other = rig(flags("l2p", "--legacy_positions 1")), rig(flags("l2p", "--legacy_positions 1 --seed 1"))
    table = r.model.front.shifted
    assert table.shape == (6, D) and torch.equal(table, r.worker.front.shifted) and 0.015 < table.std() < 0.025
    assert not torch.equal(table, other.model.front.shifted)
    assert not any("shifted" in n for n in (*r.model.broadcast(), *r.model.net.state_dict()))
    assert rig(flags("l2p", "")).model.front.shifted is None


def test_l2p_keys_come_closer(rig):
    """The pull term does what it is for, and without it keys stay as they were drawn."""
    closeness = {}
    for pull in (0.0, 5.0):
        r = rig(flags("l2p", f"--pull_coeff {pull} --top_k 6 --stop_after 1")).begin(0)
        keys, (x, _) = r.model.pool.keys.detach().clone(), images(r)
        before = r.model.pool(r.model.query(x), 6)[1].mean()
        r.round(0, 0)
        closeness[pull] = float((r.model.pool(r.model.query(x), 6)[1].mean() - before).detach())
        assert torch.equal(r.model.pool.keys, keys) == (pull == 0)
    assert closeness[0.0] == 0 and closeness[5.0] > 0.02


def test_l2p_votes(rig):
    r = rig(flags("l2p", "--batchwise_prompt 1 --top_k 1"))
    worker, (x, _) = shaken(r), images(r, n=9)
    chosen = worker.pool(worker.query(x), 1)[2].flatten()
    worker.pool.keys.data[0] = worker.query(x[:5]).mean(0)  # the best key of most, then
    chosen = worker.pool(worker.query(x), 1)[2].flatten()
    most = int(chosen.bincount().argmax())
    worker.prompted(x)
    torch.testing.assert_close(worker.front.current(), worker.pool.prompts[[most] * 9])


# ---- DualPrompt


def test_dualprompt_trains_the_prompt_of_its_task(rig):
    r = rig(flags("dualprompt"))
    worker, (x, y) = shaken(r), images(r)
    got, net = worker.local_loss(x, y, None), bare(worker.net)
    assert (worker.general.blocks, worker.expert.blocks) == ([0, 1], [2, 3])
    prefixes = {i: module.prompts[str(i)] for module in (worker.general, worker.expert) for i in module.blocks}
    for b in range(len(x)):
        z = with_prefixes(net, x[b : b + 1], prefixes)
        q = net(x[b : b + 1], returnt="features")[0]
        expected = F.cross_entropy(worker.head(z[None]), y[b : b + 1]) - cos(q, worker.key.keys[0])
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    moved = {n for n, p in worker.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(worker.trainable()) and not any(n.startswith("net.") for n in moved)


def server_with_prompts(rig, more=""):
    """A server whose pool holds prompts that differ, and images that choose different ones."""
    r = rig(flags("dualprompt", more)).begin(0)
    server, (x, _) = r.model, images(r, n=6)
    server.learnt = 4
    g = torch.Generator().manual_seed(0)
    for i in server.expert.blocks:
        server.get_buffer(f"pool_{i}").copy_(torch.randn(10, 2, 3, D, generator=g))
    q = server.query(x)
    server.pool_keys[:4] = q[[0, 1, 2, 3]] - q.mean(0) * 0.99  # the network's features are all alike
    chosen = [int(torch.stack([cos(one, k) for k in server.pool_keys[:4]]).argmax()) for one in q]
    assert len(set(chosen)) > 1
    return server, x, chosen


def test_dualprompt_tests_every_image_with_its_own_prompt(rig):
    server, x, chosen = server_with_prompts(rig)
    net, logits = bare(server.net), server(x)
    assert logits.shape == (6, 10) and not server.expert._given
    for b, j in enumerate(chosen):
        prefixes = {i: server.general.prompts[str(i)] for i in (0, 1)}
        prefixes |= {i: server.get_buffer(f"pool_{i}")[j] for i in (2, 3)}
        expected = net.classifier(with_prefixes(net, x[b : b + 1], prefixes))
        torch.testing.assert_close(logits[b], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(server(x[b : b + 1])[0], logits[b], rtol=1e-4, atol=1e-5)


def test_the_published_reshape_mixes_samples(rig):
    server, x, chosen = server_with_prompts(rig, "--legacy_reshape 1")
    right, net = server_with_prompts(rig)[0](x), bare(server.net)
    logits = server(x)
    assert (logits - right).abs().amax(1).min() > 1e-4
    for b in range(6):
        prefixes = {i: server.general.prompts[str(i)] for i in (0, 1)}
        for i in (2, 3):
            raw = server.get_buffer(f"pool_{i}")[chosen].transpose(0, 1)  # as published: K/V, batch, length, d
            prefixes[i] = raw.reshape(6, 2, 3, D)[b]
        expected = net.classifier(with_prefixes(net, x[b : b + 1], prefixes))
        torch.testing.assert_close(logits[b], expected, rtol=1e-4, atol=1e-5)
    # one image alone, or equal prompts for keys and values of all, are not affected
    torch.testing.assert_close(server(x[:1]), server_with_prompts(rig)[0](x[:1]), rtol=0, atol=0)


def test_the_published_reshape_in_training():
    """All samples have the task's prompt: the first half gets its keys twice, the second its values."""
    K, V = torch.zeros(1, 3), torch.ones(1, 3)
    mixed = legacy_reshape(torch.stack([K, V]).expand(6, 2, 1, 3), [4, 2])
    assert mixed[:, :, 0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("preset", ["default", "fm"])
def test_dualprompt_starts_a_task(rig, preset):
    """From the prompt of the task before, or as drawn; trained prompts stay in the pool as they were left."""
    r = rig(flags("dualprompt", f"--preset {preset}")).begin(0)
    drawn = {i: r.model.get_buffer(f"pool_{i}").clone() for i in (2, 3)}
    keys = r.model.pool_keys.clone()
    r.round(0, 0).end(0)
    trained = {i: r.model.get_buffer(f"pool_{i}").clone() for i in (2, 3)}
    r.begin(1)
    for i in (2, 3):
        assert torch.equal(trained[i][1:], drawn[i][1:]) and not torch.equal(trained[i][0], drawn[i][0])
        source = trained[i][0] if preset == "default" else drawn[i][1]
        assert torch.equal(r.model.expert.prompts[str(i)], source)
    assert torch.equal(r.model.key.keys[0], keys[1])
    assert torch.equal(r.model.pool_keys[0], keys[0]) == (preset == "fm")
    r.round(1, 0)
    for i in (2, 3):
        assert torch.equal(r.model.get_buffer(f"pool_{i}")[0], trained[i][0])
        assert torch.equal(r.model.get_buffer(f"pool_{i}")[1], r.model.expert.prompts[str(i)])
    q = 100 * r.model.pool_keys[7:8]  # an E-Prompt of no task so far
    assert (int(r.model.choose(q)) == 7) == (preset == "fm")


# ---- CODA-Prompt


def test_coda_prompt_is_its_equations(rig):
    r = rig(flags("coda_prompt", "--stop_after 1")).run()  # four components are frozen now
    r.begin(1)
    worker, pool = r.worker, r.worker.pool
    worker.enter_task(1)
    worker.load(r.model.broadcast())
    x, y = images(r, 1)
    got, net = worker.local_loss(x, y, None), bare(worker.net)
    assert pool.n_frozen == 4 and pool.blocks == [0, 1, 2, 3]
    for b in range(len(x)):
        q = net(x[b : b + 1], returnt="features")[0]
        prefixes = {}
        for i in pool.blocks:
            ps, ks, As = (torch.cat([pool.frozen(n, i), getattr(pool, n)[str(i)]]) for n in pool.kinds())
            p = sum(cos(q * a, k) * one for one, k, a in zip(ps, ks, As, strict=True))
            prefixes[i] = (p[:4], p[4:])
        z = with_prefixes(net, x[b : b + 1], prefixes)
        expected = F.cross_entropy(worker.head(z[None]), y[b : b + 1] - CLASSES)
        torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    moved = {n for n, p in worker.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(worker.trainable())


def test_components_of_earlier_tasks_never_move(rig):
    """Not even by weight decay; and new ones are orthonormal to them, whatever training has made of those."""
    r = rig(flags("coda_prompt", "--optimizer adamw --optim_wd 0.5 --mu 0.1"))
    kept = {}
    for task in range(3):
        r.begin(task)
        pool = r.model.pool
        assert pool.n_frozen == 4 * task
        for kind, of_block in pool.kinds().items():
            for i, p in of_block.items():
                new, old = p.detach().flatten(1), pool.frozen(kind, i).flatten(1)
                torch.testing.assert_close(new @ new.T, torch.eye(4), rtol=0, atol=1e-5)
                assert not len(old) or float((new @ old.T).abs().max()) < 1e-5
        start = {n: p.detach().clone() for n, p in pool.named_parameters()}
        r.round(task, 0).round(task, 1)
        assert all(not torch.equal(p, start[n]) for n, p in pool.named_parameters())
        for (kind, i, t), rows in kept.items():
            for party in (r.model, r.worker):
                assert torch.equal(party.pool.frozen(kind, i)[4 * t : 4 * t + 4], rows)
        kept |= {(k, i, task): p.detach().clone() for k, ps in pool.kinds().items() for i, p in ps.items()}
        r.end(task)
    assert len(kept) == 3 * 3 * DEPTH


def test_the_orthogonality_penalty(rig):
    r = rig(flags("coda_prompt", "--mu 0.3")).begin(0).end(0).begin(1)
    r.worker.enter_task(1)
    r.worker.load(r.model.broadcast())
    pool, trained = r.worker.pool, r.worker.trainable()
    for n, p in trained.items():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    expected = 0.0
    for i in pool.blocks:
        for kind in ("prompts", "keys", "attention"):
            B = torch.cat([pool.frozen(kind, i), trained[f"pool.{kind}.{i}"].detach()]).flatten(1)
            n = len(B)
            expected += sum((float(B[a] @ B[b]) - (a == b)) ** 2 for a in range(n) for b in range(n)) / n**2
    got = r.worker.local_penalty(trained, None)
    assert float(got.detach()) == pytest.approx(0.3 * expected, rel=1e-4)
    assert rig(flags("coda_prompt")).begin(0).model.local_penalty(trained, None) is None


def test_the_cosine_of_the_released_code(rig):
    r = rig(flags("coda_prompt", "--n_epochs 5 --lr_scheduler cosine")).begin(0)
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, seen = r.model.get_scheduler(opt), []
    for _ in range(5):
        seen.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    assert seen == pytest.approx([2 * math.cos(99 * math.pi * e / (200 * 4)) for e in range(5)])
    assert rig(flags("coda_prompt")).begin(0).model.get_scheduler(opt) is None


# ---- all of them


@pytest.mark.parametrize("model", METHODS)
def test_the_loss_is_over_the_current_classes(rig, model):
    """The same as a softmax over all classes with -inf for the others."""
    r = rig(flags(model)).begin(0).round(0, 0).end(0).begin(1)
    worker, (x, y) = r.worker, images(r, 1)
    worker.enter_task(1)
    worker.load(r.model.broadcast())
    features, extra = worker.prompted(x)
    logits = torch.full((len(x), 10), float("-inf"))
    logits[:, CLASSES : 2 * CLASSES] = worker.head(features)
    expected = F.cross_entropy(logits, y, reduction="none") + extra
    torch.testing.assert_close(worker.local_loss(x, y, None), expected)


WIRE = {  # floats that each client sends in a round
    "l2p": 6 * 2 * D + 6 * D,
    "l2p --preset fm": 6 * 2 * D,
    "dualprompt": 2 * 2 * 5 * D + 2 * 2 * 3 * D + D,
    "dualprompt --preset fm": 2 * 2 * 5 * D + 2 * 2 * 3 * D,
    "coda_prompt": DEPTH * 4 * (8 * D + D + D),
}


@pytest.mark.parametrize("name", WIRE)
def test_what_travels(rig, wire, name):
    """Up: prompts, trained keys and the task's head rows. Down: the same, and once what clients do not train."""
    model, _, more = name.partition(" ")
    r = rig(flags(model, more))
    for task in range(2):
        r.begin(task).round(task, 0).round(task, 1).end(task)
    head, held = (D + 1) * CLASSES, {c: set() for c in range(3)}
    for w, row in zip(wire, r.ledger.rows(), strict=True):
        new = set(w.message.keep) - held[w.client]
        held[w.client] |= new
        once = sum(w.message[n].numel() for n in new)
        assert w.call == "local_update" and w.reply.payload_bytes == 4 * (WIRE[name] + head)
        sent = w.message.without(set(w.message.keep) - new)
        assert sent.payload_bytes == 4 * (WIRE[name] + head + once)
        assert row["downlink_bytes"] == sent.nbytes and row["uplink_bytes"] == w.reply.nbytes
        if model == "coda_prompt":
            assert once == (WIRE[name] if w.task and w.round == 0 else 0)
        else:
            assert once == (6 * D if name == "l2p --preset fm" and (w.task, w.round) == (0, 0) else 0)
    assert len(wire) == 2 * 2 * 3


@pytest.mark.parametrize("model", METHODS)
def test_the_server_averages_and_the_body_stays(rig, wire, model):
    r = rig(flags(model, "--partition_mode distribution --distribution_alpha 0.5 --stop_after 2 --optim_wd 0.1"))
    body = {n: t.clone() for n, t in r.model.net.state_dict().items() if not n.startswith("classifier")}
    r.run()
    assert all(torch.equal(t, part.net.state_dict()[n]) for part in (r.model, r.worker) for n, t in body.items())
    last = [w.reply for w in wire if (w.task, w.round) == (1, 1)]
    counts = [reply["n_samples"] for reply in last]
    assert len(set(counts)) > 1
    for name, p in r.model.trainable().items():
        mean = sum(n * reply[name].double() for n, reply in zip(counts, last, strict=True)) / sum(counts)
        torch.testing.assert_close(p.detach().double(), mean, rtol=1e-5, atol=1e-6)
    start = rig(flags(model)).model.net.classifier.weight
    moved = (r.model.net.classifier.weight != start).any(1)
    assert moved.tolist() == [True] * 2 * CLASSES + [False] * 6


@pytest.mark.parametrize("name", [*METHODS, "l2p --preset fm"])
def test_a_worker_that_starts_late_knows_everything(rig, name):
    """The reply of a client is the same from a worker of this moment as from one that was there all the time."""
    model, _, more = name.partition(" ")
    r = rig(flags(model, more)).begin(0).round(0, 0).end(0).begin(1).round(1, 0)
    message = Message.from_bytes(r.model.broadcast().to_bytes())
    other = rig(flags(model, more)).worker
    for module in (getattr(other, n) for n in other.TRAINED):  # draws of its own do not matter
        for p in module.parameters():
            p.data = torch.randn(p.shape)
    torch.manual_seed(12345)
    replies = []
    for worker in (r.worker, other):
        worker.enter_task(1)
        replies.append(worker.local_update(message, client_of(r, 1)))
    assert set(replies[0]) == set(replies[1]) and far(*(x.tensors() for x in replies)) == 0


@pytest.mark.parametrize("model", METHODS)
def test_the_untrained_model_predicts(rig, model):
    """Forward transfer asks it before any task has begun."""
    r = rig(flags(model))
    logits = r.model(images(r)[0])
    assert logits.shape == (7, 10) and logits.isfinite().all()


OPTIONS = {
    "l2p": ["--preset fm", "--batchwise_prompt 1", "--feature_tokens network"],
    "dualprompt": ["--preset fm", "--legacy_reshape 1", "--g_len 0 --e_blocks 1"],
    "coda_prompt": ["--mu 0.1 --lr_scheduler cosine --n_epochs 2", "--prompt_blocks 1 3 --prompt_len 2"],
}


@pytest.mark.parametrize("model, more", [(m, o) for m, options in OPTIONS.items() for o in options])
def test_options_on_both_engines(rig, capsys, model, more):
    """Clients of different sizes, stacked: the weights of clients in turn. SGD, as Adam makes steps of rounding."""
    sgd = "--optimizer sgd --lr 0.05 --partition_mode distribution --distribution_alpha 0.5 --stop_after 2"
    sgd += " --num_comm_rounds 1"
    serial, stacked = (
        rig(flags(model, f"{more} {sgd} --engine {e}")).run() for e in ("serial", "batched --clients_per_batch 3")
    )
    assert "one at a time" not in capsys.readouterr().out
    assert far(state(serial), state(stacked)) <= 2e-6
    last = {n: p.detach().clone() for n, p in stacked.model.trainable().items()}
    stacked.begin(2).round(2, 0)
    assert all(not torch.equal(p, last[n]) for n, p in stacked.model.trainable().items())


@pytest.mark.parametrize("model", METHODS)
def test_without_clients_it_learns(rig, model):
    """Centrally, with pretrained weights: far above chance on the task just learnt."""
    base = "--dataset seq-digits --backbone vit-pocket --device cpu"
    r = rig(f"--model {model} {SMALL[model]} --n_epochs 2 --lr 0.01 --stop_after 1", base).run()
    assert r.session.results.task_il[0][0] > 85


def test_flags_win_over_the_preset():
    def given(model, more):
        return parse_args(f"--model {model} --dataset seq-digits --fl {more}".split())

    assert (given("l2p", "").pull_coeff, given("l2p", "--preset fm").pull_coeff) == (0.1, 0)
    mixed = given("dualprompt", "--preset fm --pull_coeff 0.5 --e_len 7")
    assert (mixed.pull_coeff, mixed.e_len, mixed.legacy_reshape, mixed.shared_prompt_pool) == (0.5, 7, 1, 0)
    assert vars(given("dualprompt", "--model_config fm --seed 1"))["e_len"] == 20


@pytest.mark.parametrize("model", METHODS)
@pytest.mark.parametrize("section", ["default", "paper", "fm"])
def test_every_section_is_valid(model, section):
    dataset = "seq-cifar100" if section == "paper" else "seq-glyphs"
    settings = model_config(model, dataset, section, True)
    args = parse_args(["--model", model, "--dataset", dataset, "--fl", "--model_config", section])
    assert args.lr == settings["lr"] and args.optimizer == ("adamw" if section == "fm" else "adam")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--model l2p --backbone mnistmlp", "--backbone mnistmlp: l2p needs a transformer of timm: vit or vit-pocket"),
        ("--model coda_prompt --backbone resnet18", "--backbone resnet18: coda_prompt needs a transformer"),
        ("--model l2p --pool_size 4 --top_k 5", "--top_k 5: the pool has --pool_size 4 prompts"),
        ("--model dualprompt --pool_size 4", "--pool_size 4: there are 5 tasks, and each has an E-Prompt"),
        ("--model dualprompt --e_blocks 2 7", "--e_blocks 7: the network has blocks 0 to 3"),
        ("--model dualprompt --g_blocks 1 2", "--g_blocks, --e_blocks: block 2 is in both"),
        ("--model coda_prompt --prompt_blocks 4", "--prompt_blocks 4: the network has blocks 0 to 3"),
        ("--model coda_prompt --prompt_len 3", "--prompt_len 3: half of the rows are keys"),
        ("--model coda_prompt --pool_size 3", "--pool_size 3: there are 5 tasks; give a component to each"),
        ("--model coda_prompt --pool_size 700", "--pool_size 700: no more than 128 components"),
    ],
)
def test_mistakes(rig, argv, message):
    with pytest.raises(UserError) as e:
        rig(
            f"{argv} --fl",
            "--dataset seq-digits --pretrained 0" if "--backbone" not in argv else "--dataset seq-digits",
        )
    assert message in str(e.value) and "\n" not in str(e.value)


def test_stacked_prompts_of_the_published_reshape(rig):
    """In a stack, prompts are mixed within each client's part of the batch only."""
    r = rig(flags("dualprompt", "--legacy_reshape 1"))
    worker, (x, _) = shaken(r), images(r, n=7)
    whole = {n: p.detach() for n, p in worker.expert.prompts.items()}
    with torch.no_grad():
        alone = torch.cat([worker.prompted(part)[0] for part in x.split([5, 2])])
        for n, p in whole.items():
            worker.expert.prompts._parameters[n] = torch.stack([p, p])
        with client_batch([5, 2]):
            torch.testing.assert_close(worker.prompted(x)[0], alone, rtol=1e-4, atol=1e-5)


# ---- queries that are kept

KEEPING = [*METHODS, "hgp"]


def keeping(model, more=""):
    if model == "hgp":
        return f"--model hgp {FAST} --prompt_mode pool --prompt_len 4 --n_prompts 5 --stop_after 2 {more}"
    return flags(model, f"--stop_after 2 {more}")


def learned(r):
    return {**{n: p.detach() for n, p in r.model.trainable().items()}, "head": r.model.net.classifier.weight.detach()}


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("engine", ["serial", "batched"])
@pytest.mark.parametrize("model", KEEPING)
def test_an_image_is_embedded_once(rig, monkeypatch, model, engine):
    embedded, plain = [], PromptMethod.embed

    def embed(self, x):
        embedded.extend((id(self), image.numpy().tobytes()) for image in x)
        return plain(self, x)

    monkeypatch.setattr(PromptMethod, "embed", embed)
    more = f"--n_epochs 2 --debug_mode 0 --engine {engine}"
    once = rig(keeping(model, more)).run()
    tests = sum(len(once.dataset.task_indices(t, train=False)) for t in (0, 1))
    trains = sum(len(once.dataset.task_indices(t)) for t in (0, 1))
    # in each task an engine that stacks tries two images beforehand, and holds a batch of 8 against its client alone
    assert tests + trains <= len(embedded) <= tests + trains + (2 * (2 + 8) if engine == "batched" else 0)
    n, embedded[:] = len(embedded), []
    monkeypatch.setattr(PromptMethod, "KEEPS_QUERIES", False)
    again = rig(keeping(model, more)).run()
    assert len(embedded) > 3 * n and len(set(embedded)) <= tests + trains
    assert far(learned(once), learned(again)) <= 1e-4


@pytest.mark.usefixtures("nano")
def test_queries_do_not_depend_on_engine_or_batch(rig):
    one, many = (rig(keeping("l2p", more)).run() for more in ("--engine serial", "--engine batched --batch_size 5"))
    mine, theirs = one.worker.queries(), many.worker.queries()
    assert len(mine) == 3 and {key[1] for key in mine} == {1}, "three clients, and what is over has been dropped"
    for key, q in mine.items():
        assert torch.equal(q, theirs[key])
    assert all(torch.equal(q, many.model.queries()[key]) for key, q in one.model.queries().items())


@pytest.mark.usefixtures("nano")
def test_augmented_images_are_embedded_every_time(rig):
    r = rig(keeping("l2p"))
    plain = r.dataset.get_transform()
    r.dataset._transforms[True] = Compose([RandomHorizontalFlip(), *plain.transforms])
    r.run()
    assert not r.worker.queries() and len(r.model.queries()) == 2
    client = client_of(r, 1)
    x = next(iter(client.train_loader()))[0]
    with evaluating(r.worker):
        torch.testing.assert_close(r.worker.query(x), r.worker.embed(x), rtol=0, atol=0)
