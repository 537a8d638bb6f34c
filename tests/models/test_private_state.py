import copy
import warnings

import pytest
import torch
from torch import nn

from models.fedavg import FedAvg
from models.sgd import Sgd
from models.utils.continual_model import ContinualModel
from models.utils.federated_model import FederatedModel
from models.utils.private_state import federate
from utils.buffer import Buffer
from utils.errors import ClientError

FAST = "--fl --num_clients 4 --num_comm_rounds 2 --n_epochs 1 --batch_size 16"


def images_of(r, client, tasks):
    """The images a client owns, as bytes."""
    everything = r.dataset.train_images
    return {everything[i].numpy().tobytes() for t in tasks for i in r.partition.indices(t, client).tolist()}


def buffers(r):
    return {i: s["method"]["attrs"]["buffer"] for i, s in r.states.items() if s}


def as_bytes(buffer):
    pixels = (buffer.examples[: len(buffer)] * 255).round().to(torch.uint8)
    return [p.numpy().tobytes() for p in pixels]


def copied(buffer):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(buffer).items()}


# ---- buffers


@pytest.mark.parametrize("model", ["er", "derpp"])
def test_a_buffer_holds_its_own_clients_samples(rig, wire, model):
    r = rig(f"--model {model} {FAST} --num_clients 6 --participation_rate 0.5 --buffer_size 30 --stop_after 2", rig.MLP)
    r.run()
    rounds = {}
    for w in wire:
        if w.call == "local_update":
            rounds.setdefault(w.client, []).append(w.task)
    held = buffers(r)
    assert held.keys() == rounds.keys() and 3 <= len(held) <= 6
    assert any(len(b) < 30 for b in held.values()) or any(len(set(t)) > 1 for t in rounds.values())
    for client, buffer in held.items():
        tasks = rounds[client]
        assert buffer.num_seen_examples == sum(r.partition.sizes(t)[client] for t in tasks)
        mine = images_of(r, client, set(tasks))
        others = set().union(*(images_of(r, c, (0, 1)) for c in range(6) if c != client)) - mine
        stored = as_bytes(buffer)
        assert stored and set(stored) <= mine and not others & set(stored)
        pairs = {(r.dataset.train_images[i].numpy().tobytes(), int(r.dataset.train_labels[i]))
                 for t in set(tasks) for i in r.partition.indices(t, client).tolist()}  # fmt: skip
        assert set(zip(stored, buffer.labels[: len(buffer)].tolist(), strict=True)) <= pairs
    assert r.model.inner.buffer.is_empty()  # the server has none


def test_a_buffer_waits_while_its_client_does(rig):
    r = rig(f"--model er {FAST} --buffer_size 30", rig.MLP).begin(0)
    r.round(0, 0, ids=[0, 2])
    before = {i: copied(b) for i, b in buffers(r).items()}
    assert before.keys() == {0, 2}
    r.round(0, 1, ids=[1, 2])
    held = buffers(r)
    assert held.keys() == {0, 1, 2}
    for name, value in before[0].items():
        now = vars(held[0])[name]
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value
    sizes = r.partition.sizes(0)
    assert [held[i].num_seen_examples for i in range(3)] == [sizes[0], sizes[1], 2 * sizes[2]]
    assert set(as_bytes(held[1])) <= images_of(r, 1, [0])
    r.end(0).begin(1).round(1, 0, ids=[0])  # the next task adds to what the client had
    assert buffers(r)[0].num_seen_examples == sizes[0] + r.partition.sizes(1)[0]
    assert set(as_bytes(buffers(r)[0])) <= images_of(r, 0, [0, 1])
    assert set(as_bytes(buffers(r)[0])) & images_of(r, 0, [1])


# ---- nothing shared


def storages(value, found):
    """Addresses of every tensor that a value leads to."""
    if isinstance(value, torch.Tensor):
        if value.numel():
            found.add(value.untyped_storage().data_ptr())
    elif isinstance(value, dict):
        for v in value.values():
            storages(v, found)
    elif isinstance(value, (list, tuple)):
        for v in value:
            storages(v, found)
    elif isinstance(value, nn.Module):
        storages([*value.parameters(), *value.buffers()], found)
    elif isinstance(value, Buffer):
        storages(vars(value), found)
    return found


class Teacher(ContinualModel):
    """Keeps copies of the network, containers, a module, a parameter and tensors."""

    NAME = "sgd"
    COMPATIBILITY = ["class-il"]

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.memory = {"sums": [torch.zeros(3)]}
        self.child = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1))
        self.old_net = None

    def begin_task(self, dataset):
        self.old_net = copy.deepcopy(self.net)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.memory["sums"][0] += 1
        self.count += 1
        self.seen = torch.cat([getattr(self, "seen", torch.zeros(0)), labels.float()])
        return Sgd.observe(self, inputs, labels, not_aug_inputs)


