"""A view of a run as rich's renderables, and as one line. No text of a file reaches the terminal unchecked."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zsq_fast.live.reading import ENDED, Series, View
from zsq_fast.runs.progress import clock
from zsq_fast.runs.status import DONE, FAILED, INTERRUPTED, RUNNING

BLOCKS = "▁▂▃▄▅▆▇█"
EPOCHS = 24  # of a sparkline
LONGEST = 200  # characters of a text
COLOURS = {DONE: "green", FAILED: "red", INTERRUPTED: "yellow"}


def clean(text: str, encoding: str, longest: int | None = LONGEST) -> str:
    """On one line and without what a terminal would obey or could not write; spaces are joined and the end is cut unless `longest`
    is None, as a command needs it that is to be pasted."""
    if longest is not None:
        text = " ".join(text[: 4 * longest].split())[:longest]
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown.encode(encoding, "replace").decode(encoding)


def sparkline(values: tuple[float, ...]) -> str:
    """The last values between their lowest and highest, a block each."""
    shown = values[-EPOCHS:]
    low, high = min(shown), max(shown)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in shown)


def _latest(series: Series, spread: bool = True) -> str:
    last, *ends = (
        f"{series.percent * value:.2f} %" if series.percent else f"{value:.4g}"
        for value in (series.values[-1], *(series.spread or ()))
    )
    return f"{last} ({' to '.join(ends)})" if ends and spread else last


def verdict(view: View) -> str:
    """How the run ended, or that it may have; empty while all is well."""
    go_on = f"go on with: {view.resume}" if view.resume else "nothing was saved to go on from"
    if view.state == DONE:
        top1 = ", ".join(f"{name} {value:.2f} %" for name, value in view.top1.items())
        return f"done{f': top-1 {top1}' if top1 else ''}"
    if view.state == INTERRUPTED:
        return f"interrupted at step {view.step}; {go_on}"
    if view.state == FAILED:
        message = " ".join(view.message.split())[:LONGEST]
        return f"failed{f': {message}' if message else ''} ({go_on})"
    if view.missed:
        return f"nothing was written for {view.silent:.0f} s: a step may take long, or the process was killed; then {go_on}"
    if view.state != RUNNING:
        return f"no status is written; the last record is {clock(view.silent)} old; if the run has stopped, {go_on}"
    return ""


def _time(view: View) -> str:
    parts = []
    if view.seconds is not None:
        passed = view.seconds + (0.0 if view.state in ENDED or view.missed else view.silent)
        parts.append(f"{clock(passed)} passed{f' since step {view.first}' if view.first else ''}")
    if view.state == RUNNING and view.left is not None:
        parts.append(f"{clock(view.left)} left at this rate")
    if view.rate > 0:
        parts.append(f"{view.rate:.3g} steps/s")
    return ", ".join(parts)


def _stage(view: View) -> str:
    stage = f"{view.stage}{f' ({view.activity})' if view.activity else ''}"
    if view.state in ENDED:
        return view.state if view.state == DONE or not stage else f"{view.state} in {stage}"
    return stage or "not known"


def screen(view: View, path: str, console: Console) -> RenderableType:
    """All of it, a few lines."""
    encoding = console.encoding
    title = "  ".join(text for text in (path, *view.title) if text)
    head = Table.grid(padding=(0, 2))
    head.add_column(no_wrap=True)
    head.add_column(overflow="fold")
    rows = {"stage": _stage(view), "step": f"{view.step:,} of {view.steps:,} ({100 * view.step / view.steps:.1f} %)"}
    rows |= {"epochs": f"{view.epoch} of {view.epochs} recorded", "time": _time(view)}
    rows["lr"] = "" if view.lr is None else f"{view.lr:.4g}"
    for name, text in rows.items():
        if text:
            head.add_row(Text(name, "bold"), Text(clean(text, encoding)))
    head.add_row("", ProgressBar(view.steps, view.step, width=min(50, max(10, console.width - 10))))
    parts: list[RenderableType] = [Text(clean(title, encoding), "bold", overflow="fold"), head]
    if view.series:
        curves = Table.grid(padding=(0, 2))
        for _ in range(3):
            curves.add_column(overflow="fold")
        for series in view.series:
            line = "" if console.options.ascii_only else sparkline(series.values)
            curves.add_row(Text(series.title), Text(line, "cyan"), Text(_latest(series)))
        parts.append(curves)
    if said := verdict(view):
        parts.append(Text(clean(said, encoding, None), COLOURS.get(view.state, "yellow"), overflow="fold"))
    return Group(*parts)


def line(view: View, encoding: str) -> str:
    """The same on one line, for a log."""
    parts = [_stage(view), f"step {view.step}/{view.steps}", _time(view)]
    parts += [f"{series.title} {_latest(series, spread=False)}" for series in view.series]
    shown = [clean(part, encoding) for part in parts if part]
    if view.state not in ENDED and (said := verdict(view)):
        shown.append(clean(said, encoding, None))
    return "; ".join(shown)
