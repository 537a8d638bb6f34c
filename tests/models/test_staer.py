"""STAER and its baselines: losses against loops, what is kept, and the run that equals replay's."""

import math

import pytest
import torch
import torch.nn.functional as F

from datasets.utils.events import Rebin
from models.staer import own_draws, stretched
from models.utils.spiking import mean_squares
from utils.errors import UserError

NET = "--dataset seq-digits --backbone sresnet-pocket --T 4 --device cpu"
SHORT = "--n_epochs 1 --batch_size 8 --debug_mode 1 --stop_after 2 --optimizer adamw --lr 0.003"
STAER = f"--model staer --buffer_size 20 {SHORT}"


@pytest.fixture
def make(rig):
    return lambda flags: rig(flags, NET)


def naive_soft_dtw(X, Y, g):
    """S_g of sequences (m, K), (n, K) by the recursion, cell by cell."""
    V = {(-1, -1): torch.zeros((), dtype=X.dtype)}
    for i in range(len(X)):
        for j in range(len(Y)):
            before = [V[k] for k in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if k in V]
            V[i, j] = (X[i] - Y[j]).square().sum() / 2 - g * torch.logsumexp(torch.stack(before) / -g, 0)
    return V[len(X) - 1, len(Y) - 1]


def naive_divergence(X, Y, g, norm):
    """Mean over samples of D, sequences (B, m, K) and (B, n, K)."""
    D = [naive_soft_dtw(x, y, g) - naive_soft_dtw(x, x, g) / 2 - naive_soft_dtw(y, y, g) / 2 for x, y in zip(X, Y)]
    return torch.stack(D).mean() / ((X.shape[1] + Y.shape[1]) / 2 if norm else 1)


def first_batch(r, n=8, task=0):
    x, y, plain = next(iter(r.dataset.loader(r.dataset.task_indices(task, train=True), task, n, train=True)))
    return x, y, plain


def begin(r):
    r.dataset.get_data_loaders()
    r.model.net.train()
    r.model.meta_begin_task(r.dataset)
    return r


# ---- losses


def test_cross_entropy_of_the_mean_or_at_every_step(make):
    z, y = torch.randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    plain, separate = (make(f"--model spiking-sgd --temp_sep {s}").model for s in (0, 1))
    logp = F.log_softmax(z, 2)
    every = -sum(logp[t, b, y[b]] for t in range(3) for b in range(5)) / 15
    torch.testing.assert_close(separate.classification(z, y), every)
    torch.testing.assert_close(plain.classification(z, y), F.cross_entropy((z[0] + z[1] + z[2]) / 3, y))


def test_logit_term_sees_only_the_mean():
    a, b = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    assert mean_squares(a, a.flip(0)) < 1e-12
    torch.testing.assert_close(mean_squares(a, b), ((a.mean(0) - b.mean(0)) ** 2).sum() / 15)


def test_der_by_hand(make):
    """Two independent draws, logits in time of the forward pass that was trained on."""
    r = begin(make(f"--model sderpp --buffer_size 20 --alpha 0.7 --beta 0.3 {SHORT}"))
    x, y, plain = first_batch(r)
    with torch.no_grad():
        z = r.model.net.sequence(x)
    r.model.observe(x, y, plain)
    assert torch.equal(r.model.buffer.logits[:8], z.transpose(0, 1)) and torch.equal(r.model.buffer.labels[:8], y)
    torch.manual_seed(1), __import__("numpy").random.seed(1)
    draws = [r.model._replay() for _ in range(2)]
    seen = iter(draws)
    r.model._replay = lambda: next(seen)
    net = r.model.net
    with torch.no_grad():
        want = F.cross_entropy(net.sequence(x).mean(0), y)
        want = want + 0.7 * ((net.sequence(draws[0][0]).mean(0) - draws[0][2].mean(0)) ** 2).mean()
        want = want + 0.3 * F.cross_entropy(net.sequence(draws[1][0]).mean(0), draws[1][1])
    torch.testing.assert_close(r.model.observe(x, y, plain), want)


