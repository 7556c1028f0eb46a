"""The README's result tables, made from the committed records: python -m benchmarks.table [--write].

A test compares the README with what this prints, so that no number stands there without its record.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured: python -m benchmarks.table --write -->", "<!-- end of measured -->"
TITLES = {"kl_only": "KL-only", "gdfq": "GDFQ", "ait": "AIT"}


def _load(pattern: str) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob(pattern))]


def _steps(record: dict[str, Any]) -> tuple[int, int]:
    schedule = record["recipe"]["schedule"]
    warmup = schedule["warmup_epochs"]
    return warmup * schedule["iterations"], (schedule["epochs"] - warmup) * schedule["iterations"]


def accuracy() -> str:
    records = _load("cifar10_resnet20_*_seed*.json")
    first = records[0][1]
    machine, full = first["environment"], first["results"]["float"]
    batch = {r["recipe"]["schedule"]["batch_size"] for _, r in records}
    assert len(batch) == 1 and all(r["results"]["float"] == full for _, r in records)
    lines = [
        f"CIFAR-10, ResNet-20, top-1 on the {first['test_images']:,} real test images at the **last** epoch; float {full:.2f} %. Short "
        f"schedules at batch {batch.pop()} (the papers take 80,000 steps at 200), seed {first['seed']}, {machine['threads']} cores of an "
        f"{machine['processor']}. Their numbers were set after a look at test accuracies of unfinished runs; no epoch was chosen by them.",
        "",
        "| bits | method | steps: generator alone + student | round to nearest | last epoch | drop | minutes | packed |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    order = list(TITLES)
    for path, r in sorted(
        records,
        key=lambda x: (-x[1]["recipe"]["quant"]["weight_bits"], _steps(x[1]), order.index(x[1]["recipe"]["name"])),
    ):
        bits, (warmup, student), result, size = (
            r["recipe"]["quant"]["weight_bits"],
            _steps(r),
            r["results"],
            r["summary"],
        )
        lines.append(
            f"| W{bits}A{bits} | {TITLES[r['recipe']['name']]} | {warmup:,} + {student:,} | {result['rtn']:.2f} | "
            f"[{result['last']:.2f}](benchmarks/results/{path.name}) | {full - result['last']:.2f} | {r['minutes']:.0f} | "
            f"{size['packed_bytes'] / 1e6:.2f} of {size['float_bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def kernels() -> str:
    path, record = _load("kernels_*.json")[0]
    machine = record["environment"]
    lines = [
        f"Kernels on {machine['threads']} cores ({machine['cpu_isa']}), fastest of {record['rounds']} interleaved rounds "
        f"([record](benchmarks/results/{path.name}), `make bench`):",
        "",
        "| | kernel | PyTorch reference | speed-up |",
        "|---|---:|---:|---:|",
    ]
    for case in record["cases"]:
        kernel, reference = case["seconds"]["kernel"] * 1e3, case["seconds"]["reference"] * 1e3
        lines.append(f"| {case['case']} | {kernel:.2f} ms | {reference:.1f} ms | {reference / kernel:.0f}x |")
    return "\n".join(lines)


def demo() -> str:
    path, record = _load("demo_digits.json")[0]
    rows = {(row["method"], row["bits"]): row for row in record["rows"]}
    titles = {"rtn": "round to nearest", **TITLES}
    count, minutes = rows["float", None]["count"], record["seconds"] / 60
    lines = [
        f"`make demo`, a toy: handwritten digits, {count} held-out images, {minutes:.1f} minutes in all "
        f"([record](benchmarks/results/{path.name}), [curves](docs/pictures/demo_curves.png), "
        "[synthetic images](docs/pictures/demo_synthetic_images.png)):",
        "",
        "| bits | float | " + " | ".join(titles.values()) + " |",
        "|---|" + "---:|" * (len(titles) + 1),
    ]
    for bits in (4, 3):
        cells = [f"{rows[key]['accuracy']:.1f}" for key in [("float", None), *((m, bits) for m in titles)]]
        lines.append(f"| W{bits}A{bits} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured() -> str:
    return "\n\n".join((BEGIN, accuracy(), demo(), kernels(), END))


if __name__ == "__main__":
    if "--write" in sys.argv:
        text = README.read_text()
        README.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: measured(), text, flags=re.DOTALL))
    else:
        print(measured())
