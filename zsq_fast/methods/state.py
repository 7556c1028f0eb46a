"""What a checkpoint holds of a run besides the networks: its counters, and optimizers as flat tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class State:
    """Everything of a run that is not a tensor."""

    step: int = 0
    seconds: float = 0.0
    evaluations: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The per-parameter state, named "index.entry"."""
    saved = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in saved.items() for k, v in entry.items() if v is not None}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill the per-parameter state, in each parameter's own memory layout; step counters stay where the optimizer keeps them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        p = params[int(index)]
        if name == "step":
            own = torch.empty_like(value)
        else:
            own = torch.empty_like(p if value.shape == p.shape else value, device=p.device)
        optimizer.state[p][name] = own.copy_(value)
