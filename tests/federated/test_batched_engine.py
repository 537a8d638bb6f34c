"""The batched engine against clients in turn: the same weights, replies, states and draws."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from datasets.utils.transforms import (
    Compose,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from federated.engines import batched as module
from federated.engines.batched import BatchedEngine
from models.fedavg import FedAvg
from models.utils.federated_model import FederatedModel
from tests.helpers import federated_names, only_folder, run, small_args
from tests.rig import Rig
from utils.conf import make_generator
from utils.errors import ClientError

SHORT = "--fl --num_clients 5 --num_comm_rounds 2 --n_epochs 2 --batch_size 16 --stop_after 2 --debug_mode 1"
LORA = f"--model fedavg --tuning lora --lr 0.01 --optimizer sgd {SHORT}"
HEAD = f"--model fedavg --tuning head --lr 0.05 {SHORT}"
FULL = f"--model fedavg --lr 0.01 --optimizer sgd {SHORT} --clients_per_batch 3"
PARTITIONS = ("--partition_mode distribution --distribution_alpha 0.5", "--partition_mode quantity --class_quantity 1")
# Adam divides gradients by their size, and makes steps of those that are all rounding (as some are without pretrained
# weights). How much differs depends on the processor's kernels: no method has Adam here; below, in float64, some have.
PLAIN = "--optimizer sgd --lr 0.01"
# in float64: a quantile puts an entry on one side or the other; solves with dead units and the roots of singular
# covariances magnify rounding
DOUBLE = {"ties_merging": "", "regmean": " --gram_dtype 64", "lorm": " --gram_dtype 64", "ccvr": "", "slca": ""}


def state(r) -> dict[str, torch.Tensor]:
    """What the server knows in the end: network, adapters, and whatever else is a tensor of the method."""
    extra = {f"memory.{n}": m.state_dict() for n, m in getattr(r.model, "memory", {}).items()}
    more = {f"{n}.{k}": v for n, d in extra.items() for k, v in d.items() if isinstance(v, torch.Tensor)}
    return {**{n: t for n, t in r.model.state_dict().items() if isinstance(t, torch.Tensor)}, **more}


def far(a: dict, b: dict) -> float:
    """The largest difference between two sets of tensors."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].numel())


def moved(a: dict, b: dict) -> bool:
    return any(not torch.equal(a[n], b[n]) for n in a.keys() & b.keys())


def with_engine(flags: str, engine: str) -> str:
    """The flags of a run on an engine; the size of the stack is none of the serial engine's."""
    return (
        re.sub(r"--clients_per_batch \d+", "", flags) + " --engine serial"
        if engine == "serial"
        else f"{flags} --engine batched"
    )


def in_double(r) -> Rig:
    """The experiment in float64, images included."""
    for part in (r.model, r.worker):
        part.double()
        for name, weight in getattr(part, "_own_pretrained", {}).items():
            part._own_pretrained[name] = weight.double()
    for transform in r.dataset._transforms.values():
        transform.transforms.append(torch.Tensor.double)
    return r


@pytest.fixture
def both(rig, stacks):
    """``both(flags, base)``: the same run in turn and stacked; fails where nothing was stacked unless told."""

    def go(flags: str, base: str = rig.MLP, stacked: bool = True, double: bool = False, **attributes):
        results = []
        for engine in ("serial", "batched"):
            r = rig(with_engine(flags, engine), base)
            start = {n: t.clone() for n, t in state(r).items()}
            for name, value in attributes.items():
                setattr(r.dataset, name, value)
            if double:
                in_double(r)
            stacks.clear()
            r.run()
            assert moved(start, state(r)) or "ncm" in flags
            results.append(r)
        assert bool(stacks) == stacked
        return results

    return go


# ---- the same numbers


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("model, partition", [(m, PARTITIONS[i % 2]) for i, m in enumerate(federated_names())])
def test_every_method_gives_the_same_global_state(tmp_path, model, partition):
    """Two tasks of two rounds, over whatever network the method takes."""
    ends = []
    for engine in ("serial", "batched --clients_per_batch 2"):
        split = partition.replace("quantity 1", "quantity 4") if model == "joint" else partition
        flags = " ".join([*small_args(model, True), split, PLAIN, "--batch_size 16 --stop_after 2 --engine", engine])
        flags += DOUBLE.get(model, "")
        r = Rig(flags.replace("--partition_mode=iid", ""), tmp_path)
        ends.append(state((in_double(r) if model in DOUBLE else r).run()))
    assert far(*ends) <= 1e-6


