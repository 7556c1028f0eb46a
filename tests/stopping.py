"""Runs that are stopped in the middle and resumed, and the comparison of what comes out."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zsq_fast as zsq
from zsq_fast.errors import Interrupted
from zsq_fast.methods import Trainer
from zsq_fast.runs import RunDir


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def whole_and_resumed(
    make_teacher: Any, options: dict[str, Any], step: int, folder: Path
) -> tuple[nn.Module, nn.Module]:
    """The student of a run in `folder`/whole, and of one in `folder`/cut that SIGINT stopped after `step` steps."""
    whole = zsq.quantize(make_teacher(), run_dir=folder / "whole", **options)
    iterate, done = Trainer._iterate, []

    def stop_after(self, batch):
        iterate(self, batch)
        done.append(1)
        if len(done) == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_iterate", stop_after)
        with pytest.raises(Interrupted, match="resume=True"):
            zsq.quantize(make_teacher(), run_dir=folder / "cut", **options)
    input_size = options["input_size"]
    return whole, zsq.quantize(
        make_teacher(), run_dir=folder / "cut", resume=True, input_size=input_size, progress=False
    )


def metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of both runs."""
    found = []
    for name in ("cut", "whole"):
        with RunDir.open(folder / name, read_only=True) as run:
            found.append(run.read_metrics())
    return found[0], found[1]
