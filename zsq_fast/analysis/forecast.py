"""Forecast of the accuracy drop without data, from how student and teacher differ on held-out synthetic images.

Calibrated on the runs whose records are committed: `python -m benchmarks.forecast --write` collects them into forecast.json beside this
file. The model is a straight line, or a plane, through them: asinh(drop) over the logarithms of KL and of disagreement, over bits.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import nn

from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import UsageError

DATA = "forecast.json"
LEVEL = 0.9  # of the interval
LEAST_POINTS, LEAST_RECIPES = 10, 5  # below 9 points no quantile of their residuals reaches the level
ABLATION = "_ablation_"  # in the name of a record of shorter runs
# What a forecast may look at, simplest first: the first of equal error is taken.
INPUTS = (("kl",), ("agreement",), ("kl", "agreement"), ("kl", "bits"))


@dataclass(frozen=True)
class Point:
    """One student of a committed record at its last epoch.

    Attributes:
        record: file and, where it holds several students, the name of this one.
        recipe: what counts as one when points are left out.
        weight_bits, act_bits: of the student.
        agreement: share of the held-out images on which student and teacher agree. kl: mean KL(teacher || student) there, in nats.
        drop: float top-1 minus the student's, in points, on real test images.
        images: what it was trained on, `trained_on` its recipe.
    """

    record: str
    recipe: str
    weight_bits: float
    act_bits: float
    agreement: float
    kl: float
    drop: float
    images: str = "optimised"


def trained_on(optimised: bool) -> str:
    """Which students can be compared: held-out images are the generator's, and one that was trained on others of the same generator
    agrees with its teacher there far better than on real ones."""
    return "optimised" if optimised else "generated"


@dataclass(frozen=True)
class Network:
    """What tells float networks apart without their names: the number of parameters, `(C, H, W)` of their images, and of classes."""

    parameters: int
    input_size: tuple[int, ...]
    classes: int

    def unlike(self, other: Network) -> tuple[str, ...]:
        """In what it differs: "network", "input size", "classes"."""
        names = {"parameters": "network", "input_size": "input size", "classes": "classes"}
        return tuple(name for key, name in names.items() if getattr(self, key) != getattr(other, key))


def network_of(teacher: nn.Module, input_size: Sequence[int]) -> Network:
    """Of a float network that returns logits `[N, classes]`, by a forward pass of one empty image; it is not changed."""
    network = copy.deepcopy(teacher).eval() if teacher.training else teacher
    with torch.no_grad():
        logits = network(torch.zeros(1, *input_size, device=next(network.parameters()).device))
    return Network(sum(p.numel() for p in network.parameters()), tuple(input_size), logits.shape[1])


@dataclass(frozen=True)
class Forecast:
    """Points of top-1 that the student is expected to lie below the float network; `low` to `high` holds the true drop in about 90 % of
    runs like those of the calibration. `beyond` names what none of those had of inputs, network, input size and classes, for which the
    interval promises nothing."""

    drop: float
    low: float
    high: float
    beyond: tuple[str, ...] = ()


def _features(p: Point, inputs: Sequence[str]) -> list[float]:
    known = {
        "kl": math.log(max(p.kl, 1e-4)),
        "agreement": math.log(1 - p.agreement + 1e-3),  # 1e-3: half an image of 512
        "bits": (p.weight_bits + p.act_bits) / 2,
    }
    return [1.0, *(known[name] for name in inputs)]


class Calibration:
    """Least squares over the points, the inputs chosen by the error on recipes left out.

    Raises:
        UsageError: there are too few points or recipes to say how wrong a forecast is.
    """

    def __init__(self, points: Sequence[Point]):
        self.points = tuple(points)
        self.recipes = sorted({p.recipe for p in self.points})
        if len(self.points) < LEAST_POINTS or len(self.recipes) < LEAST_RECIPES:
            raise UsageError(
                f"the forecast is not calibrated for such images: there are {len(self.points)} committed runs of {len(self.recipes)} "
                f"recipes with held-out images, and it needs {LEAST_POINTS} of {LEAST_RECIPES}; add records and run "
                "`python -m benchmarks.forecast --write`."
            )
        self.inputs = _choose(self.points)
        self.weights = _fit(self.points, self.inputs)

    @cached_property
    def left_out(self) -> tuple[tuple[Point, float], ...]:
        """Every point and its asinh(drop) as forecast from the other recipes alone, their choice of inputs included."""
        found = []
        for recipe in self.recipes:
            others = [p for p in self.points if p.recipe != recipe]
            inputs = _choose(others)
            weights = _fit(others, inputs)
            found += [(p, _apply(weights, p, inputs)) for p in self.points if p.recipe == recipe]
        return tuple(found)

    @cached_property
    def margin(self) -> float:
        """Half the interval in asinh(drop): the quantile of the left-out residuals with the correction for their number."""
        residuals = sorted(abs(math.asinh(p.drop) - y) for p, y in self.left_out)
        return residuals[math.ceil(LEVEL * (len(residuals) + 1)) - 1]

    @property
    def errors(self) -> list[float]:
        """Forecast minus measured drop of every left-out point, in points."""
        return [math.sinh(y) - p.drop for p, y in self.left_out]

    def forecast(self, agreement: float, kl: float, bits: tuple[float, float]) -> Forecast:
        """See `forecast`."""
        given = {"agreement": agreement, "kl": kl}
        known = {name: [getattr(p, name) for p in self.points] for name in given}
        beyond = [name for name, value in given.items() if not min(known[name]) <= value <= max(known[name])]
        # Better than any run of the calibration counts as the best of them: a line has no bottom.
        best = min(agreement, max(known["agreement"])), max(kl, min(known["kl"]))
        y = _apply(self.weights, Point("", "", *bits, *best, 0.0), self.inputs)
        if tuple(bits) not in {(p.weight_bits, p.act_bits) for p in self.points}:
            beyond.append("bits")
        return Forecast(math.sinh(y), math.sinh(y - self.margin), math.sinh(y + self.margin), tuple(beyond))

    def __str__(self) -> str:
        errors = [abs(error) for error in self.errors]
        return (
            f"{len(self.points)} runs of {len(self.recipes)} recipes on {self.points[0].images} images, by "
            f"{' and '.join(self.inputs)}; error on a recipe left out: mean {np.mean(errors):.2f}, worst {max(errors):.2f} points"
        )


def _fit(points: Sequence[Point], inputs: Sequence[str]) -> np.ndarray:
    rows = np.array([_features(p, inputs) for p in points])
    weights: np.ndarray = np.linalg.lstsq(rows, np.array([math.asinh(p.drop) for p in points]), rcond=None)[0]
    return weights


def _apply(weights: np.ndarray, point: Point, inputs: Sequence[str]) -> float:
    return float(np.array(_features(point, inputs)) @ weights)


def _choose(points: Sequence[Point]) -> tuple[str, ...]:
    """The inputs of least mean squared error on recipes left out."""

    def error(inputs: tuple[str, ...]) -> float:
        total = 0.0
        for recipe in sorted({p.recipe for p in points}):
            weights = _fit([p for p in points if p.recipe != recipe], inputs)
            total += sum((math.asinh(p.drop) - _apply(weights, p, inputs)) ** 2 for p in points if p.recipe == recipe)
        return total

    return min(INPUTS, key=error)


def read_points() -> tuple[dict[str, Any], list[Point]]:
    """What forecast.json says of itself, and its points."""
    held = json.loads(resources.files(__package__).joinpath(DATA).read_text(encoding="utf-8"))
    return held, [Point(**point) for point in held["points"]]


def calibrated_on() -> Network:
    """The network of all committed records."""
    known = read_points()[0]["calibrated_on"]
    return Network(known["parameters"], tuple(known["input_size"]), known["classes"])


@cache
def calibration(images: str) -> Calibration:
    """The one of the committed records of students `trained_on` such images. Raises UsageError where they are too few."""
    return Calibration([p for p in read_points()[1] if p.images == images])


def forecast(agreement: float, kl: float, bits: tuple[float, float], images: str, network: Network) -> Forecast:
    """The accuracy drop to expect of a student, of which no test image is known.

    Args:
        agreement: share of held-out synthetic images on which student and teacher agree (`held_out_agreement` of a history).
        kl: mean KL(teacher || student) at temperature 1 there, in nats (`held_out_kl`).
        bits: of weights and activations.
        images: what the student was trained on (`trained_on`).
        network: the float one (`network_of`).

    Raises:
        UsageError: not calibrated: too few committed records of such students.
    """
    found = calibration(images).forecast(agreement, kl, bits)
    return replace(found, beyond=found.beyond + network.unlike(calibrated_on()))


def _beyond(names: Sequence[str]) -> str:
    return f"beyond the calibration ({', '.join(names)}): the interval promises nothing here"


@dataclass(frozen=True)
class Outlook:
    """A student's forecast, what it follows from, and the measured drop where test images were given."""

    agreement: float
    kl: float
    weight_bits: float
    act_bits: float
    images: str
    forecast: Forecast
    calibration: str
    measured: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        f = self.forecast
        lines = [
            f"forecast without data: top-1 drops by {f.drop:.2f} points, {f.low:.2f} to {f.high:.2f} ({LEVEL:.0%} interval)",
            f"  from agreement {100 * self.agreement:.2f} % and KL {self.kl:.3g} on held-out synthetic images; {self.calibration}",
        ]
        if f.beyond:
            lines.append(f"  {_beyond(f.beyond)}")
        if self.measured is not None:
            inside = "inside" if f.low <= self.measured <= f.high else "outside"
            lines.append(f"  measured on the test images: {self.measured:.2f} points, {inside} the interval")
        return "\n".join(lines)


