"""SATA: closed forms on least squares, exactness after one round, and what a request touches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from federated.engines.base import LOST
from federated.engines.serial import SerialEngine
from models.sata import GRID, projection, removed
from utils.errors import RunError, UserError

NET = "--dataset seq-digits --backbone vit-pocket --pretrained 0 --device cpu --fl --num_clients 3"
SHORT = "--n_epochs 1 --batch_size 16 --lr 0.01 --optimizer adamw --warmup 3 --debug_mode 1"


@pytest.fixture
def make(rig, nano):
    return lambda flags="": rig(f"--model sata {SHORT} {flags}", NET)


def trained(r, rounds=1, tasks=1):
    """Rounds of the first tasks, up to the last round of the last of them."""
    for t in range(tasks):
        r.begin(t)
        for k in range(rounds):
            r.round(t, k)
        if t + 1 < tasks:
            r.end(t)
    return r


def tau(r):
    return {n: p.detach().clone() for n, p in r.model.current_tau().items()}


def forget(r, *who, task=0):
    r.model.unlearn(r.clients(task), list(who))
    return tau(r)


def close(a, b, tol=1e-6):
    assert set(a) == set(b)
    for n in a:
        torch.testing.assert_close(a[n], b[n].to(a[n]), rtol=tol, atol=tol)


# ---------------------------------------------------------------- the arithmetic


def vectors(k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(3, 2, generator=g).double(), "b": torch.randn(4, generator=g).double()} for _ in range(k)]


def test_one_round_of_means_is_undone():
    """T = 1: sum_k p_k tau_k without u, renormalised, is the mean of the others."""
    taus, p = vectors(4), [0.4, 0.3, 0.2, 0.1]
    mean = {n: sum(w * t[n] for w, t in zip(p, taus)) for n in taus[0]}
    others = {n: sum(w * t[n] for w, t in zip(p[1:], taus[1:])) / 0.6 for n in taus[0]}
    close(removed(mean, taus[:1], [0.4], [0.4], 1.0), others, 1e-12)
    with pytest.raises(ValueError, match="no client is left"):
        removed(mean, taus, p, p, 1.0)


def test_order_reversal_and_nothing():
    t, u, v = vectors(3)
    both = removed(t, [u, v], [0.2, 0.3], [0.2, 0.3], 1.0)
    one = removed(t, [u], [0.2], [0.2], 1.0)
    close(removed(one, [v], [0.3 / 0.8], [0.3 / 0.8], 1.0), both, 1e-12)  # v's share of those that were left
    close(removed(removed(t, [u], [1.0]), [v], [0.5]), removed(t, [v, u], [0.5, 1.0]), 1e-12)
    close(removed(removed(t, [u], [0.7]), [u], [-0.7]), t, 1e-12)
    assert all(torch.equal(x, t[n]) for n, x in removed(t, [u], [0.0]).items())
    zero = {n: torch.zeros_like(x) for n, x in t.items()}
    close(removed(t, [zero], [0.4], [0.4], 1.0), {n: x / 0.6 for n, x in t.items()}, 1e-12)


def test_projection_leaves_nothing_along_the_vector():
    t, u = vectors(2)
    rest = removed(t, [u], [projection(t, u)])
    assert sum(float((rest[n] * u[n]).sum()) for n in u) == pytest.approx(0, abs=1e-12)
    assert projection(t, {n: torch.zeros_like(x) for n, x in u.items()}) == 0


class Squares:
    """Federated least squares by gradient descent, in closed form: a local turn is tau -> M_k tau + b_k."""

    def __init__(self, designs, seed=0, eta=0.1, steps=10):
        rng = np.random.default_rng(seed)
        self.maps = []
        for J in designs:
            H, g = J.T @ J / len(J), J.T @ rng.normal(size=len(J)) / len(J)
            M = np.linalg.matrix_power(np.eye(J.shape[1]) - eta * H, steps)
            b = sum(np.linalg.matrix_power(np.eye(J.shape[1]) - eta * H, s) for s in range(steps)) @ (eta * g)
            self.maps.append((M, b))
        self.K = len(designs)

    def run(self, T, without=()):
        d = len(self.maps[0][1])
        tau, history = np.zeros(d), []
        keep = [k for k in range(self.K) if k not in without]
        for _ in range(T):
            updates = {k: self.maps[k][0] @ tau + self.maps[k][1] - tau for k in keep}
            history.append(updates)
            tau = tau + sum(updates.values()) / len(keep)
        return tau, history

    def isolated(self, u, T):
        iota = np.zeros(len(self.maps[u][1]))
        for _ in range(T):
            iota = self.maps[u][0] @ iota + self.maps[u][1]
        return iota


def test_closed_form_is_what_training_does():
    """P6: replaying affine maps without a client is training without it, step by step."""
    rng = np.random.default_rng(3)
    designs, eta, steps, T = [rng.normal(size=(8, 6)) for _ in range(4)], 0.1, 10, 7
    fed = Squares(designs, seed=5, eta=eta, steps=steps)
    noise = np.random.default_rng(5)
    targets = [noise.normal(size=len(J)) for J in designs]
    tau = torch.zeros(6, dtype=torch.float64)
    for _ in range(T):
        new = []
        for J, y in [*zip(designs, targets)][1:]:
            t, J, y = tau.clone().requires_grad_(), torch.tensor(J), torch.tensor(y)
            for _ in range(steps):
                (g,) = torch.autograd.grad((J @ t - y).square().mean() / 2, t)
                t = (t - eta * g).detach().requires_grad_()
            new.append(t.detach())
        tau = torch.stack(new).mean(0)
    assert np.abs(fed.run(T, [0])[0] - tau.numpy()).max() < 1e-13
    assert np.abs(fed.run(T)[0] - tau.numpy()).max() > 1e-3


def without(tau, iota, lam, p, rho):
    out = removed({"t": torch.tensor(tau)}, [{"t": torch.tensor(iota)}], [lam], [p], rho)
    return out["t"].numpy()


def test_the_error_is_zero_after_one_round_and_grows():
    rng = np.random.default_rng(1)
    fed, errors = Squares([rng.normal(size=(8, 6)) for _ in range(5)]), []
    for T in (1, 3, 20):
        gold, tau = fed.run(T, [0])[0], fed.run(T)[0]
        got = without(tau, fed.isolated(0, T), 0.2, 0.2, 1.0)
        errors.append(np.linalg.norm(got - gold) / np.linalg.norm(gold))
    assert errors[0] < 1e-12 < errors[1] < errors[2]


def test_disjoint_supports_ask_for_one():
    """J_u J_k^T = 0: at convergence the whole isolated vector is in tau, so lambda = 1 is retraining, p_u is not."""
    rng = np.random.default_rng(2)
    Q = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    designs = [rng.normal(size=(12, 3)) @ Q[3 * k : 3 * k + 3] for k in range(3)]
    fed, T = Squares(designs, eta=0.2), 4000
    gold, tau, iota = fed.run(T, [0])[0], fed.run(T)[0], fed.isolated(0, T)
    size = np.linalg.norm(gold)
    assert np.linalg.norm(without(tau, iota, 1.0, 1 / 3, 0.0) - gold) / size < 1e-6
    assert np.linalg.norm(without(tau, iota, 1 / 3, 1 / 3, 0.0) - gold) / size > 0.1
    assert np.abs(designs[1] @ iota).max() < 1e-9  # the others' outputs stay as they are


# ---------------------------------------------------------------- the method


def test_low_rank_works_on_products(make, wire):
    """--lora_r: one round is undone exactly, by products; what is isolated outgrows the rank of a turn."""
    r = trained(make("--preset exact1 --lora_r 2"))
    replies = {w.client: w.reply for w in wire if w.call == "local_update"}
    n = {k: m["n_samples"] for k, m in replies.items()}
    for name, t in forget(r, 1).items():
        want = sum(n[k] * replies[k][f"B.{name}"] @ replies[k][f"A.{name}"] for k in (0, 2)) / (n[0] + n[2])
        torch.testing.assert_close(t, want, rtol=1e-5, atol=1e-6)
    r = trained(make("--sata_source fed_history --lora_r 2"), rounds=2)
    before, mine = tau(r), [w.reply for w in wire if w.call == "local_update" and w.client == 1][-2:]
    share = n[1] / sum(n.values())
    steps = {i: share * sum(m[f"B.{i}"] @ m[f"A.{i}"] for m in mine) for i in before}
    close(forget(r, 1), removed(before, [steps], [1.0]), 1e-5)
    assert not any(s.get("iso") for s in r.states.values()), "nobody asks for it"
    iota = trained(make("--lora_r 2"), rounds=2).states[0]["iso"][0]["blocks.0.mlp.fc1.weight"]
    assert torch.linalg.matrix_rank(iota) == 4


@pytest.mark.parametrize("custody", ["client", "server"])
def test_one_round_is_undone_exactly(make, wire, custody):
    """Both vectors are the same after a round; taking out p_u of it leaves the mean of the others."""
    r = trained(make(f"--preset exact1 --iso_custody {custody}"))
    replies = {w.client: w.reply for w in wire if w.call == "local_update"}
    n = {k: m["n_samples"] for k, m in replies.items()}
    if custody == "client":
        for k, m in replies.items():
            close({f"tau.{i}": t for i, t in r.states[k]["iso"][0].items()}, m.tensors(""), 0)
            assert not m.tensors("iso.")
    got = forget(r, 1)
    for name, t in got.items():
        want = sum(n[k] * replies[k][f"tau.{name}"] for k in (0, 2)) / (n[0] + n[2])
        torch.testing.assert_close(t, want, rtol=1e-5, atol=1e-6)
    asked = [w for w in wire if w.call == "isolated_vector"]
    assert [w.client for w in asked] == ([1] if custody == "client" else [])


def test_outputs_are_what_is_left_of_the_ensemble(make, wire):
    """In the tangent, removing u removes p_u (f_lin(tau_u) - f) from the features of every image."""
    r = trained(make("--sata_lambda p"))
    replies = {w.client: w.reply for w in wire if w.call == "local_update"}
    n, lin = {k: m["n_samples"] for k, m in replies.items()}, r.model._own_lin
    x = next(iter(r.dataset.loader(r.dataset.task_indices(0, False), 0, 20, False)))[0]
    before = lin(x, tau(r))
    u = {i: replies[1][f"tau.{i}"] for i in tau(r)}
    change = lin(x, forget(r, 1)) - before
    share = n[1] / sum(n.values())
    torch.testing.assert_close(change, -share * (lin(x, u) - lin.output(x)), rtol=1e-4, atol=1e-5)


def test_the_isolated_vector_goes_on_from_itself(make):
    """Round after round from its own last value, whatever the server sends; on request: nothing before."""
    r = trained(make(), rounds=2)
    alone = make()
    alone.partition = alone.partition.without([0, 2])
    trained(alone, rounds=2)
    alone_tau = tau(alone)
    if torch.equal(alone.model.rows, r.model.rows):  # the classifier is everyone's
        close(r.states[1]["iso"][0], alone_tau, 1e-5)
    later = trained(make("--iso_schedule on_request --iso_epochs 2"))
    assert not any(s.get("iso") for s in later.states.values())
    before = tau(later)
    after = forget(later, 1)
    assert later.states[1]["iso"][0] and not later.states.get(0, {}).get("iso")
    close(after, removed(before, [later.states[1]["iso"][0]], [1.0]))
    once = trained(make("--iso_schedule once --iso_epochs 1"), rounds=2)
    first = trained(make("--iso_schedule once --iso_epochs 1"), rounds=1)
    close(once.states[1]["iso"][0], first.states[1]["iso"][0], 0)
    kept = trained(make("--iso_schedule once --iso_epochs 1 --iso_custody server"), rounds=2)
    close(kept.model.stored[0][1], first.states[1]["iso"][0], 0)


def test_its_part_of_the_classifier_goes_exactly(make):
    """Rows are those of the others' images; of a class that nobody else has nothing is left."""
    r = trained(make("--partition_mode quantity --class_quantity 1"))
    alone = make("--partition_mode quantity --class_quantity 1")
    alone.partition = alone.partition.without([1])
    alone.begin(0)
    forget(r, 1)
    torch.testing.assert_close(r.model.rows, alone.model.rows, rtol=1e-5, atol=1e-6)
    kept = make("--sata_head 0 --partition_mode quantity --class_quantity 1")
    trained(kept)
    before = kept.model.rows.clone()
    forget(kept, 1)
    assert torch.equal(kept.model.rows, before)