@pytest.mark.parametrize(
    "flags, partition",
    [
        (f"--model dolfin {PLAIN} {SHORT}", PARTITIONS[0]),
        (f"--model dolfin {PLAIN} {SHORT}", PARTITIONS[1]),
        (f"--model ffa_lora {PLAIN} {SHORT}", PARTITIONS[0]),
        (LORA, PARTITIONS[1]),
        (HEAD, PARTITIONS[0]),
        (f"{FULL} --pretrained 1", PARTITIONS[1]),
    ],
    ids=["dolfin", "dolfin-quantity", "ffa_lora", "lora-quantity", "head", "full-quantity"],
)
def test_the_pocket_transformer_gives_the_same_global_state(rig, both, flags, partition):
    base = rig.POCKET.replace("--pretrained 0", "--pretrained 1")
    assert far(*map(state, both(f"{flags} {partition}", base))) <= 1e-6


@pytest.mark.parametrize(
    "flags",
    [
        "task_arithmetic --virtual_bs_n 2 --warmup 2",
        "task_arithmetic --regime full --clip_grad 0.2",
        "task_arithmetic --lora_r 2",
        "tak --kfac_examples 4 --virtual_bs_n 2",
        "com --regime full",
    ],
)
def test_task_vectors(both, flags):
    """Every client has a rate, sums of gradients and a penalty of its own; samples held out stay out. In float64."""
    flags = f"--model {flags} {SHORT} --debug_mode 0 --distribution_alpha 0.3 --clients_per_batch 4 --lr 0.001"
    serial, stacked = both(f"{flags} --optimizer adamw --optim_wd 0.1", double=True)
    assert far(state(serial), state(stacked)) <= 1e-9
    losses = [[row["loss"] for row in r.record.rounds] for r in (serial, stacked)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] > 0  # added up in float32


@pytest.mark.parametrize("flags", ["", "--iso_schedule once --lora_r 2"])
def test_isolated_vectors(both, stacks, flags):
    """Every client goes on from one of its own, by its own draws; it may take more epochs than the others."""
    flags = f"--model sata --iso_custody server --iso_epochs 3 {flags} {SHORT} --distribution_alpha 0.3 --lr 0.001"
    serial, stacked = both(f"{flags} --clients_per_batch 4 --optimizer adamw", double=True)
    calls = Counter(call for call, _ in stacks)
    assert calls["isolated_update"] == calls["local_update"] // (2 if "once" in flags else 1) > 0
    assert far(state(serial), state(stacked)) <= 1e-9
    for task, vectors in serial.model.stored.items():
        assert vectors.keys() == stacked.model.stored[task].keys()
        for k, iota in vectors.items():
            assert far(iota, stacked.model.stored[task][k]) <= 1e-9 and sum(t.abs().sum() for t in iota.values()) > 0


