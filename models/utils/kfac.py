"""Kronecker-factored curvature of what a network computes, and the penalty on task vectors made of it (TAK).

For f: images -> (B, C) with Jacobian J in the parameters, the generalised Gauss-Newton matrix of a squared error over a
data set is G = E_x J(x)^T J(x) (arXiv 2602.17385, eq. 3): how much f moves there when the parameters do. For a linear
layer z = W a + b, with [W b] flattened row by row and a 1 appended to a,

    G ~ B (x) A,    A = E a a^T,    B = E g g^T,    g = J_z^T s

where s runs over the C unit vectors (``draws = 0``, exact) or is drawn from N(0, I) (the mean over ``draws``). Layers
that see R tokens of an image: ``mode``

    official   A and B are sums over tokens divided by R, so the curvature is R times smaller than in
    expand     where only A is divided by R (Eschenhagen et al. 2023: exact for linear networks, an output per token)
    reduce     a is the mean over tokens and g the sum (exact for linear networks whose output is the mean over tokens)

LayerNorm's weights and biases and class tokens are small enough for their blocks of G itself, F = E u^T u with u the
gradient of an image, exact if s is. Parameters of other kinds have no factors.

    quadratic form    tr(B D A D^T) = sum (B D A) * D,    gradient 2 B D A,    D = [dW db]

Everything is a sum over images, so that parts of a data set, such as those of clients, add up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones.utils.moments import exact_float32
from models.utils.federated_model import in_place
from models.utils.gpm import pack_triu, unpack_triu
from models.utils.linearize import differentiable_forward, places_of
from models.utils.merging import wide
from utils.checkpoints import digest
from utils.errors import UserError
from utils.evaluate import evaluating
from utils.files import replacing

MODES = ("official", "expand", "reduce")
JOINT = ("q_proj", "k_proj", "v_proj")  # siblings that see the same input
CHUNK = 32  # cotangents that are propagated at once


@dataclass(frozen=True)
class Block:
    """Linear layers with one input, whose rows are stacked; ``parts`` of equally many rows have no common curvature."""

    layers: tuple[str, ...]
    bias: bool
    parts: int = 1

    @property
    def name(self) -> str:
        return "+".join(self.layers)

    def join(self, tau: Mapping[str, Tensor]) -> Tensor:
        """D = [dW db] (parts, rows / parts, inputs [+ 1]) of a task vector."""
        rows = [
            torch.cat((tau[f"{n}.weight"], tau[f"{n}.bias"][:, None]), 1) if self.bias else tau[f"{n}.weight"]
            for n in self.layers
        ]
        return torch.cat(rows).unflatten(0, (self.parts, -1))

    def split(self, D: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`join`: {parameter: tensor}."""
        out, rows = {}, D.flatten(0, 1).split([len(like[f"{n}.weight"]) for n in self.layers])
        for n, part in zip(self.layers, rows):
            out[f"{n}.weight"] = part[:, : like[f"{n}.weight"].shape[1]]
            if self.bias:
                out[f"{n}.bias"] = part[:, -1]
        return out


