"""bn_act_fake_quant and its backward pass: values and masks bit for bit, sums against float64, autograd, layouts, messages."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_fast import ops, reference
from zsq_fast.errors import UsageError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (4, 8, 6, 6),
    (3, 5, 7, 7),
    (11, 16, 7, 7),
    (9, 70),
    (2, 64, 1, 1),
    (3, 5, 11),
    (2, 3, 4, 5, 6),
    (1, 1),
    (2, 3, 90, 91),
]
forward, backward = torch.ops.zsq.bn_act_fake_quant.default, torch.ops.zsq.bn_act_fake_quant_backward.default


def same(a: Tensor, b: Tensor) -> None:
    """Equal bit by bit (the sign of zero counts), any NaN counting as any other; names the first difference."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if not a.is_floating_point():
        return torch.testing.assert_close(a, b, rtol=0, atol=0)
    differ = ~(((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan()))
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differ.sum())} of {a.numel()} differ, first at {at}: {a[at].item()!r} != {b[at].item()!r}"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameters(channels: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """mean, var, weight, bias; some variances are zero or denormal, some weights negative or zero."""
    mean, var, weight, bias = (torch.randn(channels, dtype=wide(dtype), device=device) for _ in "abcd")
    var = var.abs() + 0.1
    if channels > 4:
        var[1], var[2], weight[3], weight[4] = 0, 1e-40, 0, -0.0
    return [mean, var, weight, bias]


def ends(lo: float, hi: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=wide(dtype), device=device) for v in (lo, hi))


def special(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers with NaN, infinities, zeros of both signs, denormals and huge numbers among them."""
    x = torch.randn(shape, dtype=torch.float64) * 3
    odd = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-41, 1e-7, 6e4, -6e4, 6.0]
    where = torch.randperm(x.numel())[: x.numel() // 2]
    x.view(-1)[where] = torch.tensor(odd, dtype=torch.float64)[torch.arange(len(where)) % len(odd)]
    return x.to(dtype).to(device)


def sums_agree(
    got: tuple[Tensor, Tensor], grad: Tensor, mask: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps
) -> None:
    """dgamma and dbeta against float64, relative to the size of what is added up: up to 1024 values are added in fp32."""
    dims = [d for d in range(x.dim()) if d != 1]
    like = torch.empty_like(grad, dtype=torch.bool)
    bits = ((mask[:, None] >> torch.arange(8, device=mask.device)) & 1).flatten()[: like.numel()].bool()
    like.as_strided((like.numel(),), (1,)).copy_(bits)
    shape = [1, -1] + [1] * (x.dim() - 2)
    normalised = (x.double() - mean.double().view(shape)) / torch.sqrt(var + eps).double().view(shape)
    for ours, factor in zip(got, (normalised, torch.ones_like(normalised)), strict=True):
        terms = torch.where(like, grad.double(), 0.0) * factor
        want, size = terms.sum(dims), terms.abs().sum(dims)
        known = size.isfinite()
        tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-14
        assert ((ours.double() - want).abs()[known] <= tolerance * size[known]).all()
        assert ours.isnan().equal(want.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_masks_and_gradients(shape, dtype, device):
    mean, var, weight, bias = parameters(shape[1], dtype, device)
    residual, grad = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    ranges = itertools.cycle([(0.0, 3.0), (-1.3, 2.1), (0.5, 0.5), (-2.0, -1.0), (float("nan"), 1.0), (0.0, 7.5)])
    for x in (torch.randn(shape, device=device).to(dtype), special(shape, dtype, device)):
        for i, (activation, added, clip) in enumerate(
            itertools.product(("none", "relu", "relu6"), (None, residual), (False, True))
        ):
            w, b = (weight if i % 2 else None), (bias if i % 3 else None)
            lo, hi = ends(*next(ranges), dtype, device)
            args = (x, added, mean, var, w, b, 1e-5, activation, lo, hi, 2 + i % 7, clip)
            got, want = forward(*args), reference.bn_act_fake_quant(*args)
            same(got[0], want[0])
            same(got[1], want[1])
            for affine in (False, True):
                rest = (grad, got[1], x, mean, var, w, 1e-5, added is not None, affine)
                ours, truth = backward(*rest), reference.bn_act_fake_quant_backward(*rest)
                same(ours[0], truth[0])
                same(ours[1], truth[1])
                assert ours[2].shape == truth[2].shape and ours[3].shape == truth[3].shape
                if affine:
                    sums_agree(ours[2:], grad, got[1], x, mean, var, 1e-5)


def layouts(x: Tensor) -> dict[str, Tensor]:
    double = torch.cat([x, x], 1).to(memory_format=torch.channels_last)
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "slice": torch.cat([x, x], 3)[..., ::2],
        "channel_slice": double[:, : x.shape[1]],
        "transposed": x.transpose(2, 3),
        "channel_outermost": x.transpose(0, 1).contiguous().transpose(0, 1),
        "offset": torch.cat([x.flatten(), x.flatten()])[1 : x.numel() + 1].view(x.shape),
        "expanded": x[:1].expand(x.shape),
        "expanded_channels": x[:, :1].expand(x.shape),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(layouts(torch.ones(2, 3, 4, 4))))
@pytest.mark.parametrize("shape", [(6, 5, 3, 7), (3, 16, 5, 4), (300, 8, 5, 3)])
def test_layouts(name, shape, dtype, device):
    x = layouts(torch.randn(shape, device=device).to(dtype))[name]
    residual = torch.randn(x.shape, device=device).to(dtype)
    mean, var, weight, bias = parameters(x.shape[1], dtype, device)
    lo, hi = ends(0.0, 2.0, dtype, device)
    args = (x, residual, mean, var, weight, bias, 1e-5, "relu", lo, hi, 4, True)
    (out, mask), want = forward(*args), reference.bn_act_fake_quant(*args)
    same(mask, want[1])
    assert out.stride() == torch.empty_like(x).stride()
    same(out, torch.empty_like(x).copy_(want[0]))
    for grad in (
        torch.randn(x.shape, device=device).to(dtype),
        torch.ones((), device=device, dtype=dtype).expand(x.shape),
    ):
        dense = torch.empty_like(out).copy_(grad)  # the reference wants the strides of the result
        got = backward(grad, mask, x, mean, var, weight, 1e-5, True, True)
        truth = reference.bn_act_fake_quant_backward(
            dense, mask, torch.empty_like(out).copy_(x), mean, var, weight, 1e-5, True, False
        )
        same(got[0], truth[0])
        same(got[1], truth[1])
        sums_agree(got[2:], dense, mask, x, mean, var, 1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bits_do_not_depend_on_threads(layout):
    x, residual, grad = (torch.randn(37, 19, 23, 17).to(memory_format=layout) for _ in "abc")
    p, (lo, hi) = parameters(19, torch.float32, "cpu"), ends(0.0, 2.0, torch.float32, "cpu")
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = forward(x, residual, *p, 1e-5, "relu", lo, hi, 4, True)
            seen.append((*out, *backward(grad, out[1], x, *p[:3], 1e-5, True, True)))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            assert torch.equal(a, b)


def norm_for(channels: int, dtype: torch.dtype, device: str) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).to(device, wide(dtype)).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
@pytest.mark.parametrize(
    "wanted", [{"x"}, {"residual"}, {"weight"}, {"bias"}, {"x", "residual"}, {"x", "residual", "weight", "bias"}]
)
def test_gradients_are_those_of_autograd(wanted, activation, layout, device):
    """Against torch's batch norm and activation in float64, fake quantization being the identity to a gradient."""
    x, residual, grad = (
        torch.randn(5, 6, 7, 5, dtype=torch.float64, device=device).to(memory_format=layout) for _ in "abc"
    )
    norm, (lo, hi) = norm_for(6, torch.float64, device), ends(0.0, 3.0, torch.float64, device)
    inputs = {"x": x, "residual": residual, "weight": norm.weight, "bias": norm.bias}
    for name, t in inputs.items():
        t.requires_grad_(name in wanted)
    got = ops.bn_act_fake_quant(x, norm, lo, hi, 4, activation=activation, residual=residual)
    act = {"relu": F.relu, "relu6": F.relu6, "none": lambda t: t}[activation]
    want = act(norm(x) + residual)
    leaves = [inputs[k] for k in sorted(wanted)]
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.stride() == b.stride()


def test_clip_blocks_what_was_clamped(device):
    x = torch.linspace(-4, 4, 33, device=device).view(1, 1, 33).requires_grad_()
    norm, (lo, hi) = nn.BatchNorm1d(1, eps=0.0, affine=False).to(device).eval(), ends(0.0, 2.0, torch.float32, device)
    passes = {}
    for ste in ("identity", "clip"):
        out = ops.bn_act_fake_quant(x, norm, lo, hi, 8, ste=ste)
        passes[ste] = torch.autograd.grad(out.sum(), x)[0].flatten()
    values = x.detach().flatten()
    assert torch.equal(passes["identity"], (values > 0).float())
    assert torch.equal(passes["clip"], ((values > 0) & (values <= 2)).float())


def test_x_is_kept_for_affine_gradients_only(device):
    x = torch.randn(4, 6, 5, 5, device=device, requires_grad=True)
    norm, (lo, hi) = norm_for(6, torch.float32, device), ends(0.0, 3.0, torch.float32, device)
    kept: list[Tensor] = []
    for frozen in (True, False):
        norm.requires_grad_(not frozen)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            ops.bn_act_fake_quant(x, norm, lo, hi, 4).sum().backward()
        assert any(t.data_ptr() == x.data_ptr() for t in kept) != frozen
    with torch.no_grad():
        assert not ops.bn_act_fake_quant(x, norm, lo, hi, 4).requires_grad


def test_gradient_of_another_layout(device):
    """A gradient comes in whatever strides the next layer chose; the mask is in those of x."""
    x = torch.randn(4, 6, 5, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    norm, (lo, hi) = norm_for(6, torch.float32, device).requires_grad_(False), ends(0.0, 3.0, torch.float32, device)
    grad = torch.randn(4, 6, 5, 3, device=device)
    got = [torch.autograd.grad(ops.bn_act_fake_quant(x, norm, lo, hi, 4), x, g)[0] for g in
           (grad, grad.to(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().transpose(2, 3))]  # fmt: skip
    want = torch.autograd.grad(F.relu(norm(x)), x, grad)[0]
    for g in got:
        torch.testing.assert_close(g, want)


def test_no_second_derivative(device):
    x = torch.randn(4, 6, 5, 3, device=device, requires_grad=True)
    norm, (lo, hi) = norm_for(6, torch.float32, device), ends(0.0, 3.0, torch.float32, device)
    with pytest.raises(NotImplementedError, match="bn_act_fake_quant_backward: no second derivative"):
        torch.autograd.grad(ops.bn_act_fake_quant(x, norm, lo, hi, 4).sum(), x, create_graph=True)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 5), channels=st.integers(1, 40), s=st.integers(1, 70), bits=st.integers(2, 8), clip=st.booleans(),
    activation=st.sampled_from(["relu", "relu6", "none"]), dtype=st.sampled_from(DTYPES), added=st.booleans(),
    last=st.booleans(), size=st.sampled_from([1e-6, 1.0, 1e4]), eps=st.sampled_from([0.0, 1e-5, 1e-3]), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_sweep(n, channels, s, bits, clip, activation, dtype, added, last, size, eps, seed):
    torch.manual_seed(seed)
    x, residual, grad = ((torch.randn(n, channels, s, 1) * size).to(dtype) for _ in "abc")
    if last:
        x, residual, grad = (t.to(memory_format=torch.channels_last) for t in (x, residual, grad))
    p, (lo, hi) = parameters(channels, dtype, "cpu"), ends(-size if seed % 2 else 0.0, 2 * size, dtype, "cpu")
    args = (x, residual if added else None, *p, eps, activation, lo, hi, bits, clip)
    got, want = forward(*args), reference.bn_act_fake_quant(*args)
    same(got[0], want[0])
    same(got[1], want[1])
    grad = torch.empty_like(got[0]).copy_(grad)
    ours = backward(grad, got[1], x, *p[:3], eps, added, True)
    truth = reference.bn_act_fake_quant_backward(grad, got[1], x, *p[:3], eps, added, True)
    same(ours[0], truth[0])
    same(ours[1], truth[1])
    if eps:
        sums_agree(ours[2:], grad, got[1], x, *p[:2], eps)


def samples(device: str, layout: torch.memory_format = torch.contiguous_format) -> dict[str, tuple]:
    x, residual, grad = (torch.randn(4, 6, 5, 5, device=device).to(memory_format=layout) for _ in "abc")
    p, (lo, hi) = parameters(6, torch.float32, device), ends(0.0, 2.0, torch.float32, device)
    _, mask = forward(x, residual, *p, 1e-5, "relu", lo, hi, 4, True)
    leaves = [t.clone().requires_grad_() for t in (x, residual, *p[2:])]
    return {
        "all": (forward, (*leaves[:2], *p[:2], *leaves[2:], 1e-5, "relu", lo, hi, 4, True)),
        "x": (forward, (leaves[0], None, *p[:2], None, None, 1e-5, "relu6", lo, hi, 4, False)),
        "affine": (forward, (x, None, *p[:2], *leaves[2:], 1e-5, "none", lo, hi, 4, False)),
        "backward": (backward, (grad, mask, x, *p[:3], 1e-5, True, True)),
        "backward_x": (backward, (grad, mask, grad, *p[:2], None, 1e-5, False, False)),
    }


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", list(samples("cpu")))
def test_opcheck(name, layout, device):
    torch.library.opcheck(*samples(device, layout)[name])


@pytest.mark.parametrize("name", list(layouts(torch.ones(2, 3, 4, 4))))
def test_opcheck_of_layouts(name, device):
    x = layouts(torch.randn(4, 6, 5, 5, device=device))[name]
    p, (lo, hi) = parameters(6, torch.float32, device), ends(0.0, 2.0, torch.float32, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (x, x, *p, 1e-5, "relu", lo, hi, 4, True), test_utils=checks)
    mask = forward(x, None, *p, 1e-5, "relu", lo, hi, 4, True)[1]
    torch.library.opcheck(backward, (x, mask, x, *p[:3], 1e-5, True, True), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_as_one_graph(frozen, dynamic, device):
    norm, (lo, hi) = (
        norm_for(6, torch.float32, device).requires_grad_(not frozen),
        ends(0.0, 2.0, torch.float32, device),
    )

    def step(x: Tensor, residual: Tensor) -> Tensor:
        return ops.bn_act_fake_quant(x * 2, norm, lo, hi, 4, residual=residual, ste="clip").square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 4):
        x = torch.randn(4, 6, size, 5, device=device).to(memory_format=torch.channels_last)
        results = []
        for run in (step, compiled):
            inputs = [x.clone().requires_grad_(), x.flip(0).requires_grad_()]
            leaves = inputs if frozen else [*inputs, norm.weight, norm.bias]
            loss = run(*inputs)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0)])
