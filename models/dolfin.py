"""DOLFIN, distributed online LoRA for federated incremental learning (arXiv 2510.13567).

For each task every block gets a LoRA pair on its key and value projections, dW = B A. The down-projection
A (r x d) is not trained: its rows are the principal directions of the new task's inputs inside the complement of the
space M that old tasks use, so old inputs pass it with an output near zero, whatever B learns. Clients train B (from 0)
and the head rows of the task; with A shared, the server's mean of B is the mean of the updates exactly. After the task
B A is added to the weights and M grows (DualGPM, models/utils/gpm.py).

    A    = top-r left singular vectors of (I - M M^T) H, scaled by 1/sqrt(3)      H: inputs of the layer, d x n
    K, V = (W_K + B_K A) x, (W_V + B_V A) x                                       trained: B_K, B_V
    W   <- W + B A,   M <- DualGPM(M, H H^T, eps_t),   eps_t = lamb + (lame - lamb) t / T

The paper writes the product as A B with A frozen; A must be the factor that meets the input first, as in InfLoRA's
code (arXiv 2404.00228), since the complement of the *inputs* protects nothing on the output side.

What the paper's abstract leaves open is an option here, and the defaults are reconstructions: the server learns the
moments of the inputs from sums over clients (``--dolfin_basis cov``, exact and independent of the split of the data),
a top-q sketch (``topk``), client-side designs that it averages and orthonormalises (``local``), or not at all
(``random``); ``none`` designs A without the projection, LoRA without DualGPM. Energy, schedule, rank and scale default
to InfLoRA's. With one client and one round per task the run is InfLoRA's; that is what happens without ``--fl``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.utils.lora import LoRA
from backbones.utils.moments import InputMoments
from federated.message import Message
from models.fedavg import add_lora_args
from models.ffa_lora import FfaLora
from models.utils.gpm import DualGPM, pack_triu, threshold, top_eigenpairs, unpack_triu
from utils.args import number
from utils.errors import RunError, UserError


class Dolfin(FfaLora):
    """LoRA on keys and values, designed by DualGPM, trained by clients, folded after each task."""

    NAME = "dolfin"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    FEDERATED_ONLY = False

    @staticmethod
    def get_parser(parser):
        add_lora_args(parser, 10, "attn.qkv:k,v")
        share = number(float, 0, 1, open_low=True)
        parser.add_argument(
            "--dolfin_basis",
            choices=("cov", "topk", "local", "random", "none"),
            default="cov",
            help="where A comes from: summed second moments, their top eigenpairs, designs of the clients, "
            "random directions outside the memory, or moments without the memory (ablation)",
        )
        parser.add_argument(
            "--gpm_energy",
            choices=("official", "paper"),
            default="official",
            help="what a direction counts for: sigma^4 as in InfLoRA's code, or sigma^2 as in GPM's text",
        )
        parser.add_argument("--gpm_lamb", type=share, default=0.95, help="energy to keep after the first task")
        parser.add_argument("--gpm_lame", type=share, default=1.0, help="the energy the schedule moves towards")
        parser.add_argument("--gpm_sketch", type=number(int, 1), default=64, help="eigenpairs a client sends (topk)")
        parser.add_argument(
            "--gpm_aug",
            choices=("train", "test"),
            default="train",
            help="images of the statistics: augmented as in training, or as they are",
        )
        parser.add_argument(
            "--gpm_min_samples",
            type=number(int, 0),
            default=0,
            help="clients with fewer samples send no statistics, which would nearly show their images",
        )
        parser.add_argument(
            "--gpm_noise",
            type=number(float, 0),
            default=0.0,
            help="Gaussian noise on the moments sent, as a multiple of their mean diagonal",
        )
        parser.add_argument(
            "--lora_a_scale", type=number(float, 0, open_low=True), default=3**-0.5, help="norm of the rows of A"
        )
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        if args.gpm_lame < args.gpm_lamb:
            raise UserError(
                f"--gpm_lame {args.gpm_lame:g} is below --gpm_lamb {args.gpm_lamb:g}: the energy kept must not fall"
            )
        self.memory = {
            name: DualGPM(self.lora.linear(name).in_features, args.gpm_energy) for name in self.lora.layer_names
        }
        self.folds: list[dict[str, Tensor]] = []  # the pairs of finished tasks, by the name they travel under
        self.adapter = -1  # the task whose A is in place

    def make_lora(self, backbone, args) -> LoRA:
        return super().make_lora(backbone, args, share_A=True, init="zeros")

    # ---------------------------------------------------------------- server: one task, top to bottom

    def begin_rounds(self, clients) -> None:
        """Design A in the complement of the memory; B starts at zero."""
        self.design_down_projections(clients)
        self.adapter = self.current_task

    def end_rounds(self, clients) -> None:
        """Fold the task's pair into the weights, then let the memory grow by what the final model's inputs span."""
        down = {name: A.detach() for name, A in self.down_projections().items()}  # the parameter gets a new A next task
        self.folds.append({**down, **{f"up{self.adapter}.{n}.{s}": B.data.clone() for n, s, _, B in self.lora}})
        self.lora.fold_into()
        if self.args.dolfin_basis != "none":
            eps = threshold(self.current_task, self.n_tasks, self.args.gpm_lamb, self.args.gpm_lame)
            for name, C in self.moments(clients).items():
                self.memory[name].update(C, eps)

    def design_down_projections(self, clients) -> None:
        """One A per layer, by ``--dolfin_basis``."""
        basis, r, scale = self.args.dolfin_basis, self.args.lora_r, self.args.lora_a_scale
        generator = torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        if basis == "random":
            A = {name: memory.random(r, generator, scale) for name, memory in self.memory.items()}
        elif basis == "local":
            A = self.average_designs(clients)
        else:
            A = {
                name: (DualGPM(C.shape[0], self.args.gpm_energy) if basis == "none" else self.memory[name]).design(
                    C, r, scale
                )
                for name, C in self.moments(clients).items()
            }
        if basis != "none":
            for name, a in A.items():  # the guard against a constraint on the wrong side
                leak = (a.double() - self.memory[name].project(a.double())).abs().max()
                if leak > 1e-6 * scale:
                    raise RunError(f"the down-projection of {name} leaks {leak:.1e} into the memory of old tasks")
        self.lora.reset({name: a.float() for name, a in A.items()}, B="zeros")

    def moments(self, clients) -> dict[str, Tensor]:
        """Second moments E[x x^T] of every layer's inputs over all clients' tokens, d x d."""
        if self.args.dolfin_basis == "topk":
            total: dict[str, Tensor] = {}
            n = 0
            for reply in clients.call("input_statistics", self.broadcast()):
                for name, W in reply.tensors("moments.").items():
                    total[name] = total.get(name, 0) + W.double() @ W.double().T
                n += reply.get("tokens", 0)
        else:
            reply = clients.sum("input_statistics", self.broadcast())
            total = {name: unpack_triu(S.double()) for name, S in reply.tensors("moments.").items()}
            n = reply.get("tokens", 0)
        if not total:
            raise self._nobody()
        return {name: S / n for name, S in total.items()}

    def _nobody(self) -> RunError:
        return RunError(
            f"no client has --gpm_min_samples {self.args.gpm_min_samples} samples of task {self.current_task}: "
            "lower it or use --dolfin_basis random"
        )

    def average_designs(self, clients) -> dict[str, Tensor]:
        """Weighted mean of the clients' A, orthonormalised once within the free space, before any training."""
        memory = {f"memory.{n}.{k}": v for n, m in self.memory.items() for k, v in m.state_dict().items()}
        known = self.broadcast()
        replies = clients.call("design", Message({**known, **memory}, keep=known.keep))
        replies = [r for r in replies if len(r)]
        if not replies:
            raise self._nobody()
        weights = self.client_weights(replies)
        mean = {n: sum(w * r[f"A.{n}"].double() for w, r in zip(weights, replies, strict=True)) for n in self.memory}
        return {n: self.memory[n].orthonormal(a, self.args.lora_a_scale) for n, a in mean.items()}

    def down_projections(self) -> dict[str, Tensor]:
        return {f"down{self.adapter}.{layer}.{slices}": A for layer, slices, A, _ in self.lora}

    def broadcast(self) -> Message:
        """B and head rows; A and the pairs of finished tasks travel to each client once."""
        once = {k: v for fold in self.folds for k, v in fold.items()}
        if self.adapter == len(self.folds):
            once |= self.down_projections()
        return Message(
            {**self.trainable(), **once}, keep=dict.fromkeys(once, 0), adapter=self.adapter, folded=len(self.folds)
        )

    def adapter_over_pretrained(self) -> LoRA:
        """All finished tasks side by side in one pair of rank r * tasks: sum_t B_t A_t."""
        r = self.args.lora_r * max(len(self.folds), 1)
        whole = LoRA(self.net, self.args.lora_targets, r, share_A=True, init="zeros")
        whole.remove()
        for name, slices, A, B in whole if self.folds else ():
            A.data = torch.cat([fold[f"down{t}.{name}.{slices}"] for t, fold in enumerate(self.folds)])
            B.data = torch.cat([fold[f"up{t}.{name}.{slices}"] for t, fold in enumerate(self.folds)], 1)
        return whole

    # ---------------------------------------------------------------- client

    def load(self, message: Message) -> None:
        """Fold what finished tasks learned, then put A, B and head rows in place."""
        for task in range(len(self.folds), message["folded"]):
            self.folds.append({})
            for name, slices, A, B in self.lora:
                A.data, B.data = message[f"down{task}.{name}.{slices}"], message[f"up{task}.{name}.{slices}"].clone()
            self.lora.fold_into()
        self.adapter = message["adapter"]
        super().load(message)

    def input_statistics(self, message: Message, client) -> Message:
        """Sums of x x^T over this client's tokens at every adapted layer, with the number of tokens."""
        C = self.local_moments(message, client)
        if C is None:
            return Message()
        if self.args.dolfin_basis == "topk":
            packed = {f"moments.{n}": top_eigenpairs(S, self.args.gpm_sketch) for n, S in C.sums.items()}
        else:
            packed = {f"moments.{n}": pack_triu(S) for n, S in C.sums.items()}
        return Message(packed, tokens=next(iter(C.counts.values())))

    def design(self, message: Message, client) -> Message:
        """A from this client's data alone, in the free space of the memory it received (``local``)."""
        C = self.local_moments(message, client)
        if C is None:
            return Message()
        A = {}
        for name, memory in self.memory.items():
            memory.load_state_dict(message.tensors(f"memory.{name}."))
            A[f"A.{name}"] = memory.design(C.sums[name], self.args.lora_r, self.args.lora_a_scale).float()
        return Message(A, n_samples=client.n_samples)

    @torch.no_grad()
    def local_moments(self, message: Message, client) -> InputMoments | None:
        """The client's input moments under the merged model, or None if it has too few samples to show them."""
        self.load(message)
        if client.n_samples < self.args.gpm_min_samples:
            return None
        self.net.eval()
        moments = InputMoments(self.net, self.lora.layer_names)
        with moments, self.lora.disabled():
            for inputs, _ in client.stat_loader(augment=self.args.gpm_aug == "train"):
                self.net(inputs, returnt="features")
        if self.args.gpm_noise:
            for name, S in moments.sums.items():
                noise = torch.randn(S.shape, generator=client.generator).to(S)
                moments.sums[name] = S + (noise + noise.T) / 2**0.5 * self.args.gpm_noise * S.diagonal().mean()
        return moments
