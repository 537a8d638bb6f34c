"""STAER, temporal aligned rehearsal for spiking networks (arXiv 2601.20870), after its released code.

    L = CE(mean_t z(x, x'), (y, y')) + beta * A                                        x' from a buffer of images
    A = (D(z_T(b), p_T) + alpha1 D(z_T(c), p_T/2) + alpha2 D(z_T(c), p_2T)) / (1 + alpha1 + alpha2)

z_T(b): logits over T steps of images b from a second buffer now; p_S: what the network said of them over S steps when
they were new (contraction, same, expansion); c: the first half of a batch of b; D: the Soft-DTW divergence
(models/utils/soft_dtw.py), divided by the mean length of the two sequences (``--sdtw_norm``).

The body of the paper is not public text; what the code leaves open has a flag. ``--staer_resample rerun`` (default)
runs the network for T/2, T and 2T steps to record p, as the released code does; ``interp`` is its older state: one
trace over T steps, and both sides are stretched in time by interpolation (``--sdtw_T``). ``--staer_buffers shared``
keeps labels and traces of one set of images, where the released code fills two reservoirs independently, with up to
twice the images of replay. ``--bn_update main_only`` keeps the five other forward passes from moving the running
statistics of BatchNorm, which alone makes the network another one than replay's. ``--share_forward 1`` takes z_T(c)
from z_T(b) instead of a pass of its own (BatchNorm sees another batch).

Draws for the alignment have a generator of their own: with ``--beta 0 --bn_update main_only`` the run is ``ser``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ser import Ser
from models.utils.soft_dtw import alignment_loss, soft_dtw_divergence
from models.utils.spiking import mean_squares
from utils.args import add_switch, number
from utils.batch_norm import bn_track_stats
from utils.buffer import Buffer
from utils.conf import derive_seed
from utils.errors import UserError


@contextmanager
def own_draws(*keys) -> Iterator[None]:
    """Within the block, NumPy's and PyTorch's CPU generators are others, seeded by ``keys``; afterwards as before."""
    before = np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(*keys)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before[0])
        torch.set_rng_state(before[1])


def stretched(logits: Tensor, steps: int) -> Tensor:
    """Sequences (B, T, K) with ``steps`` steps, linearly interpolated in time (end points are half a step inside)."""
    if steps == logits.shape[1]:
        return logits
    return F.interpolate(logits.transpose(1, 2), size=steps, mode="linear", align_corners=False).transpose(1, 2)


class Staer(Ser):
    """Replay of images, and of what the network used to say of them in time, at three speeds."""

    NAME = "staer"

    @staticmethod
    def get_parser(parser):
        Ser.get_parser(parser)
        add, weight = parser.add_argument, number(float, 0)
        add("--beta", type=weight, default=1e-4, help="weight of the alignment")
        add("--alpha1", type=weight, default=0.5, help="weight of contraction")
        add("--alpha2", type=weight, default=0.5, help="weight of expansion")
        add("--sdtw_gamma", type=number(float, 0, open_low=True), default=1.0, help="smoothing of Soft-DTW")
        add_switch(parser, "--sdtw_norm", default=1, help="divide by the mean length")
        add(
            "--staer_resample",
            choices=("rerun", "interp"),
            default="rerun",
            help="traces of T/2, T and 2T steps of the network, or one trace that is interpolated in time",
        )
        add("--sdtw_T", choices=("halve", "same", "double"), default="same", help="length with --staer_resample interp")
        add(
            "--staer_align",
            choices=("dtw", "mse"),
            default="dtw",
            help="mse: squares of mean logits instead (ablation)",
        )
        add(
            "--staer_buffers",
            choices=("separate", "shared"),
            default="separate",
            help="two reservoirs of --buffer_size (released code), or one whose images have labels and traces",
        )
        add(
            "--bn_update",
            choices=("all", "main_only"),
            default="all",
            help="which forward passes move BatchNorm's running statistics",
        )
        add_switch(parser, "--share_forward", help="1: no second pass for half the batch")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        if self.rerun and (backbone.T < 2 or backbone.T % 2):
            raise UserError(
                f"--T {backbone.T}: contraction takes half of the steps; give an even number, or --staer_resample "
                "interp"
            )
        self.traces = Buffer(args.buffer_size) if args.staer_buffers == "separate" else self.buffer
        self.align = args.staer_align

    @property
    def rerun(self) -> bool:
        return self.args.staer_resample == "rerun"

    # ---------------------------------------------------------------- what the network says now, to be kept

    def spans(self) -> list[int]:
        """Steps of the traces that are kept, one after another."""
        T = self.net.T
        return [T // 2, T, 2 * T] if self.rerun else [T]

    @torch.no_grad()
    def record(self, inputs: Tensor) -> Tensor:
        """Traces of a batch (B, all steps, K), contraction, same and expansion joined.

        A static image is shown for fewer or more steps; events (B, T, C, H, W) are counted into fewer or more frames
        (the released code, for images only, would play half of a recording, or the whole of it twice).
        """
        said = []
        for steps in self.spans():
            shown = self.dataset.rebin(inputs, steps) if inputs.dim() == 5 else inputs
            said.append(self.net.sequence(shown, steps).transpose(0, 1))
        return torch.cat(said, 1)

    @torch.no_grad()
    def kept_traces(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Images of the buffer as in a test, what the network said of them over T steps (n, T, K), and their tasks."""
        if self.traces.is_empty():
            return None
        images, *_, traces, tasks = self.traces.get_all_data(transform=self.normalization_transform, device=self.device)
        return images, traces.split(self.spans(), 1)[1 if self.rerun else 0], tasks

    # ---------------------------------------------------------------- alignment

    def alignment(self, x: Tensor, traces: Tensor, half: int) -> Tensor:
        """A for images x (B, ...) with traces (B, all steps, K); the first ``half`` of them are aligned in speed."""
        a = self.args
        now = self.net.sequence(x).transpose(0, 1)
        if not self.rerun:
            steps = {"halve": max(round(self.net.T / 2), 1), "same": self.net.T, "double": 2 * self.net.T}[a.sdtw_T]
            now, then = stretched(now, steps), stretched(traces, steps)
            if self.align == "mse":
                return mean_squares(now.transpose(0, 1), then.transpose(0, 1))
            return soft_dtw_divergence(now, then, a.sdtw_gamma, bool(a.sdtw_norm)).mean()
        half = min(half, len(x)) if a.alpha1 or a.alpha2 else 0
        some = None
        if half:
            some = now[:half] if a.share_forward else self.net.sequence(x[:half]).transpose(0, 1)
        parts = traces.split(self.spans(), 1)
        if self.align == "mse":
            total = mean_squares(now.transpose(0, 1), parts[1].transpose(0, 1))
            for alpha, part in ((a.alpha1, parts[0]), (a.alpha2, parts[2])) if half else ():
                total = total + alpha * mean_squares(some.transpose(0, 1), part[:half].transpose(0, 1))
            return total / (1 + a.alpha1 + a.alpha2)
        return alignment_loss(now, some, parts, a.sdtw_gamma, a.alpha1, a.alpha2, bool(a.sdtw_norm))

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        self.opt.zero_grad()
        loss = self.replay(inputs, labels)
        keys = (torch.initial_seed(), "staer", self.task_iteration)  # the seed of this phase and client
        moves = nullcontext() if self.args.bn_update == "all" else bn_track_stats(self.net, False)
        with moves, own_draws(*keys, "align"):
            traces = self.record(inputs)
            if not self.traces.is_empty():
                x, *_, kept, _ = self.traces.get_data(
                    self.args.minibatch_size, transform=self.transform, device=self.device
                )
                if self.args.beta or self.args.bn_update == "all":
                    term = self.alignment(x, kept, len(inputs) // 2)
                    loss = loss + self.args.beta * term
        loss.backward()
        self.opt.step()
        tasks = torch.full_like(labels, self.current_task)  # for logit_drift
        if self.traces is self.buffer:
            self.buffer.add_data(examples=not_aug_inputs, labels=labels, logits=traces, task_labels=tasks)
        else:
            self.buffer.add_data(examples=not_aug_inputs, labels=labels)
            with own_draws(*keys, "keep"):
                self.traces.add_data(examples=not_aug_inputs, logits=traces, task_labels=tasks)
        return loss.detach()
