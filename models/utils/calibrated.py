"""Classifiers that the server trains again on features drawn from prototypes: what HGP, CCVR, SLCA and LIVAR share."""

from __future__ import annotations

import argparse

import torch

from federated.message import Message
from models.utils.federated_model import FederatedModel
from models.utils.prototypes import ClassStats, Prototypes, class_stats, rebalance
from utils.args import number
from utils.errors import UserError

# CCVR and SLCA: one full Gaussian per class under the server's network, in a pass of its own after each task
AFTER_THE_TASK = {
    "proto_cov": "full",
    "proto_pool": "gaussian",
    "proto_passes": 1,
    "proto_model": "global",
    "rebalance_when": "task",
}
SCOPES = ("all", "seen", "cur", "old", "none")


def add_calibration_args(parser, **defaults) -> None:
    """The flags of prototypes and rebalancing; ``defaults`` are the method's own, by flag."""
    add = parser.add_argument
    add("--proto_cov", choices=("diag", "full"), default="diag", help="covariance of a class at a client")
    add(
        "--proto_pool",
        "--ccvr_pool",
        choices=("mixture", "gaussian"),
        default="mixture",
        help="a class is the mixture of its clients' Gaussians, or one Gaussian with the moments of all samples",
    )
    add("--proto_var_scale", type=number(float, 0, open_low=True), default=1.0, help="inflation of covariances")
    add(
        "--proto_min_samples",
        type=number(int, 2),
        default=2,
        help="clients say nothing of classes with fewer samples, whose means would nearly show them",
    )
    add("--proto_clip", type=number(float, 0, open_low=True), default=None, help="longest norm of a feature")
    add(
        "--proto_noise",
        type=number(float, 0),
        default=0.0,
        help="noise on what clients send, in units of what one sample can change (needs --proto_clip)",
    )
    add(
        "--proto_passes",
        type=number(int, 1),
        default=None,
        help="passes over the data, augmented if more than one; default: 1, 3 with --proto_cov full",
    )
    add(
        "--proto_model",
        choices=("local", "global"),
        default="local",
        help="whose features: the client's own after training, or the server's, which takes another exchange",
    )
    add("--rebalance_when", "--ccvr_when", choices=("round", "task", "end"), default="round", help="after each of them")
    add(
        "--rebalance_scope",
        "--ccvr_scope",
        choices=SCOPES,
        default="all",
        help="classes of the softmax and of the draws: all (seen), the task's, those before it; none: do not rebalance",
    )
    add("--rebalance_epochs", type=number(int, 0), default=5)
    add("--rebalance_samples", type=number(int, 1), default=256, help="features drawn per class and epoch")
    add("--rebalance_batch", type=number(int, 1), default=256)
    add("--rebalance_lr", type=number(float), default=0.01, help="below 0: the clients' --lr")
    add("--rebalance_wd", type=number(float, 0), default=0.0)
    add("--rebalance_sched", choices=("none", "cosine"), default="none")
    add(
        "--tau",
        "--logit_norm",
        "--ccvr_logit_norm",
        type=number(float, 0),
        default=0.1,
        help="logits of length 1/tau while rebalancing; 0: as they are",
    )
    parser.set_defaults(**defaults)


