"""Which integer weights an epoch left changed: codes at its end against codes at its start (ait_family.md 8.4, "net")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.nn import QuantConv2d, QuantLinear


def weights_by_bits(student: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """The quantized layers by their bits and the name of their weight; in this order a history lists what it has per weight."""
    groups: dict[int, dict[str, nn.Module]] = {}
    for name, m in student.named_modules():
        if isinstance(m, QuantConv2d | QuantLinear):
            groups.setdefault(m.weight_bits, {})[f"{name}.weight" if name else "weight"] = m
    return groups


class NetUpdates:
    """Codes of every quantized weight at the start of an epoch. Nothing is done in its steps, and no training depends on it."""

    def __init__(self, student: nn.Module):
        self.layers: list[Any] = [m for group in weights_by_bits(student).values() for m in group.values()]
        self.before: list[Tensor] = []

    def next_epoch(self) -> dict[str, list[float]]:
        """`net_update_ratio`, the share of changed codes per weight since the last call; empty at the first one."""
        codes = [layer.integer_codes() for layer in self.layers]
        pairs = zip(codes, self.before, strict=True) if self.before else ()
        changed = [(a != b).float().mean() for a, b in pairs]
        self.before = codes
        return {"net_update_ratio": torch.stack(changed).tolist()} if changed else {}

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; empty before the first call of `next_epoch`."""
        return {str(i): codes for i, codes in enumerate(self.before)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.before = (
            [tensors[str(i)].to(layer.weight.device) for i, layer in enumerate(self.layers)] if tensors else []
        )
