"""Task arithmetic, TAK and tau-Jp on a small transformer: steps against autograd, factors across clients, the end."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from models.task_arithmetic import group_of
from models.utils import kfac
from models.utils.task_vectors import best_coefficient, combined, control_dataset, merge
from tests.helpers import only_folder, rows, run
from utils.errors import UserError

NET = "--dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu"
SHORT = "--n_epochs 1 --batch_size 16 --lr 0.01 --optimizer adamw --warmup 3 --debug_mode 1"


@pytest.fixture
def make(rig, nano):
    return lambda flags, more="": rig(f"{flags} {SHORT}", f"{NET} {more}")


def begin(r, task):
    """Everything before the rounds of a task, whatever came before."""
    r.model._current_task = task
    return r.begin(task)


def begun(r, task=0):
    """A rig whose worker stands before its first step of a task, with a task vector that is not zero."""
    begin(r, task)
    clients = r.clients(task, 0)
    if hasattr(r.model, "terms"):
        r.model._own_terms = (task, r.model.terms(clients))
    message, client = r.model.broadcast(), r.engine.client(0, task, 0, "local_update")
    r.worker.enter_task(task)
    client.indices = r.worker.kept(client)[0]
    r.worker.load(message)
    r.worker.client = client
    r.worker.start_training()
    r.worker.before_local(message, client)
    g = torch.Generator().manual_seed(0)
    for p in r.worker.tau:
        p.data = 0.05 * torch.randn(p.shape, generator=g)
    x, y, plain = next(iter(client.train_loader()))
    return r.worker, x, y, plain


def logits(worker, f, task=0):
    lo, hi = worker.get_offsets(task)
    return 20 * F.normalize(f, dim=1) @ worker.rows[lo:hi].T


def f_at(worker, theta, x):
    """f at other weights, by copying the network."""
    net = copy.deepcopy(worker.net).eval()
    for n, t in theta.items():
        owner, _, key = n.rpartition(".")
        del net.get_submodule(owner)._parameters[key]
        setattr(net.get_submodule(owner), key, t)
    return F.normalize(net(x, returnt="features"), dim=1)


def loss_and_gradients(worker, x, y):
    """A batch's loss and its gradient in tau."""
    loss, tau = worker.local_loss(x, y, worker.client).mean(), worker.current_tau()
    return loss.detach(), dict(zip(tau, torch.autograd.grad(loss, list(tau.values()), materialize_grads=True)))


def watch_steps(worker) -> list[dict[str, torch.Tensor]]:
    """The gradients that the optimiser's steps from here on are to take; no step is taken."""
    seen, turn = [], worker._own_turn
    turn.opt.step = lambda: seen.append({n: p.grad.clone() for n, p in turn.tau.items()})
    return seen


