"""The offline stage of LIVAR: Shapley values against their definition, weights against a grid, and a whole run."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch

from federated.message import Message
from utils import livar_fit_rule
from utils.livar_fit_rule import best_weights, fit, ranks, shapley, table_of


def test_shapley_values_by_their_definition():
    """Mean marginal contribution over the orders in which inputs become known; base + sum = f(x)."""
    rng = np.random.default_rng(0)
    x, background = rng.random((7, 2)), rng.random((40, 2))

    def f(z):
        return np.sin(3 * z[:, 0]) * z[:, 1] + z[:, 0] ** 2

    def v(point, known):
        z = background.copy()
        for i in known:
            z[:, i] = point[i]
        return f(z).mean()

    base, phi = shapley(f, x, background)
    assert np.allclose(base + phi.sum(1), f(x), atol=1e-12)
    for point, found in zip(x, phi, strict=True):
        expected = np.zeros(2)
        for order in permutations(range(2)):
            known = []
            for i in order:
                expected[i] += (v(point, [*known, i]) - v(point, known)) / 2
                known.append(i)
        assert np.allclose(found, expected)


def test_ranks():
    assert ranks(torch.tensor([[5.0, 1.0], [3.0, 9.0]])).tolist() == [[2 / 3, 0], [1 / 3, 1]]
    assert ranks(torch.tensor([[2.0, 2.0, 7.0]])).tolist() == [[0.25, 0.25, 1.0]]


def test_cells_of_the_table():
    x = np.array([[0.1, 0.1], [0.3, 0.7], [0.9, 0.9], [0.8, 0.95]])
    phi = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [5.0, 50.0]])
    assert table_of(x, phi, 100.0) == [[100 + b + a for a in (1, 2, 4)] for b in (10, 20, 40)]
    assert table_of(x, -phi, 0.0) == [[1e-6] * 3] * 3


def test_an_additive_rule_is_found():
    """Weights that are steps of the two ranks come out cell by cell."""
    rng = np.random.default_rng(1)
    x = rng.random((3000, 2))
    step = np.where(x[:, 1] > 0.8, 0.1, np.where(x[:, 1] < 0.6, 0.0, 0.05)) - np.where(x[:, 0] > 0.5, 0.02, 0.0)
    table = np.array(fit(x, 0.1 + step))
    expected = 0.1 + np.array([[0.0], [0.05], [0.1]]) - np.array([[0.0, 0.0, 0.02]])
    assert np.abs(table - expected).max() < 0.01


def test_the_best_weights_pick_the_useful_client(rig, nano):
    """One client's update helps, another's harms: no mixture of the two that is the same in all layers does better,
    by materialised weights, and the server is left as it was."""
    flags = "--model livar --fl --num_clients 2 --num_comm_rounds 1 --n_epochs 2 --lora_r 2 --joint 1 --lr 0.005"
    r = rig(f"{flags} --optimizer adam", rig.POCKET).begin(0)
    reply = r.clients(0, 0).call("local_update", r.model.broadcast())[0]
    noise = {n: t + 0.1 * torch.randn_like(t) if n.startswith("lora") else t for n, t in reply.tensors().items()}
    r.model.aggregate([reply, Message({**reply, **noise})])
    before = r.weights
    indices = r.dataset.task_indices(0, train=True)[:48]
    images, labels = next(iter(r.dataset.loader(indices, 0, 48, train=False, split="train")))
    factors = [{n: (x[f["A"]], x[f["B"]]) for n, f in r.model._own_names.items()} for x in (reply, noise)]
    y = best_weights(r.model, factors, images, labels, steps=40)
    torch.testing.assert_close(y.sum(0), torch.ones(12))
    assert all(torch.equal(t, before[n]) for n, t in r.weights.items())

    @torch.no_grad()
    def loss(y):
        layers = enumerate(factors[0])
        r.model.show({n: sum(w * f[n][1] @ f[n][0] for w, f in zip(y[:, i], factors, strict=True)) for i, n in layers})
        r.model.net.eval()
        return float(torch.nn.functional.cross_entropy(r.model.net(images)[:, :10], labels))

    others = [loss(torch.tensor([[1 - a], [a]]).expand(2, 12)) for a in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert loss(y) < min(others) < others[3]


@pytest.mark.slow
def test_from_a_proxy_to_a_run(tmp_path, capsys, nano):
    import main
    from tests.helpers import only_folder, rows

    small = "--num_clients 3 --num_comm_rounds 1 --n_epochs 1 --debug_mode 1 --lora_r 2 --pretrained 0 --device cpu"
    file = tmp_path / "rule.json"
    argv = f"--out {file} --server_images 40 --dataset seq-digits {small}".split()
    assert livar_fit_rule.main(argv) == 0
    rule = json.loads(file.read_text())
    assert np.array(rule["table"]).shape == (3, 3) and rule["points"] == 3 * 12
    flags = f"--model livar --livar_rule fitted:{file} --joint 1 --fl --dataset seq-digits {small}".split()
    assert main.main([*flags, f"--results_path={tmp_path}"]) == 0
    assert rows(only_folder(tmp_path) / "summary.csv")[0]["status"] == "finished"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--out", "/nowhere/x.json", "--dataset", "seq-digits"], "folder does not exist"),
        (["--out", "x.json", "--dataset", "seq-digits", "--server_images", "0"], "give 1 or more"),
        (["--out", "x.json", "--dataset", "seq-dijits"], "did you mean"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys):
    assert livar_fit_rule.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
