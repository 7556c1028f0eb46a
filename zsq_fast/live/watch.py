"""Following a run in the terminal until it ends."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from zsq_fast.errors import BadFileError, Interrupted, TrainingError
from zsq_fast.live.reading import ENDED, Reader, View
from zsq_fast.live.screen import clean, line, screen, verdict
from zsq_fast.runs.directory import MANIFEST
from zsq_fast.runs.status import DONE, FAILED, INTERRUPTED

CODES = {DONE: 0, FAILED: TrainingError.exit_code, INTERRUPTED: Interrupted("").exit_code}
LINE_SECONDS = 30.0  # without a terminal, while nothing else has changed


class Screen(Console):
    """What is printed, on stdout: as it is, without markup."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """As of `print`, for `| head`; rich would end the process."""
        raise BrokenPipeError


def show_once(path: Path, console: Console) -> int:
    """Prints the run as it stands; 0."""
    console.print(screen(Reader(path).look(), str(path), console))
    return 0


def follow(path: Path, console: Console, interval: float) -> int:
    """Shows the run every so many seconds until it has ended; returns 0 if it is done, 5 if it failed, 130 if it was interrupted.

    On a terminal the screen is drawn over; elsewhere a line is printed per epoch, stage and half minute.

    Raises:
        BadFileError: no run, one of another version, or damaged.
    """
    reader = Reader(path)
    view = reader.look()
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            with Live(screen(view, str(path), console), console=console, auto_refresh=False) as live:
                while view.state not in ENDED:
                    time.sleep(interval)
                    view = reader.look()
                    live.update(screen(view, str(path), console), refresh=True)
        else:
            view = _print_lines(reader, view, console, interval)
    except BadFileError:
        if os.path.lexists(path / MANIFEST):
            raise
        _say(clean(f"{path} is gone: the run ended before anything was saved", console.encoding, None), console)
        return TrainingError.exit_code
    return CODES[view.state]


def _print_lines(reader: Reader, view: View, console: Console, interval: float) -> View:
    shown, printed = None, 0.0
    while True:
        now, news = time.monotonic(), (view.state, view.stage, view.activity, view.epoch, view.missed)
        if news != shown or now - printed >= LINE_SECONDS:
            shown, printed = news, now
            _say(line(view, console.encoding), console)
        if view.state in ENDED:
            _say(clean(verdict(view), console.encoding, None), console)
            return view
        time.sleep(interval)
        view = reader.look()


def _say(text: str, console: Console) -> None:
    console.out(text, highlight=False)
    console.file.flush()
