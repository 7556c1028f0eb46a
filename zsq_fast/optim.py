"""Optimizers that look at integer codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zsq_fast import ops
from zsq_fast.errors import UsageError


class GISGD(torch.optim.Optimizer):
    """SGD with gradient inundation (AIT, CVPR 2022) for quantized weights.

    Each step is amplified per tensor by the smallest factor found, kappa >= 1, that moves at least a share `threshold` of the
    tensor's integer codes; the momentum buffer accumulates the unscaled gradients. All tensors of a group go through one op.

    Args:
        params: weights `[C, ...]` (float32) that the network fake-quantizes per output channel at `bits`.
        lr: learning rate before amplification.
        bits: 2 to 8.
        threshold: share of integer codes that must change per step (1e-3 for CIFAR, 1e-4 for ImageNet).
        search_steps: bisection steps after the doubling, 0 to 5.
        capped: stop doubling at 128 (the published first training epoch).

    After `step()`, `kappa` `[number of parameters]` holds the factors (NaN: non-finite gradient, tensor untouched; 0: no
    gradient) and `changed` the number of integer codes that changed, both on the device of the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        bits: int = 4,
        threshold: float = 1e-3,
        search_steps: int = 5,
        capped: bool = False,
    ):
        if nesterov and momentum <= 0:
            raise UsageError(f"GISGD: nesterov needs momentum > 0, got {momentum}")
        if not 2 <= bits <= 8:
            raise UsageError(f"GISGD: bits must be 2 to 8, got {bits}")
        if not 0 <= threshold <= 1:
            raise UsageError(f"GISGD: threshold is a share of codes in [0, 1], got {threshold}")
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "bits": bits,
            "threshold": threshold, "search_steps": search_steps, "capped": capped,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        everything = [p for group in self.param_groups for p in group["params"]]
        self.kappa = torch.zeros(len(everything), device=everything[0].device)
        self.changed = torch.zeros(len(everything), dtype=torch.int64, device=everything[0].device)

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for group in self.param_groups:
            params = group["params"]
            with_grad = [p for p in params if p.grad is not None]
            whole = len(with_grad) == len(params)
            here = slice(start, start + len(params))
            kappa = self.kappa[here] if whole else self.kappa.new_zeros(len(with_grad))
            changed = self.changed[here] if whole else self.changed.new_zeros(len(with_grad))
            if with_grad:
                options = {k: v for k, v in group.items() if k in self.defaults and k != "params"}
                ops.gi_sgd_(
                    with_grad,
                    [p.grad for p in with_grad],
                    [self._momentum_buffer(p) for p in with_grad],
                    kappa,
                    changed,
                    **options,
                )
            if not whole:  # scatter back; parameters without a gradient read 0
                self.kappa[here], self.changed[here] = 0, 0
                at = [start + i for i, p in enumerate(params) if p.grad is not None]
                for i, k, c in zip(
                    at, kappa, changed, strict=True
                ):  # by views: an index list would be copied to the device
                    self.kappa[i : i + 1], self.changed[i : i + 1] = k, c
            start += len(params)
        return loss
