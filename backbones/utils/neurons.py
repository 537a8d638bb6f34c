"""The leaky integrate-and-fire neuron of the spiking backbones, over a whole sequence (T, N, ...) at once.

A *convention* says when the neuron fires and when its threshold is subtracted (theta, decay beta, input I, spike s):

    gt-post   u_t = beta u_{t-1} + I_t - theta s_{t-1},    s_t = [u_t > theta]     snntorch, and so STAER's experiments
    ge-pre    u_t = beta (u_{t-1} - theta s_{t-1}) + I_t,  s_t = [u_t >= theta]    SpikingJelly's ``LIFNode``
    gt-pre, ge-post                                                                what lies between the two

They are different networks: under a constant input of 1 the first spikes at every second step, the second at every one.
The reset passes no gradient, so that with the surrogate h of the step function all four have the same backward pass,

    g_t = (dL/ds_t) h(u_t - theta) + beta g_{t+1},   dL/dI_t = g_t,   h(x) = (alpha / 2) / (1 + (pi alpha x / 2)^2).

:class:`LIF` is a SpikingJelly node, so that SpikingJelly's monitors, counters and ``functional.reset_net`` work on it.
Importing this module needs SpikingJelly (0.0.0.0.14 or 2.0.0).
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from utils.errors import UserError

try:
    from spikingjelly.activation_based import functional, neuron, surrogate
except ModuleNotFoundError as e:
    raise UserError(
        f"spiking backbones need SpikingJelly (no module {e.name!r}): pip install -r requirements-spiking.txt"
    ) from e

triton = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    try:
        import triton
        import triton.language as tl
    except ImportError:
        pass

CONVENTIONS = ("gt-post", "ge-pre", "gt-pre", "ge-post")
BLOCK = 1024  # neurons that one program of a kernel simulates


class Rule(NamedTuple):
    """The numbers of a neuron: decay, threshold, width of the surrogate, fires at equality, resets before the decay."""

    beta: float = 0.5
    theta: float = 1.0
    alpha: float = 2.0
    ge: bool = False
    pre: bool = False


class Spike(torch.autograd.Function):
    """The step function [x > 0] (with ``ge`` [x >= 0]), whose derivative in the backward pass is the surrogate h(x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, alpha, ge):
        return (x >= 0 if ge else x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.alpha = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (ctx.alpha / 2) / (1 + (math.pi / 2 * ctx.alpha * x) ** 2), None, None


def lif_loop(x_seq: torch.Tensor, v: torch.Tensor | None, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """The neuron written out step by step, with autograd's backward pass: for torch.compile, which fuses it, and vmap.

    Args:
        x_seq: inputs (T, N, ...). v: the state left by earlier steps (N, ...): u for a reset after the decay, u less
            the reset for one before; None: rest.

    Returns:
        spikes (T, N, ...) in the type of ``x_seq``; u (T, N, ...), at least float32.
    """
    us, spikes = [], []
    u, s = v, None
    if v is not None and not rule.pre:
        s = (v >= rule.theta if rule.ge else v > rule.theta).to(v.dtype)
    for x in x_seq.to(_wide(x_seq)).unbind():
        if u is None:
            u = x
        elif s is None:
            u = rule.beta * u + x
        elif rule.pre:
            u = rule.beta * (u - rule.theta * s) + x
        else:
            u = rule.beta * u + x - rule.theta * s
        fired = Spike.apply(u - rule.theta, rule.alpha, rule.ge)
        s = fired.detach()
        us.append(u)
        spikes.append(fired)
    return torch.stack(spikes).to(x_seq.dtype), torch.stack(us)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Recurrence(torch.autograd.Function):
    """:func:`lif_loop` with the closed-form backward pass: in place, or with ``kernels`` as one Triton kernel each way.

    Where no gradient is wanted (``keep`` False), u is not kept but for the last step.
    """

    @staticmethod
    def forward(x_seq, v, rule, keep, kernels):
        return (_forward_triton if kernels else _forward)(x_seq, v, rule, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x_seq, v, ctx.rule, ctx.keep, ctx.kernels = inputs
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.has_v = x_seq.dtype, v is not None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_s, grad_u):
        (u,) = ctx.saved_tensors
        if grad_s is None:
            grad_s = torch.zeros_like(u)
        g = (_backward_triton if ctx.kernels else _backward)(u, grad_s, grad_u, ctx.dtype, ctx.rule)
        return g, ctx.rule.beta * g[0].to(u.dtype) if ctx.has_v else None, None, None, None


def _forward(x_seq, v, rule, keep):
    fires = torch.ge if rule.ge else torch.gt
    s = torch.empty_like(x_seq)
    u = torch.empty_like(x_seq if keep else x_seq[:1], dtype=_wide(x_seq))
    prev, reset = v, None
    if v is not None and not rule.pre:
        reset = fires(v, rule.theta).to(v.dtype)
    for x, now, fired in zip(x_seq.unbind(), u.unbind() if keep else len(x_seq) * [u[0]], s.unbind()):
        if prev is None:
            now.copy_(x)
        elif rule.pre and reset is not None:
            torch.sub(prev, reset, alpha=rule.theta, out=now)
            torch.add(x, now, alpha=rule.beta, out=now)
        else:
            torch.add(x, prev, alpha=rule.beta, out=now)
            if reset is not None:
                now.sub_(reset, alpha=rule.theta)
        prev, reset = now, fires(now, rule.theta, out=fired)
    return s, u


def _backward(u, grad_s, grad_u, dtype, rule):
    g, width = u - rule.theta, 2 / rule.alpha
    torch.addcmul(u.new_full((), width), g, g, value=width * (math.pi / 2 * rule.alpha) ** 2, out=g)  # 1 / h
    torch.div(grad_s, g, out=g)
    if grad_u is not None:
        g += grad_u
    steps = g.unbind()
    for now, later in zip(steps[-2::-1], steps[:0:-1]):
        now.add_(later, alpha=rule.beta)
    return g.to(dtype)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x_ptr,
        v_ptr,
        s_ptr,
        u_ptr,
        n,
        x_step,
        u_step,
        beta,
        theta,
        T: tl.constexpr,
        HAS_V: tl.constexpr,
        GE: tl.constexpr,
        PRE: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        inside = at < n
        u = tl.zeros((SIZE,), tl.float32)
        s = tl.zeros((SIZE,), tl.float32)
        if HAS_V:
            u = tl.load(v_ptr + at, mask=inside, other=0.0)
            if not PRE:
                s = (u >= theta).to(tl.float32) if GE else (u > theta).to(tl.float32)
        for t in tl.static_range(T):
            x = tl.load(x_ptr + t * x_step + at, mask=inside, other=0.0).to(tl.float32)
            if PRE:
                u = (u - theta * s) * beta + x
            else:
                u = u * beta + x - theta * s
            s = (u >= theta).to(tl.float32) if GE else (u > theta).to(tl.float32)
            tl.store(s_ptr + t * n + at, s, mask=inside)
            tl.store(u_ptr + t * u_step + at, u, mask=inside)

    @triton.jit
    def _backward_kernel(
        u_ptr,
        gs_ptr,
        gu_ptr,
        out_ptr,
        n,
        gs_step,
        beta,
        theta,
        half,
        width,
        T: tl.constexpr,
        HAS_GU: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        inside = at < n
        g = tl.zeros((SIZE,), tl.float32)
        for i in tl.static_range(T):
            t = T - 1 - i
            d = tl.load(u_ptr + t * n + at, mask=inside, other=0.0) - theta
            gs = tl.load(gs_ptr + t * gs_step + at, mask=inside, other=0.0).to(tl.float32)
            g = g * beta + gs * half / (1.0 + width * d * d)
            if HAS_GU:
                g += tl.load(gu_ptr + t * n + at, mask=inside, other=0.0)
            tl.store(out_ptr + t * n + at, g, mask=inside)


def _steps(x: torch.Tensor) -> torch.Tensor:
    """``x`` with each step contiguous; an expanded sequence (the same tensor at every step) stays a view."""
    return x if x[0].is_contiguous() else x.contiguous()


def _forward_triton(x_seq, v, rule, keep):
    x_seq, n = _steps(x_seq), x_seq[0].numel()
    s = torch.empty(x_seq.shape, dtype=x_seq.dtype, device=x_seq.device)
    u = torch.empty((len(x_seq) if keep else 1, *x_seq.shape[1:]), dtype=torch.float32, device=x_seq.device)
    _forward_kernel[(triton.cdiv(n, BLOCK),)](
        x_seq,
        u if v is None else v.contiguous(),
        s,
        u,
        n,
        x_seq.stride(0),
        n if keep else 0,
        rule.beta,
        rule.theta,
        T=len(x_seq),
        HAS_V=v is not None,
        GE=rule.ge,
        PRE=rule.pre,
        SIZE=BLOCK,
        enable_fp_fusion=False,  # as the loop rounds
    )
    return s, u


def _backward_triton(u, grad_s, grad_u, dtype, rule):
    grad_s, n = _steps(grad_s), u[0].numel()
    out = torch.empty(u.shape, dtype=dtype, device=u.device)
    _backward_kernel[(triton.cdiv(n, BLOCK),)](
        u,
        grad_s,
        u if grad_u is None else grad_u.contiguous(),
        out,
        n,
        grad_s.stride(0),
        rule.beta,
        rule.theta,
        rule.alpha / 2,
        (math.pi / 2 * rule.alpha) ** 2,
        T=len(u),
        HAS_GU=grad_u is not None,
        SIZE=BLOCK,
        enable_fp_fusion=False,
    )
    return out


class LIF(neuron.LIFNode):
    """A layer of leaky integrate-and-fire neurons without parameters.

    In SpikingJelly's step mode 'm', the default, the input is a whole sequence (T, N, ...) that starts from rest: what
    an earlier forward pass has left is neither used nor changed. With ``carry`` the state ``v`` goes on from one
    call to the next until ``reset()``, as in SpikingJelly; in step mode 's' (inputs (N, ...)) it always does. The
    membrane is float32 (or float64) and the spikes have the type of the input, so that autocast leaves neurons alone.

    Args:
        convention: when to fire and when to reset, see the module. beta: decay. theta: threshold. alpha: of h.
        fused: the closed-form recurrence, on CUDA as one kernel (SpikingJelly's own for 'ge-pre' where it has one,
            else Triton's); False: :func:`lif_loop`.
    """

    def __init__(
        self,
        convention: str = "gt-post",
        beta: float = 0.5,
        theta: float = 1.0,
        alpha: float = 2.0,
        fused: bool = True,
        carry: bool = False,
        step_mode: str = "m",
    ) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {convention!r}: choose from {', '.join(CONVENTIONS)}")
        super().__init__(
            tau=1 / (1 - beta),
            decay_input=False,
            v_threshold=theta,
            v_reset=None,
            surrogate_function=surrogate.ATan(alpha),
            detach_reset=True,
            step_mode=step_mode,
        )
        self.convention, self.fused, self.carry = convention, fused, carry
        self.rule = Rule(beta, theta, alpha, convention.startswith("ge"), convention.endswith("pre"))

    def extra_repr(self) -> str:
        return f"{self.convention}, beta={self.rule.beta}, theta={self.rule.theta}, step_mode={self.step_mode}"

    def _simulate(self, x_seq: torch.Tensor, v, last: bool, trace: bool = False):
        """Spikes, the state after the last step (None unless ``last``) and after every step (None unless ``trace``)."""
        rule, wide = self.rule, _wide(x_seq)
        if not isinstance(v, torch.Tensor) or v.shape != x_seq.shape[1:]:
            v = None
        else:
            v = v.to(device=x_seq.device, dtype=wide)
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        fused = self.fused and not plain
        if fused and x_seq.is_cuda and rule.ge and rule.pre and hasattr(functional, "lif_multi_step"):
            rest = torch.zeros_like(x_seq[0], dtype=wide) if v is None else v
            return functional.lif_multi_step(
                x_seq, rest, self.tau, False, rule.theta, None, self.surrogate_function, True, trace
            )
        if fused:
            keep = trace or (torch.is_grad_enabled() and (x_seq.requires_grad or (v is not None and v.requires_grad)))
            kernels = triton is not None and x_seq.is_cuda and wide == torch.float32
            s, u = Recurrence.apply(x_seq, v, rule, keep, kernels)
        else:
            s, u = lif_loop(x_seq, v, rule)
        if not last and not trace:
            return s, None, None
        if rule.pre:
            u = u - rule.theta * s[-len(u) :].detach()
        return s, u[-1], u if trace else None

    def multi_step_forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        spikes, v, trace = self._simulate(x_seq, self.v if self.carry else None, self.carry, self.store_v_seq)
        if self.carry:
            self.v = v
        if self.store_v_seq:
            self.v_seq = trace
        return spikes

    def single_step_forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes, self.v, _ = self._simulate(x[None], self.v, True)
        return spikes[0]

    # SpikingJelly 2's stateless interface

    def multi_step_functional_forward(self, inputs, states, **_):
        spikes, v, _trace = self._simulate(inputs[0], states[0], True)
        return (spikes,), (v, *states[1:])

    def single_step_functional_forward(self, inputs, states, **_):
        (spikes,), states = self.multi_step_functional_forward((inputs[0][None],), states)
        return (spikes[0],), states
