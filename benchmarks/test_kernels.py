"""The cases of `python -m benchmarks` under pytest-benchmark (`make bench`): statistics, comparison with earlier runs, histograms."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import CASES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("variant", ["kernel", "reference", "aten", "compile", "copy"])
@pytest.mark.parametrize("make", CASES, ids=range(len(CASES)))
def test_kernel(benchmark, make, variant):
    case = make(DEVICE)
    if variant not in case.variants:
        pytest.skip(f"{case.name} has no variant {variant}")
    benchmark.group = case.name

    def run() -> None:
        case.variants[variant]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=case.before, rounds=10, warmup_rounds=2)
