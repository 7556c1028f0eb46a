"""The loss around a student, along one or two directions in the space of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.analysis.curvature import Hessian, top_eigenvalues
from zsq_fast.analysis.losses import TITLES, BatchLosses, frozen_copy, mean_losses
from zsq_fast.analysis.losses import of_subject as losses_of
from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import UsageError, nearest
from zsq_fast.methods.synthesis import derive_seed

LEVELS = 12  # of a contour picture
COLOURS = {"ce": "#c4371f", "kl": "#0072b2", "fa": "#2a8c4a"}
RANDOM = "random"
DIRECTIONS = (RANDOM, "eigenvectors")
Direction = Mapping[str, Tensor]  # by parameter name; a parameter that is missing stays where it is


@dataclass(frozen=True)
class Surface:
    """Losses on a grid.

    Attributes:
        directions: what the axes are, one or two texts.
        offsets: the grid along every axis, in lengths of the direction, 0 in the middle.
        losses: per loss, without the recipe's factor, `[points]` or `[points][points]`; the first direction is the outer index.
        centre: the losses of the student itself.
    """

    directions: list[str]
    offsets: list[float]
    losses: dict[str, list[Any]]
    centre: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def flat(values: list[Any]) -> list[float]:
            return [v for row in values for v in flat(row)] if isinstance(values[0], list) else values

        lines = [
            f"{len(self.offsets)} points per axis, to {self.offsets[-1]:g} lengths",
            f"{'':<6}{'student':>12}{'highest':>12}",
        ]
        rows = (f"{name:<6}{self.centre[name]:>12.4g}{max(flat(grid)):>12.4g}" for name, grid in self.losses.items())
        return "\n".join([*lines, *rows])


def of_subject(
    subject: Subject,
    *,
    directions: str = RANDOM,
    dimensions: int = 2,
    points: int = 15,
    span: float = 1.0,
    losses: tuple[str, ...] = (),
    hessian: str = "kl",
    steps: int = 60,
    seed: int = 0,
    batches: int = 1,
) -> Surface:
    """On the first batches, all losses or those named, along `dimensions` directions.

    Args:
        directions: "random", filter-normalised, or "eigenvectors", those of the largest eigenvalues of the Hessian of the loss
            `hessian`, found in at most `steps` Lanczos steps.
    """
    if directions not in DIRECTIONS:
        raise UsageError(f"there are no directions '{directions}'.{nearest(directions, DIRECTIONS)}")
    if dimensions not in (1, 2):
        raise UsageError(f"a surface has 1 or 2 dimensions, got {dimensions}")
    on, names = losses_of(subject, batches, losses)
    options: dict[str, Any] = dict(span=span, points=points)
    if directions == RANDOM:
        along = [filter_normalised(subject.student, seed, number) for number in range(dimensions)]
        return surface(subject.student, on, along, names, **options)
    matrix = Hessian(subject.student, losses_of(subject, batches, (hessian,))[0], hessian)
    top = top_eigenvalues(matrix, dimensions, max(steps, dimensions), seed=seed)
    options["titles"] = [f"eigenvector of {hessian.upper()}, eigenvalue {value:.3g}" for value in top.values]
    return surface(subject.student, on, [matrix.split(vector) for vector in top.vectors], names, **options)


def filter_normalised(student: nn.Module, seed: int = 0, number: int = 0) -> dict[str, Tensor]:
    """A random direction whose every filter is as long as the student's: `d_ij <- d_ij / |d_ij| * |theta_ij|`, d normal.

    A filter is an output channel of a convolution or a row of a linear layer; parameters of one dimension (biases, batch norms) and
    learned ranges stay where they are. Without this, flatness would depend on the scale of the weights, which batch norm makes
    arbitrary. Source: Li et al., "Visualizing the loss landscape of neural nets" (NeurIPS 2018), section 4.

    Args:
        number: of the direction; two of them are nearly orthogonal, as random vectors are.
    """
    rng = torch.Generator().manual_seed(derive_seed(seed, "surface", number))
    direction = {}
    for name, parameter in student.named_parameters():
        if parameter.dim() > 1:
            rows = parameter.detach().flatten(1)
            drawn = torch.randn(rows.shape, generator=rng).to(rows)
            unit = drawn / drawn.norm(dim=1, keepdim=True)
            direction[name] = (unit * rows.norm(dim=1, keepdim=True)).view(parameter.shape)
    return direction


def surface(
    student: nn.Module,
    batches: Sequence[BatchLosses],
    directions: Sequence[Direction],
    names: Sequence[str] = ("ce", "kl"),
    *,
    span: float = 1.0,
    points: int = 21,
    titles: Sequence[str] = ("first direction", "second direction"),
) -> Surface:
    """`L(theta + a d1 + b d2)` for a, b from -span to span (ait_family.md 8.3); all losses from the same forward passes.

    The weights are quantized at every point, over ranges that follow them, while the activation ranges stay: this is the loss of the
    quantized network, steps of rounding included. A copy is moved, so the student keeps every bit, and each point is computed from the
    original weights, so no rounding adds up. Costs `points` or `points^2` forward passes per batch.

    Args:
        directions: one or two; `filter_normalised`, or eigenvectors (`Hessian.split(top.vectors[i])`).
        points: per axis, odd.
        span: in lengths of the directions: 1 is as far as the weights are long for normalised ones; an eigenvector has length 1.

    Raises:
        UsageError: no batch, an even number of points, no or too many directions, or one that does not fit the student.
    """
    if not batches or points < 3 or points % 2 == 0 or not 1 <= len(directions) <= 2 or not span > 0:
        raise UsageError(
            "a surface needs a batch, one or two directions, a positive span and an odd number of points of at least 3; got "
            f"{len(batches)} batches, {len(directions)} directions, span {span:g} and {points} points"
        )
    network = frozen_copy(student)
    moved = dict(network.named_parameters())
    for direction in directions:
        for name, part in direction.items():
            if name not in moved or moved[name].shape != part.shape:
                raise UsageError(
                    f"the direction holds '{name}' {list(part.shape)}, which is no parameter of the student"
                )
    origin = {name: p.detach().clone() for name, p in moved.items()}
    half = points // 2
    offsets = [span * (i - half) / half for i in range(points)]

    def at(*steps: float) -> dict[str, float]:
        with torch.no_grad():
            for name, p in moved.items():
                p.copy_(origin[name])
                for step, direction in zip(steps, directions, strict=True):
                    if step and name in direction:
                        p.add_(direction[name].to(p), alpha=step)
        return mean_losses(network, batches, names)

    if len(directions) == 1:
        row = [at(a) for a in offsets]
        losses: dict[str, list[Any]] = {name: [found[name] for found in row] for name in names}
        centre = row[half]
    else:
        rows = [[at(a, b) for b in offsets] for a in offsets]
        losses = {name: [[found[name] for found in row] for row in rows] for name in names}
        centre = rows[half][half]
    return Surface(list(titles[: len(directions)]), offsets, losses, centre)


def draw(result: Surface, figure: Any) -> None:
    """How far each loss lies above that of the student: one direction, curves; two, contours side by side.

    CE and KL share their scale, to be compared; feature alignment, of another unit, has its own. Levels are spaced as squares, as a bowl
    rises, so that the narrow one of two losses does not make the other one colour.
    """
    from matplotlib.colors import PowerNorm

    figure.set_layout_engine("compressed")
    rises = {name: _rise(values, result.centre[name]) for name, values in result.losses.items()}
    titles = {name: f"{TITLES[name]}\n{result.centre[name]:.3g} at the student" for name in rises}
    groups = [group for fa in (False, True) if (group := [name for name in rises if (name == "fa") == fa])]
    if len(result.directions) == 1:
        figure.set_size_inches(0.6 + 4.6 * len(groups), 3.8)
        for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
            for name in group:
                axes.plot(result.offsets, rises[name], color=COLOURS[name], lw=1.5, label=titles[name])
            axes.axhline(0, color="black", lw=0.8)
            axes.set_xlabel(result.directions[0])
            axes.set_ylabel("loss above the student's")
            axes.legend(fontsize=8)
        return
    figure.set_size_inches(1 + 2.6 * len(rises) + 0.9 * len(groups), 3.6)
    square = {"box_aspect": 1}
    panels = iter(figure.subplots(1, len(rises), sharex=True, sharey=True, squeeze=False, subplot_kw=square)[0])
    for group in groups:
        mine = {name: next(panels) for name in group}
        everything = torch.tensor([rises[name] for name in group], dtype=torch.float64)
        low, high = float(everything.min()), float(everything.max())
        span = high - low or 1.0
        levels = [low + span * (i / LEVELS) ** 2 for i in range(LEVELS)] + [low + span]
        for name, axes in mine.items():
            values = torch.tensor(rises[name], dtype=torch.float64).T.tolist()
            shades = {"levels": levels, "norm": PowerNorm(0.5, low, low + span)}
            filled = axes.contourf(result.offsets, result.offsets, values, **shades)
            axes.plot(0, 0, "+", color="white")
            axes.set_title(titles[name], fontsize=10, loc="left")
            axes.set_xlabel(result.directions[0])
        label = f"{' and '.join(map(str.upper, group))} above the student's"
        figure.colorbar(filled, ax=list(mine.values()), label=label, format="%.3g", ticks=levels[::3], shrink=0.8)
    figure.axes[0].set_ylabel(result.directions[1])


def _rise(values: Any, centre: float) -> Any:
    return [_rise(value, centre) for value in values] if isinstance(values, list) else values - centre
