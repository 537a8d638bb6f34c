"""FedProto: losses, prototypes and predictions by hand; personal models that never travel."""

import pytest
import torch
import torch.nn.functional as F

from federated.client import Client
from federated.message import Message, Reply
from utils.errors import UserError
from utils.evaluate import evaluate

SHORT = "--fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 16 --debug_mode 1 --distribution_alpha 0.5"
PERSONAL = f"--model fedproto {SHORT} --optimizer sgd --optim_mom 0 --lr 0.05"
SHARED = f"{PERSONAL} --fedproto_models shared"


def client_of(r, i, task=0, round_=0, state=None):
    return Client(
        i, r.dataset, r.partition.indices(task, i), {} if state is None else state, r.args, task, round_, "local_update"
    )


def batch(r, task=0, n=12):
    return next(iter(r.dataset.loader(r.dataset.task_indices(task, train=True), task, n, train=False, split="train")))


@pytest.mark.parametrize("kind", ["sample", "class"])
def test_loss_by_hand(rig, kind):
    """Eq. 7; class 1 has no global prototype."""
    r = rig(f"{SHARED} --proto_loss {kind} --proto_weight 0.7", rig.MLP)
    x, y = batch(r)
    r.model.prototypes = torch.randn(10, 100, generator=torch.Generator().manual_seed(0))
    r.model.known[0] = True
    with torch.no_grad():
        f, z = r.model.net.features(x), r.model.net(x)[:, :2]
        got = r.model.local_loss(x, y, None)
    ce = F.cross_entropy(z, y, reduction="none")
    if kind == "sample":
        extra = [float((f[i] - r.model.prototypes[0]).square().mean()) if y[i] == 0 else 0.0 for i in range(len(y))]
        torch.testing.assert_close(got, ce + 0.7 * torch.tensor(extra), rtol=1e-4, atol=1e-5)
    else:
        extra = (f[y == 0].mean(0) - r.model.prototypes[0]).square().mean()
        torch.testing.assert_close(got, ce.mean() + 0.7 * extra, rtol=1e-4, atol=1e-5)


def test_classes_without_prototype_and_features_at_theirs_give_no_gradient(rig):
    r = rig(f"{SHARED} --proto_weight 5", rig.MLP)
    x, y = batch(r)
    only_ce = torch.autograd.grad(
        F.cross_entropy(r.model.net(x)[:, :2], y), list(r.model.net.parameters()), retain_graph=True
    )

    def gradient():
        return torch.autograd.grad(r.model.local_loss(x, y, None).mean(), list(r.model.net.parameters()))

    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradient(), only_ce))
    x, y = x[:1], y[:1]
    only_ce = torch.autograd.grad(F.cross_entropy(r.model.net(x)[:, :2], y), list(r.model.net.parameters()))
    r.model.prototypes[y[0]], r.model.known[y[0]] = r.model.net.features(x)[0].detach(), True
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradient(), only_ce))
    r.model.prototypes[y[0]] += 1
    assert not all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradient(), only_ce))


@pytest.mark.parametrize("agg", ["weighted", "uniform"])
def test_global_prototypes(rig, agg):
    """Eq. 6 over the clients that have the class; a class of nobody keeps what it had."""
    r = rig(f"{PERSONAL} --proto_agg {agg}", rig.MLP)
    r.model.prototypes[1], r.model.known[1] = 3.0, True
    before = r.model.broadcast()
    means, counts = torch.randn(3, 2, 100), torch.tensor([[4.0, 0], [1, 0], [0, 0]])
    replies = [
        Reply(Message({"proto.means": m, "proto.counts": n}, n_samples=5, loss=0.0), i)
        for i, (m, n) in enumerate(zip(means, counts))
    ]
    r.model.aggregate(replies)
    w = torch.tensor([0.8, 0.2]) if agg == "weighted" else torch.tensor([0.5, 0.5])
    torch.testing.assert_close(r.model.prototypes[0], w @ means[:2, 0])
    assert (r.model.prototypes[1] == 3).all() and r.model.known.tolist() == [True, True, *[False] * 8]
    assert not before["proto.known"][0] and (before["proto.means"][0] == 0).all()  # what was sent stays as it was


def test_prototypes_are_means_of_the_clients_features_after_training(rig):
    r = rig(SHARED, rig.MLP).begin(0)
    r.worker.enter_task(0)
    reply = r.worker.local_update(r.model.broadcast(), client_of(r, 1))
    r.worker.net.eval()
    with torch.no_grad():
        z, y = (torch.cat(p) for p in zip(*((r.worker.net.features(x), y) for x, y in client_of(r, 1).stat_loader())))
    for c in (0, 1):
        assert reply["proto.counts"][c] == (y == c).sum()
        torch.testing.assert_close(reply["proto.means"][c], z[y == c].mean(0), rtol=1e-4, atol=1e-5)


