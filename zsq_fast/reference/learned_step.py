"""Learned step size quantization, LSQ (Esser et al., ICLR 2020, eq. 1 to 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_fast.reference.number import wide


def _steps(x: Tensor, step: Tensor) -> Tensor:
    step = torch.where(step > 0, step, torch.nan)
    return step.view([-1] + [1] * (x.dim() - 1)) if step.numel() > 1 else step.reshape(())


def fake_quant_learned(x: Tensor, step: Tensor, code_min: int, code_max: int, grad_factor: float) -> Tensor:
    """Eq. 1 and 2; `grad_factor` matters to the backward pass only."""
    s = _steps(x, step)
    return (torch.clamp(torch.round(wide(x) / s), code_min, code_max) * s).to(x.dtype)


def fake_quant_learned_backward(
    grad: Tensor, x: Tensor, step: Tensor, code_min: int, code_max: int, grad_factor: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (straight through between the end codes, zero outside) and of the step (times `grad_factor`)."""
    s, g = _steps(x, step), wide(grad)
    position = wide(x) / s
    inside = (position >= code_min) & (position <= code_max)
    slope = torch.where(inside, torch.round(position) - position, torch.clamp(position, code_min, code_max))
    total = (g.double() * slope.double()) * grad_factor
    grad_step = total.unsqueeze(-1).flatten(1).sum(1) if step.numel() > 1 else total.sum().view(1)
    return torch.where(inside, g, torch.zeros_like(g)).to(x.dtype), grad_step.to(step.dtype).view(step.shape)