@pytest.mark.parametrize("flags", ["", "--sdtw_norm 0 --sdtw_gamma 0.4 --alpha1 0.2 --alpha2 0.9", "--alpha1 0"])
def test_loss_of_a_step_by_loops(make, flags):
    """CE of the joined batch plus beta times the three divergences over 1 + alpha1 + alpha2, from what is kept."""
    r = begin(make(f"{STAER} --beta 0.05 --share_forward 0 {flags}"))
    model, a = r.model.double(), r.model.args
    x, y, plain = (t.double() if t.is_floating_point() else t for t in first_batch(r))
    model.observe(x, y, plain)
    drawn = []

    def spy(buffer):
        draw = buffer.get_data

        def get(*args, **kwargs):
            drawn.append(tuple(t.double() if t.is_floating_point() else t for t in draw(*args, **kwargs)))
            return drawn[-1]

        buffer.get_data = get

    spy(model.buffer), spy(model.traces)
    state = {n: t.clone() for n, t in model.net.state_dict().items()}
    got = model.observe(x, y, plain)
    model.net.load_state_dict(state)
    (bx, by), (cx, traces, _) = drawn
    with torch.no_grad():
        ce = F.cross_entropy(model.net.sequence(torch.cat([x, bx])).mean(0), torch.cat([y, by]))
        now, half = model.net.sequence(cx).transpose(0, 1), model.net.sequence(cx[:4]).transpose(0, 1)
    p1, p, p2 = traces[:, :2], traces[:, 2:6], traces[:, 6:]
    assert p2.shape[1] == 8
    total = naive_divergence(now, p, a.sdtw_gamma, a.sdtw_norm)
    total = total + a.alpha1 * naive_divergence(half, p1[:4], a.sdtw_gamma, a.sdtw_norm)
    total = total + a.alpha2 * naive_divergence(half, p2[:4], a.sdtw_gamma, a.sdtw_norm)
    torch.testing.assert_close(got, ce + 0.05 * total / (1 + a.alpha1 + a.alpha2), rtol=1e-9, atol=1e-9)
    assert abs(total) > 1e-3


@pytest.mark.parametrize("length, steps", [("halve", 2), ("same", 4), ("double", 8)])
def test_interpolated_traces(make, length, steps):
    r = begin(make(f"{STAER} --staer_resample interp --sdtw_T {length}"))
    x, *_ = first_batch(r)
    traces = torch.randn(8, 4, 10)
    with torch.no_grad():
        now = r.model.net.sequence(x).transpose(0, 1)
        got = r.model.alignment(x, traces, 4)
    now, then = (stretched(t, steps).double() for t in (now, traces))
    assert now.shape[1] == steps and r.model.spans() == [4]
    torch.testing.assert_close(got.double(), naive_divergence(now, then, 1.0, True), rtol=1e-5, atol=1e-5)


