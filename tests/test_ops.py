"""Six tests per operation: values, gradients, opcheck, layouts, empty input, messages. Codes and values are compared bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsq_fast import ops, reference

BITS = range(2, 9)
SHAPES = [(16, 3, 3, 3), (7, 5, 5, 5), (32, 1, 3, 3), (10, 64), (3, 4700), (1, 1), (5,), (24, 16, 1, 1)]
DTYPES = [torch.float32, torch.float64]


def same(a: Tensor, b: Tensor) -> None:
    """Bitwise equality that counts NaN as equal and names the first difference."""
    assert a.shape == b.shape and a.dtype == b.dtype
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differ.sum())} of {a.numel()} differ, first at {at}: {a[at].item()!r} != {b[at].item()!r}"
        )


def degenerate(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A weight whose rows are, in turn: normal, constant, zero, positive, denormal, huge, infinite, NaN."""
    w = torch.randn(shape, dtype=dtype)
    rows = w.view(shape[0], -1)
    changes = [
        lambda r: r, lambda r: r.fill_(3.7), lambda r: r.zero_(), lambda r: r.abs_().add_(0.1), lambda r: r.mul_(1e-40),
        lambda r: r.mul_(1e30), lambda r: r.index_fill_(0, torch.tensor([0]), float("inf")),
        lambda r: r.index_fill_(0, torch.tensor([r.numel() - 1]), float("nan")),
    ]  # fmt: skip
    for i, row in enumerate(rows):
        changes[i % len(changes)](row)
    return w.to(device)


# ---- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_values_and_codes(shape, dtype, device):
    for weight in (torch.randn(shape, dtype=dtype, device=device), degenerate(shape, dtype, device)):
        for bits in BITS:
            same(ops.fake_quant_weight(weight, bits), reference.fake_quant_weight(weight, bits))
            for got, want in zip(ops.weight_codes(weight, bits), reference.weight_codes(weight, bits), strict=True):
                same(got, want)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_and_every_tie(bits, device):
    """Every code of the grid and every half-way point between two codes, where rounding is to even."""
    n = 2**bits - 1
    steps = torch.arange(0, 2 * n + 1, dtype=torch.float64) / 2 - n // 2  # codes and ties of a unit grid
    row = torch.cat([steps, steps.flip(0)]).float().repeat(3, 1).to(device)
    values = ops.fake_quant_weight(row, bits)
    same(values, reference.fake_quant_weight(row, bits))
    assert values[0].unique().numel() == n + 1