@pytest.mark.parametrize("tuning", ["head", "full"])
@pytest.mark.parametrize(
    "optimiser",
    [
        "--optimizer sgd --lr 0.05 --optim_mom 0.9 --optim_wd 0.01 --optim_nesterov 1",
        "--optimizer sgd --lr 0.05 --clip_grad 0.2",
        "--optimizer adamw --lr 0.001 --optim_wd 0.1 --lr_scheduler cosine --n_epochs 3",
        "--optimizer adam --lr 0.001 --lr_scheduler multisteplr --lr_milestones 1 2 --n_epochs 3",
    ],
)
def test_every_client_has_an_optimiser_of_its_own(both, tuning, optimiser):
    """Clients of very different sizes: those that have finished an epoch must not drift on by momentum or decay.

    In float64: Adam divides a gradient by its size, so where it is all rounding, it blows rounding up to a step.
    """
    flags = f"--model fedavg --tuning {tuning} {SHORT} --clients_per_batch 5 --distribution_alpha 0.3"
    serial, stacked = both(f"{flags} --debug_mode 0 --batch_size 8 {optimiser}", double=True)
    sizes = stacked.partition.sizes(0)
    assert max(sizes) > 3 * min(sizes) and any(n % 8 for n in sizes)
    assert far(state(serial), state(stacked)) <= 1e-9


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    "flags",
    [
        LORA,
        f"--model fedavg --tuning full {SHORT} --clients_per_batch 3",
        f"--model task_arithmetic {SHORT} --clients_per_batch 3",
    ],
)
def test_gradients_lie_as_their_tensors_do(rig, stacks, monkeypatch, flags):
    """Fused optimisers, which a GPU uses, refuse others."""
    lie, descend = set(), FedAvg.descend

    def watched(self, client, turn):
        mine = [p for p in turn.trained.values() if p.grad is not None]
        lie.update((p.stride() == p.grad.stride(), p.is_contiguous()) for p in mine)
        return descend(self, client, turn)

    monkeypatch.setattr(FederatedModel, "descend", watched)
    rig(with_engine(flags, "batched"), rig.POCKET).begin(0).round(0, 0)
    assert lie == {(True, True)} and {call for call, _ in stacks} == {"local_update"}


@pytest.mark.usefixtures("nano")
def test_replies_losses_and_bytes_are_the_same(rig, monkeypatch):
    replies = []
    for engine in ("serial", "batched"):
        r = rig(with_engine(f"{LORA} --clients_per_batch 3", engine), rig.POCKET)
        seen = []
        with monkeypatch.context() as m:
            m.setattr(
                r.model, "aggregate", lambda got, seen=seen, r=r: (seen.append(got), FedAvg.aggregate(r.model, got))
            )
            r.run()
        replies.append((seen, r.ledger.rows()))
    for mine, theirs in zip(replies[0][0], replies[1][0], strict=True):
        assert [x.client for x in mine] == [x.client for x in theirs] == sorted(x.client for x in mine)
        for a, b in zip(mine, theirs, strict=True):
            assert far(a.tensors(), b.tensors()) <= 1e-6
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["n_samples"] == b["n_samples"]
    for a, b in zip(replies[0][1], replies[1][1], strict=True):  # the header of a message holds the digits of its loss
        assert a.keys() == b.keys() and abs(a["uplink_bytes"] - b["uplink_bytes"]) <= 8
        assert {k: v for k, v in a.items() if k != "uplink_bytes"} == {
            k: v for k, v in b.items() if k != "uplink_bytes"
        }


def test_augmentation_draws_from_each_clients_own_generator(both):
    augment = Compose([RandomCrop(28, padding=4), RandomHorizontalFlip(), Normalize((0.5,), (0.5,))])
    plain = both(HEAD)
    turned = both(HEAD, _transforms={True: augment, False: Normalize((0.5,), (0.5,))})
    assert far(*map(state, turned)) <= 1e-6 < far(state(plain[0]), state(turned[0]))


@pytest.mark.parametrize(
    "transform",
    [RandomCrop(28, 4), RandomHorizontalFlip(), RandomResizedCrop(28), RandomAffine(20, (0.1, 0.1), (0.8, 1.2))],
    ids=lambda t: type(t).__name__,
)
def test_batches_of_many_are_the_batches_of_each(rig, transform):
    dataset = rig(HEAD).dataset
    dataset._transforms[True] = Compose([transform])
    parts = [torch.arange(a, b) for a, b in ((0, 21), (30, 50), (60, 69), (80, 81))]
    alone = [list(dataset.loader(p, 0, 8, True, make_generator(0, k))) for k, p in enumerate(parts)]
    many = dataset.loader_of_many([(p, make_generator(0, k)) for k, p in enumerate(parts)], 0, 8)
    assert len(many) == 3
    for j, (sizes, inputs, labels) in enumerate(many):
        mine = [batches[j] for batches in alone if j < len(batches)]
        assert sizes == [len(x) for x, *_ in mine]
        for k, (x, y, _) in enumerate(mine):
            torch.testing.assert_close(inputs.split(sizes)[k], x, rtol=0, atol=1e-6)
            assert torch.equal(labels.split(sizes)[k], y)
    with pytest.raises(ValueError, match="largest clients come first"):
        dataset.loader_of_many([(parts[3], make_generator(0)), (parts[0], make_generator(1))], 0, 8)


