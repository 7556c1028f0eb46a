"""What the papers say of a run's recipe: their accuracies at its bits, and the numbers in which the run departs from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zsq_fast import papers
from zsq_fast.methods import available_recipes, load_recipe
from zsq_fast.methods.recipe import Recipe, parse_override
from zsq_fast.report.reading import Run

CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100, "ImageNet": 1000}


@dataclass(frozen=True)
class Published:
    """A row of a paper. `same_network`: the run quantized that very network, else one of as many inputs and classes; `same_bits`."""

    row: papers.Row
    same_network: bool
    same_bits: bool

    @property
    def drop(self) -> float:
        return self.row.float_top1 - self.row.top1


@dataclass(frozen=True)
class Difference:
    """One option of a recipe as published and as the run had it."""

    option: str
    published: str
    here: str


def published_rows(run: Run) -> list[Published]:
    """Rows of the run's recipe for its kind of input at its bits or, where there are none, at others; those of its own network come
    first, equal numbers once."""
    values, found = run.recipe.to_dict(), dict[tuple[Any, ...], Published]()
    bits = (run.recipe.quant.nominal_weight_bits, run.recipe.quant.act_bits)
    for paper in papers.papers():
        for row in papers.rows(paper).values():
            fits = (
                row.recipe == run.recipe.name
                and row.input_size == run.input_size
                and CLASSES[row.dataset] == run.classes
                and all(_holds(values, text) for text in row.overrides)
            )
            if fits:
                key = (row.model, row.top1, row.float_top1)
                found.setdefault(key, Published(row, row.model == run.model, (row.weight_bits, row.act_bits) == bits))
    rows = sorted(found.values(), key=lambda p: not p.same_network)
    return [p for p in rows if p.same_bits] or rows


def _holds(values: Mapping[str, Any], override: str) -> bool:
    ((section, options),) = parse_override(override).items()
    return all(values.get(section, {}).get(name) == value for name, value in options.items())


def closest(rows: list[Published]) -> Published | None:
    """The row that stands for the paper on the first screen: at the same bits, and of the same network or the only one."""
    rows = [p for p in rows if p.same_bits]
    return rows[0] if rows and (rows[0].same_network or len(rows) == 1) else None


def differences(run: Run, row: papers.Row | None) -> list[Difference] | None:
    """Options whose value differs from the recipe's published schedule and numbers; None for a recipe of the user's own."""
    if run.recipe.name not in available_recipes():
        return None
    quant = run.recipe.quant
    mixed = quant.nominal_weight_bits if quant.average_weight_bits else quant.weight_bits
    published = load_recipe(
        run.recipe.name,
        input_size=run.input_size or (1, 1, 1),
        overrides=row.overrides if row else (),
        act_bits=quant.act_bits,
        weight_bits=mixed,  # type: ignore[arg-type]  # of mixed widths an average
    )
    return compare(published, run.recipe)


def compare(published: Recipe, here: Recipe) -> list[Difference]:
    before, after = flat(published.to_dict()), flat(here.to_dict())
    return [
        Difference(name, before[name], after[name]) for name in before if before[name] != after[name] and "." in name
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """ "section.option" -> its value as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: _text(value)}
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
