"""Vision transformers of timm (Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929).

The network *is* timm's ``VisionTransformer``: its class is exchanged for a subclass that adds the backbone interface.
So every tensor and submodule keeps timm's own name (``blocks.0.attn.qkv.weight``), timm checkpoints load as they are,
and adapters find layers by the names timm gives them. ``ViT`` is an ordinary class of this module, hence deepcopy and
pickle (worker processes) work; timm's ``__init__`` is not repeated, because its factories build the instance.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from backbones.utils.base import Backbone, fit_channels, fit_size
from backbones.utils.hub import add_pretrained_arg, offline
from utils.errors import UserError, nearest

NAME = "vit"
DEFAULT_VIT = "vit_base_patch16_224.augreg_in21k"
_MODULES = ("vision_transformer", "deit")  # where timm defines plain VisionTransformers
_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
_HEADS = ("head.", "head_dist.", "classifier.")  # what a weights file may hold that is no business of the body


class ViT(Backbone, VisionTransformer):
    """timm's VisionTransformer with a linear head called ``classifier``. Made by :func:`as_backbone`, not directly.

    Features are timm's pre-logits under the model's own pooling (for the augreg models: the class token after the last
    norm). Images of another size are resized to the model's, unless timm says that it takes any size; grey images are
    repeated for a colour model and colour ones averaged for a grey model.
    """

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = fit_channels(x, self.patch_embed.proj.in_channels)
        if not self.dynamic_img_size:
            x = fit_size(x, self.patch_embed.img_size)
        return self.forward_head(self.forward_features(x), pre_logits=True)


def as_backbone(vit: VisionTransformer, num_classes: int) -> ViT:
    """Turn a timm model, created with ``num_classes=0``, into a backbone in place. No tensor is copied or renamed.

    Raises:
        UserError: not a plain VisionTransformer (subclasses such as DeiT's distilled one have two heads).
    """
    if type(vit) is not VisionTransformer:
        raise UserError(f"{type(vit).__name__} is not a plain timm VisionTransformer: choose another --vit_name")
    vit.__class__ = ViT
    vit._attach_head(vit.embed_dim, num_classes)
    return vit


def _read(path: Path, model: VisionTransformer) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, with timm's names, without any head."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):  # training scripts wrap the weights
            if isinstance(tensors.get(key), dict):
                tensors = tensors[key]
    wanted = model.state_dict().keys() - {"classifier.weight", "classifier.bias"}
    if not wanted <= tensors.keys():
        # Perhaps another project's names (DINOv2, CLIP, ...): timm converts them, resampling position embeddings. Files
        # that have timm's names are never resampled: a wrong shape there is a wrong file.
        tensors = checkpoint_filter_fn(dict(tensors), model)
    return {k: v for k, v in tensors.items() if not k.startswith(_HEADS)}


def load_weights(net: ViT, file: str | Path) -> None:
    """Load the body of ``net`` from a file; the head of the file is ignored and that of ``net`` kept.

    Args:
        net: the network, changed in place; its types are kept (half-precision files are widened).
        file: .safetensors, or .pth/.pt/.bin (read without running code), or .npz of the original JAX release.

    Raises:
        UserError: no such file, unreadable, or its tensors are not this model's (the first few are named).
    """
    path = Path(file).expanduser()
    kinds = (".safetensors", ".pth", ".pt", ".bin", ".npz")
    if not path.is_file():
        raise UserError(f"--backbone_weights: there is no file {str(path)!r}")
    if path.suffix not in kinds:
        raise UserError(f"--backbone_weights: {path.name!r} has an unknown ending; allowed: {', '.join(kinds)}")
    try:
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("not an npz archive")
            net.load_pretrained(str(path))
            return
        tensors = _read(path, net)
    except Exception as err:  # each reader has its own exceptions, and the file comes from the user
        reason = " ".join(str(err).split())[:150]
        raise UserError(
            f"--backbone_weights: cannot read {path.name!r} as weights of this model ({type(err).__name__}: {reason}); "
            "check that the download is complete and that it belongs to --backbone/--vit_name"
        ) from err
    own = net.state_dict()
    body = {k: v for k, v in own.items() if not k.startswith("classifier.")}
    wrong = {
        "missing": sorted(body.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - body.keys()),
        "of another shape": [
            f"{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}"
            for k, v in body.items()
            if k in tensors and tensors[k].shape != v.shape
        ],
    }
    if any(wrong.values()):
        parts = [f"{len(v)} {what} ({', '.join(v[:3])}{', ...' * (len(v) > 3)})" for what, v in wrong.items() if v]
        raise UserError(f"--backbone_weights: {path.name!r} is no file of this model; tensors {'; '.join(parts)}")
    net.load_state_dict(tensors, strict=False)


def add_weights_args(parser: argparse.ArgumentParser) -> None:
    """The flags of every backbone that can start from pretrained weights."""
    add_pretrained_arg(parser)
    parser.add_argument(
        "--backbone_weights",
        metavar="FILE",
        help="pretrained weights from a file (.safetensors, .pth, .bin, .npz) instead of the usual place",
    )


def add_args(parser: argparse.ArgumentParser) -> None:
    """The flags of ``--backbone vit``."""
    parser.add_argument(
        "--vit_name", default=DEFAULT_VIT, help="any VisionTransformer of timm, with its tag (default: %(default)s)"
    )
    add_weights_args(parser)


def _create(name: str, pretrained: bool) -> VisionTransformer:
    """timm's model without head. UserError for an unknown name, or when its weights cannot be downloaded."""
    if not any(timm.models.is_model_in_modules(name, [module]) for module in _MODULES):
        known = [model for module in _MODULES for model in timm.list_models(module=module)]
        hint = nearest(name, known)
        hint = hint if hint.startswith("did you mean") else f"for example {DEFAULT_VIT} or vit_tiny_patch16_224"
        raise UserError(f"--vit_name: timm has no VisionTransformer {name!r}: {hint}")
    try:
        cfg = timm.models.get_pretrained_cfg(name)
    except RuntimeError as err:  # the part after the dot
        tagged = timm.list_pretrained(name.split(".")[0] + ".*")
        raise UserError(f"--vit_name: timm has no weights {name!r}: {nearest(name, tagged)}") from err
    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=0)
    if not cfg.has_weights:
        raise UserError(f"--vit_name: timm has no pretrained weights for {name!r}: use --pretrained 0")
    try:
        with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", _HUB_OFFLINE or offline()):
            return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as err:  # network, hub and disk errors come in many classes
        raise UserError(
            f"could not download the weights of {name!r} ({type(err).__name__}): get model.safetensors of the "
            f"repository timm/{cfg.architecture}.{cfg.tag} from huggingface.co and pass it with "
            "--backbone_weights FILE, or use --pretrained 0"
        ) from err


def build(args: argparse.Namespace, dataset: Any) -> ViT:
    """The timm model ``args.vit_name`` with a head for ``dataset.N_CLASSES``.

    Raises:
        UserError: unknown model, failed download, or unfit weights file.
    """
    file = getattr(args, "backbone_weights", None)
    pretrained = bool(getattr(args, "pretrained", 1)) and file is None
    net = as_backbone(_create(getattr(args, "vit_name", None) or DEFAULT_VIT, pretrained), dataset.N_CLASSES)
    if file is not None:
        load_weights(net, file)
    return net
