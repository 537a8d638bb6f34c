"""RegMean (Jin et al. 2023, arXiv 2212.09849): linear layers merged by least squares over what they see.

    W = (sum_i W_i G~_i) (sum_i G~_i)^-1,   G~ = alpha G + (1 - alpha) diag(G),   G_i = X_i^T X_i       (eq. 2)

X_i are the inputs of the layer when model i sees its own data. Two uses:

    --fl         the clients' models of a round, in place of FedAvg, as in fed-mammoth: whole networks are trained, G is
                 a sum, so that clients count by their data; the head's alpha is 0.5.
    without      after the fact, as in the paper: every task trains an expert of its own from the pretrained network;
                 the experts of the tasks so far are merged for testing; G is a mean over tokens. Heads have different
                 classes and stand side by side. ``--regmean_tasks`` chooses this under --fl too, for the server's
                 model of each task.

Everything but linear weights is averaged. The solve is anchored at the mean of the models (models/utils/merging.py),
so that inputs nobody has seen take the mean instead of zero. The head trains the rows of the current task alone; the
others cannot move. fed-mammoth's ``linear_probe_epochs`` sends raw data to the server and is not ported.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from backbones.utils.moments import InputMoments
from backbones.utils.targets import linear_layers
from federated.message import Message
from models.utils.federated_model import FederatedModel
from models.utils.gpm import pack_triu, unpack_triu
from models.utils.head_rows import HeadRowsModel
from models.utils.merging import merge_layers, regression_merge
from utils.args import add_switch, number

HEAD = "head"


def add_regmean_args(parser, backbone: float) -> None:
    """The flags of methods that merge by Gram matrices, under fed-mammoth's names."""
    parser.add_argument(
        "--alpha_regmean_head", type=number(float, 0, 1), default=0.5, help="off-diagonal scaling of the head's Gram"
    )
    parser.add_argument(
        "--alpha_regmean_backbone",
        type=number(float, -1, 1),
        default=backbone,
        help="the same for the body's; 0 sends the diagonals alone, below 0 means as the head's",
    )
    add_switch(parser, "--regmean_all", default=1, help="0: RegMean for the head, means elsewhere")
    parser.add_argument("--regmean_rounds", type=number(int, 1), default=1, help="passes over the data for a Gram")
    parser.add_argument("--gram_dtype", type=int, choices=(32, 64), default=32, help="bits of a client's Gram")
    add_switch(parser, "--reg_dtype_64", default=1, help="solve in float64 (0: in float32)")


class GramModel(FederatedModel):
    """What RegMean and LoRM share: the passes that collect Gram matrices, how they travel, the head's merge."""

    @property
    def alpha(self) -> dict[str, float]:
        """Off-diagonal scaling of the body and of the head."""
        head, body = self.args.alpha_regmean_head, self.args.alpha_regmean_backbone
        return {"body": head if body < 0 else body, HEAD: head}

    @property
    def solve_dtype(self) -> torch.dtype | None:
        return None if self.args.reg_dtype_64 else torch.float32

    def moments(self, layers, diagonal: bool, through=None) -> InputMoments:
        """A collector of Gram matrices of some layers."""
        dtype = {32: torch.float32, 64: torch.float64}[self.args.gram_dtype]
        return InputMoments(self.net, list(layers), dtype, diagonal, through)

    @torch.no_grad()
    def pass_over(self, client, collectors, head: InputMoments | None = None) -> None:
        """Show the client's data, augmented as in training, to the network as it is, with collectors in place."""
        self.net.eval()
        with ExitStack() as stack:
            for collector in collectors:
                stack.enter_context(collector)
            for _ in range(self.args.regmean_rounds):
                for inputs, _ in client.stat_loader(augment=True):
                    features = self.net(inputs, returnt="features")
                    if head is not None:
                        head.add(HEAD, features)

    def pack(self, G: Tensor) -> Tensor:
        """A Gram matrix as it travels: its upper triangle, or its diagonal as it is."""
        return pack_triu(G) if G.dim() == 2 else G

    # ---- server

    def merged(self, current, replies, weights):
        """Linear weights by regression, everything else by the weighted mean."""
        grams = [self.unpack(r["gram.head"], self.head.weight.shape[1]) for r in replies]
        head = regression_merge(
            [r["head.weight"] for r in replies], grams, alpha=self.alpha[HEAD], dtype=self.solve_dtype
        )
        regressed = {**self.regress_body(replies), "head.weight": head}
        rest = {n: t for n, t in current.items() if n not in regressed}
        return {**super().merged(rest, replies, weights), **regressed}

    def regress_body(self, replies) -> dict[str, Tensor]:
        """{name: merged weight} of what is merged by regression beside the head."""
        raise NotImplementedError

    def unpack(self, packed: Tensor, d: int) -> Tensor:
        """The inverse of :meth:`pack` for inputs of size d."""
        return packed if packed.shape[-1] == d and d > 1 else unpack_triu(packed)


