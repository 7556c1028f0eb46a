"""The loss around a student: closed forms, the student itself in the middle, and directions that are as long as its filters."""

from __future__ import annotations

import json
import math

import pytest
import torch
from report_support import overlapping
from torch import nn

from zsq_fast.analysis.curvature import Hessian, top_eigenvalues
from zsq_fast.analysis.losses import BatchLosses
from zsq_fast.analysis.surface import Surface, draw, filter_normalised, surface
from zsq_fast.errors import UsageError
from zsq_fast.methods.recipe import Student

ALL = Student(feature_weight=1.0)


class Bowl:
    """Stands in for the losses of a batch: quadratics of the weights."""

    def __init__(self, size: int, matrix: torch.Tensor):
        self.size, self.matrix = size, matrix

    def __len__(self) -> int:
        return self.size

    def values(self, network, names):
        w = network.weight.flatten()
        return {name: {"ce": self.size * w @ self.matrix @ w, "kl": w.sum()}[name] for name in names}


def quadratic() -> tuple[nn.Module, list[Bowl], torch.Tensor]:
    """A network of six weights, two batches of 1 and 3 images, and the matrix of their mean "ce"."""
    network = nn.Linear(3, 2, bias=False).double()
    a = torch.randn(6, 6, dtype=torch.float64)
    return network, [Bowl(1, a @ a.T), Bowl(3, a @ a.T)], (1 + 9) / 4 * a @ a.T


def test_a_quadratic_in_closed_form():
    network, batches, a = quadratic()
    w = network.weight.detach().flatten()
    d, e = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    found = surface(network, batches, [{"weight": d}], span=2.0, points=5)
    assert found.offsets == [-2.0, -1.0, 0.0, 1.0, 2.0]
    for i, t in enumerate(found.offsets):
        u = w + t * d.flatten()
        assert found.losses["ce"][i] == pytest.approx(float(u @ a @ u)) and found.losses["kl"][i] == pytest.approx(
            float(u.sum())
        )
    assert found.centre == {name: found.losses[name][2] for name in ("ce", "kl")}
    both = surface(network, batches, [{"weight": d}, {"weight": e}], ["ce"], points=3, titles=("d", "e"))
    assert both.directions == ["d", "e"]
    for i, s in enumerate((-1, 0, 1)):
        for j, t in enumerate((-1, 0, 1)):
            u = w + s * d.flatten() + t * e.flatten()
            assert both.losses["ce"][i][j] == pytest.approx(float(u @ a @ u))
    assert torch.equal(network.weight.detach().flatten(), w)


def test_the_middle_is_the_student(pair):
    """Bit for bit its losses over two batches, of unequal size, in one dimension and in two; the student keeps every bit."""
    teacher, student, batch = pair
    cuts = ((0, 3), (3, 8))
    batches = [BatchLosses(teacher, batch.images[a:b], batch.labels[a:b], ALL, ("ce", "kl", "fa")) for a, b in cuts]
    before = {n: t.clone() for n, t in student.state_dict().items()}
    names, directions = ("ce", "kl", "fa"), [filter_normalised(student, number=i) for i in range(2)]
    line = surface(student, batches, directions[:1], names, points=3)
    plane = surface(student, batches, directions, names, span=0.5, points=3)
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())
    for name in names:
        want = sum(len(b) / 8 * float(b.values(student)[name].detach()) for b in batches)
        assert line.centre[name] == plane.centre[name] == line.losses[name][1] == plane.losses[name][1][1]
        assert line.centre[name] == pytest.approx(want, rel=1e-12)
        assert len({*line.losses[name]}) == 3
    moved = filter_normalised(student)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if name in moved:
                p += moved[name]
    assert line.losses["kl"][2] == pytest.approx(
        sum(len(b) / 8 * float(b.values(student)["kl"].detach()) for b in batches)
    )


