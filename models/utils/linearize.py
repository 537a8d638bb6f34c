"""The tangent regime: a network replaced by its first-order expansion around pretrained weights (TAK, SATA).

    f_lin(x, tau) = f(x, theta_0) + J(x) tau,   J = d f / d theta at theta_0         (Ortiz-Jimenez et al. 2023, eq. 3)

f_lin is linear in tau, so task vectors add up in function space. It also makes a training step cheap: the gradient of a
loss in tau is J(x)^T dL/df_lin, one ordinary backward pass of the network at theta_0. Differentiating through the
forward-mode product instead, as published code does, keeps every tangent intermediate as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbones.utils.base import plain_attention
from models.utils.federated_model import in_place
from utils.evaluate import evaluating

with warnings.catch_warnings():  # torch warns of its own use of torch.jit when this is first needed
    warnings.simplefilter("ignore")
    import torch._decomp.decompositions_for_jvp

Tensors = Mapping[str, Tensor]


def places_of(net: nn.Module, names: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """{name: (module, name within it)} of parameters of ``net`` by their full names; KeyError if unknown."""
    known, out = dict(net.named_parameters(remove_duplicate=False)), {}
    for name in names:
        if name not in known:
            raise KeyError(name)
        module, _, key = name.rpartition(".")
        out[name] = net.get_submodule(module), key
    return out


@contextmanager
def differentiable_forward(net: nn.Module) -> Iterator[None]:
    """Within the block attention has derivatives in forward mode, which the fused kernels do not."""
    with plain_attention(net), sdpa_kernel(SDPBackend.MATH):
        yield


class Linearized:
    """f(., theta_0) and its derivatives in the parameters ``names`` of ``net``, whose values are theta_0.

    theta_0 is read from the network whenever it is needed and never changed; the network is in evaluation mode
    meanwhile, as f must not depend on the batch or on draws. Of parameters that are not named, and of those of which no
    ``tau`` is given, the tangent is zero, and costs nothing.

    Args:
        net: any module. names: of parameters, as in ``net.named_parameters()``.
        function: x -> f(x) (B, C), a call of ``net`` in one way or another; default: ``net`` itself.
    """

    def __init__(self, net: nn.Module, names: Iterable[str], function: Callable[[Tensor], Tensor] | None = None):
        self.net, self.function = net, function or net
        self.places = places_of(net, names)

    def start(self) -> dict[str, Tensor]:
        """theta_0 {name: tensor}, detached."""
        return {n: module._parameters[key].detach() for n, (module, key) in self.places.items()}

    def zeros(self) -> dict[str, Tensor]:
        """tau = 0."""
        return {n: torch.zeros_like(p) for n, p in self.start().items()}

    def at(self, theta: Tensors, x: Tensor) -> Tensor:
        """f(x, theta), theta {name: tensor} (others: theta_0)."""
        with in_place({n: self.places[n] for n in theta}, theta):
            return self.function(x)

    @torch.no_grad()
    def output(self, x: Tensor) -> Tensor:
        """f(x, theta_0) (B, C), to the bit what :meth:`expansion` says of it."""
        with evaluating(self.net), differentiable_forward(self.net):
            return self.function(x)

    @torch.no_grad()
    def expansion(self, x: Tensor, taus: Iterable[Tensors]) -> tuple[Tensor, list[Tensor]]:
        """f(x, theta_0) (B, C), which a product in forward mode gives as well, and J(x) tau (B, C) for each tau.

        Of a weighted sum of task vectors the answer is the weighted sum: sweeps over coefficients cost no more passes.
        """
        start, f0, products = self.start(), None, []
        with evaluating(self.net), differentiable_forward(self.net):
            for tau in taus:
                moved = {n: start[n] for n in tau}
                f0, product = jvp(lambda theta: self.at(theta, x), (moved,), (dict(tau),))
                products.append(product)
        return self.output(x) if f0 is None else f0, products

    def __call__(self, x: Tensor, tau: Tensors) -> Tensor:
        """f_lin(x, tau) (B, C), without a graph."""
        f0, (product,) = self.expansion(x, [tau])
        return f0 + product

    def tangent(self, x: Tensor, tau: Tensors) -> tuple[Tensor, Tensor]:
        """f(x, theta_0) and J(x) tau (B, C), of which the second has its gradient in tau.

        By f(x, theta_0 + tau - stop(tau)), which is f(x, theta_0) and whose gradient in tau is that of J(x) tau; the
        product itself has no graph. torch.func may map and differentiate this.
        """
        still = {n: t.detach() for n, t in tau.items()}
        _, (product,) = self.expansion(x, [still])
        start = self.start()
        with evaluating(self.net):
            f = self.at({n: start[n] + (t - still[n]) for n, t in tau.items()}, x)
        return f.detach(), product + (f - f.detach())

    def step(
        self, x: Tensor, tau: Tensors, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss of f_lin and its gradient in tau, by one product in forward mode and one backward pass at theta_0.

        Args:
            loss: (f(x, theta_0), J(x) tau), both (B, C) -> scalar; only the second depends on tau.

        Returns:
            (loss, {name: gradient like tau}).
        """
        leaves = {n: t.detach().requires_grad_() for n, t in tau.items()}
        with torch.enable_grad():
            value = loss(*self.tangent(x, leaves))
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return value.detach(), dict(zip(leaves, grads))
