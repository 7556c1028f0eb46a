"""Batch-norm statistics of a network in eval mode, for the loss that synthesises images from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast import ops
from zsq_fast.errors import UnsupportedModelError


def usable_batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The BatchNorm2d layers that carry running statistics, by name.

    Raises:
        UnsupportedModelError: there is none; the message names the layers that were found instead.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    usable = {name: m for name, m in norms.items() if m.running_mean is not None and m.running_var is not None}
    if usable:
        return usable
    if norms:
        found = f"its {len(norms)} BatchNorm2d layers ({', '.join(list(norms)[:3])}, ...) keep no running statistics"
    else:
        others = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
        found = f"it has no BatchNorm2d{' (found ' + ', '.join(others) + ')' if others else ''}"
    raise UnsupportedModelError(
        f"the model cannot be quantized without data: {found}, and images are synthesised from batch-norm statistics; "
        "pass the network as it was before batch norms were folded or replaced."
    )


def look_untrained(norms: dict[str, nn.BatchNorm2d]) -> bool:
    """Whether every running statistic still has its initial value (mean 0, variance 1)."""
    means, variances = ([getattr(m, name) for m in norms.values()] for name in ("running_mean", "running_var"))
    return not any(bool(m.any()) for m in means) and all(bool((v == 1).all()) for v in variances)


class _TappedForward:
    """Stands in for the `forward` of a batch norm: the same output, and the statistics loss of the input to `record`."""

    def __init__(self, norm: nn.BatchNorm2d, record: Callable[[Tensor], None]):
        self.norm, self.record, self.forward = norm, record, norm.forward
        # Subclasses and replaced forwards may compute anything.
        self.plain = "forward" not in vars(norm) and type(norm).forward is nn.BatchNorm2d.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        norm = self.norm
        mean, var, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
        assert mean is not None and var is not None
        trained = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (weight, bias))
        if not self.plain or norm.training or trained or args or kwargs:
            self.record(ops.bn_stats_match(x, mean, var))
            out: Tensor = self.forward(x, *args, **kwargs)
            return out
        # One read of x for both, and one pass for both gradients.
        y, sums = ops.bn_eval_sums(x, mean, var, weight, bias, norm.eps)
        self.record(ops.bn_stats_loss(sums, var, x.numel() // len(var)))
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Tensor]:
        """A copy of the network is not tapped."""
        forward: Callable[..., Tensor] = copy.deepcopy(self.forward, memo)
        return forward


class BNStatsTap:
    """Context manager that records the BN-statistics loss of every batch-norm input of a network.

    >>> with BNStatsTap(teacher) as tap:
    ...     logits = teacher(images)
    ...     loss = tap.loss()      # mean over layers of MSE(mean) + MSE(variance); clears the record
    """

    def __init__(self, model: nn.Module):
        self._norms = usable_batch_norms(model)
        self._losses: list[Tensor] = []
        self._before: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> BNStatsTap:
        for norm in self._norms.values():
            self._before.append((norm, vars(norm).get("forward")))
            norm.forward = _TappedForward(norm, self._losses.append)  # type: ignore[assignment]
        return self

    def __exit__(self, *exc: object) -> None:
        for norm, forward in reversed(self._before):
            if forward is None:
                del norm.forward
            else:
                norm.forward = forward
        self._before.clear()
        self._losses.clear()

    def loss(self) -> Tensor:
        """Mean over the batch-norm layers run since the last call, a scalar (GDFQ L_BNS; ait_family.md section 3)."""
        if not self._losses:
            raise UnsupportedModelError(
                "no batch norm was run: the model's forward does not reach its BatchNorm2d layers."
            )
        total = torch.stack(self._losses).mean()
        self._losses.clear()
        return total