def outlook(
    agreement: float,
    kl: float,
    bits: tuple[float, float],
    images: str,
    network: Network,
    measured: float | None = None,
) -> Outlook:
    """Raises UsageError: not calibrated."""
    held, _ = read_points()
    about = f"{held['network']}: {calibration(images)}"
    return Outlook(agreement, kl, *bits, images, forecast(agreement, kl, bits, images, network), about, measured)


@dataclass(frozen=True)
class Prior:
    """What is known of the drop before a run: that of all committed runs of these bits on such images, whatever their recipe.

    Attributes:
        drop: their median. low, high: the least and the most of `runs` runs, between which another one of their kind lies with
            probability `level` = (runs - 1) / (runs + 1), the order of exchangeable draws.
        network: of those runs. beyond: as `Forecast` has it.
    """

    drop: float
    low: float
    high: float
    level: float
    runs: int
    network: str
    measured: float | None = None
    beyond: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"forecast before training: top-1 drops by {self.drop:.2f} points, {self.low:.2f} to {self.high:.2f} "
            f"({self.level:.0%} interval; {self.runs} runs at these bits of {self.network})"
        )
        if self.beyond:
            text += f"; {_beyond(self.beyond)}"
        if self.measured is None:
            return text
        inside = "inside" if self.low <= self.measured <= self.high else "outside"
        return f"{text}; measured {self.measured:.2f}, {inside}"


