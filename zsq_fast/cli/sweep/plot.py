"""The plot of a sweep, from what sweep.json holds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from zsq_fast.cli.sweep.results import keys_text, show, text_of, title, values_text

INK, FAINT, LINE, BAD = "#3d444d", "#d5d9de", "#0b7285", "#c92a2a"
SPAN = 10  # values of which the largest is so many times the smallest go on a logarithmic axis


def draw(sweep: Mapping[str, Any], figure: Any) -> None:
    """Fills a matplotlib figure: a heat map of two options in all combinations, else a line per option."""
    options = sweep["options"]
    figure.set_layout_engine("constrained")
    if len(options) == 2 and not sweep["one_at_a_time"]:
        figure.set_size_inches(6.4, 4.8)
        _heat_map(sweep, figure)
    else:
        columns = min(3, len(options))
        rows = -(-len(options) // columns)
        figure.set_size_inches(1.2 + 4.2 * columns, 3.6 * rows)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axes, keys in zip(panels, options):
            _line(sweep, keys, axes)
        for axes in panels[len(options) :]:
            axes.remove()
        for axes in panels[::columns][:rows]:
            axes.set_ylabel(_measure(sweep), color=INK)
    figure.suptitle(title(sweep), color=INK, fontsize=11)


def _measure(sweep: Mapping[str, Any]) -> str:
    if sweep["measure"] == "last":
        return "top-1 in %, last epoch"
    return "agreement with the float network\non held-out synthetic images, %"


def line_points(sweep: Mapping[str, Any], keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """The points that differ in these options alone: from the recipe's own values if there are such, else from the first point."""
    rest = [key for key in sweep["own_values"] if key not in keys]

    def beside(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [point for point in sweep["points"] if all(point["values"][key] == values[key] for key in rest)]

    found = beside(sweep["own_values"]) or beside(sweep["points"][0]["values"])
    if all(_is_number(point["values"][keys[0]]) for point in found) and len(keys) == 1:
        found.sort(key=lambda point: float(point["values"][keys[0]]))
    return found


def _line(sweep: Mapping[str, Any], keys: Sequence[str], axes: Any) -> None:
    points = line_points(sweep, keys)
    texts = [values_text(keys, point["values"]) for point in points]
    numbers = [point["values"][keys[0]] for point in points]
    scaled = len(keys) == 1 and all(map(_is_number, numbers))
    if scaled:
        places = list(map(float, numbers))
        if min(places) > 0 and max(places) >= SPAN * min(places):
            axes.set_xscale("log")
    else:
        places = list(map(float, range(len(points))))
    axes.set_xticks(places, texts, rotation=30 if max(map(len, texts)) > 6 else 0)
    axes.minorticks_off()
    axes.margins(x=0.1)
    placed = list(zip(places, points, strict=True))
    known = [(x, point["own"], point[sweep["measure"]]) for x, point in placed if point[sweep["measure"]]]
    if known:
        axes.errorbar(
            [x for x, _, _ in known],
            [value["mean"] for _, _, value in known],
            yerr=[value["deviation"] or 0.0 for _, _, value in known],
            color=LINE,
            linestyle="-" if scaled else ":",
            marker="o",
            capsize=3,
        )
    own = [(x, value["mean"]) for x, is_own, value in known if is_own]
    for x, mean in own:
        axes.plot(x, mean, "o", markersize=11, markerfacecolor="none", color=LINE, label="the recipe's own value")
    lost = [x for x, point in placed if any(run["state"] == "failed" for run in point["runs"])]
    if lost:
        axes.plot(lost, [0.03] * len(lost), "x", color=BAD, transform=axes.get_xaxis_transform(), label="a run failed")
    if own or lost:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    rest = {key: value for key, value in points[0]["values"].items() if key not in keys}
    if rest != {key: sweep["own_values"][key] for key in rest}:
        axes.set_title(
            "at " + ", ".join(f"{key} {text_of(value)}" for key, value in rest.items()), fontsize=8, color=INK
        )
    axes.set_xlabel(keys_text(keys), color=INK)
    _style(axes)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _heat_map(sweep: Mapping[str, Any], figure: Any) -> None:
    from matplotlib.patches import Rectangle

    down, across = sweep["options"]
    rows = list(dict.fromkeys(values_text(down, point["values"]) for point in sweep["points"]))
    columns = list(dict.fromkeys(values_text(across, point["values"]) for point in sweep["points"]))
    cells = {
        (rows.index(values_text(down, p["values"])), columns.index(values_text(across, p["values"]))): p
        for p in sweep["points"]
    }
    grid = [
        [(cells[i, k][sweep["measure"]] or {"mean": float("nan")})["mean"] for k in range(len(columns))]
        for i in range(len(rows))
    ]
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    low, high = image.get_clim()
    for (i, k), point in cells.items():
        value, failed = point[sweep["measure"]], any(run["state"] == "failed" for run in point["runs"])
        text = ("failed" if failed else "-") if value is None else show(value).replace(" ", "\n", 1)
        dark = value is not None and value["mean"] - low <= 0.6 * (high - low)
        axes.text(k, i, text, ha="center", va="center", fontsize=9, color="white" if dark else INK)
        if point["own"]:
            axes.add_patch(Rectangle((k - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor=BAD, linewidth=1.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(keys_text(across), color=INK)
    axes.set_ylabel(keys_text(down), color=INK)
    if any(point["own"] for point in cells.values()):
        axes.set_title("framed: the recipe's own values", fontsize=8, color=INK)
    _style(axes)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(_measure(sweep), color=INK)
    bar.ax.tick_params(colors=INK, length=0)
    bar.outline.set_visible(False)


def _style(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", colors=INK, labelsize=9, length=0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def pictures(sweep: Mapping[str, Any], figure_class: Any) -> dict[str, bytes]:
    """ "sweep.png" and "sweep.svg"; equal numbers give equal bytes."""
    import matplotlib

    found = {}
    with matplotlib.rc_context({"svg.hashsalt": "sweep"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            figure, stream = figure_class(dpi=120, facecolor="white"), io.BytesIO()
            draw(sweep, figure)
            figure.savefig(stream, format=kind, metadata=metadata)
            found[f"sweep.{kind}"] = stream.getvalue()
    return found
