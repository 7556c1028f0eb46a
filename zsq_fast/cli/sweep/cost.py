"""What a sweep would take: `zsq-fast sweep ... --dry-run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from zsq_fast.cli.job import load
from zsq_fast.cli.result import duration_text, size_text
from zsq_fast.cli.sweep.plan import Plan, Run
from zsq_fast.cli.sweep.workers import image_set
from zsq_fast.methods import Recipe
from zsq_fast.methods.estimate import IMAGE_STAGE, Estimate, estimate


def print_cost(plan: Plan, runs: Sequence[Run], jobs: int, *, as_json: bool) -> None:
    """The points, and time and memory of the runs that are not finished."""
    todo = [run for run in runs if run.result() is None]
    cost = _cost(plan, todo, jobs)
    points = {run.point.name: run.point for run in runs}
    if as_json:
        listed = [{"name": p.name, "values": dict(p.values), "own": p.own} for p in points.values()]
        print(json.dumps({"points": listed, "seeds": list(plan.seeds), "estimate": cost}, indent=1))
        return
    print(f"{len(points)} points, {len(plan.seeds)} seeds: {len(runs)} runs, {len(todo)} of them to do")
    for point in points.values():
        print(f"  {point.name}{' *' if point.own else ''}")
    print("  (* the recipe's own values)")
    where = plan.job.device if plan.job.device != "cpu" else f"cpu, {plan.job.threads} threads per run"
    print(f"time ({where}; measured alone, evaluations and checkpoints left out):")
    print(f"  {cost['image_sets']} sets of images, each made once: {duration_text(cost['image_seconds'])}")
    print(
        f"  in all {duration_text(cost['seconds'])}, {jobs} at a time at best {duration_text(cost['seconds'] / jobs)}"
    )
    if cost["peak_bytes"] is not None:
        print(
            f"memory: {size_text(cost['peak_bytes'])} per run, {size_text(jobs * cost['peak_bytes'])} for {jobs}, beside torch itself"
        )
    if cost["image_set_bytes"]:
        print(f"memory: {size_text(cost['image_set_bytes'])} per run on top for all its images")


def _cost(plan: Plan, todo: Sequence[Run], jobs: int) -> dict[str, Any]:
    job, teacher = load(plan.job)
    costs: dict[str, Estimate] = {}
    seconds, image_seconds = 0.0, dict[Any, float]()
    for run in todo:
        recipe = run.point.recipe
        key = _kind(recipe)
        if key not in costs:
            options: dict[str, Any] = dict(seed=job.seed, channels_last=job.channels_last, force=job.force)
            costs[key] = estimate(teacher, recipe, input_size=job.input_size or (), **options)
        for stage in costs[key].stages:
            if stage.name == IMAGE_STAGE:
                images = image_set(run)
                image_seconds[images] = max(stage.seconds, image_seconds.get(images, 0.0))
            else:
                seconds += stage.seconds
    peaks = [cost.peak_bytes for cost in costs.values() if cost.peak_bytes is not None]
    # On the CPU each is the rise of one process's peak, which later ones start from.
    peak = (max if job.device.startswith("cuda") else sum)(peaks) if peaks else None
    return {
        "runs": len(todo),
        "jobs": jobs,
        "device": job.device,
        "threads": job.threads,
        "seconds": seconds + sum(image_seconds.values()),
        "image_sets": len(image_seconds),
        "image_seconds": sum(image_seconds.values()),
        "peak_bytes": peak,
        "image_set_bytes": max((cost.image_set_bytes for cost in costs.values()), default=0),
    }


def _kind(recipe: Recipe) -> str:
    """Equal for recipes whose steps cost the same: of a number that is no count it matters only whether it is 0."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value != 0 if isinstance(value, float) else value

    return json.dumps(plain(recipe.to_dict()))
