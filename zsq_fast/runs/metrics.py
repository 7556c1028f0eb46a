"""metrics.jsonl: one JSON object per line, appended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from zsq_fast.errors import BadFileError
from zsq_fast.runs import storage


class MetricsFile:
    """Appends whole lines or, when the disk is full, nothing."""

    def __init__(self, path: Path):
        self.path = path
        self._fd: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(storage.plain(record), allow_nan=False) + "\n").encode()
        with storage.writing(self.path):
            fd = self._open()
            size = os.fstat(fd).st_size
            try:
                storage.write_all(fd, line)
            except OSError:
                os.ftruncate(fd, size)
                raise

    def sync(self) -> None:
        """The records must reach the disk before the checkpoint that implies them."""
        if self._fd is not None:
            with storage.writing(self.path):
                os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        if self._fd is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            new = not self.path.exists()
            self._fd = os.open(self.path, flags, 0o666)
            if new:
                storage.sync_directory(self.path.parent)
        return self._fd

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a line torn by a kill is not one. BadFileError for a damaged line before the end."""
        records = []
        for number, line in enumerate(self._lines(), 1):
            try:
                records.append(storage.from_json(line, self.path))
            except BadFileError as error:
                raise BadFileError(f"{self.path}, line {number}: not valid JSON.") from error
        return records

    def cut_after(self, step: int | None) -> None:
        """Keeps what was logged up to `step` (None: nothing), so that a resumed run does not log it twice.

        The file is in time order: everything behind the first later (or damaged) record goes.
        """
        keep = 0
        for line in self._lines() if step is not None else ():
            try:
                if storage.from_json(line, self.path).get("step", -1) > step:
                    break
            except (BadFileError, TypeError):
                break
            keep += len(line)
        self._truncate(keep)

    def trim(self) -> None:
        """Removes a last line torn by a kill: the next record must begin on its own line."""
        self._truncate(sum(map(len, self._lines())))

    def _truncate(self, size: int) -> None:
        if self.path.exists() and self.path.stat().st_size != size:
            with storage.writing(self.path):
                os.truncate(self.path, size)  # needs no space, unlike a rewritten copy

    def _lines(self) -> list[bytes]:
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
