"""Spiking ResNets and their twins: the counts of the paper's code, and time in the batch against a loop over time."""

import argparse
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import get_backbone, get_backbone_names, get_backbone_parser
from backbones.resnet19 import Shape
from backbones.sresnet import SpikingResNet
from backbones.utils.base import Backbone
from backbones.utils.neurons import LIF, lif_loop
from backbones.utils.spikes import neuron_layers

GREY = SimpleNamespace(N_CLASSES=10, SIZE=(28, 28), CHANNELS=1)
COLOUR = SimpleNamespace(N_CLASSES=10, SIZE=(32, 32), CHANNELS=3)
EVENTS = SimpleNamespace(N_CLASSES=10, SIZE=(34, 34), CHANNELS=2)
TINY = Shape(channels=1, stem_stride=1, stages=((4, 2), (6, 1)))


def build(name, dataset=GREY, **flags):
    torch.manual_seed(0)
    return get_backbone(argparse.Namespace(backbone=name, **flags), dataset)


def tiny(**settings):
    """A network of two stages in float64, with firing in every layer."""
    torch.manual_seed(1)
    net = SpikingResNet(3, TINY, **{"T": 4, **settings}).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 1.0, 2.0)
            nn.init.uniform_(m.bias, 0.2, 0.8)
    return net


def images(n=5, size=6):
    return torch.randn(n, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "name, dataset, count",
    [
        ("sresnet19", GREY, 12_566_912),
        ("sresnet19", COLOUR, 12_569_216),
        ("sresnet19-mnist", COLOUR, 12_566_912),
        ("sresnet19-cifar10", GREY, 12_569_216),
        ("sresnet18", GREY, 11_172_800),
        ("sresnet18_cifar10", GREY, 11_173_952),
        ("sresnet18-mnist", COLOUR, 11_172_800),
        ("resnet19", GREY, 12_566_912),
        ("resnet19-cifar10", GREY, 12_569_216),
        ("resnet19-mnist", COLOUR, 12_566_912),
        ("sresnet-pocket", GREY, 77_744),
        ("resnet_pocket", GREY, 77_744),
        ("sresnet19", EVENTS, 12_566_912 + 9 * 128),
    ],
)
def test_parameter_counts(name, dataset, count):
    with torch.device("meta"):
        net = get_backbone(argparse.Namespace(backbone=name), dataset)
    assert sum(p.numel() for p in net.parameters()) == count
    assert list(net.head_parameters()) == ["classifier.weight"]
    layers = neuron_layers(net)
    assert len(layers) == (0 if name.startswith("r") else 10 if "pocket" in name else 25)
    assert all(m.rule == (0.5, 1.0, 2.0, False, False) for m in layers.values())


def test_names_and_flags():
    assert {n for n in get_backbone_names() if "resnet" in n} == {
        *("resnet18", "resnet19", "resnet19-mnist", "resnet19-cifar10", "resnet-pocket"),
        *(f"sresnet{size}{data}" for size in (18, 19) for data in ("", "-mnist", "-cifar10")),
        "sresnet-pocket",
    }
    parser = get_backbone_parser("sresnet19")
    assert vars(parser.parse_args([])) == {"T": 4, "neuron": "gt-post", "fused_neuron": 1, "stem_once": 1}
    assert vars(get_backbone_parser("resnet19").parse_args([])) == {}
    net = build("sresnet-pocket", T=3, neuron="ge-pre", fused_neuron=0, stem_once=0)
    assert (net.T, net.lif1.convention, net.lif1.fused, net.stem_once) == (3, "ge-pre", False, False)
    assert net.sequence(torch.rand(2, 1, 28, 28)).shape == (3, 2, 10)


@pytest.mark.parametrize("name, stride", [("sresnet-pocket", 3), ("resnet-pocket", 3)])
@pytest.mark.parametrize("dataset", [GREY, COLOUR])
def test_interface(name, stride, dataset):
    net = build(name, dataset).eval()
    x = torch.rand(3, dataset.CHANNELS, *dataset.SIZE)
    out, features = net(x, returnt="both")
    assert out.shape == (3, 10) and features.shape == (3, 64) == (3, net.feature_dim)
    assert net.conv1.stride == (stride, stride) and net.conv1.in_channels == dataset.CHANNELS
    assert torch.equal(net(x), out) and torch.equal(net.features(x), features)
    assert torch.equal(net.classifier(features), out) and torch.equal(net.logits(features), out)
    with pytest.raises(NotImplementedError, match="'logits'"):
        net(x, returnt="logits")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), build(name, dataset).eval()):
        assert torch.equal(twin(x), out) and isinstance(twin, Backbone)
    net.reset_classifier(7)
    assert net(x).shape == (3, 7) and net.classifier.bias is None and net.num_classes == 7
    flat = net.get_params()
    net.set_params(flat + 1)
    assert torch.equal(net.get_params(), flat + 1)


