"""Share of integer weights that change per layer and epoch (ait_family.md 8.4), from what a run recorded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import UsageError
from zsq_fast.methods.updates import weights_by_bits

KINDS = {"step_summed": "summed over the steps", "net": "net, end of the epoch against its start"}


@dataclass(frozen=True)
class Updates:
    """Changed codes over the codes of a weight.

    Attributes:
        layers: names of the weights, L.
        epochs: indices of the epochs in which the student trained, E.
        step_summed: `[E][L]`, codes that a step changed, added up over the epoch's steps: above 1 where codes change several times.
            Counted by the inundation kernel; None for a student without inundation.
        net: `[E][L]`, codes that differ between the epoch's start and end; None unless the run tracked them (`--track-updates`).
    """

    layers: tuple[str, ...]
    epochs: tuple[int, ...]
    step_summed: tuple[tuple[float, ...], ...] | None
    net: tuple[tuple[float, ...], ...] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for kind, text in KINDS.items():
            rows = getattr(self, kind)
            if rows is None:
                continue
            lines.append(f"codes changed per epoch in % of a layer's, {text}:")
            lines.append(f"  {'epoch':>5}{'least':>10}{'median':>10}{'most':>10}")
            for epoch, row in dict(zip(self.epochs, rows, strict=True)).items():
                if epoch in (self.epochs[0], self.epochs[len(self.epochs) // 2], self.epochs[-1]):
                    values = (100 * min(row), 100 * statistics.median(row), 100 * max(row))
                    lines.append(f"  {epoch + 1:>5}" + "".join(f"{value:>10.3g}" for value in values))
        return "\n".join(lines)


def of_subject(subject: Subject) -> Updates:
    return update_ratios(subject.student, subject.history)


def update_ratios(student: nn.Module, history: Sequence[Mapping[str, Any]]) -> Updates:
    """The ratios in a history, with the names of the student's weights.

    Raises:
        UsageError: the history holds none.
    """
    names = tuple(name for group in weights_by_bits(student).values() for name in group)
    trained = [record for record in history if "update_ratio" in record or "net_update_ratio" in record]
    if not trained:
        raise UsageError(
            "the run recorded no changes of integer weights: it trained no student, or one without gradient inundation and "
            "without --track-updates of `zsq-fast quantize`."
        )
    rows = [
        tuple(tuple(record[key]) for record in trained) if all(key in record for record in trained) else None
        for key in ("update_ratio", "net_update_ratio")
    ]
    return Updates(names, tuple(record["epoch"] for record in trained), *rows)


def draw(result: Updates, figure: Any) -> None:
    """Heat maps layer x epoch with one logarithmic colour scale each; what never changes stays blank."""
    from matplotlib.colors import LogNorm

    kinds = {text: rows for kind, text in KINDS.items() if (rows := getattr(result, kind)) is not None}
    figure.set_size_inches(3 + 5 * len(kinds), 2 + 0.2 * len(result.layers))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    first, last = result.epochs[0], result.epochs[-1]
    for axes, (text, rows) in zip(panels, kinds.items(), strict=True):
        values = [
            [100 * value if value > 0 else float("nan") for value in column] for column in zip(*rows, strict=True)
        ]
        known = [value for column in values for value in column if value == value]
        low = min(known, default=1.0)
        high = max([1.01 * low, *known])
        extent = (first + 0.5, last + 1.5, len(values) - 0.5, -0.5)
        image = axes.imshow(
            values, aspect="auto", cmap="viridis", interpolation="nearest", norm=LogNorm(low, high), extent=extent
        )
        axes.set_title(text, loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if known:
            bar = figure.colorbar(image, ax=axes, label="codes changed in an epoch, %", format="%.3g")
            bar.ax.minorticks_off()
            if high < 10 * low:  # hardly a power of ten lies between them
                bar.set_ticks([low, math.sqrt(low * high), high])
    panels[0].set_yticks(
        range(len(result.layers)), [name.removesuffix(".weight") for name in result.layers], fontsize=7
    )
