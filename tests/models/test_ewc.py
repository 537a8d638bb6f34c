"""Federated EWC: one Fisher matrix of all clients' data, by a loop over images; the penalty by hand; what travels."""

import pytest
import torch
import torch.nn.functional as F

from tests.federated.test_batched_engine import in_double

SHORT = "--fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 16 --debug_mode 1 --distribution_alpha 0.5"
SGD = "--optimizer sgd --lr 0.05"
EWC = f"--model ewc {SHORT} {SGD}"


def fisher_by_loop(r, task):
    """mean_x p(y|x) (grad log p(y|x))^2 over all training images of a task under the server's network."""
    start, end = r.dataset.get_offsets(task)
    indices = r.dataset.task_indices(task, train=True)
    x, y = next(iter(r.dataset.loader(indices, task, 10000, train=False, split="train")))
    net, total = r.model.net.eval(), None
    for i in range(len(y)):
        logp = F.log_softmax(net(x[i : i + 1])[:, start:end], 1)[0, y[i] - start]
        grads = torch.autograd.grad(logp, list(net.parameters()))
        mine = [float(logp.detach().exp()) * g.square() for g in grads]
        total = mine if total is None else [a + b for a, b in zip(total, mine)]
    return {n: t / len(y) for (n, _), t in zip(net.named_parameters(), total)}


def test_fisher_is_that_of_all_data_and_decays(rig):
    r = in_double(rig(f"{EWC} --gamma 0.6", rig.MLP))
    r.begin(0).round(0, 0).end(0)
    first = fisher_by_loop(r, 0)
    for n, f in first.items():
        torch.testing.assert_close(r.model.fish[n], f, rtol=1e-8, atol=1e-15)
        assert torch.equal(r.model.checkpoint[n], r.weights[n])
    r.begin(1).round(1, 0).end(1)
    second = fisher_by_loop(r, 1)
    for n, f in second.items():
        torch.testing.assert_close(r.model.fish[n], 0.6 * first[n] + f, rtol=1e-8, atol=1e-15)
        assert torch.equal(r.model.checkpoint[n], r.weights[n])


def test_gradient_of_the_penalty(rig):
    """2 e_lambda F (theta - theta*), added to the loss's own."""
    r = rig(f"{EWC} --e_lambda 3", rig.MLP).begin(0).round(0, 0).end(0)
    r.begin(1)
    worker = r.worker
    worker.enter_task(1)
    message = r.model.broadcast()
    worker.load(message)
    worker.before_local(message, None)
    moved = {n: (p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for n, p in worker.trainable().items()}
    grads = torch.autograd.grad(worker.local_penalty(moved, None), list(moved.values()))
    assert max(float(g.abs().max()) for g in grads) > 0
    for (n, p), g in zip(moved.items(), grads):
        torch.testing.assert_close(g, 6 * r.model.fish[n] * (p - r.model.checkpoint[n]), rtol=1e-5, atol=1e-9)


def test_the_first_task_is_fedavg_and_the_second_is_not(rig):
    a = rig(f"{EWC} --e_lambda 1000 --stop_after 1", rig.MLP).run()
    b = rig(f"--model fedavg {SHORT} {SGD} --stop_after 1", rig.MLP).run()
    assert all(torch.equal(t, b.weights[n]) for n, t in a.weights.items())
    free, held = (rig(f"{EWC} --e_lambda {v} --stop_after 2", rig.MLP).run() for v in (0, 1000))
    far = [sum(float((r.model.checkpoint[n] - a.weights[n]).square().sum()) for n in a.weights) for r in (free, held)]
    assert 0 < far[1] < far[0]  # theta* of task 2 lies nearer to that of task 1


def test_fisher_and_anchor_travel_once_per_task(rig, wire):
    r = rig(f"{EWC} --stop_after 2", rig.MLP).run()
    size = sum(4 * p.numel() for p in r.model.net.parameters())
    rows = [row for row in r.ledger.rows() if row["client"] == 1]
    down = [(row["task"], row["call"], round(row["downlink_bytes"] / size)) for row in rows]
    train, measure = "local_update", "fisher_sum"
    assert down == [
        *[(0, train, 1)] * 2,
        (0, measure, 1),
        (1, train, 3),  # weights, F and theta*
        (1, train, 1),
        (1, measure, 1),
    ]
    assert [round(row["uplink_bytes"] / size) for row in rows] == [1] * 6


def test_head_rows_are_not_held(rig):
    r = rig(f"--model ewc --preset lora {SHORT} {SGD} --stop_after 2").run()
    assert r.model.fish and all(n.startswith("lora.") for n in r.model.fish)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("engine", ["batched --clients_per_batch 3"])
def test_clients_stack(rig, engine):
    flags = f"--model ewc --preset lora --e_lambda 50 {SHORT} {SGD} --stop_after 2"
    a, b = in_double(rig(flags)).run(), in_double(rig(f"{flags} --engine {engine}")).run()
    for n, t in a.model.fish.items():
        torch.testing.assert_close(t, b.model.fish[n], rtol=1e-7, atol=1e-14)
