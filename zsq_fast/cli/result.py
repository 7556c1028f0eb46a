"""What a run prints and writes to result.json, and what --dry-run prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from zsq_fast.analysis.forecast import Network, Prior, outlook, prior, trained_on
from zsq_fast.cli.job import Job
from zsq_fast.errors import BadFileError, UsageError
from zsq_fast.methods import Recipe, Result, student_like
from zsq_fast.methods.estimate import Estimate
from zsq_fast.methods.mixed import bits_are_open
from zsq_fast.nn import Summary
from zsq_fast.runs import RunDir

STUDENT = "student.safetensors"
CHOSEN = "chosen.safetensors"
RESULT = "result.json"

# evaluation key of the trainer -> (what is printed, whether it is a quantized network)
STAGES = {
    "float": ("float", False),
    "rtn": ("round-to-nearest", True),
    "last": ("last epoch", True),
    "chosen": ("chosen epoch", True),
}


def record(job: Job, recipe: Recipe, result: Result, student: Path, network: Network) -> dict[str, Any]:
    """The content of result.json; accuracies are top-1 percents and absent without test images. `held_out`: what the epoch was
    chosen by, of that epoch and of the last; `forecast` of the last epoch and `forecast_before` of the run, where they are
    calibrated; `best_on_test` only where every so-manieth epoch was measured."""
    held_out = {
        name: {key: result.history[epoch][f"held_out_{key}"] for key in ("agreement", "kl")}
        for name, epoch in (("chosen", result.chosen_epoch), ("last", -1))
        if result.chosen_epoch is not None and epoch is not None
    }
    top1 = {name: float(value) for name, value in result.evaluations.items()}
    before = expectation(recipe, network, top1)
    first = recipe.schedule.warmup_epochs
    measured = [r["top1"] for r in result.history[first:] if r.get("top1") is not None] if job.eval_every else []
    return {
        "model": job.model,
        "recipe": recipe.name,
        "weight_bits": recipe.quant.nominal_weight_bits,
        "act_bits": recipe.quant.act_bits,
        "seed": job.seed,
        "device": job.device,
        "threads": job.threads,
        "top1": top1,
        "eval_data": job.eval_data,
        "eval_limit": job.eval_limit,
        "best_on_test": max(measured, default=None),
        "chosen_epoch": result.chosen_epoch,
        "held_out": held_out,
        "forecast": _forecast(recipe, network, held_out.get("last"), top1),
        "forecast_before": None if before is None else {**before.to_dict(), "text": str(before)},
        "minutes": result.seconds / 60,
        "student": str(student.resolve()),
        **result.summary.to_dict(),
    }


def _forecast(
    recipe: Recipe, network: Network, held_out: Mapping[str, float] | None, top1: Mapping[str, float]
) -> dict[str, Any] | None:
    """Of the last epoch's accuracy drop; None where nothing was held out or the forecast is not calibrated."""
    if held_out is None:
        return None
    try:
        found = outlook(held_out["agreement"], held_out["kl"], *_kind(recipe), network, _drop(top1))
    except UsageError:
        return None
    return {**found.to_dict(), "text": str(found)}


def expectation(recipe: Recipe, network: Network, top1: Mapping[str, float] = {}) -> Prior | None:
    """What is known of a run before it starts, beside what came out if that is known; None where nothing is."""
    try:
        return prior(*_kind(recipe), network, _drop(top1)) if recipe.student.enabled else None
    except UsageError:
        return None


def _kind(recipe: Recipe) -> tuple[tuple[float, float], str]:
    """What makes runs comparable: bits, and the images of the student."""
    return (recipe.quant.nominal_weight_bits, float(recipe.quant.act_bits)), trained_on(recipe.images.enabled)