@dataclass(frozen=True)
class Layout:
    """Which parameters have which kind of block: linear layers, LayerNorms' weights and biases, class tokens."""

    blocks: tuple[Block, ...]
    norms: tuple[str, ...]
    tokens: tuple[str, ...]

    @classmethod
    def of(cls, net: nn.Module, names: Iterable[str], qkv: str = "fused") -> Layout:
        """The layout of the parameters ``names``.

        Args:
            qkv: 'fused': queries, keys and values share one B, in one layer or in three; 'split': each has its own.

        Raises:
            UserError: a parameter for which there are no factors.
        """
        names, modules = list(names), dict(net.named_modules())
        linear, norms, tokens = {}, [], []
        for name in names:
            owner, _, key = name.rpartition(".")
            parameter = modules[owner]._parameters[key]
            if isinstance(modules[owner], nn.Linear):
                linear.setdefault(owner, set()).add(key)
            elif isinstance(modules[owner], nn.LayerNorm) and len(modules[owner].normalized_shape) == 1:
                norms.append(name)
            elif parameter.numel() == parameter.shape[-1] and type(modules[owner]).forward is not nn.Conv2d.forward:
                tokens.append(name)
            else:
                raise UserError(
                    f"there is no curvature for {name} {tuple(parameter.shape)}: only linear layers, LayerNorms and "
                    "class tokens have it; leave it frozen"
                )
        for owner, keys in linear.items():
            if "weight" not in keys:
                raise UserError(f"there is no curvature for {owner}.bias without {owner}.weight: train both or none")
        blocks, taken = [], set()
        for owner, keys in linear.items():
            if owner in taken:
                continue
            parent, dot, last = owner.rpartition(".")
            family = [parent + dot + k for k in JOINT] if last in JOINT and qkv == "fused" else [owner]
            family = family if all(linear.get(n) == keys for n in family) else [owner]
            parts = 3 if last == "qkv" and qkv == "split" else 1
            blocks.append(Block(tuple(family), "bias" in keys, parts))
            taken |= set(family)
        return cls(tuple(blocks), tuple(norms), tuple(tokens))

    @property
    def full(self) -> tuple[str, ...]:
        """Parameters with a block of G itself."""
        return self.norms + self.tokens


class _Sums:
    """Sums over the images of a data set, whose parts add up (``+``); has ``tensors``, ``with_tensors`` and ``n``."""

    def __add__(self, other):
        theirs = other.tensors()
        return self.with_tensors({k: t + theirs[k] for k, t in self.tensors().items()}, self.n + other.n)


@dataclass
class Curvature(_Sums):
    """Sums over ``n`` images: A and B by block, F by parameter."""

    layout: Layout
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    F: dict[str, Tensor]
    n: int = 0

    @classmethod
    def zeros(cls, layout: Layout, net: nn.Module, dtype: torch.dtype | None = None) -> Curvature:
        """Nothing seen yet; on the network's device, in float64 where it has it."""
        like = dict(net.named_parameters())

        def square(*shape: int) -> Tensor:
            p = next(iter(like.values()))
            return torch.zeros(*shape, shape[-1], dtype=dtype or wide(p), device=p.device)

        D = {b.name: b.join(like) for b in layout.blocks}
        return cls(
            layout,
            {n: square(d.shape[2]) for n, d in D.items()},
            {n: square(*d.shape[:2]) for n, d in D.items()},
            {n: square(like[n].numel()) for n in layout.full},
        )

    def tensors(self) -> dict[str, Tensor]:
        """{'A.block': ..., 'B.block': ..., 'F.parameter': ...}."""
        return {f"{k}.{n}": t for k in "ABF" for n, t in getattr(self, k).items()}

    def with_tensors(self, tensors: Mapping[str, Tensor], n: int) -> Curvature:
        """The same layout with other tensors, named as in :meth:`tensors`."""
        parts = {k: {name[2:]: t for name, t in tensors.items() if name.startswith(f"{k}.")} for k in "ABF"}
        return replace(self, **parts, n=n)


# ---------------------------------------------------------------- statistics


