"""Curves as SVG that follow the page's colours, strips of images as PNG. No text of a run enters a picture: legends are HTML."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsq_fast.report.reading import PAIRS, Run

# Drawn with the fallback, replaced by the variable inside the page, which is light or dark.
INK, FAINT = "#3d444d", "#d5d9de"
SERIES = ("#0b7285", "#d9480f", "#7048c6", "#5c7c12", "#c2255c", "#946200", "#1864ab", "#5f6670")
VARIABLES = {INK: "ink-soft", FAINT: "line", **{colour: f"s{i}" for i, colour in enumerate(SERIES)}}
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
MOST_POINTS = 2000  # of a curve; a longer one is thinned


@dataclass(frozen=True)
class Panel:
    """One picture: a title, a note on how to read it, the curves it holds (key, name), and its vertical axis."""

    name: str
    title: str
    note: str
    curves: tuple[tuple[str, str], ...]
    logarithmic: bool = False
    cosine: bool = False


PANELS = (
    Panel("top1", "Top-1 accuracy, %", "On real test images, which decide nothing; dashed: the float network.", (("top1", ""),)),
    Panel("agreement", "Agreement with the float network, %", "On held-out synthetic images; the highest chooses the epoch.",
          (("held_out_agreement", ""),)),
    Panel("student-loss", "Loss of the student", "Mean of an epoch, logarithmic. Losses of different methods are not comparable.",
          (("student_loss", ""),), logarithmic=True),
    Panel("generator-loss", "Losses of the generator", "Means of an epoch, logarithmic.",
          (("generator_ce", "cross entropy"), ("generator_bns", "batch-norm statistics")), logarithmic=True),
    Panel("cosine", "Cosine of the gradients of two losses", "Of all parameters; below 0 the losses pull the student apart.",
          tuple((pair, pair.upper()) for pair in PAIRS), cosine=True),
)  # fmt: skip


UPDATES_NOTES = {
    "update_ratio": "Integer weights changed by gradient inundation, summed over the steps, per layer in the network's order; blank: none.",
    "net_update_ratio": "Net: integer weights that differ between an epoch's start and end, per layer in its order; blank: none.",
}


@dataclass(frozen=True)
class Entry:
    """A line of a legend: which run, which of the panel's curves, colour and dash as indices, and the last value."""

    run: str
    curve: str
    colour: int
    dash: int
    last: float


@dataclass(frozen=True)
class Drawn:
    """A panel with its picture as SVG and PNG, its legend, its numbers as JSON holds them, and the run where it shows only one."""

    panel: Panel
    svg: str
    png: bytes
    legend: tuple[Entry, ...]
    numbers: Mapping[str, Any]
    run: str = ""


def draw_panels(runs: Sequence[Run]) -> list[Drawn]:
    """Every panel of which at least one run has something."""
    drawn = [_draw(panel, runs) for panel in PANELS]
    known = [100 * value for run in runs for row in run.updates for value in row if value > 0] or [1.0]
    ends = min(known), max(max(known), 1.01 * min(known))  # one scale for all runs
    drawn += [_heat_map(i, run, ends) for i, run in enumerate(runs, 1) if run.updates]
    return [found for found in drawn if found is not None]


