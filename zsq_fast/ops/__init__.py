"""The operations. Each is one dispatcher op with a plain-PyTorch reference, a CPU kernel and a CUDA kernel behind it.

Gradients: the fake quantizers use the identity straight-through estimator of the GDFQ family; there is no gradient to ranges.
Wrong dtypes, shapes, devices or bit widths raise `TypeError` or `ValueError` naming the op, the argument, and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zsq_fast.ops import library

__all__ = [
    "backends",
    "bn_stats_match",
    "fake_quant_act",
    "fake_quant_act_running",
    "fake_quant_weight",
    "gi_sgd_",
    "weight_codes",
]

# Resolved once: an attribute chain through torch.ops costs as much as a small kernel.
_fake_quant_weight = torch.ops.zsq.fake_quant_weight.default
_weight_codes = torch.ops.zsq.weight_codes.default
_fake_quant_act = torch.ops.zsq.fake_quant_act.default
_fake_quant_act_running = torch.ops.zsq.fake_quant_act_running.default
_bn_stats_match = torch.ops.zsq.bn_stats_match.default
_gi_sgd_ = torch.ops.zsq.gi_sgd_.default


def backends() -> dict[str, str]:
    """Which implementation serves each device: `{"cpu": "native" | "reference", "cuda": ...}`."""
    return dict(library.backends)


def fake_quant_weight(weight: Tensor, bits: int) -> Tensor:
    """Quantize-dequantize a weight per output channel over the channel's own minimum and maximum (asymmetric grid).

    Args:
        weight: `[C, ...]` float32 or float64; row = output channel. Strides are kept (contiguous or channels_last).
        bits: 2 to 8.

    Source: ZeroQ/GDFQ quantizer. Exact arithmetic: multiply, subtract, round half to even, true division.
    """
    return _fake_quant_weight(weight, bits)


def weight_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer codes of a weight, `codes[c] = round(scale[c] * weight[c])` clamped to `[lo_code[c], lo_code[c] + 2**bits - 1]`.

    Returns:
        codes `[C, ...]` (integers in the dtype of weight), scale `[C]` in codes per unit, lo_code `[C]`; the fake-quantized
        value is `codes / scale`.
    """
    return _weight_codes(weight, bits)


def fake_quant_act(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """Quantize-dequantize an activation of any shape over the given per-tensor range.

    Args:
        x: any shape, float32 or float64.
        lo, hi: range, one element each, on the device of x; not read by the host on CUDA.
        bits: 2 to 8.
    """
    return _fake_quant_act(x, lo, hi, bits)


def fake_quant_act_running(
    x: Tensor, lo: Tensor, hi: Tensor, beta_t: Tensor, bits: int, decay: float = 0.9, plain: bool = False
) -> Tensor:
    """Update the running range with the minimum and maximum of x, in place, then quantize-dequantize x over it.

    Args:
        x: any shape, not empty.
        lo, hi, beta_t: state, one element each, updated in place; beta_t starts at 1 and is the decay's running product.
        plain: False follows the published code, which feeds the bias-corrected value back into the average (it overshoots
            up to 4,000-fold and settles after about 175 updates); True is an ordinary bias-corrected moving average.
    """
    return _fake_quant_act_running(x, lo, hi, beta_t, bits, decay, plain)


def bn_stats_match(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Batch-norm statistics loss: MSE(batch mean, mean) + MSE(biased batch variance, var), a scalar (GDFQ, L_BNS of one layer).

    Args:
        x: `[N, C, ...]`, the input of the batch norm layer.
        mean, var: `[C]`, its running statistics (constants: no gradient).
    """
    return _bn_stats_match(x, mean, var)[0]


def gi_sgd_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    kappa: Tensor,
    changed: Tensor,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    bits: int,
    threshold: float,
    search_steps: int = 5,
    capped: bool = False,
) -> None:
    """One SGD step with gradient inundation on all tensors together (AIT, ait_family.md 7.2). No host synchronisation on CUDA.

    Per tensor the step is amplified by kappa >= 1 so that about a share `threshold` of its integer codes changes.

    Args:
        weights, momenta: float32 tensors `[C, ...]`, updated in place; momenta start at zero.
        kappa: `[len(weights)]` float32, receives the amplification; NaN marks a tensor with a NaN or infinite step direction,
            which is left untouched.
        changed: `[len(weights)]` int64, receives the number of integer codes the step changed.
        threshold: share of codes, 0 to 1.
        search_steps: bisection steps, 0 to 5.
        capped: stop doubling at kappa = 128.
    """
    _gi_sgd_(
        list(weights), list(grads), list(momenta), kappa, changed, lr, momentum, nesterov, weight_decay, bits, threshold,
        search_steps, capped,
    )  # fmt: skip