# ---- what a method may do


class Prox(FedAvg):
    """FedProx, with what the contract offers."""

    def before_local(self, message, client):
        self.start = message.tensors()

    def local_penalty(self, trained, client):
        return 5 * sum((p - self.start[n]).square().sum() for n, p in trained.items())


class Mixing(Prox):
    """The same term in the loss: it would read the stacked tensors of all clients."""

    def local_penalty(self, trained, client):
        return None

    def local_loss(self, inputs, labels, client):
        drift = sum((p - self.start[n]).square().sum() for n, p in self.trainable().items())
        return super().local_loss(inputs, labels, client) + 5 * drift


@pytest.mark.parametrize("flags", [HEAD, f"{FULL}"], ids=["head", "full"])
def test_a_proximal_term(both, method, flags):
    free = both(flags)
    method(Prox)
    bound = both(flags)
    assert far(*map(state, bound)) <= 1e-6 < far(state(free[0]), state(bound[0]))


def test_a_loss_that_mixes_clients_is_found_out(both, method, capsys):
    """It trains in turn from then on, and nothing of what the stack had done is left."""
    method(Mixing)
    serial, stacked = both(HEAD)
    assert "trains its clients one at a time: stacked, the gradient of" in capsys.readouterr().out
    assert far(state(serial), state(stacked)) == 0


class Importances(FedAvg):
    """Keeps, for each client, the path length of what it trains, over all its rounds."""

    def on_step(self, client, before, after):
        length = sum((after[n] - before[n]).abs().sum() for n in before).detach()
        client.state["length"] = client.state.get("length", 0) + length

    def after_local(self, client):
        return type(super().after_local(client))(super().after_local(client), length=float(client.state["length"]))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("flags", [HEAD, LORA], ids=["head", "lora"])
def test_steps_are_watched_and_states_kept(rig, both, method, flags):
    method(Importances)
    serial, stacked = both(flags, rig.POCKET)
    assert serial.states.keys() == stacked.states.keys() == set(range(5))
    for i, kept in serial.states.items():
        assert float(kept["length"]) > 0
        torch.testing.assert_close(kept["length"], stacked.states[i]["length"], rtol=1e-5, atol=1e-6)


class Batchwise(FedAvg):
    """A loss over the batch."""

    def local_loss(self, inputs, labels, client):
        return super().local_loss(inputs, labels, client).max()


class OwnStep(FedAvg):
    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        return super().observe(inputs, labels, not_aug_inputs, epoch)


@pytest.mark.parametrize(
    "cls, flags, why",
    [
        (Batchwise, HEAD, "no loss for each sample"),
        (type("Said", (Batchwise,), {"PER_SAMPLE_LOSS": False}), HEAD, "does not split by sample"),
        (OwnStep, HEAD, "a training step of its own"),
        (FedAvg, FULL.replace("--clients_per_batch 3", ""), "trains whole networks"),
    ],
    ids=["scalar", "said", "observe", "cpu"],
)
def test_methods_that_train_in_turn_say_why(rig, method, capsys, cls, flags, why):
    method(cls)
    ends = [state(rig(f"{flags} --engine {e}", rig.MLP).run()) for e in ("serial", "batched")]
    out = capsys.readouterr().out
    assert out.count("engine batched: fedavg trains its clients one at a time") == 1 and why in out
    assert far(*ends) == 0


def test_batch_norm_is_not_stacked(rig, capsys):
    flags = "--model fedavg --fl --num_clients 2 --num_comm_rounds 1 --n_epochs 1 --batch_size 4 --stop_after 1"
    r = rig(
        f"{flags} --debug_mode 1 --backbone resnet18 --engine batched --clients_per_batch 2", "--dataset seq-digits"
    )
    r.worker.get_debug_iters = lambda: 1
    r.run()
    assert "BatchNorm, whose statistics mix the samples" in capsys.readouterr().out


# ---- when something goes wrong


