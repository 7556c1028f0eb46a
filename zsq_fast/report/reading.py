"""What a page shows of a run, read from its directory alone: no network is built, so nothing that the run names is executed.

A run directory may come from a stranger: every file has a limit, every value a type, and what is wrong ends in one sentence.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zsq_fast.errors import BadFileError, UsageError
from zsq_fast.methods import Recipe
from zsq_fast.report.images import Sheet, read_sheet
from zsq_fast.runs import RunDir
from zsq_fast.runs.directory import INFO, MANIFEST, METRICS, RECIPE
from zsq_fast.runs.storage import check_name, from_json

RESULT, STUDENT, ANALYSES = "result.json", "student.safetensors", "analysis"
JSON_LIMIT, PICTURE_LIMIT, TENSOR_LIMIT = 16 << 20, 1 << 20, 4 << 30  # bytes
PAIRS = ("ce-kl", "fa-kl", "ce-fa")  # of losses, whose gradients a run may have tracked
UPDATES = ("update_ratio", "net_update_ratio")
CURVES = ("student_loss", "generator_ce", "generator_bns", "held_out_agreement", "held_out_kl", "top1", *PAIRS)
SIGNATURE = b"\x89PNG\r\n\x1a\n"
ROWS = 24  # of an analysis' numbers on the page; all are in its JSON
LONGEST = 400  # characters of a text on the page
WORDS = {  # for keys of analyses; a group without a word is left out of the name
    **{name: name.upper() for name in ("ce", "kl", "fa", *PAIRS)},
    **dict.fromkeys(("losses", "pairs"), ""),
    "value": "loss",
    "values": "eigenvalues, largest first",
    "residuals": "their residuals",
    "products": "Hessian products",
    "standard_error": "± standard error",
    "sigma": "width",
    "centre": "student's",
    "per_batch": "of every batch",
    "total": "of all parameters",
    "weights": "of the quantized weights",
    "layers_deviation": "layers, deviation",
    "weight_bits": "bits of weights",
    "act_bits": "bits of activations",
    "drop": "drop, points",
    "low": "low, points",
    "high": "high, points",
    "measured": "measured drop, points",
    "beyond": "beyond the calibration in",
    "hard_share": "share with a difficulty above 1/2",
    "quantiles": "5, 25, 50, 75, 95 %",
    "to_center": "cosine distance to the class's mean",
    "pairwise": "cosine distance of two images of a class",
    "divergence": "KL to the float network",
}


@dataclass(frozen=True)
class Layer:
    """One quantized weight: its module, shape `[rows, ...]`, bits, and number of codes."""

    name: str
    shape: tuple[int, ...]
    bits: int
    weights: int


@dataclass(frozen=True)
class Analysis:
    """What `zsq-fast analyze` left of one name: its JSON, as bytes and parsed, the numbers that fit beside a picture, and the picture."""

    name: str
    raw: bytes
    data: Mapping[str, Any]
    numbers: tuple[tuple[str, str], ...]
    png: bytes | None

    @property
    def wide(self) -> bool:
        """Whether the picture needs the whole width of a page."""
        head = self.png or b""
        return 2 * int.from_bytes(head[16:20], "big") > 3 * int.from_bytes(head[20:24], "big")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        label: the shortest end of its path that no other run of the page has.
        top1: percents on real test images by stage ("float", "rtn", "last", "chosen"); empty where none were given.
        chosen_epoch: 0-based, None where nothing was held out. agreement: share of held-out images by "chosen" and "last".
        curves: per name of CURVES the points (epochs done, value).
        updates: share of changed codes, `[epochs][layers]`: step-summed, or the net one of a run without gradient inundation that tracked
            it; empty without either. updates_kind: its key in the history.
        classes: outputs of the network, 0 where its last weight does not tell.
        environment: (what, value) in the order of the page. command: the words of the command line.
        forecasts: of the accuracy drop, as the run printed them: before training, and after it.
    """

    path: Path
    label: str
    model: str
    recipe: Recipe
    input_size: tuple[int, ...]
    classes: int
    top1: Mapping[str, float]
    chosen_epoch: int | None
    agreement: Mapping[str, float]
    minutes: float
    device: str
    threads: int
    float_bytes: int
    packed_bytes: int
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    updates: tuple[tuple[float, ...], ...]
    updates_kind: str
    layers: tuple[Layer, ...]
    left_float: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    command: tuple[str, ...]
    started: str
    test_images: str
    analyses: tuple[Analysis, ...]
    sheet: Sheet | None
    forecasts: tuple[str, ...] = ()

    @property
    def bits(self) -> str:
        quant = self.recipe.quant
        return f"W{quant.nominal_weight_bits:g}A{quant.act_bits}"

    @property
    def drop(self) -> float | None:
        """Points that the last epoch lies below the float network."""
        return self.top1["float"] - self.top1["last"] if {"float", "last"} <= self.top1.keys() else None


