"""Gradient cosine similarity of pairs of losses, of a student as it is and over the epochs of a run that tracked it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from zsq_fast.analysis.losses import BatchLosses, frozen_copy
from zsq_fast.analysis.losses import of_subject as losses_of
from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import UsageError
from zsq_fast.methods.cosine import NAMES, CosineMeter
from zsq_fast.nn import quantized_weights

COLOURS = {"ce-kl": "#c4371f", "fa-kl": "#0072b2", "ce-fa": "#e69f00"}


@dataclass(frozen=True)
class PairCosine:
    """Cosines between the gradients of two losses; None where one of the gradients is 0, or for the deviation of one batch.

    Attributes:
        per_batch: of all trainable parameters as one vector, batch by batch.
        total, total_deviation: their mean and sample deviation.
        weights, weights_deviation: of all quantized weights as one vector.
        layers, layers_deviation: of each quantized weight, like `GradientCosines.layers`.
    """

    per_batch: list[float | None]
    total: float | None
    total_deviation: float | None
    weights: float | None
    weights_deviation: float | None
    layers: list[float | None]
    layers_deviation: list[float | None]


@dataclass(frozen=True)
class GradientCosines:
    """Per pair "a-b" of losses its cosines; `layers` names the quantized layers."""

    layers: list[str]
    pairs: dict[str, PairCosine]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def text(value: float | None) -> str:
            return f"{'':>8}" if value is None else f"{value:>+8.3f}"

        lines = [f"{'':<28}" + "".join(f"{pair.upper():>8}" for pair in self.pairs)]
        rows = [("all parameters", [p.total for p in self.pairs.values()])]
        rows += [(name, [p.layers[i] for p in self.pairs.values()]) for i, name in enumerate(self.layers)]
        return "\n".join([*lines, *(f"{name:<28}" + "".join(map(text, values)) for name, values in rows)])


def of_subject(subject: Subject, *, losses: tuple[str, ...] = ()) -> GradientCosines:
    return gradient_cosines(subject.student, *losses_of(subject, names=losses))


@dataclass(frozen=True)
class CosineHistory:
    """What a run recorded with --track-cosine.

    Attributes:
        layers: names of the quantized layers.
        epochs: `{"epoch": index, "cosine": {pair: numbers}}` of each that measured any, the numbers as `CosineMeter.read` has them.
    """

    layers: list[str]
    epochs: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        pairs = [pair for pair in COLOURS if any(pair in record["cosine"] for record in self.epochs)]
        lines = [f"{'epoch':>6}{'batches':>9}" + "".join(f"{pair.upper():>8}" for pair in pairs)]
        for record in self.epochs:
            found = [record["cosine"].get(pair, {}) for pair in pairs]
            totals = "".join(f"{'':>8}" if (v := f.get("total")) is None else f"{v:>+8.3f}" for f in found)
            lines.append(f"{record['epoch'] + 1:>6}{max(f.get('batches', 0) for f in found):>9}{totals}")
        return "\n".join(lines)


def history_of_subject(subject: Subject) -> CosineHistory:
    """Raises UsageError: the run did not track them."""
    layers = [name.removesuffix(".weight") for name in quantized_weights(subject.student)]
    return CosineHistory(layers, tracked(subject.history))


def tracked(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cosines in the records of epochs. Raises UsageError: there are none."""
    found = [{"epoch": r["epoch"], "cosine": r["cosine"]} for r in history if r.get("cosine")]
    if not found:
        raise UsageError("the run recorded no gradient cosines; train it with --track-cosine N (Trainer: track_cosine)")
    return found


