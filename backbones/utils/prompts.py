"""Prompts for timm Vision Transformers, grafted without touching their tensors, classes or ``state_dict`` names.

:class:`PrefixPrompts` adds keys and values to the attention of chosen blocks (prefix tuning, as in DualPrompt, arXiv
2204.04799, and CODA-Prompt, arXiv 2211.13218); :class:`PrependPrompts` adds tokens to the sequence (L2P, arXiv
2112.08654). Both are modules that the owner keeps beside the network, and read their prompts when the network runs.

Prompts that depend on the image come from pools, by a query q: the features of the network without prompts.
:class:`PromptPool` picks the k prompts whose keys are closest to q (L2P), :class:`PromptKeys` is the matching alone
(DualPrompt), and :class:`ComponentPool` is a prefix that is a weighted sum of components (CODA-Prompt):

    L2P, DualPrompt   argtop-k_m cos(q, k_m)
    CODA-Prompt       P = sum_m cos(q * a_m, k_m) p_m     (without a_m: cos(q, k_m))
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
    elif init == "unit":
        t = F.normalize(t.normal_(generator=generator).flatten(), dim=0).view(shape)
    elif init != "zeros":
        raise ValueError(f"unknown init '{init}'; available: uniform, normal, unit, zeros")
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
        init: 'uniform' in [-1, 1] (L2P, DualPrompt), 'normal' (std 0.02), 'unit' (Gaussian, all entries of a block's
            prompt together scaled to norm 1) or 'zeros'.

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


def orthonormal_rows(n: int, others: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """n random orthonormal rows, orthogonal to the span of ``others`` (m x d): Gram-Schmidt on Gaussian vectors.

    Returns:
        (n x d) of the type and on the device of ``others``, drawn on the generator's device, else on the CPU.

    Raises:
        ValueError: fewer than m + n dimensions.
    """
    m, d = others.shape
    if m + n > d:
        raise ValueError(f"{m + n} orthogonal vectors do not fit into {d} dimensions")
    drawn = torch.empty(n, d, dtype=torch.float64, device="cpu" if generator is None else generator.device)
    drawn.normal_(generator=generator)
    Q, R = torch.linalg.qr(torch.cat([others.detach().to(drawn), drawn]).T)
    return (Q * R.diagonal().sign()).T[m:].to(others)  # the signs of Gram-Schmidt


def cosines(query: Tensor, keys: Tensor, attention: Tensor | None = None) -> Tensor:
    """cos(q_b * a_m, k_m), (B x M), without the products q_b * a_m; cos(q_b, k_m) where there is no ``attention``.

    Args:
        query: (B x d). keys, attention: (M x d), or K x M x d for a batch of K clients (client_batch.py).
    """
    keys = F.normalize(keys, dim=-1)
    if attention is None:
        return client_batch.linear(F.normalize(query, dim=-1), keys)
    norm = client_batch.linear(query.square(), attention.square()).clamp_min(1e-24).sqrt()
    return client_batch.linear(query, attention * keys) / norm


class ComponentPool(PrefixPrompts):
    """A prefix for each image: P = sum_m cos(q * a_m, k_m) p_m; the first half of its rows are keys, the others values.

    ``prompts.<i>`` (n x length x dim), ``keys.<i>`` and ``attention.<i>`` (n x dim) are the components of block i that
    are trained. Those of :meth:`extend` 's past calls are buffers (``frozen_...``) and come first in the sum. Any
    parameter may get a leading client dimension. Call :meth:`match` with the query before the network runs; with
    prompts :meth:`disabled` the network gives the query.

    Args:
        net, blocks: as for :class:`PrefixPrompts`.
        components: how many to begin with; 0 to begin with :meth:`extend`.
        length: rows of a component, half of them keys: an even number.
        attention: whether components have vectors a_m (CODA-Prompt), or q is compared as it is.
        init: 'orthonormal' (each kind of vector of a block, with p_m flattened), or as for :class:`PrefixPrompts`.
        used: (first, last + 1) of the trained components that take part; the others get no gradient. Default: all.

    Raises:
        ValueError: as for :class:`PrefixPrompts`; an odd length; more orthonormal components than dimensions.
    """

    def __init__(
        self,
        net: nn.Module,
        blocks: Sequence[int],
        components: int,
        length: int,
        attention: bool = True,
        init: str = "orthonormal",
        generator: torch.Generator | None = None,
        used: tuple[int, int] | None = None,
    ) -> None:
        if length % 2 or length < 2:
            raise ValueError(f"components of {length} rows: half are keys and half values, so give an even number")
        super().__init__(net, blocks, 0)
        self.used = used
        self.keys, self.attention = nn.ParameterDict(), nn.ParameterDict()
        for i, attn in self._attns.items():
            dim = attn.num_heads * attn.head_dim
            empty = torch.zeros(0, dim, device=attn.qkv.weight.device, dtype=attn.qkv.weight.dtype)
            for kind, of_block in self.kinds(attention).items():
                blank = empty.view(0, 1, dim).expand(0, length, dim) if kind == "prompts" else empty
                of_block[str(i)] = nn.Parameter(blank.clone())
                self.register_buffer(f"frozen_{kind}_{i}", blank.clone())
        self.draw(components, init, generator)

    def kinds(self, attention: bool | None = None) -> dict[str, nn.ParameterDict]:
        """What a component consists of: ``prompts``, ``keys`` and, if there is any, ``attention``."""
        has = len(self.attention) > 0 if attention is None else attention
        return {"prompts": self.prompts, "keys": self.keys} | ({"attention": self.attention} if has else {})

    def frozen(self, kind: str, block: int | str) -> Tensor:
        """The components of past :meth:`extend` calls, (m x length x dim) or (m x dim)."""
        return self.get_buffer(f"frozen_{kind}_{block}")

    @property
    def n_frozen(self) -> int:
        """How many components are frozen."""
        return len(self.frozen("keys", self.blocks[0])) if self.blocks else 0

    def draw(self, n: int, init: str = "orthonormal", generator: torch.Generator | None = None) -> None:
        """Begin anew with n components to train, by default orthogonal to the frozen ones."""
        for kind, of_block in self.kinds().items():
            for i, p in of_block.items():
                shape = (n, *p.shape[1:])
                if n and init == "orthonormal":
                    p.data = orthonormal_rows(n, self.frozen(kind, i).flatten(1), generator).view(shape)
                else:
                    p.data = _draw(shape, p, init if n else "zeros", generator).data
                p.grad = None

    def extend(self, n: int, init: str = "orthonormal", generator: torch.Generator | None = None) -> None:
        """Freeze the components that were trained, then :meth:`draw` n new ones."""
        for kind, of_block in self.kinds().items():
            for i, p in of_block.items():
                setattr(self, f"frozen_{kind}_{i}", torch.cat([self.frozen(kind, i), p.detach()]))
        self.draw(n, init, generator)

    def match(self, query: Tensor | None) -> None:
        """Compose the prefixes for these queries (B x dim) until the next call; None: forget them."""
        self._given = {} if query is None else {"query": query}

    def weights(self, block: int | str, query: Tensor) -> Tensor:
        """cos(q * a_m, k_m) of the components in use, (B x M), frozen ones first."""
        return torch.cat([cosines(query, keys, a) for _, keys, a in self._parts(block)], 1)

    def _parts(self, block: int | str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(p, k, a) of the frozen and of the trained components of a block; empty ones are left out."""
        if self.n_frozen:
            parts = [self.frozen(kind, block) for kind in self.kinds()]
            yield parts[0], parts[1], parts[2] if len(parts) == 3 else None
        first, last = self.used or (0, None)
        p, k = self.prompts[str(block)][..., first:last, :, :], self.keys[str(block)][..., first:last, :]
        if k.shape[-2]:
            yield p, k, self.attention[str(block)][..., first:last, :] if len(self.attention) else None

    def prefix(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B x length/2 x dim) of ``block`` for the queries that were matched; None: no components."""
        if block in self._given:
            return super().prefix(block)
        parts = list(self._parts(block))
        if not parts:
            return None
        if "query" not in self._given:
            raise RuntimeError("no query: call match(query) before the network runs, or disable the prompts")
        query, rows = self._given["query"], 0
        with torch.autocast(query.device.type, enabled=False):  # the query is float32 whatever the network computes in
            for p, k, a in parts:  # products of matrices: nothing of size B x M x length x dim
                rows = rows + client_batch.linear(cosines(query, k, a), p.flatten(-2).transpose(-1, -2))
        return rows.unflatten(-1, parts[0][0].shape[-2:]).chunk(2, -2)


class PromptKeys(nn.Module):
    """Keys (n x dim) that are matched with queries; a leading client dimension is allowed.

    Args:
        like: a tensor of the device and type to have. init, generator: as for :class:`PrefixPrompts`.
    """

    STACKS = True

    def __init__(
        self, n: int, dim: int, like: Tensor, init: str = "uniform", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.keys = _draw((n, dim), like, init, generator)

    def cosines(self, query: Tensor) -> Tensor:
        """cos(q_b, k_m), (B x n)."""
        return cosines(query, self.keys)

    @staticmethod
    def closest(similarity: Tensor, k: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Indices (B x k) of the k largest of each row of ``similarity`` (B x n), the largest first.

        Args:
            sizes: for samples that vote: within each run of so many samples all get the k indices that most of them
                have among their own.
        """
        top = similarity.topk(k, -1).indices
        if sizes is None:
            return top
        votes = [t.flatten().bincount(minlength=similarity.shape[-1]) for t in top.split(list(sizes))]
        return torch.cat([v.topk(k).indices.expand(n, k) for v, n in zip(votes, sizes, strict=True)])


