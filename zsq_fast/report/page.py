"""The page: what of the runs is shown, in which words, and the files beside it."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from zsq_fast.errors import BadFileError, UsageError
from zsq_fast.report.figures import SERIES, bars, draw_panels, picture, standalone
from zsq_fast.report.published import Difference, Published, closest, differences, flat, published_rows
from zsq_fast.report.reading import Analysis, Run, labels, number, read_run, show
from zsq_fast.report.records import read_record
from zsq_fast.runs.storage import make_directory, replace_file, to_json, writing

LIMIT = 3_000_000  # bytes of the page
MINUS = "−"


@dataclass(frozen=True)
class Column:
    """Of a table of layers: its key, title, and whether it holds numbers."""

    key: str
    title: str
    numeric: bool = True


COLUMNS = (
    Column("name", "Layer", numeric=False),
    Column("kind", "Kind", numeric=False),
    Column("shape", "Shape", numeric=False),
    Column("bits", "Bits"),
    Column("weights", "Weights"),
    Column("sqnr_db", "SQNR, dB"),
    Column("lo", "Low"),
    Column("hi", "High"),
    Column("saturated", "Saturated, %"),
    Column("dead_codes", "Unused codes"),
    Column("divergence", "KL alone"),
)


@dataclass(frozen=True)
class Known:
    """What the page calls an analysis, and what it shows."""

    title: str
    text: str
    shaded: bool = False  # its picture has a scale of colours, which dark mode leaves as it is


KNOWN = {
    "forecast": Known("Forecast", "The drop expected from how student and float network differ on held-out synthetic images."),
    "cosine": Known("Gradient cosines", "Whether the losses pull the student the same way: 1 the same, 0 unrelated, −1 opposed."),
    "cosine_history": Known("Gradient cosines while training", "The same at the measured steps, mean and deviation of every epoch."),
    "hessian": Known(
        "Curvature", "The smaller the Hessian's eigenvalues, the flatter the loss. Losses are without the recipe's factors."
    ),
    "surface": Known("Loss surface", "Losses around the student, on the same axes, without the recipe's factors.", True),
    "updates": Known("Changed codes", "Share of integer weights that change, per layer and epoch.", True),
    "samples": Known("Images", "How hard the synthetic images are for the float network, and how much those of a class differ."),
    "layers": Known("Layers", "How well the codes carry weights and activations; the table below holds every number.", True),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Text, and the number to sort by where there is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class LayerTable:
    """Rows of cells, one per column, and the histogram of each row as a path (empty: none)."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    histograms: tuple[str, ...]
    analysed: bool


@dataclass(frozen=True)
class Strip:
    """Images of one class: its number, and a PNG as a data address."""

    label: int
    address: str
    columns: int


@dataclass(frozen=True)
class Part:
    """Everything of one run that the page shows."""

    index: int
    run: Run
    paper: Published | None
    published: tuple[Published, ...]
    differences: tuple[Difference, ...] | None
    recipe: Mapping[str, str]
    layers: LayerTable
    analyses: tuple[tuple[Analysis, str], ...]
    strips: tuple[Strip, ...]
    sentence: str


def write_report(runs: Sequence[Path], out: Path, title: str = "") -> tuple[Path, Path]:
    """Writes the page of one run, or of several beside each other, and the folder with its figures and numbers.

    Args:
        runs: directories of finished runs, or records of `benchmarks.cifar10` (JSON).
        out: the page; the folder is named after it, `report_files` beside `report.html`.
        title: heading; by default what was run.

    Returns: the two paths.

    Raises:
        BadFileError: a run is not finished, damaged, or holds files too large. UsageError: a library is missing, a run is given twice,
        or the page would be larger than 3 MB. StorageError: not written.
    """
    _check_libraries()
    if out.is_dir():
        raise UsageError(f"{out} is a directory; give the name of a page, as in -o {out / 'report.html'}.")
    found = read_runs(list(runs))
    files: dict[str, bytes] = {}
    folder = out.with_name(f"{out.stem}_files")
    page = _page(found, folder.name, files, title).encode(errors="replace")  # half a surrogate pair is valid JSON
    if len(page) > LIMIT:
        raise UsageError(
            f"the page of {len(found)} runs would be {len(page) / 1e6:.1f} MB, and it may be {LIMIT / 1e6:.0f}: report fewer at once, "
            "or move pictures out of their folders `analysis`."
        )
    with writing(folder):
        make_directory(folder)
    for name, data in files.items():
        replace_file(folder / name, data)
    replace_file(out, page)
    return out, folder


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """One `Run` per run directory or committed record.

    Raises:
        BadFileError: neither of them, not finished, or a file that is damaged or too large. UsageError: one is given twice.
    """
    places = [path.resolve() for path in paths]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"{place} is given twice; name each run once.")
    names = zip(paths, labels(places), strict=True)
    runs = [read_record(path, label) if path.is_file() else read_run(path, label) for path, label in names]
    short = [f"{run.recipe.name} {run.bits}" if run.path.is_file() else run.label for run in runs]
    return [replace(run, label=name) if short.count(name) == 1 else run for run, name in zip(runs, short, strict=True)]