@pytest.mark.parametrize("regime", ["linear", "full", "attention"])
def test_a_step_is_the_gradient_of_the_objective(make, regime):
    worker, x, y, plain = begun(make(f"--model task_arithmetic --regime {regime}"))
    tau = {n: p.detach().clone().requires_grad_() for n, p in worker.current_tau().items()}
    start = worker._own_lin.start()
    if regime == "linear":
        from models.utils.linearize import differentiable_forward

        with differentiable_forward(worker.net):
            f0, product = torch.func.jvp(lambda t: f_at(worker, t, x), (start,), (tau,))
        f = f0 + product
    else:
        f = f_at(worker, {n: start[n] + t for n, t in tau.items()}, x)
    want = F.cross_entropy(logits(worker, f), y)
    want.backward()
    loss, grads = loss_and_gradients(worker, x, y)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    assert set(grads) == set(tau) and all("attn" in n for n in tau) == (regime == "attention")
    for n, t in tau.items():
        torch.testing.assert_close(grads[n], t.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("regime", ["linear", "full"])
def test_factors_step_along_the_gradient_of_the_objective(make, regime):
    """--lora_r: A and B move as autograd through tau = start + B A says, penalty included; start stays."""
    flags = f"--model tak --reg_lambda 3 --kfac_examples 5 --regime {regime} --lora_r 2"
    worker, x, y, plain = begun(make(flags))
    g = torch.Generator().manual_seed(1)
    turn, start = worker._own_turn, {n: p.detach().clone() for n, p in worker.current_tau().items()}
    factors, turn.start, turn.opt = turn.trained, start, torch.optim.SGD(turn.trained.values(), lr=1.0)
    assert all(n.endswith("weight") and t.dim() == 2 for n, t in start.items())
    for n, f in factors.items():
        assert n.startswith("A.") or not f.any()  # B = 0: a turn starts where the server stands
        f.data = 0.1 * torch.randn(f.shape, generator=g)
    for n, p in worker.current_tau().items():
        p.data = start[n] + factors[f"B.{n}"].detach() @ factors[f"A.{n}"].detach()
    leaves = {n: f.detach().clone().requires_grad_() for n, f in factors.items()}
    tau = {n: start[n] + leaves[f"B.{n}"] @ leaves[f"A.{n}"] for n in start}
    at, lin = {n: t.detach() for n, t in tau.items()}, worker._own_lin
    _, slope = loss_and_gradients(worker, x, y)  # against autograd above
    _, pull = worker._own_penalty[1](at)
    sum((tau[n] * (slope[n] + 3 * pull[n])).sum() for n in tau).backward()
    worker.observe(x, y, plain)
    rate = worker.rate(0, 10)
    for n, f in factors.items():
        torch.testing.assert_close(f.detach(), leaves[n].detach() - rate * leaves[n].grad, rtol=1e-4, atol=1e-6)
    for n, p in worker.current_tau().items():
        assert torch.equal(p, start[n] + factors[f"B.{n}"] @ factors[f"A.{n}"]) and p.grad is None
    assert set(lin.places) == set(start)


def test_products_are_averaged_and_factors_sent(make, wire):
    """tau <- tau + sum_k p_k B_k A_k, which no mean of factors gives; each round from there, with new factors."""
    r = begin(make("--model task_arithmetic --lora_r 2", "--fl --num_clients 3 --num_comm_rounds 2"), 0)
    before = {n: p.detach().clone() for n, p in r.model.current_tau().items()}
    for k in range(2):
        r.round(0, k)
        sent = [w.reply for w in wire if w.call == "local_update" and w.round == k]
        total = sum(m["n_samples"] for m in sent)
        for n, p in r.model.current_tau().items():
            A, B, share = [m[f"A.{n}"] for m in sent], [m[f"B.{n}"] for m in sent], [m["n_samples"] for m in sent]
            want = before[n] + sum(s / total * b @ a for s, a, b in zip(share, A, B))
            torch.testing.assert_close(p.detach(), want, rtol=1e-5, atol=1e-7)
            factors = sum(s / total * b for s, b in zip(share, B)) @ sum(s / total * a for s, a in zip(share, A))
            assert float((want - before[n] - factors).norm()) > 0.1 * float((want - before[n]).norm())
            before[n] = p.detach().clone()
    assert not any(n.startswith("tau.") for m in sent for n in m)
    assert torch.linalg.matrix_rank(before["blocks.0.mlp.fc1.weight"]) > 6  # more than three clients' once


def test_penalty_joins_the_gradient_once_per_step(make):
    worker, x, y, plain = begun(make("--model tak --reg_lambda 3 --kfac_examples 5 --virtual_bs_n 2"))
    tau = {n: p.detach() for n, p in worker.current_tau().items()}
    loss, grads = loss_and_gradients(worker, x, y)
    value, pulls = worker._own_penalty[1](tau)
    assert value > 0
    steps = watch_steps(worker)
    worker.observe(x, y, plain)
    assert not steps  # the first of two batches
    worker.observe(x, y, plain)
    for n, g in grads.items():
        torch.testing.assert_close(steps[0][n], g + 3 * pulls[n], rtol=1e-4, atol=1e-6)


def test_penalty_is_the_drift_of_the_other_tasks(make, tmp_path):
    """Exact factors of full blocks: with a tau in one alone, tau^T F tau is the mean of |J tau|^2."""
    r = make("--model tak --kfac_draws 0 --fisher_norm_scaler 1 --alpha_share 0 --ft_attention 0 --ft_linears 0")
    worker, *_ = begun(r)
    name = "blocks.1.norm1.weight"
    tau = {n: torch.randn_like(p) if n == name else torch.zeros_like(p) for n, p in worker.current_tau().items()}
    value, _ = worker._own_penalty[1](tau)
    lin, total, n = worker._own_lin, 0.0, 0
    for t in range(1, 5):
        for x, _ in r.dataset.loader(r.dataset.task_indices(t), t, 64, False, split="train"):
            total, n = total + float(lin.expansion(x, [tau])[1][0].square().sum()), n + len(x)
    assert float(value) == pytest.approx(total / n, rel=1e-4)


def test_references(make):
    """All other tasks, or those before; one by one with eq. 7; none for the first of a sequence."""
    r = make("--model tak --kfac_draws 0 --kfac_examples 5")
    begin(r, 1)
    ((share, got),) = r.model.terms(r.clients(1))
    each = [r.model.factors(r.clients(1), t) for t in (0, 2, 3, 4)]
    want = kfac.References()
    for c in each:
        want.add(c)
    assert share == 1
    for n, t in want.mean().tensors().items():
        torch.testing.assert_close(got.tensors()[n], t, rtol=1e-3, atol=1e-5)
    past = make("--model tak --kfac_draws 0 --kfac_examples 5 --tak_refs past")
    begin(past, 0)
    assert past.model.terms(past.clients(0)) == []
    begin(past, 2)
    mean = past.model.terms(past.clients(2))[0][1]
    block = mean.layout.blocks[0].name
    torch.testing.assert_close(
        mean.B[block], each[0].B[block] / each[0].n + sum_of(past, 1, block), rtol=1e-4, atol=1e-6
    )
    ideal = make("--model tak --kfac_examples 5 --fisher_ideal 1")
    begin(ideal, 1)
    terms = ideal.model.terms(ideal.clients(1))
    assert len(terms) == 4 and sum(s for s, _ in terms) == pytest.approx(1)


def test_the_control_set_is_one_more_reference(make, tmp_path):
    """Alone with --tak_refs none; with the others its images count like theirs; read again from a shared folder."""
    flags = "--model tak --kfac_draws 0 --control_refs --control_dataset seq-glyphs --kfac_examples 5"
    alone = make(f"{flags} --tak_refs none --fisher_cache {tmp_path}")
    begin(alone, 1)
    ((_, got),) = alone.model.terms(alone.clients(1))
    model = alone.model
    control, rest, chosen = control_dataset(model)
    assert len({*rest.tolist(), *chosen.tolist()}) == len(control.train_labels) and len(rest) > 8 * len(chosen)
    own = model.factors(alone.clients(1), "control")
    used = []
    plain = type(control).loader
    with pytest.MonkeyPatch.context() as m:
        m.setattr(type(control), "loader", lambda self, i, *a, **k: used.append(i) or plain(self, i, *a, **k))
        model.of_control()
    assert len(used[0]) == 5 and set(used[0].tolist()) <= set(rest.tolist())
    x = next(iter(plain(control, used[0], 0, 5, False, split="train")))[0]
    want = kfac.curvature(model.net, model._own_layout, model.function, [x], 0)
    for n, t in own.tensors().items():
        torch.testing.assert_close(t, want.tensors()[n].to(t), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(got.tensors()[n], t / 5, rtol=1e-4, atol=1e-6)
    again = make(f"{flags} --tak_refs none --fisher_cache {tmp_path}").begin(0)
    again.model.of_control = lambda: pytest.fail("computed again")
    assert again.model.factors(again.clients(0), "control").n == 5
    both = make(f"{flags} --tak_refs past --fisher_cache {tmp_path}")
    begin(both, 1)
    block = model._own_layout.blocks[0].name
    ((_, sums),) = both.model.terms(both.clients(1))
    torch.testing.assert_close(sums.B[block], own.B[block] / 5 + sum_of(both, 0, block), rtol=1e-4, atol=1e-6)


def sum_of(r, task, block):
    c = r.model.factors(r.clients(task), task)
    return c.B[block] / c.n


@pytest.mark.parametrize("curvature", ["kfac", "diag"])
def test_factors_of_clients_add_up_to_those_of_all(make, curvature, tmp_path):
    flags = f"--model tak --curvature {curvature} --kfac_draws 0 --alpha_share 0 --fisher_cache {tmp_path}"
    one = make(f"{flags} --tak_refs past").begin(0)  # nothing is asked for yet
    many = make(f"{flags} --tak_refs past --fl --num_clients 3 --partition_mode iid").begin(0)
    a, b = (r.model.factors(r.clients(0), 2) for r in (one, many))
    assert a.n == b.n == len(one.dataset.task_indices(2))
    for n, t in a.tensors().items():
        torch.testing.assert_close(b.tensors()[n], t, rtol=1e-3, atol=1e-5)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # whose they are is part of what they belong to


def test_factors_are_read_again_and_belong_to_their_settings(make, monkeypatch):
    r = make("--model tak").begin(0)
    first = r.model.factors(r.clients(0), 1)
    monkeypatch.setattr(type(r.model), "curvature", lambda *a: pytest.fail("computed again"))
    again = r.model.factors(r.clients(0), 1)
    assert all(torch.equal(t, again.tensors()[n]) for n, t in first.tensors().items())
    names = {make(f"--model tak {more}").model.file(1)[0].name for more in ("", "--kfac_draws 2", "--seed 3")}
    names |= {make("--model tak --kfac_mode expand").model.file(1)[0].name, r.model.file(2)[0].name}
    assert len(names) == 5 and make("--model tak --lr 0.5").model.file(1)[0] == r.model.file(1)[0]


def test_some_of_the_images(make):
    for examples, n in (("0.25", lambda k: round(0.25 * k)), ("7", lambda k: 7), ("1", lambda k: k)):
        r = make(f"--model tak --tak_refs past --kfac_examples {examples}").begin(0)
        kept = len(r.worker.kept(r.engine.client(0, 1, -1, "x"))[0])
        assert r.model.factors(r.clients(0), 1).n == n(kept)


def test_rate_rises_then_falls(make):
    model = make("--model task_arithmetic").model
    got = [model.rate(s, 9) / 0.01 for s in range(9)]
    assert got[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert got[3:] == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 6)) for s in range(6)])


