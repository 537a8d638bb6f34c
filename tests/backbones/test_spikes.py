"""Firing rates, operations and energy against counts by hand, and the recorder of spikes."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backbones import get_backbone
from backbones.resnet19 import Shape
from backbones.sresnet import SpikingResNet
from backbones.utils.neurons import LIF
from backbones.utils.spikes import SpikeMeter, SpikeRecorder, neuron_layers

COLOUR = SimpleNamespace(N_CLASSES=10, SIZE=(32, 32), CHANNELS=3)
TINY = Shape(channels=1, stem_stride=1, stages=((2, 1), (3, 1)))


def tiny(**settings):
    torch.manual_seed(0)
    net = SpikingResNet(4, TINY, **{"T": 3, **settings})
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.constant_(m.bias, 0.7)
    return net.eval()


@pytest.mark.parametrize("name", ["sresnet19", "resnet19"])
def test_macs_of_the_paper(name):
    """One image of CIFAR at one time step, and how steps, the stem and the head add up."""
    with torch.device("meta"):
        net = get_backbone(argparse.Namespace(backbone=name, T=1), COLOUR)
        x = torch.empty(2, 3, 32, 32)
        with SpikeMeter(net) as meter:
            net(x)
        assert sum(meter.macs().values()) == 2_285_245_440
        assert len(meter.macs()) == 17 + 2 + 1
        if name == "sresnet19":
            stem, head = 3 * 9 * 128 * 32 * 32, 512 * 10
            with SpikeMeter(net) as meter:
                net(x, T=4)
            assert sum(meter.macs().values()) == 4 * (2_285_245_440 - stem - head) + stem + head
            net.stem_once = False
            with SpikeMeter(net) as meter:
                net.sequence(x, T=4)
                net.sequence(x, T=4)
            assert sum(meter.macs().values()) == 4 * 2_285_245_440


def test_energy_by_hand():
    """image -> conv 1x1 -> LIF over four steps -> conv 1x1, with spikes that are known."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lif, self.second = nn.Conv2d(1, 2, 1, bias=False), LIF(), nn.Conv2d(2, 3, 1)
            self.first.weight.data = torch.tensor([1.0, 1.6])[:, None, None, None]

        def forward(self, x):
            x = self.first(x)
            return self.second(self.lif(x.expand(4, *x.shape)).flatten(0, 1))

    net, x = Net(), torch.ones(5, 1, 2, 2)
    with SpikeMeter(net) as meter:
        net(x)
    # the first channel's neurons spike at steps 2 and 4, the second's (u = 1.6, 1.4, 1.3, 1.25) at every step
    assert meter.rates() == {"lif": 0.75}
    first, second = 1 * 2 * 4, 4 * (2 * 3 * 4)
    assert meter.layers() == {
        "first": {"macs": first, "rate": 1.0, "analog": True, "sops": 0.0},  # it sees the image, even of ones
        "second": {"macs": second, "rate": 0.75, "analog": False, "sops": 0.75 * second},
    }
    energy = meter.energy()
    assert (energy["dense_macs"], energy["macs"], energy["sops"]) == (104, 8, 72)
    assert energy["energy_mj"] == pytest.approx(1e-9 * (4.6 * 8 + 0.9 * 72)) and energy["firing_rate"] == 0.75
    with SpikeMeter(net, analog=["second"]) as meter:
        net(x)
    assert (meter.energy()["macs"], meter.energy()["sops"]) == (96, 8)  # as asked
    with SpikeMeter(net, analog=()) as meter:
        net(x / 2)
    assert [row["analog"] for row in meter.layers().values()] == [True, False]  # found out from the values


