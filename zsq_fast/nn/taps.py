"""Batch-norm statistics of a network in eval mode, for the loss that synthesises images from them."""

from __future__ import annotations

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


class BNStatsTap:
    """Context manager that records the BN-statistics loss of every batch-norm input of a network.

    >>> with BNStatsTap(teacher) as tap:
    ...     logits = teacher(images)
    ...     loss = tap.loss()      # mean over layers of MSE(mean) + MSE(variance); clears the record
    """

    def __init__(self, model: nn.Module):
        self._norms = usable_batch_norms(model)
        self._losses: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> BNStatsTap:
        for norm in self._norms.values():
            self._handles.append(norm.register_forward_pre_hook(self._record))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._losses.clear()

    def _record(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._losses.append(ops.bn_stats_match(inputs[0], norm.running_mean, norm.running_var))  # type: ignore[arg-type]

    def loss(self) -> Tensor:
        """Mean over the batch-norm layers run since the last call, a scalar (GDFQ L_BNS; ait_family.md section 3)."""
        if not self._losses:
            raise UnsupportedModelError(
                "no batch norm was run: the model's forward does not reach its BatchNorm2d layers."
            )
        total = torch.stack(self._losses).mean()
        self._losses.clear()
        return total
