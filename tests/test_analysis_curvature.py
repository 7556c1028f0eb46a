"""Hessian products, trace, top eigenvalues and density: against exact Hessians, closed forms, and PyHessian where it is installed."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from networks import tiny
from report_support import overlapping
from torch import Tensor, nn
from torch.func import functional_call

import zsq_fast as zsq
from zsq_fast import reference
from zsq_fast.analysis.curvature import Hessian, Operator, curvature, density, draw, top_eigenvalues, trace
from zsq_fast.analysis.losses import BatchLosses
from zsq_fast.errors import TrainingError, UsageError
from zsq_fast.methods.recipe import Student

SIZE, POINTS = (3, 8, 8), ("1", "4")
SPEC = Student(temperature=4.0, kd_reduction="batchmean", kd_weight=2.0, feature_weight=100.0, feature_points=POINTS)


def make(ranges: str = "minmax", count: int = 6) -> tuple[nn.Module, nn.Module, BatchLosses]:
    """A float64 teacher, its 3-bit student, moved a little away so that no loss is at a minimum, and the losses of a batch."""
    teacher = tiny().double().requires_grad_(False)
    student = zsq.convert(teacher, 3, 3, ema="plain", ranges=ranges, input_size=SIZE).eval()
    x = torch.randn(count, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        for name, p in student.named_parameters():  # steps stay positive
            p += 0.1 * torch.randn_like(p).abs() if name.endswith("step") else 0.1 * torch.randn_like(p)
    with zsq.nn.calibrating(student), torch.no_grad():
        student(x)
    zsq.nn.freeze_ranges(student)
    return teacher, student, BatchLosses(teacher, x, torch.arange(count) % 4, SPEC, ("ce", "kl", "fa"))


def straight_through(x: Tensor, value: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    return value.detach() + (x - x.detach()) * mask


class PlainStudent(nn.Module):
    """The student written out by the reference quantizers; the parameters are the student's own, by name."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.layers = copy.deepcopy(student)
        self.features: list[Tensor] = []

    def _weight(self, layer: nn.Module) -> Tensor:
        w = layer.weight
        if not layer.learns:
            return straight_through(w, reference.fake_quant_weight(w.detach(), layer.weight_bits))
        top = 2 ** (layer.weight_bits - 1)
        step = layer.step.detach().view([-1] + [1] * (w.dim() - 1))
        inside = ((w / step >= -top) & (w / step <= top - 1)).to(w)
        return straight_through(w, (w / step).round().clamp(-top, top - 1) * step, inside)

    def _act(self, act: nn.Module, x: Tensor) -> Tensor:
        if not act.learns:
            return straight_through(x, reference.fake_quant_act(x.detach(), act.lo, act.hi, act.bits))
        step, (low, high) = act.step.detach(), act.codes
        inside = ((x / step >= low) & (x / step <= high)).to(x)
        return straight_through(x, (x / step).round().clamp(low, high) * step, inside)

    def forward(self, x: Tensor) -> Tensor:
        first, norm1, relu, second, norm2, relu6, _, _, head = self.layers
        self.features = [norm1(F.conv2d(x, self._weight(first), padding=1))]
        x = self._act(relu.quant[0], F.relu(self.features[0]))
        self.features.append(norm2(F.conv2d(x, self._weight(second), padding=1, groups=8)))
        x = self._act(relu6.quant[0], F.relu6(self.features[1]))
        return F.linear(x.mean((2, 3)), self._weight(head), head.bias)


