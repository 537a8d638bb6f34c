"""PILoRA, prototype guided incremental LoRA (Guo et al., ECCV 2024, arXiv 2401.02094), federated.

Each task has a LoRA pair B_t A_t on the queries and values of the first block, which earlier pairs, frozen, are summed
with, and a prototype p_c for each of its classes; a sample belongs to the nearest prototype. With f the features, d
their length and D_c = |f - p_c|^2 / d:

    W = W0 + sum_{i<t} B_i A_i + B_t A_t
    L = CE(-D / temp, y) + 0.001 D_y                                          over the prototypes of all classes
        + 0.5 sum_{i<t} |A_t A_i^T|_1 + 0.01 |A_t|_1                          for q and for v
    server, A and B   weighted means
    server, p_c       sum_k w_k p_ck,  w = softmax(5 u),  u = 1 / s brought to [0, 1] over the clients,
                      s_k = sum_j |p_ck - f_cj|,  f_cj: mean feature of class c at client j

f_cj is sent for classes with more than ``--pilora_min_samples`` samples; where nobody sends one, or all s_k are equal,
the mean is uniform. Prototypes of classes to come stay as they were drawn, N(0, 0.1^2), and are part of the softmax, in
the released code too. That code and fed-mammoth's port take the square root of D (``--pilora_sqrt 1``), and average
f_cj over the batches of training; here it is the mean under the trained model, from one pass. A pair is trained over
the sum of the earlier ones, as in the port; the released code trains it on W0 alone. Rates have two groups:
``--lr`` for prototypes, ``--lr_back`` for LoRA; with ``--pilora_schedule cosine`` round r of R has (1 + cos(pi r / R))
/ 2 of both.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.utils import client_batch
from backbones.utils.lora import LoRA
from federated.message import Message
from models.fedavg import FedAvg, add_lora_args
from models.utils.merging import wide
from models.utils.prototypes import class_stats
from utils.args import add_switch, number


class ClassPrototypes(nn.Module):
    """A prototype for each class, of which a task trains a few: HeadRows where no linear classifier is used.

    Attributes:
        weight: (end - start, d), the task's own; may get a leading client dimension (client_batch.py).
        everyone: (C, d), of all classes; the task's rows are out of date there until :meth:`put`.
    """

    STACKS = True

    def __init__(self, n_classes: int, dim: int, like: Tensor, std: float = 0.1) -> None:
        super().__init__()
        self.register_buffer("everyone", (std * torch.randn(n_classes, dim)).to(like))
        self.weight = nn.Parameter(self.everyone[:0].clone())
        self.start = self.end = 0

    def take(self, classifier: nn.Linear, start: int, end: int) -> None:
        """Train the prototypes of the classes ``start:end`` from now on; the classifier has no part in it."""
        self.start, self.end = start, end
        self.weight.data, self.weight.grad = self.everyone[start:end].clone(), None

    def put(self, classifier: nn.Linear) -> None:
        """Write the trained ones back into ``everyone``."""
        self.everyone = torch.cat([self.everyone[: self.start], self.weight.data, self.everyone[self.end :]])

    def get_extra_state(self) -> list[int]:
        return [self.start, self.end]

    def set_extra_state(self, state: list[int]) -> None:
        self.start, self.end = state

    def forward(self, features: Tensor) -> Tensor:
        """D (B, C): mean squared differences of features (B, d) and prototypes, |f|^2 - 2 f p + |p|^2 over d."""
        parts = (self.everyone[: self.start], self.weight, self.everyone[self.end :])
        products = torch.cat([client_batch.linear(features, -2 * p, p.square().sum(-1)) for p in parts], 1)
        return (features.square().sum(1, keepdim=True) + products) / features.shape[1]


def reweight(prototypes: Tensor, features: Tensor, sharpness: float = 5.0) -> Tensor:
    """Weights (K,) of K clients' prototypes (K, d) of a class, by their distances to the mean features (J, d) of J.

    Nearer prototypes weigh more; uniform if there are no features or all distances are the same.
    """
    s = torch.cdist(prototypes, features).sum(1)
    u = 1 / s.clamp(min=torch.finfo(s.dtype).tiny ** 0.5)
    span = u.max() - u.min()
    if not span > 1e-9 * u.max():  # 0 / 0, up to rounding
        return torch.full_like(u, 1 / len(u))
    return (sharpness * (u - u.min()) / span).softmax(0)


class Pilora(FedAvg):
    """A LoRA pair for each task over those of earlier tasks, and prototypes that are averaged by their distances."""

    NAME = "pilora"
    COMPATIBILITY = ["class-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        add_lora_args(parser, 4, "blocks.0.attn.qkv:q,v")
        add, weight = parser.add_argument, number(float, 0)
        add("--lr_back", type=number(float), default=-1.0, help="learning rate of LoRA; below 0: --lr")
        add_switch(parser, "--pilora_sqrt", help="1: the square root of distances")
        add("--temp", type=number(float, 0, open_low=True), default=1.0, help="what distances are divided by")
        add("--pilora_pull", type=weight, default=0.001, help="weight of the distance to the prototype of the class")
        add("--pilora_ortho", type=weight, default=0.5, help="weight of the overlap with earlier tasks' A")
        add("--pilora_l1", type=weight, default=0.01, help="weight of the absolute values of A")
        add(
            "--pilora_sharpness", type=weight, default=5.0, help="factor of the re-weighting's softmax; 0: uniform mean"
        )
        add(
            "--pilora_min_samples",
            type=number(int, 0),
            default=5,
            help="clients send mean features of classes of which they have more samples than that",
        )
        add(
            "--pilora_schedule",
            choices=("none", "cosine"),
            default="none",
            help="of the learning rates, over the rounds of a task",
        )
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        like = backbone.classifier.weight
        self.head = ClassPrototypes(self.N_CLASSES, like.shape[1], like)
        self.folds: list[dict[str, Tensor]] = []  # A and B of finished tasks, by the name they are trained under

    # ---------------------------------------------------------------- rates

    def body_lr(self) -> float:
        return self.args.lr_back

    def get_optimizer(self, params=None, lr=None):
        """Both groups at their rate in this round."""
        opt, client = super().get_optimizer(params, lr), getattr(self, "client", None)
        if opt is not None and client is not None and self.args.pilora_schedule == "cosine":
            for group in opt.param_groups:
                group["lr"] *= (1 + math.cos(math.pi * client.round / self.args.num_comm_rounds)) / 2
        return opt

    # ---------------------------------------------------------------- distances

    def distances(self, inputs: Tensor) -> Tensor:
        """D (B, C) of a batch of inputs, or its square root."""
        D = self.head(self.features(inputs))
        return D.clamp(min=1e-12).sqrt() if self.args.pilora_sqrt else D  # a root of 0 has no gradient

    def forward(self, x: Tensor) -> Tensor:
        return -self.distances(x)

    def task_logits(self, inputs: Tensor) -> Tensor:
        return -self.distances(inputs)[:, self.n_past_classes : self.n_seen_classes]

    def local_loss(self, inputs, labels, client) -> Tensor:
        D = self.distances(inputs)
        own = D.gather(1, labels[:, None])[:, 0]
        return F.cross_entropy(-D / self.args.temp, labels, reduction="none") + self.args.pilora_pull * own

    def local_penalty(self, trained: dict[str, Tensor], client) -> Tensor:
        overlap = size = 0.0
        for name, A in trained.items():
            if name.endswith(".A"):
                size = size + A.abs().sum()
                if self.folds:
                    overlap = overlap + (A @ torch.cat([pair[name] for pair in self.folds]).T).abs().sum()
        return self.args.pilora_ortho * overlap + self.args.pilora_l1 * size

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        if self.current_task:  # the first pair is the one that was built
            self.lora.reset(A="kaiming", B="zeros")

    def broadcast(self) -> Message:
        """The task's pair and prototypes; pairs of finished tasks and all other prototypes travel to a client once."""
        once = {f"pair{t}.{n}": factor for t, pair in enumerate(self.folds) for n, factor in pair.items()}
        versions = dict.fromkeys(once, 0)
        for t in range(self.n_tasks):
            if t != self.current_task:
                once[f"prototypes{t}"] = self.head.everyone[slice(*self.get_offsets(t))]
                versions[f"prototypes{t}"] = int(t < self.current_task)  # as they were drawn, and as they were left
        return Message({**super().broadcast(), **once}, keep=versions, folded=len(self.folds))

    @torch.no_grad()
    def merged(self, current, replies, weights) -> dict[str, Tensor]:
        means, start = super().merged(current, replies, weights), self.n_past_classes
        rows = []
        for c in range(self.n_classes_current_task):
            prototypes = torch.stack([r["head.weight"][c] for r in replies])
            prototypes = prototypes.to(wide(prototypes))
            features = torch.cat([r["proto.means"][r["proto.classes"] == start + c] for r in replies])
            rows.append(reweight(prototypes, features.to(prototypes), self.args.pilora_sharpness) @ prototypes)
        return {**means, "head.weight": torch.stack(rows)}

    def end_rounds(self, clients) -> None:
        """Fold the task's pair into the weights; its A stays known to the penalty of later tasks."""
        self.folds.append({n: p.data.clone() for n, p in self.trainable().items() if n.startswith("lora.")})
        self.lora.fold_into()

    def adapter_over_pretrained(self) -> LoRA:
        """The pairs of all tasks side by side in pairs of rank r * tasks: sum_t B_t A_t."""
        whole = LoRA(self.net, self.args.lora_targets, self.args.lora_r * max(len(self.folds), 1), init="zeros")
        whole.remove()
        for name, p in whole.named_parameters() if self.folds else ():
            p.data = torch.cat([pair[f"lora.{name}"] for pair in self.folds], 0 if name.endswith(".A") else 1)
        return whole

    # ---------------------------------------------------------------- client

    def load(self, message: Message) -> None:
        """Fold what finished tasks learned, then put the pair and the prototypes in place."""
        for t in range(len(self.folds), message["folded"]):
            pair = message.tensors(f"pair{t}.")
            for name, p in self.trainable().items():
                if name.startswith("lora."):
                    p.data = pair[name].clone()
            self.lora.fold_into()
            self.folds.append(pair)
        for t in range(self.n_tasks):
            if t != self.current_task:
                self.head.everyone[slice(*self.get_offsets(t))] = message[f"prototypes{t}"]
        super().load(message)

    def after_local(self, client) -> Message:
        """The pair, the prototypes, and mean features of classes with enough samples."""
        stats = class_stats(self, client)
        enough = (stats.counts > self.args.pilora_min_samples).nonzero()[:, 0]
        means = stats.means()[enough].to(stats.dtype)
        own = {"proto.classes": enough + self.n_past_classes, "proto.means": means}
        return Message({**super().after_local(client), **own})
