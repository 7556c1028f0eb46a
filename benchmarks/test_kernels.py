"""The cases of `python -m benchmarks` under pytest-benchmark (`make bench`): statistics, comparison with earlier runs, histograms."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import CASES, layer_cases

MAKES = [pytest.param(make, id=f"case-{i}") for i, make in enumerate(CASES)]
MAKES += [pytest.param(make, id=f"layer-{i}") for i, make in enumerate(layer_cases())]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("variant", ["kernel", "reference", "aten", "compile", "copy"])
@pytest.mark.parametrize("make", MAKES)
def test_kernel(benchmark, make, variant):
    torch.compiler.reset()  # else the tenth shape of a function would be one too many
    case = make(DEVICE)
    if variant not in case.variants:
        pytest.skip(f"{case.name} has no variant {variant}")
    benchmark.group = case.name

    def run() -> None:
        case.variants[variant]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=case.before, rounds=10, warmup_rounds=2)
