"""Prompts for timm Vision Transformers, grafted without touching their tensors, classes or ``state_dict`` names.

:class:`PrefixPrompts` adds keys and values to the attention of chosen blocks (prefix tuning, as in DualPrompt, arXiv
2204.04799, and CODA-Prompt, arXiv 2211.13218); :class:`PrependPrompts` adds tokens to the sequence (L2P, arXiv
2112.08654). Both are modules that the owner keeps beside the network, and read their prompts when the network runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.utils import client_batch


def _draw(shape: tuple[int, ...], like: Tensor, init: str, generator: torch.Generator | None) -> nn.Parameter:
    """A parameter drawn on the generator's device, else on the CPU."""
    t = torch.zeros(shape, device="cpu" if generator is None else generator.device)
    if init == "uniform":
        t.uniform_(-1, 1, generator=generator)
    elif init == "normal":
        t.normal_(0, 0.02, generator=generator)
    elif init != "zeros":
        raise ValueError(f"unknown init '{init}'; available: uniform, normal, zeros")
    return nn.Parameter(t.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)))


def _per_sample(prompt: Tensor, batch: int) -> Tensor:
    """(length x dim), (K x length x dim) or (batch x length x dim) -> (batch x length x dim)."""
    if prompt.dim() == 2:
        return prompt.expand(batch, -1, -1)
    if prompt.dim() != 3:
        raise ValueError(f"prompts of shape {tuple(prompt.shape)} do not fit a batch of {batch}")
    return prompt if len(prompt) == batch else client_batch.per_sample(prompt, batch)


