"""A small vision transformer for 28x28 grey images: 802,048 parameters without head, 17 tokens, trains on a CPU.

Its weights come with the code (pretrained on letter glyphs by ``scripts/pretrain_vit_pocket.py``), so that experiments
with a pretrained transformer run offline. Other sizes are resized and colour is averaged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from backbones.vit import ViT, add_weights_args, as_backbone, load_weights
from utils.errors import UserError

NAME = "vit-pocket"
WEIGHTS = Path(__file__).parent / "weights" / "vit_pocket.safetensors"

add_args = add_weights_args


def build(args: argparse.Namespace, dataset: Any) -> ViT:
    """The pocket transformer with a head for ``dataset.N_CLASSES``.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    # timm's default initialisation had learned nothing after 25k images, where the one of the JAX release did.
    vit = VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, embed_dim=128, depth=4, num_heads=4, num_classes=0, weight_init="jax"
    )
    net = as_backbone(vit, dataset.N_CLASSES)
    file = getattr(args, "backbone_weights", None)
    if file is None and getattr(args, "pretrained", 1):
        if not WEIGHTS.is_file():
            raise UserError(
                f"the weights of vit-pocket are missing ({WEIGHTS.parent.name}/{WEIGHTS.name}): rebuild them with "
                "`python scripts/pretrain_vit_pocket.py`, or use --pretrained 0"
            )
        file = WEIGHTS
    if file is not None:
        load_weights(net, file)
    return net
