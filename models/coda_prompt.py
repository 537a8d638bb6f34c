"""CODA-Prompt (Smith et al., CVPR 2023, arXiv 2211.13218), central and federated.

Prefix tuning of the first five blocks of a frozen transformer, with a prompt that is a weighted sum of M components p_m
(L_p x d) with keys k_m and attention vectors a_m, in each block (Sec. 4.1 to 4.4):

    p = sum_m alpha_m p_m                                         prompt formation
    alpha_m = gamma(q(x) * a_m, k_m)                              gamma: cosine similarity, *: entry by entry
    L_ortho(B) = |B B^T - I|_2                                    expansion and orthogonality
    min   CE(head(f(x; p)), y) + mu (L_ortho(P) + L_ortho(K) + L_ortho(A))

q(x) are the features of the network without prompts; the first half of p's rows are keys, the others values. Task t
trains M/T new components; those of earlier tasks stay in the sum but are frozen, and later ones do not exist yet. New
p_m, k_m and a_m start orthonormal to each other and to all earlier ones (Gram-Schmidt, released code), which made the
penalty superfluous: its weight ``--mu`` is 0 there, and here. It is the mean of the squared entries of B B^T - I.
``--lr_scheduler cosine`` is the released code's: lr cos(99 pi e / (200 (E - 1))) in epoch e of E.

Federated, the server draws new components, clients train them and the task's head rows, and the server averages. Frozen
components are no parameters, so weight decay cannot move them, and travel to each client once. fed-mammoth's port
computes the same, with settings of its own (``--model_config fm``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backbones.utils.prompts import ComponentPool
from federated.message import Message
from models.utils.prompt_method import PromptMethod
from utils.args import number
from utils.errors import UserError


class CodaPrompt(PromptMethod):
    """A prefix composed of components, some of them for each task."""

    NAME = "coda_prompt"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    TRAINED, GRAFTED = ("pool",), ("pool",)

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--pool_size", type=number(int, 1), default=100, help="components, divided among the tasks")
        add("--prompt_len", type=number(int, 2), default=8, help="rows of a prompt, half keys and half values")
        add(
            "--prompt_blocks",
            type=number(int, 0),
            nargs="+",
            default=None,
            help="blocks that get prompts; default: 0 1 2 3 4, those there are",
        )
        add("--mu", type=number(float, 0), default=0.0, help="weight of the orthogonality penalty")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self.per_task = args.pool_size // self.n_tasks
        if not self.per_task:
            raise UserError(f"--pool_size {args.pool_size}: there are {self.n_tasks} tasks; give a component to each")
        if args.prompt_len % 2:
            raise UserError(
                f"--prompt_len {args.prompt_len}: half of the rows are keys, half values; give an even number"
            )
        if self.per_task * self.n_tasks > backbone.embed_dim:
            raise UserError(
                f"--pool_size {args.pool_size}: no more than {backbone.embed_dim} components, the network's width, "
                "can be orthogonal"
            )
        blocks = self.blocks(backbone, "prompt_blocks", args.prompt_blocks, range(5))
        self.pool = ComponentPool(backbone, blocks, 0, args.prompt_len)

    def begin_task(self, dataset) -> None:
        """Room for the task's components; what they are comes from the server."""
        super().begin_task(dataset)
        self.pool.extend(self.per_task, init="zeros")
        self._own_loaded = False

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        """Draw the task's components orthonormal to all before."""
        self.pool.draw(self.per_task)

    def finished(self) -> dict[str, Tensor]:
        """The frozen components as they travel: {past<task>.<kind>.<block>: its rows}."""
        return {
            f"past{t}.{kind}.{i}": self.pool.frozen(kind, i)[t * self.per_task : (t + 1) * self.per_task]
            for t in range(self.pool.n_frozen // self.per_task)
            for kind in self.pool.kinds()
            for i in self.pool.blocks
        }

    def broadcast(self) -> Message:
        once = self.finished()
        return Message({**super().broadcast(), **once}, keep=dict.fromkeys(once, 0))

    # ---------------------------------------------------------------- client

    def load(self, message: Message) -> None:
        super().load(message)
        if self._own_loaded:  # they are the same throughout a task
            return
        for kind in self.pool.kinds():
            for i in self.pool.blocks:
                parts = [message[f"past{t}.{kind}.{i}"] for t in range(self.pool.n_frozen // self.per_task)]
                if parts:
                    setattr(self.pool, f"frozen_{kind}_{i}", torch.cat(parts))
        self._own_loaded = True

    def prompted(self, x):
        self.pool.match(self.query(x))
        return self.net(x, returnt="features"), 0.0

    def local_penalty(self, trained: dict[str, Tensor], client) -> Tensor | None:
        if not self.args.mu:
            return None
        penalty = 0.0
        for kind in self.pool.kinds():
            for i in self.pool.blocks:
                rows = torch.cat([self.pool.frozen(kind, i), trained[f"pool.{kind}.{i}"]]).flatten(1)
                penalty = penalty + (rows @ rows.T - torch.eye(len(rows)).to(rows)).square().mean()
        return self.args.mu * penalty

    def get_scheduler(self, opt):
        if opt is None or self.args.lr_scheduler != "cosine":
            return super().get_scheduler(opt)
        last = max(self.args.n_epochs - 1, 1)
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda e: max(math.cos(99 * math.pi * e / (200 * last)), 0.0))
