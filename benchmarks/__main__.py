"""Time every kernel against plain PyTorch, PyTorch's own operations, torch.compile and a copy: one process, taking turns.

    python -m benchmarks [--only WORDS] [--layers | --large] [--rounds N] [--seconds S] [--cold] [--memory M] [--device D]
                         [--json FILE] [--gate]

Every timed call follows an untimed one of the same variant (hot caches) or 256 MB of other data (`--cold`).
Ratios are of the fastest rounds; only they carry over from a busy machine, absolute times do not.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import zsq_fast as zsq
from benchmarks import record
from benchmarks.cases import CASES, Case, gpu_cases, layer_cases

Samples = dict[str, list[float]]
OTHERS = ("reference", "aten", "compile", "copy")
LEAST_SECONDS, MOST_ROUNDS = 1.0, 400  # of a case; what lasts longer has the rounds asked for
# With --gate, a case below its gate gets that many rounds more again, so far apart. The fastest round of every variant, the
# reference's too, can only become faster: a kernel that is too slow stays so, one that was disturbed by others on the machine does not.
PATIENCE, PAUSE = 20, 8.0


def timer(device: str) -> Callable[[Callable[[], Any]], float]:
    """Seconds of one call, on the GPU measured there, launches included."""

    def on_cpu(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def on_gpu(run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_gpu if device == "cuda" else on_cpu


def settle_malloc(keep: bool) -> None:
    """glibc's malloc maps an array afresh, page fault by page fault, or finds it in the heap, depending on the sizes that the process
    has freed before: left alone, the same reference call differs by a factor of four between two runs. This makes it map 128 KiB and
    more every time, as at the start of a process, or never give anything back.
    """
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    options = {trim_threshold: -1, mmap_max: 0} if keep else {mmap_threshold: 128 << 10}
    if not (hasattr(libc, "mallopt") and all(libc.mallopt(*option) for option in options.items())):
        raise SystemExit("this C library's malloc cannot be told when to keep memory: only --device cuda works here")


def measure(
    case: Case,
    rounds: int,
    device: str,
    cold: bool,
    fresh: bool,
    least: float = LEAST_SECONDS,
    before: Samples | None = None,
) -> Samples:
    """Seconds of every round of every variant, the variants taking turns after three rounds of warming up; `before`, and these after it.

    Until `least` seconds have passed there are more rounds than asked for: the fastest of a few calls of 30 us is an accident. Every
    timed call follows one of the same variant, which leaves in the caches what fits there, or, cold, 256 MB of other data.
    """
    seconds, spoil = timer(device), torch.ones(1 << 26, device=device) if cold else None
    samples: Samples = {name: list((before or {}).get(name, ())) for name in case.variants}
    started = time.perf_counter()
    for i in itertools.count(-3):
        if i >= rounds and (time.perf_counter() - started > least or i >= MOST_ROUNDS):
            return samples
        for name, run in case.variants.items():
            case.before()
            if spoil is None:
                run()
                case.before()
            else:
                spoil.add_(1)
            if fresh:
                zsq.ops.release_memory()
            taken = seconds(run)
            if i >= 0:
                samples[name].append(taken)
    raise AssertionError  # the loop never ends by itself


def row(case: Case, samples: Samples) -> dict[str, Any]:
    best = {name: min(values) for name, values in samples.items()}
    kernel = best["kernel"]
    of_copy = (case.size / kernel) / (case.copied / best["copy"]) if "copy" in best and case.copied else None
    return {
        "case": case.name,
        "gigabytes_per_second": case.size / kernel / 1e9,
        "share_of_copy_bandwidth": of_copy,
        "ratios": {name: best[name] / kernel for name in OTHERS if name in best},
        "median_ratios": {
            name: median(samples[name]) / median(samples["kernel"]) for name in OTHERS if name in samples
        },
        "gates": case.gates,
        "moonshots": case.moonshots,
        "seconds": best,
        "samples": {name: [float(f"{x:.4g}") for x in values] for name, values in samples.items()},
    }


def below_gate(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['case']}: {result['ratios'][name]:.1f} times as fast as {name}, the gate is {gate:g}"
        for name, gate in result["gates"].items()
        if result["ratios"][name] < gate
    ]


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=15, help="at least")
    ap.add_argument(
        "--seconds", type=float, default=LEAST_SECONDS, help=f"of every case, at least, or {MOST_ROUNDS} rounds"
    )
    ap.add_argument("--only", help="cases whose name contains this")
    ap.add_argument("--layers", action="store_true", help="layer shapes of real networks instead of the gated cases")
    ap.add_argument(
        "--large", action="store_true", help="what is promised for an H200, with its gates, instead of a CPU's cases"
    )
    ap.add_argument("--cold", action="store_true", help="256 MB go through the caches before every call")
    ap.add_argument(
        "--memory",
        choices=["default", "mapped", "kept", "fresh"],
        help="results of the others on the CPU: as malloc pleases; always mapped afresh (with --gate the default); kept as ours are; "
        "ours mapped afresh too",
    )
    ap.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes to compile")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--json", type=Path, help="write a record with the environment and every sample")
    ap.add_argument(
        "--gate",
        action="store_true",
        help=f"exit 1 when a ratio is below its gate (two CPU cores), even with up to {PATIENCE} times more rounds, {PAUSE:g} s apart",
    )
    args = ap.parse_args()
    args.memory = args.memory or ("mapped" if args.gate else "default")
    if args.device == "cpu" and args.memory != "default":
        settle_malloc(args.memory == "kept")
    if args.layers:
        cases = (make(args.device) for make in layer_cases())
    else:
        cases = gpu_cases(args.device) if args.large else (make(args.device) for make in CASES)
    results, failed = [], []
    print(f"{'':94s} {'kernel ms':>9s} {'GB/s':>6s} {'of copy':>7s}" + "".join(f"{name:>11s}" for name in OTHERS))
    for case in cases:
        if args.only and args.only not in case.name:
            continue
        if args.no_compile:
            case.variants.pop("compile", None), case.gates.pop("compile", None)
        torch.compiler.reset()  # else the tenth shape of a function would be one too many
        samples = measure(case, args.rounds, args.device, args.cold, args.memory == "fresh", args.seconds)
        result = row(case, samples)
        for _ in range(PATIENCE if args.gate else 0):
            if not below_gate(result):
                break
            time.sleep(PAUSE)
            samples = measure(case, args.rounds, args.device, args.cold, args.memory == "fresh", args.seconds, samples)
            result = row(case, samples)
        ratios = "".join(f"{result['ratios'].get(name, float('nan')):10.1f}x" for name in OTHERS).replace(
            "nanx", "  - "
        )
        share = result["share_of_copy_bandwidth"]
        print(
            f"{case.name:94s} {result['seconds']['kernel'] * 1e3:9.3f} {result['gigabytes_per_second']:6.1f} "
            f"{'-' if share is None else f'{100 * share:.0f} %':>7s}{ratios}",
            flush=True,
        )
        results.append(result)
        failed += below_gate(result)
    if args.json:
        record.write(
            args.json,
            {
                "what": "seconds per call; ratios are time of the other over time of the kernel, of the fastest rounds",
                "rounds": args.rounds,
                "device": args.device,
                "caches": "cold" if args.cold else "hot",
                "memory": args.memory if args.device == "cpu" else "pool",
                "environment": record.environment(),
                "cases": results,
            },
        )
    gated = sum(len(result["gates"]) for result in results)
    print("\n".join(failed) or (f"{gated} gates hold" if gated else "no case with a gate was measured"))
    return 1 if args.gate and (failed or not gated) else 0


if __name__ == "__main__":
    raise SystemExit(main())
