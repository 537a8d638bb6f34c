"""LoRM, closed-form merging of LoRA (Salami et al., ICLR 2025, arXiv 2410.17961), as its released code does it.

Clients train one factor of dW = B A at a time, B in even rounds of a task and A in odd ones, and the full head. With
the other factor shared by all, the merge of a round has a closed form; X_i are the inputs of the layer at client i,
G~_i = alpha X_i^T X_i + (1 - alpha) diag(X_i^T X_i):

    min sum_i |(B A - B_i A_i) X_i^T|^2
    B round   B = (sum_i B_i H_i) (sum_i H_i)^-1,   H_i = A G~_i A^T   (r x r: all that is sent of G_i)
    A round   A = (sum_i A_i G~_i) (sum_i G~_i)^-1                      (B cancels)
    head      W = (sum_i W_i G~_i) (sum_i G~_i)^-1, bias: weighted mean
    tasks     W = W0 + (sum_t B_t A_t G_t) (sum_t G_t)^-1,   G_t = sum_i G~_i   (testing only; a task starts from W0)

With alpha 0 for the body, as in all published runs, Gram matrices are diagonals: A and the tasks merge by weighted
means of columns, and no d x d matrix exists anywhere. With alpha above 0 the server keeps a dense one per past task.

The released code collects the Grams of tasks t > 0 under the running mean W0 + (t mean(B_s A_s) + B_i A_i) / (t + 1)
instead of the weights that were trained (``--lorm_gram_model mean``, the default for that reason; ``local`` is
W0 + B_i A_i). Between rounds the server tests that same running mean. Unlike the released code, solves are anchored
at the mean of the models, so inputs that nobody has seen take the mean and not zero; all solves are in float64 (the
released merge of tasks is in float32); and heads train the rows of the task alone, so weight decay cannot move the
others. Clients keep the factors of past tasks, hence the running mean needs no dense matrix on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from federated.message import Message
from models.regmean import GramModel, add_regmean_args
from models.utils.gpm import pack_triu, unpack_triu
from models.utils.merging import merge_layers, reduced_gram
from models.utils.task_lora import TaskLoRA
from utils.args import add_switch, number
from utils.errors import UserError


class Lorm(GramModel, TaskLoRA):
    """Alternating LoRA factors, merged by regression over clients and over tasks."""

    NAME = "lorm"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        TaskLoRA.get_parser(parser)
        add_regmean_args(parser, 0.0)
        parser.add_argument(
            "--train_matrix",
            choices=("alt", "A", "B"),
            default="alt",
            help="the factor that rounds train: B and A in turn, or one; A alone starts from A = 0 and a drawn B",
        )
        parser.add_argument("--lr_A", type=number(float), default=-1.0, help="learning rate of A; below 0: --lr")
        parser.add_argument("--lr_B", type=number(float), default=-1.0, help="learning rate of B; below 0: --lr")
        parser.add_argument(
            "--lorm_gram_model",
            choices=("mean", "local"),
            default="mean",
            help="weights that Grams of later tasks are collected with: the running mean over tasks, or the task's own",
        )
        parser.add_argument(
            "--lorm_task_merge",
            choices=("regmean", "mean"),
            default="regmean",
            help="how the tasks' updates are merged for testing (mean: an ablation)",
        )
        parser.add_argument(
            "--cl_merge",
            choices=("individual_mean",),
            default="individual_mean",
            help="fed-mammoth's name of what LoRM does",
        )
        add_switch(parser, "--lora_head", help="only 0: the head is trained as a whole")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if args.lora_head:
            raise UserError("--lora_head 1: LoRM trains the head as a whole, in all published runs too; leave it at 0")
        super().__init__(backbone, loss, args, transform, dataset)
        self.past: list[dict[str, tuple[Tensor, Tensor]]] = []  # (A, B) of finished tasks by layer
        self.past_grams: list[dict[str, Tensor]] = []  # G_t of finished tasks by layer; the server's alone
        self.rounds_done = 0  # in this task
        self.train_factor("B")

    # ---------------------------------------------------------------- which factor

    def factor_of(self, k: int) -> str:
        """The factor that round k of a task trains."""
        return "BA"[k % 2] if self.args.train_matrix == "alt" else self.args.train_matrix

    def train_factor(self, factor: str) -> None:
        """Freeze the other one."""
        for _, _, A, B in self.lora:
            A.requires_grad_(factor == "A")
            B.requires_grad_(factor == "B")

    @property
    def factor(self) -> str:
        """The one that is trained now."""
        return "A" if next(iter(self.factors().values()))[0].requires_grad else "B"

    def body_lr(self) -> float:
        return self.args.lr_A if self.factor == "A" else self.args.lr_B

    # ---------------------------------------------------------------- server: one task, top to bottom

    def begin_rounds(self, clients) -> None:
        super().begin_rounds(clients)
        self.rounds_done = 0
        if self.args.train_matrix == "A":
            self.lora.reset(A="zeros", B="kaiming")

    def regress_body(self, replies) -> dict[str, Tensor]:
        """The closed form of the factor that was trained: {parameter name: merged factor}."""
        if not self.args.regmean_all:
            return {}
        names, reduced = {n: f[self.factor] for n, f in self._own_names.items()}, self.factor == "B"
        weights = [{n: r[p] for n, p in names.items()} for r in replies]
        if reduced:
            grams = [{n: unpack_triu(r[f"gram.{n}"]) for n in names} for r in replies]
        else:
            grams = [{n: self.unpack(r[f"gram.{n}"], self.inputs(n)) for n in names} for r in replies]
        alpha = 1.0 if reduced else self.alpha["body"]  # H_i comes scaled
        merged = merge_layers(weights, grams, alpha=alpha, dtype=self.solve_dtype)
        return {names[n]: W for n, W in merged.items()}

    def aggregate(self, replies) -> None:
        super().aggregate(replies)
        self.rounds_done += 1
        self.show(self.running_mean())

    def end_rounds(self, clients) -> None:
        """Grams of the task's final model, then the merge over tasks."""
        if self.args.regmean_all and self.args.lorm_task_merge == "regmean":
            total = clients.sum("task_grams", Message(*self.known(), factor=self.factor))
            grams = {n: self.unpack(total[f"gram.{n}"], self.inputs(n)) for n in self.lora.layer_names}
            self.past_grams.append(grams)
        self.past.append({n: (A.data.clone(), B.data.clone()) for n, (A, B) in self.factors().items()})
        self.show(self.merged_tasks())

    def summed(self, pairs) -> dict[str, Tensor]:
        """sum B A by layer over some {layer: (A, B)}."""
        return {n: self.product([p[n][0] for p in pairs], [p[n][1] for p in pairs]) for n in self.lora.layer_names}

    def mean_of(self, pairs) -> dict[str, Tensor]:
        return {n: total / len(pairs) for n, total in self.summed(pairs).items()}

    def running_mean(self) -> dict[str, Tensor]:
        """(sum_s B_s A_s + B A) / (t + 1): what is tested between rounds."""
        return self.mean_of([*self.past, self.factors()])

    def merged_tasks(self) -> dict[str, Tensor]:
        """(sum_t B_t A_t G_t)(sum_t G_t)^-1 by layer, or the mean over tasks."""
        if not self.past_grams:
            return self.mean_of(self.past)
        merged = {}
        for n in self.lora.layer_names:  # one layer at a time: the deltas of all tasks are dense
            deltas = [{n: self.product([p[n][0]], [p[n][1]])} for p in self.past]
            grams = [{n: g[n]} for g in self.past_grams]
            merged |= merge_layers(deltas, grams, alpha=self.alpha["body"], dtype=self.solve_dtype)
        return merged

    def inputs(self, layer: str) -> int:
        return self.lora.linear(layer).in_features

    # ---------------------------------------------------------------- the wire

    def known(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Factors by task, factor and layer, with their versions: a client is sent those it does not hold yet."""
        entries, versions = {}, {}
        for task, pairs in enumerate([*self.past, self.factors()]):
            done = self.rounds_done if task == len(self.past) else self.args.num_comm_rounds
            for which, factor in enumerate("AB"):
                version = sum(self.factor_of(k) == factor for k in range(done))
                for layer, pair in pairs.items():
                    entries[f"{factor}{task}.{layer}"] = pair[which]
                    versions[f"{factor}{task}.{layer}"] = version
        return entries, versions

    def broadcast(self) -> Message:
        """The head rows, and of the factors those that have changed."""
        self.train_factor(self.factor_of(self.rounds_done))
        entries, versions = self.known()
        head = {f"head.{n}": p for n, p in self.head.named_parameters()}
        return Message({**head, **entries}, keep=versions, factor=self.factor)

    # ---------------------------------------------------------------- client

    def load(self, message: Message) -> None:
        """Put the task's factors and head rows in place, and remember those of past tasks."""
        self.lora.enable()
        task = self.current_task
        while len(self.past) < task:
            t = len(self.past)
            self.past.append({n: (message[f"A{t}.{n}"], message[f"B{t}.{n}"]) for n in self.lora.layer_names})
        self.train_factor(message["factor"])
        for layer, _, A, B in self.lora:
            for p, factor in ((A, "A"), (B, "B")):
                value = message[f"{factor}{task}.{layer}"]
                p.data = value.clone() if p.requires_grad else value
        if "head.weight" in message:
            for name, p in self.head.named_parameters():
                p.data = message[f"head.{name}"].clone()

    def after_local(self, client) -> Message:
        grams, head = self.collect(client, self.factor, head=True)
        packed = {f"gram.{n}": G for n, G in grams.items()}
        return Message({**super().after_local(client), **packed, "gram.head": self.pack(head.sums["head"])})

    def task_grams(self, message: Message, client) -> Message:
        """Gram matrices of the task's merged model on this client's data: they add up over clients."""
        self.load(message)
        grams, _ = self.collect(client, "A")
        return Message({f"gram.{n}": G for n, G in grams.items()})

    def collect(self, client, factor: str, head: bool = False):
        """What the merge of a factor needs of this client's Grams, as it travels, and the head's collector.

        B: H = A G~ A^T, r x r, of which the off-diagonal part comes from the moments of A x and the diagonal one from
        those of x. A: G itself, dense or its diagonal.
        """
        alpha, layers = self.alpha["body"], self.lora.layer_names
        A = {n: pair[0].detach() for n, pair in self.factors().items()}
        collectors = {}
        if self.args.regmean_all and factor == "B":
            if alpha > 0:
                collectors["through"] = self.moments(layers, False, A)
            if alpha < 1:
                collectors["diagonal"] = self.moments(layers, True)
        elif self.args.regmean_all:
            collectors["own"] = self.moments(layers, alpha == 0)
        of_head = self.moments((), self.alpha["head"] == 0) if head else None
        with self.gram_model():
            self.pass_over(client, collectors.values(), of_head)
        if not collectors:
            return {}, of_head
        if "own" in collectors:
            return {n: self.pack(G) for n, G in collectors["own"].sums.items()}, of_head
        H = {}
        for n in layers:
            parts = []
            if "through" in collectors:
                parts.append(alpha * collectors["through"].sums[n])
            if "diagonal" in collectors:
                parts.append((1 - alpha) * reduced_gram(A[n], collectors["diagonal"].sums[n]))
            H[n] = pack_triu(sum(parts))
        return H, of_head

    @contextmanager
    def gram_model(self) -> Iterator[None]:
        """Within the block, the weights that Grams are collected with."""
        t = self.current_task
        if not t or self.args.lorm_gram_model == "local":
            yield
            return
        if getattr(self, "_own_mean_task", None) != t:  # the adapter adds B_i A_i / (t + 1)
            self._own_mean = self.over_pretrained({n: total / (t + 1) for n, total in self.summed(self.past).items()})
            self._own_mean_task = t
        try:
            for _, _, branch in self.lora.branches():
                branch.scale = 1 / (t + 1)
            with self.weights_in_place(self._own_mean):
                yield
        finally:
            for _, _, branch in self.lora.branches():
                branch.scale = 1.0
