"""What it costs a training to track gradient cosines and update ratios: students that differ in nothing else, step by step in turns.

    python -m benchmarks.tracking --checkpoint cifar10_resnet20.safetensors [--recipes ait hast] [--json FILE]

A student's seconds are those of its own steps; the images, which all share, come on top of them in a run. "again" is a second student
without tracking: how far its seconds lie from those of the first is what these measurements cannot tell apart. Net updates cost less
than that, so their comparison, once per epoch, is timed by itself too ("alone").
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import zsq_fast as zsq
from benchmarks import record
from zsq_fast.cli.quantize import COSINE_EVERY
from zsq_fast.methods import Progress, Result, run_together
from zsq_fast.models import load_model

COSINE = COSINE_EVERY
TRACKING: dict[str, dict[str, Any]] = {
    "none": {},
    "again": {},
    "cosine": {"track_cosine": COSINE},
    "updates": {"track_updates": True},
}
# The ranges take one epoch, the students one; the images that HAST trains on may be of any quality.
SHORT = [
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "schedule.calibration_epochs=1",
    "schedule.held_out=0",
    "quant.ema=plain",
]
IMAGES = ["images.count=256", "images.iterations=2"]


class Clock:
    """In place of an evaluation: notes how many seconds the student has spent."""

    trainer: zsq.Trainer

    def __init__(self) -> None:
        self.noted: list[float] = []

    def __call__(self, _: torch.nn.Module) -> float:
        self.noted.append(self.trainer.state.seconds)
        return 0.0

    @property
    def student_seconds(self) -> float:
        """Without the warm-up, whose last iteration alone is still in it: it is noted when that has ended."""
        return self.trainer.state.seconds - self.noted[-2]


def measure(teacher: torch.nn.Module, name: str, iterations: int) -> list[dict[str, Any]]:
    """One row per tracking: seconds of a student's step, and how much longer it takes than without."""
    overrides = [*SHORT, f"schedule.iterations={iterations}", *(IMAGES if "hast" in name else [])]
    recipe = zsq.load_recipe(name, input_size=(3, 32, 32), schedule="short", overrides=overrides)
    trainers: list[zsq.Trainer] = []
    clocks = {tracking: Clock() for tracking in TRACKING}
    for tracking, options in TRACKING.items():
        first = trainers[0] if trainers else None
        progress = None if first else Progress()
        trainer = zsq.Trainer(
            teacher,
            recipe,
            input_size=(3, 32, 32),
            share=first,
            progress=progress,
            evaluate=clocks[tracking],
            **options,
        )
        trainers.append(trainer)
        clocks[tracking].trainer = trainer
    results = run_together(trainers)
    assert all(isinstance(result, Result) for result in results), results
    seconds = {tracking: clock.student_seconds / iterations for tracking, clock in clocks.items()}
    rows: list[dict[str, Any]] = [
        {"recipe": name, "tracking": t, "seconds_per_step": s, "added_percent": 100 * (s / seconds["none"] - 1)}
        for t, s in seconds.items()
    ]
    epoch = iterations * seconds["none"]
    rows[list(TRACKING).index("updates")]["alone_percent"] = 100 * comparison(clocks["updates"].trainer) / epoch
    return rows


def comparison(trainer: zsq.Trainer) -> float:
    """Seconds of one comparison of all codes, the median of nine."""
    assert trainer.updates is not None
    taken = []
    for _ in range(9):
        started = time.perf_counter()
        trainer.updates.next_epoch()
        taken.append(time.perf_counter() - started)
    return median(taken)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--checkpoint", required=True)
    ap.add_argument("--recipes", nargs="+", default=["kl_only", "ait", "hast"])
    ap.add_argument("--iterations", type=int, default=200, help="student steps; also those of an epoch")
    ap.add_argument("--json", type=Path, default=record.RESULTS / "tracking_cifar10_resnet20.json")
    args = ap.parse_args()
    teacher = load_model("resnet20", args.checkpoint).model
    rows = []
    for name in args.recipes:
        rows += measure(teacher, name, args.iterations)
        for row in rows[-len(TRACKING) :]:
            print(
                f"{row['recipe']:<10}{row['tracking']:<10}{1000 * row['seconds_per_step']:8.1f} ms{row['added_percent']:+8.2f} %"
            )
    about = {
        "what": "CIFAR-10 ResNet-20: seconds of a student's step, and how much longer it takes than one that tracks nothing",
        "cosine_every": COSINE, "updates_every": args.iterations, "environment": record.environment(),
    }  # fmt: skip
    record.write(args.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
