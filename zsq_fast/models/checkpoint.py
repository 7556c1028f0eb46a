"""Weights from a file: read without running code, checked against the network before anything is copied."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import BadFileError, UsageError, nearest

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".tar", ".bin")
_PICKLE_STARTS = (b"PK", b"\x80")  # torch.save's zip archive; a bare pickle


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one file (CPU), its SHA-256, and the string metadata of a safetensors header."""

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a .safetensors file, or a pickled one with `weights_only=True` and never any other way.

    "module." prefixes and a {"state_dict": ...} wrapper are taken off. Raises BadFileError naming the file, and the
    tensor where one is to blame: missing, truncated, a pickle that holds more than tensors, NaN or infinite values, negative
    running variances.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in TORCH_SUFFIXES:
        raise BadFileError(f"{path}: not a known kind of checkpoint: use .safetensors, .pt or .pth.")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadFileError(f"{path}: no such file: check the path of the checkpoint.") from None
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions.") from None
    tensors, metadata = _read_safetensors(path, data) if suffix == ".safetensors" else (_read_pickled(path, data), {})
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadFileError(f"{path}: tensor '{name}' contains NaN or infinite values: use an intact checkpoint.")
        if name.split(".")[-1] == "running_var" and bool((tensor < 0).any()):
            raise BadFileError(f"{path}: tensor '{name}' contains negative variances: use an intact checkpoint.")
    return Checkpoint(path, hashlib.sha256(data).hexdigest(), tensors, metadata)


def _read_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise BadFileError(f"{path}: truncated, or not a safetensors file ({error}): fetch it again.") from None
    # The library returns no metadata for bytes in memory; it has just validated the header that is parsed here.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def _read_pickled(path: Path, data: bytes) -> dict[str, Tensor]:
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        warnings.warn(f"{path}: the weights_only reader of torch < 2.10 has holes: prefer .safetensors.", stacklevel=4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, on files that are refused anyway
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes provoke: RuntimeError, EOFError, KeyError, ...
        if isinstance(error, pickle.UnpicklingError) and data.startswith(_PICKLE_STARTS):
            raise BadFileError(_conversion_help(path)) from None
        raise BadFileError(f"{path}: truncated, or not a PyTorch checkpoint: fetch it again.") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise BadFileError(f"{path}: holds a {type(content).__name__}, not named tensors: save model.state_dict().")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise BadFileError(f"{path}: entry '{name}' is a {kind}, not a tensor: save model.state_dict() alone.")
    return dict(content)


def _conversion_help(path: Path) -> str:
    target = str(path.with_suffix(".safetensors"))
    script = (
        f"import torch, safetensors.torch as s; m = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        "m = m.get('state_dict', m) if isinstance(m, dict) else m.state_dict(); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in m.items()}}, {target!r})"
    )
    return (
        f"{path}: a pickle that holds more than tensors; reading it would run code from the file. "
        f"If you trust it, convert it yourself: python -c {shlex.quote(script)}"
    )


def apply_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the tensors into `model`; names and shapes must agree ("num_batches_tracked" may be absent).

    Raises BadFileError naming the first missing, unexpected or misshapen tensor; the model is then unchanged.
    """
    own, given, path = model.state_dict(), checkpoint.tensors, checkpoint.path
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own and not name.endswith("num_batches_tracked")]
    if missing:
        near = nearest(missing[0], unexpected) if unexpected else ""
        raise BadFileError(
            f"{path}: {len(missing)} tensor(s) of the model are missing, the first is '{missing[0]}'.{near} "
            "Check that MODEL names the network that was saved."
        )
    if unexpected:
        raise BadFileError(
            f"{path}: {len(unexpected)} tensor(s) do not belong to the model, the first is '{unexpected[0]}'. "
            "Check that MODEL names the network that was saved."
        )
    for name, tensor in own.items():
        if name in given:
            _check_tensor(path, name, given[name], tensor, is_head=name in _head_names(model))
    model.load_state_dict(dict(given), strict=False)


def _check_tensor(path: Path, name: str, given: Tensor, own: Tensor, is_head: bool) -> None:
    if given.shape != own.shape:
        if is_head and given.dim() and given.shape[1:] == own.shape[1:]:
            raise BadFileError(
                f"{path}: made for {given.shape[0]} classes ('{name}'), the model has {own.shape[0]}: "
                f"pass num_classes={given.shape[0]} (--num-classes)."
            )
        raise BadFileError(
            f"{path}: tensor '{name}' has shape {list(given.shape)}, the model needs {list(own.shape)}: "
            "check that MODEL names the network that was saved."
        )
    if given.is_floating_point() != own.is_floating_point():
        raise BadFileError(f"{path}: tensor '{name}' is {given.dtype}, the model needs {own.dtype}: save floats.")


def _head_names(model: nn.Module) -> tuple[str, ...]:
    heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return (f"{heads[-1]}.weight", f"{heads[-1]}.bias") if heads else ()


def preprocessing(metadata: Mapping[str, str], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) per channel for images in 0..1, from a header entry `norm` such as "mean .5,.5,.5 std .2,.2,.2".

    One number serves every channel. None when the entry is absent; UsageError when it cannot be understood.
    """
    text = metadata.get("norm")
    if text is None:
        return None
    found = re.search(r"mean\s+([\d.,]+)\s+std\s+([\d.,]+)", text)
    try:
        mean, std = (tuple(float(v) for v in group.split(",")) for group in (found.groups() if found else ("", "")))
        mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError
    except ValueError:
        wanted = f"'mean m,... std s,...' for {channels} channels"
        raise UsageError(f"header entry norm '{text}' is not {wanted}: correct it.") from None
    return mean, std
