"""The two pictures of the demo: what the generator made up, and how the students learnt from it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from zsq_fast.demo.table import TITLES

COLOURS = {"rtn": "#868b94", "gdfq": "#0072b2", "kl_only": "#e69f00", "ait": "#c4371f"}
_INK, _FAINT = "#22252b", "#d9dce1"


@dataclass(frozen=True)
class Curve:
    """One run: `losses` per student step and `accuracies` in percent, as (student steps taken, value)."""

    method: str
    bits: int
    losses: Sequence[tuple[float, float]] = field(default_factory=tuple)
    accuracies: Sequence[tuple[float, float]] = field(default_factory=tuple)


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, facecolor="white")


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def contact_sheet(synthetic: Tensor, real: Tensor, title: str) -> bytes:
    """PNG of grey images in 0..1, [classes, columns, H, W] each: a row per class, the real ones beside for the eye."""
    cell, left, gap, bottom, head = 0.52, 0.45, 0.35, 0.18, 0.85  # inches
    width = left + gap + cell * (synthetic.shape[1] + real.shape[1]) + bottom
    height = bottom + head + cell * len(synthetic)
    figure = _figure(width, height)
    figure.text(left / width, 1 - 0.32 / height, title, fontsize=14, weight="bold", color=_INK, va="center")
    captions = ("asked for the class at the left", "real test digits, for comparison only")
    for images, caption in zip((synthetic, real), captions, strict=True):
        extent = cell * images.shape[1]
        axes = figure.add_axes((left / width, bottom / height, extent / width, cell * len(images) / height))
        axes.imshow(_tiled(images), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_title(caption, fontsize=10, color=_INK, loc="left", pad=6)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if images is synthetic:
            pitch = images.shape[2] + 1
            axes.set_yticks([pitch * (row + 0.5) - 1 for row in range(len(images))], range(len(images)))
            axes.tick_params(length=0, labelsize=12, labelcolor=_INK)
        left += extent + gap
    return _png(figure)


def _tiled(images: Tensor) -> np.ndarray:
    classes, columns, height, width = images.shape
    sheet = np.ones((classes * (height + 1) - 1, columns * (width + 1) - 1), np.float32)
    for row in range(classes):
        for column in range(columns):
            top, left = row * (height + 1), column * (width + 1)
            sheet[top : top + height, left : left + width] = images[row, column].clamp(0, 1).numpy()
    return sheet


def curves(runs: Sequence[Curve], float_accuracy: float) -> bytes:
    """PNG with one column per bit width: the student's loss above, its accuracy on the test images below."""
    widths = sorted({run.bits for run in runs}, reverse=True)
    figure = _figure(5.2 * len(widths), 6.8)
    panels = figure.subplots(2, len(widths), sharex="col", squeeze=False, gridspec_kw={"height_ratios": (1, 1.25)})
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.17, top=0.95, hspace=0.1, wspace=0.2)
    for column, bits in enumerate(widths):
        chosen = [run for run in runs if run.bits == bits]
        _loss_panel(panels[0][column], [run for run in chosen if run.losses])
        _accuracy_panel(panels[1][column], chosen, float_accuracy)
        panels[0][column].set_title(f"{bits}-bit weights and activations", loc="left", weight="bold", color=_INK)
    panels[0][0].set_ylabel("own loss of the student, log scale", color=_INK)
    panels[1][0].set_ylabel("test accuracy %", color=_INK)
    return _png(figure)


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.tick_params(which="both", colors=_INK, labelsize=9, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Trailing mean over a thirtieth of the run, at the ends over what there is."""
    span = max(1, len(values) // 30)
    total = np.cumsum(np.concatenate(([0.0], values)))
    starts = np.maximum(np.arange(len(values)) - span + 1, 0)
    ends = np.arange(len(values)) + 1
    return (total[ends] - total[starts]) / (ends - starts)


def _loss_panel(axes: Any, runs: Sequence[Curve]) -> None:
    _style(axes)
    for run in runs:
        steps, values = np.asarray(run.losses, dtype=float).T
        axes.plot(steps, values, color=COLOURS[run.method], alpha=0.22, linewidth=0.7)
        axes.plot(steps, _smooth(values), color=COLOURS[run.method], linewidth=1.8, label=TITLES[run.method])
    axes.set_yscale("log")


def _accuracy_panel(axes: Any, runs: Sequence[Curve], float_accuracy: float) -> None:
    _style(axes)
    axes.axhline(float_accuracy, color=_INK, linewidth=1, linestyle=(0, (5, 3)), label=f"float {float_accuracy:.1f}")
    lowest = float_accuracy
    for run in runs:
        steps, values = np.asarray(run.accuracies, dtype=float).T
        label, colour = f"{TITLES[run.method]} {values[-1]:.1f}", COLOURS[run.method]
        lowest = min(lowest, values.min())
        if len(steps) == 1:
            axes.axhline(values[0], color=colour, linewidth=1.5, linestyle=":", label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3.2, label=label)
    highest = max([float_accuracy, *(value for run in runs for _, value in run.accuracies)])
    margin = 0.06 * (highest - lowest) + 0.3
    axes.set_ylim(max(0, lowest - margin), min(100.2, highest + margin))
    axes.set_xlabel("student steps", color=_INK)
    place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)  # below: it would cover the curves
    axes.legend(**place, frameon=False, fontsize=9, labelcolor=_INK)
