import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from datasets.utils.partition import Partition
from models.utils.gpm import DualGPM
from utils.conf import make_generator
from utils.errors import RunError, UserError

D, LAYERS, CLASSES = 128, 4, 2  # of the pocket transformer and of a task of seq-digits
FAST = "--model dolfin --fl --num_clients 3 --num_comm_rounds 1 --n_epochs 1 --batch_size 16 --debug_mode 1"


def used(memory):
    """An orthonormal basis of what a memory protects."""
    return torch.linalg.qr(torch.eye(memory.dim, dtype=torch.float64) - projector(memory)).Q[:, : memory.dim_used]


def projector(memory):
    return memory.project(torch.eye(memory.dim, dtype=torch.float64))


def designs(model):
    return {name: A.detach().double() for name, _, A, _ in model.lora}


def leak(model, memory=None):
    """The largest share of A's rows that lies in the space of old tasks."""
    memory = memory or model.memory
    return max(
        float((A @ (torch.eye(D, dtype=torch.float64) - projector(memory[n]))).norm() / A.norm().clamp(min=1e-30))
        for n, A in designs(model).items()
    )


# ---- what the method is for


def hidden_outputs(model, task):
    """Keys and values of every block, and the logits, for a task's training images."""
    seen, hooks = {}, []
    for name in model.lora.layer_names:
        hooks.append(model.lora.linear(name).register_forward_hook(lambda m, a, out, n=name: seen.update({n: out})))
    model.net.eval()
    batch = next(
        iter(
            model.dataset.loader(model.dataset.task_indices(task), task, 288, train=False, split="train", device="cpu")
        )
    )
    with torch.no_grad():
        seen["logits"] = model.net(batch[0])
    for hook in hooks:
        hook.remove()
    return {n: (t[..., D:] if n != "logits" else t).double() for n, t in seen.items()}


def test_old_inputs_move_ten_times_less(rig):
    moved = {}
    for basis in ("cov", "none"):
        r = rig(
            "--model dolfin --fl --num_clients 2 --num_comm_rounds 1 --n_epochs 2 --batch_size 16 --lr 0.003 "
            f"--gpm_energy paper --gpm_lamb 0.999 --dolfin_basis {basis}"
        )
        r.begin(0).round(0, 0).end(0)
        before = hidden_outputs(r.model, 0)
        r.begin(1).round(1, 0).end(1)
        after = hidden_outputs(r.model, 0)
        # columns of other classes are none of LoRA's business
        before["logits"], after["logits"] = before["logits"][:, :CLASSES], after["logits"][:, :CLASSES]
        moved[basis] = {n: float((after[n] - before[n]).norm()) for n in before}
    for name, far in moved["none"].items():
        assert moved["cov"][name] < far / 10, (name, moved["cov"][name], far)


@pytest.mark.parametrize(
    "basis, energy",
    [("cov", "official"), ("cov", "paper"), ("topk", "official"), ("local", "paper"), ("random", "official")],
)
def test_designed_rows_avoid_the_memory(rig, basis, energy):
    r = rig(f"{FAST} --dolfin_basis {basis} --gpm_energy {energy} --stop_after 2").run()
    assert all(m.dim_used > 0 for m in r.model.memory.values())
    r.begin(2)
    assert all(float(A.norm()) > 1 for A in designs(r.model).values())
    assert leak(r.model) < 1e-6
    for A in designs(r.model).values():
        torch.testing.assert_close(3 * A @ A.T, torch.eye(len(A), dtype=torch.float64), rtol=0, atol=1e-6)


def test_without_the_projection_they_do_not(rig):
    r, other = rig(f"{FAST} --dolfin_basis none --stop_after 1").run(), rig(f"{FAST} --stop_after 1").run()
    assert not any(m.dim_used for m in r.model.memory.values())
    assert leak(r.begin(1).model, other.model.memory) > 0.3


def test_the_guard_refuses_rows_in_the_memory(rig, monkeypatch):
    r = rig(f"{FAST} --stop_after 1").run()
    monkeypatch.setattr(DualGPM, "design", lambda self, C, n, scale: scale * used(self)[:, :1].T.repeat(n, 1))
    with pytest.raises(RunError, match="leaks"):
        r.begin(1)


# ---- one client, one round: InfLoRA, written again from its equations


