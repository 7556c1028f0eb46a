"""What the machine offers to a build: the torch of the target environment, a C++ compiler, nvcc, CUDA architectures.

Nothing here imports torch and nothing raises: what is missing comes back as a reason in plain words. pip's build
isolation hides the target environment, so torch is looked for by asking interpreters, not by importing.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

USUAL_NVCC = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc")
DEFAULT_ARCHES = ("75", "80", "86", "89", "90", "100", "120")

# A reason contains the words on the left; the user's next step stands on the right. Without one, build again.
_STEPS = (
    ("no torch in the target", "install torch"),
    ("no C++ compiler", "install a C++ compiler (Debian, Ubuntu: apt-get install g++)"),
    ("Python.h not found", "install the Python headers (Debian, Ubuntu: apt-get install python3-dev)"),
    ("cmake 3.22", "pip install cmake"),
    ("is a CPU build", "install a CUDA build of torch"),
    ("ZSQ_CUDA=0", "unset ZSQ_CUDA"),
    ("compiles for none", "unset TORCH_CUDA_ARCH_LIST or use a newer nvcc"),
    (
        "nvcc not found",
        "set CUDA_HOME to a CUDA toolkit of torch's major version, or ZSQ_NVCC=pip (CUDA 13: from PyPI)",
    ),
    ("torch needs", "set CUDA_HOME to a CUDA toolkit of torch's major version, or ZSQ_NVCC=pip (CUDA 13: from PyPI)"),
)


def next_step(reason: str) -> str | None:
    """What the user has to do before building again, if the reason is one that a new build alone does not cure."""
    return next((step for words, step in _STEPS if words in reason), None)


# Runs inside a candidate interpreter. torch/version.py is executed alone: importing torch takes seconds and may fail.
_ASK = """
import importlib.util, json, os, sys, sysconfig
sys.path[:] = [p for p in sys.path if p]
spec = importlib.util.find_spec("torch")
found = {"ext_suffix": sysconfig.get_config_var("EXT_SUFFIX"), "include": sysconfig.get_path("include")}
if spec and spec.origin:
    scope = {}
    exec(open(os.path.join(os.path.dirname(spec.origin), "version.py")).read(), scope)
    found.update(torch=scope["__version__"], cuda=scope.get("cuda"), root=os.path.dirname(spec.origin))
print(json.dumps(found))
"""
_ASK_PATHS = """
import json, torch
from torch.utils import cpp_extension as e
abi = int(torch.compiled_with_cxx11_abi())
print(json.dumps({"include": e.include_paths(), "lib": e.library_paths(), "cxx11_abi": abi}))
"""


@dataclass(frozen=True)
class Torch:
    """The torch to build against, seen from the outside."""

    python: str
    root: str  # directory of the torch package
    version: str
    cuda: str | None  # "13.2", or None for a CPU build
    python_include: str

    @property
    def cuda_major(self) -> int:
        return int(self.cuda.split(".")[0]) if self.cuda else 0


@dataclass(frozen=True)
class Nvcc:
    path: str
    root: str  # toolkit root as nvcc itself reports it, right also behind a wrapper script
    release: str  # "13.0"
    arches: tuple[str, ...]  # every architecture that it can compile for, oldest first


@dataclass
class Plan:
    """What can be built here; `reasons` says why a device is left out."""

    torch: Torch | None = None
    nvcc: Nvcc | None = None
    arches: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)


def ask(command: list[str], timeout: float = 60) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that may not exist."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=clean, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return 127, "", str(problem)
    return done.returncode, done.stdout, done.stderr


def _answer(out: str) -> dict | None:
    """The JSON object on the last line (a .pth file or sitecustomize may have printed before it), or None."""
    try:
        found = json.loads((out.strip().splitlines() or [""])[-1])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _parent() -> tuple[str | None, str | None]:
    """Interpreter and VIRTUAL_ENV of the frontend: uv hides the latter, a venv-isolated pip the former (Linux only)."""
    proc = Path(f"/proc/{os.getppid()}")
    try:
        command = proc.joinpath("cmdline").read_bytes().split(b"\0")[0].decode()
        environ = dict(e.split("=", 1) for e in proc.joinpath("environ").read_bytes().decode().split("\0") if "=" in e)
    except (OSError, UnicodeDecodeError):
        return None, None
    is_python = "python" in os.path.basename(command)
    return shutil.which(command) if is_python else None, environ.get("VIRTUAL_ENV")


def interpreters() -> list[str]:
    """Interpreters that may hold the user's torch, best first. An explicit ZSQ_TORCH_PYTHON is the only one."""
    if chosen := os.environ.get("ZSQ_TORCH_PYTHON"):
        return [chosen]
    parent_python, parent_env = _parent()
    candidates = [sys.executable, parent_python]
    for env in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), ".venv", parent_env):
        if env and os.path.exists(python := os.path.join(env, "bin", "python")):
            candidates.append(os.path.abspath(python))
    return list(dict.fromkeys(c for c in candidates if c))


