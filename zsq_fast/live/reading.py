"""What a run directory tells of a run that trains, or did. Reads alone: no lock is taken, nothing is written, no network is built."""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zsq_fast.methods import Recipe
from zsq_fast.report.reading import JSON_LIMIT, PAIRS, RESULT, STUDENT, Fields, bounded, number, read_recipe
from zsq_fast.runs import RunDir
from zsq_fast.runs.directory import INFO, MANIFEST, METRICS, RECIPE
from zsq_fast.runs.status import DONE, FAILED, INTERRUPTED, PERIOD, RUNNING, STATUS
from zsq_fast.runs.storage import from_json

UNKNOWN = "unknown"  # no status: an older version's run, or one of several in lockstep
ENDED = (DONE, INTERRUPTED, FAILED)
PATIENCE = 30.0, 5  # seconds and steps without a sign of life before it is missed
STATUS_LIMIT = 1 << 16  # bytes
PER_WEIGHT = ("update_ratio", "net_update_ratio", "log2_kappa")


@dataclass(frozen=True)
class Series:
    """One figure over the epochs that have it; `percent`: the factor that makes it percents, 0 if it is none; `spread`: lowest and
    highest over the weights, of the last epoch."""

    title: str
    values: tuple[float, ...]
    percent: float = 0.0
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class View:
    """A run at one moment. Texts are as the files have them: not to be trusted by a terminal.

    Attributes:
        title: model, recipe and bits.
        state: RUNNING, DONE, INTERRUPTED, FAILED or UNKNOWN.
        message: why it failed.
        stage, activity: what the process does, and what holds its steps up.
        step, steps, first: of the stage; `first` were taken by an earlier process.
        seconds: since this process began the stage, as it last wrote; None where no status tells.
        rate: steps per second of late (runs/status.py); 0: not known.
        silent: seconds since the last writing.
        missed: whether that is longer than a process that lives would be silent.
        epoch, epochs: those that are complete, of all.
        lr: of the student in the last complete epoch.
        top1: the result's accuracies in percent.
        resume: how to go on with the run; empty where there is nothing to go on from.
    """

    title: tuple[str, str, str]
    state: str
    message: str
    stage: str
    activity: str
    step: int
    steps: int
    first: int
    seconds: float | None
    rate: float
    silent: float
    missed: bool
    epoch: int
    epochs: int
    lr: float | None
    series: tuple[Series, ...]
    top1: Mapping[str, float]
    resume: str

    @property
    def left(self) -> float | None:
        """Seconds at this rate."""
        return (self.steps - self.step) / self.rate if self.rate > 1e-6 else None


class Reader:
    """Looks at one run again and again; metrics are parsed anew only when their file has changed."""

    def __init__(self, path: Path):
        self.path = path
        self._metrics: tuple[tuple[int, int], list[dict[str, Any]]] = (0, 0), []

    def look(self) -> View:
        """BadFileError: no run, one of another version, or damaged."""
        path = self.path
        for name in (MANIFEST, RECIPE, INFO, RESULT):
            if os.path.lexists(path / name):
                bounded(path / name, JSON_LIMIT)
        run = RunDir.open(path, read_only=True)
        recipe, info = read_recipe(path / RECIPE, run.recipe), Fields(path / INFO, run.info)
        history, status = self._history(run), _status(path / STATUS)
        job, finished = info.table("job"), run.holds(RESULT)
        kept = history[-1] if history else {}
        quant, schedule = recipe.quant, recipe.schedule
        bits = f"W{quant.nominal_weight_bits:g}A{quant.act_bits}"
        view = View(
            title=(job.text("model", ""), recipe.name, bits),
            state=DONE if finished else UNKNOWN,
            message="",
            stage="",
            activity="",
            step=min(int(kept.get("step", 0)), schedule.steps),
            steps=schedule.steps,
            first=0,
            seconds=None,
            rate=0.0,
            silent=max(0.0, time.time() - _last_written(path)),
            missed=False,
            epoch=int(kept.get("epoch", -1)) + 1,
            epochs=schedule.epochs,
            lr=recipe.student.lr * kept["lr_factor"] if recipe.student.enabled and "lr_factor" in kept else None,
            series=series(history),
            top1=Fields(path / RESULT, run.load_json(RESULT)).table("top1").numbers() if finished else {},
            resume=_resume(path, job) if run.has_checkpoint else "",
        )
        if status is not None:
            return _with_status(view, status, recipe)
        return replace(view, state=DONE) if run.holds(STUDENT) else view

    def _history(self, run: RunDir) -> list[dict[str, Any]]:
        path = run.path / METRICS
        try:
            found = path.stat()
        except FileNotFoundError:
            return []
        stamp = found.st_size, found.st_mtime_ns
        if stamp != self._metrics[0]:
            bounded(path, JSON_LIMIT)
            records = [Fields(path, record).values for record in run.read_metrics()]
            self._metrics = stamp, [_numbers(path, record) for record in records]
        return self._metrics[1]


