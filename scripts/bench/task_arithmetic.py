"""What task arithmetic costs: curvature, the penalty in a step, the tangent regime, and how they grow with tasks.

factors   One pass over ``--images`` images: a drawn cotangent for each image (B and A in the same pass), and all C unit
          vectors, which is exact. Seconds, and the ratio.
step      A training step in the tangent regime: one forward-mode product and one backward pass at theta_0, against
          differentiating through the forward-mode product as published code does; and a step of the network itself.
output    f_lin of a batch without a graph: both terms from one product in forward mode, against a pass of its own for
          f(x, theta_0), and against the network itself.
penalty   A step with the penalty over a step without; target: at most 15 % more.
tasks     The penalty's cost for 2, 4 and 8 tasks, accumulated (eq. 8) and one by one (eq. 7), in one step.
memory    Peak memory of the two ways to take a step, each in a process of its own, less what was there before: what is
          resident, on a GPU what PyTorch has allocated.

The network is a timm ViT without pretrained weights (``--vit_name``, by default ViT-Ti/16), so that nothing is
downloaded. All sides run in turns in one process.

    python scripts/bench/task_arithmetic.py --out task_arithmetic.csv     # --part step --vit_name vit_tiny_patch16_224
    python scripts/bench/task_arithmetic.py --device cuda --vit_name vit_base_patch16_224 --batch 32
"""

import json
import subprocess
import sys

import common
import torch
import torch.nn.functional as F

from backbones.vit import as_backbone
from models.task_arithmetic import FROZEN, group_of
from models.utils import kfac
from models.utils.kfac import Layout, Penalty, References
from models.utils.linearize import Linearized, differentiable_forward
from utils.evaluate import evaluating

CLASSES = 10


def network(o) -> tuple[Linearized, Layout]:
    import timm

    torch.manual_seed(0)
    net = as_backbone(timm.create_model(o.vit_name, num_classes=0), CLASSES).eval().requires_grad_(False).to(o.device)
    modules = dict(net.named_modules())
    names = [
        n
        for n, _ in net.named_parameters()
        if not n.startswith("classifier.") and group_of(n, modules[n.rpartition(".")[0]]) not in FROZEN
    ]
    return Linearized(net, names, lambda x: F.normalize(net(x, returnt="features"), dim=1)), Layout.of(net, names)


class Steps:
    """One training step on a batch, in three ways; each returns the gradient."""

    def __init__(self, lin: Linearized, batch: int, device: str):
        self.lin, size = lin, lin.net.patch_embed.img_size
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(batch, 3, *size, generator=g).to(device)
        self.y = torch.randint(CLASSES, (batch,), generator=g).to(device)
        self.W = F.normalize(torch.randn(CLASSES, lin.net.feature_dim, generator=g), dim=1).to(device)
        self.tau = {n: 1e-3 * torch.randn(p.shape, generator=g).to(device) for n, p in lin.start().items()}

    def loss(self, f):
        return F.cross_entropy(20 * F.normalize(f, dim=1) @ self.W.T, self.y)

    def mine(self):
        return self.lin.step(self.x, self.tau, lambda f0, product: self.loss(f0 + product))[1]

    def through(self):
        leaves = {n: t.clone().requires_grad_() for n, t in self.tau.items()}
        with evaluating(self.lin.net), differentiable_forward(self.lin.net):
            f0, product = torch.func.jvp(lambda t: self.lin.at(t, self.x), (self.lin.start(),), (leaves,))
        grads = torch.autograd.grad(self.loss(f0 + product), list(leaves.values()))
        return dict(zip(leaves, grads))

    def network(self):
        start = self.lin.start()
        theta = {n: (start[n] + t).requires_grad_() for n, t in self.tau.items()}
        grads = torch.autograd.grad(self.loss(self.lin.at(theta, self.x)), list(theta.values()))
        return dict(zip(theta, grads))


def line(part, what, times, mine, theirs, **more):
    low = {n: common.low_and_mid(t["wall"], digits=5) for n, t in times.items()}
    ratio = common.ratios(times[theirs]["wall"], times[mine]["wall"])
    print(f"{part:8} {what:30} {mine} {low[mine][0]:.4f} s   {theirs} {low[theirs][0]:.4f} s   x{ratio[1]:.2f}")
    return {"part": part, "what": what, "mine_s": low[mine][0], "theirs_s": low[theirs][0], "ratio": ratio[1], **more}