def test_personal_models_stay_at_home(rig, wire):
    r = rig(f"{PERSONAL} --stop_after 2", rig.MLP)
    start = r.weights
    r.run()
    d, C = 100, 10
    for w in wire:
        assert {n: tuple(t.shape) for n, t in w.message.tensors().items()} == {
            "proto.means": (C, d),
            "proto.known": (C,),
        }
        if w.call == "local_update":
            assert {n: tuple(t.shape) for n, t in w.reply.tensors().items()} == {
                "proto.means": (2, d),
                "proto.counts": (2,),
            }
    assert all(torch.equal(t, start[n]) for n, t in r.weights.items())  # there is no global model
    models = [r.states[i]["model"] for i in range(3)]
    assert all(not torch.equal(models[0][n], models[1][n]) for n in models[0] if n.endswith("weight"))


def test_without_the_second_term_a_personal_model_is_trained_alone(rig):
    """Two rounds, against the client's two turns in a row with nobody else around."""
    r = rig(f"{PERSONAL} --proto_weight 0", rig.MLP).begin(0)
    r.round(0, 0).round(0, 1)
    alone = rig(f"--model fedavg {SHORT} --optimizer sgd --optim_mom 0 --lr 0.05", rig.MLP).begin(0)
    alone.worker.enter_task(0)
    message = alone.model.broadcast()
    for round_ in (0, 1):
        reply = alone.worker.local_update(message, client_of(alone, 2, round_=round_))
        message = Message(reply.tensors())
    mine = r.states[2]["model"]
    assert all(torch.equal(mine[n], t) for n, t in message.tensors().items()) and len(mine) == len(message)


def test_accuracies_are_the_mean_over_the_clients_own_models(rig):
    r = rig(f"{PERSONAL} --stop_after 2", rig.MLP).run()
    own, classifier = [], rig(f"{PERSONAL}", rig.MLP)
    classifier.begin(0).end(0).begin(1)
    m = classifier.model
    m.tested, m.prototypes, m.known = None, r.model.prototypes, r.model.known
    for i in range(3):
        for name, t in m.carried().items():
            t.data = r.states[i]["model"][name].clone()
        own.append([torch.tensor(v) for v in evaluate(m, r.dataset, [0, 1])])
    class_il = torch.stack([o[0] for o in own]).mean(0)
    assert r.session.results.class_il[1][:2] == pytest.approx(class_il.tolist(), abs=1e-4)
    assert r.session.results.task_il[1][:2] == pytest.approx(
        torch.stack([o[1] for o in own]).mean(0).tolist(), abs=1e-4
    )
    assert len({tuple(o[0].tolist()) for o in own}) > 1


def test_prediction_is_the_nearest_prototype(rig):
    r = rig(SHARED, rig.MLP)
    x, _ = batch(r)
    with torch.no_grad():
        assert torch.equal(r.model(x), r.model.net(x))  # nothing to compare with yet
        r.model.prototypes = torch.randn(10, 100)
        r.model.known[[2, 5, 7]] = True
        f = r.model.net.features(x)
        nearest = [min((2, 5, 7), key=lambda c: float((a - r.model.prototypes[c]).norm())) for a in f]
        z = r.model(x)
    assert z.argmax(1).tolist() == nearest and torch.isinf(z[:, [0, 1, 3, 4, 6, 8, 9]]).all()


def test_fm_without_prototypes_is_fedavg(rig):
    flags = f"{SHORT} --optimizer sgd --optim_mom 0 --lr 0.05 --avg_type uniform --stop_after 2"
    a = rig(f"--model fedproto --preset fm --proto_weight 0 {flags}", rig.MLP).run()
    b = rig(f"--model fedavg {flags}", rig.MLP).run()
    assert all(torch.equal(t, b.weights[n]) for n, t in a.weights.items())
    assert a.session.results.class_il[1][:2] == b.session.results.class_il[1][:2]


def test_wrong_settings(rig):
    with pytest.raises(UserError, match="--fedproto_models shared"):
        rig(f"{PERSONAL} --tuning lora")
    for flags in ("--proto_weight -1", "--proto_agg median", "--fedproto_predict both"):
        with pytest.raises(UserError):
            rig(f"{PERSONAL} {flags}", rig.MLP)
