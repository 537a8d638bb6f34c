"""HGP, CCVR, SLCA and LIVAR with calibration: what is sent, what the server trains, when, and on what."""

import copy

import pytest
import torch
import torch.nn.functional as F

from backbones.utils.head import HeadRows
from federated.client import Client
from models.utils.gpm import unpack_triu
from utils.errors import UserError

FAST = "--fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 16 --debug_mode 1 --distribution_alpha 0.5"
HGP = f"--model hgp --prompt_len 6 {FAST}"


def client_of(r, i, task=0, round_=0, state=None):
    return Client(i, r.dataset, r.partition.indices(task, i), {} if state is None else state, r.args, task, round_, "x")


def head_of(r):
    return r.model.net.classifier.weight.detach().clone(), r.model.net.classifier.bias.detach().clone()


def features_of(r, i, task=0):
    """Features of a client's images under the worker's network as it is, by the client's loader."""
    r.worker.net.eval()
    with torch.no_grad():
        pairs = [(r.worker.features(x), y) for x, y in client_of(r, i, task).stat_loader()]
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))


# ---- HGP


def test_hgp_sends_prompts_rows_and_gaussians_only(rig, wire):
    r = rig(HGP).begin(0).round(0, 0)
    d, layers = 128, 4  # of five wanted, the network has four blocks
    for w in wire:
        names = set(w.message.tensors())
        assert names == {f"prompts.prompts.{i}" for i in range(layers)} | {"head.weight", "head.bias"}
        assert sum(t.numel() for t in w.message.tensors().values()) == layers * 6 * d + 2 * d + 2
        k = len(w.reply["proto.classes"])
        assert w.reply["proto.means"].shape == w.reply["proto.spreads"].shape == (k, d)
    backbone = rig(HGP).weights
    for name, t in r.weights.items():
        assert torch.equal(t, backbone[name]) or name.startswith("classifier."), name


def test_hgps_prototypes_are_those_of_the_client_after_training(rig):
    r = rig(HGP).begin(0)
    r.worker.enter_task(0)
    reply = r.worker.local_update(r.model.broadcast(), client_of(r, 1))
    z, y = features_of(r, 1)
    sent = reply["proto.classes"].tolist()
    assert sent == [c for c in (0, 1) if (y == c).sum() > 1]
    for j, c in enumerate(sent):
        mine = z[y == c]
        torch.testing.assert_close(reply["proto.means"][j], mine.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reply["proto.spreads"][j], mine.var(0), rtol=1e-3, atol=1e-5)
        assert reply["proto.counts"][j] == len(mine)


def test_hgp_averages_then_rebalances(rig, wire):
    """The round's head is the weighted mean of the clients' rows, trained again by SGD on normalised logits."""
    r = rig(f"{HGP} --stop_after 1").begin(0)
    seen = {}
    plain = r.model.calibrate

    def calibrate():
        seen["before"] = head_of(r)
        plain()

    r.model.calibrate = calibrate
    r.round(0, 0)
    n = torch.tensor([w.reply["n_samples"] for w in wire], dtype=torch.float64)
    rows = torch.stack([w.reply["head.weight"] for w in wire]).double()
    mean = (n[:, None, None] * rows).sum(0) / n.sum()
    torch.testing.assert_close(seen["before"][0][:2].double(), mean, rtol=1e-5, atol=1e-6)
    after, _ = head_of(r)
    assert not torch.equal(after[:2], seen["before"][0][:2])
    assert torch.equal(after[2:], seen["before"][0][2:])
    assert torch.equal(r.model.broadcast()["head.weight"], after[:2])


