"""A training step (forward and backward) of spiking ResNets, against the same networks run step by step.

The other side has the same weights in modules of their own, called as snntorch's users write it: at each time step
every convolution, then its batch norm, then a neuron that carries its state to the next step; the logits are stacked.
So that both compute the same, batch norms are in evaluation mode. Answers and gradients are compared first.
``stem at every step`` is Herd's network without its shortcut for images that do not change.

Then one layer of neurons alone, forward and backward: Herd's, the loop over time with autograd's backward pass,
SpikingJelly's LIFNode, which fires and resets by another convention, and Herd's neuron by that convention.

    python scripts/bench/spiking.py --out spiking.csv
    python scripts/bench/spiking.py --device cuda --batch 64 --repeats 20
"""

import common
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

from backbones.resnet19 import STAGES, Shape
from backbones.sresnet import SpikingResNet
from backbones.utils.neurons import LIF, Spike, lif_loop


class StepLIF(nn.Module):
    """One neuron layer, one step a call: u = beta u + x - theta [u > theta], spike = [u > theta]."""

    def __init__(self):
        super().__init__()
        self.u = None

    def forward(self, x):
        reset = 0.0 if self.u is None else (self.u.detach() > 1.0).float()
        self.u = (0.0 if self.u is None else 0.5 * self.u) + x - reset
        return Spike.apply(self.u - 1.0, 2.0, False)


class StepBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first, self.second = (block.conv1, block.bn1), (block.conv2, block.bn2)
        self.shortcut = block.shortcut
        self.lif1, self.lif2, self.lif3 = StepLIF(), StepLIF(), StepLIF()

    def forward(self, x):
        out = self.lif1(self.first[1](self.first[0](x)))
        out = self.lif2(self.second[1](self.second[0](out)))
        return self.lif3(out + (x if self.shortcut is None else self.shortcut(x)))


class StepByStep(nn.Module):
    """The layers of a :class:`SpikingResNet`, run once for every time step."""

    def __init__(self, net, T):
        super().__init__()
        self.T, self.conv, self.bn, self.head = T, net.conv1, net.bn1, net.classifier
        self.lif = StepLIF()
        self.blocks = nn.ModuleList(StepBlock(b) for b in net.blocks)

    def forward(self, x):
        for m in self.modules():
            if isinstance(m, StepLIF):
                m.u = None
        out = []
        for _ in range(self.T):
            h = self.lif(self.bn(self.conv(x)))
            for block in self.blocks:
                h = block(h)
            out.append(self.head(F.adaptive_avg_pool2d(h, 1).flatten(1)))
        return torch.stack(out)


def gradients(net, logits, labels):
    net.zero_grad()
    F.cross_entropy(logits.mean(0), labels).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def report(name, times, rows, **more):
    """A line for each side: minimum and median in ms, and wall and CPU time over Herd's, turn by turn."""
    for side, t in times.items():
        low, mid = common.low_and_mid(t["wall"], 1e3, 2)
        wall, cpu = (common.ratios(t[clock], times["herd"][clock])[1] for clock in ("wall", "cpu"))
        print(f"{name:15} {side:20} {low:9.2f} ms, median {mid:9.2f} ms, x{wall:.2f} of herd (CPU seconds x{cpu:.2f})")
        rows.append(
            {"what": name, "side": side, "min_ms": low, "median_ms": mid, "ratio": wall, "cpu_ratio": cpu, **more}
        )


def network(size, options, rows):
    device = options.device
    torch.manual_seed(0)
    shape = Shape(options.channels, 3 if size == "pocket" else 1, STAGES[size])
    net = SpikingResNet(10, shape, options.T).to(device)
    x = torch.rand(options.batch, options.channels, options.pixels, options.pixels, device=device)
    y = torch.arange(options.batch, device=device) % 10
    with torch.no_grad():
        for m in net.modules():  # so that neurons fire in the last layers too, and running statistics mean something
            if isinstance(m, nn.BatchNorm2d):
                m.bias.fill_(0.5)
                m.momentum = 1.0
        net(x)
    net.eval()
    theirs = StepByStep(net, options.T)
    ours, other = net.sequence(x), theirs(x)
    a, b = gradients(net, ours, y), gradients(net, other, y)
    ours, other = ours.detach(), other.detach()
    differ = float((ours - other).abs().max() / other.abs().max()), float((a - b).norm() / b.norm())
    print(f"sresnet-{size}: relative difference of logits {differ[0]:.1e}, of gradients {differ[1]:.1e}")
    if max(differ) > 1e-2:
        raise SystemExit("the two sides do not compute the same")

    def side(forward, stem_once=True, fused=True):
        def step(_):
            net.stem_once = stem_once
            for m in net.modules():
                if isinstance(m, LIF):
                    m.fused = fused
            net.zero_grad()
            F.cross_entropy(forward(x).mean(0), y).backward()

        return step

    sides = {
        "herd": side(net.sequence),
        "stem at every step": side(net.sequence, stem_once=False),
        "neurons as a loop": side(net.sequence, fused=False),
        "step by step": side(theirs),
    }
    for step in sides.values():
        step(0)
    times = common.in_turns(sides, options.repeats * (10 if size == "pocket" else 1), device=device)
    report(f"sresnet-{size}", times, rows, batch=options.batch, T=options.T, device=device)


def neurons(options, rows):
    shape = (options.T, options.batch, *options.layer)
    x, w = (torch.randn(*shape, device=options.device) for _ in range(2))
    node = neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_reset=None,
        surrogate_function=surrogate.ATan(2.0),
        detach_reset=True,
        step_mode="m",
    ).to(options.device)
    ours, like_stock = LIF(), LIF("ge-pre")

    def stock(x):
        functional.reset_net(node)
        return node(x)

    def both(forward):
        inputs = x.clone().requires_grad_()
        spikes = forward(inputs)
        (spikes * w).sum().backward()
        return spikes.detach(), inputs.grad

    for a, b in ((ours, lambda x: lif_loop(x, None, ours.rule)[0]), (like_stock, stock)):
        for one, two in zip(both(a), both(b)):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

    def side(forward):
        inputs = x.clone().requires_grad_()

        def run(_):
            inputs.grad = None
            forward(inputs).backward(w)

        return run

    sides = {
        "herd": side(ours),
        "loop": side(lambda x: lif_loop(x, None, ours.rule)[0]),
        "herd, ge-pre": side(like_stock),
        "SpikingJelly": side(stock),
    }
    times = common.in_turns(sides, 2 + options.repeats * 5, device=options.device)
    report("neurons", times, rows, shape="x".join(map(str, shape)), device=options.device)


def main() -> None:
    parser = common.standard_options(__doc__, 5)
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--sizes", choices=STAGES, nargs="*", default=("pocket", "19"), help="(default: pocket 19)")
    parser.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--T", type=int, default=4, help="time steps (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=1, help="of the images (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=28, help="height and width of images (default: %(default)s)")
    parser.add_argument(
        "--layer", type=int, nargs=3, default=(128, 28, 28), help="layer of neurons (default: 128 28 28)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    neurons(options, rows)
    for size in options.sizes:
        network(size, options, rows)
    common.write(options.out, rows)


if __name__ == "__main__":
    main()
