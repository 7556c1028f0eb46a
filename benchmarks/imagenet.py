"""Every recipe on ImageNet-sized networks at 224 x 224: minutes per 1,000 iterations and peak memory, a few iterations of each measured.

    python -m benchmarks.imagenet [--models NAME ...] [--recipes NAME ...] [--json FILE] [--again]

The networks have random weights: nothing here depends on their values. Every pair runs in a process of its own, whose peak resident
memory is recorded; batches are those of the short schedule: 16 images a step as published, image sets in batches of 32 instead of 256.
On one thread of a CPU (OMP_NUM_THREADS=1) minutes are those that the process computed, so that other jobs on the machine do not count.
Pairs that the record has already are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import zsq_fast as zsq
from benchmarks import record
from zsq_fast.methods.estimate import estimate
from zsq_fast.models import load_model

MODELS = ["torchvision:resnet18", "torchvision:mobilenet_v2", "pytorchcv:resnet18", "pytorchcv:mobilenetv2_w1"]
SIZE = (3, 224, 224)
RECIPES = sorted(name for name in zsq.methods.available_recipes() if "cifar" not in name)
SET = ["schedule.held_out=0"]


def one(model: str, recipe: str) -> dict[str, object]:
    """Measured in this process."""
    torch.manual_seed(0)
    teacher = load_model(model).model
    short = zsq.load_recipe(recipe, input_size=SIZE, schedule="short", overrides=SET)
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    cost = estimate(teacher, short, input_size=SIZE, force=True, now=now)
    stages = {stage.name: round(stage.each * 1000 / 60, 1) for stage in cost.stages}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"minutes_per_1000": stages, "peak_bytes": peak}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--models", nargs="+", default=MODELS)
    ap.add_argument("--recipes", nargs="+", default=RECIPES)
    ap.add_argument("--json", type=Path, default=record.RESULTS / "imagenet_minutes.json")
    ap.add_argument("--again", action="store_true", help="also what the record has already")
    ap.add_argument("--one", nargs=2, metavar=("MODEL", "RECIPE"), help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return 0
    found = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows = {(row["model"], row["recipe"]): row for row in found}
    for pair in itertools.product(args.models, args.recipes):
        if not args.again and pair in rows and "error" not in rows[pair]:
            continue
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.imagenet", "--one", *pair]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines() or ["no output"]
        row = json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1]}
        rows[pair] = {"model": pair[0], "recipe": pair[1], **row, "environment": record.environment()}
        print(pair, row, flush=True)
        about = {"what": "minutes per 1,000 iterations, peak resident memory of the process"}
        record.write(args.json, {**about, "rows": list(rows.values())})  # after every row: the whole takes an hour
    return 1 if any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
