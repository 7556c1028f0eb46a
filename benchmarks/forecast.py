"""The calibration of the forecast of the accuracy drop: the committed records whose students were measured on held-out images.

    python -m benchmarks.forecast            # what there is, and the error on recipes left out
    python -m benchmarks.forecast --write    # into the package, zsq_fast/analysis/forecast.json

Only last epochs count: their accuracies are those of all test images, whichever epochs were measured in between.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import zsq_fast
from benchmarks import record
from zsq_fast.analysis.forecast import DATA, Calibration, Point, trained_on
from zsq_fast.errors import UsageError

PATTERN = "cifar10_resnet20_*.json"
INPUT_SIZE, CLASSES = (3, 32, 32), 10  # of CIFAR-10
TEST_IMAGES = 10_000  # a record of fewer is a rehearsal


def parameters(folder: Path, names: Sequence[str]) -> int:
    """Of the float network of these records, of which there is one. Raises ValueError: two networks."""
    held = (json.loads((folder / name).read_text()) for name in names)
    students = (student for record in held for student in record.get("students", {"": record}).values())
    (size,) = {student["summary"]["float_bytes"] for student in students if "summary" in student}
    return int(size) // 4


def points(folder: Path) -> Iterator[Point]:
    """Every student of the records in a folder whose last epoch has both held-out figures and an accuracy, once: two ablations may
    hold the same one."""
    seen = set[str]()
    for file in sorted(folder.glob(PATTERN)):
        held: dict[str, Any] = json.loads(file.read_text())
        if held.get("test_images") != TEST_IMAGES:
            continue
        for name, student in held.get("students", {"": held}).items():
            last = (student.get("history") or [{}])[-1]
            if "held_out_kl" not in last or "last" not in student.get("results", {}):
                continue
            recipe, top1 = student["recipe"], student["results"]
            if (same := json.dumps([recipe, held.get("seed")], sort_keys=True)) in seen:
                continue
            seen.add(same)
            quant = recipe["quant"]
            yield Point(
                file.name + (f" {name}" if name else ""),
                recipe["name"],
                quant.get("average_weight_bits") or quant["weight_bits"],
                quant["act_bits"],
                last["held_out_agreement"],
                last["held_out_kl"],
                round(top1["float"] - top1["last"], 2),
                trained_on(recipe["images"]["enabled"]),
            )


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--write", action="store_true", help="write the points into the package")
    ap.add_argument("--records", type=Path, default=record.RESULTS)
    ap.add_argument("--out", type=Path, default=Path(zsq_fast.__file__).parent / "analysis" / DATA)
    args = ap.parse_args()
    found = list(points(args.records))
    summary = {}
    for images in map(trained_on, (True, False)):
        try:
            summary[images] = str(Calibration([p for p in found if p.images == images]))
        except UsageError as error:
            summary[images] = str(error)
        print(f"{images} images: {summary[images]}")
    if args.write:
        environment = record.environment()
        files = sorted({point.record.split()[0] for point in found})
        held = {
            "what": "last epochs of the records in benchmarks/results, by `python -m benchmarks.forecast --write`",
            "network": "ResNet-20 on CIFAR-10, all 10,000 test images",
            "calibrated_on": {
                "parameters": parameters(args.records, files),
                "input_size": INPUT_SIZE,
                "classes": CLASSES,
            },
            "commit": environment["commit"],
            "date": environment["date"],
            "calibration": summary,
            "points": [asdict(point) for point in found],
        }
        record.write(args.out, held)
        print(f"{len(found)} points: {args.out}")


if __name__ == "__main__":
    main()