def inflora(rig, flags, n_tasks, official):
    """The published loop with materialised weights and singular value decompositions. Returns the final weights."""
    r = rig(flags)
    args, dataset, net = r.args, r.dataset, copy.deepcopy(r.model.net).eval()
    names = [f"blocks.{i}.attn.qkv" for i in range(LAYERS)]
    W = {n: net.get_submodule(n).weight.detach().clone() for n in names}
    head_w, head_b = net.classifier.weight.detach().clone(), net.classifier.bias.detach().clone()
    M = {n: torch.zeros(D, 0, dtype=torch.float64) for n in names}

    def forward(weights, x):
        return functional_call(net, {f"{n}.weight": w for n, w in weights.items()}, (x, "features"))

    def moments(task):
        C = {n: torch.zeros(D, D, dtype=torch.float64) for n in names}
        count, hooks = 0, []
        for n in names:

            def add(module, inputs, n=n):
                x = inputs[0].reshape(-1, D).double()
                C[n] += x.T @ x

            hooks.append(net.get_submodule(n).register_forward_pre_hook(add))
        with torch.no_grad():
            for x, _ in dataset.loader(dataset.task_indices(task), task, 64, train=False, split="train"):
                forward(W, x)
                count += len(x) * 17
        for hook in hooks:
            hook.remove()
        return {n: c / count for n, c in C.items()}

    def svd(X, C):
        # the released code decomposes C; the text decomposes the activations, whose moment C is
        if official:
            U, S, _ = torch.linalg.svd(X @ C)
            return U, S.square()
        values, U = torch.linalg.eigh(X @ C @ X)
        return U.flip(1), values.flip(0)

    eye = torch.eye(D, dtype=torch.float64)
    for task in range(n_tasks):
        start, end = CLASSES * task, CLASSES * (task + 1)
        C = moments(task)
        A = {n: (svd(eye - M[n] @ M[n].T, C[n])[0][:, : args.lora_r].T / 3**0.5).float() for n in names}
        B = {(n, s): torch.zeros(D, args.lora_r, requires_grad=True) for n in names for s in "kv"}
        rows, bias = (t[start:end].clone().requires_grad_() for t in (head_w, head_b))
        trained = [*B.values(), rows, bias]
        opt = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[args.optimizer](trained, lr=args.lr)
        batches = dataset.loader(
            dataset.task_indices(task),
            task,
            args.batch_size,
            train=True,
            generator=make_generator(args.seed, "client", task, 0, 0, "local_update"),
        )

        def merged(W=W, A=A, B=B):
            none = torch.zeros(D, D)
            return {n: W[n] + torch.cat([none, B[n, "k"] @ A[n], B[n, "v"] @ A[n]]) for n in names}

        for _ in range(args.n_epochs):
            for x, y, _ in batches:
                loss = F.cross_entropy(F.linear(forward(merged(), x), rows, bias), y - start)
                opt.zero_grad()
                loss.backward()
                opt.step()
        W = {n: w.detach() for n, w in merged().items()}
        head_w[start:end], head_b[start:end] = rows.detach(), bias.detach()

        eps = args.gpm_lamb + (args.gpm_lame - args.gpm_lamb) * task / dataset.N_TASKS
        for n, c in moments(task).items():
            total = svd(eye, c)[1].sum()
            U, energy = svd(eye - M[n] @ M[n].T, c)
            if task == 0:
                k = max(int((energy.cumsum(0) / total < eps).sum()), 1)
            else:
                inside, k = float((total - energy.sum()) / total), 0
                while inside < eps:
                    inside, k = inside + float(energy[k] / total), k + 1
            M[n] = torch.cat([M[n], U[:, :k]], 1)
    return {**{f"{n}.weight": w for n, w in W.items()}, "classifier.weight": head_w, "classifier.bias": head_b}, M


