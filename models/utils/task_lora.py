"""LoRA that every task trains anew on the pretrained weights; the server tests with the tasks' updates merged.

What LoRM and LIVAR share (fed-mammoth's ``cl_merge=individual_mean``). The forward pass of training is W0 + B A of the
current task alone. The server never trains: its network holds merged weights, in which A and B are not grafted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from backbones.utils.lora import LoRA
from models.fedavg import FedAvg, add_lora_args
from models.utils.merging import wide

VIT_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


class TaskLoRA(FedAvg):
    """One pair (A, B) per layer and task: A drawn by the server, B zero, shared by all clients at the start."""

    @staticmethod
    def get_parser(parser):
        add_lora_args(parser, 16, *VIT_TARGETS)
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset)
        self._own_pretrained = {name: self.lora.linear(name).weight.data for name in self.lora.layer_names}
        names = {id(p): f"lora.{n}" for n, p in self.lora.named_parameters()}
        self._own_names = {layer: {"A": names[id(A)], "B": names[id(B)]} for layer, _, A, B in self.lora}
        self.lora.disable()  # until this instance turns out to be a worker

    def make_lora(self, backbone, args, **options) -> LoRA:
        return super().make_lora(backbone, args, share_A=True, **options)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (A (r x d), B (rows x r))} as they are."""
        return {layer: (A, B) for layer, _, A, B in self.lora}

    # ---------------------------------------------------------------- server

    def begin_rounds(self, clients) -> None:
        if self.current_task:  # the first pair is the one that was built
            self.lora.reset(A="kaiming", B="zeros")

    def product(self, As: list[Tensor], Bs: list[Tensor], weights: list[float] | Tensor | None = None) -> Tensor:
        """sum_i w_i B_i A_i (rows x d) in one product of the stacked factors, in float64."""
        dtype = wide(As[0])
        weights = [1.0] * len(As) if weights is None else weights
        B = torch.cat([w * B.detach().to(dtype) for w, B in zip(weights, Bs, strict=True)], 1)
        return B @ torch.cat([A.detach().to(dtype) for A in As])

    def show(self, deltas: dict[str, Tensor]) -> None:
        """Test with W0 + delta (``over_pretrained``)."""
        self.put_weights(self.over_pretrained(deltas))

    # ---------------------------------------------------------------- weights of the adapted layers

    @torch.no_grad()
    def over_pretrained(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        """W0 + delta by layer: the rows that its adapter covers get ``deltas[layer]`` (rows x d)."""
        weights = {}
        for layer, _, branch in self.lora.branches():
            W = self._own_pretrained[layer]
            total = W.to(wide(W), copy=True)
            for rows, part in branch.split(deltas[layer], -2):
                total[rows] += part
            weights[layer] = total.to(W.dtype)
        return weights

    def put_weights(self, weights: dict[str, Tensor]) -> None:
        """Give the adapted layers these weights, as new tensors of theirs."""
        for layer, W in weights.items():
            self.lora.linear(layer).weight.data = W

    @contextmanager
    def weights_in_place(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Within the block, the adapted layers have these weights."""
        mine = {layer: self.lora.linear(layer).weight.data for layer in weights}
        self.put_weights(weights)
        try:
            yield
        finally:
            self.put_weights(mine)
