"""The README's Python blocks, run as they stand but for the pretrained weights (a download) and the length of the schedule."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zsq_fast as zsq

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
NUMBERS = {"epochs": 2, "iterations": 1, "batch_size": 2, "warmup_epochs": 1, "calibration_epochs": 1, "held_out": 2}
SHORT = str([f"schedule.{name}={value}" for name, value in NUMBERS.items()])


def test_quantize_a_torchvision_network():
    pytest.importorskip("torchvision")
    block = next(b for b in BLOCKS if "resnet18" in b)
    code = block.replace('weights="DEFAULT"', "weights=None")
    code = code.replace("seed=0", f"seed=0, force=True, progress=False, overrides={SHORT}")
    assert code.count("force=True") == 1 and "weights=None" in code
    names: dict = {}
    exec(code, names)
    summary = zsq.summarize(names["student"])
    # ait_family.md section 2, row ResNet-18; torchvision calls each block's one ReLU module twice
    assert (summary.weight_tensors, summary.act_quantizers) == (21, 17) and summary.quantized_weights == 11_678_912
    assert torch.isfinite(names["student"](torch.randn(1, 3, 224, 224))).all()


def test_the_pieces():
    (block,) = [b for b in BLOCKS if "GISGD" in b]
    names: dict = {"torch": torch, "zsq": zsq}
    exec(block, names)
    assert names["values"].unique().numel() <= 16 * 16 and isinstance(names["act"], zsq.QuantAct)


def test_every_number_has_its_record():
    """The measured parts of README.md and docs/performance.md are what benchmarks/table.py makes of the committed records."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "benchmarks.table"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
