"""SLCA, slow learner with classifier alignment (Zhang et al. 2023, arXiv 2303.05118), after its released code.

    slow learner    the whole network is fine-tuned, the body at a rate of its own, a hundredth of the head's (sec. 3.2)
    alignment       from the second task on, the classifier is trained again on features of all classes so far, drawn
                    from N((0.9 + 0.1 (t_c + 1) / (t + 1)) mu_c, Sigma_c), t_c the class's task (sec. 3.3)
    logits          z / mean over tasks of |z_task| / tau while aligning

The aligned classifier is for testing: the next task goes on from the one before alignment, as in the released code.
Trained on the cross-entropy over the current task's classes. Under --fl (ours) the server averages, and clients'
statistics are pooled to the exact Gaussian of each class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.utils.calibrated import AFTER_THE_TASK, Calibrated, add_calibration_args
from models.utils.head_rows import HeadRowsModel
from models.utils.prototypes import Prototypes
from utils.args import number


class Slca(Calibrated, HeadRowsModel):
    """A slow body, a fast head, and an alignment after each task."""

    NAME = "slca"
    COMPATIBILITY = ["class-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--bcb_lrscale", type=number(float, 0), default=0.01, help="rate of the body, in units of --lr")
        add("--slca_shrink", type=number(float, 0, 1), default=0.1, help="how far the means of the oldest task shrink")
        add_calibration_args(parser, **AFTER_THE_TASK, rebalance_wd=5e-4, rebalance_sched="cosine")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.unaligned: dict[str, Tensor] = {}

    def body_lr(self) -> float:
        return self.args.bcb_lrscale * self.args.lr

    def begin_rounds(self, clients) -> None:
        """Back to the classifier before its alignment."""
        super().begin_rounds(clients)
        if self.unaligned:
            self.set_classifier(**self.unaligned)
            self.unaligned = {}

    def calibrate(self) -> None:
        if self.current_task == 0:
            return
        self.unaligned = {n: p.data for n, p in self.net.classifier.named_parameters()}
        super().calibrate()

    def draw_from(self, known: Prototypes):
        ends = torch.tensor([self.get_offsets(t)[1] for t in range(self.current_task + 1)])
        tasks = torch.bucketize(known.classes.cpu(), ends, right=True)
        age = (tasks + 1) / (self.current_task + 1)
        shrink = 1 - self.args.slca_shrink * (1 - age)
        return known.sampler(self.args.proto_var_scale, floor=1e-4, shrink=shrink.to(known.means))

    def groups(self, columns: range) -> list[int]:
        offsets = (self.get_offsets(t) for t in range(self.current_task + 1))
        return [
            len(range(max(a, columns.start), min(b, columns.stop)))
            for a, b in offsets
            if a < columns.stop and b > columns.start
        ]