def test_classifier_is_the_mean_of_the_classes(make):
    r = begin(make("--model task_arithmetic --head_shots 0"), 1)
    rows_, lo = r.model.rows, 2
    for c in (2, 3):
        i = (r.dataset.train_labels == c).nonzero()[:, 0]
        x = next(iter(r.dataset.loader(i, 1, 1000, False, split="train")))[0]
        want = F.normalize(f_at(r.model, {}, x).mean(0), dim=0)
        torch.testing.assert_close(rows_[c], want, rtol=1e-4, atol=1e-5)
    assert not rows_[4:].any() and lo == r.model.n_past_classes
    few = begin(make("--model task_arithmetic --head_shots 1"), 1).model.rows[2]
    x = r.dataset.loader((r.dataset.train_labels == 2).nonzero()[:, 0], 1, 1000, False, split="train")
    f = f_at(r.model, {}, next(iter(x))[0])
    assert (f - few).norm(dim=1).min() < 1e-5  # one image's


def test_held_out_images_are_never_trained_on(make):
    r = make("--model task_arithmetic --fl --num_clients 2 --partition_mode iid --alpha_share 0.2").begin(0)
    for i in (0, 1):
        client = r.engine.client(i, 0, 0, "local_update")
        train, held = r.worker.kept(client)
        assert not set(train.tolist()) & set(held.tolist())
        assert sorted([*train.tolist(), *held.tolist()]) == sorted(client.indices.tolist())
        assert len(held) == pytest.approx(0.2 * client.n_samples, abs=2)
        other = r.worker.kept(r.engine.client(i, 0, 3, "held_out_right"))
        assert torch.equal(train, other[0])