class PromptPool(PromptKeys):
    """n prompts (n x length x dim), each with a key; an image gets the k whose keys are closest to its query."""

    def __init__(
        self,
        n: int,
        length: int,
        dim: int,
        like: Tensor,
        init: str = "uniform",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(n, dim, like, init, generator)
        self.prompts = _draw((n, length, dim), like, init, generator)

    def forward(self, query: Tensor, k: int, vote: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Select by queries (B x dim).

        Args:
            vote: all samples of a client's batch get the k prompts that most of them have among their own.

        Returns:
            (tokens (B x k * length x dim), cosines with the selected keys (B x k), indices (B x k)).
        """
        batch, similarity, prompts = len(query), self.cosines(query), self.prompts
        clients = len(prompts) if prompts.dim() == 4 else 1
        rows = chosen = self.closest(similarity, k, client_batch.sizes_of(batch, clients) if vote else None)
        if prompts.dim() == 4:  # rows of one long pool, each client's after another's
            first = torch.arange(clients, device=chosen.device) * prompts.shape[1]
            rows, prompts = chosen + client_batch.per_sample(first, batch)[:, None], prompts.flatten(0, 1)
        return prompts[rows].flatten(1, 2), similarity.gather(1, chosen), chosen


class _Insert:
    """The forward pre-hook of the first block."""

    def __init__(self, owner: "PrependPrompts", net: nn.Module) -> None:
        self.owner, self.net = owner, net

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        tokens = self.owner.current()
        if tokens is None:
            return None
        x, at = args[0], self.net.num_prefix_tokens
        prompts = _per_sample(tokens, len(x))
        if self.owner.shifted is not None:
            first, table = self.net.pos_embed[:, :1], self.owner.shifted.to(prompts)[None]
            prompts = prompts + torch.cat([table[:, 1:], first], 1)
            x = torch.cat([x[:, :1] - first + table[:, :1], x[:, 1:]], 1)
        elif self.owner.positioned and self.net.pos_embed is not None and self.net.has_class_token:
            prompts = prompts if self.net.no_embed_class else prompts + self.net.pos_embed[:, :1]
        return torch.cat([x[:, :at], prompts.to(x.dtype), x[:, at:]], 1), *args[1:]


class _Pool:
    """Stands in for ``net.pool``: a mean over the prompts instead of the network's own pooling."""

    def __init__(self, owner: "PrependPrompts", net: nn.Module) -> None:
        self.owner, self.net = owner, net

    def __call__(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        tokens, at = self.owner.current(), self.net.num_prefix_tokens
        if tokens is None:
            return type(self.net).pool(self.net, x, pool_type)
        return x[:, 0 if self.owner.pool == "prefix+prompts" else at : at + tokens.shape[-2]].mean(1)


class PrependPrompts(_Prompts):
    """Extra tokens for every block, inserted after the class and register tokens, before block 0.

    ``tokens`` is a parameter (length x dim), or K x length x dim for a batch of K*b samples client by client; with
    ``length`` 0 there is none. :meth:`set` gives tokens per sample. A network that averages its patch tokens averages
    the prompts as well.

    Args:
        positioned: add the class token's position embedding to the prompts (L2P), where the network has one.
        shifted: (length x dim) positions that a table gives, one token late, to what comes after the patches' own are
            taken: the class token gets the first instead of its own, the prompts the others, and the last prompt the
            class token's (fed-mammoth's L2P). Needs a class token with a position.
        pool: what the features are made of: 'network' for its own pooling, 'prompts' for the mean of the prompts'
            outputs (L2P), 'prefix+prompts' for that over class and register tokens as well.
    """

    def __init__(
        self,
        net: nn.Module,
        length: int,
        init: str = "uniform",
        generator: torch.Generator | None = None,
        positioned: bool = False,
        pool: str = "network",
        shifted: Tensor | None = None,
    ) -> None:
        super().__init__()
        if shifted is not None and (net.pos_embed is None or not net.has_class_token or net.no_embed_class):
            raise ValueError("shifted positions need a class token that has a position")
        self.register_buffer("shifted", shifted, persistent=False)
        if pool not in ("network", "prompts", "prefix+prompts"):
            raise ValueError(f"unknown pool '{pool}'; available: network, prompts, prefix+prompts")
        like = next(net.blocks[0].parameters())
        self.tokens = _draw((length, net.embed_dim), like, init, generator) if length else None
        self.positioned, self.pool = positioned, pool
        self._handle = net.blocks[0].register_forward_pre_hook(_Insert(self, net))
        self._pooled: dict[str, nn.Module] = {}  # a plain dict: it is the network
        if pool != "network":
            net.pool = _Pool(self, net)
            self._pooled["net"] = net

    def current(self) -> Tensor | None:
        """The tokens that are inserted now (... x length x dim), or None."""
        tokens = self._given.get("tokens", self.tokens)
        return tokens if self.enabled and tokens is not None and tokens.shape[-2] else None

    def set(self, tokens: Tensor | None) -> None:
        """Use these tokens (batch x length x dim, or length x dim) until the next call; None: the parameter again."""
        self._given = {} if tokens is None else {"tokens": tokens}

    def remove(self) -> None:
        """Unhook for good."""
        self._handle.remove()
        for net in self._pooled.values():
            net.__dict__.pop("pool", None)
        self._pooled.clear()
