"""Everything that needs a GPU, in one command and at most ten minutes: `make gpu-check`. Downloads nothing.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--only NAME ...] [--dry-run]

Builds the kernels for this GPU against the torch that is there (into .gpu/site), then runs the tests, the recorded vectors,
compute-sanitizer, the benchmarks and a short end-to-end run. A step that fails does not stop the others. Writes report.json (device,
driver, versions, commit, outcome and seconds of every step), every step's log and the benchmark records to benchmarks/results/<device>/;
ends with 1 if a step failed, with 2 if none did but one was skipped on a GPU: then not everything was checked. `--device cpu` is the
rehearsal on a machine without a GPU: the same steps on the CPU kernels, without compute-sanitizer.

Needs: nvcc, cmake, and a Python with a CUDA torch, setuptools 77, numpy, safetensors, rich, filelock, pytest, hypothesis. Recorded
vectors and the CIFAR-10 files are taken from ZSQ_SHARED, or .gpu/shared, or ../shared; without them those steps are skipped, and the
report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / ".gpu" / "site"
LIMIT = 600  # seconds


@dataclass
class Step:
    name: str
    command: list[str]
    limit: int  # seconds
    settings: dict[str, str] = field(default_factory=dict)
    lacks: str = ""  # why it is skipped


def output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def shared() -> Path | None:
    folders = [os.environ.get("ZSQ_SHARED"), ROOT / ".gpu" / "shared", ROOT.parent / "shared"]
    return next((Path(f).resolve() for f in folders if f and Path(f, "golden", "check.py").exists()), None)


def commit() -> str:
    return output("git", "rev-parse", "HEAD") + ("-dirty" if output("git", "status", "--porcelain") else "")


def machine(device: str) -> dict[str, str]:
    import torch

    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "gpu": output("nvidia-smi", query, "--format=csv,noheader"),
        "nvcc": (re.findall(r"release ([\d.]+)", output("nvcc", "--version")) or [""])[0],
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
    }


def steps(device: str, results: Path) -> list[Step]:
    python, material = sys.executable, shared()
    pytest = [python, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--timeout=300", "--durations=5"]
    if not output(python, "-c", "import pytest_timeout; print(1)"):
        pytest.remove("--timeout=300")
    tests = [str(p) for p in sorted((ROOT / "tests").glob("test_ops*.py"))]
    tests += [
        str(ROOT / "tests" / f"test_{name}.py") for name in ("every_op", "optim", "losses", "nn", "methods", "env")
    ]
    if device == "cuda":  # whatever else has a device
        more = (
            "sweep",
            "resume",
            "learned_ranges",
            "rounding",
            "hast",
            "generators",
            "images",
            "mixed",
            "synq",
            "features",
        )
        tests += [str(ROOT / "tests" / f"test_{name}.py") for name in more]
    sanitizer = shutil.which("compute-sanitizer") or ""
    no_sanitizer = "" if sanitizer and device == "cuda" else "needs a GPU and compute-sanitizer on PATH"
    program = [python, str(ROOT / "tests" / "every_op.py"), device]
    no_material = "" if material else "no shared material: set ZSQ_SHARED or carry it as .gpu/shared"
    material = material or Path("shared")
    bench = [python, "-m", "benchmarks", "--device", device]

    def rounds(count: int, seconds: float = 1) -> list[str]:  # the rehearsal is about the steps, not the numbers
        if device == "cuda":
            return ["--rounds", str(count), "--seconds", str(seconds)]
        return ["--rounds", "1", "--seconds", "0", "--no-compile"]

    found = {
        "checkpoint": material / "data" / "cifar10_resnet20_akamaster.safetensors",
        "data": material / "data" / "cifar10_test.npz",
    }
    no_data = no_material or next((f"no {p.name}" for p in found.values() if not p.exists()), "")
    required = "cpu,cuda" if device == "cuda" else "cpu"
    build = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", str(SITE), "."]
    return [
        Step("build", build, 400, settings={"ZSQ_REQUIRE_KERNELS": required} | ({} if device == "cuda" else {"ZSQ_NVCC": "none"})),
        Step("every operation", program, 120),
        Step("tests", [*pytest, *tests], 400, {"ZSQ_SHARED": str(material)}),
        *([Step("beyond 2^31 elements", [*pytest, "-k", "cuda", str(ROOT / "tests" / "test_large.py")], 120)] if device == "cuda" else []),
        Step("recorded vectors", [python, "-W", "ignore", str(material / "golden" / "check.py"), "--device", device], 120,
             lacks=no_material),
        *(
            Step(f"compute-sanitizer {tool}", [sanitizer, "--tool", tool, "--error-exitcode", "9", *options, *program], 200,
                 settings={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, lacks=no_sanitizer)
            for tool, options in (
                ("memcheck", ()), ("racecheck", ()), ("initcheck", ("--kernel-name", "kernel_substring=zsq")), ("synccheck", ()),
            )
        ),
        Step("benchmarks", [*bench, *rounds(20), "--json", str(results / "kernels_hot_pool.json")], 200),
        Step("benchmarks, cold", [*bench, *rounds(10), "--cold", "--no-compile", "--json", str(results / "kernels_cold_pool.json")],
             100),
        *([Step("benchmarks, large", [*bench, *rounds(20), "--large", "--gate", "--json", str(results / "kernels_large_pool.json")], 150)]
          if device == "cuda" else []),
        Step("benchmarks, layers", [*bench, *rounds(5, 0.25), "--no-compile", "--layers", "--json",
                                    str(results / "layers_hot_pool.json")], 120),
        Step("end to end", [python, "-m", "benchmarks.cifar10", "--checkpoint", str(found["checkpoint"]), "--data", str(found["data"]),
                            "--recipes", "ait", "--bits", "4", "--out", str(results), "--device", device,
                            *(["--set", "schedule.epochs=2", "schedule.warmup_epochs=1", "schedule.calibration_epochs=1",
                               "schedule.milestones=[]", "schedule.iterations=2", "--limit", "200"] if device == "cpu" else [])],
             300, lacks=no_data),
    ]  # fmt: skip


def run(step: Step, log: Path, left: float, patience: float = 1) -> dict[str, object]:
    """Runs the step in .gpu/site, where the build lies and no source tree hides it; its output goes to `log`. At most `left` seconds,
    and its own limit times `patience`.
    """
    if left <= 0:
        return {"outcome": "failed", "why": "no time left"}
    where = ROOT if step.name == "build" else SITE
    paths = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "ZSQ_COMMIT": commit()} | step.settings
    started = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                step.command,
                cwd=where,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(patience * step.limit, left),
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        except OSError as problem:
            file.write(str(problem))
            code = 127
    return {
        "outcome": "passed" if code == 0 else "failed",
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    ap.add_argument("--only", nargs="+", help="steps whose name begins with one of these")
    ap.add_argument("--limit", type=float, help=f"seconds for everything, {LIMIT} on a GPU; steps behind that fail")
    ap.add_argument("--out", type=Path, help="instead of benchmarks/results/<device>")
    ap.add_argument("--dry-run", action="store_true", help="print the steps and run none")
    args = ap.parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch: make gpu-check PYTHON=<the Python whose torch is to be checked>")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available() and not args.dry_run:
        print("no GPU visible to torch; `--device cpu` rehearses without one", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device == "cuda" else args.device
    results = args.out or ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    planned = [s for s in steps(args.device, results) if not args.only or s.name.startswith(tuple(args.only))]
    if args.dry_run:
        for step in planned:
            print(f"{step.name}: {'skipped, ' + step.lacks if step.lacks else ' '.join(step.command)}")
        return 0
    results.mkdir(parents=True, exist_ok=True)
    if any(step.name == "build" for step in planned):
        shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / "benchmarks", SITE / "benchmarks", dirs_exist_ok=True)
    report: dict[str, object] = {"machine": machine(args.device), "steps": (outcomes := [])}
    started, limit = time.monotonic(), args.limit or (LIMIT if args.device == "cuda" else math.inf)
    for step in planned:
        log = results / f"{re.sub(r'[^a-z]+', '_', step.name)}.log"
        outcome = (
            {"outcome": "skipped", "why": step.lacks}
            if step.lacks
            else run(step, log, limit - (time.monotonic() - started), 1 if args.device == "cuda" else 10)
        )
        outcomes.append({"name": step.name, **{k: v for k, v in asdict(step).items() if k in ("command",)}, **outcome})
        print(f"{step.name:28s} {outcome['outcome']:8s} {outcome.get('seconds', outcome.get('why'))}", flush=True)
        if outcome["outcome"] == "failed" and log.exists():
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-25:]), flush=True)
        (results / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    ended = {o["outcome"] for o in outcomes}
    return 1 if "failed" in ended else 2 if "skipped" in ended and args.device == "cuda" else 0


if __name__ == "__main__":
    raise SystemExit(main())