# ---- the end of a run


def whole_run(make, flags):
    r = make(flags).run()
    return r, rows(r.record.path / "summary.csv")[0]


@pytest.mark.parametrize("flags", ["", "--regime full", "--regime attention --merging ties"])
def test_accuracies_in_the_end(make, flags):
    """alpha.csv against the network itself at theta_0 + alpha M; individual accuracies against tau_t alone."""
    r, summary = whole_run(make, f"--model task_arithmetic {flags} --alpha 0.7 --alpha_grid 0 1 0.5 --alpha_share 0.2")
    model, table = r.model, rows(r.record.path / "alpha.csv")
    assert [float(row["alpha"]) for row in table] == [0, 0.5, 0.7, 1]
    merged = merge(model.taus, model.args.merging, model.args.seed)
    linear = model.args.regime == "linear"

    def accuracy(tau, task):
        start, lo = model._own_lin.start(), model.get_offsets(task)[0]
        x, y = next(iter(r.dataset.loader(r.dataset.task_indices(task, False), task, 1000, False)))
        with torch.no_grad():
            f = model._own_lin(x, tau) if linear else f_at(model, {n: start[n] + t for n, t in tau.items()}, x)
        return 100 * float((logits(model, f, task).argmax(1) + lo == y).float().mean())

    alone = [accuracy(model.taus[t], t) for t in range(5)]
    assert float(summary["individual_acc"]) == pytest.approx(sum(alone) / 5, abs=0.3)
    for row in table:
        a = float(row["alpha"])
        accs = [accuracy({n: a * t for n, t in merged.items()}, t) for t in range(5)]
        assert float(row["absolute_acc"]) == pytest.approx(sum(accs) / 5, abs=0.3)
        assert [float(row[f"task_{t + 1}"]) for t in range(5)] == pytest.approx(accs, abs=1.5)
        assert float(row["normalized_acc"]) == pytest.approx(sum(100 * m / i for m, i in zip(accs, alone)) / 5, abs=0.5)
        if a == 0.7:
            assert summary["absolute_acc"] == row["absolute_acc"]
            assert float(summary["faa_task_il"]) == pytest.approx(float(row["absolute_acc"]), abs=0.3)
    best = next(row for row in table if float(row["alpha"]) == float(summary["best_alpha"]))
    assert best["absolute_acc"] == summary["absolute_acc_best"]
    assert (r.record.path / "alpha.png").read_bytes()[:4] == b"\x89PNG"


