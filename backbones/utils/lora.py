"""Low-rank adapters (LoRA, arXiv 2106.09685) for any ``nn.Linear`` of any network, grafted by forward hooks.

``y = W x + b`` becomes ``y + scale * B (A x)``, in all output rows or only in the q, k or v rows of a fused qkv layer.
The network is not changed: same tensors, module classes and ``state_dict`` names. The adapter is a separate module
that its owner keeps beside the network, so that only the adapter is trained, sent, averaged or saved. Freezing the
network is the owner's business.

PEFT is not used inside, since it renames the network's tensors, cannot adapt single slices of a fused qkv, and has no
per-client stacks of factors; :meth:`LoRA.export_peft` and :meth:`LoRA.load_peft` exchange files with it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.utils import client_batch, peft_files
from backbones.utils.targets import linear_layers, slices_of

# Inside vmap, grad or jvp a captured tensor may not be written to; this says whether one of them is running.
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def _wide(t: Tensor) -> Tensor:
    """Detached copy in the precision in which weights are merged (float64 where the device has it)."""
    return t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64)


class _Branch(nn.Module):
    """One pair (A: r x in, B: rows x r), with or without a leading client dimension, and the rows it adds to."""

    STACKS = True

    def __init__(self, slices: str, r: int, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        n, d = linear.out_features, linear.out_features // 3
        if slices in ("all", "qkv"):
            self.rows = [slice(0, n)]
        elif slices in ("qk", "kv"):  # neighbours are one block of rows
            self.rows = [slice("qkv".index(slices[0]) * d, "qkv".index(slices[0]) * d + 2 * d)]
        else:
            self.rows = [slice("qkv".index(s) * d, "qkv".index(s) * d + d) for s in slices]
        self.scale = scale
        n = sum(s.stop - s.start for s in self.rows)
        like = {"device": linear.weight.device, "dtype": torch.promote_types(linear.weight.dtype, torch.float32)}
        self.A = nn.Parameter(torch.zeros(r, linear.in_features, **like))
        self.B = nn.Parameter(torch.zeros(n, r, **like))

    def split(self, t: Tensor, dim: int) -> list[tuple[slice, Tensor]]:
        return list(zip(self.rows, t.split([s.stop - s.start for s in self.rows], dim), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        h = client_batch.linear(x, self.A)
        return client_batch.linear(h if self.scale == 1 else h * self.scale, self.B)


class _Graft:
    """The forward hook of one layer. An object rather than a closure, so that copies of a network copy its adapter."""

    def __init__(self, lora: "LoRA", key: str) -> None:
        self.lora, self.key = lora, key

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        if not self.lora.active:
            return None
        x = args[0] if args else kwargs["input"]
        in_place = _transform() is None
        for branch in self.lora.layers[self.key].values():
            for rows, delta in branch.split(branch(x).to(out.dtype), -1):
                whole = delta.shape[-1] == out.shape[-1]
                if in_place:  # out is the fresh result of the linear layer, which nobody else has seen
                    (out if whole else out[..., rows]).add_(delta)
                else:
                    out = out + (delta if whole else F.pad(delta, (rows.start, out.shape[-1] - rows.stop)))
        return out


class LoRA(nn.Module):
    """Adapters on the linear layers of ``net`` that ``targets`` name.

    Args:
        net: the network; it must outlive the adapter, and is not registered as its child.
        targets: names, ends of names or globs, each optionally with slices of a fused qkv: ``'attn.qkv'``,
            ``'attn.qkv:k,v'``, ``'mlp.fc1'``, ``'blocks.0.attn.qkv:q'``.
        r: rank of each branch, or a rank for each layer name.
        alpha: the scale is alpha / r; None means a scale of 1.
        share_A: one A for all slices of a layer and one stacked B (slices * d x r), instead of a pair per slice.
        init: how A is drawn: 'kaiming' (uniform, a = sqrt 5), 'gaussian' (std 1 / r) or 'zeros'. B is zero.
        generator: source of every draw; draws are made on its device (else on the CPU).

    Parameters are called ``layers.<layer name with - for .>.<slices>.A`` (r x in) and ``.B`` (rows x r), where slices
    is ``q``, ``kv`` (shared A) or ``all``. They are float32, or float64 where the weight is, and are read when the hook
    runs: ``torch.func.functional_call`` works on a module that holds both network and adapter. Either factor may get a
    leading client dimension K there (K x r x in, K x rows x r) if the batch holds K clients' samples (client_batch.py).

    Raises:
        ValueError: unknown target, slices of a layer that has none, or a rank below 1.
    """

    def __init__(
        self,
        net: nn.Module,
        targets: str | Sequence[str],
        r: int | Mapping[str, int],
        alpha: float | None = None,
        share_A: bool = False,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.enabled, self.folded = True, False
        self._originals: dict[str, Tensor] = {}
        # A plain dict hides the layers from named_parameters: they belong to the network.
        self._linears: dict[str, nn.Linear] = {}
        self._handles = []
        self.layers = nn.ModuleDict()
        for name, asked in linear_layers(net, targets).items():
            linear = net.get_submodule(name)
            rank = r if isinstance(r, int) else r.get(name, 0)
            if rank < 1:
                raise ValueError(f"the rank of '{name}' must be at least 1, not {rank}")
            slices = slices_of(name, linear, asked)
            groups = [slices] if share_A or slices == "all" else list(slices)
            scale = 1.0 if alpha is None else alpha / rank
            self.layers[self._key(name)] = nn.ModuleDict({g: _Branch(g, rank, linear, scale) for g in groups})
            self._linears[name] = linear
            hook = _Graft(self, self._key(name))
            self._handles.append(linear.register_forward_hook(hook, with_kwargs=True))
        self.reset(A=init, generator=generator)

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "-")

    @property
    def active(self) -> bool:
        """Whether the hooks add anything: enabled, and not folded into the weights."""
        return self.enabled and not self.folded

    @property
    def layer_names(self) -> list[str]:
        return list(self._linears)

    def linear(self, name: str) -> nn.Linear:
        """The adapted layer of that name."""
        return self._linears[name]

    def branches(self) -> Iterator[tuple[str, str, _Branch]]:
        """(layer name, slices, branch) in the network's order."""
        for name in self._linears:
            for slices, branch in self.layers[self._key(name)].items():
                yield name, slices, branch

    def __iter__(self) -> Iterator[tuple[str, str, nn.Parameter, nn.Parameter]]:
        """(layer name, slices, A, B) of each branch; slices as in the parameter names."""
        return ((name, slices, b.A, b.B) for name, slices, b in self.branches())

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The network without this adapter, within the block. (A folded adapter stays folded.)"""
        was, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = was

    def remove(self) -> None:
        """Unhook for good; parameters stay readable. A folded adapter is unfolded first."""
        if self.folded:
            self.unfold()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def reset(
        self,
        A: str | Mapping[str, Tensor] | None = None,
        B: str | None = "zeros",
        generator: torch.Generator | None = None,
    ) -> None:
        """Start anew, as for a new task. New tensors are put in the same parameters, never written in place.

        A: None keeps it; a kind of init; or {layer name: r x in} for the layers to set (all their branches get it).
        B: a kind of init, or None to keep it. ValueError for an unknown kind or layer, or a wrong shape.
        """
        if isinstance(A, Mapping) and not A.keys() <= self._linears.keys():
            raise ValueError(f"no adapter on {sorted(A.keys() - self._linears.keys())}; layers: {self.layer_names}")
        for name, _, branch in self.branches():
            if isinstance(A, str):
                branch.A.data = _draw(A, branch.A, generator)
            elif A is not None and name in A:
                if A[name].shape[-2:] != branch.A.shape[-2:]:
                    raise ValueError(f"A of '{name}' must be {tuple(branch.A.shape)}, not {tuple(A[name].shape)}")
                branch.A.data = A[name].detach().to(branch.A, copy=True)
            if B is not None:
                branch.B.data = _draw(B, branch.B, generator)

    @torch.no_grad()
    def delta(self) -> dict[str, list[tuple[slice, Tensor]]]:
        """{layer name: [(rows of W, scale * B A in float64)]}; K x rows x in where a factor has a client dimension."""
        out: dict[str, list[tuple[slice, Tensor]]] = {name: [] for name in self._linears}
        for name, _, b in self.branches():
            out[name] += b.split(b.scale * (_wide(b.B) @ _wide(b.A)), -2)
        return out

    @torch.no_grad()
    def merged(self, name: str, sign: float = 1, net: nn.Module | None = None) -> Tensor:
        """W + sign * scale * B A of one layer as a new tensor, summed in float64."""
        weight = (self._linears[name] if net is None else net.get_submodule(name)).weight
        total = _wide(weight).clone()
        for rows, delta in self.delta()[name]:
            if delta.dim() != 2:
                raise ValueError(f"'{name}' holds the factors of {delta.shape[0]} clients; only one pair can be folded")
            total[rows].add_(delta, alpha=sign)
        return total.to(weight.dtype)

    def fold(self, sign: float = 1) -> None:
        """Put W + sign * scale * B A in the network's weights and silence the hooks, until :meth:`unfold`.

        ``weight.data`` becomes a new tensor: the old one may be shared with other networks and is never written to.
        RuntimeError if already folded.
        """
        if self.folded:
            raise RuntimeError("this adapter is already folded; unfold it first")
        merged = {name: self.merged(name, sign) for name in self._linears}
        for name, linear in self._linears.items():
            self._originals[name] = linear.weight.data
            linear.weight.data = merged[name]
            linear.__dict__.setdefault("_folds", []).append(self)
        self.folded = True

    def unfold(self) -> None:
        """Give the weights back their original tensors, bit for bit. RuntimeError unless this was the last fold."""
        if not self.folded:
            raise RuntimeError("this adapter is not folded")
        if any(linear._folds[-1] is not self for linear in self._linears.values()):
            raise RuntimeError("another adapter was folded over this one; unfold that one first")
        for name, linear in self._linears.items():
            linear.weight.data = self._originals.pop(name).to(linear.weight.device)
            linear._folds.pop()
        self.folded = False

    def fold_into(self, net: nn.Module | None = None, sign: float = 1) -> None:
        """Add the adapter to the weights for good (new tensors, as in :meth:`fold`) and set B to zero, keeping A.

        net: a network with the same layer names; by default the adapter's own. RuntimeError while anything is folded.
        """
        layers = {n: lin if net is None else net.get_submodule(n) for n, lin in self._linears.items()}
        if self.folded or any(lin.__dict__.get("_folds") for lin in layers.values()):
            raise RuntimeError("an adapter is folded into these weights; unfold it first")
        merged = {name: self.merged(name, sign, net) for name in layers}
        for name, linear in layers.items():
            linear.weight.data = merged[name]
        self.reset(A=None, B="zeros")

    def extra_repr(self) -> str:
        state = "folded" if self.folded else "on" if self.enabled else "off"
        return f"{len(self._linears)} layers, {sum(p.numel() for p in self.parameters()):,} parameters, {state}"

    def export_peft(self, path: str | Path, base_model_name: str | None = None) -> None:
        """Write a folder that ``peft.PeftModel.from_pretrained`` reads (see :func:`peft_files.write`)."""
        peft_files.write(self, path, base_model_name)

    def load_peft(self, path: str | Path) -> None:
        """Read such a folder into this adapter, whose layers and ranks must fit (see :func:`peft_files.load`)."""
        peft_files.load(self, path)

    @classmethod
    def from_peft(cls, net: nn.Module, path: str | Path) -> "LoRA":
        """A whole-layer adapter of scale 1 with the layers, ranks and values of a PEFT LoRA folder."""
        ranks = {name: len(A) for name, (A, _, _) in peft_files.read(path).items()}
        lora = cls(net, list(ranks), ranks, init="zeros")
        lora.load_peft(path)
        return lora


def _draw(kind: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A tensor like ``like``, drawn on the generator's device so that every device gets the same numbers."""
    t = torch.zeros(like.shape, dtype=like.dtype, device="cpu" if generator is None else generator.device)
    if kind == "kaiming":  # kaiming_uniform_ with a = sqrt(5)
        t.uniform_(-1 / math.sqrt(like.shape[-1]), 1 / math.sqrt(like.shape[-1]), generator=generator)
    elif kind == "gaussian":
        t.normal_(0, 1 / like.shape[-2], generator=generator)
    elif kind != "zeros":
        raise ValueError(f"unknown init '{kind}'; available: kaiming, gaussian, zeros")
    return t.to(like.device)