def test_eight_pixels():
    digits = SimpleNamespace(N_CLASSES=10, SIZE=(8, 8), CHANNELS=1)
    for name in ("sresnet-pocket", "resnet-pocket"):
        net = build(name, digits)
        assert net.conv1.stride == (1, 1) and net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def batch_norm(bn, x, training):
    """Batch norm over (B, T, H, W) of each channel of x (T, B, C, H, W), as BatchNorm3d does it, by its definition."""
    if training:
        mean, var = x.mean((0, 1, 3, 4)), x.var((0, 1, 3, 4), unbiased=False)
    else:
        mean, var = bn.running_mean, bn.running_var
    shape = (1, 1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + bn.eps).sqrt()
    return x * bn.weight.view(shape) + bn.bias.view(shape)


def by_steps(net, frames, training):
    """Logits (T, B, K) of frames (T, B, C, H, W), each layer for all steps, convolutions step by step, no folding."""

    def conv(layer, x):
        return torch.stack([layer(step) for step in x])

    def lif(layer, x):
        return lif_loop(x, None, layer.rule)[0]

    x = lif(net.lif1, batch_norm(net.bn1, conv(net.conv1, frames), training))
    for b in net.blocks:
        out = lif(b.lif1, batch_norm(b.bn1, conv(b.conv1, x), training))
        out = lif(b.lif2, batch_norm(b.bn2, conv(b.conv2, out), training))
        if b.shortcut is not None:
            x = batch_norm(b.shortcut[1], conv(b.shortcut[0], x), training)
        x = lif(b.lif3, out + x)
    return torch.stack([F.linear(step.mean((2, 3)), net.classifier.weight) for step in x])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convention", ["gt-post", "ge-pre"])
def test_against_a_loop_over_time(training, convention):
    """A static image and frames, values and all gradients."""
    net = tiny(convention=convention).train(training)
    still = images()
    moving = torch.stack([still * a for a in (1.0, 0.5, -1.0, 2.0)], 1)
    for x, frames in ((still, still.expand(4, *still.shape)), (moving, moving.transpose(0, 1))):
        found = []
        for logits in (lambda x=x: net.sequence(x), lambda f=frames: by_steps(net, f, training)):
            net.zero_grad()
            out = logits()
            (out.tanh() * torch.arange(1, 5)[:, None, None]).sum().backward()
            found.append((out.detach(), net.get_grads()))
        assert found[0][0].std() > 0 and all(g.any() for g in net.get_grads_list())
        assert not torch.equal(found[0][0][0], found[0][0][1])
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_folded_batch_norm_is_batch_norm_3d():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3, 6, 6)  # T, B, C, H, W
    two, three = nn.BatchNorm2d(3), nn.BatchNorm3d(3)
    folded = two(x.flatten(0, 1)).unflatten(0, (4, 5))
    whole = three(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
    torch.testing.assert_close(folded, whole)
    torch.testing.assert_close(two.running_var, three.running_var)
    torch.testing.assert_close(two.running_mean, three.running_mean)


def test_stem_once():
    once, always = tiny(), tiny(stem_once=False)
    calls = []
    for net in (once, always):
        net.conv1.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    x = images()
    found = []
    for net in (once, always):
        out = net.sequence(x)
        (out * torch.arange(1, 5)[:, None, None]).sum().backward()
        found.append((out, net.get_grads(), *(b for n, b in net.named_buffers() if n != "bn1.running_var")))
    assert calls == [5, 20]
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
    n = 5 * 36
    biased = (once.bn1.running_var - 0.9) / 0.1 * (n - 1) / n
    torch.testing.assert_close(always.bn1.running_var, 0.9 + 0.1 * biased * 4 * n / (4 * n - 1))
    # expanded frames, as a data set of static images may bring them, are seen to be one image
    once(x[:, None].expand(-1, 4, -1, -1, -1))
    once(x[:, None].repeat(1, 4, 1, 1, 1))
    assert calls[2:] == [5, 20]


@pytest.mark.parametrize("training", [True, False])
def test_time(training):
    """Mean of the sequence, T by attribute, by argument and by frames; nothing left between forward passes."""
    net, x = tiny(T=2).train(training), images()
    first = net(x)
    assert first.shape == (5, 3) and torch.equal(net(x), first)
    torch.testing.assert_close(net.sequence(x).mean(0), first)
    for T in (1, 2, 4, 8):
        long = net.sequence(x, T)
        assert long.shape == (T, 5, 3)
        torch.testing.assert_close(net(x, T=T), long.mean(0))
        frames = x[:, None].repeat(1, T, 1, 1, 1)
        torch.testing.assert_close(net.sequence(frames), long)
        if not training:  # without batch statistics the future does not reach back
            torch.testing.assert_close(long[:2], net.sequence(x)[: min(T, 2)])
    torch.testing.assert_close(net(x), first)  # whatever T was asked for meanwhile
    net.T = 8
    torch.testing.assert_close(net(x), long.mean(0))
    assert net(x, "features", T=4).shape == (5, net.feature_dim)
    assert [o.shape for o in net(x, "both", T=4)] == [(5, 3), (5, 6)]
    with pytest.raises(ValueError, match="0 time steps"):
        net(x, T=0)
    with pytest.raises(ValueError, match="8 frames take 8 time steps, not 4"):
        net(frames, T=4)


def test_mean_over_time_is_of_features_and_logits_alike():
    net, x = tiny(), images()
    features = []
    net.classifier.register_forward_pre_hook(lambda m, i: features.append(i[0]))
    net.sequence(x)
    torch.testing.assert_close(net(x, "features"), features[0].mean(0))


@pytest.mark.parametrize("name", ["sresnet-pocket", "resnet-pocket"])
def test_bf16(name):
    """``--precision bf16``: convolutions in bf16, spikes exact, membranes, features and logits in float32."""
    net, x = build(name, T=4), torch.rand(16, 1, 28, 28)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.constant_(m.bias, 0.5)
    full = net(x)
    net.zero_grad()
    full.square().sum().backward()
    grads = net.get_grads()
    net.set_precision("bf16")
    seen = {}
    for layer in (m for m in net.modules() if isinstance(m, (LIF, nn.Conv2d))):
        layer.register_forward_hook(lambda m, i, o: seen.setdefault(type(m), set()).add((i[0].dtype, o.dtype)))
    half = net(x)
    net.zero_grad()
    half.square().sum().backward()
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert F.cosine_similarity(half, full).min() > 0.98
    assert F.cosine_similarity(net.get_grads(), grads, 0) > 0.9
    assert {o for _, o in seen[nn.Conv2d]} == {torch.bfloat16}
    if name == "sresnet-pocket":
        assert seen[LIF] == {(torch.bfloat16, torch.bfloat16)}
        sequence, features = net.sequence(x), net(x, "features")
        assert sequence.dtype == features.dtype == torch.float32
        torch.testing.assert_close(sequence.mean(0), half, rtol=0.02, atol=0.02)


def test_bf16_membrane_is_float32(monkeypatch):
    from backbones.utils import neurons

    kept = []
    plain = neurons._forward
    monkeypatch.setattr(neurons, "_forward", lambda *a: kept.append(out := plain(*a)) or out)
    net = build("sresnet-pocket")
    net.set_precision("bf16")
    net(torch.rand(2, 1, 28, 28))
    assert len(kept) == 10 and {u.dtype for _, u in kept} == {torch.float32}


@pytest.mark.parametrize("name", ["sresnet-pocket", "resnet-pocket"])
def test_learns(name):
    """Ten images by heart, with the flags' defaults, in training mode and with running statistics."""
    net = build(name)
    x, y = torch.rand(10, 1, 28, 28), torch.arange(10)
    opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0)
    for _ in range(80):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
    assert loss < 0.5 and (net(x).argmax(1) == y).all()
    assert (net.eval()(x).argmax(1) == y).float().mean() > 0.6


