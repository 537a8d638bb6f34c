"""TARGET and its image generator: losses by hand, what travels and how often, and images that mean something."""

import copy
import math

import pytest
import torch
from torch import nn

from backbones.resnet18 import ResNet18
from datasets.utils.transforms import Compose, Normalize, RandomHorizontalFlip
from federated.client import Client
from federated.message import Message
from models.target import Replay
from models.utils import data_free
from models.utils.data_free import BatchNormTerm, Generator, Synthesizer, adversarial, random_twin
from models.utils.distillation import distillation, divergence
from tests.helpers import only_folder, rows, run
from utils.conf import set_random_seed
from utils.errors import RunError, UserError

FAST = "--fl --num_clients 3 --num_comm_rounds 2 --n_epochs 1 --batch_size 16 --debug_mode 1 --partition_mode iid"
SMALL = f"{FAST} --syn_round 2 --synthesis_batch_size 8 --g_steps 2 --kd_steps 2 --ngf 4 --nz 8"
TARGET = f"--model target {SMALL}"


def client_of(r, i, task, round_=0):
    return Client(i, r.dataset, r.partition.indices(task, i), {}, r.args, task, round_, "local_update")


def settings(r, **more):
    """The rig's settings, of the synthesis too, changed for a test."""
    vars(r.args).update(more)
    return r.args


def to_task_1(r):
    """One round of the first task, its images, and the second task begun, on the worker too."""
    r.begin(0).round(0, 0).end(0).begin(1)
    r.worker.enter_task(1)
    return r


# ---- the losses


def test_distillation_by_hand():
    student, teacher, T = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [4.0, -2.0]]), 2.0
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        q = [math.exp(v / T) / sum(math.exp(u / T) for u in t) for v in t]
        p = [math.exp(v / T) / sum(math.exp(u / T) for u in s) for v in s]
        total -= sum(a * math.log(b) for a, b in zip(q, p))
    assert distillation(student, teacher, T).item() == pytest.approx(total / 2, rel=1e-6)


def test_the_adversarial_term_by_hand():
    """Only samples of which both networks say the same class count, but the mean is over all."""
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    kl = 0.0
    for i in (0, 2):
        p, q = student[i].softmax(0).tolist(), teacher[i].softmax(0).tolist()
        kl += sum(b * math.log(b / a) for a, b in zip(p, q))
    assert adversarial(student, teacher).item() == pytest.approx(-kl / 3, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_batchnorm_term_by_hand_on_resnet18(momentum):
    torch.manual_seed(0)
    net, x = ResNet18(4).eval(), torch.rand(3, 3, 8, 8)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    seen: dict = {}
    for name, m in net.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda m, args, out, n=name: seen.setdefault(n, []).append(args[0].double()))
    term = BatchNormTerm(net, momentum)
    with term, torch.no_grad():
        net(x)
        first = float(term.value())
        term.remember()
        net(torch.rand(3, 3, 8, 8))
        second = float(term.value())
    with torch.no_grad():
        net(x)  # outside the block nobody looks
    assert len(seen) == 20 and float(term.value()) == second

    def by_hand(k: int, share: float) -> float:
        total = 0.0
        for name, maps in seen.items():
            m = net.get_submodule(name)
            flat, before = (maps[i].transpose(0, 1).flatten(1) for i in (k, 0))
            mean = (1 - share) * flat.mean(1) + share * before.mean(1)
            var = (1 - share) * flat.var(1, unbiased=False) + share * before.var(1, unbiased=False)
            total += ((mean - m.running_mean) ** 2).sum().sqrt() + ((var - m.running_var) ** 2).sum().sqrt()
        return float(total)

    assert first == pytest.approx(by_hand(0, 0.0), rel=1e-4)
    assert second == pytest.approx(by_hand(1, momentum), rel=1e-4)


def test_without_batchnorm_the_term_is_nothing(rig):
    with BatchNormTerm(rig(TARGET).model.net) as term:
        assert term.layers == [] and term.value() == 0


