"""Losses: values and gradients against the reference in float64, opcheck, layouts, extreme and broken logits, messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import same, strided
from torch import Tensor

from zsq_fast import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["channel", "spatial", "direct"]
zsq = torch.ops.zsq


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def near(got: Tensor, want: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within a few roundings of the largest value; a result in 16 bits has one rounding of its own."""
    tol = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype] * factor
    got, want = got.double(), want.double()
    tiny = {torch.float16: 6e-8, torch.float64: 1e-14}.get(dtype, 1e-7)  # of maps with one value the gradient is 0
    assert ((got - want).abs().max() <= tol * want.abs().max() + tiny) and got.shape == want.shape, (got, want)


def distil(student, teacher, target, temperature=20.0, batchmean=False, kd=1.0, ce=1.0, gamma=0.0, both=True):
    return zsq.distillation_loss(student, teacher, target, temperature, batchmean, kd, ce, gamma, both)


def check(student, teacher, target, **options) -> None:
    got = distil(student, teacher, target, **options)
    exact = [None if t is None else t.double() for t in (student, teacher)]
    full = {"temperature": 20.0, "batchmean": False, "kd": 1.0, "ce": 1.0, "gamma": 0.0} | options
    want = reference.distillation_loss(*exact, target, *full.values(), True)
    scale = 1 + max(float(t.abs().max()) for t in exact if t is not None)  # differences of logits are rounded
    assert got[0].dtype == wide(student.dtype) and got[3].dtype == student.dtype
    tol = {torch.float64: 1e-14}.get(student.dtype, 1e-6) * scale
    for a, b in zip(got[:3], want[:3], strict=True):
        floor = full["temperature"] ** 2 / student.shape[1] * tol  # a divergence near 0 is a difference of logarithms
        assert abs(a.item() - b.item()) <= tol * abs(b.item()) + max(floor, tol), (a, b)
    for a, b in zip(got[3:], want[3:], strict=True):
        assert a.shape == b.shape
        if b.numel():
            unit = (
                full["temperature"]
                * abs(full["kd"])
                / (student.shape[0] * (1 if full["batchmean"] else student.shape[1]))
            )
            size = b.abs().max().item() + unit + abs(full["ce"]) / student.shape[0]
            eps = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(student.dtype, 0.0)
            least = 6e-8 if student.dtype is torch.float16 else 0.0
            assert ((a.double() - b).abs() <= tol * size + eps * b.abs() + least).all(), (a, b)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (200, 10), (16, 16), (7, 100), (3, 1000), (2, 1025), (2, 5000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distillation_values_and_gradients(shape, dtype, device):
    s, t = (torch.randn(shape, device=device).mul_(k).to(dtype) for k in (3, 5))
    y = torch.randint(0, shape[1], shape[:1], device=device)
    check(s, t, y)
    check(s, t, None, temperature=4.0, batchmean=True, kd=0.3)
    check(s, None, y, gamma=2.0, ce=1.7)
    check(s, t, y, gamma=0.5, kd=20.0, temperature=1.0)
    check(s, None, None)


def test_public_function(device):
    s, t = torch.randn(8, 10, device=device), torch.randn(8, 10, device=device)
    y = torch.randint(0, 10, (8,), device=device)
    loss, kd, ce = ops.distillation_loss(s, t, y, temperature=4.0, reduction="batchmean", kd_weight=0.5, ce_weight=2.0)
    torch.testing.assert_close(ce, F.cross_entropy(s, y))
    divergence = F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean") * 16
    torch.testing.assert_close(kd, divergence)
    torch.testing.assert_close(loss, 0.5 * kd + 2 * ce)
    with pytest.raises(ValueError, match="'mean' or 'batchmean'"):
        ops.distillation_loss(s, t, reduction="sum")
    assert ops.distillation_loss(s, s)[1] == 0


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_of_both(wants, device):
    s, t = (
        torch.randn(6, 10, device=device, dtype=torch.float64),
        torch.randn(6, 10, device=device, dtype=torch.float64),
    )
    s.requires_grad_(wants[0]), t.requires_grad_(wants[1])
    y = torch.randint(0, 10, (6,), device=device)
    loss, kd, ce = ops.distillation_loss(s, t, y, temperature=2.0, gamma=1.5)
    assert loss.requires_grad == any(wants) and not kd.requires_grad and not ce.requires_grad
    inputs = [x for x in (s, t) if x.requires_grad]
    if inputs:

        def f(*_):
            return ops.distillation_loss(s, t, y, temperature=2.0, gamma=1.5)[0] * 3

        assert torch.autograd.gradcheck(f, inputs)


def test_second_derivative_is_refused(device):
    s = torch.randn(3, 4, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.distillation_loss(s, s.detach() * 2)[0], s, create_graph=True)
    with pytest.raises(NotImplementedError, match="distillation_loss: no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits(size, dtype, device):
    s = (torch.randn(5, 40, device=device, dtype=dtype).clamp(-3, 3) * size).requires_grad_()
    t, y = torch.randn(5, 40, device=device, dtype=dtype).clamp(-3, 3) * size, torch.arange(5, device=device)
    for gamma in (0.0, 0.5, 2.0):
        loss = ops.distillation_loss(s, t, y, temperature=1.0, gamma=gamma)[0]
        (grad,) = torch.autograd.grad(loss, s)
        assert loss.isfinite() and grad.isfinite().all()
        want = reference.distillation_loss(s.double(), t.double(), y, 1.0, False, 1.0, 1.0, gamma, False)
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(grad.double(), want[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [5.0, 13.0, 14.0, 20.0, 80.0, 1e4])
def test_sure_samples(gap, gamma, device):
    """p -> 1: 1 - p comes from expm1, without cancellation, and stops at 1e-6."""
    s, y = torch.tensor([[gap, 0.0], [0.0, gap]], device=device), torch.zeros(2, dtype=torch.long, device=device)
    got = distil(s, None, y, gamma=gamma)
    want = reference.distillation_loss(s.double(), None, y, 20.0, False, 1.0, 1.0, gamma, False)
    assert got[0].isfinite() and got[3].isfinite().all()
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[3].double(), want[3], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["student", "teacher"])
@pytest.mark.parametrize("classes", [10, 100, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_rows_give_nan(value, place, classes, dtype, device):
    s, t = (torch.randn(3, classes, device=device).to(dtype) for _ in "st")
    (s if place == "student" else t)[1, classes // 2] = value
    y = torch.zeros(3, dtype=torch.long, device=device)
    loss, kd, ce, grad, grad_teacher = distil(s, t, y)
    assert loss.isnan() and kd.isnan() and ce.isnan() == (place == "student")
    for g in (grad, grad_teacher):
        assert g[1].isnan().all() and g[::2].isfinite().all()


def test_labels_out_of_range(device):
    s = torch.randn(3, 4, device=device)
    for bad in (4, -1, -100, 2**40):
        y = torch.tensor([0, bad, 1], device=device)
        if device == "cpu":
            with pytest.raises(ValueError, match=f"target must lie in 0 to 3, got {bad} at index 1"):
                distil(s, None, y)
        else:
            loss, _, _, grad, _ = distil(s, None, y)
            assert loss.isnan() and grad[1].isnan().all() and grad[::2].isfinite().all()


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 20), classes=st.integers(1, 140), size=st.sampled_from([1e-3, 1.0, 30.0]), gamma=st.sampled_from([0, 0.5, 1, 3]),
    temperature=st.sampled_from([0.5, 1.0, 20.0]), dtype=st.sampled_from(DTYPES), parts=st.integers(1, 3), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_sweep_of_distillation(batch, classes, size, gamma, temperature, dtype, parts, seed):
    rng = torch.Generator().manual_seed(seed)
    s, t = ((torch.randn(batch, classes, generator=rng) * size).to(dtype) for _ in "st")
    y = torch.randint(0, classes, (batch,), generator=rng)
    check(s, t if parts & 1 else None, y if parts & 2 else None, gamma=float(gamma), temperature=temperature)


# ---- feature alignment -------------------------------------------------------------------------------------------------

FEATURES = [
    (3, 5, 4, 4),
    (2, 64, 7, 7),
    (4, 9),
    (2, 3, 11),
    (2, 3, 2, 3, 4),
    (1, 1, 1, 1),
    (3, 300, 2, 2),
    (2, 16, 33, 40),
]


@pytest.mark.parametrize("shape", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_alignment_values_and_gradients(kind, shape, dtype, device):
    s, t = (torch.randn(shape, device=device).to(dtype) for _ in "st")
    loss, s_map, t_map = zsq.feature_alignment(s, t, kind)
    exact = s.double(), t.double()
    want = reference.feature_alignment(*exact, kind)
    assert loss.dtype == s_map.dtype == wide(dtype)
    summed = torch.float64 if dtype is torch.float64 else torch.float32
    for got, expected in zip((s_map, t_map), want[1:], strict=True):
        if kind != "direct":
            near(got, expected, summed)
        assert got.shape == expected.shape
    near(loss, want[0], summed, 3)
    unit = torch.tensor(1.7, device=device, dtype=wide(dtype))
    exact_grads = reference.feature_alignment_backward(unit.double(), *exact, *want[1:], kind, True)
    for both in (True, False):
        grads = zsq.feature_alignment_backward(unit, s, t, s_map, t_map, kind, both)
        near(grads[0], exact_grads[0], dtype, 5)
        if both:
            near(grads[1], exact_grads[1], dtype, 5)
        else:
            assert grads[1].numel() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True])
def test_alignment_gradcheck(kind, last, device):
    s, t = (torch.randn(2, 3, 4, 5, device=device, dtype=torch.float64) for _ in "st")
    if last:
        s, t = s.to(memory_format=torch.channels_last), t.to(memory_format=torch.channels_last)
    s.requires_grad_(), t.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.feature_alignment(a, b, kind), (s, t))
    assert torch.autograd.gradcheck(lambda a: ops.feature_alignment(a, t.detach(), kind), (s,))
    assert torch.autograd.gradcheck(lambda b: ops.feature_alignment(s.detach(), b, kind), (t,))
    assert not ops.feature_alignment(s.detach(), t.detach(), kind).requires_grad


@pytest.mark.parametrize("kind", ["channel", "spatial"])
def test_alignment_of_nothing_and_nan(kind, device):
    """A map of zeros is divided by 1e-12, as torch.nn.functional.normalize does; NaN stays NaN."""
    s, t = torch.randn(2, 3, 4, 4, device=device), torch.randn(2, 3, 4, 4, device=device)
    s[0] = 0
    inputs = [s.clone().requires_grad_(), t.clone().requires_grad_()]
    loss = ops.feature_alignment(*inputs, kind)
    torch.testing.assert_close(loss, reference.feature_alignment(s, t, kind)[0])
    grads = torch.autograd.grad(loss, inputs)
    want = reference.feature_alignment_backward(torch.ones((), device=device), s, t, s, t, kind, True)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    s[1, 2, 3, 3] = float("nan")
    assert ops.feature_alignment(s, t, kind).isnan()


@pytest.mark.parametrize("layout", ["slice", "offset", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
def test_alignment_layouts(layout, kind, device):
    t = torch.randn(6, 5, 3, 7, device=device)
    s = strided(torch.randn(6, 5, 3, 7, device=device))[layout]
    for a, b in ((s, t), (t, s), (s, s + 1)):
        loss, *maps = zsq.feature_alignment(a, b, kind)
        torch.testing.assert_close(loss, reference.feature_alignment(a, b, kind)[0], rtol=1e-5, atol=1e-7)
        args = (torch.ones((), device=device), a, b, *maps, kind, True)
        want = reference.feature_alignment_backward(*args)
        for got, expected in zip(zsq.feature_alignment_backward(*args), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        for op, inputs in ((zsq.feature_alignment, (a, b, kind)), (zsq.feature_alignment_backward, args)):
            torch.library.opcheck(op.default, inputs, test_utils=("test_schema", "test_faketensor"))


# ---- perturbation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (70001,), (1,), (0,), ()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb(shape, dtype, device):
    x, grad = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40], dtype=dtype, device=device)
    grad.view(-1)[:6] = special[: grad.numel()]
    for epsilon in (0.01, -3.0):
        same(ops.sign_perturb(x, grad, epsilon), reference.sign_perturb(x, grad, epsilon))
    if x.numel():
        assert ops.sign_perturb(x, grad, 0.1).view(-1)[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_of_zeros(dtype, device):
    """The sign of a zero is itself, so that -0 + epsilon * -0 stays -0, in the reference, too."""
    values = torch.tensor([0.0, -0.0, 0.1, -0.1, 1.0, float("nan")], dtype=dtype, device=device)
    x, grad = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    for epsilon in (0.1, -0.1, 0.0):
        got, want = ops.sign_perturb(x, grad, epsilon), reference.sign_perturb(x, grad, epsilon)
        same(got, want)
        known = ~got.isnan()
        assert torch.equal(got.signbit()[known], want.signbit()[known])
    assert ops.sign_perturb(values[1], values[1], 0.1).signbit()


@pytest.mark.parametrize("layout", ["slice", "offset", "channels_last", "transposed", "expanded"])
def test_perturb_layouts(layout, device):
    g = torch.randn(6, 5, 3, 7, device=device)
    x = strided(torch.randn(6, 5, 3, 7, device=device))[layout]
    for a, b in ((x, g), (g, x)):
        same(ops.sign_perturb(a, b, 0.1), reference.sign_perturb(a, b, 0.1))
        torch.library.opcheck(zsq.sign_perturb.default, (a, b, 0.1), test_utils=("test_schema", "test_faketensor"))


def test_perturb_gradient(device):
    x, g = torch.randn(4, device=device, requires_grad=True), torch.randn(4, device=device, requires_grad=True)
    w = torch.randn(4, device=device)
    same(torch.autograd.grad(ops.sign_perturb(x, g, 0.1), x, w)[0], w)
    assert not ops.sign_perturb(x.detach(), g, 0.1).requires_grad


# ---- all ---------------------------------------------------------------------------------------------------------------


def test_opcheck(device):
    s, t = (torch.randn(4, 10, device=device, requires_grad=True) for _ in "st")
    y = torch.tensor([0, 1, 2, 3], device=device)
    for teacher in (t, t.detach(), None):
        for target in (y, None):
            torch.library.opcheck(zsq.distillation_loss.default, (s, teacher, target, 4.0, True, 1.0, 1.0, 2.0, False))
    torch.library.opcheck(zsq.distillation_loss.default, (s.detach(), t.detach(), y, 4.0, True, 1.0, 1.0, 2.0, True))
    a, b = (torch.randn(3, 4, 5, 5, device=device, requires_grad=True) for _ in "ab")
    for kind in KINDS:
        torch.library.opcheck(zsq.feature_alignment.default, (a, b, kind))
        maps = zsq.feature_alignment(a.detach(), b.detach(), kind)[1:]
        one = torch.ones((), device=device)
        torch.library.opcheck(zsq.feature_alignment_backward.default, (one, a.detach(), b.detach(), *maps, kind, True))
    torch.library.opcheck(zsq.sign_perturb.default, (a, b.detach(), 0.1))


def test_compiles_as_one_graph(device):
    y = torch.tensor([0, 1, 2], device=device)

    def f(s: Tensor, t: Tensor) -> Tensor:
        x = ops.sign_perturb(s, t, 0.1)
        return ops.distillation_loss(2 * x, t, y, gamma=1.0)[0] + ops.feature_alignment(s, t, "channel")

    inputs = [torch.randn(3, 4, device=device) for _ in "st"]
    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(run(*leaves), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_bits_do_not_depend_on_threads():
    s, t, y = torch.randn(301, 200), torch.randn(301, 200), torch.arange(301) % 200
    a, b = torch.randn(9, 21, 40, 20), torch.randn(9, 21, 40, 20)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results = [*distil(s, t, y, gamma=1.0)]
            for features in (
                (a, b),
                (a.to(memory_format=torch.channels_last), b.to(memory_format=torch.channels_last)),
            ):
                for kind in KINDS:
                    out = zsq.feature_alignment(*features, kind)
                    results += [*out, *zsq.feature_alignment_backward(out[0], *features, *out[1:], kind, True)]
            seen.append(results)
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for x, z in zip(other, seen[0], strict=True):
            same(x, z)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda t: distil(t(3, 4).int(), None, None), TypeError, "distillation_loss: student must be float32"),
        (lambda t: distil(t(3), None, None), ValueError, r"student must have shape \[B, C\]"),
        (lambda t: distil(t(0, 4), None, None), ValueError, "not be empty"),
        (lambda t: distil(t(3, 4), t(4, 3), None), ValueError, r"teacher must have the shape of student \(\[3, 4\]\), got \[4, 3\]"),
        (lambda t: distil(t(3, 4), t(3, 4).double(), None), TypeError, "teacher must have the dtype of student"),
        (lambda t: distil(t(3, 4), None, t(3)), TypeError, "target must be int64, got Float"),
        (lambda t: distil(t(3, 4), None, t(2).long()), ValueError, r"target must have shape \[3\], got \[2\]"),
        (lambda t: distil(t(3, 4), t(3, 4), None, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda t: distil(t(3, 4), t(3, 4), None, gamma=-1.0), ValueError, "gamma must be at least 0"),
        (lambda t: ops.feature_alignment(t(3, 4, 2), t(3, 4, 3)), ValueError, "feature_alignment: teacher must have the shape"),
        (lambda t: ops.feature_alignment(t(3, 4), t(3, 4), "depth"), ValueError, "'channel', 'spatial' or 'direct', got 'depth'"),
        (lambda t: ops.feature_alignment(t(0, 4), t(0, 4)), ValueError, "not be empty"),
        (lambda t: zsq.feature_alignment_backward(t(), t(3, 4), t(3, 4), t(3, 3), t(3, 4), "channel", True), ValueError,
         r"student_map must have shape \[3, 4\]"),
        (lambda t: ops.sign_perturb(t(3), t(4), 0.1), ValueError, "sign_perturb: grad must have the shape of x"),
        (lambda t: ops.sign_perturb(t(3), t(3), float("inf")), ValueError, "epsilon must be finite"),
    ],
)  # fmt: skip
def test_messages(call, error, words, device):
    with pytest.raises(error, match=words):
        call(lambda *shape: torch.zeros(shape, device=device))
