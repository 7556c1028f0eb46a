"""`zsq-fast demo`: a toy from end to end, offline: train a small network on digits, quantize it without them."""

from __future__ import annotations

import copy
import errno
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.cli.arguments import Parser, seed
from zsq_fast.data import evaluate
from zsq_fast.demo.digits import SIDE, TEST_IMAGES, Digits, Settings, load_digits, trained_network
from zsq_fast.demo.pictures import Curve, contact_sheet, curves
from zsq_fast.demo.table import Row, markdown, print_table
from zsq_fast.errors import Interrupted, TrainingError, UsageError
from zsq_fast.methods import Recipe, Result, Trainer, load_recipe, run_together
from zsq_fast.runs import Progress
from zsq_fast.runs.storage import make_directory, replace_file, to_json, writing

METHODS, BITS, INPUT = ("gdfq", "kl_only", "ait"), (4, 3), (1, SIDE, SIDE)
NOTE = (
    f"A toy: {SIDE}x{SIDE} digits and a tiny network show the machinery, not the state of the art. "
    "Quantization saw no digit; the test images score, and choose nothing. MB: parameters, quantized ones packed. "
    "Minutes of a method count the synthesis of its images in full, though methods of one schedule share it here."
)


def _schedule(quick: bool) -> list[str]:
    """One schedule for every method: epochs of 25 steps, the first of them for the generator and the ranges alone."""
    warmup, epochs, iterations, milestones = (2, 4, 10, [3]) if quick else (8, 32, 25, [20, 28])
    return [
        f"schedule.epochs={epochs}",
        f"schedule.iterations={iterations}",
        "schedule.batch_size=32",
        f"schedule.warmup_epochs={warmup}",
        f"schedule.calibration_epochs={warmup}",
        f"schedule.milestones={milestones}",
        "quant.ema=plain",  # the published tracker needs more updates than this to settle
    ]


class _Bar(Progress):
    """The table comes at the end: no lines about single epochs."""

    def message(self, text: str) -> None:
        return


def _recipes(quick: bool, method: str) -> list[Recipe]:
    overrides = _schedule(quick)
    if method == "rtn":
        overrides = [*overrides, f"schedule.epochs={2 if quick else 8}"]
    return [load_recipe(method, input_size=INPUT, overrides=overrides, weight_bits=b, act_bits=b) for b in BITS]


def _train(teacher: nn.Module, recipes: Sequence[Recipe], digits: Digits, seed: int, quiet: bool) -> list[Result]:
    """Students of one schedule, on the images of one generator."""

    def top1(network: nn.Module) -> float:
        return evaluate(network, digits.test, mean=digits.mean, std=digits.std, channels_last=True).top1

    trainers: list[Trainer] = []
    for recipe in recipes:
        options: dict[str, Any] = {"share": trainers[0]} if trainers else {"progress": _Bar(quiet=quiet)}
        trainers.append(Trainer(teacher, recipe, input_size=INPUT, seed=seed, evaluate=top1, eval_every=1, **options))
    try:
        results = run_together(trainers)
    except Interrupted as stop:
        text = "stopped; the demo keeps no half-finished work and can be started again."
        raise Interrupted(text, stop.exit_code - 128) from None
    for result in results:
        if isinstance(result, TrainingError):
            raise result
    return [result for result in results if isinstance(result, Result)]


def _row(method: str, bits: int | None, top1: float, seconds: float, size_bytes: int) -> Row:
    return Row(method, bits, round(top1 * TEST_IMAGES / 100), TEST_IMAGES, seconds, size_bytes)


def _curve(method: str, bits: int, result: Result, recipe: Recipe) -> Curve:
    """Over student steps; the start is the network before the first one."""
    first, losses, accuracies = recipe.schedule.warmup_epochs * recipe.schedule.iterations, [], []
    for record in result.history:
        step = record["step"] - first
        if "student_loss" in record:
            losses.append((step, record["student_loss"]))
        if record.get("top1") is not None and step >= 0:
            accuracies.append((step, record["top1"]))
    return Curve(method, bits, losses, accuracies)