def _heat_map(index: int, run: Run, ends: tuple[float, float]) -> Drawn:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    first = min(epoch for epoch, _ in run.curves.get("student_loss", ((1, 0.0),)))
    values = [[100 * value if value > 0 else math.nan for value in column] for column in zip(*run.updates, strict=True)]
    figure = _figure()
    axes = figure.subplots()
    extent = (first - 0.5, first - 0.5 + len(run.updates), len(values) + 0.5, 0.5)
    shades: dict[str, Any] = {"cmap": "viridis", "norm": LogNorm(*ends)}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", extent=extent, **shades)
    _style(axes)
    axes.grid(False)
    axes.set_ylabel("layer", color=INK, fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    bar = figure.colorbar(image, ax=axes, format=FuncFormatter(lambda value, _: f"{value:.3g}"))
    if ends[1] < 10 * ends[0]:  # hardly a power of ten lies between them
        bar.ax.yaxis.set_major_locator(FixedLocator([ends[0], math.sqrt(ends[0] * ends[1]), ends[1]]))
    bar.ax.tick_params(which="both", colors=INK, labelsize=10, length=0)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    panel = Panel(f"run-{index}-update-ratios", "Codes changed in an epoch, %", UPDATES_NOTES[run.updates_kind], ())
    numbers = {"figure": panel.title, "run": run.label, "first_epoch": first, run.updates_kind: run.updates}
    return Drawn(panel, *_pictures(figure, panel.name), (), numbers, run.label)


def _draw(panel: Panel, runs: Sequence[Run]) -> Drawn | None:
    lines = [
        (i, k, run.curves[name])
        for i, run in enumerate(runs)
        for k, (name, _) in enumerate(panel.curves)
        if name in run.curves
    ]
    if not lines:
        return None
    figure = _figure()
    axes = figure.subplots()
    dashed = [(i, run.top1["float"]) for i, run in enumerate(runs) if panel.name == "top1" and "float" in run.top1]
    for i, value in dashed:
        axes.axhline(value, color=_colour(i), linewidth=1.1, linestyle=(0, (5, 4)))
    for i, k, points in lines:
        thinned = points[:: math.ceil(len(points) / MOST_POINTS)]
        epochs, values = zip(*thinned, strict=True)
        style: dict[str, Any] = {"color": _colour(i), "linestyle": DASHES[k], "linewidth": 1.8}
        axes.plot(epochs, values, marker="o" if len(values) < 20 else None, markersize=3.5, **style)
    if panel.logarithmic and all(value > 0 for _, _, points in lines for _, value in points):
        axes.set_yscale("log")
    if panel.cosine:
        axes.set_ylim(-1.05, 1.05)
        axes.axhline(0, color=INK, linewidth=0.8)
    _style(axes)
    legend = [Entry(runs[i].label, panel.curves[k][1], i % len(SERIES), k, points[-1][1]) for i, k, points in lines]
    numbers = {
        "figure": panel.title,
        "curves": [
            {"run": runs[i].label, "curve": panel.curves[k][0], "epochs": [e for e, _ in points], "values": [v for _, v in points]}
            for i, k, points in lines
        ],
        "float": {runs[i].label: value for i, value in dashed},
    }  # fmt: skip
    return Drawn(panel, *_pictures(figure, panel.name), tuple(legend), numbers)


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _figure() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(5.0, 2.9), layout="constrained")


def _style(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(which="both", colors=INK, labelsize=10, length=0)
    axes.set_xlabel("epoch", color=INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        few, many = (
            high / low < 8,
            high / low > 200,
        )  # 1, 2 and 5 times powers of ten: hardly a number, or one on the other
        axes.yaxis.set_major_locator(
            MaxNLocator(5) if few else LogLocator(subs=(1.0,) if many else (1, 2, 5), numticks=8)
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _pictures(figure: Any, name: str) -> tuple[str, bytes]:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, facecolor="white", metadata=dict[str, Any](Software=None))
    return _svg(figure, name), stream.getvalue()


def standalone(svg: str) -> bytes:
    """A picture of the page as a file of its own: colours plain, since not every viewer knows variables."""
    plain = re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", svg).replace("font-family: inherit, ", "font-family: ")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{plain}\n'.encode()


def _svg(figure: Any, name: str) -> str:
    """The `<svg>` element: text stays text, colours are the page's variables, and no id but the ones referred to is left."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' id="[\w.]*_\d+"', "", text)
    text = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px; font-family: inherit, sans-serif", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return text


def picture(pixels: Tensor) -> bytes:
    """PNG of uint8 pixels `[H, W, 4]`."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, pixels.numpy(), format="png", metadata=dict[str, Any](Software=None))
    return stream.getvalue()


def bars(counts: Sequence[float], most: int = 16) -> str:
    """Path of a small bar chart in a box of 100 x 24, at most so many bars; more counts are added up in groups."""
    group = math.ceil(len(counts) / most) or 1
    heights = [sum(counts[i : i + group]) for i in range(0, len(counts), group)]
    highest, width = max([*heights, 1e-30]), 100 / max(1, len(heights))
    parts = (
        f"M{i * width:.1f} 24v-{24 * max(0.0, height) / highest:.1f}h{0.8 * width:.1f}V24z"
        for i, height in enumerate(heights)
    )
    return "".join(parts)