class _PrefixAttention:
    """Stands in for ``attn.forward`` of one block. An object, so that copies of a network copy their prompts."""

    def __init__(self, owner: "PrefixPrompts", block: int, attn: nn.Module) -> None:
        self.owner, self.block, self.attn = owner, block, attn

    def __call__(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attn, prefix = self.attn, self.owner.prefix(self.block) if self.owner.enabled else None
        if prefix is None:
            # Releases of timm that lack an argument are not asked for it.
            kwargs = {} if attn_mask is None else {"attn_mask": attn_mask}
            if is_causal:
                kwargs["is_causal"] = True
            return type(attn).forward(attn, x, **kwargs)
        batch, n, _ = x.shape
        heads = (batch, -1, attn.num_heads, attn.head_dim)
        gate = attn.gate(x).sigmoid() if getattr(attn, "gate", None) is not None else None
        q, k, v = attn.qkv(x).reshape(batch, n, 3, *heads[2:]).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        pk, pv = (_per_sample(p, batch).reshape(heads).transpose(1, 2).to(v.dtype) for p in prefix)
        k, v = torch.cat([pk, k.to(v.dtype)], 2), torch.cat([pv, v], 2)

        length = pk.shape[2]
        if is_causal:
            attn_mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if attn_mask is not None:  # every token sees every prompt
            attn_mask = F.pad(attn_mask, (length, 0), value=True if attn_mask.dtype == torch.bool else 0.0)
        if attn.fused_attn:
            y = F.scaled_dot_product_attention(
                q.to(v.dtype), k, v, attn_mask=attn_mask, dropout_p=attn.attn_drop.p if attn.training else 0.0
            )
        else:
            scores = (q * attn.scale) @ k.transpose(-2, -1)
            if attn_mask is not None:
                scores = (
                    scores.masked_fill(~attn_mask, float("-inf"))
                    if attn_mask.dtype == torch.bool
                    else scores + attn_mask
                )
            y = attn.attn_drop(scores.softmax(-1)) @ v
        y = y.transpose(1, 2).reshape(batch, n, -1)
        y = getattr(attn, "norm", nn.Identity())(y)
        return attn.proj_drop(attn.proj(y if gate is None else y * gate))


class _Prompts(nn.Module):
    """What both kinds share."""

    STACKS = True

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._given: dict = {}

    def __getstate__(self) -> dict:
        # Prompts that were set belong to one batch and to its graph, which cannot be copied.
        return {**self.__dict__, "_given": {}}

    def clear(self) -> None:
        """Forget everything that was ``set``."""
        self._given.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The network without prompts, within the block: the un-prompted pass of L2P and its successors."""
        was, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = was


class PrefixPrompts(_Prompts):
    """Extra keys and values in the attention of ``net.blocks[i]`` for i in ``blocks``.

    ``prompts.<i>`` is a parameter of shape (2, length, dim): keys, then values, which join the keys and values of the
    tokens head by head. They join after ``k_norm``, where the network has one: a prompt is the key itself. With a
    leading client dimension (K, 2, length, dim), through ``torch.func.functional_call``, the batch is K*b samples
    client by client. :meth:`set` gives prompts that depend on the input; with ``length`` 0 there are no parameters.

    Args:
        net: a timm ``VisionTransformer`` (or whatever holds such ``blocks`` with ``attn.qkv``).
        init: 'uniform' in [-1, 1] (L2P, DualPrompt), 'normal' (std 0.02) or 'zeros'.

    Raises:
        ValueError: no such block, or one whose attention is not timm's ``Attention`` or has prompts already.
    """

    def __init__(
        self,
        net: nn.Module,
        blocks: Sequence[int],
        length: int,
        init: str = "uniform",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        depth = len(getattr(net, "blocks", ()))
        self.prompts = nn.ParameterDict()
        self.length, self.blocks = length, list(blocks)
        self._attns: dict[int, nn.Module] = {}  # a plain dict: they belong to the network
        for i in self.blocks:
            if not 0 <= i < depth:
                raise ValueError(f"there is no block {i}; the network has {depth}")
            attn = getattr(net.blocks[i], "attn", None)
            if not all(hasattr(attn, a) for a in ("qkv", "num_heads", "head_dim", "fused_attn", "q_norm", "proj_drop")):
                raise ValueError(f"the attention of block {i} is {type(attn).__name__}, not timm's Attention")
            if "forward" in attn.__dict__:
                raise ValueError(f"the attention of block {i} has prompts already; remove those first")
            self._attns[i] = attn
            if length:
                dim = attn.num_heads * attn.head_dim
                self.prompts[str(i)] = _draw((2, length, dim), attn.qkv.weight, init, generator)
        for i, attn in self._attns.items():
            attn.forward = _PrefixAttention(self, i, attn)

    def set(self, block: int, keys: Tensor | None, values: Tensor | None = None) -> None:
        """Use these keys and values (batch x length x dim, or length x dim) in ``block`` instead of its parameters.

        Gradients flow into them. They stay until the next call; ``set(block, None)`` goes back to the parameters.
        """
        if block not in self._attns:
            raise ValueError(f"block {block} has no prompts; blocks: {self.blocks}")
        if keys is None:
            self._given.pop(block, None)
        elif values is None or keys.shape != values.shape:
            raise ValueError("keys and values must have the same shape")
        else:
            self._given[block] = (keys, values)

    def prefix(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of ``block`` now, or None if it has none."""
        if block in self._given:
            keys, values = self._given[block]
        elif str(block) in self.prompts:
            keys, values = self.prompts[str(block)].unbind(-3)
        else:
            return None
        return (keys, values) if keys.shape[-2] else None

    def remove(self) -> None:
        """Give the network its own attention back for good; parameters stay readable."""
        for attn in self._attns.values():
            attn.__dict__.pop("forward", None)
        self._attns.clear()


class _Insert:
    """The forward pre-hook of the first block."""

    def __init__(self, owner: "PrependPrompts", position: int) -> None:
        self.owner, self.position = owner, position

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        tokens = self.owner._given.get("tokens", self.owner.tokens)
        if not self.owner.enabled or tokens is None or not tokens.shape[-2]:
            return None
        x = args[0]
        prompts = _per_sample(tokens, len(x)).to(x.dtype)
        return torch.cat([x[:, : self.position], prompts, x[:, self.position :]], 1), *args[1:]


class PrependPrompts(_Prompts):
    """Extra tokens for every block, inserted after the class and register tokens, before block 0.

    ``tokens`` is a parameter (length x dim), or K x length x dim for a batch of K*b samples client by client; with
    ``length`` 0 there is none. :meth:`set` gives tokens per sample. A network that averages its patch tokens averages
    the prompts as well.
    """

    def __init__(
        self, net: nn.Module, length: int, init: str = "uniform", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        like = next(net.blocks[0].parameters())
        self.tokens = _draw((length, net.embed_dim), like, init, generator) if length else None
        self._handle = net.blocks[0].register_forward_pre_hook(_Insert(self, net.num_prefix_tokens))

    def set(self, tokens: Tensor | None) -> None:
        """Use these tokens (batch x length x dim, or length x dim) until the next call; None: the parameter again."""
        self._given = {} if tokens is None else {"tokens": tokens}

    def remove(self) -> None:
        """Unhook for good."""
        self._handle.remove()
