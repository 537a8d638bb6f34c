"""Methods that train prompts of a frozen transformer, and the head rows of the current task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.utils.head_rows import HeadRowsModel
from utils.args import flag01
from utils.errors import UserError


def add_vote_arg(parser) -> None:
    """The flag of methods that pick prompts by keys."""
    parser.add_argument(
        "--batchwise_prompt",
        type=flag01,
        default=0,
        nargs="?",
        const=1,
        help="1: the samples of a batch vote on the prompts of all of them, in testing too",
    )


class PromptMethod(HeadRowsModel):
    """What L2P, DualPrompt, CODA-Prompt and HGP share: a frozen transformer, its query, prompts and head rows to train.

    Attributes:
        TRAINED: attributes that hold modules to train. GRAFTED: attributes that hold prompts, which the query does
        without.
    """

    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    FEDERATED_ONLY = False
    TRAINED: tuple[str, ...] = ()
    GRAFTED: tuple[str, ...] = ()

    def __init__(self, backbone, loss, args, transform, dataset=None):
        if not hasattr(backbone, "patch_embed"):
            raise UserError(f"--backbone {args.backbone}: {self.NAME} needs a transformer of timm: vit or vit-pocket")
        backbone.requires_grad_(False)
        super().__init__(backbone, loss, args, transform, dataset)

    @staticmethod
    def blocks(backbone, flag: str, given: Sequence[int] | None, default: Sequence[int]) -> list[int]:
        """The blocks that get prompts: ``given``, or those of ``default`` that there are.

        Raises:
            UserError: a block that the network does not have, or none at all.
        """
        depth = len(backbone.blocks)
        chosen = sorted({i for i in default if i < depth} if given is None else set(given))
        odd = [i for i in chosen if i >= depth]
        if odd or not chosen:
            raise UserError(f"--{flag} {odd[0] if odd else default[0]}: the network has blocks 0 to {depth - 1}")
        return chosen

    def trainable(self) -> dict[str, nn.Parameter]:
        modules = {name: getattr(self, name) for name in self.TRAINED if hasattr(self, name)}
        mine = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad}
        return {**mine, **super().trainable()}

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """q(x) (B, d): the features of the network without prompts."""
        with ExitStack() as stack:
            for name in self.GRAFTED:
                stack.enter_context(getattr(self, name).disabled())
            return self.net(x, returnt="features")

    def prompted(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Features (B, d) with prompts as in training, and the term (B,) to add to the loss of each sample."""
        raise NotImplementedError

    def features(self, inputs: Tensor) -> Tensor:
        return self.prompted(inputs)[0]

    def local_loss(self, inputs, labels, client) -> Tensor:
        features, extra = self.prompted(inputs)
        return F.cross_entropy(self.head(features), labels - self.n_past_classes, reduction="none") + extra

    def forward(self, x: Tensor) -> Tensor:
        return self.net.logits(self.features(x))
