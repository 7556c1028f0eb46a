"""What a sweep is: its points, the command line of each of their runs, and the file that keeps it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zsq_fast.cli.job import Job
from zsq_fast.cli.result import RESULT
from zsq_fast.cli.sweep.options import PLAN, Option, option
from zsq_fast.errors import BadFileError, UsageError
from zsq_fast.methods import Recipe, load_recipe
from zsq_fast.runs import RunDir
from zsq_fast.runs.directory import MANIFEST
from zsq_fast.runs.storage import from_json

LONGEST = 120  # characters of a point's name
LISTS = {"overrides": str, "seeds": int}  # of a plan; seeds name directories


@dataclass(frozen=True)
class Point:
    """A combination of values.

    Attributes:
        name: of its directory; it follows from the values alone.
        overrides: texts "section.option=value" of what it changes.
        recipe: resolved. values: of every option that the sweep varies, in this recipe.
        own: whether all of them are what the recipe has anyway.
    """

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe
    values: Mapping[str, Any]
    own: bool


@dataclass(frozen=True)
class Run:
    """One seed of a point; `path` is its run directory."""

    point: Point
    seed: int
    path: Path

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def label(self) -> str:
        return f"{self.point.name}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Its result.json; None while it is not finished, or cannot be read."""
        try:
            run_dir = RunDir.open(self.path, read_only=True)
            return run_dir.load_json(RESULT) if run_dir.holds(RESULT) else None
        except BadFileError:
            return None