def written_out(name: str, teacher: nn.Module, batch: BatchLosses, logits: Tensor, features: list[Tensor]) -> Tensor:
    """The loss from its definition."""
    if name == "ce":
        return -logits.log_softmax(1)[torch.arange(len(batch)), batch.labels].mean()
    if name == "kl":
        p, q = teacher(batch.images) / 4, logits / 4
        return 16 * (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
    kept: list[Tensor] = []
    hooks = [teacher[int(i)].register_forward_hook(lambda m, args, out: kept.append(out.clone())) for i in POINTS]
    teacher(batch.images)
    for hook in hooks:
        hook.remove()
    energies = [[f.square().mean((2, 3)) for f in side] for side in (features, kept)]
    units = [[a / a.square().sum(1, keepdim=True).sqrt() for a in side] for side in energies]
    return sum((s - t).square().mean() for s, t in zip(*units, strict=True))


def exact(name: str, teacher: nn.Module, student: nn.Module, batch: BatchLosses, names: tuple[str, ...]) -> Tensor:
    """The Hessian of the loss written out, by torch.autograd.functional."""
    plain = PlainStudent(student)
    start = {n: p.detach() for n, p in student.named_parameters()}

    def loss(*chosen: Tensor) -> Tensor:
        values = {f"layers.{n}": v for n, v in {**start, **dict(zip(names, chosen, strict=True))}.items()}
        logits = functional_call(plain, values, (batch.images,))
        return written_out(name, teacher, batch, logits, plain.features)

    blocks = torch.autograd.functional.hessian(loss, tuple(start[n] for n in names))
    sizes = [start[n].numel() for n in names]
    rows = [
        torch.cat([block.reshape(a, b) for block, b in zip(row, sizes, strict=True)], 1)
        for row, a in zip(blocks, sizes, strict=True)
    ]
    return torch.cat(rows)


def dense(matrix: Operator) -> Tensor:
    return torch.stack([matrix(unit) for unit in torch.eye(matrix.size, dtype=torch.float64)])


def diagonal(values: list[float]) -> Operator:
    d = torch.tensor(values, dtype=torch.float64)
    return Operator(lambda v: d * v, len(d), d)


def symmetric(n: int) -> Tensor:
    a = torch.randn(n, n, dtype=torch.float64)
    return a + a.T


# ---- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["minmax", "learned"])
@pytest.mark.parametrize("name", ["ce", "kl", "fa"])
def test_products_are_those_of_the_exact_hessian(name, ranges):
    """Every column, through both kinds of quantizers; also biases and batch norms count."""
    teacher, student, batch = make(ranges)
    names = tuple(n for n, _ in student.named_parameters() if not n.endswith("step"))
    want = exact(name, teacher, student, batch, names)
    matrix = Hessian(student, [batch], name, names)
    found = dense(matrix)
    assert matrix.size == len(want) == 356 and want.abs().max() > 1e-4
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-10 * float(want.abs().max()))
    if name == "fa":  # the classifier lies behind the last feature point
        assert not found[-36:].any()


def test_learned_steps_have_a_symmetric_hessian():
    """With their gradient factor, which scales rows and columns alike."""
    _, student, batch = make("learned")
    names = ("3.weight", "3.step", "5.quant.0.step", "8.step")
    found = dense(Hessian(student, [batch], "kl", names))
    assert found[72:].abs().max() > 1e-6
    torch.testing.assert_close(found, found.T, rtol=1e-8, atol=1e-12)


