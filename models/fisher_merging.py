"""Fisher merging (Matena and Raffel 2022, arXiv 2111.09832): experts averaged by how sure they are of each weight.

    theta_j = sum_t F_tj theta_tj / sum_t F_tj                                                             (eq. 4)
    F_t     = E_x E_{y ~ p(y|x, theta_t)} (d log p(y|x, theta_t) / d theta)^2,   x of task t               (eq. 3)

One label is drawn for each image (``--fisher_labels data``: the image's own, the empirical Fisher matrix). p is the
softmax over the classes of the task. Experts that fit their task better have smaller gradients everywhere; with
``--fisher_normalize`` 1 each F_t has length one, as in FusionBench, so that no expert is left out for that.

Experts are those of ``task_arithmetic``, --regime full or attention, or come with --merge_from. Under --fl clients send
sums of squares, once, after the last task.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.utils.base import plain_attention
from federated.message import Message
from models.task_arithmetic import TaskArithmetic, merger_parser
from models.utils.fisher import fisher_diagonal
from models.utils.merging import fisher_mean
from utils.args import add_switch
from utils.evaluate import evaluating


class FisherMerging(TaskArithmetic):
    """Experts of tasks, averaged weight by weight by their Fisher information."""

    NAME = "fisher_merging"
    NEEDS_WEIGHTS = "weights are merged that the network itself has"

    @staticmethod
    def get_parser(parser):
        add = merger_parser(parser, 256).add_argument
        add(
            "--fisher_labels",
            choices=("drawn", "data"),
            default="drawn",
            help="labels whose likelihood is differentiated: drawn from what the expert says, or the images' own",
        )
        add_switch(
            merger_parser(parser, 256),
            "--fisher_normalize",
            default=1,
            help="1: the Fisher diagonal of each expert has length one",
        )
        return parser

    # ---------------------------------------------------------------- server

    def prepare_merge(self, clients) -> None:
        start, fishers = self._own_lin.start(), []
        for t, tau in enumerate(self.taus):
            message = Message({**{f"theta.{n}": start[n] + d for n, d in tau.items()}, "rows": self.rows})
            total = clients.of_task(t).sum("fisher", message)
            diagonal = {n: f.to(self.device) / float(total["n"]) for n, f in total.tensors("fisher.").items()}
            if self.args.fisher_normalize:
                length = torch.stack([f.double().norm() for f in diagonal.values()]).norm().clamp(min=1e-30)
                diagonal = {n: f / length.to(f) for n, f in diagonal.items()}
            fishers.append(diagonal)
        self.solved = {n: fisher_mean([t[n] for t in self.taus], [d[n] for d in fishers]) for n in start}

    # ---------------------------------------------------------------- client

    def fisher(self, message: Message, client) -> Message:
        """Sums over images of the client of the squared gradients of log p at its expert's weights."""
        self.rows = message["rows"].to(self.device)
        theta = {n: t.to(self.device) for n, t in message.tensors("theta.").items()}
        classes = self.get_offsets(client.task)
        client.indices = self.drawn(client, self.args.calib_examples)

        def log_likelihood(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return -F.cross_entropy(self.head_logits(self._own_lin.at(theta, x), *classes), y)

        def labelled():
            for x, y in client.stat_loader():
                if self.args.fisher_labels == "data":
                    yield x, y - classes[0]
                    continue
                with torch.no_grad():
                    p = self.head_logits(self._own_lin.at(theta, x), *classes).softmax(1)
                yield x, torch.multinomial(p.cpu(), 1, generator=client.generator)[:, 0].to(self.device)

        with evaluating(self.net), plain_attention(self.net):
            sums = fisher_diagonal(log_likelihood, theta, labelled(), by_likelihood=False)
        return Message({f"fisher.{n}": f for n, f in sums.items()}, n=len(client.indices))
