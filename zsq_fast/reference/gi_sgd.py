"""Gradient inundation: an SGD step amplified until enough integer codes change (AIT; ait_family.md 7.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_fast.reference.fake_quant import encode, row_grid

MAX_DOUBLINGS = 30
CAPPED_DOUBLINGS = 7


def gi_sgd_(
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    kappa: Tensor,
    changed: Tensor,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    bits: int,
    threshold: float,
    search_steps: int,
    capped: bool,
    guaranteed: bool = False,
) -> None:
    for i, (w, g, v) in enumerate(zip(weights, grads, momenta, strict=True)):
        if w.numel() == 0:
            kappa[i], changed[i] = 1.0, 0
            continue
        b = momentum * v + g
        direction = g + momentum * b if nesterov else b
        if not torch.isfinite(direction).all():  # leave the tensor as it is and say so: kappa = NaN
            kappa[i], changed[i] = float("nan"), 0
            continue
        factor = _search_kappa(w, direction, lr, bits, threshold, search_steps, capped, guaranteed)
        if weight_decay != 0:
            g = g + weight_decay * w
        v.copy_(momentum * v + g)
        before = _codes_of(w, bits)
        w.copy_(w - (factor * lr) * (g + momentum * v if nesterov else v))
        kappa[i], changed[i] = factor, (_codes_of(w, bits) != before).sum()


def _codes_of(weight: Tensor, bits: int) -> Tensor:
    rows = weight.reshape(weight.shape[0], -1)
    return encode(rows, *row_grid(rows, bits), bits)


def _search_kappa(
    w: Tensor,
    direction: Tensor,
    lr: float,
    bits: int,
    threshold: float,
    search_steps: int,
    capped: bool,
    guaranteed: bool,
) -> float:
    """AIT gradient inundation (ait_family.md 7.2): doubling, then bisection; the last midpoint wins, or, guaranteed, the upper end."""
    before = _codes_of(w, bits)

    def share(factor: float) -> Tensor:
        return (_codes_of(w - (factor * lr) * direction, bits) != before).sum() / w.numel()

    hi = 1.0
    if share(hi) >= threshold or not direction.any():
        return hi
    for _ in range(CAPPED_DOUBLINGS if capped else MAX_DOUBLINGS):
        hi *= 2
        if share(hi) >= threshold:
            break
    else:
        if not capped:
            return 1.0  # nothing that can be applied moves this tensor
    lo, factor = hi / 2, hi
    for _ in range(search_steps):
        factor = (lo + hi) / 2
        reached = share(factor)
        if reached < threshold:
            lo = factor
        else:
            hi = factor
        if abs(reached - threshold) < threshold / 100:
            break
    return hi if guaranteed else factor
