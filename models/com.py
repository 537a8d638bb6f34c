"""Chain of Merges (arXiv 2508.21421) and its kin: experts merged layer by layer, by least squares over what layers see.

    W = argmin_W sum_i lambda_i |X_i (W - W_i)^T|^2 = (sum_i lambda_i W_i G_i) (sum_i lambda_i G_i)^-1,  G_i = X_i^T X_i

W_i: a linear layer of the expert theta_0 + tau_i. X_i: what the layer is given when images of task i are shown to

    model     the expert: RegMean (Jin et al. 2023, arXiv 2212.09849)
    block     the network whose earlier blocks are merged and whose block is the expert's: RegMean++ (arXiv 2508.03121)
    linear    the network whose earlier linear layers are merged: Chain of Merges

(``--com_granularity``). So statistics follow what has been merged already; the layers are solved one after another.
Everything that is no weight of a linear layer is averaged first.

This is a RECONSTRUCTION: of Chain of Merges only the abstract and what reviewers say of it is public. Certain is that
layers are merged in turn, by RegMean's closed form, on what the merged network makes of the images. Open are: how tasks
are weighted (``--com_task_weight``: lambda_i by the mean size of the cosines between a task's inputs, or its inverse;
``none`` until more is known), whether the target is the expert's weight (``merged_input``) or the expert's output
(``expert_output``, which solves (sum W_i X_i^T X^_i) (sum X^_i^T X^_i)^-1), and the number of images (100 of each task,
off-diagonal scaling 1: the settings that a third party's configuration has; RegMean's there are 0.5).

Under --fl the same happens once, after a task's rounds, between clients that send Gram matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from backbones.utils.moments import exact_float32
from federated.message import Message
from models.task_arithmetic import TaskArithmetic, merger_parser
from models.utils.gpm import pack_triu, unpack_triu
from models.utils.kfac import Block
from models.utils.merging import regression_merge, scale_off_diagonal, solve_gram, wide
from utils.args import add_switch, number
from utils.errors import UserError
from utils.evaluate import evaluating


class _Stop(Exception):
    """Enough has been seen of a forward pass."""


class Com(TaskArithmetic):
    """Experts of tasks merged by least squares."""

    NAME = "com"
    NEEDS_WEIGHTS = "what layers see is of networks whose weights are merged"

    @staticmethod
    def get_parser(parser):
        merger_parser(parser, 100)
        add = parser.add_argument
        add(
            "--com_granularity",
            choices=("linear", "block", "model"),
            default="linear",
            help="how far the network is merged when statistics are taken: CoM, RegMean++, RegMean",
        )
        add(
            "--com_target",
            choices=("merged_input", "expert_output"),
            default="merged_input",
            help="what a layer shall reproduce: the expert's weight on what it is given now, or the expert's outputs",
        )
        add("--com_task_weight", choices=("none", "offdiag", "inv_offdiag"), default="none", help="lambda_i")
        add("--com_alpha", type=number(float, 0, 1), default=1.0, help="off-diagonal scaling of Gram matrices")
        add("--merge_bias", choices=("mean", "joint"), default="mean", help="joint: biases by the same regression")
        add_switch(parser, "--skip_identical", default=1, help="1: layers that no expert has changed stay")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if args.com_target == "expert_output" and args.com_granularity != "linear":
            raise UserError("--com_target expert_output needs --com_granularity linear")
        super().__init__(backbone, loss, args, transform, dataset)

    # ---------------------------------------------------------------- the network

    def groups(self) -> list[list[str]]:
        """Linear layers whose weights are trained, in the order in which they are used; those of one input together."""
        names = [n.removesuffix(".weight") for n in self._own_lin.places if n.endswith(".weight")]
        names = [n for n in names if isinstance(self.net.get_submodule(n), nn.Linear)]
        seen: list[tuple[Tensor, list[str]]] = []

        def hook(name):
            def pre(module, args):
                for x, group in seen:
                    if x is args[0]:
                        return group.append(name)
                seen.append((args[0], [name]))

            return pre

        handles = [self.net.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
        try:
            with evaluating(self.net), torch.no_grad():
                like, d = next(self.net.parameters()), self.dataset
                self.net(like.new_zeros(1, d.CHANNELS, *d.SIZE), returnt="features")
        finally:
            for handle in handles:
                handle.remove()
        return [group for _, group in seen]

    @staticmethod
    def block_of(layer: str) -> str:
        """The block that a layer is in: its name up to the first number, included; of no block: its own name."""
        parts = layer.split(".")
        numbers = [i for i, p in enumerate(parts) if p.isdigit()]
        return ".".join(parts[: numbers[0] + 1]) if numbers else layer

    def inputs_of(self, layer: str, theta: dict[str, Tensor], x: Tensor) -> Tensor:
        """What a layer is given (tokens, d), with weights ``theta``; nothing after it is computed."""
        found = []

        def pre(module, args):
            found.append(args[0].detach().flatten(0, -2))
            raise _Stop

        handle = self.net.get_submodule(layer).register_forward_pre_hook(pre)
        try:
            with evaluating(self.net), torch.no_grad():
                self._own_lin.at(theta, x)
        except _Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    # ---------------------------------------------------------------- server

    def prepare_merge(self, clients) -> None:
        start, n = self._own_lin.start(), len(self.taus)
        experts = [{k: start[k] + t for k, t in tau.items()} for tau in self.taus]
        merged = {k: sum(e[k] for e in experts) / n for k in start}
        for batch in self.steps():
            moved = [any(not torch.equal(e[f"{m}.weight"], start[f"{m}.weight"]) for e in experts) for m in batch[0]]
            if self.args.skip_identical and not any(moved):
                continue
            replies = [self.statistics(clients, i, batch, merged, experts[i]) for i in range(n)]
            for k, group in enumerate(batch):
                merged |= self.solve(group, experts, [r[k] for r in replies])
        self.solved = {k: merged[k] - start[k] for k in start}

    def steps(self) -> Iterator[list[list[str]]]:
        """Groups of layers whose statistics are taken together, one after another (``--com_granularity``)."""
        groups = self.groups()
        if self.args.com_granularity == "linear":
            yield from ([g] for g in groups)
        elif self.args.com_granularity == "model":
            yield groups
        else:
            blocks: dict[str, list[list[str]]] = {}
            for g in groups:
                blocks.setdefault(self.block_of(g[0]), []).append(g)
            yield from blocks.values()

    def statistics(self, clients, task: int, batch, merged, expert) -> list[dict]:
        """Means over a task's tokens, for each group: 'gram' (d, d), 'cross' (d, d) if asked for, and 'weight'."""
        layers = {m for group in batch for m in group}
        if self.args.com_granularity == "model":
            theta = expert
        elif self.args.com_granularity == "block":  # the block that is being merged is the expert's, norms included
            inside = {self.block_of(m) for m in layers}
            theta = {
                k: expert[k] if self.block_of(k) in inside or k.rpartition(".")[0] in layers else merged[k]
                for k in merged
            }
        else:
            theta = merged
        tensors = {f"theta.{k}": t for k, t in theta.items()}
        if self.args.com_target == "expert_output":
            tensors |= {f"expert.{k}": t for k, t in expert.items()}
        message = Message(tensors, layers=" ".join(group[0] for group in batch))
        total = clients.of_task(task).sum("grams", message)
        out = []
        for k in range(len(batch)):
            tokens = total[f"tokens.{k}"]
            part = {"gram": unpack_triu(total[f"gram.{k}"]).to(self.device) / tokens, "weight": 1.0}
            if self.args.com_target == "expert_output":
                part["cross"] = total[f"cross.{k}"].to(self.device) / tokens
            if self.args.com_task_weight != "none":
                part["weight"] = float(total[f"cosines.{k}"] / max(float(total[f"pairs.{k}"]), 1.0))
            out.append(part)
        return out

    def solve(self, group: list[str], experts, parts: list[dict]) -> dict[str, Tensor]:
        """{parameter: merged} of layers with one input."""
        joint = self.args.merge_bias == "joint" and f"{group[0]}.bias" in experts[0]
        weights = [p["weight"] for p in parts]
        if self.args.com_task_weight == "inv_offdiag":
            weights = [1 / max(w, 1e-6) for w in weights]
        lam = [w * len(weights) / sum(weights) for w in weights]
        size = parts[0]["gram"].shape[-1] - (0 if joint else 1)  # the last input is the constant 1
        grams = [p["gram"][:size, :size] for p in parts]
        out = {}
        for m in group:
            block = Block((m,), joint)
            W = [block.join(e)[0] for e in experts]
            if "cross" in parts[0]:
                best = expert_outputs(W, grams, [p["cross"][:size, :size] for p in parts], self.args.com_alpha, lam)
            else:
                best = regression_merge(W, grams, alpha=self.args.com_alpha, coefficients=lam)
            out |= block.split(best[None], experts[0])
        return out

    # ---------------------------------------------------------------- client

    def grams(self, message: Message, client) -> Message:
        """Sums over tokens of what layers are given, a 1 appended, for images of the client without augmentation."""
        theta = {k: t.to(self.device) for k, t in message.tensors("theta.").items()}
        expert = {k: t.to(self.device) for k, t in message.tensors("expert.").items()}
        client.indices, out = self.drawn(client, self.args.calib_examples), {}
        images = [x for x, _ in client.stat_loader()]
        with exact_float32():
            for k, layer in enumerate(message["layers"].split()):
                seen = [with_one(self.inputs_of(layer, theta, x)) for x in images]
                out[f"tokens.{k}"] = sum(len(s) for s in seen)
                out[f"gram.{k}"] = pack_triu(sum(s.T @ s for s in seen))
                if expert:
                    theirs = [with_one(self.inputs_of(layer, expert, x)) for x in images]
                    out[f"cross.{k}"] = sum(a.T @ b for a, b in zip(theirs, seen))
                if self.args.com_task_weight != "none":
                    rows = nn.functional.normalize(torch.cat(seen)[:, :-1], dim=1)
                    # in pieces: the table of all pairs may be large
                    out[f"cosines.{k}"] = float(sum((r @ rows.T).abs().sum() for r in rows.split(1024)) - len(rows))
                    out[f"pairs.{k}"] = len(rows) * (len(rows) - 1)
        return Message(out)


def with_one(x: Tensor) -> Tensor:
    """A 1 appended to each row of x, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat((x, torch.ones_like(x[:, :1])), 1)


def expert_outputs(Ws, grams, crosses, alpha: float, lam) -> Tensor:
    """argmin_W sum_i lambda_i |X^_i W^T - X_i W_i^T|^2 from X^^T X^ and X^T X^, around the mean of the W_i."""
    dtype = wide(Ws[0])
    mean = sum(W.to(dtype) for W in Ws) / len(Ws)
    G = [c * scale_off_diagonal(g.to(dtype), alpha) for c, g in zip(lam, grams)]
    C = [c * scale_off_diagonal(x.to(dtype), alpha) for c, x in zip(lam, crosses)]
    numerator = sum(W.to(dtype) @ c - mean @ g for W, c, g in zip(Ws, C, G))
    return (mean + solve_gram(sum(G), numerator)).to(Ws[0].dtype)
