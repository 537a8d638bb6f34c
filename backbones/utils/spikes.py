"""What a spiking network does while it runs: firing rates, operations, energy, and the spikes themselves.

    with SpikeMeter(net) as meter:
        net(x)
    meter.rates()   # {"lif1": 0.13, "blocks.0.lif1": 0.08, ...}
    meter.energy()  # {"macs": ..., "sops": ..., "energy_mj": ..., ...}, for each image

    with SpikeRecorder(net, ["lif1"]) as recorder:
        net(x)
    recorder["lif1"]  # bool (T, B, C, H, W)

Both are forward hooks on the modules, which add no waiting for a GPU until results are asked for, and are gone with the
block. Within it a compiled network runs uncompiled. The measured network need not spike: of a network with ReLUs the
meter counts the multiply-accumulates that its twin is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

MAC_PJ, AC_PJ = 4.6, 0.9  # float32, 45 nm: Horowitz, "Computing's energy problem", ISSCC 2014


def neuron_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers of spiking neurons under their names: SpikingJelly's nodes, whose ``v_threshold`` gives them away."""
    return {name: m for name, m in net.named_modules() if hasattr(m, "v_threshold")}


class _Hooked:
    """A block in which ``hooks()``, pairs of a module and a forward hook, are in place."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def hooks(self) -> Iterable[tuple[nn.Module, object]]:
        raise NotImplementedError

    def __enter__(self):
        self._handles = [module.register_forward_hook(hook) for module, hook in self.hooks()]
        self._compiled, self.net._compiled_call_impl = self.net._compiled_call_impl, None  # would pass hooks by
        return self

    def __exit__(self, *_) -> None:
        self.net._compiled_call_impl = self._compiled
        for handle in self._handles:
            handle.remove()


class _Count:
    """Sums over one layer's calls: calls and sizes as numbers, sums as float64 scalars on the device."""

    def __init__(self) -> None:
        self.n = self.macs = 0
        self.sum: torch.Tensor | float = 0.0
        self.analog: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor) -> None:
        self.n += x.numel()
        self.sum = self.sum + x.sum(dtype=torch.float32).double()


class SpikeMeter(_Hooked):
    """Firing rates, operations and energy over all forward passes within the block.

    Multiply-accumulates (MACs) are those of convolutions and linear layers as they were run: all time steps together,
    but the stem only once where the network computes it once, and the head once where it sees the time average.
    A layer that was never given anything but 0 and 1 needs no multiplication: it makes a synaptic operation (SOP), one
    accumulation (AC), for each MAC whose input is 1; of its MACs, counted as dense ones, that is the share of ones
    in its input. Layers with other inputs (the stem, a head behind an average) pay their MACs in full. Batch norms
    fold into convolutions, additions of neurons and shortcuts are left out.

    Args:
        net: a backbone. analog: names of layers that count as analog whatever their input; default: the first that is
            run, which sees the image, and ``classifier``, which sees averages.
    """

    def __init__(self, net: nn.Module, analog: Iterable[str] | None = None) -> None:
        super().__init__(net)
        self.images = 0
        self._named = None if analog is None else set(analog)
        self._neurons = {name: _Count() for name in neuron_layers(net)}
        self._synapses: dict[str, _Count] = {}

    def hooks(self):
        for name, module in neuron_layers(self.net).items():
            yield module, self._neuron_hook(self._neurons[name])
        for name, module in self.net.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                yield module, self._synapse_hook(name)
        yield self.net, self._net_hook

    def _net_hook(self, net, inputs, output) -> None:
        self.images += len(inputs[0])

    @staticmethod
    def _neuron_hook(count: _Count):
        return lambda module, inputs, output: count.add(output.detach())

    def _synapse_hook(self, name: str):
        def hook(module, inputs, output):
            count, x = self._synapses.setdefault(name, _Count()), inputs[0].detach()
            per_output = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
            count.macs += output.numel() * per_output
            count.add(x)
            count.analog = count.analog + (x * (1 - x)).abs().sum(dtype=torch.float32)

        return hook

    def rates(self) -> dict[str, float]:
        """Spikes for each neuron and time step, by layer; layers that have not been run are left out."""
        return {name: float(c.sum) / c.n for name, c in self._neurons.items() if c.n}

    def macs(self) -> dict[str, float]:
        """Dense MACs for each image, all time steps together, by layer. Known from shapes alone (device 'meta')."""
        return {name: c.macs / self.images for name, c in self._synapses.items()}

    def layers(self) -> dict[str, dict[str, float | bool]]:
        """By layer with synapses: ``macs`` for each image, ``rate`` (mean input), ``analog`` and ``sops``."""
        named = {*list(self._synapses)[:1], "classifier"} if self._named is None else self._named
        table = {}
        for name, macs in self.macs().items():
            count = self._synapses[name]
            analog, rate = name in named or float(count.analog) > 0, float(count.sum) / count.n
            table[name] = {"macs": macs, "rate": rate, "analog": analog, "sops": 0.0 if analog else rate * macs}
        return table

    def energy(self) -> dict[str, float]:
        """For each image, all time steps together.

        Returns:
            ``dense_macs``: of all layers. ``macs``: of the analog ones. ``sops``: accumulations of the others.
            ``energy_mj``: 4.6 pJ for each of ``macs`` and 0.9 pJ for each of ``sops``, in millijoule.
            ``firing_rate``: spikes for each neuron and time step, over all layers (0 without neurons).
        """
        table = self.layers().values()
        macs, sops = sum(r["macs"] for r in table if r["analog"]), sum(r["sops"] for r in table)
        spikes, n = sum(float(c.sum) for c in self._neurons.values()), sum(c.n for c in self._neurons.values())
        return {
            "dense_macs": sum(r["macs"] for r in table),
            "macs": macs,
            "sops": sops,
            "energy_mj": 1e-9 * (MAC_PJ * macs + AC_PJ * sops),
            "firing_rate": spikes / n if n else 0.0,
        }


class SpikeRecorder(_Hooked):
    """The spikes of some layers, for raster plots: ``recorder[name]`` is bool (T, B, ...).

    Forward passes are joined along the batch, so they must have the same number of time steps. Spikes are kept on their
    device, a byte each.

    Args:
        layers: names out of :func:`neuron_layers`; default: all.

    Raises:
        ValueError: a name that is none of them.
    """

    def __init__(self, net: nn.Module, layers: Iterable[str] | None = None) -> None:
        super().__init__(net)
        known = neuron_layers(net)
        self.names = list(known) if layers is None else list(layers)
        if unknown := [n for n in self.names if n not in known]:
            raise ValueError(f"no layer of neurons is called {unknown[0]!r}: choose from {', '.join(known)}")
        self._spikes: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}

    def hooks(self):
        known = neuron_layers(self.net)
        for name in self.names:
            yield known[name], self._hook(self._spikes[name])

    @staticmethod
    def _hook(spikes: list[torch.Tensor]):
        return lambda module, inputs, output: spikes.append(output.detach().bool())

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.cat(self._spikes[name], 1).cpu()
