"""TAK, task arithmetic with a dataless regulariser made of Kronecker-factored curvature (arXiv 2602.17385).

    min_tau  CE(f_lin(x, tau), y) + lambda sum_{t' != t} lambda_t' sum_layers tau^T (B_t' (x) A_t') tau        (eq. 7)

Adding tau_t moves what f says of images of another task t' by J tau_t, whose mean square there is tau^T G_t' tau; of
G_t' only the factors A and B (models/utils/kfac.py) leave the task, once, before anything is trained. Those of all
other tasks fit in the room of one (eq. 8, the default; ``--fisher_ideal 1`` is eq. 7, for which lambda means something
else: eq. 8 weighs the Kronecker blocks T - 1 times as much).

``--tak_refs all`` is the paper's setting, in which factors of later tasks are exchanged beforehand; ``past`` takes
those of tasks before, as in sequential learning. ``--control_refs 1`` adds the curvature of the control data set, which
the server has; for negation the paper's references are ImageNet's, alone or with the tasks' (it does not say which:
``--tak_refs none`` leaves them out). ``--curvature diag`` is the baseline with the exact diagonal of G.
With ``--regime attention`` or ``full`` the same penalty is put on the network itself, where it is not exact. Under --fl
each client sends the factors of its own images, which add up; second moments of activations do leave the client.

lambda, and the scales of LayerNorms and class token (``--fisher_norm_scaler``) and of CLIP's projection
(``--fisher_ft_proj_scaler``), are those of the authors' code for ViT-B/16, which divides A and B by the number of
tokens (``--kfac_mode official``). Draws are averaged, which that code does not: there lambda grows with them.

Factors lie in files, so that neither memory nor checkpoints hold those of many tasks. With ``--fisher_cache DIR`` other
runs read them from there, and nothing is sent; without, every run asks for its own.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch

from federated.message import Message
from models.task_arithmetic import TaskArithmetic, group_of
from models.utils import kfac
from models.utils.kfac import Curvature, Diagonal, Layout, References, packed, unpacked
from models.utils.task_vectors import control_dataset
from utils.args import add_switch, number
from utils.conf import make_generator
from utils.errors import UserError


class Tak(TaskArithmetic):
    """Task vectors that are kept from moving what the network says of other tasks."""

    NAME = "tak"

    @staticmethod
    def get_parser(parser):
        TaskArithmetic.get_parser(parser)
        add = parser.add_argument
        add("--reg_lambda", type=number(float, 0), default=500.0, help="weight of the penalty")
        add("--curvature", choices=("kfac", "diag"), default="kfac", help="Kronecker factors, or the diagonal alone")
        add(
            "--tak_refs",
            choices=("all", "past", "none"),
            default="all",
            help="whose curvature: every other task's, or that of tasks before",
        )
        add_switch(parser, "--control_refs", help="1: and that of the --control_dataset")
        add_switch(parser, "--fisher_ideal", help="1: one term per task (eq. 7)")
        add("--fisher_norm_scaler", type=number(float, 0), default=10.0, help="scale of LayerNorms and class token")
        add("--fisher_ft_proj_scaler", type=number(float, 0), default=0.1, help="scale of CLIP's projection")
        add("--kfac_mode", choices=kfac.MODES, default="official", help="how an image's tokens are counted")
        add("--kfac_qkv", choices=("fused", "split"), default="fused", help="one B for queries, keys, values, or three")
        add(
            "--kfac_draws",
            "--fisher_num_samples_expectation",
            type=number(int, 0),
            default=1,
            help="cotangents drawn for an image (0: all, exact)",
        )
        add(
            "--kfac_examples",
            "--train_percent",
            type=number(float, 0, open_low=True),
            default=1.0,
            help="images for the factors: a share up to 1, or a number, of each client's",
        )
        add("--kfac_batch", type=number(int, 1), default=32, help="images at a time")
        add("--kfac_cadence", type=number(int, 1), default=1, help="penalty at every so many steps, not scaled up")
        add("--kfac_block", type=number(int, 1), default=1, help="diagonal blocks that are sent of each factor")
        add("--fisher_cache", default=None, metavar="DIR", help="folder of factors that runs share")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        if args.control_refs and not args.control_dataset:
            raise UserError("--control_refs 1 needs a --control_dataset")
        if args.tak_refs == "none" and args.reg_lambda and not args.control_refs:
            raise UserError("--tak_refs none leaves nothing to hold still: give --control_refs 1, or --reg_lambda 0")
        self._own_layout = Layout.of(backbone, self._own_lin.places, args.kfac_qkv) if args.reg_lambda else None
        self._own_seconds = 0.0  # spent on factors in this sitting
        self.exchanged: list[int | str] = []  # tasks whose factors have been made in this run, and 'control'

    def scales(self) -> dict[str, float]:
        """{block or parameter: factor of its part of the penalty}."""
        a, modules = self.args, dict(self.net.named_modules())
        group = {n: group_of(n, modules[n.rpartition(".")[0]]) for n in self._own_lin.places}
        factor = {"proj": a.fisher_ft_proj_scaler, "ln": a.fisher_norm_scaler, "class_embed": a.fisher_norm_scaler}
        by_name = {n: factor.get(g, 1.0) for n, g in group.items()}
        return by_name | {b.name: by_name[f"{b.layers[0]}.weight"] for b in self._own_layout.blocks}

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        super().begin_rounds(clients)
        self.prepare(clients)

    def round(self, clients, r: int) -> None:
        self.prepare(clients)  # where a run is resumed after begin_rounds
        super().round(clients, r)

    def prepare(self, clients) -> None:
        """See to it that the terms of the current task are here."""
        if getattr(self, "_own_terms", (None,))[0] != self.current_task:
            self._own_terms = (self.current_task, self.terms(clients) if self.args.reg_lambda else [])

    def terms(self, clients) -> list[tuple[float, Curvature | Diagonal]]:
        """(lambda_t, means) of the tasks that the current one must not move."""
        t, a = self.current_task, self.args
        tasks = {"all": range(self.n_tasks), "past": range(t), "none": ()}[a.tak_refs]
        sources = [*tasks, *(["control"] if a.control_refs else [])]
        others = [s for s in sources if s != t]
        if not others:
            return []
        if a.fisher_ideal:
            return kfac.each([self.factors(clients, s) for s in others])
        # one sum over all, from which the current task is taken out again
        total, known = getattr(self, "_own_total", (References(), set()))
        for s in sources:
            if s not in known:
                total.add(self.factors(clients, s))
                known.add(s)
        self._own_total = (total, known)
        rest = total.without(self.factors(clients, t)) if t in known else total
        return [(1.0, rest.mean())]

    def factors(self, clients, task: int | str) -> Curvature | Diagonal:
        """The curvature of a task's images, or of the 'control' set's, from its file or from those who own them."""
        began, like = time.perf_counter(), self.zeros()
        file, belongs = self.file(task)
        if file.exists() and (self.args.fisher_cache or task in self.exchanged):
            return kfac.load(file, like, belongs)
        owners = None if task == "control" else clients.of_task(task)
        total = self.of_control() if owners is None else owners.sum("curvature", Message({}))
        found = unpacked(total.tensors(), like, int(total["n"]))
        kfac.save(file, found, belongs)
        self.exchanged.append(task)
        self._own_seconds += time.perf_counter() - began
        return found

    def of_control(self) -> Message:
        """That of the control data set's training images, but for those by which coefficients are chosen."""
        control, rest, _ = control_dataset(self)
        generator = make_generator(self.args.seed, "control")
        rest = rest[torch.randperm(len(rest), generator=generator)[: self.images_of(len(rest)) or None].sort().values]
        batches = control.loader(rest, 0, self.args.kfac_batch, False, device=self.device, split="train")
        found = self.of_images((x for x, _ in batches), generator)
        return Message(packed(found), n=found.n)

    def zeros(self) -> Curvature | Diagonal:
        """Nothing, in float32: what factors are computed in is wider, what is kept of them is not."""
        if self.args.curvature == "diag":
            return Diagonal(self._own_lin.zeros())
        return Curvature.zeros(self._own_layout, self.net, torch.float32)

    def file(self, task: int | str) -> tuple[Path, dict[str, str]]:
        """Where a task's factors are kept, or the 'control' set's, and what they belong to."""
        a = self.args
        what = ("curvature", "kfac_mode", "kfac_qkv", "kfac_draws", "kfac_examples", "kfac_block", "lin_inner_norm")
        whose = ("seed", "alpha_share", "validation", "permute_classes", "fl")
        whose += ("num_clients", "partition_mode", "distribution_alpha", "class_quantity") if a.fl else ()
        if not hasattr(self, "_own_belongs"):  # theta_0 stays; a large network is not hashed for every task
            self._own_belongs = kfac.fingerprint(
                self.net,
                dataset=a.dataset,
                parameters=hashlib.blake2b(" ".join(self._own_lin.places).encode(), digest_size=8).hexdigest(),
                **{k: getattr(a, k, None) for k in (*what, *whose)},
            )
        belongs = {**self._own_belongs, "task": f"control {a.control_dataset}" if task == "control" else str(task)}
        name = hashlib.blake2b(json.dumps(belongs, sort_keys=True).encode(), digest_size=8).hexdigest()
        folder = Path(a.fisher_cache or Path(a.results_path) / "fisher")
        return folder / f"{a.dataset}_task_{task}_{a.curvature}_{name}.safetensors", belongs

    def broadcast(self) -> Message:
        terms = self._own_terms[1]
        tensors = {
            f"term.{i}.{n}": t for i, (_, c) in enumerate(terms) for n, t in packed(c, self.args.kfac_block).items()
        }
        held = dict.fromkeys(tensors, self.current_task)
        plain = super().broadcast()
        tensors["shares"] = torch.tensor([lam for lam, _ in terms], dtype=torch.float32)
        return Message({**plain, **tensors}, keep={**plain.keep, **held})

    def final_metrics(self, dataset, folder) -> dict[str, float]:
        return {**super().final_metrics(dataset, folder), "kfac_seconds": round(self._own_seconds, 3)}

    # ---------------------------------------------------------------- client

    def curvature(self, message: Message, client) -> Message:
        """Sums over the client's images that it trains on, or some of them."""
        client.indices = self.drawn(client, self.images_of(len(self.kept(client)[0])))
        batches = client.stat_loader(batch_size=self.args.kfac_batch)
        found = self.of_images((x for x, _ in batches), client.generator)
        return Message(packed(found), n=found.n)

    def images_of(self, n: int) -> int:
        """How many of n images are used (``--kfac_examples``); 0: all."""
        k = self.args.kfac_examples
        return 0 if k == 1 else max(1, round(k * (n if k < 1 else 1)))

    def of_images(self, batches, generator: torch.Generator) -> Curvature | Diagonal:
        """The curvature of f at theta_0 over batches of images."""
        a, options = self.args, {"draws": self.args.kfac_draws, "generator": generator}
        if a.curvature == "diag":
            return kfac.ggn_diagonal(self.net, self._own_layout, self.function, batches, **options)
        return kfac.curvature(self.net, self._own_layout, self.function, batches, mode=a.kfac_mode, **options)

    def before_local(self, message, client) -> None:
        super().before_local(message, client)
        if getattr(self, "_own_penalty", (None,))[0] != client.task:
            self._own_penalty = (client.task, self.penalty(message))

    def penalty(self, message: Message):
        """What the broadcast asks to hold still; None if nothing."""
        terms = [
            (share, unpacked(message.tensors(f"term.{i}."), self.zeros(), 1, self.args.kfac_block))
            for i, share in enumerate(message["shares"].tolist())
        ]
        if not terms:
            return None
        kind = kfac.DiagonalPenalty if self.args.curvature == "diag" else kfac.Penalty
        return kind(terms, self._own_lin.start(), self.scales())

    def add_penalty(self, turn, step):
        penalty = self._own_penalty[1]
        if penalty is None or step % self.args.kfac_cadence:
            return None
        value, grads = penalty({n: p.detach() for n, p in turn.tau.items()})
        for n, g in grads.items():
            turn.tau[n].grad.add_(g, alpha=self.args.reg_lambda)
        return self.args.reg_lambda * value
