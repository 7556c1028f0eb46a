"""Data-free rounding of weights: rounding errors that cancel within kernels and output channels (SQuant)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsq_fast import ops
from zsq_fast.nn.layers import QuantConv2d, QuantLinear


def _flips(error: Tensor, free: Tensor, sums: Tensor) -> Tensor:
    """-1, 0 or +1 per entry: the fewest that bring `sums` (over the last dimension, or what it stands for) to at most 1/2.

    Entries flip against their error, the largest error first; only those that are `free` and whose error has the sum's sign.
    """
    sign = sums.sign()[..., None]
    key = torch.where(free, sign * error, 0)
    rank = key.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    needed = (sums.abs() - 0.5).ceil()[..., None]
    return torch.where((rank < needed) & (key > 0), -sign, 0)


@torch.no_grad()
def balanced_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes of a weight whose rounding errors cancel (SQuant: Guo et al., ICLR 2022; its flipping algorithm).

    Starts from rounding to nearest on the min/max grid of every output channel. The error of a code is `code - scale * weight`.
    Largest error first, and no more codes than needed, it then changes

    1. codes of every kernel (the values of one input channel) until the kernel's errors sum to at most 1/2 in magnitude;
    2. one code in each of as many kernels of an output channel as it takes for the channel's errors to sum to at most 1/2: those
       with the largest sums, which may reach 1 by that. Where stage 1 overshot, this takes its last change back.

    A code remains one of the two next to its weight (every error below 1) and within the codes of its channel. Weights at their
    channel's minimum or maximum keep their codes, because they define the grid. Where too few others have an error of the sum's
    sign, the sum stays larger.

    Args:
        weight: `[C, inputs]` or `[C, inputs, ...]`, inputs per group; a linear layer's kernels hold one value each.
        bits: 2 to 8.

    Returns:
        codes like `weight` and scale `[C]`, as from `zsq_fast.ops.weight_codes`.
    """
    nearest, scale, _ = ops.weight_codes(weight, bits)
    if weight.numel() == 0:
        return nearest, scale
    shape = (*weight.shape[:2], -1)
    codes, w = nearest.reshape(shape), weight.reshape(shape)
    lowest, highest = codes.amin((1, 2), keepdim=True), codes.amax((1, 2), keepdim=True)
    inner = (w > w.amin((1, 2), keepdim=True)) & (w < w.amax((1, 2), keepdim=True))
    error = codes.double() - scale.double()[:, None, None] * w.double()  # exact products: the sums decide at 1/2

    kernel = error.sum(2)
    down = kernel[..., None] > 0
    flips = _flips(error, inner & torch.where(down, codes > lowest, codes < highest), kernel)
    codes, error = codes + flips, error + flips

    kernel, channel = error.sum(2), error.sum((1, 2))
    down = channel[:, None, None] > 0
    key = torch.where(down, error, -error)
    largest, at = torch.where(inner & torch.where(down, codes > lowest, codes < highest), key, 0).max(2, keepdim=True)
    codes.scatter_add_(2, at, _flips(kernel, largest[..., 0] > 0, channel)[..., None])
    return torch.empty_like(nearest).copy_(codes.view(weight.shape)), scale


@torch.no_grad()
def balanced_rounding_(model: nn.Module) -> None:
    """Move the float weights of the quantized layers, in place, so that they round to their `balanced_codes`.

    A weight whose code changes moves to the middle of its new cell, `code / scale`, or as near as its channel's range allows;
    from there a student is as unlikely to leave the code as can be. All other weights, among them those that define the
    ranges, keep their bits, so the grids stay. Errors are those of the weights given: a second call would balance the errors of
    the moved weights, and move others.

    Args:
        model: a converted network, see `zsq_fast.nn.convert`.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    for weight, bits in {layer.weight: layer.weight_bits for layer in layers}.items():  # tied weights once
        if weight.numel() == 0:
            continue
        codes, scale = balanced_codes(weight, bits)
        rows = (-1, *[1] * (weight.dim() - 1))
        others = tuple(range(1, weight.dim()))
        middle = (codes / scale.view(rows)).to(weight.dtype)
        middle = torch.clamp(middle, weight.amin(others, keepdim=True), weight.amax(others, keepdim=True))
        weight.copy_(torch.where(codes == ops.weight_codes(weight, bits)[0], weight, middle))
