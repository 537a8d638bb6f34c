"""Methods that train prompts of a frozen transformer, and the head rows of the current task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.utils.transforms import send
from models.utils.head_rows import HeadRowsModel
from utils.args import add_switch
from utils.errors import UserError
from utils.evaluate import EVAL_BATCH


def add_vote_arg(parser) -> None:
    """The flag of methods that pick prompts by keys."""
    add_switch(
        parser,
        "--batchwise_prompt",
        help="1: the samples of a batch vote on the prompts of all of them, in testing too",
    )


class PromptMethod(HeadRowsModel):
    """What L2P, DualPrompt, CODA-Prompt and HGP share: a frozen transformer, its query, prompts and head rows to train.

    Attributes:
        TRAINED: attributes that hold modules to train. GRAFTED: attributes that hold prompts, which the query does
        without. KEEPS_QUERIES: whether queries of images that always look the same are computed once.
    """

    COMPATIBILITY = ["class-il", "domain-il", "task-il"]
    FEDERATED_ONLY = False
    TRAINED: tuple[str, ...] = ()
    GRAFTED: tuple[str, ...] = ()
    KEEPS_QUERIES = True

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

    def begin_task(self, dataset) -> None:
        super().begin_task(dataset)
        here = self.current_task  # training images of other tasks do not come again
        self._own_queries = {key: q for key, q in self.queries().items() if key[0] == "test" or key[1] == here}

    def queries(self) -> dict[tuple, Tensor]:
        """Queries (n, d) that are kept, by the fingerprint of the view whose images they are of."""
        return self.__dict__.setdefault("_own_queries", {})

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """q(x) (B, d): the features of the network without prompts, which are never trained.

        Images that always look the same (``shown``: in tests, and in training without augmentation) are embedded once,
        all of a client's or of a test set in their order: a query does not depend on the batch in which it is asked
        for, so neither the engine nor a resumed run changes it.
        """
        shown = getattr(x, "shown", None)
        if not self.KEEPS_QUERIES or shown is None:
            return self.embed(x)
        return torch.cat([self.queries_of(view)[send(positions, x.device)] for view, positions in shown])

    def queries_of(self, view) -> Tensor:
        """The queries (n, d) of all images of a loader's view."""
        kept = self.queries()
        if view.fingerprint not in kept:
            batches = torch.arange(len(view)).split(EVAL_BATCH)
            kept[view.fingerprint] = torch.cat([self.embed(view.batch(positions)[0]) for positions in batches])
        return kept[view.fingerprint]

    def embed(self, x: Tensor) -> Tensor:
        """The query, computed."""
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
