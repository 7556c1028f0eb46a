"""The run directory: everything one run needs to be understood, resumed and verified."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import torch

from zsq_fast.errors import BadFileError, StorageError, UsageError
from zsq_fast.runs import checkpoint, storage
from zsq_fast.runs.metrics import MetricsFile
from zsq_fast.runs.status import STATUS
from zsq_fast.runs.tensors import entry, pack, read_verified, unpack

logger = logging.getLogger(__name__)

RECIPE, INFO, MANIFEST, METRICS, CHECKPOINTS, LOCK, IMAGES, TENSORBOARD = (
    "recipe.json", "run.json", "MANIFEST.json", "metrics.jsonl", "checkpoints", ".lock", "images", "tensorboard",
)  # fmt: skip
_KEEP = 2


class RunDir:
    """One writer at a time. Built by `create` or `open`; use as a context manager or call `close`.

    MANIFEST.json holds the SHA-256 of every file but metrics, checkpoints and what is for onlookers
    (status.json, tensorboard/, analysis/); it is written last, so its presence
    says that the directory is a run.
    """

    def __init__(self, path: Path, lock: filelock.BaseFileLock | None):
        self.path = path
        self._lock = lock
        self._metrics = MetricsFile(path / METRICS)
        self._damaged: set[int] = set()

    @classmethod
    def create(cls, path: str | os.PathLike[str], recipe: Mapping[str, Any], info: Mapping[str, Any]) -> RunDir:
        """Starts a run in a new or empty directory.

        UsageError: the directory holds a run (resume it) or other files. StorageError: cannot be written.
        """
        path = Path(path)
        check_free(path)
        fresh = not path.exists()
        with storage.writing(path):
            storage.make_directory(path)
        try:
            run = cls(path, acquire(path))
        except StorageError:
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        try:
            check_free(path)  # another process may have been faster
            files = {RECIPE: storage.to_json(recipe), INFO: storage.to_json(info)}
            for name, data in files.items():
                storage.replace_file(path / name, data)
            run._write_manifest({name: entry(data) for name, data in files.items()})
        except BaseException:
            run.discard() if fresh else run.close()
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> RunDir:
        """An existing run. A reader takes no lock and changes nothing.

        BadFileError: no run directory, or its recipe or description was changed. StorageError: another writer.
        """
        path = Path(path)
        if not os.path.isfile(path / MANIFEST):
            raise BadFileError(f"{path} is not a run directory of zsq-fast ({MANIFEST} is missing).")
        run = cls(path, None if read_only else acquire(path))
        try:
            for name in (RECIPE, INFO):
                run.read_verified(name)
            if not read_only:
                run._recover()
        except BaseException:
            run.close()
            raise
        return run

    @staticmethod
    def is_run(path: str | os.PathLike[str]) -> bool:
        return any(os.path.isfile(Path(path) / name) for name in (INFO, MANIFEST))

    @property
    def recipe(self) -> dict[str, Any]:
        return self.load_json(RECIPE)

    @property
    def info(self) -> dict[str, Any]:
        return self.load_json(INFO)

    @property
    def has_checkpoint(self) -> bool:
        return bool(checkpoint.steps(self.path / CHECKPOINTS))

    def holds(self, name: str) -> bool:
        """Whether the file is there and entered: a writer may have been killed between the two."""
        return name in self._files() and (self.path / name).exists()

    def log(self, **record: Any) -> None:
        """Appends one record to metrics.jsonl; `step` (int) is what `load_checkpoint` cuts by. Log before saving."""
        self._metrics.append(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        return self._metrics.read()

    def save_checkpoint(
        self, step: int, groups: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Durable when it returns; the newest two are kept.

        groups: name -> tensors of any device, layout or sharing; stored as contiguous copies.
        state: what JSON can hold. StorageError: not saved, the older checkpoints are intact.
        """
        root = self.path / CHECKPOINTS
        self._metrics.sync()
        checkpoint.write(root, step, groups, state)
        self._damaged.discard(step)
        good = [s for s in checkpoint.steps(root) if s not in self._damaged]
        for old in set(checkpoint.steps(root)) - set(good[-_KEEP:]):
            with storage.writing(root):
                storage.remove_tree(root / checkpoint.directory_name(old))
        self._damaged.clear()

    @property
    def image_dir(self) -> Path:
        """Where the run keeps optimised images, which verify themselves; `discard` leaves them."""
        return self.path / IMAGES

    def load_checkpoint(self) -> tuple[int, checkpoint.Groups, dict[str, Any]] | None:
        """(step, groups of contiguous CPU tensors, state) of the newest checkpoint that verifies; None: none was saved.

        A writer cuts metrics.jsonl back to that step. Damaged checkpoints are skipped with a warning and removed by the next
        save; BadFileError when none is left.
        """
        root = self.path / CHECKPOINTS
        self._damaged.clear()
        for step in reversed(checkpoint.steps(root)):
            try:
                loaded = checkpoint.read(root / checkpoint.directory_name(step))
            except BadFileError as error:
                logger.warning("skipped checkpoint of step %d: %s", step, error)
                self._damaged.add(step)
                continue
            self._cut_metrics(step)
            return loaded
        if self._damaged:
            raise BadFileError(f"no checkpoint in {root} is intact; start the run again in another directory.")
        self._cut_metrics(None)
        return None

    def _cut_metrics(self, step: int | None) -> None:
        if self._lock is not None:  # a reader changes nothing
            self._metrics.cut_after(step)

    def write_json(self, name: str, obj: Any) -> None:
        """Atomic, entered in the run's manifest; non-finite floats become strings."""
        data = storage.to_json(obj)
        storage.replace_file(self.path / storage.check_name(name), data)
        self._write_manifest({**self._files(), name: entry(data)})

    def load_json(self, name: str) -> dict[str, Any]:
        """What `write_json` wrote; BadFileError if a byte differs."""
        return storage.from_json(self.read_verified(name), self.path / name)

    def save_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> Path:
        """One safetensors file, atomic, entered in the run's manifest; returns its path."""
        path = self.path / storage.check_name(name)
        with storage.writing(path):
            storage.check_space(self.path, sum(tensor.nbytes for tensor in tensors.values()))
        data = pack(tensors, metadata)
        storage.replace_file(path, data)
        self._write_manifest({**self._files(), name: entry(data, tensors=True)})
        return path

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What `save_tensors` wrote, on the CPU; BadFileError if a byte differs."""
        return unpack(self.read_verified(name), self.path / name)

    def read_verified(self, name: str) -> bytes:
        return read_verified(self.path, name, self._files().get(name))

    def discard(self) -> None:
        """Removes the files of a run that never began, and the directory if nothing else is in it."""
        self._metrics.close()
        for folder in (CHECKPOINTS, TENSORBOARD):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # what cannot be removed stays; the error that led here is the news
            for name in (MANIFEST, RECIPE, INFO, METRICS, STATUS):
                (self.path / name).unlink(missing_ok=True)
            self.close()
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def close(self) -> None:
        self._metrics.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _files(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            files = storage.from_json(path.read_bytes(), path).get("files")
        except OSError as error:
            raise BadFileError(f"{path} is missing or unreadable.") from error
        if not isinstance(files, dict):
            raise BadFileError(f"{path} is damaged: it lists no files.")
        return files

    def _write_manifest(self, files: dict[str, Any]) -> None:
        storage.replace_file(self.path / MANIFEST, storage.to_json({"format": checkpoint.FORMAT, "files": files}))

    def _recover(self) -> None:
        with storage.writing(self.path):
            checkpoint.recover(self.path / CHECKPOINTS)
            self._metrics.trim()
            for stale in self.path.glob(storage.TMP + "*"):
                stale.unlink(missing_ok=True)


def check_free(path: str | os.PathLike[str]) -> None:
    """UsageError unless a run can begin in `path`: absent, empty, left by a `create` that was killed, or by a run that failed
    after its images were made (they say themselves what they belong to)."""
    path = Path(path)
    if os.path.exists(path / MANIFEST):
        raise UsageError(
            f"{path} already holds a run; continue it with `zsq-fast resume {path}` or choose another --out."
        )
    with storage.writing(path):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; choose another --out.")
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    foreign = sorted(n for n in names if n not in (LOCK, RECIPE, INFO, IMAGES) and not n.startswith(storage.TMP))
    if foreign:
        raise UsageError(f"{path} is not empty ('{foreign[0]}' is in it); choose another --out.")


def acquire(path: Path) -> filelock.BaseFileLock:
    """The lock of a directory that one process at a time may change. StorageError: another one has it."""
    lock = filelock.FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:  # a kind of OSError: must come first
        raise StorageError(f"{path} is in use by another zsq-fast process; wait until that one ends.") from error
    except OSError as error:
        raise storage.storage_error(error, path) from error
    return lock