def test_stretching_is_linear_in_time():
    line = torch.arange(4.0)[None, :, None].expand(2, 4, 3)  # 0 1 2 3 at 0.5, 1.5, 2.5, 3.5
    assert torch.equal(stretched(line, 4), line)
    torch.testing.assert_close(stretched(line, 2)[0, :, 0], torch.tensor([0.5, 2.5]))
    torch.testing.assert_close(stretched(line, 8)[0, :, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_squares_instead_of_alignment(make):
    r = begin(make(f"{STAER} --staer_align mse --alpha1 0.25 --alpha2 0.75"))
    x, *_ = first_batch(r)
    traces = torch.randn(8, 14, 10)
    with torch.no_grad():
        got = r.model.alignment(x, traces, 4)
        now, half = r.model.net.sequence(x).mean(0), r.model.net.sequence(x[:4]).mean(0)
    parts = [p.mean(1) for p in traces.split([2, 4, 8], 1)]
    want = F.mse_loss(now, parts[1]) + 0.25 * F.mse_loss(half, parts[0][:4]) + 0.75 * F.mse_loss(half, parts[2][:4])
    torch.testing.assert_close(got, want / 2)


# ---- what is kept


def test_traces_are_what_the_network_said_over_fewer_and_more_steps(make):
    r = begin(make(STAER))
    x, y, plain = first_batch(r)
    with torch.no_grad():
        want = torch.cat([r.model.net.sequence(x, T).transpose(0, 1) for T in (2, 4, 8)], 1)
    r.model.observe(x, y, plain)
    assert torch.equal(r.model.traces.logits[:8], want) and torch.equal(r.model.traces.examples[:8], plain)
    assert r.model.traces.used_attributes == ["examples", "logits", "task_labels"]
    assert r.model.buffer.used_attributes == ["examples", "labels"]


def test_events_are_added_up_or_spread(make, monkeypatch):
    r = begin(make(STAER))
    frames, shown = torch.rand(3, 4, 1, 8, 8), []
    monkeypatch.setattr(r.model.dataset, "rebin", lambda x, n: Rebin(n, "count")(x), raising=False)
    monkeypatch.setattr(r.model.net, "sequence", lambda x, T: shown.append(x) or torch.zeros(T, 3, 10))
    r.model.record(frames)
    assert [x.shape[1] for x in shown] == [2, 4, 8]
    torch.testing.assert_close(shown[0][:, 1], frames[:, 2] + frames[:, 3])
    assert torch.equal(shown[2][:, 6], frames[:, 3] / 2) and torch.equal(shown[2][:, 7], frames[:, 3] / 2)
    for x in shown:
        torch.testing.assert_close(x.sum(1), frames.sum(1))


def test_two_reservoirs_or_one(make):
    apart, shared = (make(f"{STAER} --staer_buffers {b}").run().model for b in ("separate", "shared"))
    assert shared.traces is shared.buffer and "logits" in shared.buffer.used_attributes
    assert len(apart.buffer) == len(apart.traces) == len(shared.buffer) == 20
    assert not torch.equal(apart.buffer.examples, apart.traces.examples)


# ---- against replay


def run_of(make, flags):
    r = make(f"{flags} --buffer_size 20 {SHORT}").run()
    running = {n: t for n, t in r.weights.items() if "running" in n}
    return r, {n: t for n, t in r.weights.items() if n not in running and "num_batches" not in n}, running


def test_without_weight_it_is_replay(make):
    """Same weights to the bit, whatever the alignment draws; running statistics too if they are left alone."""
    r, weights, running = run_of(make, "--model ser")
    still, same, alike = run_of(make, "--model staer --beta 0 --bn_update main_only")
    assert all(torch.equal(t, same[n]) for n, t in weights.items())
    assert all(torch.equal(t, alike[n]) for n, t in running.items())
    assert torch.equal(r.model.buffer.examples, still.model.buffer.examples)
    assert r.session.results.class_il[1][:2] == still.session.results.class_il[1][:2]
    _, same, other = run_of(make, "--model staer --beta 0")
    assert all(torch.equal(t, same[n]) for n, t in weights.items())
    assert any(not torch.equal(t, other[n]) for n, t in running.items())
    _, moved, _ = run_of(make, "--model staer --beta 1")
    assert any(not torch.equal(t, moved[n]) for n, t in weights.items())


def test_own_draws_leave_the_others_alone():
    import numpy as np

    torch.manual_seed(3), np.random.seed(3)
    want = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3), np.random.seed(3)
    first = torch.rand(1)
    with own_draws(5, "x"):
        inside = torch.rand(3), np.random.rand(3)
    assert torch.equal(torch.cat([first, torch.rand(1)]), want[0]) and torch.initial_seed() == 3
    assert (np.random.rand(2) == want[1]).all()
    with own_draws(5, "x"):
        assert torch.equal(torch.rand(3), inside[0]) and (np.random.rand(3) == inside[1]).all()


# ---- edges


def test_a_batch_of_one(make):
    r = begin(make(STAER))
    for _ in range(3):
        x, y, plain = first_batch(r, n=1)
        assert math.isfinite(float(r.model.observe(x, y, plain)))


def test_mistakes(make, rig):
    for T in (1, 3):
        with pytest.raises(UserError, match=f"--T {T}: contraction takes half"):
            make(f"{STAER} --T {T}")
        make(f"{STAER} --T {T} --staer_resample interp")
    for model in ("staer", "ser", "sderpp", "spiking-sgd"):
        with pytest.raises(UserError, match="does not spike"):
            rig(f"--model {model}", rig.MLP)
    for flags in ("--sdtw_gamma 0", "--alpha1 -1", "--bn_update none", "--T 0"):
        with pytest.raises(UserError):
            make(f"{STAER} {flags}")
