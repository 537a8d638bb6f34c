"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089), with the network itself or in its tangent (Ortiz-Jimenez et
al. 2023, arXiv 2305.12827).

    tau_t = argmin_tau L_t(theta_0 + tau)             each task by itself, from the pretrained weights
    theta = theta_0 + alpha merge(tau_1 ... tau_T)    addition; merge is the sum, or what --merging says

``--regime linear`` trains and tests f_lin(x, tau) = f(x, theta_0) + J(x) tau (models/utils/linearize.py), ``full`` the
network with tau added to its weights, ``attention`` the same with the attention layers' weights alone (arXiv
2407.07089). f is the vector of features, brought to length one; the classifier W is fixed, class by class what CLIP's
text encoder says of it or, where the backbone has no text, the mean of f over the training images under theta_0,

    logits = scale * f_lin / |f_lin| W^T,    in training over the classes of the task alone.

Stored and decayed is tau (or its factors), so weight decay pulls to theta_0. The rate rises for ``--warmup`` steps and
falls with a cosine, step by step. Under --fl clients train tau and the server averages it: in the tangent that averages
functions. With ``--lora_r`` what a turn adds to tau is B A, of low rank; factors are sent, products averaged.
Of each task a share of the images is held out (``--alpha_share``); by those the best alpha is chosen in the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import get_dataset_class
from datasets.utils import seeded, stratified_split
from federated.message import Message, Reply
from models.utils.federated_model import FederatedModel
from models.utils.linearize import Linearized
from models.utils.task_vectors import (
    MERGERS,
    combined,
    final_metrics,
    merge,
    read_task_vectors,
    right,
    write_task_vectors,
)
from utils.args import add_switch, number
from utils.errors import UserError

GROUPS = ("attention", "linears", "proj", "ln", "class_embed", "conv", "pos_embed")
FROZEN = ("conv", "pos_embed")  # unless asked for: there is no curvature for them


def group_of(name: str, module: nn.Module) -> str:
    """Which of :data:`GROUPS` a parameter is in, by its name (timm's or CLIP's) and the module that owns it."""
    if isinstance(module, nn.LayerNorm):
        return "ln"
    if name.endswith(("cls_token", "class_embedding")):
        return "class_embed"
    if name.endswith("pos_embed") or "position_embedding" in name:
        return "pos_embed"
    if isinstance(module, nn.Linear):
        return "attention" if "attn" in name else "proj" if "projection" in name else "linears"
    return "conv"


def merger_parser(parser, images: int):
    """Flags of methods that merge experts by what they learn of them from ``images`` images of each client and task."""
    TaskArithmetic.get_parser(parser)
    parser.set_defaults(regime="full")
    parser.add_argument(
        "--calib_examples", type=number(int, 0), default=images, help="images of each client and task (0: all)"
    )
    return parser


