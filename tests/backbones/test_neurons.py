"""The LIF neuron against the written-out recurrence, against snntorch's values, and against SpikingJelly's node."""

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate

from backbones.utils.neurons import CONVENTIONS, LIF, Recurrence, Rule, Spike, lif_loop

ROOT = Path(__file__).resolve().parents[2]


def column(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)[:, None]


def potentials(lif, x):
    lif.store_v_seq = True
    lif(x)
    return lif.v_seq[:, 0].tolist()


@pytest.mark.parametrize("fused", [True, False])
def test_hand_cases(fused):
    ours, stock = LIF(fused=fused), LIF("ge-pre", fused=fused)
    constant, falling = column(1.0, 1, 1, 1), column(1.6, 0.9, 0.9, 0.9)
    assert ours(constant)[:, 0].tolist() == [0, 1, 0, 1]
    assert stock(constant)[:, 0].tolist() == [1, 1, 1, 1]
    assert ours(falling)[:, 0].tolist() == [1, 0, 1, 0]
    assert stock(falling)[:, 0].tolist() == [1, 1, 1, 0]
    assert potentials(ours, falling) == pytest.approx([1.6, 0.7, 1.25, 0.525])
    assert potentials(stock, constant) == [0, 0, 0, 0]  # after the reset, as SpikingJelly keeps it
    # what firing and resetting do each for themselves: u = 1, 1.5, .75, 1.375 and 1, 0.5, 1.25, ... (by hand)
    assert LIF("gt-pre", fused=fused)(constant)[:, 0].tolist() == [0, 1, 1, 1]
    assert LIF("ge-post", fused=fused)(constant)[:, 0].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("ge", [False, True])
def test_surrogate(ge):
    x = torch.tensor([0.0, 0.5, -1.0], requires_grad=True)
    spikes = Spike.apply(x, 2.0, ge)
    spikes.sum().backward()
    assert spikes.tolist() == [float(ge), 1, 0]
    assert x.grad.tolist() == pytest.approx([1.0, 1 / (1 + math.pi**2 / 4), 1 / (1 + math.pi**2)])
    assert x.grad.tolist() == pytest.approx([1.0, 0.2884, 0.0920], abs=1e-4)
    y = x.detach().clone().requires_grad_()
    Spike.apply(y, 3.0, ge).sum().backward()
    torch.testing.assert_close(y.grad, 1.5 / (1 + (1.5 * math.pi * x.detach()) ** 2))