@pytest.mark.parametrize("energy", ["official", "paper"])
@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.1), ("adam", 5e-4)])
def test_one_client_and_one_round_is_inflora(rig, energy, optimizer, lr):
    flags = (
        "--model dolfin --fl --num_clients 1 --num_comm_rounds 1 --n_epochs 1 --batch_size 32 --partition_mode iid "
        f"--gpm_energy {energy} --optimizer {optimizer} --lr {lr} --stop_after 2"
    )
    torch.manual_seed(0)
    expected, M = inflora(rig, flags, 2, energy == "official")
    r = rig(flags)
    start = r.weights
    weights = r.run().weights
    for name, w in weights.items():
        if name in expected:
            assert float((w - start[name]).abs().max()) > 1e-3, name  # it did learn
            torch.testing.assert_close(w, expected[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(w, start[name]), name
    for name, m in r.model.memory.items():
        assert m.dim_used == M[name].shape[1] > 1
        torch.testing.assert_close(
            projector(m), torch.eye(D, dtype=torch.float64) - M[name] @ M[name].T, rtol=0, atol=1e-3
        )


def test_without_fl_it_is_the_run_of_one_client(rig):
    flags = "--model dolfin --n_epochs 1 --batch_size 16 --debug_mode 1 --stop_after 2"
    central = rig(flags).run()
    federated = rig(f"{flags} --fl --num_clients 1 --num_comm_rounds 1 --partition_mode iid").run()
    assert all(torch.equal(a, b) for a, b in zip(central.weights.values(), federated.weights.values(), strict=True))
    assert len(central.session.results.class_il) == 2


# ---- the split of the data over clients


def test_neither_order_nor_number_of_clients_matters(rig):
    def designed(change):
        r = rig(FAST)
        r.partition = Partition([change(clients) for clients in r.partition.tasks])
        first = designs(r.begin(0).model)
        C = r.model.moments(r.clients(0))
        generator = torch.Generator().manual_seed(0)
        for _, _, _, B in r.model.lora:
            B.data = 0.05 * torch.randn(B.shape, generator=generator)
        memory = r.end(0).model.memory
        return first, C, {n: projector(m) for n, m in memory.items()}, designs(r.begin(1).model)

    plain = designed(lambda clients: clients)
    for change in (
        lambda clients: [clients[2], clients[0], clients[1]],
        lambda clients: [clients[0][::2], clients[1], clients[2], clients[0][1::2]],
    ):
        for mine, theirs, tolerance in zip(designed(change), plain, (1e-4, 1e-6, 1e-4, 1e-3), strict=True):
            for name in mine:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=tolerance)


def test_mean_of_B_is_the_mean_of_the_updates(rig, wire):
    r = rig(FAST).begin(0).round(0, 0)
    replies = [w.reply for w in wire if w.call == "local_update"]
    n = sum(reply["n_samples"] for reply in replies)
    assert len(replies) == 3 and len({reply["n_samples"] for reply in replies}) > 1
    for layer, slices, A, B in r.model.lora:
        name = f"lora.layers.{layer.replace('.', '-')}.{slices}.B"
        products = sum(reply["n_samples"] / n * (reply[name].double() @ A.double()) for reply in replies)
        mean = sum(reply["n_samples"] / n * reply[name].double() for reply in replies)
        torch.testing.assert_close(mean @ A.double(), products, rtol=0, atol=1e-12)
        torch.testing.assert_close(B.double() @ A.double(), products, rtol=0, atol=1e-7)
        assert products.norm() > 1e-4


def test_merged_weights_give_the_logits_of_the_branches(rig):
    r = rig(f"{FAST} --lr 0.01").begin(0).round(0, 0)
    x = next(iter(r.dataset.test_loader(0)))[0]
    r.model.net.eval()
    with torch.no_grad():
        branches = r.model.net(x)
        with r.model.lora.disabled():
            bare = r.model.net(x)
        r.model.lora.fold_into()
        assert all(not B.any() for *_, B in r.model.lora)
        torch.testing.assert_close(r.model.net(x), branches, rtol=0, atol=1e-5)
    assert float((bare - branches).abs().max()) > 1e-3


def test_server_and_worker_fold_to_the_same_bits(rig):
    r = rig(f"{FAST} --stop_after 2").run()
    server, worker = r.model.net.state_dict(), r.worker.net.state_dict()
    fresh = r.fresh_net().state_dict()
    for name in server:
        if "classifier" not in name:  # a worker only needs the head rows that it trains
            assert torch.equal(server[name], worker[name]), name
    assert any(not torch.equal(server[n], fresh[n]) for n in server if "qkv" in n)
    assert r.model.lora.layer_names and len(r.model.folds) == len(r.worker.folds) == 2


# ---- what moves


@pytest.mark.parametrize("task", [0, 1])
def test_a_round_moves_B_and_the_head_rows_of_the_task(rig, task):
    r = rig(f"{FAST} --optimizer adamw --optim_wd 0.1")
    for t in range(task):
        r.begin(t).round(t, 0).end(t)
    r.begin(task)
    start, end = CLASSES * task, CLASSES * (task + 1)
    tensors = lambda m: {k: v.clone() for k, v in m.state_dict().items() if isinstance(v, torch.Tensor)}  # noqa: E731
    before, worker = tensors(r.model), {k: v.clone() for k, v in r.worker.net.state_dict().items()}
    after = tensors(r.round(task, 0).model)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    ups = {f"lora.{n}" for n, _ in r.model.lora.named_parameters() if n.endswith(".B")}
    assert moved == ups | {"head.weight", "head.bias", "net.classifier.weight", "net.classifier.bias"}
    for name in ("net.classifier.weight", "net.classifier.bias"):
        kept = [c for c in range(10) if not start <= c < end]
        assert torch.equal(before[name][kept], after[name][kept])
        assert (before[name][start:end] != after[name][start:end]).any()
    assert all(torch.equal(worker[k], v) for k, v in r.worker.net.state_dict().items())
    for *_, B in r.model.lora:  # both the rows of the keys and those of the values
        assert B[:D].any() and B[D:].any()


def test_queries_never_move(rig):
    r = rig(f"{FAST} --stop_after 1 --lr 0.01")
    start = r.weights
    end = r.run().weights
    for i in range(LAYERS):
        name = f"blocks.{i}.attn.qkv.weight"
        assert torch.equal(start[name][:D], end[name][:D])
        assert (start[name][D : 2 * D] != end[name][D : 2 * D]).any()
        assert (start[name][2 * D :] != end[name][2 * D :]).any()
        assert torch.equal(start[f"blocks.{i}.attn.qkv.bias"], end[f"blocks.{i}.attn.qkv.bias"])


def test_cross_entropy_sees_the_columns_of_the_task_only(rig):
    r = rig(FAST).begin(0).end(0).begin(1)
    labels, x = torch.tensor([2, 3, 2, 2, 3, 3]), torch.randn(6, 1, 28, 28)
    r.worker.enter_task(1)
    p = r.worker.net(x).detach()[:, 2:4].exp()
    own = r.worker.local_loss(x, labels, None)
    torch.testing.assert_close(own.detach(), -(p[range(6), labels - 2] / p.sum(1)).log())
    # without rows of its own a method trains the network's, and the others' gradient is exactly zero
    whole = rig(f"--model fedavg --fl {FAST.partition('--fl')[2]}").begin(0).end(0).begin(1)
    whole.worker.enter_task(1)
    whole.worker.local_loss(x, labels, None).mean().backward()
    grad = whole.worker.net.classifier.weight.grad
    assert not grad[[0, 1, *range(4, 10)]].any() and grad[2:4].any(1).all()


# ---- little room


@pytest.mark.parametrize("basis", ["cov", "topk", "local", "random"])
def test_more_rank_than_room(rig, basis):
    r = rig(f"{FAST} --lora_r 110 --dolfin_basis {basis} --gpm_energy paper --gpm_lamb 0.9999 --stop_after 2").run()
    r.begin(2)
    free = {n: D - m.dim_used for n, m in r.model.memory.items()}
    assert all(0 < f < 110 for f in free.values())
    for name, A in designs(r.model).items():
        assert not A[free[name] :].any() and A.isfinite().all()
        assert torch.linalg.matrix_rank(A) <= free[name]
    assert leak(r.model) < 1e-6
    r.round(2, 0).end(2)
    assert all(w.isfinite().all() for w in r.weights.values())


@pytest.mark.parametrize("basis", ["cov", "local", "random"])
def test_no_room_at_all(rig, basis):
    r = rig(f"{FAST} --dolfin_basis {basis}").begin(0).end(0)
    for memory in r.model.memory.values():
        memory.load_state_dict({"basis": torch.zeros(D, 0), "retain": torch.tensor(True)})
    before = r.begin(1).weights
    r.round(1, 0).end(1)
    after = r.weights
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"classifier.weight", "classifier.bias"}


