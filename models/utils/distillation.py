"""How far the answers of a network are from those of its teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """-mean_x sum_j q_j log p_j, p = softmax(student / T), q = softmax(teacher / T), of logits (B, C): a scalar.

    In float32 at least: a logarithm of a softmax in float16 may be infinite.
    """
    student, teacher = (z.to(torch.promote_types(z.dtype, torch.float32)) / T for z in (student, teacher))
    return -(F.softmax(teacher, 1) * F.log_softmax(student, 1)).sum(1).mean()


def divergence(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row of logits (B, C): (B,)."""
    log_p, log_q = F.log_softmax(student / T, 1), F.log_softmax(teacher / T, 1)
    return T * T * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
