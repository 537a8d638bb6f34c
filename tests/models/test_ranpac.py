"""RanPAC: ridge regression on random features against numpy, however the data is divided."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from federated.message import Message
from models.ranpac import RIDGES, best_ridge, ridge_solution, squared_error
from models.utils.gpm import pack_triu
from tests.federated.test_batched_engine import in_double
from utils.errors import RunError, UserError

SHORT = "--fl --num_clients 4 --num_comm_rounds 1 --n_epochs 1 --batch_size 32 --debug_mode 1 --stop_after 2"
PLAIN = f"--model ranpac --petl none --rp_size 40 {SHORT}"


def random_features(r, task):
    """h and one-hot labels of all training images of tasks up to ``task``, in numpy."""
    H, Y = [], []
    for t in range(task + 1):
        x, y = next(
            iter(r.dataset.loader(r.dataset.task_indices(t, train=True), t, 100000, train=False, split="train"))
        )
        with torch.no_grad():
            f = r.model.net.features(x).double()
        H.append((f @ r.model.projection(f)).clamp(min=0).numpy())
        Y.append(np.eye(10)[y.numpy()][:, : 2 * (task + 1)])
    return np.concatenate(H), np.concatenate(Y)


@pytest.mark.parametrize("split", ["--distribution_alpha 0.5", "--partition_mode iid --num_clients 2", "--seed 0"])
def test_clients_sums_give_the_solution_of_all_data(rig, split):
    r = in_double(rig(f"{PLAIN} --ridge 3 {split}")).run()
    H, Y = random_features(r, 1)
    expected = np.linalg.solve(H.T @ H + 3 * np.eye(40), H.T @ Y)
    np.testing.assert_allclose(r.model.readout.numpy(), expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    x, _ = next(iter(r.dataset.loader(r.dataset.task_indices(1, train=False), 1, 50, train=False)))
    with torch.no_grad():
        z = r.model(x.double())
        h = (r.model.net.features(x.double()) @ r.model.projection(z)).clamp(min=0)
    np.testing.assert_allclose(z[:, :4].numpy(), h.numpy() @ expected, rtol=1e-6, atol=1e-9)
    assert (z[:, 4:] == -math.inf).all() and z.shape[1] == 10


def test_both_parts_together_are_all_samples(rig):
    """lambda chosen: what is sent in two parts adds up to the G and Q of all samples."""
    r = in_double(rig(PLAIN)).run()
    H, Y = random_features(r, 1)
    torch.testing.assert_close(r.model.gram, pack_triu(torch.tensor(H.T @ H)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(r.model.cross[:, :4], torch.tensor(H.T @ Y), rtol=1e-9, atol=1e-9)


def test_the_ridge_that_predicts_the_rest_best():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(30, 3))
    H, V = rng.normal(size=(40, 30)), rng.normal(size=(25, 30))
    Y, U = H @ W + 4 * rng.normal(size=(40, 3)), V @ W + 4 * rng.normal(size=(25, 3))
    errors = {}
    for ridge in RIDGES:
        sol = np.linalg.solve(H.T @ H + ridge * np.eye(30), H.T @ Y)
        errors[ridge] = ((U - V @ sol) ** 2).sum()
        torch.testing.assert_close(
            ridge_solution(torch.tensor(H.T @ H), torch.tensor(H.T @ Y), ridge), torch.tensor(sol)
        )
    fit = torch.tensor(H.T @ H), torch.tensor(H.T @ Y)
    rest = torch.tensor(V.T @ V), torch.tensor(V.T @ U), float((U**2).sum())
    assert len(set(errors.values())) == 17 and best_ridge(fit, rest) == min(errors, key=errors.get) == 10.0
    sol = ridge_solution(*fit, 10.0)
    assert squared_error(sol, *rest) == pytest.approx(errors[10.0], rel=1e-9)


def test_ridges_that_break_down_are_passed_over():
    G = torch.diag(torch.tensor([1e12, 1e12, -1e-3]))  # rounding has made it indefinite
    assert ridge_solution(G, torch.ones(3, 1), 1e-8) is None
    assert best_ridge((G, torch.ones(3, 1)), (torch.eye(3), torch.ones(3, 1), 1.0)) >= 1e-2
    with pytest.raises(RunError, match="no ridge"):
        best_ridge((torch.full((2, 2), math.nan), torch.ones(2, 1)), (torch.eye(2), torch.ones(2, 1), 1.0))


def test_the_mean_of_solutions_is_another(rig):
    """Each client's own ridge regression, weighted by its samples; here one that has one class alone each."""
    flags = f"{PLAIN} --ridge 3 --partition_mode quantity --class_quantity 1 --stop_after 1"
    exact, mean = (in_double(rig(f"{flags} --ranpac_agg {a}")).run() for a in ("stats", "average"))
    H, Y = random_features(mean, 0)
    owner, total = np.zeros((40, 2)), 0
    order = mean.dataset.task_indices(0, train=True).tolist()
    for i in range(4):
        mine = [order.index(j) for j in mean.partition.indices(0, i).tolist()]
        h, y = H[mine], Y[mine]
        owner += len(mine) * np.linalg.solve(h.T @ h + 3 * np.eye(40), h.T @ y)
        total += len(mine)
    np.testing.assert_allclose(mean.model.readout.numpy(), owner / total, rtol=1e-6, atol=1e-9)
    far = (mean.model.readout - exact.model.readout).norm() / exact.model.readout.norm()
    assert far > 0.1


