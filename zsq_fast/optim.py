"""Optimizers that look at integer codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zsq_fast import ops
from zsq_fast.errors import UsageError


class _Inundated(torch.optim.Optimizer):
    """What the optimizers share: the search for the factor of every tensor's step, all tensors of a group through one op.

    After `step()`, `kappa` `[number of parameters]` holds the factors (NaN: non-finite step, tensor untouched; 0: no gradient)
    and `changed` the number of integer codes that changed, both on the device of the parameters.
    """

    def __init__(self, params: Iterable[Any], **defaults: Any):
        name = type(self).__name__
        if not 2 <= defaults["bits"] <= 8:
            raise UsageError(f"{name}: bits must be 2 to 8, got {defaults['bits']}")
        if not 0 <= defaults["threshold"] <= 1:
            raise UsageError(f"{name}: threshold is a share of codes in [0, 1], got {defaults['threshold']}")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        everything = [p for group in self.param_groups for p in group["params"]]
        self.kappa = torch.zeros(len(everything), device=everything[0].device)
        self.changed = torch.zeros(len(everything), dtype=torch.int64, device=everything[0].device)

    def _state(self, p: Tensor, *names: str) -> list[Tensor]:
        """Tensors like p, zero at first."""
        state = self.state[p]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p)
        return [state[name] for name in names]

    def _inundate(self, group: dict[str, Any], params: Sequence[Tensor], kappa: Tensor, changed: Tensor) -> None:
        """One amplified step of parameters that have a gradient."""
        raise NotImplementedError

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
                self._inundate(group, with_grad, kappa, changed)
            if not whole:  # scatter back; parameters without a gradient read 0
                self.kappa[here], self.changed[here] = 0, 0
                at = [start + i for i, p in enumerate(params) if p.grad is not None]
                for i, k, c in zip(
                    at, kappa, changed, strict=True
                ):  # by views: an index list would be copied to the device
                    self.kappa[i : i + 1], self.changed[i : i + 1] = k, c
            start += len(params)
        return loss


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


_SEARCH = ("lr", "bits", "threshold", "search_steps", "capped", "guaranteed")


class GISGD(_Inundated):
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
        guaranteed: take the smallest factor tried that reaches the threshold; the published code takes the last one tried, which may
            fall short of it.

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
        guaranteed: bool = False,
    ):
        if nesterov and momentum <= 0:
            raise UsageError(f"GISGD: nesterov needs momentum > 0, got {momentum}")
        super().__init__(
            params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, bits=bits, threshold=threshold,
            search_steps=search_steps, capped=capped, guaranteed=guaranteed,
        )  # fmt: skip

    def _inundate(self, group: dict[str, Any], params: Sequence[Tensor], kappa: Tensor, changed: Tensor) -> None:
        momenta = [self._state(p, "momentum_buffer")[0] for p in params]
        options = {name: group[name] for name in (*_SEARCH, "momentum", "nesterov", "weight_decay")}
        ops.gi_sgd_(params, _gradients(params), momenta, kappa, changed, **options)


class _Adaptive(_Inundated):
    """Steps that gradient averages scale. Their length does not depend on that of the gradient, so it is the step that inundation
    amplifies; decay, added to the gradient, is part of it, and the averages see no amplification."""

    def __init__(self, params: Iterable[Any], own: dict[str, Any], inundation: dict[str, Any]):
        defaults = {"bits": 4, "threshold": 1e-3, "search_steps": 5, "capped": False, "guaranteed": False}
        if unknown := inundation.keys() - defaults.keys():
            raise TypeError(f"{type(self).__name__} has no option '{min(unknown)}'")
        super().__init__(params, **own, **(defaults | inundation))

    def _average(self, group: dict[str, Any], p: Tensor, gradient: Tensor, finite: Tensor) -> Tensor:
        """The step per unit of learning rate; a gradient that is not finite must leave the averages as they are."""
        raise NotImplementedError

    def _inundate(self, group: dict[str, Any], params: Sequence[Tensor], kappa: Tensor, changed: Tensor) -> None:
        steps = []
        for p, gradient in zip(params, _gradients(params), strict=True):
            if group["weight_decay"]:
                gradient = gradient.add(p, alpha=group["weight_decay"])
            finite = gradient.isfinite().all()
            step = self._average(group, p, gradient, finite)
            steps.append(torch.where(finite, step, torch.nan))
        plain: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        unused = [torch.zeros_like(p) for p in params]
        ops.gi_sgd_(params, steps, unused, kappa, changed, **plain, **{name: group[name] for name in _SEARCH})


def _follow(average: Tensor, value: Tensor, decay: float, when: Tensor) -> Tensor:
    """The moving average in place, where `when` holds."""
    return average.copy_(torch.where(when, torch.lerp(value, average, decay), average))


class GIAdam(_Adaptive):
    """Adam (torch.optim.Adam) with gradient inundation, which AIT reports for it too (ait_family.md 7.4; no code was released).

    Args: `params`, `lr`, `betas`, `eps`, `weight_decay` as in `torch.optim.Adam`; by name `bits`, `threshold`, `search_steps`,
    `capped`, `guaranteed` as in `GISGD`. `kappa` and `changed`: as there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **inundation: Any,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, inundation)

    def _average(self, group: dict[str, Any], p: Tensor, gradient: Tensor, finite: Tensor) -> Tensor:
        first, second = group["betas"]
        mean, square = self._state(p, "exp_avg", "exp_avg_sq")
        if "count" not in self.state[p]:
            self.state[p]["count"] = torch.zeros((), device=p.device)
        count = self.state[p]["count"].add_(finite)  # of steps; on the device, so that no host waits for it
        _follow(mean, gradient, first, finite)
        _follow(square, gradient.square(), second, finite)
        root = square.sqrt() / (1 - second**count).sqrt()
        return mean / (1 - first**count) / (root + group["eps"])


class GIRMSprop(_Adaptive):
    """RMSprop (torch.optim.RMSprop, without momentum) with gradient inundation, which AIT reports for it too (ait_family.md 7.4).

    Args: `params`, `lr`, `alpha`, `eps`, `weight_decay` as in `torch.optim.RMSprop`; by name `bits`, `threshold`, `search_steps`,
    `capped`, `guaranteed` as in `GISGD`. `kappa` and `changed`: as there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **inundation: Any,
    ):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}, inundation)

    def _average(self, group: dict[str, Any], p: Tensor, gradient: Tensor, finite: Tensor) -> Tensor:
        (square,) = self._state(p, "square_avg")
        _follow(square, gradient.square(), group["alpha"], finite)
        return gradient / (square.sqrt() + group["eps"])
