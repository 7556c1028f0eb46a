"""16-bit types, lists of weights and the clipping gradient of the fake quantizers, bit for bit; float and double: test_ops.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import BITS, SHAPES, degenerate, same, strided
from torch import Tensor

from zsq_fast import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NARROW = DTYPES[2:]
LAYOUTS = ["slice", "offset", "channels_last", "transposed", "expanded", "channel_slice"]
zsq = torch.ops.zsq


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def ends(dtype: torch.dtype, device: str, lo: float = -1.0, hi: float = 1.5) -> tuple[Tensor, Tensor]:
    return torch.tensor(lo, dtype=wide(dtype), device=device), torch.tensor([hi], dtype=wide(dtype), device=device)


def layout_of(x: Tensor, layout: str) -> Tensor:
    if layout == "channel_slice":  # neither contiguous nor dense, in the order of channels_last
        return torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]]
    return strided(x)[layout]


def activation(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).mul_(2).to(dtype)
    x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    return x.to(device)


# ---- 16-bit types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4097)])
@pytest.mark.parametrize("dtype", NARROW)
def test_weight_of_16_bits(shape, dtype, device):
    for weight in (torch.randn(shape, device=device).to(dtype), degenerate(shape, torch.float32, device).to(dtype)):
        for bits in BITS:
            same(ops.fake_quant_weight(weight, bits), reference.fake_quant_weight(weight, bits))
            for got, want in zip(ops.weight_codes(weight, bits), reference.weight_codes(weight, bits), strict=True):
                same(got, want)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_16_bit_value(dtype, device):
    """All 65,536 of them: subnormals, infinities and NaNs included."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).to(device)
    for lo, hi in ((-1.0, 1.5), (0.0, 60000.0), (-1e-7, 1e-7), (0.0, 0.0)):
        for bits in BITS:
            range_ = ends(dtype, device, lo, hi)
            same(ops.fake_quant_act(x, *range_, bits), reference.fake_quant_act(x, *range_, bits))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [1, 31, 4096, 70001])
