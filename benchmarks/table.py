"""The measured parts of README.md and of pages in docs/, made from the committed records: python -m benchmarks.table [--write].

A test compares the pages with what this makes, so that no number stands there without its record. `--write` also draws the picture.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from zsq_fast import papers

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: python -m benchmarks.table --write -->", "<!-- end of measured -->"
TITLES = {
    "rtn": "round to nearest",
    "gdfq": "GDFQ",
    "autorecon": "AutoReCon",
    "qimera": "Qimera",
    "kl_only": "KL-only",
    "ait": "AIT",
    "ait_adam": "AIT with Adam",
    "ait_rmsprop": "AIT with RMSprop",
    "autorecon_ait": "AutoReCon + AIT",
    "qimera_ait": "Qimera + AIT",
    "zeroq_calibrated": "ZeroQ, calibration only",
    "zeroq": "ZeroQ images, fine-tuned",
    "zeroq_mixed": "ZeroQ, mixed weight precision",
    "intraq": "IntraQ",
    "plf": "PLF",
    "hast": "HAST",
    "hast_ait": "HAST + AIT",
    "hast_squant": "HAST from SQuant's rounding",
    "hast_averaged": "HAST from SQuant's rounding, averaged weights",
    "hast_lsq": "HAST with learned ranges (another quantizer)",
    "synq": "SynQ",
}


IMAGENET_STAGES = ("image iterations", "generator steps", "student steps")


def _load(pattern: str) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob(pattern))]


def _records(bits: int) -> list[tuple[Path, dict[str, Any]]]:
    """The recorded CIFAR-10 students of a bit width, by method."""
    found = [(p, r) for p, r in _load("cifar10_resnet20_*_seed*.json") if "results" in r]
    order = list(TITLES)
    return sorted(
        ((p, r) for p, r in found if r["recipe"]["quant"]["weight_bits"] == bits),
        key=lambda x: (order.index(x[1]["recipe"]["name"]), -x[1]["results"]["last"]),
    )


def _steps(record: dict[str, Any]) -> tuple[int, int]:
    """Of the generator before the student begins, and of the student."""
    schedule = record["recipe"]["schedule"]
    warmup = schedule["warmup_epochs"]
    return warmup * schedule["iterations"], (schedule["epochs"] - warmup) * schedule["iterations"]


def accuracy() -> str:
    """The README's table: the last epoch of every method, best first."""
    four, three = ({r["recipe"]["name"]: (p, r) for p, r in _records(bits)} for bits in (4, 3))
    first = next(iter(four.values()))[1]
    full, machine = first["results"]["float"], first["environment"]
    assert all(r["results"]["float"] == full for _, r in [*four.values(), *three.values()])
    lines = [
        f"CIFAR-10, ResNet-20, top-1 on the {first['test_images']:,} real test images at the **last** epoch; float {full:.2f} %. "
        f"The stated short schedules at batch 64 (published: 29,400 to 80,000 steps at 200 or 256), seed {first['seed']}, "
        f"{machine['threads']} core{'s' * (machine['threads'] > 1)} of an "
        f"{machine['processor']}; all numbers and the papers' beside them: [docs/results.md](docs/results.md).",
        "",
        "| method | student steps | W4A4 | drop | W3A3 | drop |",
        "|---|---:|---:|---:|---:|---:|",
    ]

    def cells(found: tuple[Path, dict[str, Any]] | None) -> str:
        if found is None:
            return " | "
        path, r = found
        return f"[{r['results']['last']:.2f}](benchmarks/results/{path.name}) | {full - r['results']['last']:.2f}"

    rtn = {bits: max(r["results"]["rtn"] for _, r in _records(bits)) for bits in (4, 3)}
    lines.append(
        f"| round to nearest (best of them) | 0 | {rtn[4]:.2f} | {full - rtn[4]:.2f} | {rtn[3]:.2f} | {full - rtn[3]:.2f} |"
    )
    for name in sorted({*four} - {"rtn"}, key=lambda n: three[n][1]["results"]["last"] if n in three else 0):
        steps = _steps(four[name][1])[1]
        lines.append(f"| {TITLES[name]} | {steps:,} | {cells(four[name])} | {cells(three.get(name))} |")
    return "\n".join(lines)