def bench_factors(o):
    lin, layout = network(o)
    x = torch.randn(o.images, 3, *lin.net.patch_embed.img_size, device=o.device)

    def side(draws):
        return lambda r: kfac.curvature(lin.net, layout, lin.function, x.split(8), draws)

    side(1)(0)
    times = common.in_turns({"drawn": side(1), "exact": side(0)}, max(o.repeats // 3, 1), device=o.device)
    return [line("factors", f"{o.images} images, C = {lin.net.feature_dim}", times, "drawn", "exact")]


def bench_step(o):
    lin, _ = network(o)
    s = Steps(lin, o.batch, o.device)
    a, b = s.mine(), s.through()
    far = max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in a)
    sides = {"mine": lambda r: s.mine(), "through": lambda r: s.through(), "network": lambda r: s.network()}
    times = common.in_turns(sides, o.repeats, device=o.device)
    what = f"batch {o.batch}"
    return [
        line("step", what, times, "mine", "through", difference=far),
        line("step", f"{what}, the network itself", times, "network", "mine"),
    ]


def bench_output(o):
    lin, _ = network(o)
    s = Steps(lin, o.batch, o.device)
    sides = {
        "mine": lambda r: lin(s.x, s.tau),
        "apart": lambda r: lin.output(s.x) + lin.expansion(s.x, [s.tau])[1][0],
        "network": lambda r: lin.output(s.x),
    }
    times = common.in_turns(sides, o.repeats, device=o.device)
    return [
        line("output", f"batch {o.batch}", times, "mine", "apart"),
        line("output", f"batch {o.batch}, the network itself", times, "network", "mine"),
    ]


def references(lin, layout, n, device, images=8):
    g, tasks = torch.Generator().manual_seed(2), []
    for _ in range(n):
        x = torch.randn(images, 3, *lin.net.patch_embed.img_size, generator=g).to(device)
        tasks.append(kfac.curvature(lin.net, layout, lin.function, [x], 1, generator=g))
    return tasks


def bench_penalty(o):
    lin, layout = network(o)
    s, refs = Steps(lin, o.batch, o.device), References()
    for t in references(lin, layout, 2, o.device):
        refs.add(t)
    penalty = Penalty([(1.0, refs.mean())], lin.start())

    def with_penalty(r):
        grads, (_, pulls) = s.mine(), penalty(s.tau)
        for n, p in pulls.items():
            grads[n].add_(p, alpha=500.0)

    times = common.in_turns({"without": lambda r: s.mine(), "with": with_penalty}, o.repeats, device=o.device)
    return [line("penalty", f"batch {o.batch}", times, "without", "with")]


def bench_tasks(o):
    lin, layout = network(o)
    s, tasks, out, penalties = Steps(lin, 1, o.device), references(lin, layout, 8, o.device), [], {}
    for T in (2, 4, 8):
        refs = References()
        for t in tasks[:T]:
            refs.add(t)
        penalties[f"sum{T}"] = Penalty([(1.0, refs.mean())], lin.start())
        penalties[f"each{T}"] = Penalty(kfac.each(tasks[:T]), lin.start())
    times = common.in_turns({n: lambda r, p=p: p(s.tau) for n, p in penalties.items()}, o.repeats, device=o.device)
    for T in (4, 8):
        out.append(line("tasks", f"accumulated, {T} tasks over 2", times, "sum2", f"sum{T}"))
        out.append(line("tasks", f"one by one, {T} tasks over 2", times, "each2", f"each{T}"))
    return out


def bench_memory(o):
    peaks, out = {}, []
    for side in ("mine", "through", "network"):
        command = [sys.executable, __file__, "--child", side, "--vit_name", o.vit_name]
        command += ["--batch", str(o.batch), "--device", o.device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[side] = json.loads(done.stdout.splitlines()[-1])
    for theirs in ("through", "network"):
        ratio = peaks[theirs] / peaks["mine"]
        what = f"batch {o.batch}, {theirs}"
        print(f"memory   {what:30} mine {peaks['mine']:.0f} MB   {theirs} {peaks[theirs]:.0f} MB   x{ratio:.2f}")
        out.append(
            {"part": "memory", "what": what, "mine_mb": peaks["mine"], "theirs_mb": peaks[theirs], "ratio": ratio}
        )
    return out


def child(o):
    lin, _ = network(o)
    getattr(Steps(lin, 1, o.device), o.child)()  # what is loaded at first use does not count
    steps = Steps(lin, o.batch, o.device)
    common.give_back_memory()
    if torch.device(o.device).type == "cuda":
        before = torch.cuda.memory_allocated(o.device)
        torch.cuda.reset_peak_memory_stats(o.device)
        getattr(steps, o.child)()
        print(json.dumps((torch.cuda.max_memory_allocated(o.device) - before) / 2**20))
        return
    before = common.resident()
    common.peak_rss(reset=True)
    getattr(steps, o.child)()
    print(json.dumps(common.peak_rss() - before))


PARTS = {
    "factors": bench_factors,
    "step": bench_step,
    "output": bench_output,
    "penalty": bench_penalty,
    "tasks": bench_tasks,
    "memory": bench_memory,
}


def main() -> None:
    parser = common.standard_options(__doc__, 5)
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--vit_name", default="vit_tiny_patch16_224", help="a model of timm (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images of a step (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2, help="for the factors (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--child", help="for the script itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(options)
        return
    common.write(options.out, [row for part in options.part for row in PARTS[part](options)])


if __name__ == "__main__":
    main()
