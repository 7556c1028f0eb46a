"""The CUDA kernels of batch norm with its sums, run on the CPU by the host executor, against the reference."""

from __future__ import annotations

import ctypes as c

import pytest
import torch
from cuda_host.bindings import Kernels, as_c, same, shifted

from zsq_fast import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-5
# Reaches vectors and scalars, partly filled groups of channels, several slices, more channels than a block has threads.
SHAPES = "2x3x5 1x1x1 4x16x64 2x5x3000 3x136x49 64x33x1 2x8x4096 700x6x49 3x264x8".split()


class Case:
    def __init__(self, shape: str, channels_last: bool, dtype: torch.dtype):
        n, channels, s = self.sizes = list(map(int, shape.split("x")))
        torch.manual_seed(n * s)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        of_channels = torch.randn(4, channels, dtype=self.wide)
        offset, self.weight, self.bias = of_channels[:3]
        self.mean, self.var = offset + 0.25 * of_channels[3], torch.rand(channels, dtype=self.wide) + 1
        self.x = (torch.randn(n, channels, s, dtype=self.wide) * 2 + offset[:, None]).to(dtype)
        self.grad_y = torch.randn(n, channels, s, dtype=self.wide).to(dtype)
        self.grad_sums = torch.randn(2, channels, dtype=torch.float64)
        self.shape = (*self.sizes, channels_last)
        self.last = channels_last

    def stored(self, t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).contiguous() if self.last else t

    def plain(self, t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2) if self.last else t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bn_eval_sums(kernels: Kernels, shape: str, channels_last: bool, dtype: torch.dtype) -> None:
    case = Case(shape, channels_last, dtype)
    close = 1e-13 if dtype == torch.float64 else 1e-6
    for affine in (True, False):
        weight, bias = (case.weight, case.bias) if affine else (None, None)
        y, sums = reference.bn_eval_sums(case.x, case.mean, case.var, weight, bias, EPS)
        for source in (case.stored(case.x), shifted(case.stored(case.x))):
            runs = []
            for seed in (0, 3):
                kernels.lib.zsq_seed(c.c_uint64(seed))
                out, got = torch.full_like(source, 7.0), torch.full_like(sums, 7.0)
                scratch = kernels.workspace("bn_eval_sums", *case.shape, source.element_size())
                kernels(
                    "bn_eval_sums", source, case.mean, case.var, weight, bias, EPS, out, got, *case.shape, as_c(scratch)
                )
                assert same(case.plain(out), y)
                runs.append(got)
            assert same(runs[0], runs[1])
            for one, truth in zip(runs[0], sums, strict=True):
                assert (one - truth).norm() <= close * truth.norm() + close


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bn_eval_sums_backward(seeded: Kernels, shape: str, channels_last: bool, dtype: torch.dtype) -> None:
    case = Case(shape, channels_last, dtype)
    for weight in (case.weight, None):
        for grad_y in (case.grad_y, None):
            want = reference.bn_eval_sums_backward(grad_y, case.grad_sums, case.x, case.mean, case.var, weight, EPS)
            for move in (lambda t: t, shifted):
                source, grad = move(case.stored(case.x)), None if grad_y is None else case.stored(grad_y)
                out = torch.full_like(source, 7.0)
                seeded(
                    "bn_eval_sums_backward",
                    source,
                    grad,
                    case.grad_sums,
                    case.mean,
                    case.var,
                    weight,
                    EPS,
                    out,
                    *case.shape,
                )
                assert same(case.plain(out), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bn_stats_of_16_bit(seeded: Kernels, shape: str, channels_last: bool, dtype: torch.dtype) -> None:
    case = Case(shape, channels_last, dtype)
    exact = [t.double() for t in (case.x, case.mean, case.var)]
    truth = reference.bn_stats_match(*exact)
    source = case.stored(case.x)
    loss, bm, bv = torch.full((1,), 7.0), torch.full_like(case.mean, 7.0), torch.full_like(case.mean, 7.0)
    scratch = seeded.workspace("bn_stats", *case.shape, source.element_size())
    seeded("bn_stats", source, case.mean, case.var, loss, bm, bv, *case.shape, as_c(scratch))
    for got, want in zip((loss[0], bm, bv), truth, strict=True):
        # A variance is as exact as (x - mean)^2, of which little may be left.
        assert (got.double() - want).norm() <= 1e-6 * (want.norm() + len(case.mean) ** 0.5)
    # Large enough for the gradient of fp16 to leave the subnormals; then one rounding of the stored type remains.
    grad_loss, out = torch.tensor([1.7 * case.x.numel()]), torch.full_like(source, 7.0)
    want = reference.bn_stats_match_backward(grad_loss.double()[0], *exact, *truth[1:])
    seeded("bn_stats_backward", source, grad_loss, case.mean, case.var, bm, bv, out, *case.shape)
    assert (case.plain(out).double() - want).norm() <= torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("channels", [1, 16, 257, 2000])
def test_bn_stats_loss(seeded: Kernels, channels: int, dtype: torch.dtype) -> None:
    count, var = 37, torch.rand(channels, dtype=dtype) + 0.5
    sums = torch.stack([torch.randn(channels), torch.rand(channels) + 1]).double() * count
    grad_loss = torch.tensor([1.7], dtype=dtype)
    loss, grad = torch.full((1,), 7.0, dtype=dtype), torch.full_like(sums, 7.0)
    seeded("bn_stats_loss", var, sums, channels, count, loss)
    seeded("bn_stats_loss_backward", var, grad_loss, sums, channels, count, grad)
    torch.testing.assert_close(
        loss[0], reference.bn_stats_loss(sums, var, count), rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0
    )
    want = reference.bn_stats_loss_backward(grad_loss[0], sums, var, count)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-15)


def test_special_values(seeded: Kernels) -> None:
    """A NaN or infinity stays in its channel; a constant channel has no spread."""
    x, mean, var = torch.randn(4, 6, 40), torch.zeros(6), torch.ones(6)
    x[1, 2, 3], x[0, 3, 0], x[:, 4] = float("nan"), float("inf"), 3.0
    var[5] = 0.0
    for last in (False, True):
        source = x.transpose(1, 2).contiguous() if last else x
        out, sums = torch.full_like(source, 7.0), torch.full((2, 6), 7.0, dtype=torch.float64)
        scratch = seeded.workspace("bn_eval_sums", 4, 6, 40, last, 4)
        seeded("bn_eval_sums", source, mean, var, None, None, EPS, out, sums, 4, 6, 40, last, as_c(scratch))
        y, want = reference.bn_eval_sums(x, mean, var, None, None, EPS)
        assert same(out.transpose(1, 2) if last else out, y)
        torch.testing.assert_close(sums, want, rtol=1e-6, atol=1e-5, equal_nan=True)
        assert sums[0].isnan().tolist() == [i == 2 for i in range(6)] and sums[:, 4].tolist() == [480.0, 1440.0]
