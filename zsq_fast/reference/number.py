"""Widening of 16-bit tensors and packed 1-bit masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in its arithmetic type: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def root(x: Tensor) -> Tensor:
    """Square root, correctly rounded; `torch.sqrt` is often off by one bit on the CPU (MKL)."""
    if x.dtype == torch.float64:
        return x.new_tensor([math.sqrt(v) if v >= 0 else math.nan for v in x.flatten().tolist()]).view(x.shape)
    return torch.sqrt(x.double()).to(x.dtype)  # twice the digits and two: rounding twice cannot differ


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`[C]` values shaped to broadcast over x `[N, C, ...]`."""
    return values.view([1, -1] + [1] * (x.dim() - 2))


def _in_memory_order(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def pack(keep: Tensor) -> Tensor:
    """Bits of a dense bool tensor in the order of its memory: bit i % 8 of byte i // 8; unused bits are 0."""
    bits = _in_memory_order(keep)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack(mask: Tensor, like: Tensor) -> Tensor:
    """The bool tensor, with the strides of the dense tensor `like`, that `pack` packed."""
    bits = (mask[:, None] >> torch.arange(8, device=mask.device)) & 1
    keep = torch.empty_like(like, dtype=torch.bool)
    _in_memory_order(keep).copy_(bits.flatten()[: keep.numel()])
    return keep