def test_history_as_the_source(make, wire):
    r = trained(make("--sata_source fed_history"), rounds=2)
    before, n = tau(r), {w.client: w.reply["n_samples"] for w in wire if w.call == "local_update"}
    sent = {w.round: w.message for w in wire if w.call == "local_update"}
    mine = {w.round: w.reply for w in wire if w.call == "local_update" and w.client == 1}
    share = n[1] / sum(n.values())
    steps = {i: share * sum(mine[k][f"tau.{i}"] - sent[k][f"tau.{i}"] for k in (0, 1)) for i in before}
    close(forget(r, 1), removed(before, [steps], [1.0]), 1e-5)


def test_lambda_by_held_out_images(make):
    """The lowest accuracy on the leaving client's images that leaves 95 % of the others', by trying them all."""
    r = trained(make("--sata_lambda val --alpha_share 0.3"), rounds=2)
    before, model = tau(r), r.model
    iota = copy.deepcopy(r.states[1]["iso"][0])
    lo, hi = model.get_offsets(0)

    def right(client_id, t):
        client = r.engine.client(client_id, 0, -1, "x")
        held = r.worker.kept(client)[1]
        x, y = next(iter(r.dataset.loader(held, 0, 500, False, split="train")))
        f = F.normalize(model._own_lin(x, t), dim=1)
        return int(((20 * f @ rows_after[lo:hi].T).argmax(1) == y - lo).sum()), len(y)

    after = forget(r, 1)
    rows_after = model.rows
    table = []
    for lam in GRID:
        t = removed(before, [iota], [lam])
        control = [right(k, t) for k in (0, 2)]
        table.append((sum(c for c, _ in control) / sum(n for _, n in control), right(1, t)[0]))
    allowed = [i for i, (c, _) in enumerate(table) if c >= 0.95 * table[0][0]]
    best = max(allowed, key=lambda i: (-table[i][1], i))
    close(after, removed(before, [iota], [GRID[best]]), 1e-5)