# ---- what is sent


def floats(message, prefix):
    return sum(t.numel() for t in message.tensors(prefix).values())


@pytest.mark.parametrize("basis", ["cov", "topk", "local", "random"])
def test_bytes(rig, wire, basis):
    rank, q = 6, 16
    r = rig(f"{FAST} --num_comm_rounds 2 --lora_r {rank} --gpm_sketch {q} --dolfin_basis {basis} --stop_after 2").run()
    B, head, A = 2 * LAYERS * D * rank, (D + 1) * CLASSES, LAYERS * rank * D
    statistics = LAYERS * (D * q if basis == "topk" else D * (D + 1) // 2)
    calls = Counter(w.call for w in wire)
    assert calls["local_update"] == 2 * 2 * 3
    before = {"local": "design", "random": None}.get(basis, "input_statistics")
    assert calls["input_statistics"] == 2 * 3 * (1 + (before == "input_statistics"))
    assert calls["design"] == (2 * 3 if before == "design" else 0)

    held = {c: set() for c in range(3)}
    for w, row in zip(wire, r.ledger.rows(), strict=True):
        assert (w.call, w.task, w.round, w.client) == (row["call"], row["task"], row["round"], row["client"])
        new = {n for n in w.message.keep if n not in held[w.client]}
        held[w.client] |= new
        sent = w.message.without(set(w.message.keep) - new)
        assert row["uplink_bytes"] == len(w.reply.to_bytes())
        assert row["downlink_bytes"] == len(sent.to_bytes())
        up = {"local_update": B + head, "design": A, "input_statistics": statistics}[w.call]
        assert w.reply.payload_bytes == 4 * up
        memory = 8 * floats(w.message, "memory.")
        memory += sum(t.numel() for n, t in w.message.tensors("memory.").items() if n.endswith("retain")) * (1 - 8)
        # A goes down once, with the first message after its design; B comes back down with the folds of old tasks
        assert sent.payload_bytes == 4 * (B + head) + 4 * floats(sent, "down") + 4 * floats(sent, "up") + memory
        assert floats(sent, "down") in (0, A) and floats(sent, "up") in (0, B)
    for client in range(3):
        mine = [w for w in wire if w.client == client]
        assert held[client] == set().union(*(w.message.keep for w in mine))
    # in all, for each client: two designs and two folds
    assert all(sum(n.startswith("down") for n in names) == 2 * LAYERS for names in held.values())
    assert all(sum(n.startswith("up") for n in names) == 2 * LAYERS for names in held.values())
    if basis == "local":
        assert max(floats(w.message, "memory.") for w in wire if w.call == "design") <= LAYERS * (D * D // 2 + 1)


# ---- privacy


@pytest.mark.parametrize("basis", ["cov", "topk", "local"])
def test_clients_with_few_samples_show_nothing(rig, wire, basis):
    sizes = rig(FAST).partition.sizes(0)
    least = sorted(sizes)[1]
    r = rig(f"{FAST} --dolfin_basis {basis} --gpm_min_samples {least}").begin(0)
    silent = {w.client for w in wire if not w.reply.tensors()}
    assert silent == {c for c, n in enumerate(sizes) if n < least} != set()
    A = designs(r.model)
    r = rig(f"{FAST} --dolfin_basis {basis}")
    r.partition = Partition([[c if len(c) >= least else c[:0] for c in r.partition.tasks[0]]])
    for name, a in designs(r.begin(0).model).items():
        torch.testing.assert_close(A[name], a, rtol=0, atol=1e-5)
    with pytest.raises(RunError, match="gpm_min_samples 10000"):
        rig(f"{FAST} --dolfin_basis {basis} --gpm_min_samples 10000").begin(0)


def test_noise_on_the_moments(rig):
    def moments(noise):
        return rig(f"{FAST} --num_clients 1 --partition_mode iid --gpm_noise {noise}").begin(0)

    clean, noisy, again = moments(0), moments(0.5), moments(0.5)
    plain, C, C2 = (r.model.moments(r.clients(0)) for r in (clean, noisy, again))
    for name, c in C.items():
        assert torch.equal(c, C2[name]) and torch.equal(c, c.T)
        diagonal = float(plain[name].diagonal().mean())
        off = (c - plain[name])[~torch.eye(D, dtype=torch.bool)] / diagonal
        assert abs(float(off.std()) - 0.5) < 0.02 and abs(float(off.mean())) < 0.02
    assert leak(noisy.round(0, 0).end(0).begin(1).model) < 1e-6


def test_a_schedule_that_falls_is_refused(rig):
    with pytest.raises(UserError, match="gpm_lame"):
        rig(f"{FAST} --gpm_lamb 0.99 --gpm_lame 0.9")