class _Tape:
    """What enters the layers of a layout and what leaves them, with its graph, in one forward pass."""

    def __init__(self, net: nn.Module, layout: Layout):
        self.net, self.inputs, self.outputs = net, {}, {}
        self.names = [n for b in layout.blocks for n in b.layers]
        self.names += list(dict.fromkeys(n.rpartition(".")[0] for n in layout.norms))

    def hook(self, name: str) -> Callable:
        def forward_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if name in self.outputs:
                raise UserError(f"{name} is used twice in one forward pass: such layers have no curvature here")
            self.inputs[name] = args[0].detach()
            self.outputs[name] = output if output.requires_grad else output.requires_grad_()
            return self.outputs[name]

        return forward_hook

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.inputs, self.outputs = {}, {}
        handles = [self.net.get_submodule(n).register_forward_hook(self.hook(n)) for n in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Rows:
    """Of a batch of B images: what enters and, for each of K cotangents s, the gradients of <f, s>, by image.

    ``a``: {layer: (B, R, inputs)}, for LayerNorms before the affine map. ``g``: {layer: (K, B, R, outputs)} and {token:
    (K, B, D)}. ``weight``: what the square of each gradient counts.
    """

    a: dict[str, Tensor]
    g: dict[str, Tensor]
    weight: float
    first: bool = True  # whether this batch's a have not been given before

    @property
    def images(self) -> int:
        """B."""
        return next(iter(self.g.values())).shape[1]


def gradients(
    net: nn.Module,
    layout: Layout,
    function: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    draws: int,
    generator: torch.Generator | None,
) -> Iterator[Rows]:
    """Gradients of f = ``function`` image by image, a few cotangents at a time (the arguments of :func:`curvature`)."""
    tape, tokens, parameters = _Tape(net, layout), places_of(net, layout.tokens), dict(net.named_parameters())
    for x in batches:
        # every image gets a class token of its own, whose gradient is then the image's
        own = {n: parameters[n].detach().reshape(1, 1, -1).repeat(len(x), 1, 1).requires_grad_() for n in tokens}
        with (
            evaluating(net),
            differentiable_forward(net),
            torch.enable_grad(),
            tape.recording(),
            in_place(tokens, own),
        ):
            f = function(x)
        leaves = {**tape.outputs, **own}
        if draws:
            s = torch.randn(draws, *f.shape, generator=generator).to(f)
        else:
            s = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, *f.shape)
        a = {n: _by_image(_seen(net.get_submodule(n), v)) for n, v in tape.inputs.items()}
        for i, some in enumerate(s.split(CHUNK)):
            g = torch.autograd.grad(
                f, list(leaves.values()), some, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
            g = {n: t.new_zeros(len(some), *t.shape) if d is None else d for (n, t), d in zip(leaves.items(), g)}
            g = {n: d.flatten(1).unflatten(1, (len(x), -1)) if n in own else _by_image(d, 1) for n, d in g.items()}
            yield Rows(a, g, 1 / draws if draws else 1.0, i == 0)


def _by_image(t: Tensor, lead: int = 0) -> Tensor:
    """(B, ..., d) -> (B, R, d), after ``lead`` leading dimensions."""
    return t.unsqueeze(-2) if t.dim() == lead + 2 else t.flatten(lead + 1, -2)


def _seen(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies with its weight."""
    return F.layer_norm(x, module.normalized_shape, eps=module.eps) if isinstance(module, nn.LayerNorm) else x


def _gram(rows: Tensor, into: Tensor, weight: float) -> None:
    """Add weight * rows^T rows (..., d, d) for rows (..., n, d)."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    into += weight * (rows.mT @ rows).to(into.dtype)


def curvature(
    net: nn.Module,
    layout: Layout,
    function: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    draws: int = 1,
    mode: str = "official",
    generator: torch.Generator | None = None,
) -> Curvature:
    """The factors of f = ``function`` at the weights as they are, in one pass over the data.

    Args:
        function: images (B, ...) -> (B, C), a call of ``net``; the network is in evaluation mode meanwhile.
        batches: of images, as in a test. draws: cotangents drawn for each image, or 0 for all C unit vectors.
        mode: of :data:`MODES`. generator: on the CPU, for the draws.
    """
    total = Curvature.zeros(layout, net)
    with torch.no_grad(), exact_float32():
        for rows in gradients(net, layout, function, batches, draws, generator):
            _add(total, rows, mode)
    return total


def _add(total: Curvature, rows: Rows, mode: str) -> None:
    for block in total.layout.blocks:
        a = rows.a[block.layers[0]]
        g = torch.cat([rows.g[n] for n in block.layers], -1)
        tokens = a.shape[1]
        if mode == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        if rows.first:
            seen = torch.cat((a, torch.ones_like(a[..., :1])), -1) if block.bias else a
            _gram(seen.flatten(0, -2), total.A[block.name], 1 / a.shape[1])
        g = g.flatten(0, -2).unflatten(1, (block.parts, -1)).transpose(0, 1)
        _gram(g, total.B[block.name], rows.weight / (tokens if mode == "official" else 1))
    for name in total.layout.norms:
        layer, _, key = name.rpartition(".")
        g = rows.g[layer] * rows.a[layer] if key == "weight" else rows.g[layer]
        _gram(g.sum(2).flatten(0, 1), total.F[name], rows.weight)
    for name in total.layout.tokens:
        _gram(rows.g[name].flatten(0, 1), total.F[name], rows.weight)
    if rows.first:
        total.n += rows.images


@dataclass
class Diagonal(_Sums):
    """The diagonal of sum_x J^T J itself over ``n`` images, {parameter: like it}: a smaller :class:`Curvature`."""

    D: dict[str, Tensor]
    n: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """{'D.parameter': ...}."""
        return {f"D.{n}": t for n, t in self.D.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor], n: int) -> Diagonal:
        return replace(self, D={name[2:]: t for name, t in tensors.items()}, n=n)


def ggn_diagonal(
    net: nn.Module,
    layout: Layout,
    function: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    draws: int = 0,
    generator: torch.Generator | None = None,
) -> Diagonal:
    """The diagonal of the matrix itself, for all parameters of the layout. Arguments: :func:`curvature`.

    Gradients of weights are summed over an image's tokens before they are squared.
    """
    parameters, n = dict(net.named_parameters()), 0
    keys = {b: ("weight", "bias") if b.bias else ("weight",) for b in layout.blocks}
    names = [f"{layer}.{k}" for b in layout.blocks for layer in b.layers for k in keys[b]]
    total = {m: torch.zeros_like(parameters[m], dtype=wide(parameters[m])) for m in (*names, *layout.full)}
    with torch.no_grad(), exact_float32():
        for rows in gradients(net, layout, function, batches, draws, generator):
            n += rows.images if rows.first else 0
            for name in total:
                layer, _, key = name.rpartition(".")
                if name in layout.tokens:
                    squares = rows.g[name].square().sum((0, 1))
                elif key == "bias":
                    squares = rows.g[layer].sum(2).square().sum((0, 1))
                elif name in layout.norms:
                    squares = (rows.g[layer] * rows.a[layer]).sum(2).square().sum((0, 1))
                else:  # image by image: their gradients are as large as the weight
                    squares = sum((g.mT @ a).square().sum(0) for a, g in zip(rows.a[layer], rows.g[layer].unbind(1)))
                total[name] += rows.weight * squares.reshape(total[name].shape).to(total[name].dtype)
    return Diagonal(total, n)


# ---------------------------------------------------------------- the other tasks


@dataclass
class References:
    """Curvature of several data sets in the room of one (arXiv 2602.17385, eq. 8); any can be taken out again.

        A = sum_t S_A,t / sum_t n_t,    B = sum_t S_B,t / n_t,    F = sum_t S_F,t / sum_t n_t

    B is a sum and not a mean, so that for T equal tasks the Kronecker blocks weigh T times as much as in eq. 7.
    """

    total: Curvature | Diagonal | None = None

    def add(self, task: Curvature | Diagonal, sign: int = 1) -> None:
        """Add the curvature of a data set, or with ``sign`` -1 take it out."""
        parts = {n: sign * (t / task.n if n.startswith("B.") else t) for n, t in task.tensors().items()}
        if self.total is None:
            self.total = task.with_tensors(parts, sign * task.n)
        else:
            mine = self.total.tensors()
            self.total = task.with_tensors({n: mine[n] + t for n, t in parts.items()}, self.total.n + sign * task.n)

    def without(self, task: Curvature | Diagonal) -> References:
        """All but one."""
        rest = References(self.total)
        rest.add(task, -1)
        return rest

    def mean(self) -> Curvature | Diagonal | None:
        """A, B and F as above, with n = 1; None if there is nothing."""
        if self.total is None or self.total.n <= 0:
            return None
        n = self.total.n
        return self.total.with_tensors(
            {k: t if k.startswith("B.") else t / n for k, t in self.total.tensors().items()}, 1
        )


def each(tasks: Sequence[Curvature | Diagonal]) -> list[tuple[float, Curvature | Diagonal]]:
    """The tasks one by one, as eq. 7 has them: (lambda_t = n_t / sum n, means with n = 1)."""
    n = sum(t.n for t in tasks)
    return [(t.n / n, t.with_tensors({k: v / t.n for k, v in t.tensors().items()}, 1)) for t in tasks]


class Penalty:
    """sum_t lambda_t sum_blocks scale tau^T (B_t (x) A_t) tau, with its gradient in closed form; equal shapes at once.

    Args:
        terms: (lambda_t, curvature with n = 1), of one layout. scale: {block or parameter: factor}; default 1.
        like: parameters {name: tensor}, for their type and device.
    """

    def __init__(
        self,
        terms: Sequence[tuple[float, Curvature]],
        like: Mapping[str, Tensor],
        scale: Mapping[str, float] | None = None,
    ):
        self.stacks: list[tuple[list[Block], Tensor, Tensor]] = []
        scale, first = scale or {}, terms[0][1]
        kind = next(iter(like.values()))

        def stacked(key: str, names: Sequence[str], weighted: bool = True) -> Tensor:
            """(terms, names, ..., d, d), times lambda_t and scale if ``weighted``."""
            rows = []
            for lam, t in terms:
                weights = [lam * scale.get(n, 1.0) if weighted else 1.0 for n in names]
                rows.append(torch.stack([w * getattr(t, key)[n] for n, w in zip(names, weights)]))
            return torch.stack(rows).to(kind)

        shapes: dict[tuple, list[Block]] = {}
        for block in first.layout.blocks:
            shapes.setdefault((first.A[block.name].shape, first.B[block.name].shape), []).append(block)
        for blocks in shapes.values():
            names = [b.name for b in blocks]
            self.stacks.append((blocks, stacked("B", names), stacked("A", names, weighted=False)))
        sizes: dict[torch.Size, list[str]] = {}
        for name in first.layout.full:
            sizes.setdefault(first.F[name].shape, []).append(name)
        self.full = [(names, stacked("F", names)) for names in sizes.values()]

    @torch.no_grad()
    def __call__(self, tau: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(value, {parameter: gradient}) at a task vector that has all parameters of the layout."""
        value, grads = None, {}
        with exact_float32():
            for blocks, B, A in self.stacks:
                D = torch.stack([b.join(tau) for b in blocks])  # (blocks, parts, rows, inputs)
                P = (B @ (D @ A[:, :, None])).sum(0)
                part = (P * D).sum()
                value = part if value is None else value + part
                for b, p in zip(blocks, P):
                    grads |= b.split(2 * p, tau)
            for names, M in self.full:
                d = torch.stack([tau[n].flatten() for n in names])
                p = (M @ d[..., None]).squeeze(-1).sum(0)
                part = (p * d).sum()
                value = part if value is None else value + part
                grads |= {n: 2 * g.view_as(tau[n]) for n, g in zip(names, p)}
        return value, grads


class DiagonalPenalty:
    """sum_t lambda_t sum_j scale d_tj tau_j^2, and its gradient; arguments and result as of :class:`Penalty`."""

    def __init__(
        self,
        terms: Sequence[tuple[float, Diagonal]],
        like: Mapping[str, Tensor],
        scale: Mapping[str, float] | None = None,
    ):
        scale = scale or {}
        self.d = {n: (scale.get(n, 1.0) * sum(lam * t.D[n] for lam, t in terms)).to(like[n]) for n in terms[0][1].D}

    @torch.no_grad()
    def __call__(self, tau: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        moved = {n: d * tau[n] for n, d in self.d.items()}
        value = sum((m * tau[n]).sum() for n, m in moved.items())
        return value, {n: 2 * m for n, m in moved.items()}


# ---------------------------------------------------------------- smaller, and on disk


def _edges(d: int, blocks: int) -> list[int]:
    blocks = min(blocks, d)
    return [d * i // blocks for i in range(blocks + 1)]


def pack(M: Tensor, blocks: int = 1) -> Tensor:
    """The triangles of the diagonal blocks of symmetric M (..., d, d), joined: (..., about d^2 / (2 blocks))."""
    e = _edges(M.shape[-1], blocks)
    return torch.cat([pack_triu(M[..., i:j, i:j]) for i, j in zip(e, e[1:])], -1)


def unpack(packed: Tensor, d: int, blocks: int = 1) -> Tensor:
    """The inverse of :func:`pack` for matrices of size d; outside the blocks there are zeros."""
    e = _edges(d, blocks)
    M = packed.new_zeros(*packed.shape[:-1], d, d)
    sizes = [(j - i) * (j - i + 1) // 2 for i, j in zip(e, e[1:])]
    for i, j, triangle in zip(e, e[1:], packed.split(sizes, -1)):
        M[..., i:j, i:j] = unpack_triu(triangle)
    return M


def packed(factors: Curvature | Diagonal, blocks: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What is stored or sent of factors: triangles (:func:`pack`), and diagonals as they are."""
    return {n: (t if n.startswith("D.") else pack(t, blocks)).to(dtype) for n, t in factors.tensors().items()}


def unpacked(
    tensors: Mapping[str, Tensor], like: Curvature | Diagonal, n: int, blocks: int = 1
) -> Curvature | Diagonal:
    """The inverse of :func:`packed`, in the type and on the device of ``like``."""
    return like.with_tensors(
        {
            name: tensors[name].to(t) if name.startswith("D.") else unpack(tensors[name].to(t), t.shape[-1], blocks)
            for name, t in like.tensors().items()
        },
        n,
    )


def fingerprint(net: nn.Module, **settings) -> dict[str, str]:
    """What a file of factors belongs to: the weights of the network's body and what the settings say, as strings."""
    weights = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(net.state_dict().items()):
        if not name.startswith("classifier."):
            weights.update(f"{name} {digest(tensor)}".encode())
    return {"weights": weights.hexdigest(), **{k: str(v) for k, v in settings.items()}}


def save(file: Path, factors: Curvature | Diagonal, belongs: Mapping[str, str]) -> None:
    """Write factors (safetensors, float32), whole or not at all. ``belongs``: their :func:`fingerprint`."""
    tensors = {n: t.cpu().contiguous() for n, t in packed(factors).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, "curvature ") as temporary:
        save_file(tensors, temporary, {"n": str(factors.n), "belongs": json.dumps(dict(belongs))})


def load(file: Path, like: Curvature | Diagonal, belongs: Mapping[str, str]) -> Curvature | Diagonal:
    """What :func:`save` wrote, in the type and on the device of ``like`` (anything of that layout).

    Raises:
        UserError: the file is damaged, or belongs to other weights, data or settings (the first difference is named).
    """
    try:
        with safe_open(file, "pt") as f:
            about = f.metadata()
            written = json.loads(about["belongs"])
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    except Exception as e:
        raise UserError(f"{file} cannot be read as curvature ({e}): delete it, it will be computed again") from e
    for key in sorted({*written, *belongs}):
        if written.get(key) != belongs.get(key):
            raise UserError(
                f"{file} was computed with {key} = {written.get(key)}, this run has {belongs.get(key)}: use another "
                "folder, or delete the file"
            )
    return unpacked(tensors, like, int(about["n"]))
