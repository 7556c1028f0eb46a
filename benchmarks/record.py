"""What every committed record carries: where, when, with what it was measured."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import zsq_fast as zsq

RESULTS = Path(__file__).parent / "results"


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def _processor() -> str:
    for line in _output("lscpu").splitlines():
        if line.startswith("Model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    changed = _output("git", "status", "--porcelain", "--", "../zsq_fast", "../csrc")
    return _output("git", "rev-parse", "HEAD") + ("-dirty" if changed else "")


def _driver() -> str:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except OSError:
        return "unknown"


def environment() -> dict[str, Any]:
    """Device, versions, commit (that of ZSQ_COMMIT, where this is a copy outside the repository) and command line of this process."""
    from zsq_fast import _build

    return {
        "command": " ".join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *map(os.path.basename, sys.argv[1:])]
        ),
        "commit": os.environ.get("ZSQ_COMMIT") or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "zsq_fast": zsq.__version__,
        "kernels": zsq.ops.backends(),
        "cpu_isa": _build.cpu_isa(),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    lists = r"\[[-\s\d.,e+]+\]"  # of numbers: on one line, for people and for git
    path.write_text(re.sub(lists, lambda found: " ".join(found[0].split()), text) + "\n")