class Calibrated(FederatedModel):
    """Mixed into a federated method before the class that trains: prototypes and the classifier's rebalancing."""

    def __init__(self, backbone, loss, args: argparse.Namespace, transform, dataset=None) -> None:
        if args.proto_noise and args.proto_clip is None:
            raise UserError("--proto_noise needs --proto_clip, the longest norm of a feature, which is its unit")
        if args.proto_passes is None:
            args.proto_passes = 3 if args.proto_cov == "full" else 1
        args.rebalance_scope = "all" if args.rebalance_scope == "seen" else args.rebalance_scope
        super().__init__(backbone, loss, args, transform, dataset)
        self.prototypes = Prototypes(args.proto_cov == "full")

    # ---------------------------------------------------------------- server

    def round(self, clients, r: int) -> None:
        super().round(clients, r)
        if self.args.rebalance_when == "round":
            if self.args.proto_model == "global":
                self.gather(clients)
            self.calibrate()

    def end_rounds(self, clients) -> None:
        super().end_rounds(clients)
        if self.args.rebalance_when == "round":
            return
        if self.args.proto_model == "global":
            self.gather(clients)
        if self.args.rebalance_when == "task" or self.current_task == self.n_tasks - 1:
            self.calibrate()

    def aggregate(self, replies) -> None:
        super().aggregate(replies)
        self.prototypes.put((r.client, r) for r in replies if "proto.classes" in r)

    def gather(self, clients) -> None:
        """Prototypes of the clients' data under the server's network as it is."""
        self.prototypes.put((r.client, r) for r in clients.call("class_statistics", self.broadcast()))

    def calibrate(self) -> None:
        """Rebalance the classifier over ``--rebalance_scope``; a class that no client speaks of is not drawn."""
        a, past, seen = self.args, self.n_past_classes, self.n_seen_classes
        columns = {"all": range(seen), "cur": range(past, seen), "old": range(past), "none": range(0)}[
            a.rebalance_scope
        ]
        known = self.prototypes.of(columns)
        if not len(known):
            return
        if a.proto_pool == "gaussian":
            known = known.pooled()
        head = self.net.classifier
        weight, bias = rebalance(
            head.weight,
            head.bias,
            self.draw_from(known),
            columns,
            len(known.classes.unique()),
            epochs=a.rebalance_epochs,
            samples=a.rebalance_samples,
            batch=a.rebalance_batch,
            lr=a.lr if a.rebalance_lr < 0 else a.rebalance_lr,
            wd=a.rebalance_wd,
            cosine=a.rebalance_sched == "cosine",
            tau=a.tau or None,
            groups=self.groups(columns),
        )
        self.set_classifier(weight, bias)

    def draw_from(self, known: Prototypes):
        """The sampler of the features to train on."""
        return known.sampler(self.args.proto_var_scale)

    def groups(self, columns: range) -> list[int] | None:
        """Blocks of columns whose norms are averaged; None: one norm over all."""
        return None

    def set_classifier(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Give the network's classifier new tensors, and the rows in training theirs."""
        head = self.net.classifier
        head.weight.data = weight
        if bias is not None:
            head.bias.data = bias
        if getattr(self, "head", None) is not None:
            self.head.take(head, self.head.start, self.head.end)

    # ---------------------------------------------------------------- client

    @property
    def _needs_statistics(self) -> bool:
        return self.args.rebalance_scope != "none"

    def after_local(self, client) -> Message:
        reply = super().after_local(client)
        if self.args.proto_model == "global" or not self._needs_statistics:
            return reply
        return Message({**reply, **self.statistics(client)})

    def class_statistics(self, message: Message, client) -> Message:
        """Prototypes of a client's data under the network that the message brings."""
        self.load(message)
        return self.statistics(client)

    def statistics(self, client) -> Message:
        """Prototypes under the network as it is; kept for the task where features cannot change."""
        kept = client.state.get("prototypes")
        if kept is not None and kept[0] == client.task:
            return Message(kept[1])
        stats = self.class_stats(client)
        out = self.describe(stats, client)
        if all(name.startswith(("head.", "classifier.")) for name in self.trainable()):
            client.state["prototypes"] = [client.task, dict(out)]
        return out

    def class_stats(self, client, raw: bool = False) -> ClassStats:
        """:func:`models.utils.prototypes.class_stats` as the flags say (``raw``: of stored images)."""
        a = self.args
        return class_stats(self, client, a.proto_cov == "full", a.proto_clip, a.proto_passes, raw)

    def describe(self, stats: ClassStats, client) -> Message:
        """What the client says of its classes."""
        a = self.args
        return stats.message(a.proto_min_samples, a.proto_passes, a.proto_noise, client.generator)
