"""The runs of a sweep in processes of their own, so many at a time, images that several of them need made once."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import zsq_fast
from zsq_fast.cli.sweep.plan import Run
from zsq_fast.methods.images import batch_files
from zsq_fast.runs import StopRequest
from zsq_fast.runs.directory import IMAGES
from zsq_fast.runs.storage import link, make_directory, writing

POLL = 0.1  # seconds
PATIENCE = 30.0  # seconds that a process gets to end after it was told to stop at once
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # found before there are threads to fork beside


class Worker:
    """A process that trains one run; what it prints goes to the run's log."""

    def __init__(self, run: Run, command: Sequence[str]):
        self.run = run
        with writing(run.log):
            make_directory(run.log.parent)
            # A link could lead anywhere.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(run.log, flags, 0o666), "ab") as log:
                self._begin = log.tell()
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C reaches this process alone, which tells the others
                    preexec_fn=_end_with_parent if _PRCTL else None,
                )

    def failure(self) -> str | None:
        """Of the ended process, in its own words; None if all went well."""
        code = self.process.returncode
        if not code:
            return None
        text = self.run.log.read_bytes()[self._begin :].decode(errors="replace")
        lines = [line.removeprefix("zsq-fast: ") for line in text.splitlines() if line.startswith("zsq-fast: ")]
        said = [line.removeprefix("error: ") for line in lines if not line.startswith("warning: ")]
        if code < 0:
            memory = ", perhaps for want of memory" if code == -9 else ""
            return f"the process was killed by signal {-code}{memory}."
        return said[-1] if said else f"exit code {code}; see {self.run.log}."


def _environment() -> dict[str, str]:
    """The processes import what this one does, whatever directory it was started in and whatever came before it on the path since."""
    first = Path(zsq_fast.__file__).parents[1]
    path = os.pathsep.join(os.path.abspath(entry) for entry in (str(first), *sys.path))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _end_with_parent() -> None:
    """In the new process: a stop request arrives if the sweep is killed, so that no run goes on unseen (PR_SET_PDEATHSIG)."""
    assert _PRCTL is not None
    _PRCTL(1, signal.SIGTERM)


def work(
    runs: Sequence[Run],
    todo: Sequence[Run],
    jobs: int,
    command: Callable[[Run], list[str]],
    began: Callable[[Run], Any],
    ended: Callable[[Run, str | None], Any],
) -> int | None:
    """Trains the runs of `todo`, at most `jobs` at a time; returns the signal that stopped it, after all have saved their state.

    Args:
        runs: of the whole sweep; the images of finished ones are used again.
        began, ended: called with each run, and with the reason if it failed. One that was stopped does not end.

    Raises:
        KeyboardInterrupt: a second signal arrived; the processes have been stopped at once.
    """
    pending, workers, told = list(todo), list[Worker](), False
    with StopRequest() as stop:
        try:
            while workers or (pending and not stop):
                while not stop and len(workers) < jobs and (run := _next(pending, workers, runs)) is not None:
                    pending.remove(run)
                    _share_images(run, runs)
                    workers.append(Worker(run, command(run)))
                    began(run)
                if stop and not told:
                    told = True
                    for worker in workers:
                        worker.process.terminate()
                for worker in [worker for worker in workers if worker.process.poll() is not None]:
                    workers.remove(worker)
                    failure = worker.failure()
                    if failure is None or not told:
                        ended(worker.run, failure)
                time.sleep(POLL)
        finally:
            _stop(workers)
    return stop.signal


def _stop(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


# ---- optimised images --------------------------------------------------------------------------------------------------


def image_set(run: Run) -> Any:
    """Equal for runs that take their images from the same set, of which each has the beginning; None for one that needs none."""
    images = run.point.recipe.images
    return (replace(images, count=1), run.seed) if images.enabled else None


def _next(pending: Sequence[Run], workers: Sequence[Worker], runs: Sequence[Run]) -> Run | None:
    """The first run whose images are there, or are not being made by another one."""
    being_made = [image_set(worker.run) for worker in workers if _lacks(worker.run, [worker.run])]
    return next((run for run in pending if image_set(run) not in being_made or not _lacks(run, runs)), None)


def _lacks(run: Run, runs: Sequence[Run]) -> bool:
    """Whether the run needs images of which these runs have not all."""
    return image_set(run) is not None and not set(batch_files(run.point.recipe.images)) <= {
        file.name for file in _files(run, runs)
    }


def _files(run: Run, runs: Sequence[Run]) -> list[Path]:
    """Finished batches of its set, wherever they lie."""
    own = image_set(run)
    folders = [other.path / IMAGES for other in runs if image_set(other) == own]
    return [file for folder in folders for file in folder.glob("*/batch-*.safetensors")]


def _share_images(run: Run, runs: Sequence[Run]) -> None:
    """Puts what other runs have made into the run's own directory, as links.

    Not as one directory for all: `analyze` and `report` take what lies in a run's directory for what it was trained on.
    """
    if image_set(run) is None:
        return
    wanted = set(batch_files(run.point.recipe.images))
    for file in _files(run, runs):
        target = run.path / IMAGES / file.parent.name / file.name
        if file.name in wanted and not target.exists():
            link(file, target)
