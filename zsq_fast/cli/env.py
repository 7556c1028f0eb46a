"""`zsq-fast env`: versions, kernels, GPU, and for every missing kernel the reason and the command that builds it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from zsq_fast import _build

_REQUIRED = ("numpy", "safetensors", "rich", "filelock")
_OPTIONAL = ("torchvision", "timm", "pytorchcv", "pillow", "scikit-learn", "matplotlib")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": g.name, "arch": f"sm_{g.major}{g.minor}", "memory_gb": round(g.total_memory / 1e9, 1)} for g in found
    ]


def report() -> dict[str, Any]:
    """Everything a bug report needs, as plain data: versions, machine, gpus, kernels, build."""
    return {
        "zsq_fast": _version("zsq-fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _REQUIRED},
        "optional": {name: _version(name) for name in _OPTIONAL},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "cpu_isa": _build.cpu_isa(),
        "gpus": _gpus(),
        "kernels": _build.kernel_status(),
        "build": _build.build_info(),
    }


def _lines(data: dict[str, Any]) -> list[str]:
    versions = {"torch": data["torch"], **data["packages"]}
    optional = [f"{name} {version}" if version else f"{name} -" for name, version in data["optional"].items()]
    lines = [
        f"zsq_fast {data['zsq_fast'] or '(not installed)'}, Python {data['python']}, {data['machine']}",
        ", ".join(f"{name} {version or '(missing)'}" for name, version in versions.items()),
        f"optional: {', '.join(optional)}",
        "GPU: "
        + (", ".join(f"{g['name']} ({g['arch']}, {g['memory_gb']} GB)" for g in data["gpus"]) or "none visible"),
    ]
    details = {"cpu": data["cpu_isa"], "cuda": ", ".join(data["build"].get("arches", []))}
    for device, status in data["kernels"].items():
        if status["built"]:
            lines.append(f"kernels {device}: yes ({details[device]})")
        else:
            lines += [f"kernels {device}: no ({status['reason']})", f"  to build them: {status['fix']}"]
    return lines


def print_report(as_json: bool = False) -> None:
    """Print `report()` to stdout, for people or (`as_json`) as one JSON object."""
    data = report()
    sys.stdout.write(json.dumps(data, indent=1) + "\n" if as_json else "\n".join(_lines(data)) + "\n")
