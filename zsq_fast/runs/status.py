"""status.json: how far the process that trains has come, and how it ended, for those who look on (`zsq-fast watch`)."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zsq_fast.errors import Interrupted
from zsq_fast.runs.progress import Progress
from zsq_fast.runs.storage import TMP, plain

STATUS = "status.json"
RUNNING, DONE, INTERRUPTED, FAILED = "running", "done", "interrupted", "failed"
PERIOD = 2.0  # seconds between two writings, at least
_MARKS = 30  # the speed is that of as many periods


class StatusFile:
    """A small file that is replaced every other second. No run depends on it: what keeps it from being written is ignored, it is
    never forced onto the disk, and no manifest lists it."""

    def __init__(self, path: Path):
        self.path = path
        self._values: dict[str, Any] = {"state": RUNNING, "stage": "starting"}
        self._began = self._written = 0.0
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MARKS)
        self._write()

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A stage of `steps` steps, `done` of which an earlier process took."""
        self._values |= {"stage": stage, "activity": "", "first": done, "step": done, "steps": steps}
        self._began = time.monotonic()
        self._marks.clear()
        self._write()

    def advance(self, step: int) -> None:
        """Once per step; writes when it is time to."""
        self._values["step"] = step
        if self._values["activity"] or time.monotonic() - self._written >= PERIOD:
            self._values["activity"] = ""
            self._write()

    def doing(self, activity: str) -> None:
        """What holds the steps up, until the next one."""
        self._values["activity"] = activity
        self._write()

    def end(self, state: str, message: str = "") -> None:
        self._values |= {"state": state, "message": message, "activity": ""}
        self._write()

    def _write(self) -> None:
        now = self._written = time.monotonic()
        if "step" in self._values:
            self._values["seconds"] = now - self._began
            self._marks.append((now, self._values["step"]))
            (then, before), (_, step) = self._marks[0], self._marks[-1]
            self._values["rate"] = (step - before) / max(now - then, 1e-9) if step > before else 0.0
        temporary = self.path.with_name(f"{TMP}{self.path.name}-{os.getpid()}")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(plain(self._values)))
            os.replace(temporary, self.path)


@contextlib.contextmanager
def reporting(directory: Path, progress: Progress) -> Iterator[None]:
    """Within: status.json of the run directory follows `progress`; it says at last how the body ended. Inside another one it does
    nothing."""
    if progress.status is not None:
        yield
        return
    status = progress.status = StatusFile(directory / STATUS)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        status.end(INTERRUPTED if stopped else FAILED, " ".join(str(error).split())[:500])
        raise
    else:
        status.end(DONE)
    finally:
        progress.status = None
