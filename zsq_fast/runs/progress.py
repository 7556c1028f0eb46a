"""Progress on stderr: a bar with the remaining time on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsq_fast.runs.status import StatusFile

_LINE_SECONDS = 30.0


def clock(seconds: float) -> str:
    """Such as 1:02:03, or 2:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _postfix(values: dict[str, Any]) -> str:
    texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values())
    return "  ".join(map(" ".join, zip(values, texts, strict=True)))


class Progress:
    """`quiet` shows nothing at all; `interactive` overrides the test for a terminal. `status`, if set, is told everything too."""

    status: StatusFile | None = None

    def __init__(self, quiet: bool = False, interactive: bool | None = None):
        self.quiet = quiet
        self._interactive = sys.stderr.isatty() if interactive is None else interactive
        self._bar: Any = None
        self._task: Any = None
        self._total = self._done = self._first = 0
        self._title = ""
        self._began = self._shown = 0.0

    def start(self, total_steps: int, description: str, done: int = 0) -> None:
        """`done` steps were taken by an earlier process: they count as finished but not for the speed."""
        self.stop()
        self._total, self._done, self._first, self._title = total_steps, done, done, description
        self._began = self._shown = time.monotonic()
        if self.status is not None:
            self.status.begin(description, total_steps, done)
        if self._interactive and not self.quiet:
            self._start_bar()

    def _start_bar(self) -> None:
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:  # the lines below do without it
            return
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[postfix]}"),
        )
        self._bar = progress.Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, postfix="")
        self._bar.start()

    def advance(self, n: int = 1, **postfix: Any) -> None:
        self._done += n
        if self.status is not None:
            self.status.advance(self._done)
        if self._bar is not None:
            fields = {"postfix": _postfix(postfix)} if postfix else {}
            self._bar.update(self._task, advance=n, **fields)
        elif not self.quiet and time.monotonic() - self._shown >= _LINE_SECONDS:
            self._shown = time.monotonic()
            print(self._line(postfix), file=sys.stderr, flush=True)

    def _line(self, postfix: dict[str, Any]) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = clock((self._total - self._done) / rate) if rate > 0 else "?"
        share = f"{self._done}/{self._total}"
        return f"{self._title}: {share}, {left} left  {_postfix(postfix)}".rstrip()

    def doing(self, activity: str) -> None:
        """What holds the steps up, for those who look on."""
        if self.status is not None:
            self.status.doing(activity)

    def message(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
