"""The papers' published tables as data: one TOML file per paper, one row per number, `PAPER/TABLE/METHOD-NETWORK-wXaY`.

A file has a `title` and tables. A table has `title`, `source`, `float` (top-1 of the float networks) and methods; a method has a
`recipe`, `recipes` (another one for some networks), its published top-1 percents as `wXaY = { network = top1 }`, and `set`: overrides of
the recipe, under "all", a network or `network-wXaY`, applied in this order. The networks stand in networks.toml.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from zsq_fast.errors import UsageError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BITS = re.compile(r"w([2-8])a([2-8])")


@dataclass(frozen=True)
class Row:
    """One published number.

    Attributes:
        id: `PAPER/TABLE/METHOD-NETWORK-wXaY`.
        title, source: of its paper and table, and where the number was read.
        recipe, overrides: as `load_recipe` takes them.
        model: as `load_model` takes it. dataset: of the accuracies. input_size: `(C, H, W)`.
        top1, float_top1: published percents of the quantized and the float network.
    """

    id: str
    title: str
    source: str
    recipe: str
    overrides: tuple[str, ...]
    model: str
    dataset: str
    input_size: tuple[int, ...]
    weight_bits: int
    act_bits: int
    top1: float
    float_top1: float


@cache
def _files() -> dict[str, dict[str, Any]]:
    found = resources.files(__name__).iterdir()
    return {p.name[:-5]: tomllib.loads(p.read_text(encoding="utf-8")) for p in found if p.name.endswith(".toml")}


def papers() -> dict[str, str]:
    """Name and title of every paper."""
    return {name: table["title"] for name, table in sorted(_files().items()) if name != "networks"}


def rows(paper: str) -> dict[str, Row]:
    """The rows of a paper, or of one of its tables (`PAPER/TABLE`), by their id.

    Raises:
        UsageError: there is no such paper or table (nearest name offered).
    """
    name, _, wanted = paper.partition("/")
    if name not in papers():
        raise UsageError(f"there is no paper '{name}'.{nearest(name, papers())}")
    tables = {key: table for key, table in _files()[name].items() if isinstance(table, dict)}
    if wanted and wanted not in tables:
        raise UsageError(f"the paper '{name}' has no table '{wanted}'.{nearest(wanted, tables)}")
    return {
        row.id: row for key, table in tables.items() if wanted in ("", key) for row in _table(f"{name}/{key}", table)
    }


def _table(name: str, table: dict[str, Any]) -> Iterator[Row]:
    title = f"{_files()[name.partition('/')[0]]['title']}, {table['title']}"
    for method, entry in table.items():
        for bits in filter(_BITS.fullmatch, entry) if isinstance(entry, dict) else ():
            weight_bits, act_bits = map(int, bits[1:].split("a"))
            for network, top1 in entry[bits].items():
                chosen, where = entry.get("set", {}), _files()["networks"][network]
                keys = ("all", network, f"{network}-{bits}")
                yield Row(
                    f"{name}/{method}-{network}-{bits}",
                    title,
                    table["source"],
                    entry.get("recipes", {}).get(network, entry["recipe"]),
                    tuple(text for key in keys for text in chosen.get(key, ())),
                    weight_bits=weight_bits,
                    act_bits=act_bits,
                    top1=top1,
                    float_top1=table["float"][network],
                    model=where["model"],
                    dataset=where["dataset"],
                    input_size=tuple(where["input_size"]),
                )


def resolve(name: str) -> Row:
    """The row of this id.

    Raises:
        UsageError: no such paper, table or row (nearest name offered).
    """
    paper, _, rest = name.partition("/")
    table, _, row = rest.partition("/")
    if not row and paper in papers():
        raise UsageError(f"'{name}' is no row; write PAPER/TABLE/ROW, and see `zsq-fast reproduce --list {paper}`.")
    known = rows(f"{paper}/{table}")
    if name not in known:
        near = nearest(row, (key.rpartition("/")[2] for key in known))
        near = near if near.startswith(" Did") else f" See `zsq-fast reproduce --list {paper}/{table}`."
        raise UsageError(f"the table '{paper}/{table}' has no row '{row}'.{near}")
    return known[name]