class TaskArithmetic(FederatedModel):
    """A task vector for each task, trained apart; their sum in the test."""

    NAME = "task_arithmetic"
    COMPATIBILITY = ["class-il", "task-il"]
    SCALES_LOSS = False
    TASK_VECTORS = True
    NEEDS_WEIGHTS: str | None = None  # why a method cannot work in the tangent

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add(
            "--regime",
            choices=("linear", "full", "attention"),
            default="linear",
            help="tangent of the network, the network, or the network whose attention alone is trained",
        )
        add(
            "--lora_r",
            type=number(int, 0),
            default=0,
            help="rank of what a client's turn adds to linear layers' weights, which alone are trained then; 0: any",
        )
        for group in GROUPS:
            add_switch(
                parser, f"--ft_{group}", default=int(group not in FROZEN), help=f"1: train its {group} parameters"
            )
        add("--merging", choices=tuple(MERGERS), default="ta", help="how task vectors are merged")
        add("--alpha", type=number(float), default=1.0, help="coefficient of what the merger gives")
        add(
            "--alpha_grid",
            type=number(float),
            nargs=3,
            default=[0.0, 1.5, 0.1],
            metavar=("FIRST", "LAST", "STEP"),
            help="coefficients to sweep at the end",
        )
        add(
            "--alpha_share",
            type=number(float, 0, 0.9),
            default=0.1,
            help="share of each task's training images by which the best coefficient is chosen (0: no choice)",
        )
        add_switch(parser, "--lin_inner_norm", default=1, help="1: f has length one before it is linearised")
        add_switch(
            parser, "--lin_outer_norm", default=1, help="1: f_lin is brought to length one before the classifier"
        )
        add("--logit_scale", type=number(float, 0, open_low=True), default=None, help="default: CLIP's own, or 20")
        add(
            "--head_shots",
            type=number(int, 0),
            default=0,
            help="images of each class that make its row of the classifier, from each client (0: all)",
        )
        add("--warmup", type=number(int, 0), default=500, help="steps for which the rate rises")
        add("--virtual_bs_n", type=number(int, 1), default=1, help="batches whose gradients make one step")
        add_switch(
            parser,
            "--layer_errors",
            help="1: how far each layer's outputs in the merged network are from the experts', in the end",
        )
        add_switch(parser, "--localisation", help="1: AUROC of |J tau_t|^2, in the end")
        add(
            "--disentanglement",
            type=number(int, 0),
            nargs="*",
            default=[],
            metavar="TASK",
            help="pairs of tasks whose disentanglement error is drawn in the end",
        )
        add_switch(parser, "--save_task_vectors", help="1: write them into the run's folder")
        add(
            "--merge_from",
            nargs="+",
            default=None,
            metavar="PATH",
            help="train nothing: task_vectors.safetensors of a run, or for each task a LoRA folder (PEFT) or weights",
        )
        add("--control_dataset", default=None, help="negation in the end: forget each task, keep this data set")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if self.NEEDS_WEIGHTS and args.regime == "linear":
            raise UserError(f"--regime linear: {self.NEEDS_WEIGHTS}; use full or attention")
        backbone.requires_grad_(False)
        super().__init__(backbone, loss, args, transform, dataset)
        grid, pairs = args.alpha_grid, args.disentanglement
        if grid[2] <= 0 or grid[1] < grid[0]:
            raise UserError(f"--alpha_grid {grid}: give first, last and step, as in 0 1.5 0.1")
        if len(pairs) % 2 or any(t >= self.n_tasks for t in pairs):
            raise UserError(f"--disentanglement {pairs}: give pairs of tasks between 0 and {self.n_tasks - 1}")
        if args.localisation and args.regime != "linear":
            raise UserError(f"--localisation needs --regime linear: |J tau|^2 says nothing of --regime {args.regime}")
        if args.layer_errors and args.regime == "linear":
            raise UserError(
                "--layer_errors needs --regime full or attention: in the tangent no layer has other weights"
            )
        if args.control_dataset:
            get_dataset_class(args.control_dataset)  # a wrong name is told now, not when all is trained
            if not args.alpha_share:
                raise UserError("--control_dataset chooses coefficients by images held out: give --alpha_share above 0")
        modules, kept = dict(backbone.named_modules()), {g for g in GROUPS if getattr(args, f"ft_{g}")}
        kept &= {"attention"} if args.regime == "attention" else set(GROUPS)
        names = [
            n
            for n, _ in backbone.named_parameters()
            if not n.startswith("classifier.") and group_of(n, modules[n.rpartition(".")[0]]) in kept
        ]
        if args.lora_r:
            names = [n for n in names if n.endswith("weight") and isinstance(modules[n.rpartition(".")[0]], nn.Linear)]
        if not names:
            raise UserError(f"nothing of --backbone {args.backbone} would be trained: turn on some of --ft_...")
        self._own_lin = Linearized(backbone, names, self.function)
        self.tau = nn.ParameterList([nn.Parameter(t) for t in self._own_lin.zeros().values()])
        self.taus: list[dict[str, Tensor]] = []  # tau_t of the tasks learnt
        self.rows: Tensor | None = None  # W (N_CLASSES, d)
        self.class_totals: dict[int, tuple[Tensor, Tensor]] = {}  # task -> what rows are made of, without text
        self.held_out: dict[int, Tensor] = {}  # task -> what count_right says of the merged vector and tau_t
        self._own_given = read_task_vectors(args.merge_from, self) if args.merge_from else None
        self.negated: dict[int, Tensor] = {}  # the same at theta_0 - alpha tau_t, with --control_dataset
        self.solved: dict[str, Tensor] | None = None  # the merged vector, where a method makes it of data

    # ---------------------------------------------------------------- the function

    def function(self, x: Tensor) -> Tensor:
        """f(x) (B, d): features of the network, of length one (``--lin_inner_norm``)."""
        f = self.net(x, returnt="features")
        return F.normalize(f, dim=1) if self.args.lin_inner_norm else f

    @property
    def scale(self) -> float:
        own = getattr(self.net, "logit_scale", None)
        return self.args.logit_scale or (20.0 if own is None else float(own.exp()))

    def head_logits(self, f: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """scale * f W^T (B, classes ``start`` to ``end``), f brought to length one (``--lin_outer_norm``)."""
        f = F.normalize(f, dim=1) if self.args.lin_outer_norm else f
        return self.scale * f @ self.rows[start:end].to(f).T

    def along(self, x: Tensor, vectors: list[dict[str, Tensor]]):
        """A function (c_1, ...) -> f(x) (B, d) at theta_0 + sum_i c_i v_i; in the tangent without further passes."""
        lin = self._own_lin
        if self.args.regime == "linear":
            f0, products = lin.expansion(x, vectors)
            return lambda *c: sum((ci * p for ci, p in zip(c, products)), f0)

        @torch.no_grad()
        def at(*c):
            tau, start = combined(vectors, c), lin.start()
            self.net.eval()
            return lin.at({n: start[n] + t for n, t in tau.items()}, x)

        return at

    def merged_vector(self) -> dict[str, Tensor]:
        """What a method made of all (``prepare_merge``), or else merge(tau_1 ...) of the tasks learnt so far."""
        if self.solved is not None:
            return self.solved
        if not self.taus:
            return self._own_lin.zeros()
        cached = getattr(self, "_own_merged", None)
        if cached is None or cached[0] != len(self.taus):
            self._own_merged = (len(self.taus), merge(self.taus, self.args.merging, self.args.seed))
        return self._own_merged[1]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N_CLASSES); classes of tasks to come have none yet, 0."""
        if self.rows is None:
            return self.net(x)
        return self.head_logits(self.along(x, [self.merged_vector()])(self.args.alpha))

    def trainable(self) -> dict[str, nn.Parameter]:
        tau = getattr(self, "tau", None)
        return {} if tau is None else {f"tau.{n}": p for n, p in zip(self._own_lin.places, tau)}

    def current_tau(self) -> dict[str, Tensor]:
        """{parameter of the network: tau}, those that are trained."""
        return dict(zip(self._own_lin.places, self.tau))

    # ---------------------------------------------------------------- server

    def enter_task(self, task: int) -> None:
        """Tasks do not build on each other, so a worker can be brought to any of them."""
        if getattr(self, "_entered", -1) != task:
            self._current_task = task
            self.meta_begin_task(self.dataset)
            self._entered = task
            self.own(self.trainable().values())

    def begin_rounds(self, clients) -> None:
        for p in self.tau:
            p.data = torch.zeros_like(p)
        if self.rows is None:
            self.rows = torch.zeros(self.dataset.N_CLASSES, self.net.feature_dim, device=self.device)
        said = getattr(self.net, "text_rows", None)
        if said is not None:
            self.rows = said
        else:
            total = clients.sum("class_sums", Message({}))
            self.class_totals[self.current_task] = (total["sums"].to(self.device), total["counts"].to(self.device))
            self.write_rows(self.current_task)

    def write_rows(self, task: int) -> None:
        """Rows of a task's classes from the sums over images: the mean's direction, 0 for a class that nobody has."""
        sums, counts = self.class_totals[task]
        lo, hi = self.get_offsets(task)
        self.rows[lo:hi] = F.normalize(sums, dim=1) * (counts > 0)[:, None].to(sums)

    def round(self, clients, r: int) -> None:
        if self._own_given is None:
            return super().round(clients, r)
        for n, p in self.current_tau().items():
            p.data = self._own_given[self.current_task][n].to(p)

    def more_rounds(self, clients, n: int, what: str) -> None:
        """Once a task is over its vector is among ``taus``: rounds go on from there, and change it."""
        over = len(self.taus) > self.current_task
        for name, p in self.current_tau().items() if over else ():
            p.data = self.taus[-1][name].to(p).clone()
        super().more_rounds(clients, n, what)
        if over:
            self.taus[-1] = {name: p.detach().clone() for name, p in self.current_tau().items()}
            self._own_merged = None

    def expanded(self, reply: Reply) -> Reply:
        """tau_k from the factors that a client sends with ``--lora_r``: means are of products, never of factors."""
        if not self.args.lora_r:
            return reply
        steps = {n: (reply[f"B.{n}"] @ reply[f"A.{n}"]).to(p) for n, p in self.current_tau().items()}
        rest = reply.without({f"{factor}.{n}" for n in steps for factor in "AB"})
        return Reply(
            {**rest, **{f"tau.{n}": p.detach() + steps[n] for n, p in self.current_tau().items()}}, reply.client
        )

    def aggregate(self, replies) -> None:
        super().aggregate([self.expanded(r) for r in replies])

    def broadcast(self) -> Message:
        rows = {"rows": self.rows}
        return Message({**super().broadcast(), **rows}, keep={"rows": self.current_task})

    def end_rounds(self, clients) -> None:
        self.taus.append({n: p.detach().clone() for n, p in self.current_tau().items()})
        if len(self.taus) < self.n_tasks or self.args.joint:
            return
        self.prepare_merge(clients)
        if self.args.alpha_share:
            merged, grid = self.merged_vector(), self.coefficients()
            for t in range(self.n_tasks):
                owners = clients.of_task(t)
                self.held_out[t] = self.count_right(owners, [merged, self.taus[t]], grid)
                if self.args.control_dataset:
                    self.negated[t] = self.count_right(owners, [self.taus[t]], self.negative_coefficients())

    def prepare_merge(self, clients) -> None:
        """Once all tasks are learnt, before anything is measured: mergers that need data set ``solved`` here."""

    def coefficients(self) -> list[float]:
        """Those of ``--alpha_grid``."""
        first, last, step = self.args.alpha_grid
        return [first + i * step for i in range(int((last - first) / step + 1e-6) + 1)]

    def negative_coefficients(self) -> list[float]:
        """Those of negation: 0, which changes nothing, and the others with a minus."""
        return [0.0, *(-a for a in self.coefficients() if a)]

    def count_right(self, clients, vectors: list[dict[str, Tensor]], grid: list[float]) -> Tensor:
        """Held-out images of clients that are right: (grid + 2,), at each coefficient of the first vector, with the
        second vector alone (0 if there is none), and how many there are."""
        tensors = {f"{i}.{n}": t for i, v in enumerate(vectors) for n, t in v.items()}
        tensors |= {"rows": self.rows, "grid": torch.tensor(grid, dtype=torch.float64)}
        message = Message(tensors, vectors=len(vectors))
        return clients.sum("held_out_right", message)["right"]

    # ---------------------------------------------------------------- client

    def kept(self, client) -> tuple[Tensor, Tensor]:
        """The client's samples to train on, and those held out: the same in every call."""
        rng = seeded(self.args.seed, "alpha", client.task, client.id)
        labels = self.dataset.labels_of(client.indices).numpy()
        train, held = stratified_split(labels, self.args.alpha_share, rng) if self.args.alpha_share else (None, [])
        return (client.indices if train is None else client.indices[train]), client.indices[held]

    def drawn(self, client, n: int) -> Tensor:
        """n of the samples that the client trains on, drawn without replacement, in their order (0: all)."""
        mine = self.kept(client)[0]
        order = torch.randperm(len(mine), generator=client.generator)
        return mine[order[: n or None].sort().values]

    def class_sums(self, message: Message, client) -> Message:
        """What (some of) the client's images make of the classifier's rows for the task: 'sums' (C_t, d), and how many
        there are of each class, 'counts' (C_t,)."""
        if self.args.head_shots:
            labels = self.dataset.labels_of(client.indices)
            of_class = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
            some = [i[torch.randperm(len(i), generator=client.generator)[: self.args.head_shots]] for i in of_class]
            client.indices = client.indices[torch.cat(some).sort().values]
        batches = ((x, y - self.n_past_classes) for x, y in client.stat_loader())
        labels = (self.dataset.labels_of(client.indices) - self.n_past_classes).cpu()
        counts = torch.bincount(labels, minlength=self.n_classes_current_task)
        return Message({"sums": self.sums_of_classes(batches, self.n_classes_current_task), "counts": counts})

    def sums_of_classes(self, batches, classes: int) -> Tensor:
        """Sum of f(x), of length one, over the images of each class (classes, d), under theta_0."""
        sums = torch.zeros(classes, self.net.feature_dim, device=self.device)
        for x, y in batches:
            sums.index_add_(0, y, F.normalize(self._own_lin.output(x).to(sums), dim=1))
        return sums

    def held_out_right(self, message: Message, client) -> Message:
        """See :meth:`count_right`."""
        self.rows = message["rows"].to(self.device)
        vectors = [
            {n: t.to(self.device) for n, t in message.tensors(f"{i}.").items()} for i in range(message["vectors"])
        ]
        client.indices = self.kept(client)[1]
        batches = client.stat_loader() if len(client.indices) else ()
        grid = message["grid"].tolist()
        found, alone, n = right(self, batches, self.get_offsets(client.task), vectors, grid)
        return Message({"right": torch.cat((found, alone[None], n[None]))})

    def training_samples(self, client) -> Tensor:
        return self.kept(client)[0]

    def before_local(self, message, client) -> None:
        self.rows = message["rows"].to(self.device)
        self._own_turn.batches = self.local_epochs() * self.batches_of(client)

    def start_training(self) -> None:
        """With ``--lora_r`` a turn trains tau = start + B A with new factors, B = 0: on top of what all have learnt.

        Of the turn: ``tau`` {name: parameter}, ``seen``, how many of its ``batches`` are over, ``summed``, the gradient
        of those that make the next step; with ``--lora_r`` ``start``.
        """
        super().start_training()
        turn = self._own_turn
        turn.tau, turn.seen, turn.summed = self.current_tau(), 0, {}
        if not self.args.lora_r:
            return
        turn.start, turn.trained = {n: p.detach().clone() for n, p in turn.tau.items()}, {}
        for n, start in turn.start.items():
            A = torch.empty(self.args.lora_r, start.shape[1], dtype=start.dtype)
            nn.init.kaiming_uniform_(A, math.sqrt(5), generator=self.client.generator)
            turn.trained[f"A.{n}"] = A.to(self.device).requires_grad_()
            turn.trained[f"B.{n}"] = start.new_zeros(start.shape[0], self.args.lora_r).requires_grad_()
        turn.opt = self.opt = self.get_optimizer(list(turn.trained.values()))

    def after_local(self, client) -> Message:
        if not self.args.lora_r:
            return super().after_local(client)
        return Message(self._own_turn.trained, n_samples=client.n_samples).clone()

    def local_epochs(self) -> int:
        """``--n_epochs``; if it is not given, the task's own, where the data set says so."""
        own = getattr(self.dataset, "get_task_epochs", None)
        return self.args.n_epochs if own is None or "n_epochs" in self.args.given else own(self.current_task)

    def get_scheduler(self, opt):
        return None  # the rate changes with every step (rate)

    def rate(self, step: int, steps: int) -> float:
        """lr (s + 1) / warmup, then lr (1 + cos(pi (s - warmup) / (steps - warmup))) / 2, for step s of ``steps``."""
        warmup = self.args.warmup
        if step < warmup:
            return self.args.lr * (step + 1) / warmup
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    def local_loss(self, inputs, labels, client) -> Tensor:
        """Cross-entropy over the classes of the current task (B,), in float32, at f_lin or at the network itself."""
        lin, tau = self._own_lin, self.current_tau()
        if self.args.regime == "linear":
            f0, product = lin.tangent(inputs, tau)
            f = f0 + product
        else:
            start = lin.start()
            self.net.eval()  # as theta_0 was: batch norms keep their statistics
            f = lin.at({n: start[n] + t for n, t in tau.items()}, inputs)
        f = f.float() if f.dtype != torch.float64 else f
        logits = self.head_logits(f, self.n_past_classes, self.n_seen_classes)
        return F.cross_entropy(logits, labels - self.n_past_classes, reduction="none")

    def descend(self, client, turn) -> Tensor | None:
        """A step, of a batch or of ``--virtual_bs_n`` of them, along the gradient in tau and the penalty's.

        With ``--lora_r`` through the factors: dA = B^T G and dB = G A^T.
        """
        v, tau = self.args.virtual_bs_n, turn.tau
        turn.seen += 1
        for n, p in tau.items():
            G = torch.zeros_like(p) if p.grad is None else p.grad
            turn.summed[n] = turn.summed[n].add_(G, alpha=1 / v) if n in turn.summed else G / v
            p.grad = None
        if turn.seen % v and turn.seen != turn.batches:
            return None
        step, steps = -(-turn.seen // v), -(-turn.batches // v)
        for n, p in tau.items():
            p.grad = turn.summed.pop(n)
        added = self.add_penalty(turn, step)
        for group in turn.opt.param_groups:
            group["lr"] = self.rate(step - 1, steps)
        pairs = {n: (turn.trained[f"A.{n}"], turn.trained[f"B.{n}"]) for n in tau if self.args.lora_r}
        for n, (A, B) in pairs.items():
            A.grad, B.grad = B.detach().T @ tau[n].grad, tau[n].grad @ A.detach().T
            tau[n].grad = None
        super().descend(client, turn)
        with torch.no_grad():
            for n, (A, B) in pairs.items():
                tau[n].copy_(turn.start[n] + B @ A)
        return added

    def add_penalty(self, turn, step: int) -> Tensor | None:
        """What a method adds to the loss of a turn's step, counted from 1; its gradient joins that of ``turn.tau``."""
        return None

    # ---------------------------------------------------------------- in the end

    def final_metrics(self, dataset, folder) -> dict[str, float]:
        """Columns of summary.csv once all tasks are learnt, and files (models/utils/task_vectors.py)."""
        if len(self.taus) < self.n_tasks or self.args.joint:
            return {}
        if self.args.save_task_vectors:
            write_task_vectors(folder / "task_vectors.safetensors", self.taus)
        return final_metrics(self, dataset, folder)
