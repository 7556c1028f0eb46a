"""What the CUDA compiler made of every kernel, without a GPU: python -m benchmarks.resources [--arch sm_90]

Registers, shared memory, spills, 16-byte and narrower accesses to memory (from the machine code), resident warps, and the share of
memory bandwidth this predicts: an H200 needs about 26 KB of loads under way per SM (4.8 TB/s times 0.75 us over 132 SMs); warps that
each keep their four widest loads under way give less or more than that, and 92 % of a copy is the most that is expected of any kernel.
A limit from memory alone: a kernel that computes more than it moves stays below it.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).parents[1]
REGISTERS, WARPS, SHARED = 65536, 64, 227 * 1024  # per SM of compute capability 9.0
NEEDED, CEILING = 26 * 1024, 0.92
UNDER_WAY = 4  # loads of a thread
LOADED = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes by the instruction's suffix; without one 4


def disassembler() -> str:
    """cuobjdump of the toolkit, or the one that comes with triton."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path("/")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))
    if not found:
        raise SystemExit("cuobjdump is neither on PATH nor in triton")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def demangled(names: list[str]) -> list[str]:
    said = run("c++filt", *names).splitlines()
    short = [re.sub(r"zsq::cuda::|zsq::|\(anonymous namespace\)::|^void ", "", s) for s in said]
    return [re.sub(r"\(.*", "", re.sub(r"\((?:\w+::)*\w+\)(?=\d)", "", s)) for s in short]


def resident_warps(registers: int, threads: int, shared: int) -> int:
    warps = threads // 32
    blocks = min(WARPS // warps, REGISTERS // (-(-registers // 8) * 8 * threads), 32)
    if shared:
        blocks = min(blocks, SHARED // (shared + 1024))
    return blocks * warps


def bytes_loaded(operation: str) -> int:
    return next((LOADED[part] for part in operation.split(".") if part in LOADED), 4)


def kernels(source: Path, arch: str, folder: Path) -> list[dict[str, Any]]:
    binary = folder / f"{source.stem}.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch={arch}", "-Xptxas", "-v", "-cubin"]
    said = run("nvcc", *flags, "-o", str(binary), str(source))
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers(.*?)\n"
    compiled = {m[0]: m[1:] for m in re.findall(pattern, said, re.DOTALL)}
    code: dict[str, Counter[str]] = {}
    at = ""
    for line in run(disassembler(), "-sass", str(binary)).splitlines():
        if m := re.search(r"Function : (\w+)", line):
            code[at := m[1]] = Counter()
        elif m := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            code[at][m[1]] += 1
    rows = []
    for mangled, name in zip(compiled, demangled(list(compiled)), strict=True):
        stack, spills, registers, more = compiled[mangled]
        shared = re.search(r"(\d+) bytes smem", more)
        count = code[mangled]

        def accesses(kind: str, wide: bool | None = None, count: Counter[str] = count) -> int:
            return sum(n for op, n in count.items() if op.split(".")[0] == kind and wide in (None, ".128" in op))

        warps = resident_warps(int(registers), 256, int(shared[1]) if shared else 0)
        widths = sorted(bytes_loaded(op) for op in count.elements() if op.split(".")[0] == "LDG")
        in_flight = warps * 32 * sum(widths[-UNDER_WAY:])
        rows.append(
            {
                "source": source.name, "kernel": name, "registers": int(registers), "stack_bytes": int(stack),
                "spill_bytes": int(spills), "shared_bytes": int(shared[1]) if shared else 0, "resident_warps": warps,
                "loads_16_bytes": accesses("LDG", True), "loads_narrower": accesses("LDG", False),
                "stores_16_bytes": accesses("STG", True), "stores_narrower": accesses("STG", False),
                "local_accesses": accesses("LDL") + accesses("STL"), "instructions": sum(count.values()),
                "predicted_share_of_copy": round(CEILING * min(1.0, in_flight / NEEDED), 2) if in_flight else None,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--arch", default="sm_90")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            for row in kernels(source, args.arch, Path(folder))
        ]
    for row in rows:
        wide, narrow = row["loads_16_bytes"] + row["stores_16_bytes"], row["loads_narrower"] + row["stores_narrower"]
        print(
            f"{row['kernel']:90s} {row['registers']:4d} registers {row['spill_bytes']:3d} spilled {row['resident_warps']:3d} warps "
            f"{wide:4d} wide {narrow:4d} narrow"
        )
    record.write(
        record.RESULTS / f"cuda_resources_{args.arch}.json",
        {"what": __doc__, "arch": args.arch, "nvcc": run("nvcc", "--version").splitlines()[-2],
         "environment": record.environment(), "kernels": rows},
    )  # fmt: skip


if __name__ == "__main__":
    main()
