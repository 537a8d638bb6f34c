"""Images out of a trained network, without data: Fast Meta data-free distillation (Fang et al. 2022, arXiv 2112.15278).

A generator is trained against a frozen teacher, one batch of images at a time (:class:`Synthesizer`):

    L      = bn * L_bn + oh * CE(teacher(x), y) + adv * L_adv,             x = G(z), y drawn uniformly
    L_bn   = sum_layers |mu - mu_l| + |var - var_l|     batch statistics against the teacher's BatchNorm (DeepInversion)
    L_adv  = -mean_x [argmax teacher = argmax student] KL(teacher(x) || student(x))

A batch is ``g_steps`` of Adam on its own latents z and on a copy of G; of all steps the images of the lowest loss are
kept. G itself is what the copies start from, and moves by one meta step a batch: Adam along the sum of the copy's
gradients (first-order MAML), or along G minus the copy (Reptile). After a warm-up a student, a second network of the
teacher's kind with random weights, learns from the teacher on the images so far; from then on images are also sought
where the student is still wrong.
"""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.utils.transforms import send, to_float
from models.utils.distillation import divergence
from utils.args import add_switch, number
from utils.errors import RunError

BETAS = (0.5, 0.999)  # of the generator's optimisers
REPTILE = 67.0  # scale of Reptile's gradient; Adam divides by it again, but for its epsilon


def add_synthesis_args(parser, **defaults) -> None:
    """The flags of :class:`Synthesizer`; ``defaults`` are the method's own, by flag."""
    add, share, positive = parser.add_argument, number(float, 0), number(float, 0, open_low=True)
    add("--syn_round", type=number(int, 1), default=40, help="batches that are synthesised")
    add("--synthesis_batch_size", type=number(int, 1), default=256, help="images of each of them")
    add("--nums", type=number(int, 1), default=8000, help="images kept, the latest")
    add("--g_steps", type=number(int, 1), default=10, help="steps of the generator and the latents for a batch")
    add("--nz", type=number(int, 1), default=256, help="length of a latent")
    add("--ngf", type=number(int, 1), default=64, help="channels of the generator")
    add("--lr_g", type=positive, default=0.002, help="rate of the generator; of its meta step: times --g_steps")
    add("--lr_z", type=share, default=0.01, help="rate of the latents")
    add_switch(parser, "--is_maml", default=1, help="meta step of first-order MAML, or (0) of Reptile")
    add("--oh", type=share, default=0.5, help="weight of the cross-entropy with the drawn classes")
    add("--bn", type=share, default=10.0, help="weight of the BatchNorm statistics; nothing without BatchNorm")
    add("--bn_mmt", type=number(float, 0, 1), default=0.9, help="share of earlier batches in a batch's statistics")
    add("--adv", type=share, default=1.0, help="weight of the disagreement of teacher and student")
    add("--gen_crop", type=number(int, 0), default=4, help="shift images before the teacher by up to this many pixels")
    add_switch(parser, "--gen_flip", default=1, help="mirror half of the images before the teacher")
    add("--warmup", type=number(int, 0), default=20, help="batches before the student is trained")
    add("--kd_steps", type=number(int, 1), default=400, help="steps of the student after a batch")
    add("--kd_T", type=positive, default=20.0, help="temperature of the student's distillation")
    add("--sample_batch_size", type=number(int, 1), default=256, help="images of a step of the student")
    add("--lr_s", type=positive, default=0.2, help="rate of the student (SGD, momentum 0.9, decay 1e-4)")
    add("--cosine_s", type=number(int, 0), default=200, help="batches for half a period of that rate; 0: constant")
    add("--clip_s", type=share, default=1.0, help="largest norm of the student's gradient; 0: any")
    add(
        "--student_init",
        choices=("own", "xavier"),
        default="own",
        help="random weights as the network draws its own, or the released code's, which leave all but convolutions, "
        "linear layers and BatchNorm as the teacher has them",
    )
    add_switch(
        parser,
        "--adv_early",
        help="1: as in the released code, two batches are sought against a student that has learnt nothing yet",
    )
    add_switch(
        parser,
        "--target_last_class",
        default=1,
        help="0: as in fed-mammoth, the newest class is never drawn",
    )
    add(
        "--syn_columns",
        choices=("seen", "all"),
        default="seen",
        help="logits of the synthesis: of the classes so far, or all there will ever be, as in fed-mammoth",
    )
    parser.set_defaults(**defaults)


