"""Learned step sizes: the CUDA kernels on the host executor."""

from __future__ import annotations

import ctypes as c

import pytest
import torch
from cuda_host.bindings import Kernels, as_c, same, shifted

from zsq_fast import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def check(kernels: Kernels, grad: torch.Tensor, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    rows = step.numel()
    cols, ends = x.numel() // rows, (c.c_int(-8), c.c_int(7))
    out, grad_x, grad_step = (torch.full_like(t, 7.0) for t in (x, x, step))
    kernels("learned", x, step, out, rows, cols, *ends)
    assert same(out, reference.fake_quant_learned(x, step, -8, 7, 1.0))
    scratch = kernels.workspace("learned", rows, cols, x.element_size())
    kernels("learned_backward", grad, x, step, grad_x, grad_step, rows, cols, *ends, 0.3, as_c(scratch))
    want = reference.fake_quant_learned_backward(grad, x, step, -8, 7, 0.3)
    assert same(grad_x, want[0])
    size = 8 * 0.3 * grad.double().abs().view(rows, -1).nansum(1)
    error = (grad_step.double() - want[1].double()).abs()
    assert ((error <= 4 * torch.finfo(step.dtype).eps * size) | (grad_step.isnan() & want[1].isnan())).all()
    return grad_step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["1x1", "1x4099", "1x20000", "5x9", "70x27", "3x64", "2x1024", "3x1032", "2x9001"])
def test_learned(seeded: Kernels, shape: str, dtype: torch.dtype) -> None:
    rows, cols = map(int, shape.split("x"))
    x, grad = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
    step = (torch.rand(rows) / 4 + 0.01).to(torch.float64 if dtype is torch.float64 else torch.float32)
    check(seeded, grad, x, step)
    check(seeded, shifted(grad), shifted(x), step)
    x[0, cols // 2], step[-1] = float("nan"), 0.0
    check(seeded, grad, x, step)
    step[0] = -0.3
    assert check(seeded, grad, x, step)[0].isnan()


def test_bits_do_not_depend_on_order(kernels: Kernels) -> None:
    x, grad, step = torch.randn(2, 30_000), torch.randn(2, 30_000), torch.tensor([0.1, 0.2])
    seen = []
    for seed in range(4):
        kernels.lib.zsq_seed(c.c_uint64(seed))
        seen.append(check(kernels, grad, x, step))
    assert all(same(seen[0], s) for s in seen)


def test_empty(kernels: Kernels) -> None:
    before, x, step = kernels.lib.zsq_launches(), torch.empty(0), torch.ones(3)
    kernels("learned", x, step, x, 3, 0, c.c_int(0), c.c_int(7))
    kernels("learned_backward", x, x, step, x, step, 0, 5, c.c_int(0), c.c_int(7), 1.0, as_c(x))
    assert kernels.lib.zsq_launches() == before
    grad_step, scratch = torch.full((3,), 7.0), kernels.workspace("learned", 3, 0, 4)
    kernels("learned_backward", x, x, step, x, grad_step, 3, 0, c.c_int(0), c.c_int(7), 1.0, as_c(scratch))
    assert not grad_step.any()
