"""Where the CUDA toolkit and the host compiler are, for tests that compile kernels without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HOST = Path(__file__).resolve().parent
KERNELS = sorted((REPO / "csrc" / "cuda").glob("*.cu"))


def nvcc() -> str | None:
    """Path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def toolkit_root() -> Path | None:
    """Root of the toolkit that nvcc belongs to (nvcc on PATH may be a link or a wrapper script)."""
    if (compiler := nvcc()) is None:
        return None
    said = subprocess.run([compiler, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def include_dir() -> Path | None:
    """Folder with the CUDA headers that the host executor needs; those of a pip-installed CUDA runtime will do."""
    roots = [root] if (root := toolkit_root()) else []
    folders = [f for r in roots for f in (r / "include", *r.glob("targets/*/include"))]
    folders += [f for s in site.getsitepackages() for f in Path(s).glob("nvidia/*/include")]
    return next((f for f in folders if (f / "vector_functions.h").exists() and (f / "driver_types.h").exists()), None)


def build_host(out: Path, program: str, *flags: str, root: Path = REPO, with_kernels: bool = True) -> Path:
    """Compile all kernels and `program` (a file of this folder) for the CPU. The scheduler is never instrumented."""
    host = root / "tests" / "cuda_host"
    common = ["g++", "-std=c++17", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fPIC",
              "-isystem", str(include_dir()), f"-I{host}"]  # fmt: skip
    scheduler = out.with_suffix(".sched.o")
    kernels = sorted((root / "csrc" / "cuda").glob("*.cu")) if with_kernels else []
    for command in (
        [*common, "-O2", "-c", str(host / "host_exec.cpp"), "-o", str(scheduler)],
        [*common, "-O1", "-ffp-contract=off", *flags, "-x", "c++", *map(str, kernels), str(host / program),
         "-x", "none", str(scheduler), "-o", str(out)],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return out
