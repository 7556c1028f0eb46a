"""Errors a user can act on. Each carries the exit code that the command line returns for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZsqError(Exception):
    """One sentence that names the thing and the fix. Shown without a traceback unless `--debug`."""

    exit_code = 1


class UsageError(ZsqError, ValueError):
    """A wrong option, recipe, bit width or shape."""

    exit_code = 2


class UnsupportedModelError(ZsqError, ValueError):
    """A network that cannot be quantized this way: nothing to quantize, no usable batch norm, NaN weights."""

    exit_code = 3


class BadFileError(ZsqError, ValueError):
    """A missing, corrupted, pickled or otherwise unusable input file."""

    exit_code = 4


class TrainingError(ZsqError, RuntimeError):
    """The run went wrong by itself: loss or weights became NaN."""

    exit_code = 5


class MissingKernelsError(ZsqError, NotImplementedError):
    """The device has no kernels here; the message names the reason and the command that builds them."""

    exit_code = 6


class LimitError(ZsqError):
    """A forecast exceeds the limit it was to keep; everything worked."""

    exit_code = 7


class StorageError(ZsqError, OSError):
    """The output could not be written (no space, no permission, locked by another run)."""

    exit_code = 74


class Interrupted(ZsqError):
    """Stopped by a signal after saving; the message says how to go on."""

    def __init__(self, message: str, signal_number: int = 2):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known name, or the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