def test_rates_and_operations_of_a_network():
    """Over two batches of different sizes, against the spikes themselves."""
    net, batches = tiny(), [torch.rand(5, 1, 6, 6), torch.rand(2, 1, 6, 6)]
    with SpikeRecorder(net) as recorder, SpikeMeter(net) as meter:
        expected = [net(batches[0]), net.sequence(batches[1]).mean(0)]
    assert all(torch.allclose(net(x), e) for x, e in zip(batches, expected))
    names = list(neuron_layers(net))
    assert recorder.names == names == list(meter.rates()) and meter.images == 7
    assert names[:2] == ["lif1", "blocks.0.lif1"]
    spikes = {n: recorder[n] for n in names}
    for name, rate in meter.rates().items():
        assert spikes[name].dtype == torch.bool and spikes[name].shape[:2] == (3, 7)
        assert rate == pytest.approx(spikes[name].double().mean().item()) and 0 < rate < 1
    layers = meter.layers()
    assert [n for n, row in layers.items() if row["analog"]] == ["conv1", "classifier"]
    sources = {
        "blocks.0.conv1": "lif1",
        "blocks.0.conv2": "blocks.0.lif1",
        "blocks.1.conv1": "blocks.0.lif3",
        "blocks.1.conv2": "blocks.1.lif1",
        "blocks.1.shortcut.0": "blocks.0.lif3",
    }
    macs = {
        "blocks.0.conv1": 2 * 2 * 9 * 36,
        "blocks.0.conv2": 2 * 2 * 9 * 36,
        "blocks.1.conv1": 2 * 3 * 9 * 9,
        "blocks.1.conv2": 3 * 3 * 9 * 9,
        "blocks.1.shortcut.0": 2 * 3 * 9,
    }
    sops = 0.0
    for name, source in sources.items():
        assert layers[name]["macs"] == 3 * macs[name]
        assert layers[name]["sops"] == pytest.approx(3 * macs[name] * spikes[source].double().mean().item())
        sops += layers[name]["sops"]
    energy = meter.energy()
    head = 3 * 4 * (5 * 1 + 2 * 3) / 7  # the first batch averaged before its head, the second had logits at each step
    assert energy["sops"] == pytest.approx(sops) and energy["macs"] == pytest.approx(2 * 9 * 36 + head)
    assert energy["energy_mj"] == pytest.approx(1e-9 * (4.6 * (18 * 36 + head) + 0.9 * sops))
    assert energy["firing_rate"] == pytest.approx(
        torch.cat([s.flatten() for s in spikes.values()]).double().mean().item()
    )
    assert all(type(v) is float for v in [*energy.values(), *meter.rates().values()] if v != int(v))


def test_silent_and_saturated_networks():
    net = tiny()
    for bias, rate in ((-9.0, 0.0), (9.0, 1.0)):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.bias, bias)
        with SpikeMeter(net) as meter:
            net(torch.rand(2, 1, 6, 6))
        energy = meter.energy()
        assert set(meter.rates().values()) == {rate} and energy["firing_rate"] == rate
        layers = meter.layers()
        spiking = sum(row["macs"] for name, row in layers.items() if name.startswith("blocks"))
        assert energy["sops"] == rate * spiking
        assert layers["classifier"]["analog"]  # though its averages are 0 or 1 everywhere


def test_network_with_relus():
    net = get_backbone(
        argparse.Namespace(backbone="resnet-pocket"), SimpleNamespace(N_CLASSES=2, SIZE=(8, 8), CHANNELS=1)
    )
    with SpikeMeter(net) as meter:
        net(torch.rand(2, 1, 8, 8))
    energy = meter.energy()
    assert meter.rates() == {} and energy["firing_rate"] == energy["sops"] == 0
    assert (
        energy["macs"]
        == energy["dense_macs"]
        == 2 * 64 + sum(row["macs"] for name, row in meter.layers().items() if name != "classifier")
    )


def test_hooks_are_gone():
    net, x = tiny(), torch.rand(2, 1, 6, 6)
    with pytest.raises(RuntimeError):
        with SpikeMeter(net), SpikeRecorder(net):
            raise RuntimeError
    with SpikeMeter(net) as meter, SpikeRecorder(net, ["lif1"]) as recorder:
        net(x)
    before = meter.energy()
    net(x)
    assert not any(m._forward_hooks for m in net.modules())
    assert meter.energy() == before and recorder["lif1"].shape == (3, 2, 2, 6, 6)
    with pytest.raises(ValueError, match="no layer of neurons is called 'conv1': choose from lif1, blocks.0.lif1"):
        SpikeRecorder(net, ["conv1"])


def test_of_a_compiled_network():
    """A compiled network would run past hooks that come later, so it runs uncompiled meanwhile."""
    net, x = tiny(), torch.rand(2, 1, 6, 6)
    net.compile(backend="eager")
    compiled = net._compiled_call_impl
    with SpikeRecorder(net, ["lif1"]) as recorder:
        net(x)
    assert recorder["lif1"].any() and net._compiled_call_impl is compiled is not None


def test_many_spikes_are_counted_exactly():
    """More than float32 can count one by one: 2^24 and some."""

    class Ones(nn.Module):
        v_threshold = 1.0

        def forward(self, x):
            return x

    net = nn.Sequential(Ones())
    with SpikeMeter(net) as meter:
        for _ in range(17):
            net(torch.ones(1, 2**20))
        net(torch.ones(1, 1))
        net(torch.zeros(1, 1))
    assert meter.rates()["0"] == (17 * 2**20 + 1) / (17 * 2**20 + 2)