@pytest.mark.parametrize("model", ["er", "derpp", "ewc_on", "lwf", "teacher"])
def test_clients_share_no_memory(rig, method, model):
    if model == "teacher":
        method(Teacher)
    r = rig(f"--model {model.replace('teacher', 'sgd')} {FAST} --debug_mode 1 --stop_after 2", rig.MLP).run()
    assert len(r.states) == 4
    found = [storages(s, set()) for s in r.states.values()]
    assert all(found)
    network = storages([r.model.net, r.worker.net, r.model.inner, r.worker.inner], set())
    network |= storages(r.worker._own_pristine, set())
    for i, mine in enumerate(found):
        assert not mine & network
        assert not any(mine & other for other in found[i + 1 :])


def test_what_a_method_keeps(rig, method, wire):
    """Each client has counted its own batches only, in every kind of attribute."""
    method(Teacher)
    r = rig(f"--model sgd {FAST} --num_clients 5 --participation_rate 0.4 --stop_after 1", rig.MLP).run()
    rounds = [w.client for w in wire if w.call == "local_update"]
    assert len(set(rounds)) > 2
    for client, state in r.states.items():
        batches = rounds.count(client) * -(-r.partition.sizes(0)[client] // 16)
        kept = state["method"]
        if client not in rounds:
            continue
        assert kept["attrs"]["memory"]["sums"][0].tolist() == [batches] * 3
        assert kept["tensors"]["count"].item() == batches and "scale" in kept["tensors"]
        labels = r.dataset.train_labels[r.partition.indices(0, client)].repeat(rounds.count(client))
        assert torch.equal(kept["attrs"]["seen"].sort()[0], labels.float().sort()[0])
        assert kept["modules"].keys() == {"child", "old_net"}
    assert r.model.inner.memory["sums"][0].tolist() == [0, 0, 0] and not hasattr(r.model.inner, "seen")


class Suspicious(Sgd):
    """Fails as soon as it meets something of another client's."""

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.diary = []

    def check(self, view):
        me = int(view.train_loader.dataset.indices[0])
        assert self.owner[self.current_task] == me and self.diary[-1] == ("begin", self.current_task, me)
        assert len(self.diary) <= self.current_task + 1

    def begin_task(self, dataset):
        assert hasattr(self, "owner") == bool(self.diary)
        me = int(dataset.train_loader.dataset.indices[0])
        assert self.dataset.train_loader is dataset.train_loader  # not the pooled data of all clients
        self.owner = {**getattr(self, "owner", {}), self.current_task: me}
        self.diary.append(("begin", self.current_task, me))
        self.register_buffer(f"of_{me}", torch.zeros(1))
        self.add_module(f"module_{me}", nn.Linear(1, 1))

    def begin_epoch(self, epoch, dataset):
        self.check(dataset)
        me = self.owner[self.current_task]
        mine = {f"of_{o}" for o in self.owner.values()} | {f"module_{o}" for o in self.owner.values()}
        assert {n for n in [*self._buffers, *self._modules] if n.startswith(("of_", "module_"))} == mine
        assert self.n_seen_classes == 2 * (self.current_task + 1) and f"of_{me}" in self._buffers

    def end_epoch(self, epoch, dataset):
        self.check(dataset)

    def end_task(self, dataset):
        self.check(dataset)
        assert self.net.training


def test_no_client_meets_anything_of_another(rig, method):
    method(Suspicious)
    r = rig(f"--model sgd {FAST} --num_clients 5 --participation_rate 0.6 --stop_after 3", rig.MLP).run()
    diaries = [s["method"]["attrs"]["diary"] for s in r.states.values()]
    assert sum(map(len, diaries)) >= 9 and max(map(len, diaries)) > 1
    assert r.model.inner.diary == [] and r.model.inner.n_seen_classes == 6


def test_fisher_matrices_are_private(rig, wire):
    r = rig(f"--model ewc_on {FAST} --num_clients 5 --participation_rate 0.4 --num_comm_rounds 1", rig.MLP)
    r.begin(0).round(0, 0, ids=[1, 3])
    weights = {n: p.detach().clone() for n, p in r.model.net.named_parameters()}
    r.end(0)
    assert [w.client for w in wire if w.call == "finish_task"] == [1, 3]
    fish = {i: s["method"]["attrs"]["fish"] for i, s in r.states.items() if s}
    assert fish.keys() == {1, 3}
    net = copy.deepcopy(r.model.net)
    for client in fish:
        loader = r.dataset.loader(r.partition.indices(0, client), 0, 1, train=False, split="train")
        total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
        for x, y in loader:
            net.zero_grad()
            log_p = net(x).log_softmax(1)[0, y]
            log_p.backward()
            for n, p in net.named_parameters():
                total[n] += log_p.detach().exp() * p.grad**2 / len(loader)
        for n, f in total.items():
            torch.testing.assert_close(fish[client][n], f, rtol=1e-3, atol=1e-7)
            assert torch.equal(r.states[client]["method"]["attrs"]["checkpoint"][n], weights[n])
    assert not torch.allclose(fish[1]["classifier.weight"], fish[3]["classifier.weight"])


# ---- learning in end_task


class Late(Sgd):
    """Moves its weights in end_task, by an amount that depends on its data; client-sized steps in between."""

    def end_task(self, dataset):
        with torch.no_grad():
            self.shift = len(dataset.train_loader.dataset) / 100
            self.before = [p.clone() for p in self.net.parameters()]
            if self.shift > 0.5:
                for p in self.net.parameters():
                    p += self.shift


@pytest.mark.parametrize("avg_type", ["weighted", "uniform"])
def test_what_end_task_learns_is_averaged(rig, method, wire, avg_type):
    method(Late)
    r = rig(f"--model sgd {FAST} --avg_type {avg_type}", rig.MLP).begin(0)
    ids, sizes = [0, 1, 3], r.partition.sizes(0)
    r.round(0, 0, ids=ids)
    before = [p.detach().clone() for p in r.model.net.parameters()]
    r.end(0)
    moved = [i for i in ids if sizes[i] > 50]
    assert 0 < len(moved) < 3
    replies = {w.client: w.reply for w in wire if w.call == "finish_task"}
    assert list(replies) == ids and all(bool(replies[i].tensors()) == (i in moved) for i in ids)
    n = [sizes[i] if avg_type == "weighted" else 1 for i in moved]
    shift = sum(w * sizes[i] / 100 for w, i in zip(n, moved, strict=True)) / sum(n)
    for old, new in zip(before, r.model.net.parameters(), strict=True):
        torch.testing.assert_close(new, old + shift)
    for i in ids:  # everyone started from the server's weights
        started = r.states[i]["method"]["attrs"]["before"]
        assert all(torch.equal(a, b) for a, b in zip(started, before, strict=True))


class Replaces(Sgd):
    """Puts a new network in place of its own."""

    def end_task(self, dataset):
        self.old_net = self.net
        self.net = copy.deepcopy(self.net)
        with torch.no_grad():
            for p in self.net.parameters():
                p.fill_(len(dataset.train_loader.dataset))


def test_a_new_network_is_averaged_too(rig, method):
    method(Replaces)
    r = rig(f"--model sgd {FAST}", rig.MLP).begin(0).round(0, 0)
    start, net = [p.detach().clone() for p in r.model.net.parameters()], r.worker.net
    r.end(0)
    sizes = r.partition.sizes(0)
    mean = sum(n * n for n in sizes) / sum(sizes)
    for p in r.model.net.parameters():
        torch.testing.assert_close(p.data, torch.full_like(p, mean))
    assert r.worker.inner.net is r.worker.net is net and start
    r.begin(1).round(1, 0)


# ---- prediction


class Masked(Sgd):
    def forward(self, x):
        return self.net(x) * 0 + self.n_seen_classes + 100 * self.current_task


class Means(Sgd):
    """Predicts with class means that only clients have."""

    def end_task(self, dataset):
        self.means = torch.zeros(10, 100)

    def forward(self, x):
        return -(self.net(x, returnt="features")[:, None] - self.means[None]).square().sum(2)


def test_the_server_counts_for_the_method(rig, method):
    method(Masked)
    r = rig(f"--model sgd {FAST}", rig.MLP).begin(0).round(0, 0)
    x = torch.zeros(1, 1, 28, 28)
    assert r.model(x)[0, 0] == 2
    r.end(0)
    assert r.model(x)[0, 0] == 102
    r.begin(1)
    assert r.model(x)[0, 0] == 104


def test_predictions_that_need_private_state(rig, method):
    method(Means)
    with pytest.warns(UserWarning, match="averaged network"):
        r = rig(f"--model sgd {FAST} --debug_mode 1 --stop_after 2", rig.MLP).run()
    x = torch.randn(3, 1, 28, 28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(r.model(x), r.model.net(x))


class Broken(Sgd):
    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        raise KeyError("mine")


def test_errors_of_a_method_are_its_own(rig, method):
    method(Broken)
    with pytest.raises(
        ClientError, match=r"^client 0 failed in local_update \(task 0, round 0\): KeyError: 'mine'"
    ) as e:
        rig(f"--model sgd {FAST}", rig.MLP).run()
    assert isinstance(e.value.__cause__, KeyError) and "in observe" in e.value.trace


def test_federate_leaves_federated_methods_alone():
    assert federate(FedAvg) is FedAvg
    assert issubclass(federate(Sgd), FederatedModel) and federate(Sgd).INNER is Sgd
