"""The CUDA kernels of the fake quantizers in every storage type, lists of weights and the clipping gradient, on the host executor."""

from __future__ import annotations

import ctypes as c

import pytest
import torch
from cuda_host.bindings import Kernels, as_c, same, shifted

from zsq_fast import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NARROW = DTYPES[2:]
ROWS = "1x1 5x9 70x9 3x16 3x27 9x64 2x130 3x136 11x144 3x577 2x1024 3x1025 2x4608 2x22600".split()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def special(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows over many sizes; some constant, zero, subnormal, with a NaN or an infinity."""
    w = torch.randn(rows, cols, dtype=torch.float64) * torch.logspace(-3, 2, rows, dtype=torch.float64)[:, None]
    for i, row in enumerate(w):
        if rows > 8 and i % 7 == 3:
            row[cols // 2], row[0] = [(3.0, 3.0), (float("nan"), 1.0), (float("inf"), 1.0)][i // 7 % 3]
        if rows > 8 and i % 7 == 5:
            row.mul_(1e-7) if i % 2 else row.fill_(0.7)
    return w.to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", ROWS)
def test_weight_of_16_bits(seeded: Kernels, shape: str, dtype: torch.dtype) -> None:
    rows, cols = map(int, shape.split("x"))
    for w in (special(rows, cols, dtype), shifted(special(rows, cols, dtype))):
        out = torch.full_like(w, 7.0)
        codes = torch.full((rows, cols), 7.0)
        scale, lo_code = torch.full((2, rows), 7.0)
        for bits in (2, 4, 8):
            seeded("fake_quant_weight", w, out, rows, cols, c.c_int(bits))
            seeded("weight_codes", w, codes, scale, lo_code, rows, cols, c.c_int(bits))
            assert same(out, reference.fake_quant_weight(w, bits))
            for got, expected in zip((codes, scale, lo_code), reference.weight_codes(w, bits), strict=True):
                assert same(got, expected)


def quantize_list(kernels: Kernels, weights: list[torch.Tensor], bits: int) -> list[torch.Tensor]:
    out = [torch.full_like(w, 7.0) for w in weights]
    addresses = torch.tensor([[w.data_ptr(), o.data_ptr()] for w, o in zip(weights, out, strict=True)])
    sizes = torch.tensor([[w.shape[0], w[0].numel() if len(w) else 9] for w in weights])
    kernels("fake_quant_weights", weights[0], as_c(addresses), as_c(sizes), c.c_int(len(weights)), c.c_int(bits))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_of_weights(seeded: Kernels, dtype: torch.dtype) -> None:
    """Every row length in one launch, aligned and not, some tensors empty."""
    weights = []
    for shape in ROWS:
        rows, cols = map(int, shape.split("x"))
        weights += [special(rows, cols, dtype), shifted(special(rows, cols, dtype)), torch.empty(0, cols, dtype=dtype)]
    before = seeded.lib.zsq_launches()
    for w, got in zip(weights, quantize_list(seeded, weights, 3), strict=True):
        assert same(got, reference.fake_quant_weight(w, 3)), w.shape
    assert seeded.lib.zsq_launches() - before == 1


@pytest.mark.parametrize("count, launches", [(1, 1), (120, 1), (121, 1), (1000, 1), (1001, 2)])
def test_a_launch_per_1000_tensors(kernels: Kernels, count: int, launches: int) -> None:
    weights = [torch.randn(1 + i % 3, 5 + i) for i in range(count)]
    before = kernels.lib.zsq_launches()
    for w, got in zip(weights, quantize_list(kernels, weights, 4), strict=True):
        assert same(got, reference.fake_quant_weight(w, 4))
    assert kernels.lib.zsq_launches() - before == launches


def activation(n: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(n, dtype=torch.float64).mul_(2).to(dtype)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0)):
        x[i * 5 % n] = value
    return x


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("n", [1, 1023, 30_011])
def test_act_of_16_bits(seeded: Kernels, n: int, dtype: torch.dtype) -> None:
    for lo, hi in ((-1.3, 2.1), (0.0, 0.0), (float("nan"), 1.0), (2.0, -1.0)):
        for x in (activation(n, dtype), shifted(activation(n, dtype))):
            ends = torch.tensor([[lo], [hi]])
            out = torch.full_like(x, 7.0)
            seeded("fake_quant_act", x, ends[0], ends[1], out, n, c.c_int(4))
            assert same(out, reference.fake_quant_act(x, ends[0], ends[1], 4))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("n", [1, 1023, 30_011, 300_011])
def test_running_of_16_bits(seeded: Kernels, n: int, dtype: torch.dtype, plain: bool) -> None:
    got = [torch.tensor([v]) for v in (9.0, -9.0, 1.0)]
    expected = [t.clone() for t in got]
    scratch = seeded.workspace("running", 2)
    for step in range(4):
        x = torch.randn(n).mul_(step + 1).to(dtype)
        x[n // 2] = float("nan") if step == 3 else 5.0
        out = torch.full_like(x, 7.0)
        alone = [t.clone() for t in got]
        seeded("track_range", shifted(x) if step % 2 else x, *alone, n, 0.9, plain, as_c(scratch))
        seeded("fake_quant_act_running", x, *got, out, n, c.c_int(4), 0.9, plain, as_c(scratch))
        assert same(out, reference.fake_quant_act_running(x, *expected, 4, 0.9, plain)), step
        for a, b, d in zip(got, expected, alone, strict=True):
            assert same(a, b) and same(d, b), step
    assert got[0].isnan().all()


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1023, 300_011])
def test_running_after_a_product_that_no_decay_has(kernels: Kernels, n: int, dtype: torch.dtype, beta: float) -> None:
    x = activation(n, dtype).nan_to_num(0.0, 1.0, -1.0)
    state = [torch.tensor([v], dtype=wide(dtype)) for v in (-1.0, 1.0, beta)]
    out = torch.full_like(x, 7.0)
    scratch = kernels.workspace("running", x.element_size())
    kernels("fake_quant_act_running", x, *state, out, n, c.c_int(4), 0.9, False, as_c(scratch))
    assert out.isnan().all() and all(s.isnan() for s in state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 8, 2047, 2048, 2049, 30_011])
def test_clip_and_masked(seeded: Kernels, n: int, dtype: torch.dtype) -> None:
    for lo, hi in ((-1.3, 2.1), (0.0, 0.0), (float("nan"), 1.0), (2.0, -1.0)):
        ends = torch.tensor([[lo], [hi]], dtype=wide(dtype))
        for x in (activation(n, dtype), shifted(activation(n, dtype))):
            grad = activation(n, dtype).flip(0)
            out, back = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
            mask = torch.full(((n + 7) // 8,), 0xA5, dtype=torch.uint8)
            seeded("fake_quant_act_clip", x, ends[0], ends[1], out, mask, n, c.c_int(4))
            want, want_mask = reference.fake_quant_act_clip(x, ends[0], ends[1], 4)
            assert same(out, want) and torch.equal(mask, want_mask)
            if n > 1000 and lo == -1.3:
                assert 0 < int(reference.fake_quant.unpack(mask, x).sum()) < n  # both sides are reached
            seeded("masked", grad, mask, back, n)
            assert same(back, reference.masked(grad, mask))


def test_empty_launches_nothing(kernels: Kernels) -> None:
    before, x, one = kernels.lib.zsq_launches(), torch.empty(0), torch.ones(1)
    mask = torch.empty(0, dtype=torch.uint8)
    kernels("fake_quant_act_clip", x, one, one, x, mask, 0, c.c_int(4))
    kernels("masked", x, mask, x, 0)
    assert quantize_list(kernels, [torch.empty(0, 9), torch.empty(0, 2000)], 4)[1].shape == (0, 2000)
    assert kernels.lib.zsq_launches() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_and_every_tie(seeded: Kernels, bits: int, dtype: torch.dtype) -> None:
    """On the unit grid, half way between two codes is rounded to even, in and beyond the range."""
    n = 2**bits - 1
    inside = torch.arange(2 * n + 1, dtype=torch.float64) / 2
    below = inside - n // 4 * 2  # an odd zero point would turn "even" round
    for row in (inside, below, below.repeat(3), below.repeat(40)):  # lengths for several weight kernels
        w = torch.stack([row, row]).to(dtype)
        nearest = w.round() + 0  # no -0
        out, codes = torch.full_like(w, 7.0), torch.full(w.shape, 7.0, dtype=wide(dtype))
        scale, lo_code = torch.full((2, 2), 7.0, dtype=wide(dtype))
        seeded("fake_quant_weight", w, out, *w.shape, c.c_int(bits))
        seeded("weight_codes", w, codes, scale, lo_code, *w.shape, c.c_int(bits))
        assert same(out, nearest) and torch.equal(codes, nearest.to(codes.dtype))
    x = (torch.arange(-2, 2 * n + 3, dtype=torch.float64) / 2).to(dtype).repeat(3)
    ends = torch.tensor([[0.0], [n]], dtype=wide(dtype))
    want, kept = x.round().clamp(0, n) + 0, (x.round() >= 0) & (x.round() <= n)
    for source in (x, shifted(x)):
        out, back, mask = (torch.full_like(source, 7.0) for _ in "abc")
        mask = torch.full(((len(x) + 7) // 8,), 0xA5, dtype=torch.uint8)
        seeded("fake_quant_act", source, ends[0], ends[1], out, len(x), c.c_int(bits))
        assert same(out, want)
        seeded("fake_quant_act_clip", source, ends[0], ends[1], out, mask, len(x), c.c_int(bits))
        seeded("masked", torch.ones_like(x), mask, back, len(x))
        assert same(out, want) and same(back, kept.to(dtype))
