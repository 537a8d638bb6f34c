"""RanPAC: random projections and pre-trained models for continual learning (McDonnell et al. 2023, arXiv 2307.02251).

    first task    a few parameters inside the frozen transformer (``--petl``) and a cosine classifier are trained, then
                  nothing is trained any more (sec. 4.3, phase 1)
    every task    h = relu(f(x) W), W fixed, normal, d x M (sec. 4.2);  G += H^T H, Q += H^T Y (eq. 6, phase 2)
    prediction    argmax h W_o,  W_o = (G + lambda I)^-1 Q (eq. 5)
    lambda        of 10^-8 ... 10^8, the one that fitted on 80 % of the task's samples predicts the rest best

Under --fl (ours) the first task is FedAvg, W comes from the seed that all share, and clients send their G and Q, which
add up: W_o is that of all data in one place, however it is divided. To choose lambda, G and Q travel in two parts, of
80 % and of 20 % of a client's samples: the squared error of the latter is tr(W_o^T G W_o) - 2 tr(W_o^T Q) + n. As each
is a triangle of M (M + 1) / 2 numbers, M is what decides the cost (``--ridge`` with a number halves it).
``--ranpac_agg average`` averages the clients' own solutions, each from all that the client has seen, as fed-mammoth's
private code did.

Adapters have no dropout, and of VPT the shallow kind is there. Which of the three the paper used for which data set is
in models/config/ranpac.yaml.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.utils.adapters import AdaptFormer, ScaleShift
from backbones.utils.moments import exact_float32
from backbones.utils.prompts import PrependPrompts
from federated.message import Message
from models.utils.federated_model import FederatedModel
from models.utils.gpm import pack_triu, unpack_triu
from models.utils.merging import wide
from utils.args import number
from utils.conf import make_generator
from utils.errors import RunError, UserError

RIDGES = [10.0**k for k in range(-8, 9)]


class CosineHead(nn.Module):
    """sigma * cos(f, w_c) for C classes; ``weight`` (C, d), ``sigma`` a scalar that starts at one."""

    def __init__(self, d: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.uniform_(torch.empty(n_classes, d), -(d**-0.5), d**-0.5))
        self.sigma = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, d)."""
        return self.sigma * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


def ridge_solution(G: Tensor, Q: Tensor, ridge: float) -> Tensor | None:
    """(G + ridge I)^-1 Q (M x C) in float64 by Cholesky; None where it breaks down (too little ridge for a singular G).

    Args:
        G: (M, M), sum of h h^T. Q: (M, C), sum of h y^T. ridge: above 0.
    """
    A = G.to(wide(G), copy=True)
    A.diagonal().add_(ridge)
    L, info = torch.linalg.cholesky_ex(A)
    if info:
        return None
    return torch.cholesky_solve(Q.to(L), L)


def squared_error(W: Tensor, G: Tensor, Q: Tensor, n: float) -> float:
    """sum_i |y_i - W^T h_i|^2 over n one-hot samples, from their G = sum h h^T and Q = sum h y^T alone."""
    W, G, Q = (t.to(wide(t)) for t in (W, G, Q))
    return float((W * (G @ W)).sum() - 2 * (W * Q).sum() + n)


def best_ridge(fit: tuple[Tensor, Tensor], rest: tuple[Tensor, Tensor, float]) -> float:
    """The ridge of ``RIDGES`` whose solution on ``fit`` (G, Q) has the least squared error on ``rest`` (G, Q, n).

    Raises:
        RunError: no ridge gives a solution.
    """
    errors = {}
    for ridge in RIDGES:
        W = ridge_solution(*fit, ridge)
        error = squared_error(W, *rest) if W is not None else math.inf
        errors[ridge] = error if math.isfinite(error) else math.inf
    best = min(errors, key=errors.get)
    if errors[best] == math.inf:
        raise RunError("ranpac: no ridge of 1e-8 to 1e8 gives a solution: are features finite?")
    return best


