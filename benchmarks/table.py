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


def accuracy() -> str:
    records = _load("cifar10_resnet20_*_seed*.json")
    first = records[0][1]
    schedule, machine = first["recipe"]["schedule"], first["environment"]
    images = first["test_images"]
    student_steps = (schedule["epochs"] - schedule["warmup_epochs"]) * schedule["iterations"]
    warmup_steps, machine_name = schedule["warmup_epochs"] * schedule["iterations"], machine["processor"]
    lines = [
        f"CIFAR-10, ResNet-20, top-1 on the {images:,} real test images at the **last** epoch; "
        f"float {first['results']['float']:.2f} %. Short schedule: {warmup_steps} generator-only and {student_steps:,} student steps at "
        f"batch {schedule['batch_size']} (the papers take 80,000 at 200), seed {first['seed']}, {machine['threads']} cores of an "
        f"{machine_name}. The milestones of this schedule were set after a look at the first 2,000 test images of an unfinished run; "
        "nothing else was chosen by test images, no epoch either.",
        "",
        "| bits | round to nearest | " + " | ".join(TITLES.values()) + " | minutes each | packed |",
        "|---|" + "---:|" * (len(TITLES) + 3),
    ]
    by_key = {(r["recipe"]["quant"]["weight_bits"], r["recipe"]["name"]): (p, r) for p, r in records}
    assert len(by_key) == len(records) and all(r["recipe"]["schedule"] == schedule for _, r in records), (
        "records do not mix"
    )
    for bits in sorted({bits for bits, _ in by_key}, reverse=True):
        row = [by_key[bits, name] for name in TITLES]
        assert len({r["results"]["rtn"] for _, r in row}) == 1  # the same calibrated network before its first step
        cells = [f"[{r['results']['last']:.2f}](benchmarks/results/{p.name})" for p, r in row]
        minutes = [r["minutes"] for _, r in row]
        size = row[0][1]["summary"]
        lines.append(
            f"| W{bits}A{bits} | {row[0][1]['results']['rtn']:.2f} | {' | '.join(cells)} | {max(minutes):.0f} | "
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
