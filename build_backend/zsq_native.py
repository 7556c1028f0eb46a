"""Runs CMake for the native module and writes `_build_info.json` beside it. A failure is recorded, not raised.

CMakeLists.txt owns sources and flags; this file only turns a Plan into -D flags and outcomes into reasons.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zsq_probe

try:
    import fcntl
except ImportError:  # Windows: two builds at a time are not kept apart there
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
INFO_NAME = "_build_info.json"
_GIB_PER_JOB = 2  # a file with Torch headers takes up to 1.5 GB


def jobs() -> int:
    """Parallel compilations: MAX_JOBS, else what cores and free memory allow."""
    if (wanted := os.environ.get("MAX_JOBS", "")).isdigit():
        return max(1, int(wanted))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        free = None
    return max(1, min(cores, int(free[1]) // (_GIB_PER_JOB << 20))) if free else cores


def work_dir(plan: zsq_probe.Plan) -> Path:
    """One directory per torch, Python and nvcc: a second build is quick, builds against two torches never mix."""
    torch = plan.torch
    key = repr((torch.version, torch.root, sysconfig.get_config_var("EXT_SUFFIX"), plan.nvcc, plan.arches))
    return ROOT / "build" / f"native-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as handle:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _environment(plan: zsq_probe.Plan) -> dict[str, str]:
    env = dict(os.environ)
    # Flags meant for torch's own ninja builds or for other projects must not weaken exact arithmetic (-ffast-math).
    for name in ("CUDAARCHS", "CUDACXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CFLAGS", "CXXFLAGS", "CUDAFLAGS"):
        env.pop(name, None)
    # Library folders (-L, -Wl, conda needs them) stay. -Ofast, -ffast-math and -mdaz-ftz would link start-up code that
    # flushes denormals in the whole process.
    words = [w for w in env.get("LDFLAGS", "").split() if not re.match(r"-O|-m|-f(?!use-ld)", w)]
    env["LDFLAGS"] = " ".join(words)
    if plan.nvcc:
        env["CUDA_HOME"] = plan.nvcc.root
    return env


def _configure(plan: zsq_probe.Plan, paths: dict, build: Path, cuda: bool) -> list[str]:
    cmake = zsq_probe.usable_cmake()
    if not cmake:
        raise BuildError("cmake 3.22 or newer not found (pip install cmake)")
    flags = {
        "CMAKE_BUILD_TYPE": "Release",
        "ZSQ_TORCH_INCLUDE": ";".join(paths["include"]),
        "ZSQ_TORCH_LIB": ";".join(paths["lib"]),
        "ZSQ_CXX11_ABI": paths["cxx11_abi"],
        "ZSQ_PYTHON_INCLUDE": plan.torch.python_include,
        "ZSQ_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "ZSQ_CUDA": "ON" if cuda else "OFF",
    }
    if cuda:
        flags["CMAKE_CUDA_COMPILER"] = plan.nvcc.path
        flags["CMAKE_CUDA_ARCHITECTURES"] = ";".join(plan.arches)
    generator = []
    if ninja := zsq_probe.find_tool("ninja"):
        generator = ["-G", "Ninja"]
        flags["CMAKE_MAKE_PROGRAM"] = ninja
    return [cmake, "-S", str(ROOT), "-B", str(build), *generator, *(f"-D{k}={v}" for k, v in flags.items())]


class BuildError(Exception):
    """Why a native build did not come out, in one line."""


def _run(command: list[str], env: dict[str, str], log: Path) -> None:
    with open(log, "a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        raise BuildError(_first_error(log.read_text(errors="replace")))


def _first_error(log: str) -> str:
    """The line of a build log that a person would look for."""
    lines = [line.strip() for line in log.splitlines()]
    tell = re.compile(r"\b(fatal )?error\b[:\s]|undefined reference|No such file|cannot find", re.I)
    hits = [i for i, line in enumerate(lines) if tell.search(line) and not line.startswith("$")]
    if not hits:
        return f"build failed: {lines[-1] if lines else 'no output'}"
    found = lines[hits[0]]
    if found.startswith("CMake Error"):  # CMake puts the text on the following lines
        found = " ".join(filter(None, [found, *lines[hits[0] + 1 : hits[0] + 4]]))
    return f"build failed: {found[:300]}"


def _compile(plan: zsq_probe.Plan, paths: dict, directory: Path, cuda: bool, log: Path) -> Path:
    build = directory / ("cuda" if cuda else "cpu")
    env = _environment(plan)
    if not Path(plan.torch.python_include, "Python.h").exists():
        raise BuildError(f"Python.h not found in {plan.torch.python_include} (install the python3-dev package)")
    # A cached generator or compiler of an earlier environment would stop CMake: start over, objects are cheap to lose.
    command = _configure(plan, paths, build, cuda)
    try:
        _run(command, env, log)
    except BuildError:
        shutil.rmtree(build, ignore_errors=True)
        _run(command, env, log)
    _run([command[0], "--build", str(build), "--parallel", str(jobs())], env, log)
    return build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _compiler_name(build: Path) -> str:
    cache = (build / "CMakeCache.txt").read_text()
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.M)
    return zsq_probe.ask([found[1], "--version"])[1].split("\n")[0] if found else "unknown"


def _build_all(plan: zsq_probe.Plan, output: Path, info: dict) -> None:
    if not plan.torch or "cpu" in plan.reasons:
        return
    directory = work_dir(plan)
    log = directory / "build.log"
    info["log"] = str(log)
    with _locked(directory):
        log.write_text("")
        paths, why = zsq_probe.torch_paths(plan.torch)
        if not paths:
            info["reasons"].update(cpu=why, cuda=why)
            return
        for cuda in (True, False) if plan.nvcc else (False,):
            try:
                module = _compile(plan, paths, directory, cuda, log)
            except (BuildError, OSError) as problem:
                info["reasons"]["cuda" if cuda else "cpu"] = f"{problem} (log: {log})"
                continue
            output.mkdir(parents=True, exist_ok=True)
            # Replaced, not rewritten: another process may have the old module mapped.
            shutil.copy2(module, output / f".{module.name}.new")
            os.replace(output / f".{module.name}.new", output / module.name)
            info["kernels"].update(cpu=True, cuda=cuda)
            info["compiler"] = _compiler_name(module.parent)
            info["arches"] = [zsq_probe.arch_name(a) for a in plan.arches] if cuda else []
            return


def summary(info: dict) -> str:
    """The one line that says what was built."""
    words = []
    for device in ("cpu", "cuda"):
        note = f" ({', '.join(info['arches'])})" if device == "cuda" else ""
        words.append(f"{device} yes{note}" if info["kernels"][device] else f"{device} no ({info['reasons'][device]})")
    return f"zsq_fast kernels: {', '.join(words)}"


def build(output: Path) -> dict:
    """Build what this machine can into `output` (the package directory) and return the content of `_build_info.json`.

    Raises SystemExit only when a device named in ZSQ_REQUIRE_KERNELS is missing.
    """
    required = zsq_probe.required_kernels()
    plan = zsq_probe.make_plan()
    info = {
        "torch": plan.torch.version if plan.torch else None,
        "torch_python": plan.torch.python if plan.torch else None,
        "cuda": plan.torch.cuda if plan.torch else None,
        "nvcc": plan.nvcc.release if plan.nvcc else None,
        "arches": [],
        "compiler": None,
        "kernels": {"cpu": False, "cuda": False},
        "reasons": dict(plan.reasons),
        "log": None,
        "source": str(ROOT),
    }
    _build_all(plan, output, info)
    info["reasons"] = {d: r for d, r in info["reasons"].items() if not info["kernels"][d]}
    info["steps"] = {d: step for d, r in info["reasons"].items() if (step := zsq_probe.next_step(r))}
    output.mkdir(parents=True, exist_ok=True)
    (output / INFO_NAME).write_text(json.dumps(info, indent=1) + "\n")
    if not info["kernels"]["cpu"]:
        (output / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
    # At exit: after everything that setuptools still has to say.
    atexit.register(print, summary(info), file=sys.stderr, flush=True)
    if missing := [d for d in required if not info["kernels"][d]]:
        raise SystemExit("ZSQ_REQUIRE_KERNELS: " + "; ".join(f"no {d} kernels: {info['reasons'][d]}" for d in missing))
    return info


if __name__ == "__main__":  # `python build_backend/zsq_native.py`: in place, without pip, for working on the kernels
    build(ROOT / "zsq_fast")