def written_out(x, convention, beta, theta, alpha):
    """Spikes and dL/dx for L = sum(w * s), in plain numbers, with the chain rule over all pairs of steps."""
    post, gt = convention.endswith("post"), convention.startswith("gt")
    spikes, u_of = [], []
    u = s = 0.0
    for value in x:
        u = beta * u + value - theta * s if post else beta * (u - theta * s) + value
        s = float(u > theta) if gt else float(u >= theta)
        u_of.append(u)
        spikes.append(s)

    def grad(w):
        h = [alpha / 2 / (1 + (math.pi / 2 * alpha * (u - theta)) ** 2) for u in u_of]
        return [sum(w[k] * h[k] * beta ** (k - t) for k in range(t, len(x))) for t in range(len(x))]

    return spikes, grad


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_values_and_gradients(convention, fused):
    g = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(6, 5, dtype=torch.float64, generator=g) + 0.5
    w = torch.randn(6, 5, dtype=torch.float64, generator=g)
    numbers = {"beta": 0.7, "theta": 0.8, "alpha": 3.0}
    x.requires_grad_()
    spikes = LIF(convention, fused=fused, **numbers)(x)
    (spikes * w).sum().backward()
    assert spikes.dtype == x.dtype and 0 < spikes.mean() < 1
    for i in range(5):
        expected, grad = written_out(x[:, i].tolist(), convention, **numbers)
        assert spikes[:, i].tolist() == expected
        assert x.grad[:, i].tolist() == pytest.approx(grad(w[:, i].tolist()), rel=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_recurrence_is_the_loop(convention):
    """With a state before and a gradient on u, which networks do not have."""
    rule = LIF(convention, beta=0.6, theta=0.9).rule
    x, v = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    ws, wu = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    results = []
    for run in (lif_loop, lambda *a: Recurrence.apply(*a, True, False)):
        leaves = x.clone().requires_grad_(), v.clone().requires_grad_()
        s, u = run(*leaves, rule)
        ((s * ws).sum() + (u * wu).sum()).backward()
        results.append((s, u, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    only_u = x.clone().requires_grad_()
    Recurrence.apply(only_u, None, rule, True, False)[1].sum().backward()
    powers = torch.tensor([sum(0.6**k for k in range(5 - t)) for t in range(5)], dtype=torch.float64)
    torch.testing.assert_close(only_u.grad, powers[:, None, None].expand_as(x))


def stock_node():
    return neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_threshold=1.0,
        v_reset=None,
        surrogate_function=surrogate.ATan(2.0),
        detach_reset=True,
        step_mode="m",
    )


@pytest.mark.parametrize("fused", [True, False])
def test_parity_with_spikingjelly(fused):
    torch.manual_seed(0)
    x = (2 * torch.randn(8, 4, 50)).round(decimals=1)  # equality with the threshold happens
    w = torch.randn(8, 4, 50)
    node, mine = stock_node(), LIF("ge-pre", fused=fused, carry=True)
    results = []
    for net in (node, mine):
        inputs = x.clone().requires_grad_()
        functional.reset_net(net)
        spikes = net(inputs)
        (spikes * w).sum().backward()
        results.append((spikes, net.v, inputs.grad))
    (s, v, g), (s_mine, v_mine, g_mine) = results
    assert torch.equal(s, s_mine) and torch.equal(v, v_mine)
    torch.testing.assert_close(g, g_mine, rtol=1e-5, atol=1e-6)
    assert not torch.equal(LIF(fused=fused)(x), s)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_state(convention):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)) + 0.5
    lif = LIF(convention)
    whole = lif(x)
    assert torch.equal(lif(x), whole) and isinstance(lif.v, float)  # nothing is left
    assert torch.equal(lif(2 * x)[0], (2 * x[0] > 1).float())
    carrying = LIF(convention, carry=True)
    assert torch.equal(torch.cat([carrying(x[:2]), carrying(x[2:3]), carrying(x[3:])]), whole)
    stepping = LIF(convention, step_mode="s")
    assert torch.equal(torch.stack([stepping(step) for step in x]), whole)
    torch.testing.assert_close(stepping.v, carrying.v)
    for net in (carrying, stepping):
        functional.reset_net(net)
    assert torch.equal(carrying(x), whole) and torch.equal(stepping(x[0]), whole[0])


def test_gradient_through_carried_state():
    x = torch.randn(4, 3, dtype=torch.float64) + 0.5
    whole, parts = (x.clone().requires_grad_() for _ in range(2))
    LIF()(whole).sum().backward()
    lif = LIF(step_mode="s")
    torch.stack([lif(step) for step in parts]).sum().backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.skipif(not hasattr(neuron.LIFNode, "functional_forward"), reason="SpikingJelly 2 only")
def test_stateless_interface_of_spikingjelly():
    x, lif = torch.randn(4, 3) + 0.5, LIF()
    (spikes,), states = lif.functional_forward((x,), (0.0,))
    assert torch.equal(spikes, lif(x)) and isinstance(lif.v, float)
    lif.step_mode, states = "s", (0.0,)
    for step, expected in zip(x, spikes):
        (out,), states = lif.functional_forward((step,), states)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_a_float32_membrane(dtype):
    torch.manual_seed(0)
    x = (torch.randn(8, 200) + 0.5).to(dtype)
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    spikes, expected = LIF()(half), LIF()(full)
    assert spikes.dtype == dtype and torch.equal(spikes.float(), expected)
    spikes.float().sum().backward()
    expected.sum().backward()
    assert half.grad.dtype == dtype and torch.equal(half.grad, full.grad.to(dtype))
    assert LIF(fused=False)(x).equal(spikes)