def test_empty(shape, device):
    p, (lo, hi) = parameters(shape[1], torch.float32, device), ends(0.0, 1.0, torch.float32, device)
    x = torch.empty(shape, device=device)
    out, mask = forward(x, x, *p, 1e-5, "relu", lo, hi, 4, True)
    assert out.shape == shape and mask.shape == (0,)
    grad_x, grad_residual, grad_weight, grad_bias = backward(x, mask, x, *p[:3], 1e-5, True, True)
    assert grad_x.shape == grad_residual.shape == shape
    assert grad_weight.tolist() == grad_bias.tolist() == [0.0] * shape[1]


def call(device: str, **changes):
    p = dict(zip(("mean", "var", "weight", "bias"), parameters(3, torch.float32, device), strict=True))
    lo, hi = ends(0.0, 1.0, torch.float32, device)
    args = {"x": torch.zeros(2, 3, 4, device=device), "residual": None, **p, "eps": 1e-5, "activation": "relu", "lo": lo,
            "hi": hi, "bits": 4, "clip": False}  # fmt: skip
    return forward(*(args | {k: v(device) if callable(v) else v for k, v in changes.items()}).values())


def call_backward(device: str, **changes):
    p = dict(zip(("mean", "var", "weight"), parameters(3, torch.float32, device)[:3], strict=True))
    x = torch.zeros(2, 3, 4, device=device)
    args = {"grad": x, "mask": torch.zeros(3, dtype=torch.uint8, device=device), "x": x, **p, "eps": 1e-5,
            "residual": True, "affine": True}  # fmt: skip
    return backward(*(args | {k: v(device) for k, v in changes.items()}).values())