def test_normalised_filters(pair):
    """Every row as long as the student's; biases and batch norms stay; drawn from the seed alone."""
    _, student, _ = pair
    found = filter_normalised(student)
    parameters = dict(student.named_parameters())
    assert list(found) == [n for n, p in parameters.items() if p.dim() > 1] and len(found) == 7
    for name, d in found.items():
        torch.testing.assert_close(d.flatten(1).norm(dim=1), parameters[name].detach().flatten(1).norm(dim=1))
    again, other, second = (filter_normalised(student, *which) for which in ((0, 0), (1, 0), (0, 1)))
    flat = [torch.cat([d.flatten() for d in one.values()]) for one in (found, again, other, second)]
    assert torch.equal(flat[0], flat[1])
    for one in flat[2:]:
        assert abs(float(flat[0] @ one / flat[0].norm() / one.norm())) < 0.15
    doubled = {n: p.detach() * (2 if n == "4.weight" else 1) for n, p in parameters.items()}
    student.load_state_dict(doubled, strict=False)
    torch.testing.assert_close(filter_normalised(student)["4.weight"], 2 * found["4.weight"])


def test_along_an_eigenvector():
    """With quantizers out of the way the loss bends by half the eigenvalue along it."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().eval()
    x, labels = torch.randn(20, 1, 2, 2, dtype=torch.float64), torch.arange(20) % 3
    batches = [BatchLosses(teacher, x, labels, Student(temperature=2.0, kd_reduction="batchmean"))]
    matrix = Hessian(network, batches, "kl")
    top = top_eigenvalues(matrix, count=1, tolerance=1e-8)
    h = 1e-3
    found = surface(network, batches, [matrix.split(top.vectors[0])], ("kl",), span=h, points=3).losses["kl"]
    assert (found[0] - 2 * found[1] + found[2]) / h**2 == pytest.approx(top.values[0], rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_pictures(pair, count, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    teacher, student, batch = pair
    batches = [BatchLosses(teacher, batch.images, batch.labels, ALL)]
    found = surface(student, batches, [filter_normalised(student, number=i) for i in range(count)], points=3)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    draw(found, figure)
    figure.savefig(tmp_path / "surface.png")
    assert len(figure.axes) == (1 if count == 1 else 3)  # the colours' scale is the third
    if count == 2:
        assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert math.isfinite(found.centre["kl"])


@pytest.mark.parametrize("names", [("ce",), ("ce", "kl"), ("ce", "kl", "fa")])
def test_panels_are_square_and_comparable(names):
    """CE and KL have one scale of colours, FA its own, and no text lies on another."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    grid = [[a * a + b * b for b in (-1, 0, 1)] for a in (-1, 0, 1)]
    heights = {"ce": 1.0, "kl": 30.0, "fa": 0.01}
    losses = {name: [[heights[name] * value for value in row] for row in grid] for name in names}
    found = Surface(["first direction", "second direction"], [-1.0, 0.0, 1.0], losses, dict.fromkeys(names, 0.0))
    draw(found, figure)
    assert overlapping(figure) == []
    panels = figure.axes[: len(names)]
    boxes = [axes.get_window_extent() for axes in panels]
    assert all(box.width == pytest.approx(box.height) and box.width > 150 for box in boxes)
    tops = [axes.collections[0].norm.vmax for axes in panels]
    assert tops == pytest.approx({1: [2.0], 2: [60.0, 60.0], 3: [60.0, 60.0, 0.02]}[len(names)])


def test_refused():
    network, batches, _ = quadratic()
    d = {"weight": torch.zeros(2, 3)}
    for arguments, options, words in (
        ((batches, [d]), {"points": 4}, "odd number of points"),
        ((batches, []), {}, "0 directions"),
        ((batches, [d, d, d]), {}, "3 directions"),
        (([], [d]), {}, "0 batches"),
        ((batches, [d]), {"span": 0.0}, "positive span"),
        ((batches, [{"bias": torch.zeros(2)}]), {}, "'bias'"),
        ((batches, [{"weight": torch.zeros(3)}]), {}, r"'weight' \[3\]"),
    ):
        with pytest.raises(UsageError, match=words):
            surface(network, *arguments, **options)