def _drop(top1: Mapping[str, float]) -> float | None:
    return top1["float"] - top1["last"] if "last" in top1 else None


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"{result['model']}, {result['recipe']}, W{result['weight_bits']:g}A{result['act_bits']}, seed {result['seed']}"
    )
    sizes = size_text(result["float_bytes"]), f"{size_text(result['packed_bytes'])} packed"
    top1, chosen = result["top1"], result.get("chosen_epoch")
    stages = {key: stage for key, stage in STAGES.items() if key != "chosen" or chosen is not None}
    rows = [(text, sizes[quantized], top1.get(key)) for key, (text, quantized) in stages.items()]
    for text, size, accuracy in rows:
        print(f"  {text:<18}{size:>16}{'' if accuracy is None else f'{accuracy:10.2f} %'}")
    if not top1:
        print("  (no accuracy: no real test images were given by --eval-data)")
    if chosen is not None:
        shares = (f"{100 * result['held_out'][name]['agreement']:.2f} % {name}" for name in ("chosen", "last"))
        print(f"  epoch {chosen + 1} agrees best with the float network on synthetic images: {', '.join(shares)}")
    for found in filter(None, (result.get("forecast_before"), result.get("forecast"))):
        print("\n".join(f"  {line}" for line in found["text"].splitlines()))
    for site in result["left_float"]:
        print(f"  stays float: {site['name'] or 'the model'} ({site['kind']}): {site['why']}")
    print(f"{result['minutes']:.1f} minutes; fake-quantized student: {result['student']}")


def size_text(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 50_000 else f"{count / 1e3:.2f} kB"


def print_plan(
    job: Job, recipe: Recipe, summary: Summary, network: Network, cost: Estimate, *, runs: int, as_json: bool
) -> None:
    """The resolved job and recipe, what of the network would be quantized, and what one run and all would take."""
    schedule = recipe.schedule
    plan: dict[str, Any] = {"job": asdict(job), "recipe": recipe.to_dict(), "network": summary.to_dict()}
    plan["generator_steps"], plan["student_steps"] = recipe.generator_steps, recipe.student_steps
    plan["estimate"] = {**cost.to_dict(), "runs": runs}
    plan["images"] = recipe.generator_steps * schedule.batch_size
    before = expectation(recipe, network)
    plan["forecast_before"] = None if before is None else before.to_dict()
    plan["bits_by_search"] = bits_are_open(recipe)
    if as_json:
        print(json.dumps(plan, indent=1))
        return
    print(f"steps: {plan['generator_steps']} of the generator, {plan['student_steps']} of the student")
    print(f"images: {plan['images']} generated, {schedule.batch_size} at a time, no real ones")
    if recipe.images.enabled:
        print(f"images: {recipe.images.count} optimised, {recipe.images.batch_size} at a time")
    _print_estimate(cost, runs, job.threads)
    if before is not None:
        print(before)
    if plan["bits_by_search"]:
        average = recipe.quant.average_weight_bits
        print(
            f"bits: found for every layer by a search when a run begins, {average:g} on average; shown as if all had {int(average)}"
        )
    print(summary)
    for title, values in (("recipe", _flat(plan["recipe"])), ("job", _flat(plan["job"]))):
        print(f"{title}:")
        print("\n".join(f"  {key} = {json.dumps(value)}" for key, value in values.items()))


def _print_estimate(cost: Estimate, runs: int, threads: int) -> None:
    where = cost.device if cost.device != "cpu" else f"cpu, {threads} threads"
    print(f"time ({where}; 2 iterations of each kind measured, evaluations and checkpoints left out):")
    for stage in cost.stages:
        print(f"  {stage.name:<20}{stage.count:>8} x {stage.each:.4g} s = {duration_text(stage.seconds)}")
    print(
        f"  in all {duration_text(cost.seconds)}"
        + (f", {runs} runs {duration_text(runs * cost.seconds)}" if runs > 1 else "")
    )
    if cost.peak_bytes is not None:
        kind = "rise of the process's peak resident memory" if where.startswith("cpu") else "most allocated on the GPU"
        print(f"memory: {size_text(cost.peak_bytes)}, {kind} while measuring")
    if cost.image_set_bytes:
        print(f"memory: {size_text(cost.image_set_bytes)} on top for all optimised images")


def duration_text(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def load_student(run_dir: RunDir, job: Job, teacher: nn.Module, name: str) -> nn.Module:
    """The fake-quantized network STUDENT or CHOSEN of a finished run; BadFileError if it is not finished or a byte differs."""
    if not run_dir.holds(name):
        raise BadFileError(f"{run_dir.path} is not finished ({name} is missing); run `zsq-fast resume {run_dir.path}`.")
    student = student_like(teacher, Recipe.from_dict(run_dir.recipe), job.input_size or ())
    try:
        student.load_state_dict(run_dir.load_tensors(name))
    except RuntimeError as error:
        what = f"{run_dir.path / name} does not fit the network of this version of zsq_fast: {error}"
        raise BadFileError(what) from error
    return student