@pytest.mark.parametrize(
    "run, changes, error, words",
    [
        (call, {"bits": 9}, ValueError, "bn_act_fake_quant: bits must be 2 to 8, got 9"),
        (call, {"activation": "gelu"}, ValueError, "activation must be 'relu', 'relu6' or 'none', got 'gelu'"),
        (call, {"x": lambda d: torch.zeros(2, 3, dtype=torch.int64, device=d)}, TypeError, "x must be float32, float64"),
        (call, {"x": lambda d: torch.zeros(3, device=d)}, ValueError, r"x must have shape \[N, C, ...\]"),
        (call, {"mean": lambda d: torch.zeros(4, device=d)}, ValueError, r"mean must have shape \[3\]"),
        (call, {"var": lambda d: torch.zeros(3, device=d).double()}, TypeError, "var must be Float for x of Float"),
        (call, {"weight": lambda d: torch.zeros(3, device=d).half()}, TypeError, "weight must be Float for x of Float"),
        (call, {"bias": lambda d: torch.zeros(1, device=d)}, ValueError, r"bias must have shape \[3\]"),
        (call, {"residual": lambda d: torch.zeros(2, 3, 1, device=d)}, ValueError, r"residual must have the shape of x \(\[2, 3, 4\]\)"),
        (call, {"residual": lambda d: torch.zeros(2, 3, 4, device=d).half()}, TypeError, "residual must have the dtype of x"),
        (call, {"lo": lambda d: torch.zeros(2, device=d)}, ValueError, "lo must have one element"),
        (call, {"hi": lambda d: torch.zeros((), device=d).double()}, TypeError, "hi must be Float"),
        (call_backward, {"mask": lambda d: torch.zeros(4, dtype=torch.uint8, device=d)}, ValueError, r"mask must have shape \[3\]"),
        (call_backward, {"mask": lambda d: torch.zeros(3, device=d)}, TypeError, "mask must be uint8, got Float"),
        (call_backward, {"grad": lambda d: torch.zeros(2, 3, device=d)}, ValueError, "grad must have the shape of x"),
    ],
)  # fmt: skip
def test_messages_name_op_argument_and_value(run, changes, error, words, device):
    run(device)
    with pytest.raises(error, match=words):
        run(device, **changes)


