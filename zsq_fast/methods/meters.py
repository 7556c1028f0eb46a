"""Sums of a run's figures on the device, read by the host once per epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("generator_ce", "generator_bns", "student_loss", "agreement")


class Meters:
    """Mean losses and agreement of an epoch, and per inundated tensor the changed codes and the mean log2 of kappa."""

    def __init__(self, device: torch.device, inundated: int):
        # One row of sums and one of counts, float64: a run that is resumed must add up to the same bits.
        self.sums = torch.zeros(2, len(NAMES), dtype=torch.float64, device=device)
        self.changed = torch.zeros(inundated, dtype=torch.int64, device=device)
        self.log2_kappa = torch.zeros(inundated, dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            column = self.sums[:, NAMES.index(name)]
            column[0] += value.detach()
            column[1] += 1

    def add_inundation(self, changed: Tensor, kappa: Tensor) -> None:
        self.changed += changed
        self.log2_kappa += kappa.clamp(min=1).log2()  # 0 stands for a weight without gradient; NaN stays
        self.steps += 1

    def read(self, inundated: dict[str, nn.Parameter]) -> dict[str, Any]:
        """Means of the epoch; `update_ratio` per tensor is the step-summed share of changed codes (ait_family.md 8.4)."""
        totals, counts = self.sums.tolist()
        record: dict[str, Any] = {n: t / c for n, t, c in zip(NAMES, totals, counts, strict=True) if c}
        steps = int(self.steps)
        if steps:
            sizes = [p.numel() for p in inundated.values()]
            record["update_ratio"] = [c / n for c, n in zip(self.changed.tolist(), sizes, strict=True)]
            record["log2_kappa"] = [v / steps for v in self.log2_kappa.tolist()]
            for name, value in zip(inundated, record["log2_kappa"], strict=True):
                if value != value:  # the step direction of this tensor was not finite
                    record[f"gradient of {name}"] = value
        return record

    def reset(self) -> None:
        for tensor in self.state_dict().values():
            tensor.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "changed": self.changed, "log2_kappa": self.log2_kappa, "steps": self.steps}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(tensors[name])