def _synthetic(result: Result, digits: Digits, columns: int, seed: int) -> Tensor:
    """Images [10, columns, H, W] of the trained generator with pixels back in 0..1."""
    labels = torch.arange(10).repeat_interleave(columns)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), result.synthesis.recipe.generator.latent, generator=draw)
    with torch.no_grad():
        images = copy.deepcopy(result.synthesis.generator)(noise, labels)
    return (images * digits.std[0] + digits.mean[0]).view(10, columns, SIDE, SIDE)


def _real(digits: Digits, columns: int) -> Tensor:
    images = digits.test.fetch(0, TEST_IMAGES)[:, 0].float() / 255
    return torch.stack([images[digits.test.labels == label][:columns] for label in range(10)])


def _parser() -> Parser:
    parser = Parser("demo", "Train a small network on handwritten digits, quantize it without them (a toy, offline).")
    parser.add_argument("--out", default="zsq_demo", metavar="DIR", help="where the table and pictures go (zsq_demo)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N")
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes: shows the path, learns little")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _check_before_work(out: Path) -> None:
    """UsageError or StorageError for what would otherwise lose the result minutes later."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the demo needs scikit-learn and matplotlib ({error}): pip install '.[demo]'") from None
    with writing(out):
        place = next(place for place in (out, *out.absolute().parents) if place.exists())
        if not place.is_dir():
            raise UsageError(f"{place} is a file; choose another --out.")
        if not os.access(place, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def main(argv: Sequence[str]) -> int:
    """Write result.json, table.md, synthetic_images.png and curves.png into --out and print one table."""
    arguments = _parser().parse(argv)
    out, began = Path(arguments.out), time.perf_counter()
    _check_before_work(out)
    digits, settings = load_digits(), Settings(seed=arguments.seed)
    settings = replace(settings, epochs=4) if arguments.quick else settings
    started = time.perf_counter()
    teacher, cached = trained_network(digits, settings)
    seconds = 0.0 if cached else time.perf_counter() - started
    plans = {method: _recipes(arguments.quick, method) for method in ("rtn", *METHODS)}
    done = _train(teacher, plans["rtn"], digits, arguments.seed, arguments.quiet)
    done += _train(teacher, [r for m in METHODS for r in plans[m]], digits, arguments.seed, arguments.quiet)
    keys = [(method, bits) for method in plans for bits in BITS]
    results = dict(zip(keys, done, strict=True))

    float_top1 = done[0].evaluations["float"]
    rows = [_row("float", None, float_top1, seconds, done[0].summary.float_bytes)]
    for bits in BITS:
        for method in plans:
            result = results[method, bits]
            rows.append(_row(method, bits, result.evaluations["last"], result.seconds, result.summary.packed_bytes))
    runs = [_curve(m, b, results[m, b], plans[m][BITS.index(b)]) for m, b in keys]
    record = {
        "note": NOTE,
        "seed": arguments.seed,
        "quick": arguments.quick,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - began,
        "float": {**asdict(settings), "cached": cached, "train_images": len(digits.train_labels)},
        "recipes": {f"{m} w{b}a{b}": plans[m][BITS.index(b)].to_dict() for m, b in keys},
        "rows": [row.as_json() for row in rows],
        "curves": [vars(run) for run in runs],
    }
    title = f"Toy: handwritten digits, {TEST_IMAGES} held-out images, last epoch"
    with writing(out):
        make_directory(out)
    replace_file(out / "result.json", to_json(record))
    replace_file(out / "table.md", f"{title}\n\n{markdown(rows)}\n{NOTE}\n".encode())
    synthetic = _synthetic(done[-1], digits, 12, arguments.seed)
    sheet = contact_sheet(synthetic, _real(digits, 5), "Images made without data, by class")
    replace_file(out / "synthetic_images.png", sheet)
    replace_file(out / "curves.png", curves(runs, float_top1))
    if arguments.json:
        print(json.dumps(json.loads(to_json(record)), indent=1))
        return 0
    print_table(rows, title)
    print(f"{NOTE}\nPictures, table and numbers: {out.resolve()}")
    return 0