class Ranpac(FederatedModel):
    """First-task adaptation, then ridge regression on random projections of frozen features."""

    NAME = "ranpac"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add(
            "--rp_size",
            "--M",
            type=number(int, 0),
            default=10000,
            help="random features M; 0: the features as they are",
        )
        add(
            "--petl",
            choices=("adapter", "ssf", "vpt", "none"),
            default="adapter",
            help="what is trained in the first task: AdaptFormer, scales and shifts, prompts, or nothing at all",
        )
        add("--ffn_num", type=number(int, 1), default=64, help="width of the adapter")
        add("--prompt_len", type=number(int, 1), default=5, help="prompts of --petl vpt")
        add(
            "--ridge", type=ridge_arg, default=None, help="lambda; default: chosen in every task on a fifth of its data"
        )
        add(
            "--ranpac_agg",
            choices=("stats", "average"),
            default="stats",
            help="sums of statistics, or mean of solutions",
        )
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if args.petl != "none" and not hasattr(backbone, "patch_embed"):
            raise UserError(f"--backbone {args.backbone} has no blocks to adapt: use vit or vit-pocket, or --petl none")
        backbone.requires_grad_(False)
        super().__init__(backbone, loss, args, transform, dataset)
        d = backbone.classifier.in_features
        self.petl = {
            "adapter": lambda: AdaptFormer(backbone, args.ffn_num),
            "ssf": lambda: ScaleShift(backbone),
            "vpt": lambda: PrependPrompts(backbone, args.prompt_len),
            "none": nn.Identity,
        }[args.petl]()
        self.cosine = CosineHead(d, self.n_classes_current_task)
        self.gram = self.cross = None  # G, a triangle, and Q (M, C) of all tasks so far
        self.readout: Tensor | None = None  # W_o (M, classes seen)

    # ---------------------------------------------------------------- first task: what is trained

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.adapted() if self.current_task == 0 and hasattr(self, "petl") else {}

    def adapted(self) -> dict[str, nn.Parameter]:
        """What the first task trains, by name; nothing under ``--petl none``."""
        if self.args.petl == "none":
            return {}
        return {
            **{f"petl.{n}": p for n, p in self.petl.named_parameters()},
            **{f"cosine.{n}": p for n, p in self.cosine.named_parameters()},
        }

    def task_logits(self, inputs: Tensor) -> Tensor:
        return self.cosine(self.features(inputs))

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        if not self.trainable():
            self.regress(clients)

    def round(self, clients, r: int) -> None:
        if self.trainable():
            super().round(clients, r)

    def end_rounds(self, clients) -> None:
        if self.trainable():
            self.regress(clients)

    def regress(self, clients) -> None:
        """Ridge regression with the task's data added."""
        frozen = {f"frozen.{n}": p for n, p in self.adapted().items() if n.startswith("petl.")}
        message = Message(frozen, keep=dict.fromkeys(frozen, 0))
        if self.args.ranpac_agg == "average":
            replies = clients.call("own_solution", message)
            n = sum(r["n_samples"] for r in replies)
            readout = sum(r["readout"].to(wide(r["readout"])) * (r["n_samples"] / n) for r in replies)
        else:
            known = {} if self.gram is None else {"gram": self.gram, "cross": self.cross}
            self.gram, self.cross, readout = self.solve(clients.sum("statistics", message), known)
        self.readout = readout.to(self.net.classifier.weight.dtype)

    def solve(self, reply: Message, known: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(G as a triangle, Q (M, classes seen), W_o) of a task's statistics and those ``known`` of tasks before it.

        Lambda is chosen on the task alone; where rounding in the sum over tasks is larger than that, the smallest of
        ``RIDGES`` above it that gives a solution is taken, with a warning.

        Raises:
            RunError: G + lambda I is singular, for the lambda that was asked for or for all.
        """
        ridge, parts = self.args.ridge, [p for p in ("fit", "rest") if f"gram.{p}" in reply]
        if ridge is None and 0 < reply["n_rest"] < reply["n_samples"]:
            fit, rest = ((unpack_triu(reply[f"gram.{p}"]), reply[f"cross.{p}"]) for p in parts)
            ridge = best_ridge(fit, (*rest, reply["n_rest"]))
        elif ridge is None:
            ridge = 1.0  # a single sample: nothing to choose by
        gram, cross = (sum(reply[f"{what}.{p}"] for p in parts) for what in ("gram", "cross"))
        before, after = self.n_past_classes, self.N_CLASSES - self.n_seen_classes
        cross = F.pad(cross, (before, after))
        if known:
            gram, cross = gram + known["gram"], cross + known["cross"]
        G, seen, task = unpack_triu(gram), cross[:, : self.n_seen_classes], self.current_task + 1
        larger = [r for r in RIDGES if r > ridge] if self.args.ridge is None else []
        for used in (ridge, *larger):
            W = ridge_solution(G, seen, used)
            if W is not None:
                break
        else:
            raise RunError(f"ranpac: G + {ridge:g} I is singular after task {task}; raise --ridge")
        if used != ridge:
            warnings.warn(f"ranpac: G + {ridge:g} I is singular after task {task}, lambda is {used:g}", stacklevel=2)
        return gram, cross, W

    # ---------------------------------------------------------------- client

    @torch.no_grad()
    def statistics(self, message: Message, client) -> Message:
        """G (a triangle) and Q of the client's samples: of 80 % and of the rest, or of all where lambda is given."""
        for name, p in self.adapted().items():
            if name.startswith("petl."):
                p.data = message[f"frozen.{name}"]
        self.net.eval()
        n, C, parts = client.n_samples, self.n_classes_current_task, ("fit", "rest")
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[torch.randperm(n, generator=client.generator)[: int(0.8 * n)]] = True
        if self.args.ridge is not None:
            chosen[:], parts = True, ("fit",)
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        done = 0
        for inputs, labels in client.stat_loader():
            h, y = self.projected(inputs), F.one_hot(labels - self.n_past_classes, C)
            mine = chosen[done : done + len(labels)].to(h.device)
            done += len(labels)
            for part in parts:
                hp, yp = (h[mine], y[mine]) if part == "fit" else (h[~mine], y[~mine])
                if part not in sums:
                    sums[part] = h.new_zeros(h.shape[1], h.shape[1]), h.new_zeros(h.shape[1], C)
                with exact_float32():
                    sums[part][0].addmm_(hp.T, hp)
                    sums[part][1].addmm_(hp.T, yp.to(hp))
        out = {}
        for part, (G, Q) in sums.items():
            out |= {f"gram.{part}": pack_triu(G), f"cross.{part}": Q}
        return Message(out, n_rest=int((~chosen).sum()), n_samples=n)

    def own_solution(self, message: Message, client) -> Message:
        """W_o of all samples this client has seen, alone; a class it never saw has a column of zeros."""
        gram, cross, W = self.solve(self.statistics(message, client), client.state.get("ranpac", {}))
        client.state["ranpac"] = {"gram": gram, "cross": cross}
        return Message(readout=W.to(gram), n_samples=client.n_samples)

    def projected(self, inputs: Tensor) -> Tensor:
        """h = relu(f W) (B, M) of a batch; f itself without a projection."""
        f = self.features(inputs)
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        return F.relu(f @ self.projection(f)) if self.args.rp_size else f

    def projection(self, like: Tensor) -> Tensor:
        """W (d, M), the same wherever it is made, from --seed."""
        W = getattr(self, "_own_projection", None)
        if W is None or W.dtype != like.dtype or W.device != like.device:
            draw = make_generator(self.args.seed, "ranpac projection")
            W = torch.randn(like.shape[1], self.args.rp_size, generator=draw).to(like)
            self._own_projection = W
        return W

    def forward(self, x: Tensor) -> Tensor:
        """h W_o; during the first task's training the cosine classifier. Classes not seen yet come last."""
        if self.readout is None:
            z = self.task_logits(x)
        else:
            h = self.projected(x)
            z = h @ self.readout.to(h)
        return F.pad(z, (0, self.N_CLASSES - z.shape[1]), value=float("-inf"))


def ridge_arg(text: str) -> float | None:
    """--ridge: 'auto' or a number above 0."""
    return None if text == "auto" else number(float, 0, open_low=True)(text)
