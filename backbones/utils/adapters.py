"""Small trained parts for timm Vision Transformers, by hooks: tensors and ``state_dict`` names stay as they are.

:class:`AdaptFormer` adds a bottleneck beside the MLP of each block (Chen et al. 2022, arXiv 2205.13535);
:class:`ScaleShift` scales and shifts what leaves each operation (SSF, Lian et al. 2022, arXiv 2210.08823). LoRA and
prompts are in lora.py and prompts.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _blocks(net: nn.Module) -> list[nn.Module]:
    blocks = list(getattr(net, "blocks", ()))
    if not blocks or not all(hasattr(b, n) for b in blocks for n in ("norm2", "mlp", "drop_path2")):
        raise ValueError(f"{type(net).__name__} has no blocks of timm's VisionTransformer: norm2, mlp, drop_path2")
    return blocks


class _Enter:
    """Pre-hook of a block's norm2: keeps what enters it for the adapter."""

    def __init__(self, owner: AdaptFormer, block: int) -> None:
        self.owner, self.block = owner, block

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.owner.entered[self.block] = args[0]


class _Leave:
    """Hook of a block's drop_path2: adds the adapter's output to the MLP's."""

    def __init__(self, owner: AdaptFormer, block: int) -> None:
        self.owner, self.block = owner, block

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out + self.owner(self.owner.entered.pop(self.block), self.block)


class AdaptFormer(nn.Module):
    """x + MLP(norm(x)) + scale * up(relu(down(x))) in every block, up at zero: the network starts as it is.

    Args:
        net: a timm ``VisionTransformer``. bottleneck: width of the adapter. scale: s of the paper (0.1).

    Raises:
        ValueError: blocks of another kind.
    """

    def __init__(self, net: nn.Module, bottleneck: int = 64, scale: float = 0.1) -> None:
        super().__init__()
        self.scale, self.entered = scale, {}
        blocks, like = _blocks(net), net.blocks[0].mlp.fc1.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.down = nn.ModuleList(nn.Linear(like.shape[1], bottleneck, dtype=dtype) for _ in blocks)
        self.up = nn.ModuleList(nn.Linear(bottleneck, like.shape[1], dtype=dtype) for _ in blocks)
        for down, up in zip(self.down, self.up):
            nn.init.kaiming_uniform_(down.weight, a=5**0.5)
            for t in (down.bias, up.weight, up.bias):
                nn.init.zeros_(t)
        self.to(like.device)  # only now: what is drawn on the CPU is the same for every device
        for i, block in enumerate(blocks):
            block.norm2.register_forward_pre_hook(_Enter(self, i))
            block.drop_path2.register_forward_hook(_Leave(self, i))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "entered": {}}  # of one batch and its graph, which cannot be copied

    def forward(self, x: Tensor, block: int) -> Tensor:
        """The adapter's output (B, N, d) for what enters the MLP's norm (B, N, d)."""
        return self.scale * self.up[block](F.relu(self.down[block](x)))


class _Rescale:
    """Hook of one operation."""

    def __init__(self, owner: ScaleShift, i: int) -> None:
        self.owner, self.i = owner, i

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out * self.owner.scale[self.i] + self.owner.shift[self.i]


class ScaleShift(nn.Module):
    """gamma * x + beta after the patch embedding, every norm and every linear layer of the blocks, and the last norm.

    gamma ~ N(1, 0.02^2), beta ~ N(0, 0.02^2), as released.

    Args:
        net: a timm ``VisionTransformer``.

    Raises:
        ValueError: blocks of another kind.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        d, places = net.embed_dim, [(net.patch_embed, net.embed_dim)]
        for block in _blocks(net):
            linear = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            places += [(block.norm1, d), (block.norm2, d), *((m, m.out_features) for m in linear)]
        places.append((net.norm, d))
        like = net.blocks[0].mlp.fc1.weight
        to = like.device, torch.promote_types(like.dtype, torch.float32)
        # drawn on the CPU, as in AdaptFormer
        self.scale = nn.ParameterList(nn.init.normal_(torch.empty(n), 1.0, 0.02).to(*to) for _, n in places)
        self.shift = nn.ParameterList(nn.init.normal_(torch.empty(n), 0.0, 0.02).to(*to) for _, n in places)
        for i, (module, _) in enumerate(places):
            module.register_forward_hook(_Rescale(self, i))
