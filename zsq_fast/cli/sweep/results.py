"""What came out of a sweep: sweep.json and the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zsq_fast.cli.sweep.plan import Plan, Run, value_of
from zsq_fast.errors import BadFileError
from zsq_fast.runs import RunDir
from zsq_fast.runs.storage import from_json, to_json

SWEEP = "sweep.json"
# key of a run in the JSON -> what the table calls it
MEASURES = {
    "last": "top-1, last",
    "chosen": "chosen",
    "held_out_agreement": "agreement, last",
    "held_out_agreement_chosen": "chosen",
}


def collect(plan: Plan, runs: Sequence[Run], errors: Mapping[str, str]) -> dict[str, Any]:
    """The content of sweep.json. Percents; `deviation` is the sample's, None of one seed; `own`: the recipe's own values.

    Args:
        errors: why runs failed that have no result, by label.
    """
    points: list[dict[str, Any]] = []
    for point in dict.fromkeys(run.point.name for run in runs):
        own = [run for run in runs if run.point.name == point]
        records = [_record(run, errors.get(run.label)) for run in own]
        points.append(
            {
                "name": point,
                "values": dict(own[0].point.values),
                "own": own[0].point.own,
                **{key: _spread([record[key] for record in records]) for key in ("float", *MEASURES, "minutes")},
                "runs": records,
            }
        )
    own_recipe, job = plan.resolve(), plan.job
    sweep = {
        "model": job.model,
        "recipe": plan.recipe,
        "weight_bits": own_recipe.quant.nominal_weight_bits,
        "act_bits": own_recipe.quant.act_bits,
        "schedule": plan.schedule,
        "overrides": list(plan.overrides),
        "device": job.device,
        "threads": job.threads,
        "eval_data": job.eval_data,
        "eval_limit": job.eval_limit,
        "measure": "last" if job.eval_data else "held_out_agreement",
        "one_at_a_time": plan.one_at_a_time,
        "options": [list(option.keys) for option in plan.vary],
        "own_values": {key: value_of(own_recipe, key) for option in plan.vary for key in option.keys},
        "seeds": list(plan.seeds),
        "points": points,
    }
    return from_json(to_json(sweep), SWEEP)  # lists for tuples, as one who reads it finds them


def _record(run: Run, error: str | None) -> dict[str, Any]:
    result = run.result()
    begun = RunDir.is_run(run.path)
    record: dict[str, Any] = {
        "seed": run.seed,
        "run": "/".join(run.path.parts[-2:]),  # within the sweep's directory
        "state": "done" if result else "failed" if error else "unfinished" if begun else "not begun",
        "error": None if result else error,
        **dict.fromkeys(("float", *MEASURES, "chosen_epoch", "minutes")),
    }
    if result:
        record |= {key: result["top1"].get(key) for key in ("float", "last", "chosen")}
        for key, stage in (("held_out_agreement", "last"), ("held_out_agreement_chosen", "chosen")):
            record[key] = 100 * result["held_out"][stage]["agreement"] if stage in result["held_out"] else None
        record |= {key: result[key] for key in ("chosen_epoch", "minutes")}
    return record


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "deviation": deviation, "seeds": len(known)}


def kept_errors(out: Path) -> dict[str, str]:
    """Of an earlier call, as `collect` takes them."""
    path = out / SWEEP
    try:
        points = from_json(path.read_bytes(), path)["points"]
        found = {f"{point['name']}, seed {run['seed']}": run["error"] for point in points for run in point["runs"]}
        return {label: str(error) for label, error in found.items() if error}
    except (OSError, BadFileError, KeyError, TypeError):
        return {}


def failures(sweep: Mapping[str, Any]) -> list[str]:
    """One sentence per failed run."""
    runs = [(point["name"], run) for point in sweep["points"] for run in point["runs"]]
    return [f"{name}, seed {run['seed']}: {run['error']}" for name, run in runs if run["state"] == "failed"]


# ---- the table ---------------------------------------------------------------------------------------------------------


def title(sweep: Mapping[str, Any]) -> str:
    """Network, recipe, and the bits unless they are what is varied."""
    parts = [Path(sweep["model"]).name, Path(sweep["recipe"]).stem]
    if not any(key.endswith("_bits") for key in sweep["own_values"]):
        parts.append(f"W{sweep['weight_bits']:g}A{sweep['act_bits']}")
    return ", ".join(parts)


def table(sweep: Mapping[str, Any]) -> str:
    points, seeds = sweep["points"], len(sweep["seeds"])
    measures = {key: text for key, text in MEASURES.items() if any(point[key] for point in points)}
    head = [*map(keys_text, sweep["options"]), *measures.values(), "runs"]
    rows = [head]
    for point in points:
        done = sum(run["state"] == "done" for run in point["runs"])
        failed = sum(run["state"] == "failed" for run in point["runs"])
        note = f"{done}/{seeds}" + (f", {failed} failed" if failed else "") + (" *" if point["own"] else "")
        values = [values_text(keys, point["values"]) for keys in sweep["options"]]
        rows.append([*values, *(show(point[key]) for key in measures), note])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = len(sweep["options"])
    lines = [f"{title(sweep)}, schedule {sweep['schedule']}"]
    lines += [f"  --set {' '.join(sweep['overrides'])}"] if sweep["overrides"] else []
    for row in rows:
        cells = [text.ljust(w) if i < first or i == len(row) - 1 else text.rjust(w)
                 for i, (text, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append(f"  {'   '.join(cells)}".rstrip())
    spread = "mean ± deviation over seeds, " if seeds > 1 else ""
    lines.append(f"  (in %, {spread}* the recipe's own values)")
    if not sweep["eval_data"]:
        lines.append(
            "  (accuracies need real test images: --eval-data PATH; instead, agreement with the float network on"
        )
        lines.append(
            "  held-out synthetic images, which tells how well it was imitated there, not how well it classifies)"
        )
    elif sweep["eval_limit"]:
        lines.append(f"  (accuracies of {sweep['eval_limit']} test images only)")
    return "\n".join([*lines, *(f"  failed: {text}" for text in failures(sweep))])


def show(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.2f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.2f}")


def keys_text(keys: Sequence[str]) -> str:
    return " : ".join(keys)


def values_text(keys: Sequence[str], values: Mapping[str, Any]) -> str:
    return " : ".join(text_of(values[key]) for key in keys)


def text_of(value: Any) -> str:
    """Short, but different for different values."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