class Generator(nn.Module):
    """Latents (B, nz) -> images (B, channels, H, W) in (0, 1), for any size.

    Linear to 2 ngf maps of a quarter of the size, BatchNorm, then twice: enlarge by two (nearest), 3x3 convolution,
    BatchNorm, LeakyReLU 0.2; a last convolution and a sigmoid. Sizes that four does not divide are cut off.
    """

    def __init__(self, size: tuple[int, int], channels: int, nz: int = 256, ngf: int = 64) -> None:
        super().__init__()
        self.size, self.start = tuple(size), (2 * ngf, *(math.ceil(s / 4) for s in size))
        self.linear = nn.Linear(nz, math.prod(self.start))
        layers: list[nn.Module] = [nn.BatchNorm2d(2 * ngf)]
        for out in (2 * ngf, ngf):
            conv = nn.Conv2d(2 * ngf, out, 3, padding=1, bias=False)
            layers += [nn.Upsample(scale_factor=2), conv, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
        self.maps = nn.Sequential(*layers, nn.Conv2d(ngf, channels, 3, padding=1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        maps = self.maps(self.linear(z).view(-1, *self.start))
        return maps[..., : self.size[0], : self.size[1]]


class BatchNormTerm:
    """L_bn of the batches that pass a network while the ``with`` block lasts.

    With ``momentum`` m, the statistics of a batch are (1 - m) times its own plus m times those remembered.
    """

    def __init__(self, net: nn.Module, momentum: float = 0.0) -> None:
        self.layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        self.momentum = momentum
        self.now: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.known: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> BatchNormTerm:
        self._hooks = [m.register_forward_pre_hook(self._look) for m in self.layers]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, layer: nn.Module, args: tuple) -> None:
        var, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
        self.now[layer] = mean, var

    def value(self) -> Tensor | float:
        """L_bn of the latest batch, a scalar; 0 for a network without BatchNorm."""
        total: Tensor | float = 0.0
        for layer in self.layers:
            for now, known, goal in zip(
                self.now[layer],
                self.known.get(layer, (None, None)),
                (layer.running_mean, layer.running_var),
                strict=True,
            ):
                if known is not None:
                    now = (1 - self.momentum) * now + self.momentum * known
                total = total + (now - goal).norm()
        return total

    def remember(self) -> None:
        """Take the statistics of the latest batch into the moving ones; does nothing without ``momentum``."""
        for layer, (mean, var) in self.now.items() if self.momentum else ():
            now = mean.detach(), var.detach()
            old = self.known.get(layer, now)
            self.known[layer] = tuple(
                self.momentum * o + (1 - self.momentum) * n for o, n in zip(old, now, strict=True)
            )
        self.now = {}


def adversarial(student: Tensor, teacher: Tensor) -> Tensor:
    """L_adv of logits (B, C): a scalar, the lower the more the two differ where they name the same class."""
    agree = (student.argmax(1) == teacher.argmax(1)).float()
    return -(agree * divergence(student, teacher)).mean()


def add_fomaml_grad(base: nn.Module, fast: nn.Module) -> None:
    """First-order MAML (Finn et al. 2017): the gradients of the copy are added to those of its origin."""
    for p, q in zip(base.parameters(), fast.parameters(), strict=True):
        p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad


def add_reptile_grad(base: nn.Module, fast: nn.Module) -> None:
    """Reptile (Nichol et al. 2018): the way from where the copy has come to is a gradient of its origin."""
    for p, q in zip(base.parameters(), fast.parameters(), strict=True):
        way = REPTILE * (p.detach() - q.detach())
        p.grad = way if p.grad is None else p.grad + way


def random_twin(net: nn.Module, init: str = "own") -> nn.Module:
    """A copy of a network with random weights, drawn on the CPU from the global generator.

    Args:
        init: 'own' draws as the layers (``reset_parameters``) and timm's networks (``init_weights``) do themselves,
            running statistics included. 'xavier' is the rule of TARGET's released code: Xavier-normal weights and
            N(0, 1) biases for convolutions and linear layers, N(1, 0.02^2) scales for BatchNorm, the rest untouched.
    """
    twin = copy.deepcopy(net).cpu()
    for module in twin.modules():
        if init == "own" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif init == "xavier" and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias)
        elif init == "xavier" and isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.02)
            nn.init.zeros_(module.bias)
    if init == "own" and callable(getattr(twin, "init_weights", None)):
        twin.init_weights()
    return twin.to(next(net.parameters()).device).requires_grad_(True)


