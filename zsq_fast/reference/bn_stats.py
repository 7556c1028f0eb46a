"""Batch-norm statistics: matching loss (GDFQ eq. 2 as coded; ait_family.md section 3), and batch norm with its raw sums."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_fast.reference.number import per_channel, root, wide


def _not_channel(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def bn_stats_match(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = wide(x)
    batch_mean, batch_var = x.mean(_not_channel(x)), x.var(_not_channel(x), correction=0)
    loss = (batch_mean - mean).square().mean() + (batch_var - var).square().mean()
    return loss, batch_mean, batch_var


def bn_stats_match_backward(
    grad_loss: Tensor, x: Tensor, mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor
) -> Tensor:
    k0, k1 = 2 * (batch_mean - mean), 4 * (batch_var - var)
    grad = per_channel(k0, x) + per_channel(k1, x) * (wide(x) - per_channel(batch_mean, x))
    return ((grad_loss / x.numel()) * grad).to(x.dtype)


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as `x * scale + shift`, `[C]` each."""
    scale = (torch.ones_like(var) if weight is None else weight) / root(var + eps)
    return scale, (torch.zeros_like(mean) if bias is None else bias) - mean * scale


def bn_eval_sums(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode, and `[2, C]` sums of (x - mean) and (x - mean)^2 in float64."""
    scale, shift = scale_and_shift(mean, var, weight, bias, eps)
    y = wide(x) * per_channel(scale, x) + per_channel(shift, x)
    centred = x.double() - per_channel(mean.double(), x)
    sums = torch.stack([centred.sum(_not_channel(x)), centred.square().sum(_not_channel(x))])
    return y.to(x.dtype), sums


def bn_eval_sums_backward(
    grad_y: Tensor | None, grad_sums: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    scale, _ = scale_and_shift(mean, var, weight, None, eps)
    first, second = (per_channel(g.to(mean.dtype), x) for g in (grad_sums[0], 2 * grad_sums[1]))
    grad = first + second * (wide(x) - per_channel(mean, x))
    if grad_y is not None:
        grad = wide(grad_y) * per_channel(scale, x) + grad
    return grad.to(x.dtype)


def bn_stats_loss(sums: Tensor, var: Tensor, count: int) -> Tensor:
    """The matching loss from sums over `count` values per channel: those of `bn_eval_sums`, added up over all ranks."""
    shift, square = sums / count
    return (shift.square().mean() + (square - shift.square() - var).square().mean()).to(var.dtype)


def bn_stats_loss_backward(grad_loss: Tensor, sums: Tensor, var: Tensor, count: int) -> Tensor:
    shift, square = sums / count
    far = square - shift.square() - var
    return grad_loss.double() / (count * var.numel()) * torch.stack([2 * shift - 4 * far * shift, 2 * far])