def gradient_cosines(
    student: nn.Module, batches: Sequence[BatchLosses], names: Sequence[str] = ("ce", "fa", "kl")
) -> GradientCosines:
    """`cos = <grad A, grad B> / (|grad A| |grad B|)` on every batch, for every pair of the named losses.

    What the slides of AIT and figure 2a of HAST's supplement show (ait_family.md 8.1, hast_family.md 7.2). Costs a forward pass and
    one backward pass per loss and batch. The student is not changed.

    Raises:
        UsageError: no batch, fewer than two losses, or one that the batches were not made for.
    """
    ordered = [name for name in NAMES if name in names]
    if not batches or len(ordered) < 2:
        raise UsageError("gradient cosines need a batch and two losses at least")
    network = frozen_copy(student)
    meter = CosineMeter(network, ordered)
    for batch in batches:
        missing = [name for name in ordered if name not in batch.names]
        if missing:
            raise UsageError(f"the batches were made without the loss '{missing[0]}' ({', '.join(batch.names)})")
        meter.add(batch.values(network, ordered))
    found = meter.read()
    nothing: dict[str, Any] = dict.fromkeys(("total", "total_deviation", "weights", "weights_deviation"), None)
    nothing |= dict.fromkeys(("layers", "layers_deviation"), [None] * len(meter.layers))
    nothing["per_batch"] = [None] * len(batches)
    pairs = {}
    for pair in meter.pairs:
        numbers = {**nothing, **found.get(pair, {})}
        numbers.pop("batches", None)
        pairs[pair] = PairCosine(**numbers)
    return GradientCosines(list(meter.layers), pairs)


def draw(result: GradientCosines, figure: Any) -> None:
    """Per layer, with the deviation over the batches; the cosine of all parameters is a dashed line."""
    figure.set_size_inches(max(7, 2 + 0.2 * len(result.layers)), 4.8)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for pair, found in result.pairs.items():
        places = [(i, v) for i, v in enumerate(found.layers) if v is not None]
        spread = [found.layers_deviation[i] or 0.0 for i, _ in places]
        label = pair.upper() + ("" if found.total is None else f" ({found.total:+.3f} in all)")
        at, values = [i for i, _ in places], [v for _, v in places]
        axes.errorbar(at, values, spread, fmt="o-", ms=3, lw=1, capsize=2, color=COLOURS[pair], label=label)
        if found.total is not None:
            axes.axhline(found.total, color=COLOURS[pair], lw=1, ls="--")
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(range(len(result.layers)), result.layers, rotation=90, fontsize=7)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("cosine of the gradients")
    axes.legend(fontsize=8)


def draw_history(history: Sequence[Mapping[str, Any]], figure: Any) -> None:
    """Curves of a tracked run (`Trainer.track_cosine`): mean of each epoch and its deviation over the steps measured.

    Args:
        history: records of the epochs, from `Result.history` or metrics.jsonl.

    Raises:
        UsageError: none of them holds cosines.
    """
    records = tracked(history)
    axes = figure.subplots()
    for pair, colour in COLOURS.items():
        points = [(r["epoch"] + 1, r["cosine"][pair]) for r in records if pair in r["cosine"]]
        points = [(epoch, found) for epoch, found in points if found["total"] is not None]
        if not points:
            continue
        epochs, mean = [epoch for epoch, _ in points], [found["total"] for _, found in points]
        spread = [found["total_deviation"] or 0.0 for _, found in points]
        axes.plot(epochs, mean, color=colour, lw=1.5, label=pair.upper())
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    axes.axhline(0, color="black", lw=0.8)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("cosine of the gradients")
    axes.legend(fontsize=8)


def draw_tracked(result: CosineHistory, figure: Any) -> None:
    """`draw_history`, and a point per measured step, spread evenly over its epoch."""
    draw_history(result.epochs, figure)
    (axes,) = figure.axes
    for pair, colour in COLOURS.items():
        each = [(r["epoch"], r["cosine"].get(pair, {}).get("per_batch", [])) for r in result.epochs]  # older runs: none
        places = [
            (epoch + (i + 1) / len(values), v) for epoch, values in each for i, v in enumerate(values) if v is not None
        ]
        axes.plot([x for x, _ in places], [y for _, y in places], ".", ms=3, alpha=0.5, color=colour)
