"""Two finished runs of the tiny network, with what `zsq-fast analyze` would leave in them, for the tests of the page."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

from cli_support import Tiny, make_tiny, one_thread, schedule

from zsq_fast.cli import main
from zsq_fast.runs import RunDir

NUMBERS = schedule(
    epochs=5, warmup_epochs=2, calibration_epochs=1, iterations=3, batch_size=8, milestones="[3]", held_out=16
)
IMAGES = ["--set", "images.count=8", "--set", "images.batch_size=8", "--set", "images.iterations=2"]
HAST = [*IMAGES, "--set", "student.feature_points=['3']"]
EVIL = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'{{7*7}}"


def quantize(tiny: Tiny, out: Path, recipe: str, *more: object) -> Path:
    words = ["quantize", *tiny.model, "--recipe", recipe, "-w", 3, "-a", 4, "--out", out, *NUMBERS, *more]
    with one_thread():
        assert main([*map(str, words), "--set", "quant.ema=plain", "--threads", "1", "--quiet"]) == 0
    return out


def make_runs(root: Path) -> tuple[Path, Path]:
    """AIT with test images and analyses; HAST, on optimised images, with neither."""
    tiny = make_tiny(root)
    ait = quantize(tiny, root / "ait", "ait", "--eval-data", tiny.images)
    analyse(ait)
    return ait, quantize(tiny, root / "hast", "hast", *HAST)


def analyse(run: Path) -> None:
    folder = run / "analysis"
    folder.mkdir()
    layer = {
        "bits": 3,
        "sqnr_db": 14.5,
        "lo": -1.0,
        "hi": 2.0,
        "saturated": 0.25,
        "dead_codes": 0.5,
        "divergence": 0.125,
    }
    layers = [
        {"name": name, "kind": "weight", **layer, "histogram": [1, 2, 3, 4, 4, 3, 2, 1]} for name in ("0", "3", "8")
    ]
    layers += [
        {"name": f"act{i}", "kind": "activation", **layer, "sqnr_db": float(i), "histogram": [8, 1]} for i in range(17)
    ]
    put(run, "layers", {"layers": layers, "images": 16, "divergence": 0.5}, picture())
    put(
        run,
        "forecast",
        {"forecast": {"drop": 1.234, "low": 0.5, "high": 2.5, "beyond": []}, "kl": 0.01},
        picture(wide=True),
    )
    put(run, "mine", {"pairs": {"ce-kl": {"total": -0.25}}, "values": list(range(40))})


def put(run: Path, name: str, data: Any, png: bytes | None = None) -> None:
    (run / "analysis").mkdir(exist_ok=True)
    (run / "analysis" / f"{name}.json").write_text(json.dumps(data))
    if png is not None:
        (run / "analysis" / f"{name}.png").write_bytes(png)


def picture(wide: bool = False) -> bytes:
    from matplotlib.figure import Figure

    figure, stream = Figure(figsize=(8 if wide else 4, 3), dpi=80), io.BytesIO()
    figure.subplots().plot([1, 3, 2])
    figure.savefig(stream, format="png")
    return stream.getvalue()


def change(run: Path, file: str, /, **values: Any) -> None:
    """Rewrites entries of a JSON file of the run, which still verifies: as one who made the run up would."""
    with RunDir.open(run) as directory:
        directory.write_json(file, {**directory.load_json(file), **values})


def make_hostile(run: Path) -> None:
    """Markup wherever a run may hold a text."""
    recipe = json.loads((run / "recipe.json").read_text())
    info = json.loads((run / "run.json").read_text())
    change(
        run,
        "recipe.json",
        name=EVIL,
        title=EVIL,
        student={**recipe["student"], "feature_weight": 1.0, "feature_points": [EVIL]},
    )
    job = {**info["job"], "model": EVIL, "checkpoint": EVIL, "weights_sha256": EVIL}
    change(
        run,
        "run.json",
        job=job,
        command=["zsq-fast", EVIL],
        commit=EVIL + "\ud800",
        started=EVIL,
        versions={EVIL: EVIL},
        machine={EVIL: EVIL},
    )
    texts = dict(model=EVIL, device=EVIL, eval_data=EVIL, left_float=[{"name": EVIL, "kind": EVIL, "why": EVIL}])
    change(run, "result.json", **texts, forecast={"text": EVIL})
    put(run, "layers", {"layers": [{"name": EVIL, "kind": EVIL, "bits": EVIL, "histogram": [EVIL, 1]}]})
    put(run, "forecast", {EVIL: {EVIL: EVIL}})


def overlapping(figure: Any) -> list[tuple[str, str]]:
    """Pairs of titles, labels of axes and tick labels of a matplotlib figure that are printed on each other or over another panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes, panels = [], []
    for axes in figure.axes:
        texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = (tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
            texts += [label for tick in shown for label in (tick.label1, tick.label2)]
        found = [t for t in texts if t.get_visible() and t.get_text()]
        boxes += [(t.get_text(), t.get_window_extent(canvas.get_renderer()), axes) for t in found]
        panels.append((axes, axes.get_window_extent(canvas.get_renderer())))
    both = [(a, b) for (a, one, _), (b, other, _) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    return both + [
        (a, "a panel") for a, box, mine in boxes for axes, panel in panels if axes is not mine and box.overlaps(panel)
    ]
