"""Tensors to verified bytes and back: safetensors, plus a SHA-256 per file and per tensor."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from zsq_fast.errors import BadFileError
from zsq_fast.runs.storage import check_name, sha256


def pack(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Contiguous private copies: safetensors refuses shared storage and strided layouts."""
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return _ordered(save(copies, metadata)) if metadata else save(copies)


def _ordered(data: bytes) -> bytes:
    """The library writes metadata in random order; equal runs must give equal files."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    return len(text).to_bytes(8, "little") + text + data[start:]


def entry(data: bytes, *, tensors: bool = False) -> dict[str, Any]:
    """The manifest's record of one file."""
    record: dict[str, Any] = {"bytes": len(data), "sha256": sha256(data)}
    if tensors:
        record["tensors"] = tensor_sums(data)
    return record


def tensor_sums(data: bytes) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, in the file's order."""
    view = memoryview(data)
    start = 8 + int.from_bytes(view[:8], "little")
    header = json.loads(bytes(view[8:start]))
    header.pop("__metadata__", None)
    spans = {name: info["data_offsets"] for name, info in header.items()}
    return {name: sha256(view[start + begin : start + end]) for name, (begin, end) in spans.items()}


def read_verified(directory: Path, name: str, record: Any) -> bytes:
    """The bytes of `directory/name` if they are those the manifest entry `record` describes, else BadFileError."""
    path = directory / check_name(name, directory)
    if not (
        isinstance(record, dict) and isinstance(record.get("sha256"), str) and isinstance(record.get("bytes"), int)
    ):
        raise BadFileError(f"{path} has no usable manifest entry.")
    try:
        status = path.lstat()  # a link could lead out of the run directory
        if not stat.S_ISREG(status.st_mode):
            raise BadFileError(f"{path} is not a regular file.")
        if status.st_size != record["bytes"]:
            raise BadFileError(f"{path} is damaged: {status.st_size} bytes instead of {record['bytes']}.")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadFileError(f"{path} is missing.") from error
    except OSError as error:
        raise BadFileError(f"{path} cannot be read ({os.strerror(error.errno or 0)}).") from error
    if sha256(data) != record["sha256"]:
        raise BadFileError(f"{path} is damaged{_culprit(data, record)}: its SHA-256 is not the recorded one.")
    return data


def _culprit(data: bytes, record: dict[str, Any]) -> str:
    """Names the tensor that differs when the damaged file can still be parsed that far."""
    expected = record.get("tensors")
    if not isinstance(expected, dict):
        return ""
    try:
        found = tensor_sums(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return " in its header"
    wrong = [name for name in found if found[name] != expected.get(name)]
    return f" in tensor '{wrong[0]}'" if wrong else ""


def unpack(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """CPU tensors, contiguous and writable."""
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadFileError(f"{path} is not a readable safetensors file.") from error