def test_weight_gradient_is_the_identity(device):
    w = degenerate((8, 3, 3, 3), torch.float32, device).requires_grad_()
    g = torch.randn(w.shape, device=device)
    (grad,) = torch.autograd.grad(ops.fake_quant_weight(w, 3), w, g)
    same(grad, g)


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory layouts."""
    wide = torch.empty(*x.shape[:-1], x.shape[-1] * 2, dtype=x.dtype, device=x.device)
    views = {"slice": wide[..., ::2].copy_(x), "offset": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)}
    if x.dim() == 4:
        views["channels_last"] = x.to(memory_format=torch.channels_last)
        views["transposed"] = x.transpose(0, 1).contiguous().transpose(0, 1)
        views["expanded"] = x[:, :1].expand_as(x)
    return views


@pytest.mark.parametrize("layout", ["slice", "offset", "channels_last", "transposed", "expanded"])
def test_layouts(layout, device):
    x = strided(torch.randn(6, 5, 3, 7, device=device))[layout]
    lo, hi = torch.tensor(-1.0, device=device), torch.tensor(1.5, device=device)
    same(ops.fake_quant_weight(x, 4), reference.fake_quant_weight(x.contiguous(), 4))
    same(ops.weight_codes(x, 4)[0], reference.weight_codes(x.contiguous(), 4)[0])
    same(ops.fake_quant_act(x, lo, hi, 4), reference.fake_quant_act(x.contiguous(), lo, hi, 4))
    if layout == "channels_last":
        assert ops.fake_quant_weight(x, 4).is_contiguous(memory_format=torch.channels_last)
        assert ops.fake_quant_act(x, lo, hi, 4).is_contiguous(memory_format=torch.channels_last)
    mean, var = torch.randn(5, device=device), torch.rand(5, device=device)
    close(torch.ops.zsq.bn_stats_match(x, mean, var), torch.ops.zsq.bn_stats_match(x.contiguous(), mean, var))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 130), bits=st.integers(2, 8), scale=st.sampled_from([1e-42, 1e-8, 1.0, 1e6, 1e37]),
    shift=st.sampled_from([0.0, -1.0, 1.0, 100.0]), double=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_sweep_of_weights(rows, cols, bits, scale, shift, double, seed):
    rng = torch.Generator().manual_seed(seed)
    w = (torch.randn(rows, cols, generator=rng, dtype=torch.float64) + shift) * scale
    w = w if double else w.float()
    same(ops.fake_quant_weight(w, bits), reference.fake_quant_weight(w, bits))
    same(ops.weight_codes(w, bits)[0], reference.weight_codes(w, bits)[0])


# ---- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lo, hi", [(0.0, 3.0), (-1.3, 2.1), (0.5, 0.5), (0.0, 0.0), (-2.0, -1.0), (2.0, -1.0), (float("nan"), 1.0)]
)
def test_act_values(dtype, lo, hi, device):
    x = torch.randn(3, 5, 7, 11, dtype=dtype, device=device) * 2
    x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    lo_t, hi_t = (torch.tensor([v], dtype=dtype, device=device) for v in (lo, hi))
    for bits in BITS:
        same(ops.fake_quant_act(x, lo_t, hi_t, bits), reference.fake_quant_act(x, lo_t, hi_t, bits))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "size", [1, 31, 4096, 70_001, 1_000_003, 5_000_003]
)  # 4 MB fit into a GPU's registers, 20 MB do not
def test_running_range(plain, size, device):
    states = [
        [
            torch.tensor(float("nan"), device=device),
            torch.tensor(float("nan"), device=device),
            torch.ones((), device=device),
        ]
        for _ in "ab"
    ]
    for _ in range(30 if size < 100_000 else 3):
        x = torch.randn(size, device=device).relu()
        got = ops.fake_quant_act_running(x, *states[0], 4, 0.9, plain)
        same(got, reference.fake_quant_act_running(x, *states[1], 4, 0.9, plain))
        for a, b in zip(*states, strict=True):
            same(a, b)


def test_running_range_settles():
    """ait_family.md section 13: on a constant signal both trackers agree within 0.1 % after 175 updates; the published one overshoots."""
    seen = []
    for plain in (False, True):
        lo, hi, beta = torch.tensor(float("nan")), torch.tensor(float("nan")), torch.ones(())
        values = []
        for _ in range(175):
            ops.fake_quant_act_running(torch.ones(8), lo, hi, beta, 4, 0.9, plain)
            values.append(hi.item())
        seen.append(values)
    published, plain_values = seen
    assert max(published) > 3900 and abs(published[-1] - 1) < 1e-3
    assert max(abs(v - 1) for v in plain_values) < 1e-5


def test_act_gradients_are_the_identity(device):
    lo, hi, beta = torch.zeros((), device=device), torch.ones((), device=device), torch.ones((), device=device)
    for op in (lambda x: ops.fake_quant_act(x, lo, hi, 4), lambda x: ops.fake_quant_act_running(x, lo, hi, beta, 4)):
        x = torch.randn(3, 4, 5, device=device).mul_(10).requires_grad_()  # most values saturate
        g = torch.randn(x.shape, device=device)
        same(torch.autograd.grad(op(x), x, g)[0], g)


# ---- batch-norm statistics ---------------------------------------------------------------------------------------------


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], rtol: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(4, 8, 6, 6), (16, 3, 5, 7), (9, 70), (2, 64, 1, 1), (3, 5, 11), (2, 3, 4, 5, 6), (33, 16, 32, 32)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bn_stats_values_and_gradient(shape, dtype, device):
    x = (torch.randn(shape, dtype=dtype, device=device) * 2 + 0.5).requires_grad_()
    mean, var = (
        torch.randn(shape[1], dtype=dtype, device=device),
        torch.rand(shape[1], dtype=dtype, device=device) + 0.5,
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        if layout is torch.channels_last and len(shape) != 4:
            continue
        inner = x.to(memory_format=layout) if len(shape) == 4 else x
        close(torch.ops.zsq.bn_stats_match(inner.detach(), mean, var), reference.bn_stats_match(x.detach(), mean, var))
        (got,) = torch.autograd.grad(3 * ops.bn_stats_match(inner, mean, var), x)
        (want,) = torch.autograd.grad(3 * reference.bn_stats_match(x, mean, var)[0], x)  # the reference's own autograd
        error = (got - want).norm() / want.norm()
        assert error < (1e-6 if dtype is torch.float32 else 1e-13)
        closed = reference.bn_stats_match_backward(torch.tensor(3.0, dtype=dtype, device=device), x.detach(), mean, var,
                                                   *reference.bn_stats_match(x.detach(), mean, var)[1:])  # fmt: skip
        assert (closed - want).norm() / want.norm() < 1e-5


def test_bn_stats_gradcheck(device):
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    mean, var = torch.randn(4, dtype=torch.float64, device=device), torch.rand(4, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda t: ops.bn_stats_match(t, mean, var), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bn_stats_bits_do_not_depend_on_threads(layout):
    x = torch.randn(37, 19, 23, 17).to(memory_format=layout)
    mean, var = torch.randn(19), torch.rand(19)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = torch.ops.zsq.bn_stats_match(x, mean, var)
            seen.append((*out, torch.ops.zsq.bn_stats_match_backward(out[0], x, mean, var, *out[1:])))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            same(a, b)


def test_nan_in_nan_out(device):
    x = torch.randn(4, 3, 5, 5, device=device)
    x[1, 2, 3, 4] = float("nan")
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    loss, batch_mean, batch_var = torch.ops.zsq.bn_stats_match(x, mean, var)
    assert loss.isnan() and batch_mean[2].isnan() and batch_var[2].isnan() and batch_mean[:2].isfinite().all()
    lo, hi, beta = (torch.ones((), device=device) for _ in range(3))
    assert ops.fake_quant_act_running(x, lo, hi, beta, 4).isnan().all() and lo.isnan() and hi.isnan()
    assert ops.fake_quant_weight(x, 4)[1].isnan().all() and ops.fake_quant_weight(x, 4)[0].isfinite().all()


# ---- all ---------------------------------------------------------------------------------------------------------------


def samples(device: str) -> dict[str, tuple]:
    w, x = (
        torch.randn(6, 3, 3, 3, device=device, requires_grad=True),
        torch.randn(4, 6, 5, 5, device=device, requires_grad=True),
    )
    one = [torch.ones(1, device=device) for _ in range(3)]
    mean, var = torch.randn(6, device=device), torch.rand(6, device=device)
    weights, grads = (
        [torch.randn(6, 3, device=device), torch.randn(4, 5, device=device)],
        [torch.randn(6, 3, device=device), torch.randn(4, 5, device=device)],
    )
    momenta = [torch.zeros_like(g) for g in grads]
    kappa, changed = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    return {
        "fake_quant_weight": (w, 4),
        "weight_codes": (w.detach(), 4),
        "fake_quant_act": (x, -one[0], one[1], 4),
        "fake_quant_act_running": (x, one[0], one[1], one[2], 4, 0.9, True),
        "bn_stats_match": (x, mean, var),
        "bn_stats_match_backward": (one[0].view(()), x.detach(), mean, var, mean, var),
        "gi_sgd_": (weights, grads, momenta, kappa, changed, 1e-3, 0.9, True, 0.0, 4, 0.05, 5, False, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(samples("cpu")))
def test_opcheck(name, device):
    torch.library.opcheck(getattr(torch.ops.zsq, name).default, samples(device)[name])


@pytest.mark.parametrize("layout", ["slice", "channels_last", "transposed", "expanded", "channel_slice"])
def test_opcheck_of_layouts(layout, device):
    """What tracing is told about the strides of a result is what the kernel returns."""
    x = torch.randn(4, 6, 5, 5, device=device)
    wide = torch.randn(4, 12, 5, 5, device=device).to(memory_format=torch.channels_last)
    x = wide[:, :6] if layout == "channel_slice" else strided(x)[layout]
    one = [torch.ones((), device=device) for _ in range(3)]
    mean, var = torch.randn(6, device=device), torch.rand(6, device=device)
    for name, args in {
        "fake_quant_weight": (x, 4), "weight_codes": (x, 4), "fake_quant_act": (x, *one[:2], 4),
        "fake_quant_act_running": (x, *one, 4, 0.9, True), "bn_stats_match": (x, mean, var),
        "bn_stats_match_backward": (one[0], x, mean, var, mean, var),
    }.items():  # fmt: skip
        op = getattr(torch.ops.zsq, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_updates_in_place_count_as_changes(device):
    """A backward pass that saved a weight before the step must notice."""
    args = samples(device)["gi_sgd_"]
    versions = [t._version for t in (*args[0], *args[2], args[3], args[4])]
    torch.ops.zsq.gi_sgd_(*args)
    assert [t._version for t in (*args[0], *args[2], args[3], args[4])] == [v + 1 for v in versions]
    x, lo, hi, beta = samples(device)["fake_quant_act_running"][:4]
    torch.ops.zsq.fake_quant_act_running(x, lo, hi, beta, 4, 0.9, True)
    assert lo._version == hi._version == beta._version == 1


def test_compiles_as_one_graph(device):
    lo, hi = torch.zeros((), device=device), torch.ones((), device=device)
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)

    def step(w: Tensor, x: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(ops.fake_quant_act(x, lo, hi, 4), ops.fake_quant_weight(w, 4))
        return y.square().mean() + ops.bn_stats_match(x, mean, var)

    w, x = (
        t.detach()
        for t in (samples(device)["fake_quant_weight"][0].repeat(1, 2, 1, 1), samples(device)["fake_quant_act"][0])
    )
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [w.clone().requires_grad_(), x.clone().requires_grad_()]
        loss = run(*inputs)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    close(tuple(results[1]), tuple(results[0]))


def test_empty(device):
    one = torch.ones((), device=device)
    assert ops.fake_quant_weight(torch.empty(0, 3, device=device), 4).shape == (0, 3)
    assert ops.fake_quant_weight(torch.empty(3, 0, device=device), 4).shape == (3, 0)
    assert ops.weight_codes(torch.empty(3, 0, device=device), 4)[1].shape == (3,)
    assert ops.fake_quant_act(torch.empty(2, 0, device=device), one, one, 4).shape == (2, 0)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda t: ops.fake_quant_weight(t(2, 2), 1), ValueError, "fake_quant_weight: bits must be 2 to 8, got 1"),
        (lambda t: ops.fake_quant_weight(t(2, 2), 9), ValueError, "got 9"),
        (lambda t: ops.fake_quant_weight(t(2, 2).int(), 4), TypeError, "weight must be float32, float64, bfloat16 or float16, got Int"),
        (lambda t: ops.fake_quant_weight(t(()), 4), ValueError, "at least one dimension"),
        (lambda t: ops.fake_quant_act(t(3), t(2), t(1), 4), ValueError, "fake_quant_act: lo must have one element, got shape \\[2\\]"),
        (lambda t: ops.fake_quant_act(t(3), t(1), t(1).double(), 4), TypeError, "hi must be Float for x of Float, got Double"),
        (lambda t: ops.fake_quant_act_running(t(0), t(1), t(1), t(1), 4), ValueError, "x must not be empty"),
        (lambda t: ops.fake_quant_act_running(t(3), t(1), t(1), t(1), 4, 1.5), ValueError, "decay must lie between 0 and 1"),
        (lambda t: ops.bn_stats_match(t(3, 4), t(5), t(4)), ValueError, "bn_stats_match: mean must have shape \\[4\\]"),
        (lambda t: ops.bn_stats_match(t(3), t(3), t(3)), ValueError, "x must have shape \\[N, C, ...\\]"),
        (lambda t: ops.bn_stats_match(t(0, 4), t(4), t(4)), ValueError, "must not be empty"),
    ],
)  # fmt: skip
def test_messages_name_op_argument_and_value(call, error, words, device):
    with pytest.raises(error, match=words):
        call(lambda *shape: torch.zeros(shape if shape != ((),) else (), device=device))


def test_no_kernel_for_other_devices():
    with pytest.raises(NotImplementedError, match="fake_quant_weight"):
        torch.ops.zsq.fake_quant_weight.default(torch.empty(2, 2, device="cpu").to_sparse(), 4)
