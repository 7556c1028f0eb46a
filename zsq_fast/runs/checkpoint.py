"""One checkpoint: a directory of verified files that appears under its name only when complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zsq_fast.errors import BadFileError
from zsq_fast.runs import storage
from zsq_fast.runs.tensors import entry, pack, read_verified, unpack

MANIFEST = "MANIFEST.json"
STATE = "state.json"
SUFFIX = ".safetensors"
ASIDE = ".replaced-"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")

Groups = dict[str, dict[str, torch.Tensor]]


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, verifying or not, ascending."""
    found = (_STEP.fullmatch(path.name) for path in root.iterdir() if not path.is_symlink()) if root.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def write(root: Path, step: int, groups: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
    """Durable when it returns. StorageError leaves what was there before and no temporary files."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    target = root / directory_name(step)
    temporary = root / f"{storage.TMP}{target.name}-{os.getpid()}"
    with storage.writing(root):
        storage.make_directory(root)
        storage.check_space(root, sum(t.nbytes for tensors in groups.values() for t in tensors.values()))
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            _write_files(temporary, step, groups, state)
            storage.sync_directory(temporary)
            _move_into_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_files(
    directory: Path, step: int, groups: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> None:
    files: dict[str, Any] = {}

    def put(name: str, data: bytes, tensors: bool = False) -> None:
        storage.write_synced(directory / storage.check_name(name), data)
        files[name] = entry(data, tensors=tensors)

    for name, tensors in groups.items():
        put(name + SUFFIX, pack(tensors), tensors=True)
    # Python's NaN and Infinity are allowed here: the state must come back exactly, nobody else reads it.
    put(STATE, json.dumps(state).encode())
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = _self_sum(manifest)
    storage.write_synced(directory / MANIFEST, storage.to_json(manifest))


def _self_sum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return storage.sha256(json.dumps(rest, sort_keys=True).encode())


def _move_into_place(temporary: Path, target: Path) -> None:
    """A directory cannot replace a full one in one step: the old one waits aside, where `recover` finds it."""
    aside = target.with_name(ASIDE + target.name)
    replacing = target.exists()
    if replacing:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        if replacing:
            os.rename(aside, target)
        raise
    storage.sync_directory(target.parent)  # a power cut must not undo the renaming but keep the removal
    shutil.rmtree(aside, ignore_errors=True)


def recover(root: Path) -> None:
    """Removes what a killed writer left and puts a checkpoint back that it had moved aside."""
    for path in list(root.iterdir()) if root.is_dir() else ():
        if path.name.startswith(ASIDE):
            target = path.with_name(path.name[len(ASIDE) :])
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, target)
        elif path.name.startswith(storage.TMP):
            shutil.rmtree(path, ignore_errors=True)


def read(directory: Path) -> tuple[int, Groups, dict[str, Any]]:
    """(step, groups, state), every byte checked against the manifest; BadFileError names the file otherwise."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadFileError(f"{path} is missing or unreadable.") from error
    manifest = storage.from_json(data, path)
    files, step = manifest.get("files"), manifest.get("step")
    if manifest.get("sha256") != _self_sum(manifest) or not isinstance(files, dict) or not isinstance(step, int):
        raise BadFileError(f"{path} is damaged: its SHA-256 is not the recorded one.")
    if manifest.get("format") != FORMAT:
        raise BadFileError(f"{path} has format {manifest.get('format')}; this version of zsq_fast reads {FORMAT}.")
    if directory.name != directory_name(step):
        raise BadFileError(f"{path} belongs to step {step}, not to {directory.name}.")
    contents = {name: read_verified(directory, name, record) for name, record in files.items()}
    if STATE not in contents:
        raise BadFileError(f"{path} lists no {STATE}.")
    state = storage.from_json(contents.pop(STATE), directory / STATE)
    groups = {name.removesuffix(SUFFIX): unpack(blob, directory / name) for name, blob in contents.items()}
    return step, groups, state