def test_tasks_that_are_over_are_cleaned_too(make):
    r = trained(make("--alpha_share 0"), tasks=2)
    first, second = copy.deepcopy(r.model.taus[0]), tau(r)
    iso = copy.deepcopy(r.states[1]["iso"])
    forget(r, 1, task=1)
    close(r.model.taus[0], removed(first, [iso[0]], [1.0]))
    close(tau(r), removed(second, [iso[1]], [1.0]))


def test_a_client_without_samples_in_a_task(make):
    """Only the task it had images of changes, and shares of the other do not count it."""
    r = make("--preset exact1 --alpha_share 0")
    r.partition.tasks[1][1] = r.partition.tasks[1][1][:0]
    trained(r, tasks=2)
    taus, second = copy.deepcopy(r.model.taus), tau(r)
    sizes, iota = dict(enumerate(r.partition.sizes(0))), copy.deepcopy(r.states[1]["iso"])
    assert set(iota) == {0} and set(r.model.sizes[1]) == {0, 2}
    forget(r, 1, task=1)
    p = sizes[1] / sum(sizes.values())
    close(r.model.taus[0], removed(taus[0], [iota[0]], [p], [p], 1.0), 1e-5)
    close(tau(r), second, 0)


def lose(monkeypatch, call, *who):
    """The engine gets no answer of some clients to a call."""
    plain = SerialEngine.run

    def run(self, name, message, ids, task, round_):
        for client, reply in plain(self, name, message, ids, task, round_):
            yield client, LOST if name == call and client in who else reply

    monkeypatch.setattr(SerialEngine, "run", run)