@functools.cache
def find_torch() -> tuple[Torch | None, str]:
    """The first interpreter with a torch for this very Python, or None and the reason."""
    notes = []
    for python in interpreters():
        code, out, err = ask([python, "-E", "-c", _ASK])
        found = None if code else _answer(out)
        if found is None:
            notes.append(f"{python} does not run: {(err.strip().splitlines() or ['no answer'])[-1]}")
            continue
        if "torch" not in found:
            continue
        if found["ext_suffix"] != sysconfig.get_config_var("EXT_SUFFIX"):
            notes.append(f"{python} has torch, but is another Python than the {sys.version.split()[0]} of this build")
            continue
        return Torch(python, found["root"], found["torch"], found["cuda"], found["include"]), ""
    return None, "; ".join(["no torch in the target environment when this was built", *notes])


def torch_paths(torch: Torch) -> tuple[dict | None, str]:
    """Include and library directories from torch.utils.cpp_extension of the target environment."""
    code, out, err = ask([torch.python, "-E", "-c", _ASK_PATHS], timeout=300)
    paths = None if code else _answer(out)
    why = f"torch {torch.version} cannot be imported: {(err.strip().splitlines() or ['no answer'])[-1]}"
    return paths, "" if paths else why


def find_compiler() -> tuple[str | None, str]:
    """A C++ compiler: $CXX, or the usual names on PATH."""
    if chosen := os.environ.get("CXX"):
        path = shutil.which(chosen.split()[0])
        return path, "" if path else f"no C++ compiler: CXX={chosen} is not there"
    path = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return path, "" if path else "no C++ compiler found (looked for c++, g++, clang++ on PATH)"


