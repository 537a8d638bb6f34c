"""DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799), central and federated.

Prefix tuning of a frozen transformer (Pre-T: rows p_K and p_V join the keys and values of attention) with two sorts of
prompts: one G-Prompt g for all tasks in the first blocks, and for each task an E-Prompt e_t with a key k_t in the next
(Sec. 4.1 to 4.3):

    training on task t   g in blocks 0, 1; e_t in blocks 2, 3, 4
                         min CE(head(f(x; g, e_t)), y) + lambda gamma(q(x), k_t)           matching loss
    testing              g and e_j, j = argmin_j gamma(q(x), k_j)

gamma is cosine distance, taken as -cos; q(x) are the features of the network without prompts; f is the class token's.
The softmax is over the current task's classes. A task trains and sends g, e_t, k_t and its head rows, and clients never
see other tasks' E-Prompts: only testing needs them. e_t starts from e_(t-1), as in the released code.

In the widely used PyTorch code, and in fed-mammoth, chosen E-Prompts of shape (K/V, batch, ...) are reshaped to (batch,
K/V, ...) without exchanging these axes. So the first half of a batch has key prompts for values as well, the other half
value prompts for keys, and in testing images get prompts of others. Here they get their own; ``--legacy_reshape 1`` is
as published. ``--preset fm`` is fed-mammoth's port: no pull term (keys stay as drawn, so which prompt is chosen in
testing is arbitrary, from the whole pool), E-Prompts of 20 rows that all start at random, and the reshape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.utils import client_batch
from backbones.utils.prompts import PrefixPrompts, PromptKeys, cosines
from models.utils.prompt_method import PromptMethod, add_vote_arg
from utils.args import add_switch, number
from utils.errors import UserError


def legacy_reshape(prompts: Tensor, sizes: list[int] | tuple[int, ...]) -> Tensor:
    """What (K/V x B x ...).reshape(B x K/V x ...) makes of prompts (B x 2 x length x dim), for each run of a batch."""
    return torch.cat([p.transpose(0, 1).reshape(p.shape) for p in prompts.split(list(sizes))])


class DualPrompt(PromptMethod):
    """A prefix for all tasks, and one for each, found again by its key."""

    NAME = "dualprompt"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    TRAINED, GRAFTED = ("general", "expert", "key"), ("general", "expert")

    @staticmethod
    def get_parser(parser):
        add, block = parser.add_argument, number(int, 0)
        add("--g_blocks", type=block, nargs="+", default=None, help="blocks of the G-Prompt; default: 0 1")
        add("--e_blocks", type=block, nargs="+", default=None, help="of the E-Prompts; default: 2 3 4, those there are")
        add("--g_len", type=number(int, 0), default=5, help="rows of the G-Prompt, of keys and of values each")
        add("--e_len", type=number(int, 1), default=5, help="the same of an E-Prompt")
        add("--pool_size", type=number(int, 1), default=None, help="E-Prompts; default: 10, or a task each if more")
        add(
            "--pull_coeff",
            "--pull_constraint_coeff",
            type=number(float, 0),
            default=1.0,
            help="weight of the term that pulls the task's key to queries; at 0 keys are not trained",
        )
        add_switch(parser, "--shared_prompt_pool", default=1, help="1: an E-Prompt starts from that of the task before")
        add(
            "--match",
            choices=("seen", "all"),
            default="seen",
            help="E-Prompts to choose from in testing: of tasks so far, or the whole pool",
        )
        add_switch(parser, "--legacy_reshape", help="1: mix up prompts as published")
        add_vote_arg(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        size = args.pool_size or max(10, self.n_tasks)
        if size < self.n_tasks:
            raise UserError(f"--pool_size {size}: there are {self.n_tasks} tasks, and each has an E-Prompt of its own")
        blocks = {
            "g_blocks": self.blocks(backbone, "g_blocks", args.g_blocks, (0, 1)) if args.g_len else [],
            "e_blocks": self.blocks(backbone, "e_blocks", args.e_blocks, (2, 3, 4)),
        }
        both = set(blocks["g_blocks"]) & set(blocks["e_blocks"])
        if both:
            raise UserError(f"--g_blocks, --e_blocks: block {min(both)} is in both; a block takes one sort of prompt")
        self.general = PrefixPrompts(backbone, blocks["g_blocks"], args.g_len)
        self.expert = PrefixPrompts(backbone, blocks["e_blocks"], args.e_len)  # the current task's
        self.key = PromptKeys(1, backbone.embed_dim, backbone.classifier.weight)
        self.key.keys.requires_grad_(args.pull_coeff > 0)
        # All E-Prompts and keys as last averaged; the server's alone, except for what the current task trains.
        draw = PromptKeys(size, backbone.embed_dim, backbone.classifier.weight)
        self.register_buffer("pool_keys", draw.keys.data)
        for i, p in self.expert.prompts.items():
            self.register_buffer(f"pool_{i}", torch.empty(size, *p.shape, dtype=p.dtype).uniform_(-1, 1).to(p.device))
        self.learnt = 0  # tasks begun

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        """The task's E-Prompt as drawn, or as the task's before; its key as drawn."""
        t = self.current_task
        source = t - 1 if t and self.args.shared_prompt_pool else t
        for i, p in self.expert.prompts.items():
            p.data = self.get_buffer(f"pool_{i}")[source].clone()
        self.key.keys.data = self.pool_keys[t : t + 1].clone()
        self.learnt = t + 1
        self.put_back()

    def aggregate(self, replies) -> None:
        super().aggregate(replies)
        self.put_back()

    def put_back(self) -> None:
        """What the task has trained goes into the pool."""
        t = self.learnt - 1
        self.pool_keys[t] = self.key.keys.data[0]
        for i, p in self.expert.prompts.items():
            self.get_buffer(f"pool_{i}")[t] = p.data

    def choose(self, query: Tensor) -> Tensor:
        """Index (B,) of the E-Prompt of each query."""
        n = len(self.pool_keys) if self.args.match == "all" else max(self.learnt, 1)
        similarity = cosines(query, self.pool_keys[:n])
        return PromptKeys.closest(similarity, 1, [len(query)] if self.args.batchwise_prompt else None)[:, 0]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.choose(self.query(x))
        try:
            for i in self.expert.blocks:
                self.give(i, self.get_buffer(f"pool_{i}")[chosen], [len(x)])
            return self.net.logits(self.net(x, returnt="features"))
        finally:
            self.expert.clear()

    # ---------------------------------------------------------------- client

    def give(self, block: int, prompts: Tensor, sizes) -> None:
        """Let the samples use ``prompts`` (B x 2 x length x dim) in a block."""
        if self.args.legacy_reshape:
            prompts = legacy_reshape(prompts, sizes)
        self.expert.set(block, *prompts.unbind(1))

    def prompted(self, x):
        if self.args.legacy_reshape:
            for i in self.expert.blocks:
                p = self.expert.prompts[str(i)]
                p = p[None] if p.dim() == 3 else p  # a leading dimension of clients
                self.give(i, client_batch.per_sample(p, len(x)), client_batch.sizes_of(len(x), len(p)))
        features = self.net(x, returnt="features")
        if not self.args.pull_coeff:
            return features, 0.0
        return features, -self.args.pull_coeff * self.key.cosines(self.query(x))[:, 0]