def test_best_coefficient_is_by_normalised_accuracy_of_what_was_held_out(make):
    model = make("--model task_arithmetic --alpha_grid 0 1 0.5").model
    model.held_out = {0: torch.tensor([5.0, 8, 2, 10, 10]), 1: torch.tensor([1.0, 0, 2, 2, 10])}
    assert best_coefficient(model) == 1.0  # 0.5 + 0.5, 0.8 + 0, 0.2 + 1
    model.held_out = {}
    assert best_coefficient(model) is None


def test_disentanglement_localisation_negation(make):
    flags = "--model tak --reg_lambda 1 --localisation --disentanglement 0 3 --control_dataset seq-digits"
    r, summary = whole_run(make, f"{flags} --alpha_grid 0 1 0.5 --kfac_examples 20")
    model = r.model
    taus = [model.taus[0], model.taus[3]]
    error = 0.0
    for i, t in enumerate((0, 3)):
        x = next(iter(r.dataset.loader(r.dataset.task_indices(t, False), t, 1000, False)))[0]
        both, alone = (model._own_lin(x, tau) for tau in (combined(taus, (1, 1)), taus[i]))
        error += float((logits(model, both, t).argmax(1) != logits(model, alone, t).argmax(1)).float().mean())
    assert float(summary["disentanglement_0_3"]) == pytest.approx(100 * error, abs=1)
    grid = rows(r.record.path / "disentanglement_0_3.csv")
    assert len(grid) == 169 and float(next(g for g in grid if g["a"] == g["b"] == "0.0")["error"]) == 0
    assert 0 < float(summary["localisation_auroc"]) <= 100
    assert float(summary["negation_control"]) > 0 and 0 <= float(summary["negation_alpha"]) <= 1
    assert float(summary["kfac_seconds"]) > 0


def test_sum_of_task_vectors_is_tested_as_they_come(make):
    r = make("--model task_arithmetic --stop_after 2").run()
    assert len(r.model.taus) == 2
    x = torch.randn(4, 1, 28, 28)
    want = r.model._own_lin(x, combined(r.model.taus, (1, 1)))
    torch.testing.assert_close(r.model(x), 20 * F.normalize(want, dim=1) @ r.model.rows.T)
    assert not (r.record.path / "alpha.csv").exists()  # only when all tasks are there


def test_single_task_has_no_penalty(make):
    r = make("--model tak --joint 1").begin(0)
    assert r.model.terms(r.clients(0)) == []