@dataclass(frozen=True)
class Plan:
    """Everything the results of a sweep follow from, apart from the programme.

    Attributes:
        job: of every run; device, threads and what the network tells are settled, the seed is not used.
        recipe, weight_bits, act_bits, schedule, overrides: as `zsq_fast.methods.load_recipe` takes them.
        vary: what `--vary` said. one_at_a_time: every option alone, in place of all combinations.
    """

    job: Job
    recipe: str
    weight_bits: int | None
    act_bits: int | None
    schedule: str
    overrides: tuple[str, ...]
    vary: tuple[Option, ...]
    one_at_a_time: bool
    seeds: tuple[int, ...]

    def resolve(self, overrides: tuple[str, ...] = ()) -> Recipe:
        return load_recipe(
            self.recipe,
            input_size=self.job.input_size or (),
            schedule=self.schedule,
            overrides=(*self.overrides, *overrides),
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
        )

    def points(self) -> list[Point]:
        """In the order of `--vary`, the last option changing first. UsageError: a value or option is wrong, or given twice."""
        keys = [key for option in self.vary for key in option.keys]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UsageError(f"{twice} is in more than one --vary; give it once.")
        own, points = self.resolve(), dict[Recipe, Point]()
        for changes in self._combinations():
            overrides = tuple(f"{key}={text}" for key, text in changes.items())
            recipe = self.resolve(overrides)
            values = {key: value_of(recipe, key) for key in keys}
            shared = self.one_at_a_time and recipe == own  # a point of every option that lists its own value
            name = "own" if shared else ",".join(f"{key}={_clean(values[key])}" for key in changes)
            if recipe in points and not shared:
                raise UsageError(f"--vary gives the point {name} twice; give each value once.")
            points.setdefault(recipe, Point(_shorten(name), overrides, recipe, values, recipe == own))
        return list(points.values())

    def _combinations(self) -> Iterator[dict[str, str]]:
        sets = [[dict(zip(option.keys, texts, strict=True)) for texts in option.values] for option in self.vary]
        if self.one_at_a_time:
            yield from itertools.chain(*sets)
        else:
            for parts in itertools.product(*sets):
                yield {key: text for part in parts for key, text in part.items()}

    def runs(self, out: Path) -> list[Run]:
        return [Run(point, seed, out / point.name / f"seed-{seed}") for point in self.points() for seed in self.seeds]

    def command(self, run: Run, *, allow_import: bool, images: str | None = None) -> list[str]:
        """The words that begin or continue a run in a process of its own."""
        words = [sys.executable, "-m", "zsq_fast.cli"]
        consent = ["--allow-import"] if allow_import else []
        if (run.path / MANIFEST).is_file():
            return [*words, "resume", str(run.path), *consent]
        job = self.job
        given: dict[str, Any] = {
            "recipe": self.recipe,
            "weight-bits": self.weight_bits,
            "act-bits": self.act_bits,
            "schedule": self.schedule,
            "seed": run.seed,
            "out": run.path,
            "checkpoint": job.checkpoint,
            "num-classes": job.num_classes,
            "input-size": _joined(job.input_size),
            "mean": _joined(job.mean),
            "std": _joined(job.std),
            "device": job.device,
            "threads": job.threads,
            "eval-data": job.eval_data,
            "eval-limit": job.eval_limit,
            "images": images if run.point.recipe.images.enabled else None,
        }
        # With "=": a mean may begin with a minus.
        words += ["quantize", job.model, *(f"--{name}={value}" for name, value in given.items() if value is not None)]
        if job.channels_last is not None:
            words.append("--channels-last" if job.channels_last else "--no-channels-last")
        words += ["--force"] * job.force
        return [*words, *(f"--set={text}" for text in (*self.overrides, *run.point.overrides)), *consent]

    def to_dict(self) -> dict[str, Any]:
        """With the resolved recipe, so that another version of it is noticed."""
        job = {**asdict(self.job), "allow_import": False, "sha256": None, "seed": 0}
        own = {**asdict(replace(self, job=Job(""))), "vary": [o.text for o in self.vary], "job": job}
        result: dict[str, Any] = json.loads(json.dumps({**own, "resolved": self.resolve().to_dict()}))
        return result

    @classmethod
    def load(cls, out: Path, *, allow_import: bool = False) -> Plan:
        """BadFileError: there is none in `out`, or it is damaged."""
        path = out / PLAN
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadFileError(f"{path} cannot be read ({error.strerror}).") from error
        values = from_json(data, path)
        try:
            resolved, job = values.pop("resolved"), Job.from_info(values, path, allow_import=allow_import)
            lists = {name: tuple(_typed(kind, v) for v in values[name]) for name, kind in LISTS.items()}
            texts = {name: _typed(str, values[name]) for name in ("recipe", "schedule")}
            vary = tuple(option(text) for text in values["vary"])
            plan = cls(**{**values, **lists, **texts, "job": job, "vary": vary})
        except Exception as error:
            raise BadFileError(f"{path} is damaged, or of another version of zsq_fast.") from error
        if plan.resolve() != Recipe.from_dict(resolved):
            raise UsageError(f"the recipe '{plan.recipe}' has changed since {out} was begun; choose another --out.")
        return plan

    def check_continues(self, begun: Plan, out: Path) -> None:
        """UsageError unless this is the plan that `out` was begun with, or the same with more values or seeds."""
        old, new = begun.to_dict(), self.to_dict()
        for plan in (old, new):
            plan |= plan.pop("job")
        other = [name for name in old if old[name] != new[name] and name not in ("vary", "seeds")]
        points = {point.name for point in self.points()}
        gone = [point.name for point in begun.points() if point.name not in points]
        gone += [f"seed {seed}" for seed in begun.seeds if seed not in self.seeds]
        if other:
            what = {"resolved": "recipe", "weights_sha256": "model's weights"}.get(other[0], other[0])
            raise UsageError(f"{out} was begun with another value of '{what}'; choose another --out or remove it.")
        if gone:
            raise UsageError(
                f"{out} was begun with {gone[0]}, which is missing now: add to a sweep, or choose another --out."
            )


def _typed(kind: type, value: Any) -> Any:
    """TypeError unless it is of this very kind (a bool is no int), and not negative."""
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def value_of(recipe: Recipe, key: str) -> Any:
    """Of the option "section.name"."""
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _clean(value: Any) -> str:
    """A value in the name of a directory; where that loses something, with a sum that does not."""
    text = value if isinstance(value, str) else json.dumps(value)
    clean = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    return clean if clean == text else f"{clean}-{_sum(text)}"


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{_sum(name)}"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _joined(numbers: tuple[float, ...] | None) -> str | None:
    return None if numbers is None else ",".join(map(repr, numbers))