def test_twin_by_hand():
    """The twin with ReLUs, written out: one after the first batch norm, one after the sum."""
    net, x = build("resnet-pocket").eval(), torch.rand(2, 1, 28, 28)
    h = F.relu(net.bn1(F.conv2d(x, net.conv1.weight, stride=3, padding=1)))
    for i, b in enumerate(net.blocks):
        stride = 2 if i else 1
        out = F.relu(b.bn1(F.conv2d(h, b.conv1.weight, stride=stride, padding=1)))
        out = b.bn2(F.conv2d(out, b.conv2.weight, padding=1))
        h = F.relu(out + (b.downsample[1](F.conv2d(h, b.downsample[0].weight, stride=2)) if i else h))
    torch.testing.assert_close(net(x), h.mean((2, 3)) @ net.classifier.weight.T)


def test_gradients_of_each_sample_by_vmap():
    """What Fisher matrices are made of."""
    net, x, y = tiny().eval(), images(), torch.tensor([0, 1, 2, 0, 1])
    params = {n: p.detach() for n, p in net.named_parameters()}

    def loss(params, x, y):
        return F.cross_entropy(torch.func.functional_call(net, params, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    for i in range(5):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        torch.testing.assert_close(torch.cat([g[i].flatten() for g in each.values()]), net.get_grads())


@pytest.mark.slow
def test_compiled():
    net, x = build("sresnet-pocket", T=2), torch.rand(4, 1, 28, 28)
    expected = net(x)
    expected.square().sum().backward()
    grads = net.get_grads()
    net.zero_grad()
    net.compile(backend="aot_eager", fullgraph=True)
    out = net(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.get_grads(), grads, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(net.sequence(x).mean(0), expected, rtol=1e-4, atol=1e-4)