def test_tau_jp_adds_the_mean_length(make):
    r = make("--model tau_jp --jp_weight 2 --jp_strict 1 --jp_batch 4")
    worker, x, y, plain = begun(r)
    _, grads = loss_and_gradients(worker, x, y)
    shown, tau = [], {n: p.detach().clone() for n, p in worker.current_tau().items()}
    turn = worker._own_turn
    turn.references = [iter([shown[-1]]) for b in turn.references if shown.append(next(b)) is None]
    assert len(shown) == 4 and all(len(s) == 4 for s in shown)
    steps = watch_steps(worker)
    worker.observe(x, y, plain)
    h, name = 1e-2, "blocks.0.mlp.fc1.weight"
    direction = torch.randn_like(tau[name])

    def penalty(c):
        moved = {n: t + c * direction if n == name else t for n, t in tau.items()}
        return sum(float(worker._own_lin.expansion(s, [moved])[1][0].norm(dim=1).mean()) for s in shown) / 4

    slope = (penalty(h) - penalty(-h)) / (2 * h)
    got = float(((steps[0][name] - grads[name]) * direction).sum())
    assert got == pytest.approx(2 * slope, rel=2e-2)


# ---- flags


def test_groups():
    from torch import nn

    linear, norm, conv = nn.Linear(2, 2), nn.LayerNorm(2), nn.Conv2d(1, 1, 1)
    names = {
        "blocks.0.attn.qkv.weight": (linear, "attention"),
        "vision_model.encoder.layers.0.self_attn.q_proj.bias": (linear, "attention"),
        "blocks.0.mlp.fc1.weight": (linear, "linears"),
        "visual_projection.weight": (linear, "proj"),
        "norm.weight": (norm, "ln"),
        "cls_token": (nn.Module(), "class_embed"),
        "vision_model.embeddings.class_embedding": (nn.Module(), "class_embed"),
        "pos_embed": (nn.Module(), "pos_embed"),
        "vision_model.embeddings.position_embedding.weight": (nn.Embedding(2, 2), "pos_embed"),
        "patch_embed.proj.weight": (conv, "conv"),
    }
    for name, (module, group) in names.items():
        assert group_of(name, module) == group


def test_mistakes(make, tmp_path):
    for flags, said in (
        ("--model task_arithmetic --control_dataset seq-digit", "seq-digits"),
        ("--model task_arithmetic --control_dataset seq-digits --alpha_share 0", "give --alpha_share above 0"),
        ("--model tak --control_refs", "needs a --control_dataset"),
        ("--model tak --tak_refs none", "leaves nothing to hold still"),
        ("--model tak --ft_conv 1", "no curvature for patch_embed"),
        ("--model task_arithmetic --alpha_grid 1 0 0.1", "give first, last and step"),
        ("--model task_arithmetic --disentanglement 0 9", "pairs of tasks between 0 and 4"),
        ("--model task_arithmetic --localisation --regime full", "--localisation needs --regime linear"),
        ("--model task_arithmetic --regime attention --ft_attention 0", "nothing of --backbone vit-pocket would be"),
        ("--model tau_jp --regime full", "tau_jp needs --regime linear"),
        ("--model tau_jp --fl", "leave out --fl"),
        ("--model task_arithmetic --merging sum", "invalid choice"),
    ):
        with pytest.raises(UserError, match=said):
            make(flags)
    shared = f"--model tak --fisher_cache {tmp_path}"
    file = make(shared).model.file(1)[0]
    file.write_bytes(b"nothing")
    r = make(f"{shared} --tak_refs past").begin(0)
    with pytest.raises(UserError, match="cannot be read as curvature"):
        r.model.factors(r.clients(0), 1)


def test_federated_run(make, nano, tmp_path):
    argv = f"--model=tak --fl --num_clients=2 --num_comm_rounds=2 --partition_mode=iid {NET} {SHORT} --stop_after=2"
    assert run([*argv.split(), "--kfac_examples=8"], tmp_path) == 0
    table = rows(only_folder(tmp_path) / "traffic.csv")
    assert {r["call"] for r in table} == {"class_sums", "curvature", "local_update"}
    updates = [r for r in table if r["call"] == "local_update" and r["task"] == "1" and r["client"] == "0"]
    model = make("--model tak").model
    factors = sum(4 * t.numel() for t in kfac.packed(model.zeros()).values())
    assert [r["round"] for r in updates] == ["0", "1"]  # factors and classifier travel once a task
    saved = int(updates[0]["downlink_bytes"]) - int(updates[1]["downlink_bytes"])
    assert saved == pytest.approx(factors + 4 * 10 * model.net.feature_dim, rel=0.05)  # and headers
