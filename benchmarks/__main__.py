"""Time the kernels against a copy of the same size and against the PyTorch reference, in one process, interleaved.

    python -m benchmarks [--rounds N] [--json FILE] [--gate]

Ratios are of the fastest rounds; only they carry over from a busy machine, absolute times do not.
"""

from __future__ import annotations

from zsq_fast.process import keep_freed_memory

keep_freed_memory()

import argparse  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import zsq_fast as zsq  # noqa: E402
from benchmarks import record  # noqa: E402
from zsq_fast import reference  # noqa: E402
from zsq_fast.losses import kd_kl  # noqa: E402
from zsq_fast.models.resnet_cifar import ResNetCifar  # noqa: E402

GATES = {"inundation step, ResNet-20, batch 200": 25.0}  # least speed-up over the reference


def interleaved(
    variants: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls per variant, the variants taking turns; `before` each call is not timed."""
    best = dict.fromkeys(variants, float("inf"))
    for i in range(rounds + 1):
        for name, run in variants.items():
            before()
            started = time.perf_counter()
            run()
            if i:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - started)
    return best


class Case(NamedTuple):
    name: str
    variants: dict[str, Callable[[], Any]]  # kernel, reference, copy
    before: Callable[[], Any] = lambda: None  # not timed
    extra: dict[str, float] = {}


def inundation_case() -> Case:
    """The inundation part of one AIT student step; gradients from a real step on a network with batch-norm statistics."""
    torch.manual_seed(0)
    teacher = ResNetCifar(shortcut="B").eval().to(memory_format=torch.channels_last)
    student = zsq.convert(teacher, 4, 4, input_size=(3, 32, 32)).to(memory_format=torch.channels_last)
    images = torch.randn(200, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad(), zsq.nn.calibrating(student):
        for _ in range(200):
            student(images[:20])
    weights = list(zsq.nn.quantized_weights(student).values())
    started = time.perf_counter()
    kd_kl(student(images), teacher(images).detach()).backward()
    step_seconds = time.perf_counter() - started
    optimizer = zsq.optim.GISGD(weights, lr=1e-4)
    optimizer.step()  # momentum buffers exist and hold something from here on
    start = [w.detach().clone() for w in weights]
    momenta = [optimizer.state[w]["momentum_buffer"] for w in weights]
    start_momenta = [m.clone() for m in momenta]
    options = (1e-4, 0.9, True, 0.0, 4, 1e-3, 5, False)

    def restore() -> None:
        torch._foreach_copy_([w.data for w in weights], start)
        torch._foreach_copy_(momenta, start_momenta)

    def theirs() -> None:
        with torch.no_grad():
            reference.gi_sgd_(weights, [w.grad for w in weights], momenta, optimizer.kappa, optimizer.changed, *options)

    variants: dict[str, Callable[[], Any]] = {"kernel": optimizer.step, "reference": theirs, "copy": restore}
    return Case("inundation step, ResNet-20, batch 200", variants, restore, {"forward_backward_ms": step_seconds * 1e3})


def cases() -> list[Case]:
    w, x = torch.randn(512, 512, 3, 3), torch.randn(200, 64, 32, 32).relu()
    lo, hi = torch.tensor(0.0), torch.tensor(3.0)
    states = [[torch.tensor(0.0), torch.tensor(3.0), torch.tensor(0.5)] for _ in range(2)]
    mean, var = torch.zeros(64), torch.ones(64)
    one = torch.tensor(1.0)
    statistics = reference.bn_stats_match(x, mean, var)[1:]
    spare_w, spare_x = torch.empty_like(w), torch.empty_like(x)
    Call = Callable[[], Any]
    copy_w: Call = lambda: spare_w.copy_(w)  # noqa: E731
    copy_x: Call = lambda: spare_x.copy_(x)  # noqa: E731
    small = [torch.randn(16, 16, 3, 3) for _ in range(22)]
    small_x = torch.randn(64, 16, 32, 32, requires_grad=True)

    def ste(y: torch.Tensor) -> torch.Tensor:  # the straight-through estimator in plain PyTorch
        return y + (reference.fake_quant_act(y, lo, hi, 4) - y).detach()

    triples: list[tuple[str, Call, Call, Call]] = [
        (
            "weight range + fake quantization, 512x512x3x3",
            lambda: zsq.ops.fake_quant_weight(w, 4),
            lambda: reference.fake_quant_weight(w, 4),
            copy_w,
        ),
        (
            "weight fake quantization, 22 layers 16x16x3x3",
            lambda: [zsq.ops.fake_quant_weight(s, 4) for s in small],
            lambda: [reference.fake_quant_weight(s, 4) for s in small],
            lambda: [s.clone() for s in small],
        ),
        (
            "activation fake quantization, 52 MB, frozen range",
            lambda: zsq.ops.fake_quant_act(x, lo, hi, 4),
            lambda: reference.fake_quant_act(x, lo, hi, 4),
            copy_x,
        ),
        (
            "activation fake quantization, 52 MB, running range",
            lambda: zsq.ops.fake_quant_act_running(x, *states[0], 4),
            lambda: reference.fake_quant_act_running(x, *states[1], 4, 0.9, False),
            copy_x,
        ),
        (
            "activation quantizer forward + backward, 4 MB",
            lambda: zsq.ops.fake_quant_act(small_x, lo, hi, 4).sum().backward(),
            lambda: ste(small_x).sum().backward(),
            lambda: F.relu(small_x).sum().backward(),
        ),
        (
            "BN-statistics loss forward, 52 MB",
            lambda: zsq.ops.bn_stats_match(x, mean, var),
            lambda: reference.bn_stats_match(x, mean, var),
            copy_x,
        ),
        (
            "BN-statistics loss backward, 52 MB",
            lambda: torch.ops.zsq.bn_stats_match_backward(one, x, mean, var, *statistics),
            lambda: reference.bn_stats_match_backward(one, x, mean, var, *statistics),
            copy_x,
        ),
    ]
    rows = [Case(name, {"kernel": run, "reference": ref, "copy": copy}) for name, run, ref, copy in triples]
    return [inundation_case(), *rows]


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=15)
    ap.add_argument("--json", type=Path, help="write a record with the environment")
    ap.add_argument("--gate", action="store_true", help="exit 1 when a ratio falls below its gate")
    args = ap.parse_args()
    table, failed = [], []
    print(f"{'':52s} {'kernel ms':>10s} {'reference':>10s} {'copy':>8s} {'x reference':>12s} {'x copy time':>12s}")
    for name, variants, before, extra in cases():
        best = interleaved(variants, args.rounds, before)
        ratio = best["reference"] / best["kernel"]
        columns = f"{best['kernel'] * 1e3:10.3f} {best['reference'] * 1e3:10.3f} {best['copy'] * 1e3:8.3f}"
        print(f"{name:52s} {columns} {ratio:12.1f} {best['kernel'] / best['copy']:12.2f}", flush=True)
        table.append({"case": name, "seconds": best, "speedup_over_reference": ratio, **extra})
        if ratio < GATES.get(name, 0.0):
            failed.append(f"{name}: {ratio:.1f} times the reference, the gate is {GATES[name]:.0f}")
    if args.json:
        record.write(
            args.json,
            {
                "what": "fastest of the rounds, in seconds",
                "rounds": args.rounds,
                "environment": record.environment(),
                "cases": table,
            },
        )
    print("\n".join(failed) or "gates hold")
    return 1 if failed and args.gate else 0


if __name__ == "__main__":
    raise SystemExit(main())