class RegMean(GramModel, HeadRowsModel):
    """Whole networks, merged by regression."""

    NAME = "regmean"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        add_regmean_args(parser, -1.0)
        parser.add_argument(
            "--gram_norm",
            choices=("sum", "mean"),
            default=None,
            help="of G over tokens; default: sum, mean without --fl",
        )
        parser.add_argument(
            "--regmean_tasks",
            choices=("sequential", "individual"),
            default=None,
            help="a task goes on from the last one, or starts from the pretrained network and is merged with others; "
            "default: sequential, individual without --fl",
        )
        parser.add_argument("--lr_back", type=number(float), default=-1.0, help="rate of the body; below 0: --lr")
        parser.add_argument(
            "--only_square",
            type=number(int, 0),
            default=0,
            help="s: of the mlp and proj layers only those that are s x s",
        )
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        args.gram_norm = args.gram_norm or ("sum" if args.fl else "mean")
        args.regmean_tasks = args.regmean_tasks or ("sequential" if args.fl else "individual")
        super().__init__(backbone, loss, args, transform, dataset)
        body = [n for n in linear_layers(backbone, "*") if n != "classifier"] if args.regmean_all else []
        if args.only_square:
            square = (args.only_square, args.only_square)
            body = [n for n in body if "qkv" in n or tuple(backbone.get_submodule(n).weight.shape) == square]
        self.layers = [n for n in body if backbone.get_submodule(n).weight.requires_grad]
        self._own_pretrained = {n: t.data for n, t in self._averaged().items()} if self._individual else {}
        self.seen_grams: dict[str, Tensor] = {}  # sums over finished tasks (individual)

    def body_lr(self) -> float:
        return self.args.lr_back

    # ---------------------------------------------------------------- server

    @property
    def _individual(self) -> bool:
        return self.args.regmean_tasks == "individual"

    def _averaged(self) -> dict[str, Tensor]:
        """What tasks share beside the Gram layers: every other tensor of the body."""
        return {**{n: p for n, p in self.net.body_parameters().items() if p.requires_grad}, **self.shared_buffers()}

    def begin_rounds(self, clients) -> None:
        if self._individual and self.current_task:
            self.merged_tasks = {n: t.data for n, t in self._averaged().items()}
            for name, tensor in self._averaged().items():
                tensor.data = self._own_pretrained[name].clone()

    def regress_body(self, replies) -> dict[str, Tensor]:
        weights = [{n: r[f"{n}.weight"] for n in self.layers} for r in replies]
        grams = [{n: self.unpack(r[f"gram.{n}"], self._inputs(n)) for n in self.layers} for r in replies]
        merged = merge_layers(weights, grams, alpha=self.alpha["body"], dtype=self.solve_dtype)
        return {f"{n}.weight": W for n, W in merged.items()}

    def _inputs(self, layer: str) -> int:
        return self.net.get_submodule(layer).in_features

    def end_rounds(self, clients) -> None:
        """Merge the task's expert with those of the tasks before it (``individual``).

        Merging one by one equals merging all at once: W_past (sum of past G) is sum of past W_i G_i.
        """
        if not self._individual:
            return
        reply = clients.sum("task_grams", self.broadcast())
        tokens = reply.get("tokens", 0)
        grams = {
            n: self.unpack(reply[f"gram.{n}"], self._inputs(n)) / (tokens if self.args.gram_norm == "mean" else 1)
            for n in self.layers
        }
        t = self.current_task
        if t:
            mine = {n: x.data for n, x in self._averaged().items()}
            mean = {n: (t * self.merged_tasks[n] + x) / (t + 1) for n, x in mine.items()}
            names = {n: f"{n}.weight" for n in self.layers}
            merged = merge_layers(
                [{n: source[w] for n, w in names.items()} for source in (self.merged_tasks, mine)],
                [self.seen_grams, grams],
                anchor={n: mean[w] for n, w in names.items()},
                alpha=self.alpha["body"],
                dtype=self.solve_dtype,
            )
            mean |= {names[n]: W for n, W in merged.items()}
            for name, tensor in self._averaged().items():
                tensor.data = mean[name]
        self.seen_grams = {n: self.seen_grams[n] + G if t else G for n, G in grams.items()}

    # ---------------------------------------------------------------- client

    def after_local(self, client) -> Message:
        body, head = self.collectors()
        self.pass_over(client, [body], head)
        norm = self.args.gram_norm == "mean"
        grams = {f"gram.{n}": self.pack(c.sums[n] / (c.counts[n] if norm else 1)) for c in (body, head) for n in c.sums}
        return Message({**super().after_local(client), **grams})

    def task_grams(self, message: Message, client) -> Message:
        """Sums of x x^T at every merged layer under the server's model of the task, with the number of tokens."""
        self.load(message)
        body, _ = self.collectors()
        self.pass_over(client, [body])
        tokens = max(body.counts.values(), default=0)
        return Message({f"gram.{n}": self.pack(S) for n, S in body.sums.items()}, tokens=tokens)

    def collectors(self) -> tuple[InputMoments, InputMoments]:
        """Of the body's layers and of the head."""
        return self.moments(self.layers, self.alpha["body"] == 0), self.moments((), self.alpha[HEAD] == 0)