def test_several_batches_are_one():
    teacher, student, batch = make()
    names = ("3.weight", "8.bias")
    parts = [BatchLosses(teacher, batch.images[a:b], batch.labels[a:b], SPEC, ("ce",)) for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(
        dense(Hessian(student, parts, "ce", names)), dense(Hessian(student, [batch], "ce", names))
    )


def test_a_vector_by_parameter():
    _, student, batch = make()
    matrix = Hessian(student, [batch], "ce", ("8.bias", "3.weight"))
    parts = matrix.split(torch.arange(76.0, dtype=torch.float64))
    assert parts["8.bias"].tolist() == [0, 1, 2, 3] and parts["3.weight"].shape == (8, 1, 3, 3)


# ---- trace, eigenvalues, density ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce", "kl", "fa"])
def test_all_eigenvalues(name):
    """As many steps as parameters: every eigenvalue appears, and nothing that is none."""
    teacher, student, batch = make()
    names = ("3.weight", "4.weight", "4.bias")
    want = torch.linalg.eigvalsh(exact(name, teacher, student, batch, names))
    matrix = Hessian(student, [batch], name, names)
    found = torch.tensor(density(matrix, steps=matrix.size).nodes, dtype=torch.float64)
    scale = float(want.abs().max())
    distance = (found[:, None] - want).abs()
    assert distance.min(0).values.max() < 1e-7 * scale and distance.min(1).values.max() < 1e-7 * scale
    top = top_eigenvalues(matrix, count=4, steps=88, tolerance=1e-6)
    largest = want[want.abs().argsort(descending=True)][:4]
    assert top.values == pytest.approx(largest.tolist(), rel=1e-6) and top.products < 88
    estimate = trace(matrix, probes=200)
    assert abs(estimate.mean - float(want.sum())) < 4 * estimate.standard_error


def test_a_diagonal_quadratic():
    """v' H v is the trace for every vector of signs; the density is known, multiple and negative eigenvalues included."""
    values = [3.0, 3.0, -2.0, 1.0, 0.0, 0.0, 0.5, 3.0]
    matrix = diagonal(values)
    estimate = trace(matrix, probes=5)
    assert estimate.samples == [8.5] * 5 and (estimate.mean, estimate.standard_error) == (8.5, 0.0)
    top = top_eigenvalues(matrix, count=3)
    assert top.values == pytest.approx([3.0, -2.0, 1.0]) and max(top.residuals) < 1e-6
    for value, vector in zip(top.values, top.vectors, strict=True):
        torch.testing.assert_close(matrix(vector), value * vector, atol=1e-6, rtol=0)
        assert float(vector.norm()) == pytest.approx(1)
    found = density(matrix, runs=3, steps=20)
    assert found.nodes[:5] == pytest.approx([-2.0, 0.0, 0.5, 1.0, 3.0], abs=1e-8)
    assert found.weights[:5] == pytest.approx([1 / 24, 2 / 24, 1 / 24, 1 / 24, 3 / 24])
    assert found.sigma == pytest.approx(0.003 * 5)
    at_one = found.density[min(range(1000), key=lambda i: abs(found.grid[i] - 3))]
    assert at_one == pytest.approx(3 / 8 / (found.sigma * math.sqrt(2 * math.pi)), rel=0.02)


def test_the_error_of_a_trace():
    """The variance of one sample is twice the sum of the squares off the diagonal."""
    a = symmetric(20)
    found = trace(Operator(lambda v: a @ v, 20, a), probes=2000)
    want = float(2 * (a.square().sum() - a.diagonal().square().sum()) / 2000) ** 0.5
    assert found.standard_error == pytest.approx(want, rel=0.1)
    assert abs(found.mean - float(a.trace())) < 4 * want
    assert (
        found
        == trace(Operator(lambda v: a @ v, 20, a), probes=2000)
        != trace(Operator(lambda v: a @ v, 20, a), 2000, 1)
    )


def test_moments_of_a_density():
    """It integrates to 1, and its first moments are those of v: v'Hv / n and |Hv|^2 / n, plus the kernel's variance."""
    a = symmetric(60)
    matrix = Operator(lambda v: a @ v, 60, a)
    found = density(matrix, runs=4, steps=12)
    assert sum(found.weights) == pytest.approx(1)
    vectors = [matrix.signs(0, i) for i in range(4)]
    first = sum(float(v @ a @ v) for v in vectors) / 240
    second = sum(float((a @ v).square().sum()) for v in vectors) / 240
    third = sum(float((a @ v) @ (a @ (a @ v))) for v in vectors) / 240
    grid, curve = (torch.tensor(t, dtype=torch.float64) for t in (found.grid, found.density))
    for power, want in ((0, 1.0), (1, first), (2, second + found.sigma**2), (3, third + 3 * found.sigma**2 * first)):
        assert float(torch.trapezoid(curve * grid**power, grid)) == pytest.approx(want, rel=1e-4)
    estimate = trace(matrix, probes=4)  # of the same vectors
    assert estimate.mean / 60 == pytest.approx(first)


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_one_eigenvalue_alone(value):
    found = density(diagonal([value] * 4), steps=3)
    assert found.nodes == pytest.approx([value]) and found.weights == [1.0] and found.sigma == 0.003 * (-value or 1.0)
    assert top_eigenvalues(diagonal([value] * 4), count=2).values == pytest.approx([value])


# ---- all together ---------------------------------------------------------------------------------------------------------


def test_of_all_losses_and_nothing_is_changed(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(8, 3))
    teacher, student, batch = make()
    student.requires_grad_(False)[0].weight.requires_grad_(True)
    before = [(n, t.clone()) for network in (teacher, student) for n, t in network.state_dict().items()]
    state = torch.random.get_rng_state()
    found = curvature(student, [batch], probes=3, count=2, steps=6)
    after = [(n, t) for network in (teacher, student) for n, t in network.state_dict().items()]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    assert [n for n, p in student.named_parameters() if p.requires_grad] == ["0.weight"]
    assert all(p.grad is None for p in student.parameters()) and not student[1]._forward_hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (found.images, found.parameters) == (6, 356) and list(found.losses) == ["ce", "kl", "fa"]
    kl = found.losses["kl"]
    assert kl.factor == 2.0 and kl.value == pytest.approx(float(batch.values(student)["kl"]))
    matrix = Hessian(student, [batch], "kl")
    assert kl.trace.samples == pytest.approx(trace(matrix, 3).samples)
    assert kl.top.values == pytest.approx(top_eigenvalues(matrix, 2, 6, tolerance=0).values)
    assert kl.density.nodes == pytest.approx(density(matrix, steps=6).nodes)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["losses"]["fa"]["top"]["products"] == 6 and plain["parameters"] == 356
    draw(found, figure)
    figure.savefig(tmp_path / "curvature.png")
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 6 and overlapping(figure) == []


def test_against_pyhessian():
    """Same loss, same student: their power iteration and Hutchinson, with stopping rules and draws of their own."""
    pyhessian = pytest.importorskip("pyhessian", reason="needs PyHessian (pip install pyhessian)")
    _, student, batch = make()
    student.requires_grad_(True)
    theirs = pyhessian.hessian(student, F.cross_entropy, data=(batch.images, batch.labels), cuda=False)
    values, _ = theirs.eigenvalues(maxIter=300, tol=1e-6, top_n=2)
    matrix = Hessian(student, [batch], "ce")
    assert top_eigenvalues(matrix, 2, tolerance=1e-6).values == pytest.approx(values, rel=1e-3)
    samples = torch.tensor(theirs.trace(maxIter=300, tol=0))
    ours, error = trace(matrix, 300), float(samples.std()) / len(samples) ** 0.5
    assert abs(ours.mean - float(samples.mean())) < 4 * math.hypot(error, ours.standard_error)


def test_refused():
    teacher, student, batch = make()
    for call, words in (
        (lambda: BatchLosses(teacher, batch.images, batch.labels, SPEC, ("kd",)), "there is no loss 'kd'"),
        (lambda: batch.loss("mse"), "'mse' was not asked for"),
        (lambda: batch.values(copy.deepcopy(student).train()), "eval mode"),
        (lambda: Hessian(student, [], "ce"), "needs a batch"),
        (lambda: Hessian(student, [batch], "ce", ["0.weigth"]), r"no parameter '0\.weigth'.*0\.weight"),
        (lambda: trace(diagonal([1.0]), probes=1), "two probes"),
        (lambda: top_eigenvalues(diagonal([1.0]), count=0), "between 1 and steps"),
        (lambda: density(diagonal([1.0]), runs=0), "one run and one step"),
        (lambda: density(diagonal([1.0]), width=0), "positive width"),
    ):
        with pytest.raises(UsageError, match=words):
            call()
    with pytest.raises(TrainingError, match="not finite"):
        density(diagonal([1.0, math.inf]))