def test_rebalancing_covers_old_classes_with_the_prototypes_of_their_task(rig):
    r = rig(f"{HGP} --num_comm_rounds 1").begin(0).round(0, 0).end(0)
    old = copy.deepcopy(r.model.prototypes)
    before, _ = head_of(r)
    r.begin(1).round(1, 0)
    after, _ = head_of(r)
    assert all(not torch.equal(before[c], after[c]) for c in range(4)) and torch.equal(before[4:], after[4:])
    known = r.model.prototypes
    keep = known.classes < 2
    assert torch.equal(known.means[keep], old.means) and set(known.classes.tolist()) >= {0, 1}
    assert set(known.classes.tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("scope, moved", [("all", [0, 1, 2, 3]), ("old", [0, 1]), ("cur", [2, 3]), ("none", [])])
def test_scopes(rig, scope, moved):
    r = rig(f"{HGP} --num_comm_rounds 1 --rebalance_scope {scope}").begin(0).round(0, 0).end(0).begin(1)
    seen = {}
    plain = r.model.calibrate

    def calibrate():
        seen["before"], _ = head_of(r)
        plain()

    r.model.calibrate = calibrate
    r.round(1, 0)
    after, _ = head_of(r)
    assert [c for c in range(10) if not torch.equal(after[c], seen["before"][c])] == moved


def test_zero_prompts_stay_one_token(rig):
    """Rows that start equal get equal gradients; a random start does not."""
    for init, equal in (("zeros", True), ("unit", False)):
        r = rig(f"{HGP} --prompt_init {init}").begin(0).round(0, 0)
        for p in r.model.prompts.prompts.values():
            assert p.abs().sum() > 0
            spread = (p - p[:, :1]).abs().max()
            assert (spread == 0) == equal, init
    start = rig(HGP).model.prompts.prompts["0"]
    assert abs(float(start.detach().norm()) - 1) < 1e-5


def test_a_linear_probe_moves_the_head_alone(rig):
    r = rig(f"{HGP} --linear_probe 1 --lr 0").begin(0)
    r.worker.enter_task(0)
    r.args.lr = 0.01
    message = r.model.broadcast()
    r.args.n_epochs = 0
    reply = r.worker.local_update(message, client_of(r, 0))
    assert not torch.equal(reply["head.weight"], message["head.weight"])
    assert all(torch.equal(reply[n], message[n]) for n in message.tensors("prompts.") if n in reply)
    later = r.worker.local_update(message, client_of(r, 0, round_=1))
    assert torch.equal(later["head.weight"], message["head.weight"])


@pytest.mark.parametrize("whole, counts", [(0, [2, 2]), (1, [2, 4])])
def test_the_pool_by_hand(rig, whole, counts):
    """P = sum_k cos(q, k_k) p_k over the components in use, q the features without prompts."""
    flags = f"{HGP} --prompt_mode pool --n_prompts 10 --prompt_len 4 --prompt_pool {whole}"
    r = rig(flags)
    for task, count in enumerate(counts):
        r.begin(task)
        x = torch.randn(5, 1, 28, 28)
        net = copy.deepcopy(rig(flags.replace(" --prompt_mode pool", "")).model)
        with torch.no_grad(), net.prompts.disabled():
            q = net.net(x, returnt="features")
        r.model.net.eval()
        with torch.no_grad():
            r.model.features(x)
        for i, p in r.model.prompts.prompts.items():
            k = r.model.prompts.keys[i][:count]
            want = torch.einsum("bm,mld->bld", F.cosine_similarity(q[:, None], k[None], dim=-1), p[:count])
            keys, values = r.model.prompts.prefix(int(i))
            torch.testing.assert_close(torch.cat([keys, values], 1), want, rtol=1e-4, atol=1e-5)
        r.end(task)


# ---- CCVR


def test_ccvr_pools_the_gaussians_of_the_global_features(rig, wire):
    """After the task, one more exchange: the pooled Gaussian is torch.cov of all clients' features together."""
    r = rig(f"--model ccvr --tuning head {FAST}").begin(0)
    for k in range(2):
        r.round(0, k)
    assert len(r.model.prototypes) == 0
    r.end(0)
    assert {w.call for w in wire} == {"local_update", "class_statistics"}
    z, y = (torch.cat(parts) for parts in zip(*(features_of(r, i) for i in range(3)), strict=True))
    pooled = r.model.prototypes.pooled()
    for j, c in enumerate(pooled.classes.tolist()):
        alone = sum(1 for i in range(3) if (features_of(r, i)[1] == c).sum() == 1)
        assert alone == 0
        mine = z[y == c].double()
        torch.testing.assert_close(pooled.means[j].double(), mine.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unpack_triu(pooled.spreads)[j].double(), torch.cov(mine.T), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when, moments", [("round", 4), ("task", 2), ("end", 0)])
def test_when_to_calibrate(rig, when, moments):
    r = rig(f"--model ccvr --tuning head --ccvr_when {when} {FAST}")
    count = []
    r.model.set_classifier = lambda weight, bias: count.append(1)
    for task in range(2):
        r.begin(task)
        for k in range(2):
            r.round(task, k)
        r.end(task)
    assert len(count) == moments
    if when == "end":  # of five tasks
        for task in range(2, 5):
            r.begin(task).round(task, 0).end(task)
        assert len(count) == 1


def test_statistics_of_frozen_features_are_computed_once(rig, monkeypatch):
    r = rig(f"--model ccvr --tuning head --model_config fm {FAST}").begin(0)
    r.worker.enter_task(0)
    state: dict = {}
    first = r.worker.local_update(r.model.broadcast(), client_of(r, 1, state=state))
    monkeypatch.setattr(r.worker, "class_stats", None)
    again = r.worker.local_update(r.model.broadcast(), client_of(r, 1, round_=1, state=state))
    assert all(torch.equal(first[n], again[n]) for n in first.tensors() if n.startswith("proto."))


def test_fm_calibrates_the_tasks_classes_after_every_round(rig):
    a = rig(f"--model ccvr --model_config fm {FAST}").args
    assert (a.proto_cov, a.proto_pool, a.proto_model) == ("diag", "mixture", "local")
    assert (a.rebalance_when, a.rebalance_scope, a.rebalance_sched, a.tau) == ("round", "cur", "cosine", 0.1)
    b = rig(f"--model ccvr --ccvr_scope seen --ccvr_pool mixture --logit_norm 0.5 {FAST}").args
    assert (b.rebalance_scope, b.proto_pool, b.tau) == ("all", "mixture", 0.5)


# ---- SLCA


def test_slca_trains_the_body_slowly(rig):
    r = rig(f"--model slca --bcb_lrscale 0.25 --lr 0.04 {FAST}").begin(0)
    r.worker.enter_task(0)
    r.worker.client = client_of(r, 0)
    r.worker.start_training()
    body, head = r.worker.opt.param_groups
    assert (body["lr"], head["lr"]) == (0.01, 0.04)
    assert {id(p) for p in head["params"]} == {id(p) for p in r.worker.head.parameters()}


def test_slcas_alignment_is_for_testing(rig):
    """The next task goes on from the classifier before alignment; the first task has none."""
    r = rig(f"--model slca --num_comm_rounds 1 {FAST}").begin(0).round(0, 0)
    before, _ = head_of(r)
    r.end(0)
    assert torch.equal(head_of(r)[0], before)
    r.begin(1).round(1, 0)
    before, bias = head_of(r)
    r.end(1)
    assert not torch.equal(head_of(r)[0][:4], before[:4])
    r.begin(2)
    assert torch.equal(head_of(r)[0], before) and torch.equal(head_of(r)[1], bias)
    assert torch.equal(r.model.head.weight, before[4:6])


def test_slcas_means_shrink_with_age(rig):
    """0.9 + 0.1 (t_c + 1) / (t + 1): 1 for the newest task."""
    r = rig(f"--model slca --num_comm_rounds 1 {FAST}")
    for task in range(3):
        r.begin(task)
        r.model.gather(r.clients(task))
        if task < 2:
            r.end(task)
    known = r.model.prototypes.pooled()
    calm = copy.deepcopy(known)
    calm.spreads = torch.full_like(calm.spreads, 0.0)
    f, labels = r.model.draw_from(calm)(600)
    for c in known.classes.tolist():
        factor = 0.9 + 0.1 * (c // 2 + 1) / 3
        mine = f[labels == c].mean(0)
        torch.testing.assert_close(mine, factor * known.means[known.classes == c][0], rtol=0, atol=0.01)
    assert r.model.groups(range(6)) == [2, 2, 2]


# ---- LIVAR


@pytest.mark.parametrize("features", ["adapted", "frozen", "frozen_raw"])
def test_livar_calibrates_on_its_own_pass(rig, wire, features):
    r = rig(f"--model livar --livar_ccvr 1 --livar_features {features} --lora_r 2 {FAST}").begin(0).round(0, 0)
    for w in wire:
        n = w.reply["counts"]
        assert w.reply["proto.classes"].tolist() == [c for c in (0, 1) if n[c] > 1]
        for j, c in enumerate(w.reply["proto.classes"].tolist()):
            torch.testing.assert_close(w.reply["proto.spreads"][j].mean(), w.reply["variance"][c], rtol=1e-5, atol=0)
    without = rig(f"--model livar --livar_features {features} --lora_r 2 {FAST}").begin(0).round(0, 0)
    mine, theirs = head_of(r)[0], head_of(without)[0]
    assert not torch.equal(mine[:2], theirs[:2]) and torch.equal(mine[2:], theirs[2:])
    assert torch.equal(r.model.broadcast()["head.weight"], mine[:2])


def test_livar_sends_no_prototypes_unless_asked(rig, wire):
    rig(f"--model livar --lora_r 2 {FAST}").begin(0).round(0, 0)
    assert not any(n.startswith("proto.") for w in wire for n in w.reply)


# ---- a user's mistakes


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model hgp --prompt_len 5", "even number"),
        ("--model hgp --prompt_layers 7 9", "blocks 0 to 3"),
        ("--model hgp --proto_noise 1", "--proto_clip"),
        ("--model livar --livar_ccvr 1 --proto_model global", "--proto_model local"),
        ("--model hgp --prompt_mode pool --n_prompts 900", "--n_prompts 900"),
    ],
)
def test_mistakes(rig, flags, message):
    with pytest.raises(UserError, match=message) as e:
        rig(f"{flags} {FAST}")
    assert "\n" not in str(e.value)


def test_hgp_needs_a_transformer(rig):
    with pytest.raises(UserError, match="needs a transformer"):
        rig(HGP, rig.MLP)


def test_the_loss_sees_the_columns_of_the_task_only(rig):
    """Cross-entropy over the rows of the task is that over all logits with the others at -inf."""
    r = rig(HGP).begin(0).end(0).begin(1)
    r.worker.enter_task(1)
    assert isinstance(r.worker.head, HeadRows)
    x, y = torch.randn(6, 1, 28, 28), torch.tensor([2, 3, 2, 2, 3, 3])
    logits = r.worker(x)
    masked = torch.full_like(logits, -torch.inf)
    masked[:, 2:4] = logits[:, 2:4]
    torch.testing.assert_close(r.worker.local_loss(x, y, None), F.cross_entropy(masked, y, reduction="none"))