def test_clients_that_are_lost_during_the_request(make, monkeypatch):
    """Those that stay are not needed; of one that leaves without its vector nothing is guessed."""
    r = trained(make("--preset exact1"))
    before, iota, n = tau(r), copy.deepcopy(r.states[1]["iso"][0]), r.partition.sizes(0)
    p = r.model.sizes[0][1] / sum(r.model.sizes[0].values())
    r.partition.tasks[0][0] = r.partition.tasks[0][0][:0]  # client 0 does not answer to anything any more
    close(forget(r, 1), removed(before, [iota], [p], [p], 1.0), 1e-5)
    assert len(n) == 3
    r = trained(make("--preset exact1 --sata_head 0"))
    before = tau(r)
    with monkeypatch.context() as m:
        lose(m, "isolated_vector", 1)
        with pytest.raises(RunError, match="client 1 cannot be reached"):
            forget(r, 1, 2)
        with pytest.raises(RunError, match="no client is left .*isolated_vector"):
            forget(r, 1)
        close(tau(r), before, 0)  # as if nothing had been asked
        kept = trained(make("--preset exact1 --sata_head 0 --iso_custody server"))
        close(forget(kept, 1), removed(before, [iota], [p], [p], 1.0), 1e-5)


def test_a_client_that_was_lost_when_it_was_to_isolate(make, monkeypatch):
    """It is asked again in the next round where once is enough; of one that has no vector nothing is guessed."""
    r = make("--preset exact1 --iso_schedule once")
    with monkeypatch.context() as m:
        lose(m, "isolated_update", 1)
        r.begin(0).round(0, 0)
    assert r.model.sizes[0].keys() == {0, 1, 2} and r.model.isolating == {0: [0, 2]}
    before = tau(r)
    with pytest.raises(RunError, match="client 1 has trained no isolated vector in task 0"):
        forget(r, 1)
    close(tau(r), before, 0)
    r.round(0, 1)
    assert r.model.isolating == {0: [0, 1, 2]}
    assert [(row["client"], row["round"]) for row in r.ledger.rows() if row["call"] == "isolated_update"] == [
        (0, 0),
        (2, 0),
        (1, 1),
    ]
    forget(r, 1)
    assert r.model.isolating == {0: [0, 2]}