@pytest.mark.parametrize("dtype", NARROW)
def test_running_of_16_bits(plain, size, dtype, device):
    states = [[torch.tensor(v, device=device) for v in (float("nan"), float("nan"), 1.0)] for _ in "ab"]
    for step in range(6):
        x = torch.randn(size, device=device).mul_(step + 1).to(dtype)
        if step == 5:
            x[size // 2] = float("nan")
        got = ops.fake_quant_act_running(x, *states[0], 4, 0.9, plain)
        same(got, reference.fake_quant_act_running(x, *states[1], 4, 0.9, plain))
        for a, b in zip(*states, strict=True):
            same(a, b)
    assert states[0][0].isnan()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [1, 31, 70001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_range_with_clip(plain, size, dtype, device):
    """The same values and range as with the identity; the gradient passes where the new range does not clamp."""
    states = [[torch.tensor(v, dtype=wide(dtype), device=device) for v in (0.0, 0.0, 1.0)] for _ in "ab"]
    clamped = 0
    for step in range(4):
        x = torch.randn(size, device=device).mul_(step + 1).to(dtype).requires_grad_()
        grad = torch.randn(size, device=device).to(dtype)
        got = ops.fake_quant_act_running(x, *states[0], 4, 0.5, plain, ste="clip")
        same(got, reference.fake_quant_act_running(x.detach(), *states[1], 4, 0.5, plain))
        for a, b in zip(*states, strict=True):
            same(a, b)
        keep = reference.fake_quant.not_clamped(x.detach().to(wide(dtype)), *states[1][:2], 4)
        same(torch.autograd.grad(got, x, grad)[0], torch.where(keep, grad, torch.zeros_like(grad)))
        clamped += int((~keep).sum())
    assert states[0][0]._version == 4 and (clamped > 0 or size == 1 or not plain)  # the published range overshoots


def test_a_refused_call_leaves_the_running_range_alone(device):
    state = [torch.tensor(v, device=device) for v in (0.0, 0.0, 1.0)]
    x = torch.ones(3, device=device)
    for wrong, error, words in (
        ((x, *state, 1), ValueError, "bits must be 2 to 8"), ((x, *state, 4.5), TypeError, "bits must be of type int, got float"),
        ((x, *state, None), TypeError, "bits must be of type int"), ((x, *state, 4, 1.5), ValueError, "decay must lie"),
        ((x[:0], *state, 4), ValueError, "x must not be empty"), ((x.double(), *state, 4), TypeError, "lo must be"),
    ):  # fmt: skip
        for ste in ("identity", "clip"):
            with pytest.raises(error, match=f"fake_quant_act_running: {words}"):
                ops.fake_quant_act_running(*wrong, ste=ste)
    with pytest.raises(ValueError, match="fake_quant_act_running: ste must be 'identity' or 'clip', got 'round'"):
        ops.fake_quant_act_running(torch.ones(3, device=device), *state, 4, ste="round")
    assert [float(t) for t in state] == [0.0, 0.0, 1.0]


# ---- values that make no sense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("size", [1, 33, 64, 70001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_range_whose_ends_are_swapped_gives_nan(dtype, size, bits, device):
    x, swapped = torch.randn(size, dtype=dtype, device=device), ends(dtype, device, 1.5, -1.0)
    assert ops.fake_quant_act(x, *swapped, bits).isnan().all()
    out, mask = zsq.fake_quant_act_clip(x, *swapped, bits)
    assert out.isnan().all() and not mask.any()
    norm = torch.nn.BatchNorm2d(1).eval().to(device, wide(dtype))
    assert ops.bn_act_fake_quant(x.view(1, 1, 1, -1), norm, *swapped, bits).isnan().all()
    same(ops.fake_quant_act(x, *swapped, bits), reference.fake_quant_act(x, *swapped, bits))


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("inf"), float("nan")])
@pytest.mark.parametrize("size", [33, 70001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_that_no_decay_has_gives_nan(dtype, size, beta, device):
    x = torch.randn(size, device=device).to(dtype)
    for update in (ops.fake_quant_act_running, reference.fake_quant_act_running):
        state = [torch.tensor(v, dtype=wide(dtype), device=device) for v in (-1.0, 1.0, beta)]
        assert update(x, *state, 4, 0.9, False).isnan().all()
        assert all(s.isnan() for s in state)


# ---- lists of weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_values(dtype, device):
    weights = [degenerate(shape, torch.float64, device).to(dtype) for shape in SHAPES for _ in range(2)]
    weights += [torch.empty(0, 3, dtype=dtype, device=device), torch.empty(3, 0, dtype=dtype, device=device)]
    for bits in BITS:
        for w, got in zip(weights, ops.fake_quant_weights(weights, bits), strict=True):
            same(got, reference.fake_quant_weight(w, bits))
    assert ops.fake_quant_weights([], 4) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_layouts(layout, device):
    x = layout_of(torch.randn(6, 5, 3, 7, device=device), layout)
    out = ops.fake_quant_weights([x, x.contiguous(), x], 4)
    for got in out:
        same(got, reference.fake_quant_weight(x.contiguous(), 4))
    assert out[0].stride() == out[2].stride() == torch.empty_like(x).stride()


def test_weights_gradient_is_the_identity(device):
    weights = [torch.randn(4, 3, device=device, requires_grad=i != 1) for i in range(4)]
    out = ops.fake_quant_weights(weights, 3)
    assert out[0].requires_grad and out[2].requires_grad
    g = torch.randn(4, 3, device=device)
    grads = torch.autograd.grad(out[0], [weights[0], weights[2]], g, allow_unused=True, retain_graph=True)
    same(grads[0], g)
    assert grads[1] is None  # its result was not used
    (out[0] * g + 2 * out[2] * g).sum().backward()
    same(weights[0].grad, g)
    same(weights[2].grad, 2 * g)
    assert weights[1].grad is None and weights[3].grad is None
    with torch.no_grad():
        assert not any(o.requires_grad for o in ops.fake_quant_weights(weights, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="threads of OpenMP")
def test_bits_do_not_depend_on_threads():
    weights = [torch.randn(s) for s in [(64, 64, 3, 3), (7, 4001), (1, 40000), (3, 5)]]
    x, before, seen = torch.randn(100_003), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out, mask = zsq.fake_quant_act_clip(x, *ends(x.dtype, "cpu"), 4)
            seen.append([*ops.fake_quant_weights(weights, 4), out, mask, zsq.masked(x, mask)])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            same(a, b)


# ---- clipping straight-through gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lo, hi", [(0.0, 3.0), (-1.3, 2.1), (0.5, 0.5), (0.0, 0.0), (-2.0, -1.0), (2.0, -1.0), (float("nan"), 1.0)]
)
@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (4,), (2049,), (40_001,)])
def test_clip_values_and_gradient(dtype, lo, hi, shape, device):
    x, (lo_t, hi_t) = activation(shape, dtype, device), ends(dtype, device, lo, hi)
    for bits in (2, 4, 8):
        out, mask = zsq.fake_quant_act_clip(x, lo_t, hi_t, bits)
        want, want_mask = reference.fake_quant_act_clip(x, lo_t, hi_t, bits)
        same(out, want)
        same(mask, want_mask)
        grad = activation(shape, dtype, device).flip(0)
        same(zsq.masked(grad, mask), reference.masked(grad, mask))
        leaf = x.clone().requires_grad_()
        (got,) = torch.autograd.grad(ops.fake_quant_act(leaf, lo_t, hi_t, bits, ste="clip"), leaf, grad)
        keep = reference.fake_quant.not_clamped(x.to(wide(dtype)), lo_t, hi_t, bits)
        same(got, torch.where(keep, grad, torch.zeros_like(grad)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_clip_layouts(layout, grad_layout, device):
    """The mask follows the memory of the result, so that a gradient in any layout meets the right bits."""
    x = layout_of(torch.randn(6, 5, 3, 7, device=device) * 2, layout)
    grad = layout_of(torch.randn(6, 5, 3, 7, device=device), grad_layout)
    lo, hi = ends(x.dtype, device)
    leaf = x.detach().requires_grad_()
    out = ops.fake_quant_act(leaf, lo, hi, 4, ste="clip")
    same(out, reference.fake_quant_act(x.contiguous(), lo, hi, 4))
    assert out.stride() == torch.empty_like(x).stride()
    same(zsq.fake_quant_act_clip(x, lo, hi, 4)[1], reference.fake_quant_act_clip(x, lo, hi, 4)[1])
    keep = reference.fake_quant.not_clamped(x, lo, hi, 4)
    assert keep.any() and not keep.all()
    same(torch.autograd.grad(out, leaf, grad)[0], torch.where(keep, grad, torch.zeros_like(grad)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_and_every_tie_of_an_activation(bits, dtype, device):
    """Frozen range, clipping estimator and fused batch norm on the unit grid: half way between two codes is rounded to even."""
    n = 2**bits - 1
    x = (torch.arange(-2, 2 * n + 3, dtype=torch.float64) / 2).to(device, dtype)
    x = x.repeat(1, 3, 1)  # vectors and what is left over
    want, inside = x.round().clamp(0, n), (x.round() >= 0) & (x.round() <= n)
    lo, hi = ends(dtype, device, 0.0, n)
    norm = torch.nn.BatchNorm1d(3, eps=0.0).to(device, wide(dtype)).eval()
    for fused in (False, True):
        for ste in ("identity", "clip"):
            leaf = x.clone().requires_grad_()
            if fused:
                out = ops.bn_act_fake_quant(leaf, norm, lo, hi, bits, activation="none", ste=ste)
            else:
                out = ops.fake_quant_act(leaf, lo, hi, bits, ste=ste)
            same(out, want)
            passed = torch.autograd.grad(out, leaf, torch.ones_like(x))[0]
            same(passed, inside.to(dtype) if ste == "clip" else torch.ones_like(x))


def test_clip_keeps_the_mask_alone(device):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(1001, device=device, requires_grad=True)
        ops.fake_quant_act(x, *ends(x.dtype, device), 4, ste="clip")
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, (126,))]


def test_masked_is_linear(device):
    x = torch.randn(4, 6, 5, dtype=torch.float64, device=device)
    mask = zsq.fake_quant_act_clip(x, *ends(x.dtype, device), 4)[1]
    grad = torch.randn(4, 6, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: zsq.masked(g, mask), grad)
    assert torch.autograd.gradgradcheck(lambda g: zsq.masked(g, mask).square(), grad)


# ---- all ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_opcheck(layout, dtype, device):
    x = torch.randn(4, 6, 5, 5, device=device).to(dtype)
    x = x if layout is None else layout_of(x, layout)
    lo, hi = ends(dtype, device)
    beta, mask = torch.ones((), dtype=wide(dtype), device=device), zsq.fake_quant_act_clip(x, lo, hi, 4)[1]
    fast = {} if layout is None else {"test_utils": ("test_schema", "test_faketensor")}
    leaf = x if layout else x.requires_grad_()
    for name, args in {
        "fake_quant_weight": (leaf, 4), "fake_quant_weights": ([leaf, leaf[:2]], 4), "weight_codes": (x.detach(), 4),
        "fake_quant_act": (leaf, lo, hi, 4), "fake_quant_act_clip": (leaf, lo, hi, 4), "masked": (leaf, mask),
        "fake_quant_act_running": (leaf, lo, hi, beta, 4, 0.9, True), "track_range_": (leaf, lo, hi, beta, 0.9, True),
    }.items():  # fmt: skip
        torch.library.opcheck(getattr(zsq, name).default, args, **fast)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic, device):
    lo, hi = ends(torch.float32, device)

    def step(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
        first, second = ops.fake_quant_weights([w, v], 4)
        y = torch.nn.functional.conv2d(ops.fake_quant_act(x, lo, hi, 4, ste="clip"), first)
        return (y * second).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        shapes = (6, 6, 3, 3), (6, 1, 1), (n, 6, 5, 5)
        results, data = [], [torch.randn(s, device=device) for s in shapes]
        data[2] = data[2].to(memory_format=torch.channels_last)
        for run in (step, compiled):
            inputs = [t.clone().requires_grad_() for t in data]
            loss = run(*inputs)
            results.append([loss, *torch.autograd.grad(loss, inputs)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_empty(device):
    x, one = torch.empty(2, 0, device=device), torch.ones((), device=device)
    out, mask = zsq.fake_quant_act_clip(x, one, one, 4)
    assert out.shape == (2, 0) and mask.shape == (0,) and zsq.masked(x, mask).shape == (2, 0)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 130)), min_size=1, max_size=6), bits=st.integers(2, 8),
    scale=st.sampled_from([1e-42, 1e-8, 1.0, 1e4, 1e37]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_sweep(sizes, bits, scale, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    weights = [(torch.randn(s, generator=rng, dtype=torch.float64) * scale).to(dtype) for s in sizes]
    for w, got in zip(weights, ops.fake_quant_weights(weights, bits), strict=True):
        same(got, reference.fake_quant_weight(w, bits))
        lo, hi = (torch.tensor(v * scale, dtype=wide(dtype)) for v in (-0.7, 1.1))
        for a, b in zip(zsq.fake_quant_act_clip(w, lo, hi, bits), reference.fake_quant_act_clip(w, lo, hi, bits), strict=True):  # fmt: skip
            same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_are_the_same(dtype):
    """Above 16 MiB the CPU writes past the cache; the last piece is neither a whole chunk nor a whole line."""
    n = (16 << 20) // dtype.itemsize + 70_003
    x, (lo, hi) = torch.randn(n).mul_(2).to(dtype), ends(dtype, "cpu")
    out, mask = zsq.fake_quant_act_clip(x, lo, hi, 4)
    same(out, reference.fake_quant_act(x, lo, hi, 4))
    same(ops.fake_quant_act(x, lo, hi, 4), out)
    same(mask, reference.fake_quant_act_clip(x, lo, hi, 4)[1])
    same(zsq.masked(x, mask), reference.masked(x, mask))
    for cols in (4096, 4097):  # rows that end at a cache line, and rows that do not
        rows = x[: n // cols * cols].view(-1, cols)
        same(ops.fake_quant_weight(rows, 4), reference.fake_quant_weight(rows, 4))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets_agree(isa):
    """Everything above again, in a process that must not use the newest instructions."""
    if os.environ.get("ZSQ_CPU_ISA"):
        pytest.skip("runs inside itself")
    chosen = "weight_of_16 or running or weights_values or clip_values or sweep or large or every_"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        __file__,
        "-k",
        chosen,
    ]
    environment = os.environ | {"ZSQ_CPU_ISA": isa}
    # From here, not from the root: -m puts the working directory first, and the source tree there is not what is installed.
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda t: ops.fake_quant_weights([t(2, 2)], 1), ValueError, "fake_quant_weights: bits must be 2 to 8, got 1"),
        (lambda t: ops.fake_quant_weights([t(2).int()], 4), TypeError, r"weights\[0\] must be float32, .*, got Int"),
        (lambda t: ops.fake_quant_weights([t(2), t(2).half()], 4), TypeError, r"weights\[1\] must .* \(Float\), got Half"),
        (lambda t: ops.fake_quant_weights([t(2), t(())], 4), ValueError, r"weights\[1\] must have at least one dimension"),
        (lambda t: ops.fake_quant_act(t(3).half(), t(1), t(1).half(), 4), TypeError, "hi must be Float for x of Half, got Half"),
        (lambda t: zsq.fake_quant_act_clip(t(3), t(2), t(1), 4), ValueError, "fake_quant_act_clip: lo must have one element"),
        (lambda t: zsq.masked(t(9), t(2)), TypeError, "masked: mask must be uint8, got Float"),
        (lambda t: zsq.masked(t(9), t(1).byte()), ValueError, r"masked: mask must be contiguous with shape \[2\]"),
        (lambda t: zsq.masked(t(9).int(), t(2).byte()), TypeError, "masked: grad must be float32"),
    ],
)  # fmt: skip
def test_messages_name_op_argument_and_value(call, error, words, device):
    with pytest.raises(error, match=words):
        call(lambda *shape: torch.zeros(shape if shape != ((),) else (), device=device))
