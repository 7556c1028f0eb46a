"""zsq-fast watch: a run in the terminal while another process trains it."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from zsq_fast.cli.arguments import Parser
from zsq_fast.errors import Interrupted, UsageError


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 86400:  # False for NaN too
        raise ArgumentTypeError(f"'{text}' is not a number of seconds from 0.1 to 86400")
    return value


def run(words: Sequence[str]) -> int:
    parser = Parser(
        "watch",
        "Follow a run in the terminal until it ends; exit code 0 if it is done, 5 if it failed, 130 if it was interrupted. "
        "It only reads.",
    )
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument("--interval", type=_seconds, default=2.0, metavar="SECONDS", help="between two looks (2)")
    parser.add_argument("--once", action="store_true", help="print how the run stands and end")
    arguments = parser.parse(words)
    try:
        from zsq_fast.live.watch import Screen, follow, show_once
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise UsageError("watch needs the package rich: pip install rich.") from None
    console, path = Screen(), Path(arguments.run)
    try:
        return show_once(path, console) if arguments.once else follow(path, console, arguments.interval)
    except KeyboardInterrupt:
        raise Interrupted("no longer watching; the run is not touched by that.") from None