@pytest.mark.parametrize("maml", [1, 0], ids=["fomaml", "reptile"])
def test_the_meta_step_by_hand(rig, monkeypatch, maml):
    """A linear generator of one weight and a quadratic loss: every step of Adam can be written down."""

    class Toy(nn.Module):
        def __init__(self, *_):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(3.0))

        def forward(self, z):
            return self.w.expand(len(z), 1, 1, 1)

    monkeypatch.setattr(data_free, "Generator", Toy)
    args = settings(rig(f"{TARGET} --lr_g 0.1 --g_steps 3 --nz 1"), is_maml=maml, lr_z=0.0, synthesis_batch_size=4)
    s = Synthesizer(nn.Linear(1, 1), (1, 1), 1, 1, 1, lambda x: x, lambda x: x, args)
    monkeypatch.setattr(s, "loss", lambda x, y, adv: (x.mean() - 1) ** 2)
    w, m, v, grads = 3.0, 0.0, 0.0, []
    for t in range(1, 4):
        g = 2 * (w - 1)
        grads.append(g)
        m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g * g
        w -= 0.1 * (m / (1 - 0.5**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    given: list = []
    step = s.meta.step
    monkeypatch.setattr(s.meta, "step", lambda: (given.append(s.generator.w.grad.item()), step()))
    best, _ = s.batch(adversarial=False)
    # the images are those of the last look, before the third step, where the loss was lowest
    assert best.flatten().tolist() == pytest.approx([grads[-1] / 2 + 1] * 4, rel=1e-5)
    assert given[0] == pytest.approx(sum(grads) if maml else 67 * (3 - w), rel=1e-5)
    assert s.generator.w.item() == pytest.approx(3 - 0.3, rel=1e-5)  # Adam's first step is its rate, lr_g * g_steps
    s.batch(adversarial=False)
    assert s.generator.w.item() < 2.7 and s.losses[1][0] == pytest.approx((2.7 - 1) ** 2, rel=1e-5)


# ---- the synthesis


@pytest.mark.parametrize("size, channels", [((28, 28), 1), ((32, 32), 3), ((30, 21), 3), ((224, 224), 3)])
def test_the_generator_fits_any_image(size, channels):
    g = Generator(size, channels, nz=5, ngf=2)
    x = g(torch.randn(2, 5))
    assert x.shape == (2, channels, *size) and x.min() > 0 and x.max() < 1
    sizes = [m.weight.shape for m in g.maps if isinstance(m, nn.Conv2d)]
    assert sizes == [(4, 4, 3, 3), (2, 4, 3, 3), (channels, 2, 3, 3)]
    assert g.linear.out_features == 4 * math.ceil(size[0] / 4) * math.ceil(size[1] / 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A perceptron that knows the four classes of two tasks, as the server has it after the second."""
    from tests.rig import MLP, Rig

    flags = f"{MLP} --model target {FAST.replace('--debug_mode 1', '')} --optimizer adam --lr 0.003 --joint 1"
    return Rig(flags, tmp_path_factory.mktemp("joint")).begin(0).round(0, 0).round(0, 1)


def synthesizer(r, **more):
    set_random_seed("synthesis")
    model, before = r.model, dict(vars(r.args))
    try:
        settings(r, **more)
        return model.synthesizer()
    finally:
        vars(r.args).update(before)


def test_images_are_of_the_classes_they_were_made_for(trained):
    s = synthesizer(trained, syn_round=3, synthesis_batch_size=40, g_steps=15, adv=0.0, gen_flip=0, gen_crop=2)
    images, targets = s.run()
    assert images.dtype == torch.uint8 and images.shape == (120, 1, 28, 28) and targets.shape == (120,)
    said = trained.model.logits_of(images).argmax(1)
    noise = trained.model.logits_of(torch.randint(256, images.shape, dtype=torch.uint8)).argmax(1)
    assert (said == targets).float().mean() > 0.7 > 0.3 > (noise == targets).float().mean()
    assert set(targets.tolist()) == set(range(10))
    for losses in s.losses:
        assert losses[-1] < 0.8 * losses[0]


def test_the_student_learns_after_the_warm_up_and_images_turn_against_it(trained, monkeypatch):
    log: list = []
    batch, student = Synthesizer.batch, Synthesizer.train_student
    monkeypatch.setattr(
        Synthesizer, "batch", lambda s, adversarial: (log.append(adversarial), batch(s, adversarial))[1]
    )
    monkeypatch.setattr(Synthesizer, "train_student", lambda s, x: (log.append(len(x)), student(s, x))[1])
    small = {"synthesis_batch_size": 8, "g_steps": 2, "kd_steps": 40, "lr_s": 0.01, "warmup": 2, "nums": 20}
    s = synthesizer(trained, syn_round=4, **small)
    start, (images, classes) = copy.deepcopy(s.student).eval(), s.run()
    assert log == [False, False, 16, True, 20, True] and len(images) == len(classes) == 20
    x = trained.model.normalization_transform(images / 255)
    with torch.no_grad():
        far, near = (divergence(net(x), s.teacher(x), 20).mean() for net in (start, s.student))
    assert near < 0.5 * far
    log.clear()
    synthesizer(trained, syn_round=4, adv_early=1, **small).run()  # the released order
    assert log == [False, True, True, 20, True]
    log.clear()
    synthesizer(trained, syn_round=2, **small).run()  # and what its preset comes to
    assert log == [False, False]


def test_the_adversary_widens_the_gap(trained):
    """With the adversarial term alone, teacher and student end further apart on the images than without."""
    s = synthesizer(trained, oh=0.0, bn=0.0, gen_crop=0, gen_flip=0, g_steps=20, synthesis_batch_size=32, lr_s=0.01)
    x, _ = s.batch(adversarial=False)
    s.s.kd_steps = 30
    s.train_student((x * 255).to(torch.uint8))
    s.batch(adversarial=True)
    losses = torch.stack(s.losses[-1])
    assert losses[-5:].mean() < losses[0] <= 0


def test_classes_that_are_drawn(trained):
    for last, top in ((1, 9), (0, 8)):
        _, targets = synthesizer(
            trained, target_last_class=last, syn_round=1, synthesis_batch_size=300, g_steps=1
        ).run()
        assert targets.min() == 0 and targets.max() == top


@pytest.mark.parametrize("backbone", ["mnistmlp", "vit-pocket", "resnet18"])
def test_a_twin_has_the_shape_and_none_of_the_weights(rig, backbone):
    """Drawn like the network itself: the spread of each weight is about that of another one that was built."""
    pretrained = " --pretrained 1" if backbone.startswith("vit") else ""
    net = rig(f"--model target {FAST} --backbone {backbone}{pretrained}", "--dataset seq-digits --device cpu").model.net
    for p in net.parameters():  # as a trained one, of which nothing may be left
        p.data.mul_(1.5).add_(0.1)
    torch.manual_seed(1)
    twin = random_twin(net)
    torch.manual_seed(1)
    again = random_twin(net)
    assert type(twin) is type(net) and twin is not net
    mine, theirs, once = (dict(n.state_dict()) for n in (twin, net, again))
    assert mine.keys() == theirs.keys()
    for name, t in mine.items():
        assert torch.equal(t, once[name]) and t.data_ptr() != theirs[name].data_ptr()
        if t.is_floating_point() and name in dict(net.named_parameters()):
            assert not torch.equal(t, theirs[name]), name
            assert t.abs().max() <= 1.0 or t.std() < 1, name
    assert all(p.requires_grad for p in twin.parameters())


def test_the_released_twin_leaves_what_it_has_no_rule_for(rig):
    net = rig(f"{TARGET} --backbone vit-pocket").model.net
    twin = random_twin(net, "xavier")
    for name, p in twin.named_parameters():
        same = torch.equal(p, net.get_parameter(name))
        assert same == ("norm" in name or name in ("pos_embed", "cls_token")), name
    w = twin.blocks[0].mlp.fc1.weight
    assert w.std().item() == pytest.approx((2 / sum(w.shape)) ** 0.5, rel=0.05)
    assert twin.blocks[0].mlp.fc1.bias.std().item() == pytest.approx(1, rel=0.15)


def test_the_synthesis_leaves_the_network_alone(rig):
    r = rig(TARGET, rig.MLP).begin(0).round(0, 0)
    before, grads = r.weights, [p.requires_grad for p in r.model.net.parameters()]
    r.end(0)
    assert all(torch.equal(t, before[n]) for n, t in r.weights.items())
    assert [p.requires_grad for p in r.model.net.parameters()] == grads and r.model.net.training
    assert all(p.grad is None for p in r.model.net.parameters())


def test_a_synthesis_that_diverges_says_so(rig, monkeypatch):
    monkeypatch.setattr(Synthesizer, "loss", lambda s, x, y, adv: x.sum() * float("nan"))
    with pytest.raises(RunError, match="the loss of the image generator is not finite: lower --lr_g"):
        rig(TARGET, rig.MLP).begin(0).round(0, 0).end(0)


# ---- clients


def test_the_first_task_is_fedavg(rig, wire):
    ends = [
        rig(f"--model {m} {FAST} --optimizer adam --lr 0.001{more} --stop_after 1", rig.MLP).run()
        for m, more in (("target", SMALL.replace(FAST, "")), ("fedavg", ""))
    ]
    assert all(torch.equal(t, ends[1].weights[n]) for n, t in ends[0].weights.items())
    assert ends[0].ledger.rows() == ends[1].ledger.rows()


def test_without_distillation_all_tasks_are_fedavg(rig):
    ends = [
        rig(f"--model {m} {FAST} --optimizer adam --lr 0.001 --stop_after 2", rig.MLP).run()
        for m in ("target --kd_weight 0", "fedavg")
    ]
    assert all(torch.equal(t, ends[1].weights[n]) for n, t in ends[0].weights.items())


def test_the_loss_by_hand(rig):
    """CE over columns 2 and 3 of the real images, 7 times KD over columns 0 and 1 of the synthetic ones."""
    r = to_task_1(rig(f"{TARGET} --kd_weight 7 --softmax_temp 3 --syn_batch_size 5", rig.MLP))
    message, worker, client = r.model.broadcast(), r.worker, client_of(r, 0, 1)
    teacher = copy.deepcopy(r.model.net).eval()
    worker.load(message)
    worker.before_local(message, client)
    with torch.no_grad():
        for p in worker.net.parameters():
            p.add_(0.01 * torch.randn_like(p))
    x, y, _ = next(iter(client.train_loader()))
    asked: list = []
    ask = worker._own_replay.next
    worker._own_replay.next = lambda: asked.append(ask()) or asked[-1]
    loss = worker.local_loss(x, y, client)
    ((images, said),) = asked
    assert images.shape == (5, 1, 28, 28) and loss.dim() == 0
    with torch.no_grad():
        torch.testing.assert_close(said, teacher(images)[:, :2])
        z, s, t = worker.net(x), worker.net(images)[:, :2], teacher(images)[:, :2]
        ce = -sum(z[i, 2:4].log_softmax(0)[c - 2] for i, c in enumerate(y.tolist())) / len(y)
        kd = -((t / 3).softmax(1) * (s / 3).log_softmax(1)).sum() / 5
    assert loss.item() == pytest.approx((ce + 7 * kd).item(), rel=1e-5)


def test_real_images_come_as_in_fedavg(rig, monkeypatch):
    """Synthetic batches do not disturb the client's own draws, in any epoch."""
    r = to_task_1(rig(f"{TARGET} --n_epochs 3", rig.MLP))
    r.args.debug_mode = 0
    seen: list = []
    plain = r.worker.local_loss
    monkeypatch.setattr(r.worker, "local_loss", lambda x, y, client: (seen.append(x), plain(x, y, client))[1])
    r.worker.local_update(r.model.broadcast(), client_of(r, 0, 1))
    loader = client_of(r, 0, 1).train_loader()
    alone = [x for _ in range(3) for x, *_ in loader]
    assert len(seen) == len(alone) > 12 and all(torch.equal(a, b) for a, b in zip(seen, alone))


def test_images_travel_once_and_with_them_what_the_teacher_says(rig, wire):
    r = rig(f"{TARGET} --stop_after 3", rig.MLP).run()
    n, side = 16, 28
    late = [w for w in wire if w.task > 0]
    assert not any("syn." in name for w in wire if w.task == 0 for name in w.message)
    for w in late:
        images, logits = w.message["syn.images"], w.message["syn.logits"]
        assert images.shape == (n, 1, side, side) and images.dtype == torch.uint8
        assert logits.shape == (n, 2 * w.task) and not any(k.startswith("teacher") for k in w.message)
    once = {w.task: w.message["syn.images"] for w in late}
    assert all(torch.equal(w.message["syn.images"], once[w.task]) for w in late)
    assert not torch.equal(once[1], once[2])
    down = {(row["task"], row["round"], row["client"]): row["downlink_bytes"] for row in r.ledger.rows()}
    base = Message({**r.model.trainable(), **r.model.shared_buffers()}).nbytes
    for (task, round_, _), size in down.items():
        extra = n * side * side + n * 2 * task * 4 if task > 0 and round_ == 0 else 0
        assert base + extra <= size <= base + extra + (200 if extra else 0), (task, round_)  # a header names them


def test_clients_that_come_later_download_them_then(rig):
    r = rig(f"{TARGET}", rig.MLP)
    r.begin(0).round(0, 0).end(0).begin(1).round(1, 0, [0, 1]).round(1, 1, [1, 2])
    down = {(row["round"], row["client"]): row["downlink_bytes"] for row in r.ledger.rows() if row["task"] == 1}
    assert down[0, 0] == down[0, 1] == down[1, 2] > down[1, 1] + 16 * 28 * 28


def test_with_augmentation_the_teacher_travels_once(rig, wire):
    """What it says of a view is what the network of the task before says of it."""
    r = rig(TARGET, rig.MLP)
    r.dataset._transforms[True] = Compose([RandomHorizontalFlip(), Normalize((0.5,), (0.5,))])
    to_task_1(r)
    old, message = r.weights, r.model.broadcast()
    assert "syn.logits" not in message and {f"teacher.{n}" for n in old} < set(message.keep)
    r.round(1, 0)
    assert any(not torch.equal(t, old[n]) for n, t in r.weights.items())
    message, client = r.model.broadcast(), client_of(r, 0, 1, 1)
    assert all(torch.equal(message[f"teacher.{n}"], t) for n, t in old.items())
    r.worker.load(message)
    r.worker.before_local(message, client)
    x, said = r.worker._own_replay.next()
    plain = r.model.normalization_transform(message["syn.images"].float() / 255)
    views = torch.cat([plain, plain.flip(-1)])
    assert all(any(torch.equal(v, w) for w in views) for v in x)
    teacher = copy.deepcopy(r.model.net).eval()
    teacher.load_state_dict(old)
    with torch.no_grad():
        torch.testing.assert_close(said, teacher(x), rtol=1e-5, atol=1e-6)
    r.round(1, 1)
    down = {row["round"]: row["downlink_bytes"] for row in r.ledger.rows() if row["task"] == 1}
    assert down[0] - down[1] >= sum(t.numel() * 4 for t in old.values()) + 16 * 28 * 28


def test_the_teachers_running_statistics_travel_too(tmp_path):
    from tests.rig import Rig

    flags = "--dataset seq-digits --device cpu --backbone resnet18"
    r = Rig(f"{flags} {TARGET} --num_clients 1 --num_comm_rounds 1 --syn_round 1 --synthesis_batch_size 2", tmp_path)
    r.dataset._transforms[True] = Compose([RandomHorizontalFlip(), Normalize((0.5,), (0.5,))])
    r.begin(0)
    for i, (_, b) in enumerate(sorted(r.model.shared_buffers().items())):
        b.fill_(0.5 + 0.01 * i)
    r.end(0).begin(1)
    message = r.model.broadcast()
    r.worker.enter_task(1)
    r.worker.before_local(message, client_of(r, 0, 1))
    teacher = r.worker._own_replay.teacher
    theirs = dict(r.model.net.named_buffers())
    assert sum("running" in n for n in theirs) == 40 and not teacher.training
    assert all(torch.equal(b, theirs[n]) for n, b in teacher.named_buffers() if "running" in n)


def test_synthetic_batches_never_run_out():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    logits = torch.arange(7.0).view(7, 1)
    replay = Replay(images, lambda x, g: x, 3, torch.Generator().manual_seed(0), logits)
    seen = [replay.next() for _ in range(9)]
    assert [len(x) for x, _ in seen] == [3, 3, 1] * 3
    for x, said in seen:
        assert torch.equal((x.flatten() * 255).round(), said.flatten())
    epochs = [torch.cat([said.flatten() for _, said in seen[i : i + 3]]).tolist() for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len({tuple(e) for e in epochs}) == 3


def test_distillation_keeps_what_was_learnt(trained, rig):
    """A student that starts elsewhere says more of what the teacher says after training on the images alone."""
    images, _ = synthesizer(trained, syn_round=2, synthesis_batch_size=64, g_steps=10, adv=0.0, gen_crop=2).run()
    said = trained.model.logits_of(images)
    net = random_twin(trained.model.net)
    xs, ys = next(iter(trained.dataset.test_loader(0)))

    def right():
        with torch.no_grad():
            return ((trained.model.net(xs).argmax(1) == net(xs).argmax(1)).float().mean()).item()

    before, opt = right(), torch.optim.Adam(net.parameters(), 0.003)
    replay = Replay(images, lambda x, g: trained.model.normalization_transform(x), 32, torch.Generator(), said)
    for _ in range(60):
        x, t = replay.next()
        opt.zero_grad()
        distillation(net(x), t, 2.0).backward()
        opt.step()
    assert right() > before + 0.2


# ---- runs


def test_the_last_task_makes_no_images_and_debug_mode_few(rig, monkeypatch):
    rounds: list = []
    plain = Synthesizer.run
    monkeypatch.setattr(Synthesizer, "run", lambda s: (rounds.append(s.s.syn_round), plain(s))[1])
    r = rig(TARGET.replace("--syn_round 2", "--syn_round 50") + " --num_comm_rounds 1", rig.MLP)
    r.run()
    assert rounds == [5] * 4 and r.args.syn_round == 50


@pytest.mark.parametrize(
    "flags, what",
    [
        ("--kd_weight -1", "--kd_weight/--kd/--kd_alpha: '-1' is out of range: give a number at least 0"),
        ("--softmax_temp 0", "--softmax_temp: '0' is out of range: give a number above 0"),
        ("--kd_T 0", "--kd_T: '0' is out of range: give a number above 0"),
        ("--syn_round 0", "--syn_round: '0' is out of range: give a whole number at least 1"),
        ("--g_steps 2.5", "--g_steps: '2.5' is not a whole number at least 1"),
        ("--bn_mmt 1.5", "--bn_mmt: '1.5' is out of range: give a number at least 0 and at most 1"),
        ("--student_init zero", "--student_init: invalid choice: 'zero'"),
        ("--model_config official", "no such section: choose from default, public, public-tiny, fm"),
    ],
)
def test_wrong_flags(rig, flags, what):
    with pytest.raises(UserError) as e:
        rig(f"{TARGET} {flags}", rig.MLP)
    assert what in str(e.value) and "\n" not in str(e.value)


def test_a_first_task_of_one_class_needs_its_last_class(rig, monkeypatch):
    from datasets.seq_digits import SequentialDigits

    monkeypatch.setattr(SequentialDigits, "N_CLASSES_PER_TASK", [1, 3, 2, 2, 2])
    rig(TARGET, rig.MLP)
    with pytest.raises(UserError, match="--target_last_class 0 leaves no class to draw"):
        rig(f"{TARGET} --target_last_class 0", rig.MLP)


def test_presets(rig):
    released = rig("--model target --fl --model_config public", "--dataset seq-digits --device cpu").args
    assert (released.syn_round, released.warmup, released.g_steps, released.kd_steps) == (10, 20, 10, 400)
    assert released.avg_type == "uniform" and released.num_clients == 5 and released.backbone == "resnet18"
    tiny = rig("--model target --fl --model_config public-tiny", "--dataset seq-digits --device cpu").args
    assert (tiny.syn_round, tiny.is_maml, tiny.lr_g, tiny.bn) == (200, 0, 0.0002, 0.1) and tiny.lr == 0.01
    fm = rig("--model target --fl --model_config fm", "--dataset seq-digits --device cpu").args
    assert fm.target_last_class == 0 and fm.syn_columns == "all" and fm.g_steps == 80


def test_it_runs_from_the_command_line(tmp_path):
    argv = f"--model target --dataset seq-digits --backbone mnistmlp --device cpu {SMALL} --engine batched".split()
    assert run([*argv, "--measure_federated_bias=1"], tmp_path) == 0
    assert float(rows(only_folder(tmp_path) / "summary.csv")[0]["faa"]) > 0
