"""The specification: what every operation computes, in plain PyTorch, written to be read beside the papers.

Names and signatures equal those of the dispatcher ops (`zsq_fast/ops/schemas.py`). The kernels are tested against this file,
and it runs in their place on a device for which none was built. Products and sums are separate calls on purpose: each is
rounded once, as in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DOUBLINGS = 30
CAPPED_DOUBLINGS = 7


def _grid(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (codes per unit) and integral zero point of the asymmetric grid over [lo, hi] (ZeroQ/GDFQ quantizer)."""
    # Two roundings, as recorded from the published code: `number / tensor` is reciprocal times number in PyTorch.
    scale = torch.clamp(hi - lo, min=1e-8).reciprocal() * (2**bits - 1)
    return scale, torch.round(scale * lo) + 2 ** (bits - 1)


def _encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.clamp(torch.round(scale * x - zero_point), -half, half - 1)


def _row_grid(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return _grid(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits)


def fake_quant_weight(weight: Tensor, bits: int) -> Tensor:
    if weight.numel() == 0:
        return torch.empty_like(weight)
    rows = weight.reshape(weight.shape[0], -1)
    scale, zero_point = _row_grid(rows, bits)
    value = (_encode(rows, scale, zero_point, bits) + zero_point) / scale
    return torch.empty_like(weight).copy_(value.view_as(weight))


def weight_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    if weight.numel() == 0:
        return torch.empty_like(weight), weight.new_empty(weight.shape[0]), weight.new_empty(weight.shape[0])
    rows = weight.reshape(weight.shape[0], -1)
    scale, zero_point = _row_grid(rows, bits)
    codes = _encode(rows, scale, zero_point, bits) + zero_point
    codes = torch.empty_like(weight).copy_(codes.view_as(weight))
    return codes, scale.squeeze(1), (zero_point - 2 ** (bits - 1)).squeeze(1)


def fake_quant_act(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    scale, zero_point = _grid(lo.reshape(()), hi.reshape(()), bits)
    return (_encode(x, scale, zero_point, bits) + zero_point) / scale


def fake_quant_act_running(
    x: Tensor, lo: Tensor, hi: Tensor, beta_t: Tensor, bits: int, decay: float, plain: bool
) -> Tensor:
    first, one_minus_before = beta_t == 1, 1 - beta_t
    beta = torch.full_like(beta_t, decay)  # the published code keeps it in a tensor: 1 - beta is rounded in that dtype
    beta_t.mul_(beta)
    for state, seen in ((lo, x.amin()), (hi, x.amax())):
        kept = torch.where(first, torch.zeros_like(state), state)
        if plain:
            kept = kept * one_minus_before
        state.copy_((beta * kept + (1 - beta) * seen) / (1 - beta_t))
    return fake_quant_act(x, lo, hi, bits)


def bn_stats_match(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    batch_mean, batch_var = x.mean(dims), x.var(dims, correction=0)
    loss = (batch_mean - mean).square().mean() + (batch_var - var).square().mean()
    return loss, batch_mean, batch_var


def bn_stats_match_backward(
    grad_loss: Tensor, x: Tensor, mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor
) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    k0, k1 = 2 * (batch_mean - mean), 4 * (batch_var - var)
    return (grad_loss / x.numel()) * (k0.view(shape) + k1.view(shape) * (x - batch_mean.view(shape)))


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
        factor = _search_kappa(w, direction, lr, bits, threshold, search_steps, capped)
        if weight_decay != 0:
            g = g + weight_decay * w
        v.copy_(momentum * v + g)
        before = _codes_of(w, bits)
        w.copy_(w - (factor * lr) * (g + momentum * v if nesterov else v))
        kappa[i], changed[i] = factor, (_codes_of(w, bits) != before).sum()


def _codes_of(weight: Tensor, bits: int) -> Tensor:
    rows = weight.reshape(weight.shape[0], -1)
    return _encode(rows, *_row_grid(rows, bits), bits)


def _search_kappa(
    w: Tensor, direction: Tensor, lr: float, bits: int, threshold: float, search_steps: int, capped: bool
) -> float:
    """AIT gradient inundation (ait_family.md 7.2): doubling, then bisection; the last midpoint wins."""
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
        if abs(reached - threshold) < threshold / 100:
            break
        if reached < threshold:
            lo = factor
        else:
            hi = factor
    return factor
