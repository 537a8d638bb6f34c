"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, Alg. 1) in three sizes: the whole network, the head, or LoRA and head.

With LoRA the server averages the factors: A <- sum_c w_c A_c and B <- sum_c w_c B_c, whose product is not the mean of
the products B_c A_c. ``ffa_lora`` and ``dolfin`` remove that error by fixing A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backbones.utils.head import HeadRows
from backbones.utils.lora import LoRA
from models.utils.federated_model import FederatedModel
from utils.args import number
from utils.errors import UserError


def add_lora_args(parser, r: int, *targets: str) -> None:
    """The flags of methods that train LoRA."""
    parser.add_argument("--lora_r", "--rank", "--r", type=number(int, 1), default=r, help="rank of the adapters")
    parser.add_argument(
        "--lora_targets",
        nargs="+",
        default=list(targets),
        help="linear layers to adapt, by the end of their name; :q,k,v picks slices of a fused layer",
    )
    parser.add_argument(
        "--export_adapter", default=None, metavar="DIR", help="write the trained adapter there, in PEFT's format"
    )


class FedAvg(FederatedModel):
    """Weighted mean of what the clients trained.

    ``--tuning full`` trains every weight; the classifier as a whole travels. ``head`` and ``lora`` freeze the
    backbone; of the classifier only the rows of the current task are trained and sent.
    """

    NAME = "fedavg"
    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    FEDERATED_ONLY = True

    @staticmethod
    def get_parser(parser):
        parser.add_argument("--tuning", choices=("full", "head", "lora"), default="full", help="what the clients train")
        parser.add_argument(
            "--ce_classes",
            choices=("current", "seen"),
            default="current",
            help="columns of the softmax in training (seen: --tuning full only)",
        )
        add_lora_args(parser, 4, "attn.qkv:q,k,v")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        self.tuning = getattr(args, "tuning", "lora")
        if self.tuning != "full" and getattr(args, "ce_classes", "current") == "seen":
            raise UserError(
                "--ce_classes seen needs --tuning full: otherwise only the current task's head rows are trained"
            )
        if self.tuning != "lora" and args.export_adapter:
            raise UserError("--export_adapter: this run would train no adapter; add --tuning lora")
        if self.tuning != "full":
            backbone.requires_grad_(False)
        super().__init__(backbone, loss, args, transform, dataset)
        self.head = HeadRows() if self.tuning != "full" else None
        self.lora = self.make_lora(backbone, args) if self.tuning == "lora" else None

    def make_lora(self, backbone, args, **options) -> LoRA:
        """The adapters, grafted on the frozen backbone."""
        return LoRA(backbone, args.lora_targets, args.lora_r, **options)

    def begin_task(self, dataset) -> None:
        if self.head is not None:
            self.head.take(self.net.classifier, self.n_past_classes, self.n_seen_classes)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        if getattr(self, "head", None) is None:
            return super().trainable()
        adapters = {f"lora.{n}": p for n, p in self.lora.named_parameters() if p.requires_grad} if self.lora else {}
        return {**adapters, **{f"head.{n}": p for n, p in self.head.named_parameters()}}

    def adapter_over_pretrained(self) -> LoRA:
        """What has been learned on top of the pretrained weights as one adapter."""
        return self.lora

    def export(self, folder: str) -> None:
        """Write the adapter as a folder that ``peft.PeftModel.from_pretrained`` reads."""
        self.adapter_over_pretrained().export_peft(folder, getattr(self.args, "vit_name", self.args.backbone))

    def aggregate(self, replies) -> None:
        super().aggregate(replies)
        if self.head is not None:
            self.head.put(self.net.classifier)

    def local_loss(self, inputs, labels, client) -> torch.Tensor:
        if getattr(self.args, "ce_classes", "current") == "seen":
            return F.cross_entropy(self.net(inputs)[:, : self.n_seen_classes], labels, reduction="none")
        return super().local_loss(inputs, labels, client)
