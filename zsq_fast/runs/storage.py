"""Durable writes: a name in a run directory holds either the old bytes or the new ones, also after a power cut."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zsq_fast.errors import BadFileError, StorageError, UsageError

TMP = ".tmp-"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")


def storage_error(error: OSError, path: str | os.PathLike[str]) -> StorageError:
    """The sentence for an operating system error met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path} is not writable; choose another output directory.")
    reason = error.strerror or error
    return StorageError(f"{path} could not be written ({reason}); check the disk or choose another output directory.")


def no_space(path: str | os.PathLike[str], need: int | None = None) -> StorageError:
    size = f" ({need / 1e6:.1f} MB are needed)" if need else ""
    return StorageError(f"no space left on the disk of {path}{size}; free some there, then go on with what was saved.")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns every OSError of its body into the StorageError for `path`, a name that is too long into a UsageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"the file name {path} is too long; choose a shorter --out.") from error
        raise storage_error(error, path) from error


def check_space(directory: Path, need: int) -> None:
    """Raises StorageError unless `need` bytes and a margin of 1 MiB are free."""
    if shutil.disk_usage(directory).free < need + (1 << 20):
        raise no_space(directory, need)


def check_name(name: str, where: str | os.PathLike[str] = "") -> str:
    """A name that cannot leave its directory; names read from files pass through here too (BadFileError)."""
    if not _NAME.fullmatch(name):
        raise BadFileError(f"{where or 'the run directory'}: '{name[:60]}' is not an acceptable file name.")
    return name


def sync_directory(directory: Path) -> None:
    if os.name == "nt":  # no such call there; a rename is journalled by NTFS
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """With its parents; they are on the disk when this returns."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    if missing:
        path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_directory(place.parent)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_synced(path: Path, data: bytes) -> None:
    """A new file, its bytes on the disk when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Atomic and durable. StorageError leaves the old file in place and no temporary one."""
    temporary = path.with_name(f"{TMP}{path.name}-{os.getpid()}")
    with writing(path):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """A second name for a file that is only ever replaced, never rewritten; a copy where the file system has no links."""
    with writing(target):
        make_directory(target.parent)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def remove_tree(directory: Path) -> None:
    """Renamed first: a kill half-way must not leave something that looks like a damaged checkpoint."""
    doomed = directory.with_name(f"{TMP}gone-{directory.name}-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def plain(value: Any) -> Any:
    """What standard JSON can hold: non-finite floats become "nan", "inf", "-inf", 0-d tensors their number."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def to_json(value: Any) -> bytes:
    return (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode()


def from_json(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """BadFileError unless the bytes hold one JSON object."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is damaged: not valid JSON.") from error
    if not isinstance(value, dict):
        raise BadFileError(f"{path} is damaged: not a JSON object.")
    return value
