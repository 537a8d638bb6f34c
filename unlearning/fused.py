"""FUSED: small adapters in the layers that a client has changed most, trained by the others over the model as it is
(Zhong et al. 2025, "Unlearning through knowledge overwriting: reversible federated unlearning via selective sparse
adapter").

    critical layers   the largest mean of |D_u| / |theta|, D_u: the client's last update, over linear layers
    unlearning        the model is frozen; LoRA in those layers is trained and averaged by the clients that stay

Knowledge is written over, not taken out: without the adapters the model is what it was. The paper calls its
adapters sparse; in its code, as here, they are of low rank. For methods that train a whole network.
"""

from __future__ import annotations

import torch
from torch import nn

from backbones.utils.lora import LoRA
from federated.message import Message
from models.utils.unlearner import Unlearner
from utils.args import number
from utils.errors import UserError


class Fused(Unlearner):
    NAME = "fused"
    ON_TASK_VECTORS = False

    @staticmethod
    def get_parser(parser):
        add = parser.add_argument
        add("--fused_rank", type=number(int, 1), default=16, help="rank of the adapters")
        add("--fused_layers", type=number(int, 1), default=4, help="layers that get one")
        add("--fused_rounds", type=number(int, 0), default=None, help="rounds; default: --num_comm_rounds")
        return parser

    def unlearn(self, clients, who: list[int]) -> None:
        if not all(p.requires_grad for p in self.net.parameters()) or getattr(self, "head", None) is not None:
            raise UserError("--unlearn fused: for methods that train the whole network (--tuning full)")
        self.graft(" ".join(self.critical_layers(who)))
        rounds = self.args.fused_rounds
        self.more_rounds(self.rest(clients, who), self.args.num_comm_rounds if rounds is None else rounds, "fused")

    def critical_layers(self, who: list[int]) -> list[str]:
        """Names of linear layers, the one that the clients have changed most first."""
        change: dict[str, float] = {}
        for u in who:
            kept = [k for _, k in sorted(self.history.items()) if u in k["updates"]]
            for name, d in kept[-1]["updates"][u].items() if kept else ():
                layer, _, key = name.rpartition(".")
                if key == "weight" and isinstance(self.net.get_submodule(layer), nn.Linear):
                    ratio = float(d.norm() / kept[-1]["start"][name].norm().clamp(min=1e-12))
                    change[layer] = change.get(layer, 0.0) + ratio
        if not change:
            raise UserError(f"--unlearn fused: no update of client {', '.join(map(str, who))} is known")
        return sorted(change, key=change.get, reverse=True)[: self.args.fused_layers]

    def graft(self, layers: str) -> None:
        """Freeze the network and put adapters into layers, named with spaces between."""
        self.net.requires_grad_(False)
        self.fused_layers, self.fused = layers, LoRA(self.net, layers.split(), self.args.fused_rank)
        self.fused.to(self.device)

    # ---------------------------------------------------------------- what is trained from then on

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        adapters = getattr(self, "fused", None)
        if adapters is None:
            return super().trainable()
        return {f"fused.{n}": p for n, p in adapters.named_parameters()}

    def broadcast(self) -> Message:
        if getattr(self, "fused", None) is None:
            return super().broadcast()
        # the frozen model travels once; a worker's network is its own by now
        model = {f"net.{n}": t for n, t in self.model_tensors().items()}
        held = dict.fromkeys(model, -1)
        return Message({**self.trainable(), **model}, keep=held, fused_layers=self.fused_layers)

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """Weights and running statistics of the network, by name."""
        return {n: t.data for n, t in [*self.net.named_parameters(), *self.net.named_buffers()]}

    def local_update(self, message: Message, client) -> Message:
        """Client half: the model as the server has it, and on the first call adapters in the layers that it names."""
        if "fused_layers" in message:
            for n, t in self.model_tensors().items():
                owner, _, key = n.rpartition(".")
                getattr(self.net.get_submodule(owner), key).data = message[f"net.{n}"].to(t).clone()
            if getattr(self, "fused", None) is None:
                self.graft(message["fused_layers"])
        return super().local_update(message, client)
