"""L2P, learning to prompt (Wang et al., CVPR 2022, arXiv 2112.08654), central and federated.

A pool of M prompts P_i (L_p tokens each) with keys k_i in front of a frozen transformer. An image x is embedded once
without prompts, and gets the N prompts whose keys are closest to that query (Sec. 4.1 to 4.3):

    q(x)                                                   features of the class token, no prompts, no gradient
    K_x = argmin_{s_1..s_N} sum_i gamma(q(x), k_si)        instance-wise query; gamma: cosine distance
    x_p = [class token; P_s1; ...; P_sN; patches]          input of the first block
    min   CE(head(f(x_p)), y) + lambda sum_{K_x} gamma(q(x), k_si)

f is the mean of the outputs at the prompts. Prompts get the position embedding of the class token, as in the released
code. lambda sum gamma is taken as -lambda sum cos(q, k): the same up to a constant. The softmax is over the current
task's classes; their head rows are trained with prompts and keys, sent, and averaged by the server like any weights.

``--preset fm`` is the federated port of fed-mammoth: no pull term (so keys stay as drawn and are sent once), features
averaged over class token and prompts, and (``--legacy_positions 1``) a position table that is one token late: its rows
are 25 random ones, then the network's, so that the class token gets a random position and the last prompt the class
token's. ``--batchwise_prompt 1``, a default of the released
configuration, lets the samples of a batch vote on the prompts of all of them, also in testing.
"""

from __future__ import annotations

import torch

from backbones.utils.prompts import PrependPrompts, PromptPool
from federated.message import Message
from models.utils.prompt_method import PromptMethod, add_vote_arg
from utils.args import add_switch, number
from utils.conf import make_generator
from utils.errors import UserError


class L2P(PromptMethod):
    """Prompts in front of the sequence, picked from a pool by keys."""

    NAME = "l2p"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    TRAINED, GRAFTED = ("pool",), ("front",)

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--pool_size", type=number(int, 1), default=10, help="prompts in the pool")
        add("--prompt_len", type=number(int, 1), default=5, help="tokens of a prompt")
        add("--top_k", type=number(int, 1), default=5, help="prompts for each image")
        add(
            "--pull_coeff",
            "--pull_constraint_coeff",
            type=number(float, 0),
            default=0.1,
            help="weight of the term that pulls chosen keys to the query; at 0 keys are not trained",
        )
        add(
            "--feature_tokens",
            choices=("prompts", "prefix+prompts", "network"),
            default="prompts",
            help="whose mean output is the feature: prompts (original), with class token (fm), or the network's own",
        )
        add_switch(
            parser,
            "--legacy_positions",
            help="1: positions that are one token late, as in fed-mammoth; 0: prompts have the class token's",
        )
        add_vote_arg(parser)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        if args.top_k > args.pool_size:
            raise UserError(f"--top_k {args.top_k}: the pool has --pool_size {args.pool_size} prompts")
        self.pool = PromptPool(args.pool_size, args.prompt_len, backbone.embed_dim, backbone.classifier.weight)
        self.pool.keys.requires_grad_(args.pull_coeff > 0)
        shifted = None
        if args.legacy_positions:
            draw = make_generator(args.seed, "l2p positions")  # the same on server and workers
            shifted = 0.02 * torch.randn(args.top_k * args.prompt_len, backbone.embed_dim, generator=draw)
        try:
            self.front = PrependPrompts(backbone, 0, positioned=True, pool=args.feature_tokens, shifted=shifted)
        except ValueError as e:
            raise UserError(f"--legacy_positions 1: {e}; use 0 with this --backbone") from None

    def prompted(self, x):
        tokens, cosines, _ = self.pool(self.query(x), self.args.top_k, bool(self.args.batchwise_prompt))
        self.front.set(tokens)
        return self.net(x, returnt="features"), -self.args.pull_coeff * cosines.sum(1)

    # ---------------------------------------------------------------- keys that are not trained travel once

    def broadcast(self) -> Message:
        once = {} if self.pool.keys.requires_grad else {"pool.keys": self.pool.keys}
        return Message({**super().broadcast(), **once}, keep=dict.fromkeys(once, 0))

    def load(self, message: Message) -> None:
        super().load(message)
        if not self.pool.keys.requires_grad:
            self.pool.keys.data = message["pool.keys"]