def _published(bits: int) -> dict[str, papers.Row]:
    """The papers' CIFAR-10 row of a recipe as it stands, its own paper's before those of others, W3A3 often from later tables."""
    rows = [row for paper in papers.papers() for row in papers.rows(paper).values()]
    found: dict[str, papers.Row] = {}
    for row in sorted(rows, key=lambda r: not r.id.startswith(f"{r.recipe}/")):
        if f"-cifar10-w{bits}a{bits}" in row.id and not row.overrides:
            found.setdefault(row.recipe, row)
    return found


def results() -> str:
    """Every recorded student."""
    parts = []
    for bits in (4, 3):
        published = _published(bits)
        lines = [
            f"### W{bits}A{bits}",
            "",
            "| method | generator alone + student steps, batch | images | round to nearest | last epoch | drop | chosen epoch | "
            "published drop | minutes | packed |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for path, r in _records(bits):
            recipe, result, size = r["recipe"], r["results"], r["summary"]
            warmup, student = _steps(r)
            theirs = published.get(recipe["name"])
            images = recipe.get("images", {})
            chosen = f"{result['chosen']:.2f}" if "chosen" in result else ""
            lines.append(
                f"| {TITLES[recipe['name']]} | {warmup:,} + {student:,}, {recipe['schedule']['batch_size']} | "
                f"{images['count'] if images.get('enabled') else ''} | {result['rtn']:.2f} | [{result['last']:.2f}]"
                f"(../benchmarks/results/{path.name}) | {result['float'] - result['last']:.2f} | "
                f"{chosen} | "
                f"{'' if theirs is None else f'{theirs.float_top1 - theirs.top1:.2f}'} | {r['minutes']:.0f} | "
                f"{size['packed_bytes'] / 1e6:.2f} of {size['float_bytes'] / 1e6:.2f} MB |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def ablations() -> str:
    parts = []
    for path, record in _load("cifar10_resnet20_*_ablation_*.json"):
        name, students = record["ablation"], record["students"]
        some = next(iter(students.values()))["recipe"]
        lines = [
            f"### HAST, W3A3: {name}",
            "",
            f"[Record](../benchmarks/results/{path.name}): {some['schedule']['batch_size']} x {_steps({'recipe': some})[1]:,} student "
            f"steps, {some['images']['count']:,} images unless stated, {record['test_images']:,} test images, seed {record['seed']}.",
            "",
            "| | last epoch | published (CIFAR-10) |",
            "|---|---:|---:|",
        ]
        for value, student in students.items():
            last = f"{student['results']['last']:.2f}" if "results" in student else "diverged"
            lines.append(f"| {value} | {last} | {student.get('published', '')} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def imagenet() -> str:
    """Minutes and memory at 224 x 224: recipes down, networks across; nothing while there is no record."""
    found = _load("imagenet_minutes.json")
    if not found:
        return ""
    path, record = found[0]
    rows = {(row["model"], row["recipe"]): row for row in record["rows"]}
    models, recipes = (list(dict.fromkeys(pair[i] for pair in rows)) for i in (0, 1))
    where = next(iter(rows.values()))["environment"]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "error" in row:
            return "not measured" if row is None else "failed"
        each = row["minutes_per_1000"]
        stages = [f"{each[stage]:.0f}" if stage in each else "-" for stage in IMAGENET_STAGES]
        return f"{' / '.join(stages)}; {row['peak_bytes'] / 2**30:.1f} GiB"

    return "\n".join(
        [
            "### ImageNet-sized networks",
            "",
            f"[Record](../benchmarks/results/{path.name}), {where['threads']} of {where['cores']} cores, torch {where['torch']}. "
            f"Minutes {'that one core computes ' if where['threads'] == 1 else ''}per 1,000 iterations of "
            f"{', '.join(IMAGENET_STAGES)} at 224 x 224, 16 images a step (synthesised images: 32), two iterations of each "
            "timed after one to warm up; and the most memory of the process.",
            "",
            "| recipe | " + " | ".join(models) + " |",
            "|---|" + "---:|" * len(models),
            *(f"| {r} | " + " | ".join(cell(rows.get((m, r))) for m in models) + " |" for r in recipes),
        ]
    )


OTHERS = {"reference": "plain PyTorch", "aten": "PyTorch's own ops", "compile": "torch.compile"}


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def kernels() -> str:
    path, record = _load("kernels_*_hot_default.json")[0]
    kept_path, kept = _load("kernels_*_hot_kept.json")[0]
    machine = record["environment"]
    lines = [
        f"Kernels on {machine['threads']} cores ({machine['cpu_isa']}): how many times as fast as what else computes the same, fastest of "
        f"{record['rounds']} or more interleaved rounds. In brackets: the others' memory kept between calls too, as ours always is "
        f"([record](benchmarks/results/{path.name}), [second](benchmarks/results/{kept_path.name}), [more](docs/performance.md)):",
        "",
        f"| | kernel | {' | '.join(OTHERS.values())} |",
        "|---|---:|" + "---:|" * len(OTHERS),
    ]
    for case, same in zip(record["cases"], kept["cases"], strict=True):
        assert case["case"] == same["case"]
        if case["gates"]:
            ratios = " | ".join(
                f"{_times(case['ratios'][name])} ({_times(same['ratios'][name])})" if name in case["ratios"] else ""
                for name in OTHERS
            )
            lines.append(f"| {case['case']} | {case['seconds']['kernel'] * 1e3:.2f} ms | {ratios} |")
    return "\n".join(lines)


def performance() -> str:
    """One table per record: gates and moonshots beside what was measured."""
    parts = []
    for path, record in _load("kernels_*.json") + _load("layers_*.json"):
        machine = record["environment"]
        where = (
            machine["gpu"] if record.get("device") == "cuda" else f"{machine['threads']} cores, {machine['cpu_isa']}"
        )
        lines = [
            f"### {where}; {record['caches']} caches, memory {record['memory']}"
            + (", layers of real networks" if path.name.startswith("layers") else ""),
            "",
            f"[Record](../benchmarks/results/{path.name}), commit {machine['commit'][:7]}, torch {machine['torch']}, "
            f"{record['rounds']} rounds or more. In brackets: gate, moonshot.",
            "",
            f"| | kernel | GB/s | of copy | {' | '.join(OTHERS.values())} | copy time |",
            "|---|---:|---:|---:|" + "---:|" * (len(OTHERS) + 1),
        ]
        for case in record["cases"]:
            cells = [f"{case['seconds']['kernel'] * 1e3:.3f} ms", f"{case['gigabytes_per_second']:.1f}"]
            share = case["share_of_copy_bandwidth"]
            cells.append("" if share is None else f"{share * 100:.0f} %")
            for name in OTHERS:
                aims = [case[kind].get(name) for kind in ("gates", "moonshots")]
                told = ", ".join(f"{a:g}" for a in aims if a)
                cells.append(_times(case["ratios"].get(name)) + (f" ({told})" if told else ""))
            cells.append("" if "copy" not in case["ratios"] else f"{1 / case['ratios']['copy']:.2f}")
            lines.append(f"| {case['case']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def resources() -> str:
    """The float32 kernels with 16-byte accesses; the record holds all types and paths."""
    path, record = _load("cuda_resources_*.json")[0]
    kernels = record["kernels"]
    scalar = re.compile(r"<float, 1\b|float>, 1>")  # the paths of odd sizes and views
    others = re.compile(r"double|Bf16|Half")
    shown = [k for k in kernels if not others.search(k["kernel"]) and not scalar.search(k["kernel"])]
    lines = [
        "### CUDA kernels, as compiled",
        "",
        f"[Record](../benchmarks/results/{path.name}), {record['arch']}, {record['nvcc'].strip()}: {len(kernels)} kernels, "
        f"{sum(k['spill_bytes'] for k in kernels)} bytes spilled, {sum(k['local_accesses'] for k in kernels)} accesses to local memory. "
        "Below those for float32; the predicted share of copy bandwidth counts loads under way "
        "(`benchmarks/resources.py`) and says nothing of "
        "kernels that compute more than they move. None of this ran on a GPU yet.",
        "",
        "| source | kernel | registers | resident warps | 16-byte accesses | narrower | predicted share of copy |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for k in shown:
        wide, narrow = (k[f"loads_{size}"] + k[f"stores_{size}"] for size in ("16_bytes", "narrower"))
        share = k["predicted_share_of_copy"]
        lines.append(
            f"| {k['source']} | `{k['kernel']}` | {k['registers']} | {k['resident_warps']} | {wide} | {narrow} | "
            f"{'' if share is None else f'{share * 100:.0f} %'} |"
        )
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Bars of the gated cases on a logarithmic axis, with marks at the gate and where everybody's memory is kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, record = _load("kernels_*_hot_default.json")[0]
    _, kept = _load("kernels_*_hot_kept.json")[0]
    cases, same = ([case for case in r["cases"] if case["gates"]][::-1] for r in (record, kept))
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(cases) + 1.4), layout="constrained")
    height = 0.26
    for k, (name, title) in enumerate(OTHERS.items()):
        at = [i + (1 - k) * height for i, case in enumerate(cases) if name in case["ratios"]]
        ratios = [case["ratios"][name] for case in cases if name in case["ratios"]]
        bars = axes.barh(at, ratios, height, label=f"over {title}", color=("#4269d0", "#efb118", "#3ca951")[k])
        axes.bar_label(bars, [_times(r) for r in ratios], padding=3, fontsize=8)
        others_kept = [case["ratios"][name] for case in same if name in case["ratios"]]
        axes.plot(others_kept, at, "D", color="white", markeredgecolor="black", markersize=5)
        gates = [(i + (1 - k) * height, case["gates"][name]) for i, case in enumerate(cases) if name in case["gates"]]
        for y, gate in gates:
            axes.plot([gate, gate], [y - height / 2, y + height / 2], color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="gate")
    axes.plot([], [], "D", color="white", markeredgecolor="black", label="the others' memory kept too")
    axes.set_xscale("log")
    axes.set_xlim(1, 4 * max(max(c["ratios"].get(n, 0) for n in OTHERS) for c in cases))
    axes.set_yticks(
        range(len(cases)),
        [c["case"].replace(", forward + backward", ",\nforward + backward") for c in cases],
        fontsize=8,
    )
    axes.set_xlabel("times as fast (two CPU cores, fastest rounds)")
    figure.legend(fontsize=8, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def demo() -> str:
    path, record = _load("demo_digits.json")[0]
    rows = {(row["method"], row["bits"]): row for row in record["rows"]}
    titles = {"rtn": "round to nearest", **{name: TITLES[name] for name in ("kl_only", "gdfq", "ait")}}
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


PAIRS = {"ce-kl": "CE and KL", "fa-kl": "FA and KL", "ce-fa": "CE and FA"}


def analyses() -> str:
    """Curvature, cosines and changed codes of the analysed runs, what tracking them cost, and the pictures."""
    found = {r["recipe"]["name"]: (path, r) for path, r in _load("analyses_resnet20_*_w3a3_seed0.json")}
    runs = {title: found[name] for name, title in TITLES.items() if name in found}
    cost = [line for path, tracking in _load("tracking_*.json") for line in _tracking(path, tracking)]
    if not runs:
        return "\n".join(["Curvature, cosines and changed codes: not yet.", *cost])
    _, some = next(iter(runs.values()))
    lines = [
        "Students of " + ", ".join(f"[{title}](../benchmarks/results/{path.name})" for title, (path, _) in runs.items())
        + f", W3A3, short schedules, one seed. Curvature on {some['hessian']['images']} held-out images, losses without factors:",
        "",
        "| student | loss | trace | standard error | largest eigenvalue | most negative of the density's nodes |",
        "|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for title, (_, r) in runs.items():
        for name, of in r["hessian"]["losses"].items():
            cells = (
                of["trace"]["mean"],
                of["trace"]["standard_error"],
                of["top"]["values"][0],
                min(of["density"]["nodes"]),
            )
            lines.append(f"| {title} | {name.upper()} | {' | '.join(f'{v:.3g}' for v in cells)} |")
    lines += ["", "Cosine of the gradients of two losses while training, all parameters, mean over the batches measured in an epoch:", "",
              "| student | losses | first epoch | last epoch | epochs below 0 |", "|---|---|---:|---:|---:|"]  # fmt: skip
    for title, (_, r) in runs.items():
        for pair, names in PAIRS.items():
            values = [e["cosine"][pair]["total"] for e in r["history"] if pair in e.get("cosine", {})]
            if values:
                below = sum(v < 0 for v in values)
                lines.append(f"| {title} | {names} | {values[0]:+.3f} | {values[-1]:+.3f} | {below} of {len(values)} |")
    lines += ["", "Integer weights that differ between the start and the end of an epoch, in % of a layer's; over the layers:", "",
              "| student | epoch | least | median | most | most over least |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for title, (_, r) in runs.items():
        epochs = [e for e in r["history"] if "net_update_ratio" in e]
        for e in (epochs[0], epochs[-1]):
            row = sorted(100 * v for v in e["net_update_ratio"])
            cells = (row[0], statistics.median(row), row[-1])
            spread = f"{row[-1] / row[0]:.1f}" if row[0] else "-"
            lines.append(f"| {title} | {e['epoch'] + 1} | {' | '.join(f'{v:.3g}' for v in cells)} | {spread} |")
    lines += cost
    for kind, text in PICTURES.items():
        lines += [
            "",
            *(f"![{title}, W3A3: {text}](pictures/{path.stem}_{kind}.png)" for title, (path, _) in runs.items()),
        ]
    return "\n".join(lines)


def _tracking(cost: Path, tracking: dict[str, Any]) -> list[str]:
    lines = ["", f"What tracking adds to the time of a student's step ([record](../benchmarks/results/{cost.name}); cosines every "
              f"{tracking['cosine_every']} steps, net updates every {tracking['updates_every']}; *again*: the same student without):", "",
              "| recipe | step | again | cosines | net updates | their comparison alone |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    of = {(row["recipe"], row["tracking"]): row for row in tracking["rows"]}
    for recipe in dict.fromkeys(row["recipe"] for row in tracking["rows"]):
        added = " | ".join(f"{of[recipe, t]['added_percent']:+.1f} %" for t in ("again", "cosine", "updates"))
        alone = of[recipe, "updates"].get("alone_percent")
        alone = "" if alone is None else f"+{alone:.3f} %"
        lines.append(f"| {recipe} | {1000 * of[recipe, 'none']['seconds_per_step']:.0f} ms | {added} | {alone} |")
    return lines


PICTURES = {
    "hessian": "density of the Hessian's eigenvalues, and traces",
    "cosine": "cosines of the gradients of two losses over the epochs",
    "updates": "share of changed integer weights per layer and epoch",
}


# Of a page in docs/methods/: its recipes.
METHODS = {
    "rtn": ["rtn"], "gdfq": ["gdfq"], "qimera": ["qimera", "qimera_ait"], "autorecon": ["autorecon", "autorecon_ait"],
    "ait": ["kl_only", "ait", "ait_adam", "ait_rmsprop", "hast_ait"],
    "zeroq": ["zeroq_calibrated", "zeroq", "zeroq_mixed"], "intraq": ["intraq"], "hast": ["hast", "hast_averaged"],
    "synq": ["synq"], "plf": ["plf"], "squant": ["hast_squant"], "lsq": ["hast_lsq"],
}  # fmt: skip


def method(recipes: list[str]) -> str:
    """Last epochs of a page's recipes."""
    found = {(r["recipe"]["name"], bits): r for bits in (8, 4, 3) for _, r in _records(bits)}
    lines = ["Measured (CIFAR-10 ResNet-20, last epoch; [everything](../results.md)):", ""]
    for name in recipes:
        told = [
            f"W{bits}A{bits} {r['results']['last']:.2f} "
            f"(drop {r['results']['float'] - r['results']['last']:.2f}, {_steps(r)[1]:,} student steps)"
            for bits in (8, 4, 3)
            if (r := found.get((name, bits)))
        ]
        lines.append(f"- `{name}`: {', '.join(told) or 'not yet'}")
    return "\n".join(lines)


PAGES = {
    ROOT / "README.md": lambda: (accuracy(), demo(), kernels()),
    ROOT / "docs" / "results.md": lambda: (results(), ablations(), imagenet()),
    ROOT / "docs" / "analyses.md": lambda: (analyses(),),
    ROOT / "docs" / "performance.md": lambda: (performance(), resources()),
    **{
        ROOT / "docs" / "methods" / f"{page}.md": lambda names=names: (method(names),)
        for page, names in METHODS.items()
    },
}


def measured(page: Path) -> str:
    return "\n\n".join((BEGIN, *filter(None, PAGES[page]()), END))


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        made = re.sub(
            f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _, page=page: measured(page), text, flags=re.DOTALL
        )
        if "--write" in sys.argv:
            page.write_text(made)
        elif made != text:
            sys.exit(f"{page.relative_to(ROOT)} is not what the records say: python -m benchmarks.table --write")
    if "--write" in sys.argv:
        draw(ROOT / "docs" / "pictures" / "kernels_cpu.png")