def test_rounds_after_the_last_change_its_vector(make):
    """A client that trains on once all is over, as when it learns again what was forgotten."""
    r = trained(make("--alpha_share 0"), tasks=2)
    r.end(1)
    first, second, x = copy.deepcopy(r.model.taus[0]), copy.deepcopy(r.model.taus[1]), torch.rand(4, 1, 28, 28)
    forget(r, 1, task=1)
    gone = copy.deepcopy(r.model.taus[1])
    said = r.model(x)
    r.model._current_task = 1
    r.model.more_rounds(r.clients(1, ids=[1]), 1, "relearn")
    assert not torch.allclose(r.model(x), said)
    close(r.model.taus[0], removed(first, [r.states[1]["iso"][0]], [1.0]), 1e-5)
    assert all(n in second and not torch.equal(t, gone[n]) for n, t in r.model.taus[1].items() if t.abs().sum() > 0)


def test_mistakes(make):
    for flags, said in (
        ("--iso_custody server --iso_schedule on_request", "nothing to keep"),
        ("--merging ties", "leave --merging at ta"),
        ("--sata_lambda two", "invalid choice"),
    ):
        with pytest.raises(UserError, match=said):
            make(flags)
    r = trained(make("--sata_lambda val --alpha_share 0"))
    with pytest.raises(UserError, match="give --alpha_share above 0"):
        forget(r, 1)
