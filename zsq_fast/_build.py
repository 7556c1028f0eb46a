"""What was built at installation, whether it fits the torch that is running, and how to build what is missing.

`_build_info.json` is written by the build (build_backend/zsq_native.py). A native module that is absent or does not fit
raises nothing here: it is a reason, which the operations give when they are called.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_INFO = Path(__file__).with_name("_build_info.json")
DEVICES = ("cpu", "cuda")


@functools.cache
def build_info() -> dict[str, Any]:
    """Record of the build: torch, cuda, arches, compiler, kernels, reasons, steps, log; empty if never built."""
    try:
        info: dict[str, Any] = json.loads(_INFO.read_text())
    except (OSError, ValueError):
        return {}
    return info


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    info = build_info()
    if not info:
        return None, f"{_INFO.parent} is a source tree in which nothing was built"
    if not info["kernels"]["cpu"]:
        return None, info["reasons"]["cpu"]
    # torch's C++ interface changes between versions: a module for another one may load and then crash.
    if info["torch"] != torch.__version__:
        return None, f"built against torch {info['torch']}, but torch {torch.__version__} is running"
    try:
        return importlib.import_module("zsq_fast._C"), ""
    except ImportError as problem:
        return None, f"built against torch {info['torch']}, does not load with torch {torch.__version__}: {problem}"


def native() -> ModuleType | None:
    """The native module, importing which registers its kernels; None when there is none for the running torch."""
    return _load()[0]


def required_kernels() -> tuple[str, ...]:
    """Devices named in ZSQ_REQUIRE_KERNELS ("1": both), without whose kernels the build and the tests fail.

    Raises ValueError for anything else in the variable.
    """
    words = os.environ.get("ZSQ_REQUIRE_KERNELS", "").lower().replace(",", " ").split()
    if words == ["1"]:
        return DEVICES
    if unknown := sorted(set(words) - set(DEVICES)):
        raise ValueError(
            f"ZSQ_REQUIRE_KERNELS: unknown device {', '.join(unknown)}; write cpu, cuda, cpu,cuda or 1 (both)"
        )
    return tuple(d for d in DEVICES if d in words)


def cpu_isa() -> str | None:
    """Instruction set that the CPU kernels use on this machine, e.g. "avx2"; None when they are not loaded."""
    native = _load()[0]
    return native.cpu_isa() if native else None


def install_command() -> str:
    """The command that builds the kernels again for the torch of this environment."""
    source = build_info().get("source")
    known = source and Path(source, "CMakeLists.txt").exists()
    return f"pip install --no-deps --force-reinstall {source if known else '<zsq_fast source directory>'}"


def kernel_status() -> dict[str, dict[str, Any]]:
    """Per device (cpu, cuda): `built` (usable here), and if not, `reason` and `fix`, the command that builds them."""
    native, problem = _load()
    info = build_info()
    status: dict[str, dict[str, Any]] = {}
    for device in DEVICES:
        if native and info["kernels"][device]:
            status[device] = {"built": True, "reason": None, "fix": None}
            continue
        recorded = not info.get("kernels", {}).get(device)
        step = info.get("steps", {}).get(device) if recorded else None
        status[device] = {
            "built": False,
            "reason": info.get("reasons", {}).get(device, problem) if recorded else problem,
            "fix": f"{step}, then: {install_command()}" if step else install_command(),
        }
    return status
