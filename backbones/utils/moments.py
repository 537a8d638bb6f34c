"""Uncentred second moments of what enters linear layers, accumulated on the device while data streams through."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backbones.utils.targets import linear_layers


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, float32 products are not rounded to TF32 or bfloat16, whatever the run has chosen."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


class _Watch:
    """The forward pre-hook of one layer."""

    def __init__(self, owner: "InputMoments", name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.owner.add(self.name, args[0] if args else kwargs["input"])


class InputMoments:
    """Sums of x x^T over all tokens that enter the linear layers named by ``targets``, within a ``with`` block.

    ``sums[layer]`` is a d x d tensor (or what the options make of it) and ``counts[layer]`` the number of tokens, so
    their quotient (:meth:`means`) is the moment that GPM (arXiv 2103.09762) and its successors take subspaces from, and
    the sum the Gram matrix of RegMean. Sums of several clients add up to the sums over all their data. Entering the
    block again goes on adding.

    Args:
        targets: names, ends of names or globs of linear layers, as in ``LoRA``, without slices. ValueError if unknown.
        dtype: of the sums; float64 costs time on most GPUs, float32 is summed at full precision, without autocast.
        diagonal: only the sums of x^2, a vector (d,): no d x d matrix is made.
        through: {layer: A (r x d)}: the moments of A x, r x r, for the layers it names.
    """

    def __init__(
        self,
        net: nn.Module,
        targets: str | Sequence[str],
        dtype: torch.dtype = torch.float32,
        diagonal: bool = False,
        through: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.net, self.dtype, self.diagonal, self.through = net, dtype, diagonal, through or {}
        self.names = list(linear_layers(net, targets))
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._handles = []

    def __enter__(self) -> "InputMoments":
        if self._handles:
            raise RuntimeError("these moments are already being collected")
        self._handles = [
            self.net.get_submodule(n).register_forward_pre_hook(_Watch(self, n), with_kwargs=True) for n in self.names
        ]
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def add(self, name: str, x: Tensor) -> None:
        """Add the tokens x (... x d) of one layer."""
        x = x.detach().reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False), exact_float32():
            x = x.to(self.dtype)
            if name in self.through:
                x = x @ self.through[name].detach().to(self.dtype).T
            if name not in self.sums:
                shape = x.shape[1:] if self.diagonal else (x.shape[1], x.shape[1])
                self.sums[name] = torch.zeros(shape, dtype=self.dtype, device=x.device)
                self.counts[name] = 0
            if self.diagonal:
                self.sums[name] += x.square().sum(0)
            else:
                self.sums[name].addmm_(x.T, x)
        self.counts[name] += x.shape[0]

    def means(self) -> dict[str, Tensor]:
        """{layer: mean of x x^T}, for the layers that saw data."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}

    def reset(self) -> None:
        """Forget all sums and counts."""
        self.sums, self.counts = {}, {}