def test_mean_of_solutions_keeps_each_clients_past(rig):
    r = in_double(rig(f"{PLAIN} --ridge 3 --ranpac_agg average --num_clients 1 --partition_mode iid")).run()
    H, Y = random_features(r, 1)
    expected = np.linalg.solve(H.T @ H + 3 * np.eye(40), H.T @ Y)
    np.testing.assert_allclose(r.model.readout.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("petl", ["adapter", "ssf", "vpt"])
def test_only_the_first_task_trains_and_its_adapter_travels_once(rig, wire, petl):
    r = rig(f"--model ranpac --petl {petl} --rp_size 12 --lr 0.05 {SHORT} --optimizer sgd")
    before = {n: p.detach().clone() for n, p in r.model.adapted().items()}
    pretrained = r.weights
    r.run()
    after = {n: p.detach() for n, p in r.model.adapted().items()}
    assert any(not torch.equal(before[n], t) for n, t in after.items() if n.startswith("petl."))
    assert any(not torch.equal(before[n], t) for n, t in after.items() if n.startswith("cosine."))
    assert all(torch.equal(t, pretrained[n]) for n, t in r.weights.items())
    assert [(w.call, w.task) for w in wire if w.client == 0] == [
        ("local_update", 0),
        ("statistics", 0),
        ("statistics", 1),
    ]
    size = 4 * sum(t.numel() for n, t in after.items() if n.startswith("petl."))
    first, second = (w for w in wire if w.client == 0 and w.call == "statistics")
    rows = [row for row in r.ledger.rows() if row["client"] == 0 and row["call"] == "statistics"]
    assert rows[0]["downlink_bytes"] > size > rows[1]["downlink_bytes"]
    for n, t in after.items():
        if n.startswith("petl."):
            assert torch.equal(second.message[f"frozen.{n}"], t)
            assert torch.equal(r.worker.adapted()[n], t)


def test_cosine_classifier_by_hand(rig):
    r = rig(f"--model ranpac --rp_size 12 {SHORT}")
    x, y = next(iter(r.dataset.loader(r.dataset.task_indices(0, train=True), 0, 8, train=False, split="train")))
    with torch.no_grad():
        r.model.cosine.sigma.fill_(2.5)
        f, w = r.model.net.features(x).double(), r.model.cosine.weight.double()
        z = torch.tensor([[2.5 * float(a @ b / a.norm() / b.norm()) for b in w] for a in f])
        assert z.shape == (8, 2)  # the first task's classes
        torch.testing.assert_close(r.model.task_logits(x), z, rtol=1e-4, atol=1e-5)
        loss = r.model.local_loss(x, y, None)
        torch.testing.assert_close(loss, F.cross_entropy(z, y, reduction="none"), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(r.model(x)[:, :2], z, rtol=1e-4, atol=1e-5)  # until there is a solution


def test_same_classes_again_add_up(rig):
    """Domain-IL: the second task's Q belongs to the first one's columns."""
    r = in_double(rig(f"{PLAIN} --ridge 3"))
    r.model._n_past_classes, r.model._n_seen_classes = 0, 10
    H, Y = torch.randn(30, 40, dtype=torch.float64), F.one_hot(torch.arange(30) % 10, 10).double()
    halves = [
        Message({"gram.fit": pack_triu(h.T @ h), "cross.fit": h.T @ y}, n_rest=0, n_samples=15)
        for h, y in ((H[:15], Y[:15]), (H[15:], Y[15:]))
    ]
    gram, cross, _ = r.model.solve(halves[0], {})
    _, _, W = r.model.solve(halves[1], {"gram": gram, "cross": cross})
    torch.testing.assert_close(W, torch.linalg.solve(H.T @ H + 3 * torch.eye(40), H.T @ Y))


def test_rounding_in_the_sum_over_tasks_raises_the_ridge(rig):
    """A sum that has lost a little of its definiteness: the next ridge that works, said, unless one was given."""
    H, Y = torch.randn(30, 40, dtype=torch.float64), F.one_hot(torch.arange(30) % 10, 10).double()
    part = {"gram.fit": pack_triu(H.T @ H), "cross.fit": H.T @ Y}
    v = F.normalize(torch.linalg.svd(H).Vh[-1], dim=0)  # seen by no sample
    lost = pack_triu(-5.0 * torch.outer(v, v))
    for ridge, outcome in (("", None), ("--ridge 3", RunError)):
        r = in_double(rig(f"{PLAIN} {ridge}"))
        r.model._n_past_classes, r.model._n_seen_classes = 0, 10
        known = {"gram": lost, "cross": torch.zeros(40, 10, dtype=torch.float64)}
        reply = Message(part, n_rest=0, n_samples=30)
        if outcome:
            with pytest.raises(outcome, match="raise --ridge"):
                r.model.solve(reply, known)
            continue
        with pytest.warns(UserWarning, match="lambda is 10"):
            _, _, W = r.model.solve(reply, known)
        G = H.T @ H - 5 * torch.outer(v, v) + 10 * torch.eye(40)
        torch.testing.assert_close(W, torch.linalg.solve(G, H.T @ Y))


def test_wrong_settings(rig):
    with pytest.raises(UserError, match="--petl none"):
        rig("--model ranpac --fl", rig.MLP)
    for flags in ("--ridge 0", "--ridge lots", "--rp_size -1", "--petl lora"):
        with pytest.raises(UserError):
            rig(f"--model ranpac --fl {flags}")
