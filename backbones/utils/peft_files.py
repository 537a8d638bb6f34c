"""LoRA folders in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``. PEFT itself is not needed.

PEFT keeps one pair per linear layer. An adapter with a branch per slice of a fused qkv becomes one pair: the A's are
stacked, and each B stands in its rows and ranks of a block matrix, so a layer's rank is the sum of its branches' ranks.
"""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from backbones.utils.lora import LoRA

PREFIX = "base_model.model."


def write(lora: "LoRA", path: str | Path, base_model_name: str | None = None) -> None:
    """Write ``lora`` as a folder that ``peft.PeftModel.from_pretrained(net, path)`` reads.

    ValueError if the factors have a client dimension.
    """
    tensors, ranks, alphas = {}, {}, {}
    for name in lora.layer_names:
        branches = [b for n, _, b in lora.branches() if n == name]
        if any(p.dim() != 2 for b in branches for p in b.parameters()):
            raise ValueError(f"'{name}' holds the factors of several clients; PEFT's format has one pair per layer")
        A = torch.cat([b.A.detach() for b in branches])
        B, first = A.new_zeros(lora.linear(name).out_features, len(A)), 0
        for b in branches:
            for rows, part in b.split(b.B.detach(), 0):
                B[rows, first : first + part.shape[1]] = part
            first += len(b.A)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.cpu().contiguous()
        # '^' and escapes: PEFT takes these keys for patterns that may match the end of other names.
        ranks["^" + re.escape(name)] = len(A)
        alphas["^" + re.escape(name)] = branches[0].scale * len(A)
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    same = set(ranks.values()) == {r} and set(alphas.values()) == {alpha}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": lora.layer_names,
        "rank_pattern": {} if same else ranks,
        "alpha_pattern": {} if same else alphas,
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))


def read(path: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer name: (A: r x in, B: out x r, scale)} of a folder; ValueError if it holds more than plain LoRA pairs."""
    path = Path(path)
    config = json.loads((path / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        raise ValueError(f"{path} is not a plain LoRA on linear layers")
    tensors = load_file(path / "adapter_model.safetensors")
    pairs = {}
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
        A, B = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."))
        alpha = next(
            (a for k, a in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", name)),
            config["lora_alpha"],
        )
        pairs[name] = (A, B, alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A)))
    if tensors:
        raise ValueError(f"{path} holds more than LoRA pairs: {', '.join(list(tensors)[:3])}")
    return pairs


@torch.no_grad()
def load(lora: "LoRA", path: str | Path) -> None:
    """Read a folder into ``lora``, slices included; a different scale is put in B.

    ValueError if layers or ranks differ, or if the folder changes rows that ``lora`` has no branch for.
    """
    pairs = read(path)
    if pairs.keys() != set(lora.layer_names):
        raise ValueError(
            f"{path} and this adapter differ in their layers: {', '.join(sorted(pairs.keys() ^ set(lora.layer_names)))}"
        )
    new = []
    for name, (A, B, scale) in pairs.items():
        branches = [b for n, _, b in lora.branches() if n == name]
        rank = sum(b.A.shape[-2] for b in branches)
        if B.shape != (lora.linear(name).out_features, rank) or A.shape != (rank, lora.linear(name).in_features):
            raise ValueError(f"'{name}': {path} has factors {tuple(B.shape)} x {tuple(A.shape)}, rank here is {rank}")
        rest, first = B.clone(), 0
        for b in branches:
            cols = slice(first, first + b.A.shape[-2])
            first = cols.stop
            part = torch.cat([B[rows, cols] for rows in b.rows])
            for rows in b.rows:
                rest[rows, cols] = 0
            new.append((b, A[cols], part if scale == b.scale else part * (scale / b.scale)))
        if rest.count_nonzero():
            raise ValueError(f"'{name}' in {path} also changes rows outside the slices of this adapter")
    for b, A, B in new:  # only once everything fits
        b.A.data, b.B.data = A.to(b.A, copy=True), B.to(b.B, copy=True)
