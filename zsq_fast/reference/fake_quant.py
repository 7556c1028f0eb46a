"""Fake quantization of weights and activations on the asymmetric grid of ZeroQ and GDFQ (ait_family.md section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_fast.reference.number import pack, unpack, wide


def grid(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (codes per unit) and integral zero point of the asymmetric grid over [lo, hi]."""
    # Two roundings, as recorded from the published code: `number / tensor` is reciprocal times number in PyTorch.
    scale = torch.clamp(hi - lo, min=1e-8).reciprocal() * (2**bits - 1)
    return scale, torch.round(scale * lo) + 2 ** (bits - 1)


def given_grid(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`grid` over a range that somebody gave, of one element each: where its ends are swapped, it is NaN."""
    lo, hi = lo.reshape(()), hi.reshape(())
    return grid(torch.where(hi < lo, torch.nan, lo), hi, bits)


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.clamp(torch.round(scale * x - zero_point), -half, half - 1)


def row_grid(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return grid(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits)


def fake_quant_weight(weight: Tensor, bits: int) -> Tensor:
    if weight.numel() == 0:
        return torch.empty_like(weight)
    rows = wide(weight.reshape(weight.shape[0], -1))
    scale, zero_point = row_grid(rows, bits)
    value = (encode(rows, scale, zero_point, bits) + zero_point) / scale
    return torch.empty_like(weight).copy_(value.view(weight.shape))


def fake_quant_weights(weights: list[Tensor], bits: int) -> list[Tensor]:
    return [fake_quant_weight(w, bits) for w in weights]


def weight_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = wide(weight.reshape(weight.shape[0], -1)) if weight.numel() else wide(weight.new_empty(weight.shape[0], 0))
    codes = torch.empty_like(weight, dtype=rows.dtype)
    if weight.numel() == 0:
        return codes, rows.new_empty(weight.shape[0]), rows.new_empty(weight.shape[0])
    scale, zero_point = row_grid(rows, bits)
    codes.copy_((encode(rows, scale, zero_point, bits) + zero_point).view(weight.shape))
    return codes, scale.squeeze(1), (zero_point - 2 ** (bits - 1)).squeeze(1)


def fake_quant_act(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    scale, zero_point = given_grid(lo, hi, bits)
    return ((encode(wide(x), scale, zero_point, bits) + zero_point) / scale).to(x.dtype)


def fake_quant_act_clip(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return fake_quant_act(x, lo, hi, bits), pack(not_clamped(wide(x), lo, hi, bits))


def not_clamped(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Where the code before clamping lies in the code range; NaN does not."""
    scale, zero_point = given_grid(lo, hi, bits)
    code, half = torch.round(scale * x - zero_point), 2 ** (bits - 1)
    return (code >= -half) & (code <= half - 1)


def masked(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.where(unpack(mask, grad), grad, torch.zeros_like(grad))


def track_range_(x: Tensor, lo: Tensor, hi: Tensor, beta_t: Tensor, decay: float, plain: bool) -> None:
    beta_t.copy_(torch.where((beta_t >= 0) & (beta_t <= 1), beta_t, torch.nan))  # no decay's product
    first, one_minus_before = beta_t == 1, 1 - beta_t
    beta = torch.full_like(beta_t, decay)  # the published code keeps it in a tensor: 1 - beta is rounded in that dtype
    beta_t.mul_(beta)
    for state, seen in ((lo, x.amin()), (hi, x.amax())):
        kept = torch.where(first, torch.zeros_like(state), state)
        if plain:
            kept = kept * one_minus_before
        state.copy_((beta * kept + (1 - beta) * wide(seen)) / (1 - beta_t))


def fake_quant_act_running(
    x: Tensor, lo: Tensor, hi: Tensor, beta_t: Tensor, bits: int, decay: float, plain: bool
) -> Tensor:
    track_range_(x, lo, hi, beta_t, decay, plain)
    return fake_quant_act(x, lo, hi, bits)