def _numbers(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record can be shown: finite numbers by its keys, those per weight as lists, and cosines by their pairs."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key in PER_WEIGHT and isinstance(value, list):
            numbers = [number(item) for item in value]
            if numbers and None not in numbers:
                found[key] = numbers
        elif (plain := number(value)) is not None:
            found[key] = plain
    cosines = Fields(path, record).table("cosine")
    for pair in PAIRS:
        if (total := number(cosines.table(pair).values.get("total"))) is not None:
            found[pair] = total
    return found


def _mean(values: Any) -> float:
    return statistics.fmean(values) if isinstance(values, list) else values


# key of a record, title, factor that makes percents of it (0: it is no share)
_SERIES = (
    ("student_loss", "student loss", 0),
    ("generator_ce", "generator, cross entropy", 0),
    ("generator_bns", "generator, batch norm", 0),
    ("agreement", "agreement, training", 100),
    ("held_out_agreement", "agreement, held out", 100),
    ("held_out_kl", "KL, held out", 0),
    ("top1", "top-1 on test images", 1),
    ("update_ratio", "codes changed, summed", 100),
    ("net_update_ratio", "codes changed, net", 100),
    ("log2_kappa", "log2 of amplification", 0),
    *((pair, f"cosine {pair.upper()}", 0) for pair in PAIRS),
)


def series(history: Sequence[Mapping[str, Any]]) -> tuple[Series, ...]:
    """Of everything that an epoch has, in this order; what is known per weight as its mean."""
    found = []
    for key, title, percent in _SERIES:
        values = [record[key] for record in history if key in record]
        if values:
            last = values[-1]
            spread = (min(last), max(last)) if isinstance(last, list) and len(last) > 1 else None
            found.append(Series(title, tuple(map(_mean, values)), percent, spread))
    return tuple(found)


def _status(path: Path) -> Fields | None:
    if not path.exists():
        return None
    bounded(path, STATUS_LIMIT)
    try:
        return Fields(path, from_json(path.read_bytes(), path))
    except OSError:  # replaced or removed this very moment
        return None


def _with_status(view: View, status: Fields, recipe: Recipe) -> View:
    state = status.text("state", UNKNOWN)
    if state not in (RUNNING, *ENDED) or view.state == DONE:
        state = view.state
    stage, known = status.text("stage", ""), "step" in status.values
    view = replace(
        view, state=state, message=status.text("message", ""), stage=stage, activity=status.text("activity", "")
    )
    if known:
        steps = max(1, status.whole("steps"))
        view = replace(
            view, step=min(max(0, status.whole("step")), steps), steps=steps, first=max(0, status.whole("first", 0))
        )
        view = replace(view, seconds=max(0.0, status.number("seconds")), rate=max(0.0, status.number("rate", 0.0)))
    if stage == recipe.name and view.steps == recipe.schedule.steps:
        view = replace(view, stage=_phase(view.step, recipe))
    patience = max(PATIENCE[0], PATIENCE[1] / view.rate if view.rate else 0.0)
    return replace(view, missed=state == RUNNING and view.silent > patience + PERIOD)


def _phase(step: int, recipe: Recipe) -> str:
    schedule = recipe.schedule
    epoch = min(step // schedule.iterations, schedule.epochs - 1)
    phases = ((schedule.calibration_epochs, "calibration"), (schedule.warmup_epochs, "warm-up"))
    phase = next((name for end, name in phases if epoch < end), "training")
    return f"{phase}, epoch {epoch + 1} of {schedule.epochs}"


def _last_written(path: Path) -> float:
    """By the clock of the file system; the manifest is always there."""
    times = []
    for name in (STATUS, METRICS, MANIFEST):
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _resume(path: Path, job: Fields) -> str:
    if not job.values:
        return f"zsq_fast.quantize(..., run_dir={str(path)!r}, resume=True)"
    return (
        f"zsq-fast resume {shlex.quote(str(path))}{' --allow-import' if job.values.get('allow_import') is True else ''}"
    )
