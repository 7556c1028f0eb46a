"""Batch norm in eval mode, residual addition, activation and fake quantization as one step."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_fast.reference.bn_stats import scale_and_shift
from zsq_fast.reference.fake_quant import fake_quant_act, not_clamped
from zsq_fast.reference.number import pack, per_channel, root, unpack, wide

CEILING = {"none": None, "relu": None, "relu6": 6.0}


def bn_act_fake_quant(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    lo: Tensor,
    hi: Tensor,
    bits: int,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the mask of the elements that pass a gradient, packed in memory order."""
    scale, shift = scale_and_shift(mean, var, weight, bias, eps)
    y = wide(x) * per_channel(scale, x) + per_channel(shift, x)
    if residual is not None:
        y = y + wide(residual)
    keep = torch.ones_like(y, dtype=torch.bool)
    if activation != "none":
        keep = y > 0
        y = torch.where(y < 0, torch.zeros_like(y), y)  # NaN stays
    if (ceiling := CEILING[activation]) is not None:
        keep = keep & (y < ceiling)
        y = torch.where(y > ceiling, torch.full_like(y, ceiling), y)
    if clip:
        keep = keep & not_clamped(y, lo, hi, bits)
    return fake_quant_act(y, lo, hi, bits).to(x.dtype), pack(keep)


def bn_act_fake_quant_backward(
    grad: Tensor,
    mask: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: bool,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias; those not asked for are empty. `grad` has the strides of x."""
    scale, _ = scale_and_shift(mean, var, weight, None, eps)
    passed = torch.where(unpack(mask, grad), wide(grad), torch.zeros_like(wide(grad)))
    grad_x = (passed * per_channel(scale, x)).to(x.dtype)
    grad_residual = passed.to(x.dtype) if residual else x.new_empty(0)
    if not affine:
        return grad_x, grad_residual, mean.new_empty(0), mean.new_empty(0)
    dims = [d for d in range(x.dim()) if d != 1]
    normalised = (x.double() - per_channel(mean.double(), x)) / per_channel(root(var + eps).double(), x)
    grad_weight, grad_bias = ((passed.double() * factor).sum(dims).to(mean.dtype) for factor in (normalised, 1.0))
    return grad_x, grad_residual, grad_weight, grad_bias
