"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): the down-projection A is drawn once and frozen, only B is trained.

With one A for all clients the mean of the factors is the mean of the updates: mean_c(B_c) A = mean_c(B_c A). A travels
once, B every round.
"""

from __future__ import annotations

from torch import Tensor

from backbones.utils.lora import LoRA
from federated.message import Message
from models.fedavg import FedAvg, add_lora_args


class FfaLora(FedAvg):
    """FedAvg over B and the head, with a frozen A that all clients share."""

    NAME = "ffa_lora"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]

    @staticmethod
    def get_parser(parser):
        add_lora_args(parser, 4, "attn.qkv:q,k,v")
        return parser

    def make_lora(self, backbone, args, **options) -> LoRA:
        lora = super().make_lora(backbone, args, **options)
        for _, _, A, _ in lora:
            A.requires_grad_(False)
        return lora

    def down_projections(self) -> dict[str, Tensor]:
        """The frozen factors as they travel, by a name that changes whenever they do."""
        return {f"down.{layer}.{slices}": A for layer, slices, A, _ in self.lora}

    def broadcast(self) -> Message:
        down = self.down_projections()
        return Message({**self.trainable(), **down}, keep=dict.fromkeys(down, 0))

    def load(self, message: Message) -> None:
        super().load(message)
        for name, A in self.down_projections().items():
            if name in message:  # before the first design there is none
                A.data = message[name]
