"""LIVAR, layer importance and variance-based merging (arXiv 2507.06813), after its author's released code.

Clients train LoRA (A and B) and the head. Two signals that training leaves behind decide how the server merges.

Head, by the variance of features (k client, c class, z features of the class):
    s_kc = mean over dimensions of var(z),   w_kc = s_kc / sum_j s_jc,   row_c = sum_k w_kc row_c^(k)

LoRA, by layer importances, the first-order decrease of the loss summed over steps (l layer, G gradient):
    I_A^l += |sum_ij G_A^l (A^l_before - A^l_after)|,  likewise I_B
    q_k^l = table[I_B against its 60 and 80 % quantiles][I_A against its 25 and 50 % quantiles]  (over all k and l)
    omega_k^l = q_k^l / sum_j q_j^l
The table is what an offline SHAP analysis of the authors left; no SHAP is computed while training. Another one can be
fitted with ``python -m utils.livar_fit_rule`` (a reconstruction) and used by ``--livar_rule fitted:FILE``.

What is certain is the released code; whether the paper means each of its details is not. ``--livar_mode released``
(default) follows it to the letter: A and B are averaged with omega apart from each other and sent as the next start,
while the tested update is sum_k n_k/n B_k A_k, which omega never enters; features are those of the frozen network on
images without normalisation; importances are never reset. ``principled`` tests the omega-weighted sum of products and
sends the nearest product of its rank, takes features of the adapted network on test images, and resets importances
every round. Every choice has a flag of its own, which wins over the mode.

The method is about one task (``--joint 1``). Over several tasks (a reconstruction) importances start anew, only the
rows of the task are merged, and the tested update is the mean over tasks. Gradients are unscaled before they are
looked at, which the released code omits in float16.

``--livar_ccvr 1``, an ablation of the paper, calibrates the classifier after every round (models/utils/calibrated.py)
on the same pass: clients also send the means and variances of their classes. Over several tasks that is all classes.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from federated.message import Message
from models.utils.calibrated import Calibrated, add_calibration_args
from models.utils.merging import low_rank_sum, weighted_mean, wide
from models.utils.task_lora import TaskLoRA
from utils.args import add_switch
from utils.errors import UserError

# Rows: I_B below, within, above its two thresholds; columns: I_A likewise. Released code.
RULE = {
    "quantiles_A": [0.25, 0.50],
    "quantiles_B": [0.60, 0.80],
    "table": [
        [0.03813978, 0.03813978, 0.03813978],
        [0.09813978, 0.08813978, 0.07813978],
        [0.19313978, 0.11813978, 0.09313978],
    ],
}
MODES = {
    "released": {
        "livar_features": "frozen_raw",
        "livar_imp": "si",
        "livar_imp_reset": "never",
        "livar_broadcast": "factors",
        "livar_eval": "count_product",
    },
    "principled": {
        "livar_features": "adapted",
        "livar_imp": "si",
        "livar_imp_reset": "round",
        "livar_broadcast": "product_svd",
        "livar_eval": "omega_product",
    },
}


def read_rule(path: str) -> dict:
    """A rule from a JSON file: ``quantiles_A`` and ``quantiles_B`` (two each, rising) and a 3 x 3 ``table`` above zero.

    Raises:
        UserError: no such file, or not a rule.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--livar_rule fitted:{path}: there is no such file; python -m utils.livar_fit_rule makes one")
    try:
        rule = json.loads(file.read_text())
        quantiles = [[float(q) for q in rule[f"quantiles_{f}"]] for f in "AB"]
        table = torch.tensor(rule["table"], dtype=torch.float64)
        if table.shape != (3, 3) or not (table > 0).all() or not table.isfinite().all():
            raise ValueError("the table is 3 x 3, of finite numbers above zero")
        if any(len(q) != 2 or not 0 <= q[0] <= q[1] <= 1 for q in quantiles):
            raise ValueError("quantiles are two numbers in [0, 1], the smaller first")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"--livar_rule fitted:{path}: not a rule ({type(e).__name__}: {e})") from None
    return rule


def scores(I_A: Tensor, I_B: Tensor, rule: dict = RULE) -> Tensor:
    """q (K x L) from importances (K x L) by the table; at a threshold an importance counts as within."""
    q = {}
    for name, importance in (("A", I_A), ("B", I_B)):
        flat = importance.double().flatten()
        low, high = (torch.quantile(flat, level) for level in rule[f"quantiles_{name}"])
        q[name] = 1 + (importance.double() > high).long() - (importance.double() < low).long()
    return torch.tensor(rule["table"], dtype=torch.float64, device=I_A.device)[q["B"], q["A"]]


def head_weights(rule: str, variance: Tensor, counts: Tensor) -> Tensor:
    """w (K x C), columns that sum to one, zero where no client covers the class.

    Args:
        rule: var, var_count, inv_var. variance, counts: (K x C), s_kc and n_kc.
    """
    s = variance.double()
    raw = {"var": s, "var_count": s * counts, "inv_var": torch.where(s > 0, 1 / s, 0)}[rule]
    total = raw.sum(0)
    return torch.where(total > 0, raw / total, 0)