def test_layouts():
    """The same image at every step (stride 0), channels last, and no gradient: always the same spikes."""
    image = torch.randn(2, 3, 4, 4) + 0.5
    same = image.expand(5, *image.shape)
    expected = LIF()(same.contiguous())
    assert torch.equal(LIF()(same), expected)
    x = torch.randn(10, 3, 4, 4).to(memory_format=torch.channels_last).unflatten(0, (5, 2)).requires_grad_()
    s = LIF()(x)
    assert torch.equal(s, LIF(fused=False)(x.detach().contiguous()))
    with torch.no_grad():
        assert torch.equal(LIF()(x), s)
    assert LIF()(torch.empty(4, 2, 3, device="meta")).shape == (4, 2, 3)


def test_copies():
    lif, x = LIF("gt-pre", beta=0.25, theta=0.75), torch.randn(4, 3)
    for twin in (copy.deepcopy(lif), pickle.loads(pickle.dumps(lif))):
        assert torch.equal(twin(x), lif(x))
    assert not list(lif.parameters()) and not lif.state_dict() and "gt-pre, beta=0.25, theta=0.75" in repr(lif)
    with pytest.raises(ValueError, match="unknown convention 'ge': choose from gt-post, ge-pre"):
        LIF("ge")


KERNELS = """
import torch
from backbones.utils import neurons
from backbones.utils.neurons import CONVENTIONS, LIF, Recurrence, lif_loop
torch.manual_seed(0)
assert neurons.triton is not None
for convention in CONVENTIONS:
    rule = LIF(convention, theta=0.9).rule
    for start in (False, True):
        x = torch.randn(3, 2, 700) + 0.5
        v, ws, wu = torch.randn(2, 700) if start else None, torch.randn(3, 2, 700), torch.randn(3, 2, 700)
        found = []
        for run in (lif_loop, lambda *a: Recurrence.apply(*a, True, True)):
            a, b = x.clone().requires_grad_(), v.clone().requires_grad_() if start else None
            s, u = run(a, b, rule)
            ((s * ws).sum() + start * (u * wu).sum()).backward()
            found.append((s, u, a.grad, *([b.grad] if start else [])))
        assert torch.equal(found[0][0], found[1][0]), convention
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    same = x[0].bfloat16().expand(3, 2, 700)
    s, u = Recurrence.apply(same, None, rule, False, True)
    assert s.dtype == torch.bfloat16 and torch.equal(s, lif_loop(same, None, rule)[0]) and u.shape == (1, 2, 700)
    torch.testing.assert_close(u[0], lif_loop(same, None, rule)[1][-1])
"""


def test_kernels_in_tritons_interpreter():
    """The CUDA kernels, without a GPU."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_on_cuda(convention):
    x = (torch.randn(4, 8, 300) + 0.5).cuda()
    grads = []
    for fused in (True, False):
        inputs = x.clone().requires_grad_()
        spikes = LIF(convention, fused=fused)(inputs)
        (spikes * x).sum().backward()
        grads.append((spikes, inputs.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_without_spikingjelly():
    """One line that says what to do; everything else, the twins with ReLUs too, works."""
    code = """
import argparse, sys
from types import SimpleNamespace
sys.modules["spikingjelly"] = None
from backbones import add_backbone_args, get_backbone, get_backbone_names
from utils.errors import UserError
data = SimpleNamespace(N_CLASSES=10, SIZE=(28, 28), CHANNELS=1)
assert "sresnet19" in get_backbone_names()
get_backbone(argparse.Namespace(backbone="resnet-pocket"), data)
import backbones.utils.spikes
for name in ("sresnet19", "sresnet-pocket"):
    for ask in (lambda: get_backbone(argparse.Namespace(backbone=name), data),
                lambda: add_backbone_args(name, argparse.ArgumentParser())):
        try:
            ask()
        except UserError as e:
            assert "pip install -r requirements-spiking.txt" in str(e) and "\\n" not in str(e), e
        else:
            raise AssertionError(name)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (ROOT / "requirements-spiking.txt").is_file()


def test_default_rule():
    assert LIF().rule == Rule(0.5, 1.0, 2.0, ge=False, pre=False) and LIF().tau == 2.0