def _check_libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib.image  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the page needs jinja2 and matplotlib ({(error.name or '').partition('.')[0]} is missing): pip install 'zsq-fast[report]'."
        ) from None


def _page(runs: Sequence[Run], folder: str, files: dict[str, bytes], title: str) -> str:
    from jinja2 import DictLoader, Environment, StrictUndefined

    def asset(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    panels = draw_panels(runs)
    for drawn in panels:
        files[f"{drawn.panel.name}.svg"] = standalone(drawn.svg)
        files[f"{drawn.panel.name}.png"] = drawn.png
        files[f"{drawn.panel.name}.json"] = to_json(drawn.numbers)
    parts = [_part(index, run, files) for index, run in enumerate(runs, 1)]
    files["report.json"] = to_json({"runs": [_summary(part) for part in parts]})
    environment = Environment(
        loader=DictLoader({"page": asset("page.html")}),
        autoescape=True,  # whatever a run holds stays text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (size, percent, points, minutes, command, device)
    environment.filters.update({**{f.__name__: f for f in filters}, "model": model_name})
    script = asset("page.js")
    return environment.get_template("page").render(
        title=title or heading(runs),
        parts=parts,
        panels=panels,
        folder=folder,
        style=asset("page.css"),
        script=script,
        script_sum=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours=len(SERIES),
        columns=max((strip.columns for part in parts for strip in part.strips), default=1),
        changes=_changes(parts),
        lead=parts[0].sentence if len(parts) == 1 else _comparison(runs),
        limited=_limits(runs),
        analyses=_by_name(parts),
    )


def heading(runs: Sequence[Run]) -> str:
    """What the runs have in common: "AIT, resnet20, W4A4", or "3 runs of resnet20"."""
    first = runs[0]
    if len(runs) == 1:
        return f"{first.recipe.name} on {model_name(first)}, {first.bits}"
    models = {model_name(run) for run in runs}
    return f"{len(runs)} runs" + (f" of {models.pop()}" if len(models) == 1 else "")


def model_name(run: Run) -> str:
    """Without the source or folder in front."""
    return run.model.replace("\\", "/").rpartition("/")[2].rpartition(":")[2] or run.model


def _part(index: int, run: Run, files: dict[str, bytes]) -> Part:
    published = tuple(published_rows(run))
    paper = closest(list(published))
    changed = differences(run, paper.row if paper else None)
    table = _layer_table(run)
    columns = [column.key for column in table.columns]
    rows = [
        {key: cell.text if cell.value is None else cell.value for key, cell in zip(columns, row, strict=True)}
        for row in table.rows
    ]
    files[f"run-{index}-layers.json"] = to_json({"run": run.label, "layers": rows})  # those of an analysis hold more
    for analysis in run.analyses:
        files[f"run-{index}-{analysis.name}.json"] = analysis.raw
        if analysis.png is not None:
            files[f"run-{index}-{analysis.name}.png"] = analysis.png
    strips = []
    for label, count, pixels in run.sheet.strips if run.sheet else ():
        png = picture(pixels)
        files[f"run-{index}-images-{label}.png"] = png
        strips.append(Strip(label, _address(png), count))
    if run.sheet:
        made = {"run": run.label, "source": run.sheet.source, "class": run.sheet.by, "count": run.sheet.count}
        files[f"run-{index}-images.json"] = to_json({**made, "classes": [label for label, *_ in run.sheet.strips]})
    return Part(
        index=index,
        run=run,
        paper=paper,
        published=published,
        differences=None if changed is None else tuple(changed),
        recipe=flat(run.recipe.to_dict()),
        layers=table,
        analyses=tuple((a, "" if a.png is None else _address(a.png)) for a in run.analyses),
        strips=tuple(strips),
        sentence=_sentence(run, paper),
    )


def _address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _sentence(run: Run, paper: Published | None) -> str:
    """How good, how small, how long, against what."""
    parts = []
    if run.drop is not None:
        parts.append(f"{percent(run.top1['last'])} after the last epoch, {_below(run.drop)}")
    elif "last" in run.agreement:
        parts.append(f"The student agrees with the float network on {percent(100 * run.agreement['last'])} of held-out "
                     "synthetic images; no real test images were given")  # fmt: skip
    else:
        parts.append("No accuracy is known: no real test images were given, and none were held out")
    parts.append(f"{run.float_bytes / max(1, run.packed_bytes):.1f} times smaller when packed")
    text = "; ".join(parts) + f"; {minutes(run.minutes)} on {device(run)}."
    if paper is not None:
        where = "" if paper.same_network else f" with {paper.row.model}"
        name = paper.row.title.partition(":")[0]
        text += (
            f" Published by {name}{where}: {percent(paper.row.top1)}, {paper.drop:.2f} points below its float network."
        )
    return text


def _comparison(runs: Sequence[Run]) -> str:
    """Which run lost least, and what it took."""
    known = [(run.drop, run) for run in runs if run.drop is not None]
    if not known:
        return "No accuracy is known of these runs: they were given no real test images."
    drop, best = min(known, key=lambda pair: pair[0])
    return f"Least lost: {best.label}, {percent(best.top1['last'])} after the last epoch, {_below(drop)}, in {minutes(best.minutes)}."


def _below(drop: float) -> str:
    return f"{abs(drop):.2f} points {'below' if drop >= 0 else 'above'} the float network"


def device(run: Run) -> str:
    if not run.device.startswith("cpu"):
        return run.device[:40]
    return f"{run.threads or '?'} CPU thread{'' if run.threads == 1 else 's'}"


def _layer_table(run: Run) -> LayerTable:
    weights = {layer.name: layer for layer in run.layers}
    analysis = next((a for a in run.analyses if a.name == "layers"), None)
    records: list[Mapping[str, Any]] = [
        {"name": layer.name, "kind": "weight", "bits": layer.bits} for layer in run.layers
    ]
    if analysis is not None:
        where = run.path / "analysis" / "layers.json"
        records = analysis.data.get("layers")  # type: ignore[assignment]
        if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
            raise BadFileError(f"{where} holds no list of layers; run `zsq-fast analyze` again.")
    rows, histograms = [], []
    for record in records:
        layer = weights.get(str(record.get("name"))) if record.get("kind") == "weight" else None
        shape = Cell("×".join(map(str, layer.shape)) if layer else "–")
        known = {
            "name": Cell(str(record.get("name", ""))[:200]),
            "kind": Cell(str(record.get("kind", ""))[:40]),
            "shape": shape,
            "weights": _cell(layer.weights if layer else None),
            "saturated": _cell(None if (share := number(record.get("saturated"))) is None else 100 * share),
        }
        rows.append(tuple(known.get(c.key) or _cell(record.get(c.key)) for c in COLUMNS))
        counts = record.get("histogram")
        histograms.append(bars([number(c) or 0.0 for c in counts]) if isinstance(counts, list) and counts else "")
    kept = [i for i, column in enumerate(COLUMNS) if any(row[i].text not in ("–", "") for row in rows)]
    shown = tuple(tuple(row[i] for i in kept) for row in rows)
    return LayerTable(tuple(COLUMNS[i] for i in kept), shown, tuple(histograms), analysis is not None)


def _cell(value: Any) -> Cell:
    found = number(value)
    return Cell(show(value), found)


def _by_name(parts: Sequence[Part]) -> list[tuple[str, Known, list[tuple[Part, Analysis, str]]]]:
    """Every analysis that a run has, with those of all runs beside each other; the known ones first."""
    found: dict[str, list[tuple[Part, Analysis, str]]] = {}
    for part in parts:
        for analysis, address in part.analyses:
            found.setdefault(analysis.name, []).append((part, analysis, address))
    order = [*KNOWN, *sorted(found.keys() - KNOWN.keys())]
    return [(name, KNOWN.get(name, Known(name, "")), found[name]) for name in order if name in found]


def _changes(parts: Sequence[Part]) -> list[tuple[str, list[tuple[str, str] | None]]]:
    """Every option that departs from the published one in a run, with (published, here) per run; None where it does not."""
    tables = [{d.option: (d.published, d.here) for d in part.differences or ()} for part in parts]
    options = dict.fromkeys(option for table in tables for option in table)
    return [(option, [table.get(option) for table in tables]) for option in options]


def _limits(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(run.test_images for run in runs if run.test_images))
    return "; ".join(names)


def _summary(part: Part) -> dict[str, Any]:
    run = part.run
    return {
        "run": run.label,
        "model": run.model,
        "recipe": run.recipe.name,
        "bits": run.bits,
        "top1": dict(run.top1),
        "drop": run.drop,
        "chosen_epoch": run.chosen_epoch,
        "agreement": dict(run.agreement),
        "float_bytes": run.float_bytes,
        "packed_bytes": run.packed_bytes,
        "minutes": run.minutes,
        "device": run.device,
        "threads": run.threads,
        "published": [
            {"row": p.row.id, "model": p.row.model, "top1": p.row.top1, "float": p.row.float_top1, "same_network": p.same_network}
            for p in part.published
        ],
        "differences": None if part.differences is None else {d.option: [d.published, d.here] for d in part.differences},
    }  # fmt: skip


def size(count: int) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}" if count < 999.5 * one else f"{count / one:.0f} {unit}"
    return f"{count} B"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def points(value: float | None) -> str:
    """A drop as a signed difference."""
    if value is None or abs(value) < 0.005:
        return "–" if value is None else "0.00"
    return f"{-value:+.2f}".replace("-", MINUS)


def minutes(value: float) -> str:
    if value >= 90:
        return f"{value / 60:.1f} hours"
    return f"{value:.1f} minutes" if value >= 1 else f"{60 * value:.1f} seconds"


def command(run: Run) -> str:
    return shlex.join(run.command)