def prior(bits: tuple[float, float], images: str, network: Network, measured: float | None = None) -> Prior:
    """Raises UsageError: fewer runs at these bits than LEAST_RECIPES, ablations (shorter runs) aside, or not calibrated."""
    held, _ = read_points()
    drops = sorted(
        p.drop
        for p in calibration(images).points
        if (p.weight_bits, p.act_bits) == tuple(bits) and ABLATION not in p.record
    )
    if (n := len(drops)) < LEAST_RECIPES:
        raise UsageError(f"{n} committed runs at W{bits[0]:g}A{bits[1]:g}: too few for a forecast before training.")
    beyond, middle = network.unlike(calibrated_on()), float(np.median(drops))
    return Prior(middle, drops[0], drops[-1], (n - 1) / (n + 1), n, held["network"], measured, beyond)


def of_subject(subject: Subject) -> Outlook:
    """Raises UsageError: the run held no images out, or the forecast is not calibrated."""
    record, quant = subject.history[subject.epoch], subject.recipe.quant
    if "held_out_kl" not in record:
        raise UsageError("the run held no images out, and the forecast needs its agreement with the teacher there.")
    known = subject.evaluations
    top1 = known.get("last" if subject.epoch == -1 else "chosen")
    measured = None if top1 is None or "float" not in known else known["float"] - top1
    bits = (quant.nominal_weight_bits, float(quant.act_bits))
    images = trained_on(subject.recipe.images.enabled)
    network = network_of(subject.teacher, subject.input_size)
    return outlook(record["held_out_agreement"], record["held_out_kl"], bits, images, network, measured)


def draw(result: Outlook, figure: Any) -> None:
    """Drop over KL: the runs of the calibration by their bits, the forecast with its interval, and the measured drop."""
    from matplotlib.ticker import NullLocator

    figure.set_size_inches(7, 5)
    figure.set_layout_engine("constrained")
    axes, f = figure.subplots(), result.forecast
    points = calibration(result.images).points
    for bits in sorted({(p.weight_bits, p.act_bits) for p in points}):
        mine = [p for p in points if (p.weight_bits, p.act_bits) == bits]
        label = f"W{bits[0]:g}A{bits[1]:g}, calibration"
        axes.plot([p.kl for p in mine], [p.drop for p in mine], "o", markersize=4, alpha=0.6, label=label)
    below, above = max(0.0, f.drop - f.low), max(0.0, f.high - f.drop)
    axes.errorbar([result.kl], [f.drop], [[below], [above]], fmt="D", color="#d55e00", capsize=4, label="forecast")
    if result.measured is not None:
        axes.plot([result.kl], [result.measured], "k*", markersize=11, label="measured")
    axes.set_xscale("log")
    axes.set_yscale("asinh")
    axes.margins(0.08)
    low, high = axes.get_ylim()
    steps = [sign * d for sign in (-1, 1) for d in (1, 3, 10, 30, 100)]  # evenly spaced here, as the default's are not
    axes.set_yticks([0, *(tick for tick in steps if low < tick < high)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(low, high)
    axes.set_xlabel("KL(teacher || student) on held-out synthetic images, nats")
    axes.set_ylabel("drop of top-1, points")
    axes.legend(frameon=False)
