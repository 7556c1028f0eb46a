"""Batch norm, activation and fake quantization in the CUDA kernels, run on the CPU, against the plain-torch reference."""

from __future__ import annotations

import ctypes as c

import pytest
import torch
from cuda_host.bindings import Kernels, as_c, same, shifted

from zsq_fast import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = ["none", "relu", "relu6"]  # in the order of the enum
# one channel per access, several in a row, any; tails behind the last mask byte; several tiles
SHAPES = "2x3x8 1x1x1 3x5x7 2x16x1 4x6x1 1x1x29 9x32x1 2x3x2500 2x40x49 3x5x2 130x33x1 1100x16x1".split()


def case(shape: str, dtype: torch.dtype):
    n, channels, s = map(int, shape.split("x"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, grad = (torch.randn(n, channels, s).mul(3).to(dtype) for _ in "abc")
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])[: x.numel()]
    mean, weight, bias = (torch.randn(channels, dtype=wide) for _ in "abc")
    return x, residual, grad, mean, torch.rand(channels, dtype=wide) + 0.1, weight, bias


def address(t: torch.Tensor | None) -> object:
    return c.c_void_p(None) if t is None else as_c(t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_masks_and_gradients(seeded: Kernels, shape: str, dtype: torch.dtype) -> None:
    x, residual, grad, mean, var, weight, bias = case(shape, dtype)
    n, channels, s = x.shape
    wide, eps, last = mean.dtype, 1e-5, s == 1
    ends = torch.tensor([[0.0], [2.5]], dtype=wide)
    options = [("relu", None, weight, bias, True), ("relu6", residual, None, None, False),
               ("none", residual, weight, None, True), ("relu", None, None, bias, False)]  # fmt: skip
    for i, (activation, added, w, b, clip) in enumerate(options):
        move = shifted if i % 2 else (lambda t: t)
        source, g = move(x), move(grad)
        added = None if added is None else move(added)
        out, mask = move(torch.full_like(x, 7.0)), torch.full(((x.numel() + 7) // 8,), 0xA5, dtype=torch.uint8)
        seeded("bn_act", source, address(added), mean, var, address(w), address(b), eps,
               c.c_int(ACTIVATIONS.index(activation)), ends[0], ends[1], c.c_int(4), clip, out, mask, n, channels, s,
               last)  # fmt: skip
        want = reference.bn_act_fake_quant(x, added, mean, var, w, b, eps, activation, ends[0], ends[1], 4, clip)
        assert same(out, want[0]), (activation, clip)
        assert torch.equal(mask, want[1]), (activation, clip)
        unmasked = torch.full_like(out, 7.0)
        seeded("bn_act", source, address(added), mean, var, address(w), address(b), eps,
               c.c_int(ACTIVATIONS.index(activation)), ends[0], ends[1], c.c_int(4), clip, unmasked, address(None), n,
               channels, s, last)  # fmt: skip
        assert same(unmasked, out)
        for affine in (False, True):
            gx, gr = move(torch.full_like(x, 7.0)), move(torch.full_like(x, 7.0)) if added is not None else None
            gw, gb = (torch.full_like(mean, 7.0) if affine else None for _ in "ab")
            bytes_ = seeded.workspace("bn_act_backward", n, channels, s, last, x.element_size())
            seeded("bn_act_backward", g, mask, address(source if affine else None), mean, var, address(w), eps, gx,
                   address(gr), address(gw), address(gb), n, channels, s, last, bytes_)  # fmt: skip
            truth = reference.bn_act_fake_quant_backward(grad, mask, x, mean, var, w, eps, gr is not None, affine)
            assert same(gx, truth[0])
            assert gr is None or same(gr, truth[1])
            if affine:
                near_sums(gw, truth[2], grad, x, mean, var, 3e-6)
                near_sums(gb, truth[3], grad, None, mean, var, 3e-6)


def near_sums(got, want, grad, x, mean, var, tolerance) -> None:
    """Against the size of what was added up, not against a sum that may cancel; at most 256 values are added in fp32."""
    terms = grad.double().abs()
    if x is not None:
        terms = terms * ((x.double() - mean.double()[:, None]) / var.double().sqrt()[:, None]).abs()
    size = terms.sum((0, 2))
    known = size.isfinite()
    tolerance = tolerance if got.dtype == torch.float32 else 1e-13
    assert got[known].isfinite().all()
    assert ((got - want).abs()[known] <= tolerance * size[known]).all()
    assert got.isnan().equal(want.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["3x5x2500", "600x24x1", "40x3x49"])
def test_sums_do_not_depend_on_the_order_of_blocks(kernels: Kernels, shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, _, grad, mean, var, weight, _ = case(shape, dtype)
    x.view(-1)[:3] = 0
    n, channels, s = x.shape
    mask = torch.randint(0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8)
    runs = []
    for seed in range(4):
        kernels.lib.zsq_seed(c.c_uint64(seed))
        gw, gb, gx = torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(x)
        scratch = kernels.workspace("bn_act_backward", n, channels, s, s == 1, x.element_size())
        kernels("bn_act_backward", grad, mask, x, mean, var, weight, 1e-5, gx, address(None), gw, gb, n, channels, s,
                s == 1, scratch)  # fmt: skip
        runs.append((gw, gb, gx))
    assert runs[0][0].isfinite().all()
    assert all(same(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_empty(kernels: Kernels) -> None:
    before, empty, one = kernels.lib.zsq_launches(), torch.empty(0), torch.ones(3)
    gw, gb = torch.full((3,), 7.0), torch.full((3,), 7.0)
    kernels("bn_act", empty, address(None), one, one, one, one, 1e-5, c.c_int(1), one, one, c.c_int(4), True, empty,
            empty, 0, 3, 5, False)  # fmt: skip
    kernels("bn_act_backward", empty, empty, empty, one, one, one, 1e-5, empty, address(None), gw, gb, 0, 3, 5, False,
            empty)  # fmt: skip
    assert kernels.lib.zsq_launches() == before
    assert gw.tolist() == gb.tolist() == [0, 0, 0]
