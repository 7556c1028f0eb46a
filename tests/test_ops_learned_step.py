"""Learned step sizes: values bit for bit, gradients, opcheck, layouts, empty input, messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import same, strided
from torch import Tensor

from zsq_fast import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CODES = [(-8, 7), (0, 15), (-2, 1), (-128, 127), (0, 3)]
backward = torch.ops.zsq.fake_quant_learned_backward


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def awkward(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(shape, dtype=dtype)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 6e4, 0.25, -0.25], dtype=dtype)
    x.view(-1)[: min(9, x.numel())] = values[: x.numel()]
    return x.to(device)


def check_gradient(grad: Tensor, x: Tensor, step: Tensor, lo: int, hi: int, factor: float) -> None:
    """grad_x bit for bit; grad_step against products and sums in float64, relative to the sum of their sizes."""
    grad_x, grad_step = backward(grad, x, step, lo, hi, factor)
    same(grad_x, reference.fake_quant_learned_backward(grad, x, step, lo, hi, factor)[0])
    assert grad_step.dtype == step.dtype and grad_step.shape == step.shape
    _, want = reference.fake_quant_learned_backward(grad, x, step, lo, hi, factor)
    _, size = reference.fake_quant_learned_backward(grad.abs(), x, step, lo, hi, factor)
    worst = max(abs(lo), abs(hi)) * abs(factor) * grad.double().abs().nansum()
    eps = torch.finfo(step.dtype).eps
    ok = ((grad_step - want).abs().double() <= 4 * eps * (worst + want.abs())) | (grad_step.isnan() & want.isnan())
    ok |= (grad_step == want) | (size.isnan() & grad_step.isnan())
    assert ok.all(), (grad_step, want)


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (5, 70), (3, 40000), (1, 1), (7,), (2, 3, 4, 5, 6), ()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(shape, dtype, device):
    for x in (torch.randn(shape, dtype=dtype, device=device), awkward(shape, dtype, device)):
        grad = torch.randn(shape, dtype=dtype).to(device)
        rows = shape[0] if shape else 1
        steps = [torch.tensor(0.13), torch.tensor([0.7]), torch.rand(rows) + 0.01]
        for step in (s.to(device, wide(dtype)) for s in steps):
            for lo, hi in CODES:
                same(ops.fake_quant_learned(x, step, lo, hi), reference.fake_quant_learned(x, step, lo, hi, 1.0))
                check_gradient(grad, x, step, lo, hi, 0.37)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf"), 1e-45, 3e38])
def test_odd_steps(value, device):
    x, step = awkward((4, 50), torch.float32, device), torch.tensor([value], device=device)
    got = ops.fake_quant_learned(x, step, -8, 7)
    same(got, reference.fake_quant_learned(x, step, -8, 7, 1.0))
    assert value > 0 or got.isnan().all()
    same(backward(x, x, step, -8, 7, 1.0)[0], reference.fake_quant_learned_backward(x, x, step, -8, 7, 1.0)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_step_is_nan_and_no_other(dtype, device):
    x, g = (torch.randn(4, 50, dtype=dtype, device=device) for _ in range(2))
    step = torch.tensor([0.3, 0.0, -0.3, 0.2], dtype=wide(dtype), device=device)
    rows = torch.tensor([False, True, True, False], device=device)
    assert ops.fake_quant_learned(x, step, -8, 7).isnan().equal(rows[:, None].expand(4, 50))
    assert backward(g, x, step, -8, 7, 1.0)[1].isnan().equal(rows)


def test_ties_go_to_even(device):
    x = torch.arange(-20, 21, device=device) / 2
    want = x.double().round().clamp(-8, 7).float()
    same(ops.fake_quant_learned(x, torch.ones((), device=device), -8, 7), want)


def test_gradient_by_hand(device):
    """LSQ eq. 3: round(v) - v between the end codes, the end code outside; x passes between them."""
    x = torch.tensor([[0.3, 1.6, 9.0], [-0.3, -1.6, -9.0]], device=device, requires_grad=True)
    step = torch.ones(2, device=device, requires_grad=True)
    grads = torch.autograd.grad(ops.fake_quant_learned(x, step, -4, 3, 0.5).sum(), (x, step))
    assert grads[0].tolist() == [[1, 1, 0], [1, 1, 0]]
    torch.testing.assert_close(grads[1].cpu(), torch.tensor([0.5 * (-0.3 + 0.4 + 3), 0.5 * (0.3 - 0.4 - 4)]))


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_go_where_they_are_wanted(wants, device):
    x = torch.randn(4, 9, device=device, requires_grad=wants[0])
    step = torch.full((4,), 0.2, device=device).requires_grad_(wants[1])
    out = ops.fake_quant_learned(x, step, -8, 7)
    assert out.requires_grad == any(wants)
    if any(wants):
        out.backward(torch.ones_like(out))
    assert [t.grad is not None for t in (x, step)] == list(wants)


@pytest.mark.parametrize("layout", ["slice", "offset", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, device):
    x = strided(torch.randn(6, 5, 3, 7, device=device, dtype=dtype))[layout]
    grad = torch.randn(6, 5, 3, 7, device=device, dtype=dtype)
    for step in (torch.tensor(0.2, device=device), torch.rand(12, device=device)[::2] + 0.1):
        same(ops.fake_quant_learned(x, step, -8, 7), reference.fake_quant_learned(x.contiguous(), step, -8, 7, 1.0))
        check_gradient(grad, x, step, -8, 7, 1.0)
        check_gradient(x, grad, step, -8, 7, 1.0)
        for name, args in {
            "fake_quant_learned": (x, step, -8, 7, 1.0),
            "fake_quant_learned_backward": (grad, x, step, -8, 7, 1.0),
        }.items():
            op = getattr(torch.ops.zsq, name).default
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck(device):
    x, step = torch.randn(4, 5, device=device, requires_grad=True), torch.rand(4, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.zsq.fake_quant_learned.default, (x, step, -8, 7, 0.1))
    plain = x.detach(), x.detach(), step.detach()
    torch.library.opcheck(backward.default, (*plain, -8, 7, 0.1))


def test_compiles_as_one_graph(device):
    def f(x: Tensor, step: Tensor) -> Tensor:
        return ops.fake_quant_learned(x * 2, step, -8, 7, 0.1).square().sum()

    results = []
    x = torch.randn(4, 9, device=device)
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_(), torch.full((4,), 0.3, device=device, requires_grad=True)]
        results.append(torch.autograd.grad(run(*inputs), inputs))
    for a, b in zip(*results, strict=True):
        same(a, b)


def test_empty(device):
    step = torch.ones(3, device=device)
    assert ops.fake_quant_learned(torch.empty(3, 0, device=device), step, -8, 7).shape == (3, 0)
    assert ops.fake_quant_learned(torch.empty(0, device=device), step[:0], -8, 7).shape == (0,)
    for x, s in ((torch.empty(3, 0, device=device), step), (torch.empty(0, 2, device=device), step[:1])):
        grad_x, grad_step = backward(x, x, s, -8, 7, 1.0)
        assert grad_x.shape == x.shape and not grad_step.any()


def test_bits_do_not_depend_on_threads():
    x, grad, step = torch.randn(3, 70001), torch.randn(3, 70001), torch.rand(3) + 0.1
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            seen.append((*backward(grad, x, step, -8, 7, 0.3), backward(grad, x, step[:1], -8, 7, 0.3)[1]))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            same(a, b)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 130), codes=st.sampled_from(CODES), per_row=st.booleans(),
    dtype=st.sampled_from(DTYPES), size=st.sampled_from([1e-6, 1.0, 100.0]), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_sweep(rows, cols, codes, per_row, dtype, size, seed):
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, cols, generator=rng, dtype=torch.float64) * size).to(dtype)
    step = (torch.rand(rows if per_row else 1, generator=rng) * size / codes[1] + 1e-8).to(wide(dtype))
    same(ops.fake_quant_learned(x, step, *codes), reference.fake_quant_learned(x, step, *codes, 1.0))
    check_gradient(x.flip(0), x, step, *codes, 0.1)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda t: ops.fake_quant_learned(t(3, 2).int(), t(3), 0, 7), TypeError, "fake_quant_learned: x must be float32"),
        (lambda t: ops.fake_quant_learned(t(3, 2), t(2), 0, 7), ValueError, r"one per row of x, \[3\], got shape \[2\]"),
        (lambda t: ops.fake_quant_learned(t(3, 2).half(), t(3).half(), 0, 7), TypeError, "step must be Float for x of Half"),
        (lambda t: ops.fake_quant_learned(t(3, 2), t(3), 7, 7), ValueError, "code_min must lie below code_max.*got 7 and 7"),
        (lambda t: ops.fake_quant_learned(t(3, 2), t(3), 0, 7, float("nan")), ValueError, "grad_factor must be finite, got nan"),
        (lambda t: backward(t(2, 2), t(3, 2), t(3), 0, 7, 1.0), ValueError, r"grad must have the shape of x \(\[3, 2\]\)"),
    ],
)  # fmt: skip
def test_messages(call, error, words, device):
    with pytest.raises(error, match=words):
        call(lambda *shape: torch.zeros(shape, device=device))
