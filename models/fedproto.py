"""FedProto, federated prototype learning (Tan et al. 2022, arXiv 2105.00243).

Clients exchange what their classes look like, the mean features, and learn to agree on it:

    local prototype    C_i^j = 1 / |D_ij| sum_{x in D_ij} f_i(x), client i, class j                      (eq. 3)
    global prototype   C^j = sum_i (|D_ij| / N_j) C_i^j over the clients that have class j               (eq. 6)
    local loss         CE(g_i(f_i(x)), y) + lambda |f_i(x) - C^y|^2 / d, no second term without C^y      (eq. 7)
    prediction         argmin_j |f(x) - C^j|                                                             (eq. 8)

``--fedproto_models personal`` is the paper: models never leave their clients, and no global one exists. Accuracies are
then the mean over clients of each one's own model on the whole test set of the tasks so far, measured where the models
are (a few numbers each, which the ledger counts). ``--proto_agg uniform`` weighs clients equally, as the released code
does. Prototypes come from a pass over the client's data after its training, where the released code collects features
along the last epoch.

``--fedproto_models shared`` also averages the models, as fed-mammoth does; ``--preset fm`` is its port: equal weights,
lambda sum_c |C^c - mean feature of c in the batch|^2 / d, prediction by the classifier. Its prototypes come from images
without normalisation, which is not reproduced. The cross-entropy is over the current task's classes throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from federated.message import Message
from models.fedavg import FedAvg
from models.utils.prototypes import class_stats
from utils.args import number
from utils.errors import UserError
from utils.evaluate import evaluate, tasks_to_test


class FedProto(FedAvg):
    """Agreement on prototypes, with models of one's own or a shared one."""

    NAME = "fedproto"
    COMPATIBILITY = ["class-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        FedAvg.get_parser(parser)
        add(
            "--fedproto_models",
            choices=("personal", "shared"),
            default="personal",
            help="each client keeps its own model (the paper), or models are averaged as well",
        )
        add("--proto_weight", "--ld", type=number(float, 0), default=1.0, help="lambda, the weight of the distance")
        add("--proto_loss", choices=("sample", "class"), default="sample", help="distance of features or class means")
        add("--proto_agg", choices=("weighted", "uniform"), default="weighted", help="weights of a class's clients")
        add(
            "--fedproto_predict",
            choices=("prototypes", "classifier"),
            default="prototypes",
            help="the nearest global prototype, or the network's classifier",
        )
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        self.personal = args.fedproto_models == "personal"
        if self.personal and args.tuning != "full":
            raise UserError(
                f"--tuning {args.tuning} needs --fedproto_models shared: personal models are whole networks"
            )
        super().__init__(backbone, loss, args, transform, dataset)
        self.PER_SAMPLE_LOSS = args.proto_loss == "sample"
        d, C = backbone.classifier.in_features, backbone.classifier.out_features
        self.prototypes = torch.zeros(C, d, device=self.device)
        self.known = torch.zeros(C, dtype=torch.bool, device=self.device)
        self.tested: tuple[list[float], list[float], list[float]] | None = None
        if self.personal:
            # where a client's model starts; networks are written to in place on workers, and this one must not be
            self._own_start = {n: t.detach().clone() for n, t in self.carried().items()}

    @property
    def columns(self) -> slice:
        """The current task's classes."""
        return slice(self.n_past_classes, self.n_seen_classes)

    def carried(self) -> dict[str, Tensor]:
        """The tensors of a personal model."""
        return {**self.trainable(), **self.shared_buffers()}

    # ---------------------------------------------------------------- server

    def broadcast(self) -> Message:
        """Global prototypes, and the model where it is shared."""
        model = {} if self.personal else super().broadcast()
        return Message({**model, "proto.means": self.prototypes, "proto.known": self.known})

    def round(self, clients, r: int) -> None:
        super().round(clients, r)
        if self.personal and self.args.eval_every:
            self.test(clients)

    def end_rounds(self, clients) -> None:
        if self.personal:
            self.test(clients)

    def test(self, clients) -> None:
        """Accuracies of the clients' own models, on average."""
        replies = clients.call("own_accuracy", self.broadcast())
        columns = ("class_il", "task_il", "share")
        self.tested = tuple(torch.stack([r[c] for r in replies]).mean(0).tolist() for c in columns)

    def results(self):
        return self.tested

    def aggregate(self, replies) -> None:
        """Eq. 6; a class that no reply speaks of keeps its prototype."""
        if self.personal:
            self.take_notes(replies, self.client_weights(replies))
        else:
            super().aggregate(replies)
        means = torch.stack([r["proto.means"] for r in replies]).to(self.device).double()
        counts = torch.stack([r["proto.counts"] for r in replies]).to(self.device).double()
        weights = counts if self.args.proto_agg == "weighted" else (counts > 0).double()
        total = weights.sum(0)
        rows = self.columns
        new = (weights[:, :, None] * means).sum(0) / total.clamp(min=1)[:, None]
        had, before = total > 0, self.prototypes[rows].to(new)
        self.prototypes, self.known = self.prototypes.clone(), self.known.clone()  # a message may hold the old ones
        self.prototypes[rows] = torch.where(had[:, None], new, before).to(self.prototypes)
        self.known[rows] |= had

    # ---------------------------------------------------------------- client

    def why_one_by_one(self) -> str | None:
        return "every client has a model of its own" if self.personal else super().why_one_by_one()

    def load(self, message: Message) -> None:
        self.prototypes, self.known = (message[f"proto.{n}"].to(self.device) for n in ("means", "known"))
        if not self.personal:
            super().load(message)

    @torch.no_grad()
    def take_own(self, client) -> None:
        """Put a client's own model in place."""
        mine = client.state.get("model", self._own_start)
        for name, t in self.carried().items():
            t.copy_(mine[name])

    def before_local(self, message, client) -> None:
        if self.personal:
            self.take_own(client)

    def local_loss(self, inputs, labels, client) -> Tensor:
        """Eq. 7."""
        features = self.features(inputs)
        z = self.head(features) if self.head is not None else self.net.logits(features)[:, self.columns]
        loss = F.cross_entropy(z, labels - self.n_past_classes, reduction="none")
        if self.args.proto_loss == "sample":
            off = (features - self.prototypes[labels]).square().mean(1)
            return loss + self.args.proto_weight * off * self.known[labels]
        classes = labels.unique()
        member = F.one_hot(labels, self.N_CLASSES).to(features)[:, classes]
        means = member.T @ features / member.sum(0)[:, None]
        off = (means - self.prototypes[classes]).square().mean(1)
        return loss.mean() + self.args.proto_weight * (off * self.known[classes]).sum()

    def after_local(self, client) -> Message:
        """Local prototypes (eq. 3), (C_t, d) with counts (C_t,), and the model where it is shared."""
        stats = class_stats(self, client)
        own = Message({"proto.means": stats.means().to(stats.dtype), "proto.counts": stats.counts.to(stats.dtype)})
        if not self.personal:
            return Message({**super().after_local(client), **own})
        client.state["model"] = {n: t.detach().clone() for n, t in self.carried().items()}
        return Message(own, n_samples=client.n_samples)

    def own_accuracy(self, message: Message, client) -> Message:
        """What :func:`utils.evaluate.evaluate` says of the client's own model."""
        self.load(message)
        self.take_own(client)
        tasks = tasks_to_test(self.dataset, self.args, client.task)
        class_il, task_il, share = evaluate(self, self.dataset, tasks)
        return Message(
            {k: torch.tensor(v) for k, v in zip(("class_il", "task_il", "share"), (class_il, task_il, share))}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Minus the squared distance to each global prototype (eq. 8), or the classifier's logits."""
        if self.args.fedproto_predict == "classifier" or not self.known.any():
            return self.net(x)
        f = self.features(x)
        return (-torch.cdist(f, self.prototypes.to(f)).square()).masked_fill(~self.known, float("-inf"))
