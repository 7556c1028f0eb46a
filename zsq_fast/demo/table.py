"""The result table: on the terminal, as Markdown, and the plain numbers behind both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HEADINGS = ("method", "bits", "test accuracy %", "minutes", "MB", "x smaller")
TITLES = {
    "float": "float",
    "rtn": "round to nearest",
    "gdfq": "GDFQ",
    "kl_only": "KL only",
    "ait": "AIT",
}


@dataclass(frozen=True)
class Row:
    """One network: `bits` of weights and activations (None: float), hits of `count` test images, parameter bytes."""

    method: str
    bits: int | None
    correct: int
    count: int
    seconds: float
    size_bytes: int

    @property
    def accuracy(self) -> float:
        return 100.0 * self.correct / self.count

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "accuracy": self.accuracy, "minutes": self.seconds / 60, "mb": self.size_bytes / 1e6}


def _cells(row: Row, full: int) -> tuple[str, ...]:
    return (
        TITLES[row.method],
        "32" if row.bits is None else f"{row.bits}",
        f"{row.accuracy:.1f}",
        f"{row.seconds / 60:.2f}",
        f"{row.size_bytes / 1e6:.3f}",
        f"{full / row.size_bytes:.1f}",
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table of all rows, the first being the float network."""
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *(_cells(row, rows[0].size_bytes) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def print_table(rows: Sequence[Row], title: str) -> None:
    """To stdout; with rich where it is installed, as Markdown elsewhere."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title}\n\n{markdown(rows)}", end="")
        return
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        style = "bold" if row.method in ("float", "ait") else None
        table.add_row(*_cells(row, rows[0].size_bytes), style=style, end_section=row.bits != following.bits)
    Console().print(table)
