"""Batch norm with its sums, the loss from sums, and 16-bit types of the statistics loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import same, strided
from torch import Tensor

from zsq_fast import ops, reference

EPS = 1e-5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (4, 8, 6, 6),
    (16, 3, 5, 7),
    (9, 70),
    (2, 64, 1, 1),
    (3, 5, 11),
    (2, 3, 4, 5, 6),
    (33, 16, 32, 32),
    (1, 2100, 2, 2),
]
# What is left of a sum of rounded terms, against float64.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-6, torch.float16: 1e-6}
zsq = torch.ops.zsq


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameters(channels: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """mean, var, weight, bias"""
    mean, var, weight, bias = torch.randn(4, channels, dtype=wide(dtype), device=device)
    return [mean, var.abs() + 0.1, weight, bias]


def batch(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (torch.randn(shape, device=device) * 2 + 0.5).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    return [x, x.to(memory_format=torch.channels_last)] if x.dim() == 4 else [x]


def near(got: Tensor, want: Tensor, relative: float) -> None:
    assert got.shape == want.shape
    error, size = (got.double() - want.double()).norm(), want.double().norm()
    assert error <= relative * size, float(error / size)


# ---- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradient_of_the_sums(shape, dtype, device):
    params = parameters(shape[1], dtype, device)
    for x in layouts(batch(shape, dtype, device)):
        for mean, var, weight, bias in (params, [*params[:2], None, None], [*params[:3], None]):
            y, sums = ops.bn_eval_sums(x, mean, var, weight, bias, EPS)
            want_y, want_sums = reference.bn_eval_sums(x, mean, var, weight, bias, EPS)
            same(y, want_y)
            assert y.stride() == torch.empty_like(x).stride() and sums.dtype == torch.float64
            for got, want in zip(sums, want_sums, strict=True):
                near(got, want, CLOSE[dtype])
            grad_y, grad_sums = torch.randn_like(x), torch.randn_like(sums)
            for g in (grad_y, grad_y.contiguous(), None):
                got = zsq.bn_eval_sums_backward(g, grad_sums, x, mean, var, weight, EPS)
                same(got, reference.bn_eval_sums_backward(g, grad_sums, x, mean, var, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_batch_norm_and_the_statistics_loss(dtype, device):
    """The new pair and the old pair of operations are the same function, values and gradients."""
    mean, var, weight, bias = parameters(6, dtype, device)
    x = batch((8, 6, 9, 5), dtype, device).requires_grad_()
    y, sums = ops.bn_eval_sums(x, mean, var, weight, bias, EPS)
    losses = [ops.bn_stats_loss(sums, var, x.numel() // 6), ops.bn_stats_match(x, mean, var)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    want = F.batch_norm(x.to(wide(dtype)), mean, var, weight, bias, False, 0.0, EPS)
    eps = torch.finfo(dtype).eps
    near(y, want, eps if eps > 1e-4 else 4 * eps)
    grad_y = torch.randn_like(x)
    # Large factor: the gradient of the loss should weigh as much as that of y.
    totals = [(y * grad_y).sum() + 500 * losses[0], (want * grad_y).sum() + 500 * losses[1]]
    got, old = (torch.autograd.grad(t.double(), x, retain_graph=True)[0] for t in totals)
    near(got, old, 2 * max(eps, 1e-7))
    assert (got - torch.autograd.grad(totals[0] - 500 * losses[0], x)[0]).norm() > 0.1 * got.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_loss_of_16_bit(shape, dtype, device):
    mean, var = parameters(shape[1], dtype, device)[:2]
    for x in layouts(batch(shape, dtype, device)):
        exact = [t.double() for t in (x, mean, var)]
        want = reference.bn_stats_match(*exact)
        got = zsq.bn_stats_match(x, mean, var)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32
            near(a, b, 1e-6)
        # So large that no gradient of fp16 is subnormal; what remains is one rounding to the stored type.
        factor = float(x.numel())
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(ops.bn_stats_match(leaf, mean, var), leaf, torch.tensor(factor, device=device))
        assert grad.dtype == dtype
        near(
            grad,
            reference.bn_stats_match_backward(torch.tensor(factor).double(), *exact, *want[1:]),
            torch.finfo(dtype).eps,
        )


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("channels", [1, 7, 300])
def test_loss_from_sums(channels, dtype, device):
    var, count = torch.rand(channels, dtype=dtype, device=device), 77
    sums = torch.stack([torch.randn(channels), torch.rand(channels) + 1]).double().to(device) * count
    loss = ops.bn_stats_loss(sums, var, count)
    assert loss.dtype == dtype and loss.shape == ()
    near(loss, reference.bn_stats_loss(sums, var.double(), count), CLOSE[dtype])
    leaf = sums.clone().requires_grad_()
    (got,) = torch.autograd.grad(3 * ops.bn_stats_loss(leaf, var, count), leaf)
    (want,) = torch.autograd.grad(3 * reference.bn_stats_loss(leaf, var.double(), count), leaf)
    near(got, want, 1e-12)
    near(reference.bn_stats_loss_backward(var.new_tensor(3.0), sums, var, count), want, 1e-12)


def test_ranks_can_be_combined(device):
    """Two ranks that add up their sums get the loss of the whole batch, and each its part of the gradient."""
    mean, var, weight, bias = parameters(5, torch.float32, device)
    x = batch((12, 5, 7, 6), torch.float32, device)
    count = x.numel() // 5
    whole = x.clone().requires_grad_()
    loss = ops.bn_stats_loss(ops.bn_eval_sums(whole, mean, var, weight, bias, EPS)[1], var, count)
    (want,) = torch.autograd.grad(loss, whole)
    halves = [h.clone().requires_grad_() for h in x.split([4, 8])]
    sums = [ops.bn_eval_sums(h, mean, var, weight, bias, EPS)[1] for h in halves]
    combined = ops.bn_stats_loss(sums[0] + sums[1], var, count)
    near(combined, loss, 1e-6)
    near(torch.cat(torch.autograd.grad(combined, halves)), want, 1e-6)
    near(loss, reference.bn_stats_match(x.double(), mean.double(), var.double())[0], 1e-6)


def test_special_values_stay_in_their_channel(device):
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    mean[4], var[5], var[6] = 3.0, 0.0, float("nan")
    x = torch.randn(4, 8, 5, 9, device=device)
    x[1, 2, 3, 4], x[0, 3, 0, 0], x[:, 4], x[:, 7] = float("nan"), float("inf"), 3.0, 1e-41
    for inner in layouts(x):
        y, sums = ops.bn_eval_sums(inner, mean, var)
        want_y, want = reference.bn_eval_sums(x, mean, var, None, None, EPS)
        same(y, want_y)
        torch.testing.assert_close(sums, want, rtol=1e-6, atol=1e-5, equal_nan=True)
        assert sums[0].isnan().tolist() == [c == 2 for c in range(8)] and sums[:, 4].tolist() == [0.0, 0.0]
        assert ops.bn_stats_loss(sums, var, 180).isnan()


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 5), c=st.integers(1, 40), h=st.integers(1, 9), w=st.integers(1, 9), last=st.booleans(),
    dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1e-6, 1.0, 100.0]), distance=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_sweep(n, c, h, w, last, dtype, scale, distance, seed):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=rng, dtype=torch.float64)  # noqa: E731
    x = ((draw(n, c, h, w) + distance) * scale).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    mean, weight, bias = (draw(c).to(wide(dtype)) for _ in range(3))
    var = draw(c).square().to(wide(dtype))
    y, sums = ops.bn_eval_sums(x, mean, var, weight, bias, EPS)
    want_y, want = reference.bn_eval_sums(x, mean, var, weight, bias, EPS)
    same(y, want_y)
    near(sums[1], want[1], CLOSE[dtype])
    spread = (x.double() - mean.double().view(1, -1, 1, 1)).abs().sum((0, 2, 3))  # the first sum may cancel
    assert ((sums[0] - want[0]).abs() <= CLOSE[dtype] * spread).all()
    grad_y, grad_sums = torch.randn_like(x), draw(2, c)
    same(
        zsq.bn_eval_sums_backward(grad_y, grad_sums, x, mean, var, weight, EPS),
        reference.bn_eval_sums_backward(grad_y, grad_sums, x, mean, var, weight, EPS),
    )


# ---- gradients ---------------------------------------------------------------------------------------------------------


def test_gradcheck(device):
    mean, var, weight, bias = parameters(4, torch.float64, device)
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.bn_eval_sums(t, mean, var, weight, bias, EPS), x)
    sums = torch.randn(2, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.bn_stats_loss(t, var, 9), sums)


def test_either_gradient_may_be_missing(device):
    mean, var, weight, bias = parameters(6, torch.float32, device)
    x = batch((2, 6, 4, 4), torch.float32, device).requires_grad_()
    y, sums = ops.bn_eval_sums(x, mean, var, weight, bias, EPS)
    grad_y, grad_sums = torch.randn_like(y), torch.randn_like(sums)
    grad = lambda outputs, grads: torch.autograd.grad(outputs, x, grads, retain_graph=True)[0]  # noqa: E731
    backward = lambda g, s: reference.bn_eval_sums_backward(g, s, x.detach(), mean, var, weight, EPS)  # noqa: E731
    same(grad([y], [grad_y]), backward(grad_y, torch.zeros_like(sums)))
    same(grad([sums], [grad_sums]), backward(None, grad_sums))
    same(grad([y, sums], [grad_y, grad_sums]), backward(grad_y, grad_sums))


def test_parameters_that_want_a_gradient_are_refused(device):
    params = parameters(6, torch.float32, device)
    x = batch((2, 6, 4, 4), torch.float32, device)
    for i in (2, 3):
        wanting = [p.clone().requires_grad_() if i == k else p for k, p in enumerate(params)]
        with pytest.raises(ValueError, match=r"freeze the network first \(requires_grad_\(False\)\)"):
            ops.bn_eval_sums(x, *wanting)
        with torch.no_grad():
            same(ops.bn_eval_sums(x, *wanting)[0], ops.bn_eval_sums(x, *params)[0])
    assert not ops.bn_eval_sums(x, *params)[0].requires_grad


# ---- form --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["slice", "offset", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype, device):
    x = strided(batch((6, 5, 3, 7), dtype, device))[layout]
    params = parameters(5, dtype, device)
    params = [torch.stack([p, p])[:, :].t()[:, 0] for p in params]  # not contiguous
    plain = ops.bn_eval_sums(x.contiguous(), *params)
    got = ops.bn_eval_sums(x, *params)
    same(got[0], plain[0])
    near(got[1], plain[1], CLOSE[dtype])
    assert got[0].stride() == torch.empty_like(x).stride()
    near(zsq.bn_stats_match(x, *params[:2])[1], zsq.bn_stats_match(x.contiguous(), *params[:2])[1], CLOSE[dtype])
    grad_y, grad_sums = (
        strided(torch.randn(6, 5, 3, 7, device=device).to(dtype))["transposed"],
        torch.randn(5, 2).double().t().to(device),
    )
    grad = zsq.bn_eval_sums_backward(grad_y, grad_sums, x, *params[:3], EPS)
    same(grad, zsq.bn_eval_sums_backward(grad_y.contiguous(), grad_sums.contiguous(), x.contiguous(), *params[:3], EPS))
    assert grad.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(layout, dtype):
    x = batch((37, 19, 23, 17), dtype, "cpu").to(memory_format=layout)
    params = parameters(19, dtype)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y, sums = ops.bn_eval_sums(x, *params)
            match = zsq.bn_stats_match(x, *params[:2])
            seen.append([y, sums, *match, zsq.bn_stats_match_backward(match[0], x, *params[:2], *match[1:]),
                         zsq.bn_eval_sums_backward(y, sums, x, *params[:3], EPS)])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            same(a, b)


def samples(device: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    mean, var, weight, bias = parameters(6, dtype, device)
    x = batch((4, 6, 5, 5), dtype, device)
    sums = torch.randn(2, 6, dtype=torch.float64, device=device)
    return {
        "bn_eval_sums": (x.clone().requires_grad_(), mean, var, weight, bias, EPS),
        "bn_eval_sums_backward": (x, sums, x, mean, var, weight, EPS),
        "bn_stats_loss": (sums.clone().requires_grad_(), var, 100),
        "bn_stats_loss_backward": (torch.ones((), device=device, dtype=wide(dtype)), sums, var, 100),
        "bn_stats_match": (x.clone().requires_grad_(), mean, var),
        "bn_stats_match_backward": (var.new_ones(()), x, mean, var, mean, var),
    }


@pytest.mark.parametrize("name", list(samples("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype, device):
    torch.library.opcheck(getattr(zsq, name).default, samples(device, dtype)[name])


@pytest.mark.parametrize("layout", ["slice", "channels_last", "transposed", "expanded"])
def test_opcheck_of_layouts(layout, device):
    x = strided(batch((4, 6, 5, 5), torch.float32, device))[layout]
    mean, var, weight, bias = parameters(6, torch.float32, device)
    for name, args in {
        "bn_eval_sums": (x, mean, var, weight, bias, EPS),
        "bn_eval_sums_backward": (None, torch.randn(2, 6, device=device).double(), x, mean, var, None, EPS),
    }.items():
        torch.library.opcheck(getattr(zsq, name).default, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_as_one_graph(device):
    mean, var, weight, bias = parameters(6, torch.float32, device)

    def step(x: Tensor) -> Tensor:
        y, sums = ops.bn_eval_sums(x, mean, var, weight, bias, EPS)
        return y.relu().square().mean() + ops.bn_stats_loss(sums, var, x.numel() // 6)

    x, results = batch((4, 6, 5, 5), torch.float32, device), []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        loss = run(leaf)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    for a, b in zip(*results, strict=True):
        near(a, b, 1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (2, 4, 0), (0, 4, 3, 3), (2, 0, 3, 3)])
def test_empty(shape, device):
    params = parameters(shape[1], torch.float32, device)
    x = torch.empty(shape, device=device, requires_grad=True)
    y, sums = ops.bn_eval_sums(x, *params)
    assert y.shape == shape and sums.shape == (2, shape[1]) and not sums.any()
    assert torch.autograd.grad(y.sum() + sums.sum(), x)[0].shape == shape


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda t: ops.bn_eval_sums(t(3, 4), t(5), t(4)), ValueError, r"bn_eval_sums: mean must have shape \[4\]"),
        (lambda t: ops.bn_eval_sums(t(3, 4), t(4), t(4), t(2)), ValueError, r"bn_eval_sums: weight must have shape \[4\]"),
        (lambda t: ops.bn_eval_sums(t(3, 4), t(4), t(4), None, t(4, 1)), ValueError, r"bn_eval_sums: bias must have shape"),
        (lambda t: ops.bn_eval_sums(t(3), t(3), t(3)), ValueError, r"x must have shape \[N, C, ...\]"),
        (lambda t: ops.bn_eval_sums(t(3, 4).int(), t(4), t(4)), TypeError, "x must be float32, float64, bfloat16 or float16, got Int"),
        (lambda t: ops.bn_eval_sums(t(3, 4).half(), t(4).half(), t(4)), TypeError, "mean must be Float for x of Half, got Half"),
        (lambda t: zsq.bn_eval_sums_backward(t(3, 5), t(2, 4).double(), t(3, 4), t(4), t(4), None, EPS), ValueError,
         r"grad_y must have the shape of x"),
        (lambda t: zsq.bn_eval_sums_backward(t(3, 4).half(), t(2, 4).double(), t(3, 4), t(4), t(4), None, EPS), TypeError,
         r"grad_y must have the dtype of x"),
        (lambda t: zsq.bn_eval_sums_backward(None, t(2, 4), t(3, 4), t(4), t(4), None, EPS), TypeError, "grad_sums must be float64"),
        (lambda t: ops.bn_stats_loss(t(2, 4), t(4), 3), TypeError, "bn_stats_loss: sums must be float64, got Float"),
        (lambda t: ops.bn_stats_loss(t(2, 5).double(), t(4), 3), ValueError, r"sums must have shape \[2, 4\], got \[2, 5\]"),
        (lambda t: ops.bn_stats_loss(t(2, 4).double(), t(4).half(), 3), TypeError, "var must be float32 or float64"),
        (lambda t: ops.bn_stats_loss(t(2, 4).double(), t(4), 0), ValueError, "count must be positive, got 0"),
    ],
)  # fmt: skip
def test_messages_name_op_argument_and_value(call, error, words, device):
    with pytest.raises(error, match=words):
        call(lambda *shape: torch.zeros(shape, device=device))
