"""CLIP's image encoder (Radford et al. 2021, arXiv 2103.00020), through ``transformers``, and its text head.

Features are the projected class token, as ``CLIPModel.get_image_features`` gives them. A classifier of text is made
where the data set names its classes (``prompts``): for each class the mean over templates of what the text encoder
says, of length one. It is computed when the network is built, and the text encoder is dropped then; for the classes of
another data set it is read once more.

    --clip_backbone ViT-B/32, ViT-B/16, ViT-L/14    OpenAI's weights, from the hub, or its cache
                    <folder>                        what ``save_pretrained`` wrote, or a clone of a hub's repository
                    <owner>/<name>                  any CLIP of the hub
                    tiny                            random weights for 32-pixel images, for trying things out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from backbones.utils.base import Backbone, fit_channels, fit_size
from backbones.utils.hub import add_pretrained_arg, offline
from utils.errors import UserError

NAME = "clip"
HUB = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
}
TEXT_BATCH = 256


class CLIP(Backbone):
    """Images (B, 3, H, W), brought to the size of the model, -> projected class token (B, d).

    Attributes:
        logit_scale: logarithm of the temperature that CLIP was trained with, about log 100.
        text_rows: (N_CLASSES, d), of length one, what the text encoder says of the classes; None without names.
        source: folder or name on the hub that weights came from; None for random ones.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, text_rows: torch.Tensor | None = None, source: str | None = None
    ) -> None:
        super().__init__()
        self.source = source
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.image_size = model.config.vision_config.image_size
        self.register_buffer("logit_scale", model.logit_scale.detach().clone(), persistent=False)
        self.register_buffer("text_rows", text_rows, persistent=False)
        self._attach_head(model.config.projection_dim, num_classes)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = fit_size(fit_channels(x, 3), (self.image_size, self.image_size))
        return self.visual_projection(self.vision_model(pixel_values=x).pooler_output)

    def rows_of(self, dataset: Any) -> torch.Tensor | None:
        """(N_CLASSES, d), what the text encoder says of another data set's classes; None if one of them has no text."""
        if self.source is None or not hasattr(dataset, "prompts"):
            return None
        return text_rows(_model(self.source).eval(), _tokenizer(self.source), dataset.prompts())


def _model(where: str) -> nn.Module:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(where, local_files_only=offline())


def _tokenizer(where: str):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(where, local_files_only=offline())


@torch.no_grad()
def text_rows(model: nn.Module, tokenizer, prompts: list[list[str]]) -> torch.Tensor:
    """(classes, d): for each class the mean of its prompts' embeddings, each of length one, brought to length one."""
    flat = [p for of_class in prompts for p in of_class]
    parts = []
    for i in range(0, len(flat), TEXT_BATCH):
        tokens = tokenizer(flat[i : i + TEXT_BATCH], padding=True, truncation=True, return_tensors="pt")
        said = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        parts.append(F.normalize(model.text_projection(said), dim=1))
    of_class = torch.cat(parts).split([len(p) for p in prompts])
    return F.normalize(torch.stack([e.mean(0) for e in of_class]), dim=1)


def add_args(parser: argparse.ArgumentParser) -> None:
    """The flags of ``--backbone clip``."""
    parser.add_argument(
        "--clip_backbone", default="ViT-B/16", help="ViT-B/32, ViT-B/16, ViT-L/14, a folder, a name on the hub, or tiny"
    )
    add_pretrained_arg(parser)


def _config(name: str):
    """The configuration of a model by its short name, without any file."""
    from transformers import CLIPConfig

    if name == "tiny":
        small = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 24,
        }
        text = {"vocab_size": 600, "max_position_embeddings": 32, "eos_token_id": 599, "bos_token_id": 598}
        return CLIPConfig(
            text_config={**small, **text, "pad_token_id": 599},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
    if name == "ViT-L/14":
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        return CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 14}, projection_dim=768)
    return CLIPConfig(vision_config={"patch_size": int(name.rpartition("/")[2])})


def build(args: argparse.Namespace, dataset: Any) -> CLIP:
    """The image encoder ``args.clip_backbone`` with a head for ``dataset.N_CLASSES``, and text rows where it can.

    Raises:
        UserError: unknown name, or weights that cannot be had.
    """
    try:
        from transformers import CLIPModel
    except ImportError as e:
        raise UserError(f"--backbone clip needs transformers ({e}): pip install -r requirements.txt") from e
    name, pretrained = getattr(args, "clip_backbone", None) or "ViT-B/16", bool(getattr(args, "pretrained", 1))
    known = name in HUB or name == "tiny"
    if not known and not Path(name).expanduser().is_dir() and name.count("/") != 1:
        raise UserError(
            f"--clip_backbone {name!r}: neither a folder nor a name on the hub; choose {', '.join(HUB)}, tiny, a "
            "folder or <owner>/<name>"
        )
    if name == "tiny" or not pretrained:
        if not known:
            raise UserError(f"--pretrained 0: choose one of {', '.join(HUB)} and tiny, not {name!r}")
        return CLIP(CLIPModel(_config(name)), dataset.N_CLASSES)
    where = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else HUB.get(name, name)
    try:
        model, rows = _model(where), None
        if hasattr(dataset, "prompts"):
            rows = text_rows(model.eval(), _tokenizer(where), dataset.prompts())
    except Exception as err:  # network, hub, disk and format: each has classes of its own
        raise UserError(
            f"cannot load CLIP from {where!r} ({type(err).__name__}: {' '.join(str(err).split())[:120]}): get the "
            f"files of huggingface.co/{HUB.get(name, name)} (config.json, model.safetensors, vocab.json, merges.txt, "
            "tokenizer_config.json) into a folder and pass it with --clip_backbone FOLDER"
        ) from err
    return CLIP(model.train(), dataset.N_CLASSES, rows, where)