def test_public_messages():
    lo, hi = ends(0.0, 1.0, torch.float32, "cpu")
    with pytest.raises(UsageError, match="ste must be"):
        ops.bn_act_fake_quant(torch.zeros(2, 3, 4, 4), nn.BatchNorm2d(3), lo, hi, 4, ste="soft")
    with pytest.raises(UsageError, match="no running statistics"):
        ops.bn_act_fake_quant(torch.zeros(2, 3, 4, 4), nn.BatchNorm2d(3, track_running_stats=False), lo, hi, 4)


# Runs of whole AVX-512 registers take a path of their own on the CPU, also those of small planes, which are one value after the other;
# two shapes are large enough to be written past the caches.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 4, 4), (2, 16, 3, 5), (2, 32, 8, 8), (24, 32, 7, 7), (40, 64, 48, 48), (240, 512, 7, 7), (300, 33, 5, 5)],
)
def test_whole_registers(shape, layout):
    channels = shape[1]
    parameters = [torch.randn(channels), torch.rand(channels) + 0.1, torch.randn(channels), torch.randn(channels)]
    lo, hi, threads = torch.tensor(-0.5), torch.tensor(2.5), torch.get_num_threads()
    for activation in ("none", "relu", "relu6"):
        for bits in (4,) if shape[0] >= 40 else (4, 5):
            x, grad = (torch.randn(shape).mul_(3).contiguous(memory_format=layout) for _ in range(2))
            x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
            results = []
            try:
                for n in (1, 2, 3):
                    torch.set_num_threads(n)
                    out, mask = forward(x, grad, *parameters, 1e-5, activation, lo, hi, bits, False)
                    results.append((out, mask, *backward(grad, mask, x, *parameters[:3], 1e-5, True, True)))
            finally:
                torch.set_num_threads(threads)
            for result in results[1:]:
                for ours, theirs in zip(result, results[0], strict=True):
                    same(ours, theirs)
            want = reference.bn_act_fake_quant(x, grad, *parameters, 1e-5, activation, lo, hi, bits, False)
            wanted = reference.bn_act_fake_quant_backward(grad, want[1], x, *parameters[:3], 1e-5, True, True)
            for ours, theirs in zip(results[0][:4], (*want, *wanted[:2]), strict=True):
                same(ours, theirs)
            sums_agree(results[0][4:], grad, want[1], x, *parameters[:2], 1e-5)