class Fields:
    """Typed access to a JSON object of a file; BadFileError names the file and the field."""

    def __init__(self, path: Path, values: Any, name: str = ""):
        if not isinstance(values, Mapping):
            raise BadFileError(f"{path} is damaged: {name or 'its content'} is no JSON object.")
        self.path, self.values, self.name = path, values, name

    def _wrong(self, key: str, kind: str) -> BadFileError:
        return BadFileError(f"{self.path} is damaged: '{self.name}{key}' is not {kind}.")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = number(self.values.get(key, default))
        if value is None:
            raise self._wrong(key, "a finite number")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not value.is_integer():
            raise self._wrong(key, "a whole number")
        return int(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def table(self, key: str) -> Fields:
        """A nested object; empty where there is none."""
        return Fields(self.path, self.values.get(key) or {}, f"{self.name}{key}.")

    def numbers(self) -> dict[str, float]:
        return {str(key): self.number(key) for key in self.values}

    def list(self, key: str) -> list[Any]:
        value = self.values.get(key) or []
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value


def number(value: Any) -> float | None:
    """A finite float that arithmetic and drawing can bear, else None; `to_json` wrote non-finite ones as texts."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e30 else None  # False for NaN too


def labels(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths by which they differ."""
    for length in range(1, max(len(place.parts) for place in places)):
        found = ["/".join(place.parts[-length:]) for place in places]
        if len(set(found)) == len(found):
            return found
    return [str(place) for place in places]


def bounded(path: Path, limit: int) -> None:
    """BadFileError unless `path` is a regular file of at most `limit` bytes; a link could lead anywhere."""
    try:
        status = path.lstat()
    except OSError as error:
        raise BadFileError(f"{path} is missing or cannot be read.") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFileError(f"{path} is not a regular file.")
    if status.st_size > limit:
        raise BadFileError(f"{path} is too large for a report: {status.st_size:,} bytes, at most {limit:,}.")


def read_recipe(path: Path, values: Mapping[str, Any]) -> Recipe:
    """BadFileError where a recipe is not one of this version."""
    try:
        return Recipe.from_dict(values)
    except UsageError as error:
        raise BadFileError(f"{path} is of another version, or damaged: {error}") from error


def read_run(path: Path, label: str) -> Run:
    """A finished run of `zsq-fast quantize`, `resume` or `reproduce`.

    Raises:
        BadFileError: no run, not finished, or a file that is damaged or too large.
    """
    if not RunDir.is_run(path):
        raise BadFileError(f"{path} is not a run directory of zsq-fast.")
    for name in (MANIFEST, RECIPE, INFO):
        bounded(path / name, JSON_LIMIT)
    run = RunDir.open(path, read_only=True)
    if not run.holds(RESULT) or not run.holds(STUDENT):
        raise BadFileError(f"{path} is not finished; run `zsq-fast resume {path}`.")
    bounded(path / RESULT, JSON_LIMIT)
    bounded(path / STUDENT, TENSOR_LIMIT)
    recipe = read_recipe(path / RECIPE, run.recipe)
    result, info = Fields(path / RESULT, run.load_json(RESULT)), Fields(path / INFO, run.info)
    job, tensors = info.table("job"), run.load_tensors(STUDENT)
    history, layers = _history(run), _layers(result, recipe, tensors)
    sides = [number(side) for side in job.list("input_size")]
    held_out = result.table("held_out")
    chosen = result.values.get("chosen_epoch")
    data, limit = result.text("eval_data", ""), result.values.get("eval_limit")
    return Run(
        path=path,
        label=label,
        model=result.text("model"),
        recipe=recipe,
        input_size=tuple(int(side) for side in sides if side is not None),
        classes=layers[-1].shape[0] if layers else 0,
        top1=result.table("top1").numbers(),
        chosen_epoch=None if chosen is None else result.whole("chosen_epoch"),
        agreement={name: held_out.table(name).number("agreement") for name in held_out.values},
        minutes=result.number("minutes"),
        device=result.text("device", "cpu"),
        threads=result.whole("threads", 0),
        float_bytes=result.whole("float_bytes"),
        packed_bytes=result.whole("packed_bytes"),
        curves=curves(history),
        **updates(history),
        layers=layers,
        left_float=tuple(
            (site.text("name", "") or "the model", site.text("why", ""))
            for site in (Fields(path / RESULT, site, "left_float ") for site in result.list("left_float"))
        ),
        environment=_environment(info, result),
        command=tuple(map(str, info.list("command"))),
        started=info.text("started", ""),
        test_images=f"{Path(data).name}{f', {limit} of them' if limit else ''}" if data else "",
        analyses=_analyses(path / ANALYSES),
        sheet=read_sheet(run, job.list("mean"), job.list("std")),
        forecasts=tuple(
            text
            for name in ("forecast_before", "forecast")
            if (text := "; ".join(filter(None, map(str.strip, result.table(name).text("text", "").splitlines()))))
        ),
    )


def _layers(result: Fields, recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> tuple[Layer, ...]:
    bits = result.table("layer_bits").numbers()
    found = {name: tensors.get(f"{name}.weight" if name else "weight") for name in bits}
    return tuple(
        Layer(name or "the model", tuple(weight.shape), int(bits[name]), weight.numel())
        for name, weight in found.items()
        if weight is not None
    )


def _history(run: RunDir) -> list[dict[str, Any]]:
    path = run.path / METRICS
    if not path.exists():
        return []
    bounded(path, JSON_LIMIT)
    return epochs(path, run.read_metrics())


def epochs(path: Path, records: list[Any]) -> list[dict[str, Any]]:
    """The records of a history with what is drawn of them: the index, finite numbers, and ratios of changed codes."""
    found: list[dict[str, Any]] = []
    for record in records:
        fields = Fields(path, record, "history.")
        kept: dict[str, Any] = {"epoch": fields.whole("epoch")}
        kept |= {name: value for name in CURVES if (value := number(record.get(name))) is not None}
        cosines = fields.table("cosine")
        kept |= {
            pair: cosines.table(pair).number("total")
            for pair in PAIRS
            if cosines.table(pair).values.get("total") is not None
        }
        for kind in UPDATES:
            ratios = [number(value) for value in fields.list(kind)]
            if ratios and None not in ratios and all(len(ratios) == len(r[kind]) for r in found if kind in r):
                kept[kind] = ratios
        found.append(kept)
    return found


def updates(history: list[dict[str, Any]]) -> dict[str, Any]:
    """`updates` and `updates_kind` of a `Run`."""
    kind = next((kind for kind in UPDATES if any(kind in r for r in history)), "")
    return {"updates": tuple(tuple(r[kind]) for r in history if kind in r), "updates_kind": kind}


def curves(history: list[dict[str, Any]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Per name the points (epochs done, value), agreement in percent."""
    factor = {"held_out_agreement": 100}
    points = {
        name: tuple((r["epoch"] + 1, factor.get(name, 1) * r[name]) for r in history if name in r) for name in CURVES
    }
    return {name: found for name, found in points.items() if found}


def _environment(info: Fields, result: Fields) -> tuple[tuple[str, str], ...]:
    job, machine = info.table("job"), info.table("machine")
    threads = result.whole("threads", 0)
    rows = {
        "Started": info.text("started", "").replace("T", " ").replace("Z", " UTC"),
        "Device": result.text("device", "cpu")
        + (f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""),
        "Machine": ", ".join(f"{key} {value}" for key, value in machine.values.items()),
        "Versions": ", ".join(f"{key} {value}" for key, value in info.table("versions").values.items()),
        "Commit": info.text("commit", ""),
        "Seed": str(job.values.get("seed", "")),
        "Checkpoint": job.text("checkpoint", ""),
        "SHA-256 of the weights": job.text("weights_sha256", ""),
        "Test images": result.text("eval_data", ""),
    }
    return tuple((what, value) for what, value in rows.items() if value)


def _analyses(folder: Path) -> tuple[Analysis, ...]:
    if folder.is_symlink() or not folder.is_dir():
        return ()
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        name = check_name(path.name, folder).removesuffix(".json")
        bounded(path, JSON_LIMIT)
        raw, picture = path.read_bytes(), path.with_suffix(".png")
        png = None
        if picture.exists():
            bounded(picture, PICTURE_LIMIT)
            png = picture.read_bytes()
            if not png.startswith(SIGNATURE):
                raise BadFileError(f"{picture} is not a PNG picture.")
        data = from_json(raw, path)
        rows = list(_numbers(data))
        if len(rows) > ROWS:
            rows = [*rows[: ROWS - 1], ("more", f"{len(rows) - ROWS + 1} in the JSON")]
        found.append(Analysis(name, raw, data, tuple(rows), png))
    return tuple(found)


def _numbers(value: Any, name: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """What of a result can be read as a line: numbers, texts and short lists of them; epochs are counted from 1."""
    if isinstance(value, Mapping) and depth < 5:
        parts = [_numbers(item, f"{name} {_word(key, item)}".strip(), depth + 1) for key, item in value.items()]
        return [row for part in parts for row in part]
    if isinstance(value, list):
        plain = all(not isinstance(item, (list, Mapping)) for item in value)
        few = plain and 0 < len(value) <= 5 and any(item is not None for item in value)
        first = 1 if name.endswith("epochs") and all(type(item) is int for item in value) else 0
        return [(name, ", ".join(show(item + first if first else item) for item in value))] if few else []
    return [] if value is None or isinstance(value, Mapping) else [(name, show(value))]


def _word(key: str, item: Any) -> str:
    if key == "top":  # a group of the Hessian, the upper end of a histogram
        return "" if isinstance(item, Mapping) else "histogram to"
    return WORDS.get(key, key.replace("_", " "))


def show(value: Any) -> str:
    """A number with four significant digits, a text cut behind a word."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 1 << 53:
        return f"{value:,}"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:LONGEST].rpartition(' ')[0] or value[:LONGEST]} …"
    return str(number(value))
