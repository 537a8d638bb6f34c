"""HGP, hierarchical generative prototypes (arXiv 2406.02447).

Clients train prompts and the head of a frozen transformer; that moves two biases, to classes seen lately and to those a
client has most of, into the classifier. So the server trains the classifier again after every round, on features drawn
from what clients say of their classes:

    client m, class c    n_mc, mean mu_mc and variance var_mc of its features, after local training
    server, class c      p_c = sum_m w_mc N(mu_mc, g (diag var_mc + 1e-8)),  w_mc = n_mc / sum_j n_jc
    rebalancing          min over the head of CE(z / |z| / tau, c),  z = head(f), f ~ p_c, c uniform over classes so far

Only the abstract is public text: everything here follows the authors' code, of which there are two states.
``hgp-public`` (newest): one prompt of 100 keys and 100 values in each of the first five blocks; all zero at first, so
that its rows stay equal for ever, one token of multiplicity 100; rebalancing at the clients' rate. ``hgp-v1`` (older):
a pool of prompts weighted by the cosine of a query from the network without prompts and learnt keys, rebalancing at
0.01 with a cosine schedule. The default is the newest with prompts that start as a random vector of length one, which
the code meant. g = 3 is the code's, without a reason given.

The body never travels. Of the head only the current task's rows do: the loss sees no others. Released statistics come
from images without normalisation, which is not reproduced; components of clients that are away stay as they were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backbones.utils.prompts import ComponentPool, PrefixPrompts
from models.utils.calibrated import Calibrated, add_calibration_args
from models.utils.prompt_method import PromptMethod
from utils.args import add_switch, number
from utils.errors import UserError


class Hgp(Calibrated, PromptMethod):
    """Prompts, averaged, and a classifier rebalanced by prototypes."""

    NAME = "hgp"
    COMPATIBILITY = ["class-il", "task-il"]
    TRAINED = GRAFTED = ("prompts",)

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--prompt_mode", choices=("single", "pool"), default="single", help="one prompt, or a weighted pool")
        add(
            "--prompt_len", type=number(int, 2), default=None, help="rows, half keys, half values; default: 200, pool 8"
        )
        add(
            "--prompt_layers",
            "--prompt_blocks",
            type=number(int, 0),
            nargs="+",
            default=None,
            help="blocks that get prompts; default: 0 1 2 3 4, those there are",
        )
        add("--prompt_init", choices=("unit", "zeros", "uniform", "normal"), default="unit", help="of a single prompt")
        add("--n_prompts", "--pool_size", type=number(int, 1), default=100, help="components of the pool")
        add_switch(
            parser, "--prompt_pool", help="1: every task uses n_prompts / tasks components more; 0: all use the same"
        )
        add_switch(parser, "--linear_probe", help="train the head alone before a task")
        add("--linear_probe_epochs", type=number(int, 1), default=5)
        add_calibration_args(parser, proto_var_scale=None, rebalance_lr=-1.0)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        length = args.prompt_len = args.prompt_len or (200 if args.prompt_mode == "single" else 8)
        if length % 2:
            raise UserError(f"--prompt_len {length}: half of the rows are keys, half values; give an even number")
        if args.proto_var_scale is None:
            args.proto_var_scale = 3.0 if args.proto_cov == "diag" else 1.0
        super().__init__(backbone, loss, args, transform, dataset)
        layers = self.blocks(backbone, "prompt_layers", args.prompt_layers, range(5))
        self._own_pooled = args.prompt_mode == "pool"
        if self._own_pooled:
            n = args.n_prompts if args.prompt_pool else max(args.n_prompts // self.n_tasks, 1)
            try:
                self.prompts = ComponentPool(backbone, layers, n, length, attention=False)
            except ValueError as e:
                raise UserError(f"--n_prompts {args.n_prompts}: {e}") from None
        else:
            self.prompts = PrefixPrompts(backbone, layers, length // 2, args.prompt_init)

    def begin_task(self, dataset) -> None:
        super().begin_task(dataset)
        if self._own_pooled and self.args.prompt_pool:
            self.prompts.used = (0, -(-self.args.n_prompts * (self.current_task + 1) // self.n_tasks))

    def prompted(self, x):
        if self._own_pooled:
            self.prompts.match(self.query(x))
        return self.net(x, returnt="features"), 0.0

    # ---------------------------------------------------------------- client

    def before_local(self, message, client) -> None:
        super().before_local(message, client)
        if self.args.linear_probe and client.round == 0:
            self.probe(client)

    def probe(self, client) -> None:
        """Some epochs on the head alone, over features of the client's images as they are."""
        training = self.net.training
        self.net.eval()
        with torch.no_grad():
            pairs = [(self.features(x), y - self.n_past_classes) for x, y in client.stat_loader()]
        self.net.train(training)
        z, y = (torch.cat(parts) for parts in zip(*pairs))
        opt = torch.optim.AdamW(self.head.parameters(), lr=self.args.lr, weight_decay=0)
        for _ in range(self.args.linear_probe_epochs):
            order = torch.randperm(len(z), generator=client.generator).to(z.device)
            for i in order.split(self.args.batch_size):
                opt.zero_grad()
                F.cross_entropy(self.head(z[i]), y[i]).backward()
                opt.step()
        opt.zero_grad()