def find_tool(name: str) -> str | None:
    """cmake or ninja: on PATH, or beside the running interpreter (a venv that is not activated)."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def usable_cmake() -> str | None:
    """A cmake that is new enough for CMakeLists.txt."""
    path = find_tool("cmake")
    version = re.search(r"version (\d+)\.(\d+)", ask([path, "--version"])[1]) if path else None
    return path if version and (int(version[1]), int(version[2])) >= (3, 22) else None


def _nvcc_candidates(major: int) -> list[str]:
    chosen = os.environ.get("ZSQ_NVCC")
    # The compiler that pip put into the build environment (zsq_backend.nvcc_wheels).
    from_pip = [str(Path(p, "nvidia", f"cu{major}", "bin", "nvcc")) for p in sys.path if p]
    if chosen == "pip":
        return [p for p in from_pip if os.access(p, os.X_OK)]
    if chosen:
        return [chosen]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    paths = [os.path.join(h, "bin", "nvcc") for h in homes if h]
    paths += [p for p in (shutil.which("nvcc"),) if p]
    paths += [*from_pip, *USUAL_NVCC]
    return list(dict.fromkeys(p for p in paths if os.access(p, os.X_OK)))


def _inspect_nvcc(path: str) -> Nvcc | None:
    release = re.search(r"release (\d+\.\d+)", ask([path, "--version"])[1])
    dry = ask([path, "--dryrun", "-c", "x.cu"])
    root = re.search(r"^#\$ TOP=(.*)$", dry[1] + dry[2], re.M)
    arches = re.findall(r"compute_(\d+)\b", ask([path, "--list-gpu-arch"])[1])
    if not (release and root and arches):
        return None
    real = str(Path(root[1].strip()).resolve())
    return Nvcc(path, real, release[1], tuple(sorted(arches, key=int)))


def find_nvcc(torch: Torch) -> tuple[Nvcc | None, str]:
    """An nvcc of the CUDA major version that torch was built with, or None and the reason."""
    if os.environ.get("ZSQ_CUDA") == "0":
        return None, "switched off by ZSQ_CUDA=0"
    if not torch.cuda:
        return None, f"torch {torch.version} is a CPU build"
    if os.environ.get("ZSQ_NVCC") == "none":
        return None, "nvcc not found: ZSQ_NVCC=none says not to look"
    notes = []
    for path in _nvcc_candidates(torch.cuda_major):
        nvcc = _inspect_nvcc(path)
        if nvcc and int(nvcc.release.split(".")[0]) == torch.cuda_major:
            return nvcc, ""
        problem = f"is CUDA {nvcc.release}, torch needs {torch.cuda_major}.x" if nvcc else "does not work"
        notes.append(f"{path} {problem}")
    return None, "; ".join(notes) or "nvcc not found"


def visible_gpu_arches() -> list[str]:
    """Compute capabilities of the GPUs of this machine, "90" for 9.0; empty without a driver."""
    _, out, _ = ask(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], timeout=20)
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d+)$", out, re.M)}, key=int)


def choose_arches(nvcc: Nvcc) -> tuple[tuple[str, ...], str]:
    """CMAKE_CUDA_ARCHITECTURES entries: TORCH_CUDA_ARCH_LIST, else the GPU that is here, else the default list.

    "90" means code and PTX, "90-real" code only. One that is newer than nvcc falls back to PTX of the newest it knows.
    """
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        items = re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", wanted)
        named = [major + minor + suffix + ("" if ptx else "-real") for major, minor, suffix, ptx in items]
    elif gpus := visible_gpu_arches():
        named = gpus
    else:
        known = [a for a in DEFAULT_ARCHES if a in nvcc.arches]
        named = [f"{a}-real" for a in known[:-1]] + known[-1:]
    numbers = {a: re.match(r"\d+", a)[0] for a in named}
    usable = [a for a in named if numbers[a] in nvcc.arches]
    if any(int(number) > int(nvcc.arches[-1]) for number in numbers.values()):
        usable.append(f"{nvcc.arches[-1]}-virtual")
    reason = "" if usable else f"nvcc {nvcc.release} compiles for none of: {wanted or ', '.join(named)}"
    return tuple(dict.fromkeys(usable)), reason


def arch_name(cmake_entry: str) -> str:
    """What people call it: "90-real" is sm_90, "90" sm_90+PTX, "90-virtual" PTX of sm_90."""
    number, _, kind = cmake_entry.partition("-")
    return {"real": f"sm_{number}", "": f"sm_{number}+PTX", "virtual": f"PTX of sm_{number}"}[kind]


def make_plan() -> Plan:
    """What this machine can build, without building anything."""
    plan = Plan()
    plan.torch, why = find_torch()
    if not plan.torch:
        plan.reasons = {"cpu": why, "cuda": why}
        return plan
    compiler, why = find_compiler()
    if not compiler:
        plan.reasons = {"cpu": why, "cuda": why}
        return plan
    plan.nvcc, why = find_nvcc(plan.torch)
    if plan.nvcc:
        plan.arches, why = choose_arches(plan.nvcc)
    if why:
        plan.nvcc, plan.reasons["cuda"] = None, why
    return plan


def required_kernels() -> list[str]:
    """Devices named in ZSQ_REQUIRE_KERNELS ("1": both), for which a missing kernel is a build error.

    The rules of zsq_fast/_build.py, which cannot be imported where there is no torch.
    """
    words = os.environ.get("ZSQ_REQUIRE_KERNELS", "").lower().replace(",", " ").split()
    if words == ["1"]:
        return ["cpu", "cuda"]
    if unknown := sorted(set(words) - {"cpu", "cuda"}):
        raise SystemExit(
            f"ZSQ_REQUIRE_KERNELS: unknown device {', '.join(unknown)}; write cpu, cuda, cpu,cuda or 1 (both)"
        )
    return [d for d in ("cpu", "cuda") if d in words]


if __name__ == "__main__":  # the devices for which this interpreter's torch, the compiler and nvcc suffice
    print(",".join(d for d in ("cpu", "cuda") if d not in make_plan().reasons))
