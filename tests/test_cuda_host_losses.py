"""Losses: the CUDA kernels on the host executor, against the reference in float64."""

from __future__ import annotations

import ctypes as c

import pytest
import torch
from cuda_host.bindings import Kernels, as_c, same, shifted

from zsq_fast import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def near(got: torch.Tensor, want: torch.Tensor, factor: float = 1.0) -> None:
    error, size = (got.double() - want).abs().max(), want.abs().max()
    least = {torch.float16: 6e-8, torch.float64: 1e-14}.get(got.dtype, 1e-7)  # maps of one value: the gradient is 0
    assert error <= factor * TOLERANCE[got.dtype] * size + least, (error, size)


def distil(kernels: Kernels, s, t, y, temperature=4.0, kd=1.0, ce=1.0, gamma=0.0, batchmean=True):
    scalars = [torch.full((1,), 7.0, dtype=wide(s.dtype)) for _ in range(3)]
    grads = [torch.full_like(s, 7.0) for _ in range(2)]
    scratch = kernels.workspace("distillation", s.shape[0])
    kernels("distillation", s, t, y, temperature, kd, ce, gamma, batchmean, *scalars, *grads, *s.shape, as_c(scratch))
    return [x[0] for x in scalars] + grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["1x1", "9x10", "8x32", "17x100", "3x1024", "2x1025", "3x2500"])
def test_distillation(seeded: Kernels, shape: str, dtype: torch.dtype) -> None:
    batch, classes = map(int, shape.split("x"))
    s, t = ((torch.randn(batch, classes) * 3).to(dtype) for _ in "st")
    y = torch.randint(0, classes, (batch,))
    for teacher, target, gamma in ((t, y, 0.5), (t, None, 0.0), (None, y, 0.0), (None, y, 2.0)):
        got = distil(seeded, s, teacher, target, gamma=gamma)
        exact = None if teacher is None else teacher.double()
        want = reference.distillation_loss(s.double(), exact, target, 4.0, True, 1.0, 1.0, gamma, True)
        for a, b in zip(got[:3], want[:3], strict=True):
            near(a, b, 3)
        near(got[3], want[3], 3)
        if teacher is not None:
            near(got[4], want[4], 3)


def test_distillation_bits_do_not_depend_on_order(kernels: Kernels) -> None:
    s, t, y = torch.randn(40, 30), torch.randn(40, 30), torch.arange(40) % 30
    seen = []
    for seed in range(4):
        kernels.lib.zsq_seed(c.c_uint64(seed))
        seen.append(distil(kernels, s, t, y, gamma=1.0))
    assert all(same(a, b) for other in seen for a, b in zip(other, seen[0], strict=True))


@pytest.mark.parametrize("classes", [12, 1100])
def test_distillation_of_broken_rows(seeded: Kernels, classes: int) -> None:
    y = torch.zeros(3, dtype=torch.long)
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 1):
            logits = [torch.randn(3, classes) for _ in "st"]
            logits[place][1, 3] = value
            loss, kd, ce, grad, grad_teacher = distil(seeded, *logits, y)
            assert loss.isnan() and kd.isnan() and ce.isnan() == (place == 0)
            for g in (grad, grad_teacher):
                assert g[1].isnan().all() and g[::2].isfinite().all()
    for bad in (classes, -1, -100, 2**40):
        for gamma in (0.0, 1.0):
            y = torch.tensor([0, bad, 1])
            loss, _, ce, grad, _ = distil(seeded, torch.randn(3, classes), None, y, gamma=gamma)
            assert loss.isnan() and ce.isnan() and grad[1].isnan().all() and grad[::2].isfinite().all()


def test_distillation_of_extreme_logits(seeded: Kernels) -> None:
    s, t, y = torch.randn(5, 40) * 1e4, torch.randn(5, 40) * 1e4, torch.arange(5)
    s[0, 0] = 2e5  # p = 1
    for gamma in (0.0, 0.5, 2.0):
        got = distil(seeded, s, t, y, temperature=1.0, gamma=gamma)
        want = reference.distillation_loss(s.double(), t.double(), y, 1.0, True, 1.0, 1.0, gamma, True)
        for a, b in zip(got, want, strict=True):
            assert a.isfinite().all()
            near(a, b, 100)


# ---- feature alignment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", ["1x1x1", "3x5x7", "2x36x64", "2x3x1500", "2x9x328", "2x300x16", "3x70x1"])
def test_alignment(kernels: Kernels, shape: str, last: bool, dtype: torch.dtype) -> None:
    n, channels, s = map(int, shape.split("x"))
    torch.manual_seed(n * s)
    features = [torch.randn(n, channels, s).to(dtype) for _ in "st"]
    stored = [f.transpose(1, 2).contiguous() if last else f for f in features]
    exact = [f.double() for f in features]
    unit = torch.tensor([1.7], dtype=wide(dtype))
    plane = n, channels, s, last
    for kind, name in enumerate(("channel", "spatial", "direct")):
        want = reference.feature_alignment(*exact, name)
        want_grads = reference.feature_alignment_backward(unit.double()[0], *exact, *want[1:], name, True)
        for pair in (stored, [shifted(f) for f in stored]):
            runs = []
            for seed in (0, 3):
                kernels.lib.zsq_seed(c.c_uint64(seed))
                maps = [torch.full(m.shape, 7.0, dtype=wide(dtype)) for m in want[1:]]
                loss, grads = torch.full((1,), 7.0, dtype=wide(dtype)), [torch.full_like(f, 7.0) for f in stored]
                scratch = kernels.workspace("alignment", *plane, c.c_int(kind), loss.element_size())
                kernels("alignment", *pair, c.c_int(kind), loss, *maps, *plane, as_c(scratch))
                scratch = kernels.workspace("alignment_backward", *plane, c.c_int(kind), pair[0].element_size())
                args = (*pair, unit, *maps, c.c_int(kind))
                kernels("alignment_backward", *args, *grads, *plane, as_c(scratch))
                one = torch.full_like(grads[1], 7.0)
                kernels("alignment_backward", *args, None, one, *plane, as_c(scratch))
                assert same(one, grads[1])
                runs.append([loss, *maps, *grads])
            assert all(same(a, b) for a, b in zip(*runs, strict=True))
            near(loss[0], want[0], 3)
            for got, expected in zip(maps, want[1:] if name != "direct" else [], strict=False):
                near(got, expected)
            for got, expected in zip(grads, want_grads, strict=True):
                near(got.transpose(1, 2) if last else got, expected, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 4096, 5001])
def test_perturb(seeded: Kernels, n: int, dtype: torch.dtype) -> None:
    x, grad = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    grad[:2] = torch.tensor([float("nan"), 0.0])[:n]
    for a, b in ((x, grad), (shifted(x), shifted(grad))):
        out = torch.full_like(a, 7.0)
        seeded("sign_perturb", a, b, 0.1, out, n)
        assert same(out, reference.sign_perturb(a, b, 0.1))


def test_empty_launches_nothing(kernels: Kernels) -> None:
    before, x = kernels.lib.zsq_launches(), torch.empty(0)
    kernels("sign_perturb", x, x, 0.1, x, 0)
    kernels("alignment", x, x, c.c_int(0), x, x, x, 0, 3, 4, False, as_c(x))
    assert kernels.lib.zsq_launches() == before