def test_few_whole_networks_are_not_mapped(rig, both, monkeypatch):
    """Left to itself, where it maps at all: not once fewer than four have a batch left, nor for three clients."""
    plain, compare, sizes, compared = BatchedEngine._vmapped, BatchedEngine._compare, [], []

    def spy(self, stack, clients, *rest):
        sizes.append(len(clients))
        return plain(self, stack, clients, *rest)

    monkeypatch.setattr(BatchedEngine, "_vmapped", spy)
    monkeypatch.setattr(BatchedEngine, "_compare", lambda *a: (compared.append(len(a[2])), compare(*a)))
    monkeypatch.setattr(BatchedEngine, "_why_not_vmap", lambda self: None)
    monkeypatch.setattr(module, "CPU_SAMPLES", 2 * 10**6)
    flags = re.sub(r"--(clients_per_batch|debug_mode) \d+", "", FULL) + f" {PARTITIONS[0]} --stop_after 1"
    serial, stacked = both(flags)
    assert far(state(serial), state(stacked)) <= 1e-5
    batches = sorted((-(-len(stacked.partition.indices(0, i)) // 16) for i in range(5)), reverse=True)
    together = sum(sum(n > j for n in batches) >= 4 for j in range(batches[0]))
    assert sizes and min(sizes) >= 4 and len(sizes) == 4 * together < 4 * batches[0]  # two rounds of two epochs
    assert compared and min(compared) >= 4
    sizes.clear()
    both(f"{flags} --num_clients 3", stacked=False)
    assert not sizes


def test_too_little_memory_halves_the_stack(rig, both, method, monkeypatch):
    """And nothing is counted twice in the states of the clients that were tried."""
    method(Importances)
    train, sizes = BatchedEngine._train, []

    def small(self, stack, clients, learners):
        losses = train(self, stack, clients, learners)
        sizes.append(len(clients))
        if len(clients) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(BatchedEngine, "_train", small)
    serial, stacked = both(HEAD)
    assert sizes[:2] == [5, 2] and max(sizes[1:]) <= 2
    assert far(state(serial), state(stacked)) <= 1e-6
    assert all(
        float(s["length"]) == pytest.approx(float(stacked.states[i]["length"]), rel=1e-5)
        for i, s in serial.states.items()
    )


def test_memory_for_one_client_is_an_error(rig, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BatchedEngine, "_train", never)
    with pytest.raises(ClientError, match=r"client \d failed in local_update \(task 0, round 0\): OutOfMemoryError"):
        rig(f"{HEAD} --engine batched", rig.MLP).run()


def test_how_many_fit(rig, monkeypatch):
    """From what a small batch keeps: twice the memory, twice the clients, and never none."""
    r = rig(f"{LORA} --engine batched --batch_size 2", rig.POCKET).begin(0)
    engine = BatchedEngine(r.worker, r.partition, {}, r.args)
    r.worker.enter_task(0)
    client = engine.client(0, 0, 0, "local_update")

    def fit(free):
        monkeypatch.setattr(module, "free_memory", lambda device: free)
        monkeypatch.setattr(module, "CPU_SAMPLES", 2 * 10**6)  # two a batch
        return engine._how_many(r.model.broadcast(), client)

    assert fit(1) == 1 and fit(10**15) == 10**6
    few, many = fit(2 * 10**8), fit(4 * 10**8)
    assert few >= 2 and abs(many - 2 * few) <= 1
    # one image keeps 4 blocks of activations of 17 tokens: between 1 and 20 float32 maps of 17 x 128 x 12 each
    assert 10**8 / (20 * 4 * 17 * 128 * 12 * 4 * 2) < few / 2 < 10**8 / (4 * 17 * 128 * 12 * 4)


class Failing(FedAvg):
    def local_loss(self, inputs, labels, client):
        raise KeyError("mine")


def test_errors_in_a_stack_name_its_clients(rig, method):
    method(Failing)
    with pytest.raises(
        ClientError, match=r"one of the clients 0, 1, 2, 3, 4 failed in local_update .*KeyError: 'mine'"
    ) as e:
        rig(f"{HEAD} --engine batched --clients_per_batch 5", rig.MLP).run()
    assert "in local_loss" in e.value.trace


def test_the_network_is_as_before(rig):
    """After a stack the worker holds its own parameters again, also when the stack failed."""
    r = rig(f"{LORA} --engine batched", rig.POCKET)
    r.worker.enter_task(0)
    before = {n: id(p) for n, p in r.worker.trainable().items()}
    r.run()
    r.worker.enter_task(1)
    assert {n: id(p) for n, p in r.worker.trainable().items()} == before
    assert all(p.dim() == 2 for n, p in r.worker.trainable().items() if n.startswith("lora"))


# ---- resume and precision


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("first, second", [("serial", "batched"), ("batched", "serial")])
def test_a_run_goes_on_with_another_engine(tmp_path, first, second):
    argv = [*small_args("dolfin", True), "--savecheck=task", "--loadcheck=auto"]
    assert run([*argv, "--stop_after=3", "--engine=serial"], tmp_path / "whole") == 0
    assert run([*argv, "--stop_after=1", f"--engine={first}"], tmp_path / "parts") == 0
    assert run([*argv, "--stop_after=3", f"--engine={second}"], tmp_path / "parts") == 0
    whole, parts = only_folder(tmp_path / "whole"), only_folder(tmp_path / "parts")
    assert (whole / "accuracy.csv").read_bytes() == (parts / "accuracy.csv").read_bytes()


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("fp16", 5e-3)])
def test_low_precision_is_the_same_on_both_engines(rig, both, precision, tolerance):
    base = rig.POCKET
    short = f"{LORA} --stop_after 1 --num_comm_rounds 1 --num_clients 4"  # many processors emulate these types slowly
    exact = both(short, base)
    rough = both(f"{short} --precision {precision}", base)
    names = [n for n in state(exact[0]) if n.startswith("lora")]
    change = torch.cat([state(exact[0])[n].flatten() for n in names])

    def distance(a, b):
        return (torch.cat([(state(a)[n] - state(b)[n]).flatten() for n in names]).norm() / change.norm()).item()

    assert distance(*rough) < tolerance
    assert 0 < distance(exact[0], rough[0]) < 0.1
    assert all(t.dtype == torch.float32 for n, t in state(rough[1]).items() if n.startswith("lora"))


def test_stacked_linear_equals_a_loop():
    from backbones.utils.client_batch import client_batch, linear, per_sample

    g = torch.Generator().manual_seed(0)
    sizes = [3, 1, 4]
    x, w, b = torch.randn(8, 5, 6, generator=g), torch.randn(3, 7, 6, generator=g), torch.randn(3, 7, generator=g)
    loop = torch.cat([F.linear(xs, w[k], b[k]) for k, xs in enumerate(x.split(sizes))])
    with client_batch(sizes):
        torch.testing.assert_close(linear(x, w, b), loop)
        torch.testing.assert_close(linear(x, w), loop - torch.cat([b[k].expand(n, 5, 7) for k, n in enumerate(sizes)]))
        assert torch.equal(per_sample(w, 8), w[torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])])
        with pytest.raises(ValueError, match=r"a batch of 9 for 3 clients, where \(3, 1, 4\) were announced"):
            linear(torch.randn(9, 6), w)
    torch.testing.assert_close(
        linear(x[:6], w, b), torch.cat([F.linear(x[2 * k : 2 * k + 2], w[k], b[k]) for k in range(3)])
    )
    with pytest.raises(ValueError, match="does not divide into 3 stacked clients"):
        linear(x, w)


class Drift(FedAvg):
    """A linear term that differs from client to client, as in SCAFFOLD."""

    def local_penalty(self, trained, client):
        return 0.1 * (client.id + 1) * sum(p.sum() for p in trained.values())


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("flags", [HEAD, FULL, f"{HEAD} --precision fp16"], ids=["head", "full", "fp16"])
def test_a_penalty_of_each_client(rig, both, method, flags):
    method(Drift)
    serial, stacked = both(flags, rig.POCKET if "fp16" in flags else rig.MLP)
    assert far(state(serial), state(stacked)) <= (1e-6 if "fp16" not in flags else 1e-4)