class Livar(Calibrated, TaskLoRA):
    """LoRA merged by importances, the head by variances."""

    NAME = "livar"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        TaskLoRA.get_parser(parser)
        add = parser.add_argument
        add("--livar_mode", choices=tuple(MODES), default="released", help="sets those of the next five not given")
        add(
            "--livar_features",
            choices=("frozen_raw", "frozen", "adapted"),
            default=None,
            help="network and images of the variances: pretrained on images in [0, 1], pretrained, or as trained",
        )
        add(
            "--livar_imp",
            choices=("si", "grad"),
            default=None,
            help="importance of a step: |sum G (before - after)| or |sum G|",
        )
        add("--livar_imp_reset", choices=("never", "round"), default=None, help="when importances return to zero")
        add(
            "--livar_broadcast",
            choices=("factors", "product_svd", "product_fold"),
            default=None,
            help="next start: means of A and B, the mean of B A cut to the rank, or all of it (dense) with B = 0",
        )
        add(
            "--livar_eval",
            choices=("count_product", "omega_product", "broadcast"),
            default=None,
            help="tested update: products weighted by samples, by omega, or what is sent",
        )
        add(
            "--livar_rule",
            default="table",
            metavar="{table,uniform,count,fitted:FILE}",
            help="weights of clients in a layer: the released table, equal, by samples, or a fitted table",
        )
        add(
            "--livar_head",
            choices=("var", "count", "uniform", "var_count", "inv_var"),
            default="var",
            help="weights of clients in a row of the head",
        )
        add_switch(parser, "--livar_ccvr", help="calibrate the classifier after a round")
        add_calibration_args(parser, rebalance_sched="cosine")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        for name, value in MODES[args.livar_mode].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        kind, _, path = args.livar_rule.partition(":")
        if kind not in ("table", "uniform", "count", "fitted") or (kind == "fitted") != bool(path):
            raise UserError(f"--livar_rule {args.livar_rule!r}: choose from table, uniform, count, fitted:FILE")
        self._own_rule = read_rule(path) if path else RULE
        if not args.livar_ccvr:
            args.rebalance_scope = "none"
        elif args.proto_model == "global" or args.rebalance_when != "round":
            raise UserError("--livar_ccvr takes the clients' own statistics in every round: --proto_model local")
        super().__init__(backbone, loss, args, transform, dataset)
        self.folded: dict[str, Tensor] = {}  # the task's dense update (product_fold)
        self.fold_version = 0
        self.mean_weights: dict[str, Tensor] = {}  # what was tested after the last task

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        super().begin_rounds(clients)
        layers = self.lora.layer_names if self.current_task else ()
        self.mean_weights = {n: self.lora.linear(n).weight.data for n in layers}
        self.folded, self.fold_version = {}, 0

    def aggregate(self, replies) -> None:
        shares = torch.tensor(self.client_weights(replies), dtype=torch.float64)
        omega = self.omega(replies, shares)  # K x L
        As, Bs = ([{n: r[f[i]] for n, f in self._own_names.items()} for r in replies] for i in "AB")
        send, test = {}, {}
        for index, (layer, name) in enumerate(self._own_names.items()):
            A, B, w = [a[layer] for a in As], [b[layer] for b in Bs], omega[:, index].tolist()
            base = self.folded.get(layer, 0)
            if self.args.livar_broadcast == "product_svd":
                send[name["B"]], send[name["A"]] = low_rank_sum(B, A, w, self.args.lora_r)
            else:
                send[name["A"]], send[name["B"]] = weighted_mean(A, w), weighted_mean(B, w)
            if self.args.livar_broadcast == "product_fold":
                self.folded[layer] = (base + self.product(A, B, w)).to(A[0].dtype)
                send[name["B"]] = torch.zeros_like(B[0])
            if self.args.livar_eval == "broadcast":
                test[layer] = self.folded.get(layer, 0) + self.product([send[name["A"]]], [send[name["B"]]])
            else:
                product = shares.tolist() if self.args.livar_eval == "count_product" else w
                test[layer] = base + self.product(A, B, product)
        self.fold_version += 1
        self._own_merged = {**send, **self.merge_head(replies, shares)}
        super().aggregate(replies)
        self.show(self.mean_over_tasks(test))

    def omega(self, replies, shares: Tensor) -> Tensor:
        """omega_k^l (K x L), columns that sum to one."""
        L = len(self._own_names)
        if self.args.livar_rule == "count":
            return shares[:, None].expand(-1, L)
        if self.args.livar_rule == "uniform":
            return torch.full((len(replies), L), 1 / len(replies), dtype=torch.float64)
        I_A, I_B = (torch.stack([r[f"importance.{f}"] for r in replies]) for f in "AB")
        q = scores(I_A, I_B, self._own_rule).cpu()
        return q / q.sum(0)

    def merge_head(self, replies, shares: Tensor) -> dict[str, Tensor]:
        """Rows weighted by variance; a class that nobody covers keeps its row."""
        rule, K = self.args.livar_head, len(replies)
        rows = {n: torch.stack([r[f"head.{n}"] for r in replies]) for n in ("weight", "bias")}
        if rule in ("count", "uniform"):
            w = (shares if rule == "count" else torch.full((K,), 1 / K, dtype=torch.float64)).tolist()
            return {f"head.{n}": weighted_mean(list(r), w) for n, r in rows.items()}
        variance, counts = (torch.stack([r[n] for r in replies]) for n in ("variance", "counts"))
        w = head_weights(rule, variance, counts)
        covered = w.sum(0) > 0
        merged = {}
        for name, r in rows.items():
            dims = (...,) + (None,) * (r.dim() - 2)
            mean = (w[dims].to(wide(r)) * r.to(wide(r))).sum(0).to(r.dtype)
            merged[f"head.{name}"] = torch.where(covered[dims], mean, getattr(self.head, name).data)
        return merged

    def merged(self, current, replies, weights):
        return self._own_merged

    def mean_over_tasks(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        """(t mean + delta) / (t + 1) by layer, with the mean of the updates of the t tasks before."""
        t = self.current_task
        if not t:
            return deltas
        out = {}
        for layer, _, branch in self.lora.branches():
            past = self.mean_weights[layer].double() - self._own_pretrained[layer].double()
            past = torch.cat([past[rows] for rows in branch.rows])
            out[layer] = (t * past + deltas[layer]) / (t + 1)
        return out

    # ---------------------------------------------------------------- the wire

    def broadcast(self) -> Message:
        if self.args.livar_broadcast != "product_fold" or not self.folded:
            return super().broadcast()
        fold = {f"fold.{n}": D for n, D in self.folded.items()}
        version = 1000 * self.current_task + self.fold_version
        return Message({**super().broadcast(), **fold}, keep=dict.fromkeys(fold, version))

    # ---------------------------------------------------------------- client

    def load(self, message: Message) -> None:
        self.lora.enable()
        super().load(message)
        fold = message.tensors("fold.")
        if fold or getattr(self, "_own_folded", False):
            self.put_weights(self.over_pretrained(fold) if fold else self._own_pretrained)
            self._own_folded = bool(fold)

    @property
    def _needs_importance(self) -> bool:
        return self.args.livar_rule not in ("uniform", "count")

    @property
    def _needs_statistics(self) -> bool:
        return super()._needs_statistics or self.args.livar_head in ("var", "var_count", "inv_var")

    @property
    def _watches_steps(self) -> bool:
        return self._needs_importance

    def before_local(self, message: Message, client) -> None:
        state = client.state
        if state.get("task") != client.task:
            state.clear()
            state["task"] = client.task
        if "importance" not in state or self.args.livar_imp_reset == "round":
            state["importance"] = torch.zeros(2, len(self._own_names), device=self.device)

    def on_step(self, client, before, after) -> None:
        step = []
        for factor in "AB":
            for names in self._own_names.values():
                G = after[names[factor]].grad
                if self.args.livar_imp == "si":
                    G = G * (before[names[factor]] - after[names[factor]].detach())
                step.append(G.sum().abs())
        client.state["importance"] += torch.stack(step).nan_to_num(0, 0, 0).view(2, -1)

    def after_local(self, client) -> Message:
        reply = super().after_local(client)
        if self._needs_importance:
            I_A, I_B = client.state["importance"].clone()
            reply = Message({**reply, "importance.A": I_A, "importance.B": I_B})
        return reply

    def statistics(self, client) -> Message:
        """``variance`` and ``counts`` (C,), s_kc and n_kc of the task's classes, and prototypes for the calibration.

        s is 0 where the client has fewer than two samples. Features of the frozen network are the same in every round:
        what they give is kept for the task.
        """
        a = self.args
        frozen = a.livar_features != "adapted"
        if frozen and "statistics" in client.state:
            return Message(client.state["statistics"])
        with ExitStack() as stack:
            if frozen:
                stack.enter_context(self.weights_in_place(self._own_pretrained))
                stack.enter_context(self.lora.disabled())
            stats = self.class_stats(client, raw=a.livar_features == "frozen_raw")
        reply = {}
        if a.livar_head in ("var", "var_count", "inv_var"):
            variances = stats.spreads().diagonal(dim1=-2, dim2=-1) if stats.full else stats.spreads()
            reply = {"variance": variances.mean(1).float(), "counts": (stats.counts / a.proto_passes).float()}
        if a.livar_ccvr:
            reply |= self.describe(stats, client)
        if frozen:
            client.state["statistics"] = reply
        return Message(reply)