def endless(n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Positions of batches of ``n`` samples, (at most batch_size,): one random order after the other, for ever."""
    while True:
        yield from torch.randperm(n, generator=generator).split(batch_size)


class Synthesizer:
    """Synthesis from one teacher. Draws come from the global CPU generator.

    Args:
        teacher: logits (B, N) of normalised images; it is copied, frozen and set to evaluation.
        size, channels: of the images. columns: how many logits count, from the first on. n_targets: how many classes
            are drawn, from the first on.
        view: (images (B, C, H, W) in [0, 1]) -> what the teacher sees of a batch while it is made; differentiable.
        train_view: the same for the images the student is trained on.
        settings: the flags of :func:`add_synthesis_args`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        size: tuple[int, int],
        channels: int,
        columns: int,
        n_targets: int,
        view: Callable[[Tensor], Tensor],
        train_view: Callable[[Tensor], Tensor],
        settings: Namespace,
    ) -> None:
        self.s, self.columns, self.n_targets, self.view, self.train_view = (
            settings,
            columns,
            n_targets,
            view,
            train_view,
        )
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.student = random_twin(teacher, settings.student_init)
        for net in (self.teacher, self.student):  # gradients with respect to images are too small for float16
            if hasattr(net, "set_precision"):
                net.set_precision("fp32")
        self.device = next(teacher.parameters()).device
        self.generator = Generator(size, channels, settings.nz, settings.ngf).to(self.device)
        self.meta = torch.optim.Adam(self.generator.parameters(), settings.lr_g * settings.g_steps, betas=BETAS)
        self.statistics = BatchNormTerm(self.teacher, settings.bn_mmt)
        self.opt = torch.optim.SGD(self.student.parameters(), settings.lr_s, momentum=0.9, weight_decay=1e-4)
        self.schedule = None
        if settings.cosine_s:
            self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, settings.cosine_s, eta_min=2e-4)
        self.losses: list[list[Tensor]] = []  # of each step of each batch

    def run(self) -> tuple[Tensor, Tensor]:
        """All batches, with the student trained in between.

        Returns:
            The latest ``nums`` images, uint8 (n, C, H, W), and the classes they were made for, int64 (n,).

        Raises:
            RunError: the loss is not finite.
        """
        s, images, targets = self.s, [], []
        for i in range(s.syn_round):
            x, y = self.batch(adversarial=s.adv > 0 and i >= s.warmup - s.adv_early)
            images.append((x * 255).round().to(torch.uint8))
            targets.append(y)
            # after the last batch nobody would look at the student again
            if i >= s.warmup - (1 - s.adv_early) and i + 1 < s.syn_round and s.adv > 0:
                self.train_student(torch.cat(images)[-s.nums :])
        return torch.cat(images)[-s.nums :], torch.cat(targets)[-s.nums :]

    def batch(self, adversarial: bool) -> tuple[Tensor, Tensor]:
        """One batch of images (B, C, H, W) in [0, 1] with classes (B,), and one meta step of the generator."""
        s = self.s
        z = send(torch.randn(s.synthesis_batch_size, s.nz), self.device).requires_grad_()
        targets = send(torch.randint(self.n_targets, (s.synthesis_batch_size,)), self.device)
        fast = copy.deepcopy(self.generator)
        opt = torch.optim.Adam([{"params": fast.parameters()}, {"params": [z], "lr": s.lr_z}], s.lr_g, betas=BETAS)
        self.student.eval()
        self.meta.zero_grad()
        lowest, best = torch.full((), math.inf, device=self.device), None
        self.losses.append([])
        with self.statistics:
            for _ in range(s.g_steps):
                images = fast(z)
                loss = self.loss(images, targets, adversarial)
                better = loss.detach() < lowest  # on the device: no step waits for a number
                lowest = torch.where(better, loss.detach(), lowest)
                best = images.detach() if best is None else torch.where(better, images.detach(), best)
                self.losses[-1].append(loss.detach())
                opt.zero_grad()
                loss.backward()
                if s.is_maml:
                    add_fomaml_grad(self.generator, fast)
                opt.step()
            self.statistics.remember()
        if not torch.isfinite(lowest):
            raise RunError("the loss of the image generator is not finite: lower --lr_g or --lr_s")
        if not s.is_maml:
            add_reptile_grad(self.generator, fast)
        self.meta.step()
        return best, targets

    def loss(self, images: Tensor, targets: Tensor, adversarial_too: bool) -> Tensor:
        """L of a batch of images (B, C, H, W) in [0, 1] for the classes ``targets`` (B,): a scalar."""
        seen = self.view(images)
        said = self.teacher(seen)[:, : self.columns]
        loss = self.s.oh * F.cross_entropy(said, targets) + self.s.bn * self.statistics.value()
        if adversarial_too:
            loss = loss + self.s.adv * adversarial(self.student(seen)[:, : self.columns], said)
        return loss

    def train_student(self, images: Tensor) -> None:
        """``kd_steps`` steps of distillation on uint8 images (n, C, H, W): T^2 KL at temperature ``kd_T``."""
        s = self.s
        self.student.train()
        batches = endless(len(images), s.sample_batch_size)
        for _ in range(s.kd_steps):
            x = self.train_view(to_float(images[send(next(batches), self.device)]))
            with torch.no_grad():
                said = self.teacher(x)[:, : self.columns]
            self.opt.zero_grad()
            divergence(self.student(x)[:, : self.columns], said, s.kd_T).mean().backward()
            if s.clip_s:
                torch.nn.utils.clip_grad_norm_(self.student.parameters(), s.clip_s)
            self.opt.step()
        if self.schedule is not None:
            self.schedule.step()
