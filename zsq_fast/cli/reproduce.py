"""zsq-fast reproduce: trains a row of a paper's table, several seeds of it, and sets it beside the published number."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsq_fast import papers
from zsq_fast.cli.arguments import Parser, add_job_options, integer
from zsq_fast.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from zsq_fast.cli.job import Job
    from zsq_fast.methods import Recipe
    from zsq_fast.runs import RunDir

LIST = "--list"
# key of the JSON -> what the table calls it
LINES = {"last": "last epoch", "chosen": "epoch chosen by agreement", "best_on_test": "best on test, not a fair choice"}


def make_parser() -> Parser:
    parser = Parser("reproduce", "Train a row of a paper's table and print it beside the published number.")
    add = parser.add_argument
    add("row", metavar="PAPER/TABLE/ROW", help=f"see `zsq-fast reproduce {LIST}`; a second call goes on")
    add("--seeds", type=integer(1, 1000), default=3, metavar="N", help="runs, of seeds 0 to N - 1 (3)")
    add("--model", help="another network in place of the paper's, as `quantize` takes it")
    add("--out", metavar="DIR", help="one run directory per seed goes here (runs/PAPER-TABLE-ROW-SCHEDULE)")
    add(LIST, action="store_true", help="print the papers, or the rows of PAPER or PAPER/TABLE")
    add_job_options(parser, data="--data", limit="--limit")
    return parser


def run(words: Sequence[str]) -> int:
    if LIST in words and "--help" not in words:
        return _list(words)
    arguments = make_parser().parse(words)
    row = papers.resolve(arguments.row)
    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.training import check_optimises, plan
    from zsq_fast.methods import load_recipe
    from zsq_fast.runs import RunDir
    from zsq_fast.runs.directory import check_free

    job = Job.from_arguments(
        arguments, model=arguments.model or row.model, eval_every=1 if arguments.eval_data else None
    )
    out = Path(arguments.out or Path("runs") / f"{row.id.replace('/', '-')}-{arguments.schedule}")
    directories = [out / f"seed-{seed}" for seed in range(arguments.seeds)]
    for directory in (out, *directories):  # before the first seed is trained
        if directory.is_file() or (directory != out and not RunDir.is_run(directory)):
            check_free(directory)
    results = []
    for seed, directory in enumerate(directories):
        loaded, teacher = load(replace(job, seed=seed))
        recipe = load_recipe(
            row.recipe,
            input_size=loaded.input_size or (),
            schedule=arguments.schedule,
            overrides=(*row.overrides, *arguments.overrides),
            weight_bits=row.weight_bits,
            act_bits=row.act_bits,
        )
        if arguments.images is not None:
            check_optimises(recipe)
        if arguments.dry_run:
            return plan(loaded, recipe, teacher, runs=arguments.seeds, as_json=arguments.json)
        results.append(_run(directory, loaded, recipe, teacher, arguments.images, quiet=arguments.quiet))
    report = _report(row, arguments.schedule, arguments.overrides, results, replaced=arguments.model is not None)
    print(json.dumps(report, indent=1)) if arguments.json else _print(report)
    return 0


def _list(words: Sequence[str]) -> int:
    parser = Parser("reproduce", "List the papers, or the rows of a paper or of one of its tables.")
    parser.add_argument("paper", nargs="?", metavar="PAPER[/TABLE]")
    parser.add_argument(LIST, action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse(words)
    if arguments.paper is None:
        known = papers.papers()
        text = "\n".join(f"{name:<12}{title}" for name, title in known.items())
        print(json.dumps(known, indent=1) if arguments.json else text)
        return 0
    rows = papers.rows(arguments.paper)
    if arguments.json:
        print(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1))
        return 0
    width, title = max(map(len, rows)), None
    for name, row in rows.items():
        if row.title != title:
            title = row.title
            print(f"{title} ({row.source})")
        print(f"  {name:<{width}}  {row.top1:6.2f} of {row.float_top1:.2f} %  {row.model} on {row.dataset}")
    return 0


def _run(
    path: Path, job: Job, recipe: Recipe, teacher: nn.Module, images: str | None, *, quiet: bool
) -> dict[str, Any]:
    """The result of one seed: read, gone on with, or trained from the start."""
    from zsq_fast.cli.training import begin, proceed
    from zsq_fast.methods.autorecon import SEARCH
    from zsq_fast.runs import Progress, RunDir

    if not RunDir.is_run(path):
        return begin(path, job, recipe, teacher, Progress(quiet=quiet), images)
    with RunDir.open(path) as run_dir:
        stored, ours = run_dir.info.get("job", {}), json.loads(json.dumps(asdict(job)))
        recipes = run_dir.recipe, recipe.to_dict()
        # What a run finds and writes into its own recipe.
        if recipe.generator.genotype == SEARCH or recipe.generator.genotype.endswith((".toml", ".json")):
            recipes[0]["generator"]["genotype"] = recipe.generator.genotype
        if recipe.quant.average_weight_bits and not recipe.quant.layer_bits:
            recipes[0]["quant"]["layer_bits"] = []
        other = [name for name in ("weights_sha256", "input_size", "seed") if stored.get(name) != ours[name]]
        if recipes[0] != recipes[1] or other:
            what = other[0] if other else "recipe"
            raise UsageError(f"{path} holds a run with another {what}; choose another --out or remove it.")
        result = proceed(run_dir, allow_import=job.allow_import, quiet=quiet)
        if job.eval_data and (
            not result["top1"] or result["eval_data"] != job.eval_data or result["eval_limit"] != job.eval_limit
        ):
            result = {**result, **_evaluated(run_dir, job, teacher, result)}
        return result


def _evaluated(run_dir: RunDir, job: Job, teacher: nn.Module, result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies on this call's test images of a run that had none or others; the best on test is not known then."""
    from zsq_fast.cli.job import evaluator
    from zsq_fast.cli.result import CHOSEN, STUDENT, load_student

    measure = evaluator(job)
    assert measure is not None
    networks = {"float": teacher, "last": load_student(run_dir, job, teacher, STUDENT)}
    if result["chosen_epoch"] is not None:
        networks["chosen"] = load_student(run_dir, job, teacher, CHOSEN)
    top1 = {name: measure(network).top1 for name, network in networks.items()}
    return {"top1": top1, "eval_data": job.eval_data, "eval_limit": job.eval_limit, "best_on_test": None}


def _report(
    row: papers.Row,
    schedule: str,
    changes: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    *,
    replaced: bool,
) -> dict[str, Any]:
    """Percents and points; `drop` is from the float accuracy of the same run. `deviation` is the sample's, None of one seed.

    Bits are those of the runs; `overrides` are the row's as far as the user's own, `changed_from_row`, leave them.
    """
    seeds = []
    for result in results:
        top1 = {**result["top1"], "best_on_test": result["best_on_test"]}
        seeds.append(
            {
                "seed": result["seed"],
                "float": top1.get("float"),
                **{key: top1.get(key) for key in LINES},
                "chosen_epoch": result["chosen_epoch"],
                "held_out": result["held_out"],
                "minutes": result["minutes"],
                "student": result["student"],
            }
        )
    ours = {}
    for key in LINES if results and results[0]["top1"] else ():
        values = [(seed[key], seed["float"]) for seed in seeds if seed[key] is not None]
        if values:
            ours[key] = {
                "top1": _mean([ours for ours, _ in values]),
                "drop": _mean([before - ours for ours, before in values]),
                "float": _mean([before for _, before in values]),
                "seeds": len(values),
            }
    paper = {"top1": row.top1, "float": row.float_top1, "drop": row.float_top1 - row.top1, "source": row.source}
    result = results[0]
    return {
        "row": row.id,
        "title": row.title,
        "recipe": row.recipe,
        "overrides": [text for text in row.overrides if _key(text) not in map(_key, changes)],
        "changed_from_row": list(changes),
        "dataset": row.dataset,
        "model": result["model"],
        "model_of_paper": not replaced,
        "schedule": schedule,
        "weight_bits": result["weight_bits"],
        "act_bits": result["act_bits"],
        "eval_data": result["eval_data"],
        "eval_limit": result["eval_limit"],
        "paper": paper,
        "ours": ours,
        "agreement": {
            name: _mean([100 * seed["held_out"][name]["agreement"] for seed in seeds])
            for name in ("last", "chosen")
            if all(seed["held_out"] for seed in seeds)
        },
        "seeds": seeds,
    }


def _key(override: str) -> str:
    return override.split("=")[0].strip()


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}


def _show(value: Mapping[str, float | None], width: int = 16) -> str:
    spread = "" if value["deviation"] is None else f" ± {value['deviation']:.2f}"
    return f"{value['mean']:.2f}{spread}".rjust(width)


def _print(report: Mapping[str, Any]) -> None:
    paper, count = report["paper"], len(report["seeds"])
    print(f"{report['row']}: {report['title']} ({paper['source']})")
    bits, note = (
        f"W{report['weight_bits']:g}A{report['act_bits']}",
        "" if report["model_of_paper"] else ", not the paper's",
    )
    settings = "".join(f" {text}" for text in report["overrides"])
    print(
        f"{report['model']}{note}; {bits}, recipe {report['recipe']}{settings}, schedule {report['schedule']}, {count} seeds"
    )
    if report["changed_from_row"]:
        print(f"changed from the row: {', '.join(report['changed_from_row'])}")
    print(f"  {'':<40}{'top-1 in %':>16}{'drop from float':>18}{'float':>10}")
    print(f"  {'paper':<40}{paper['top1']:>16.2f}{paper['drop']:>18.2f}{paper['float']:>10.2f}")
    for key, value in report["ours"].items():
        few = "" if value["seeds"] == count else f"  ({value['seeds']} of {count} seeds)"
        line = f"{_show(value['top1'])}{_show(value['drop'], 18)}{value['float']['mean']:>10.2f}{few}"
        print(f"  {'ours, ' + LINES[key]:<40}{line}")
    for key, value in report["agreement"].items():
        print(f"  {'agreement with the teacher, ' + key:<40}{_show(value)}  (held-out synthetic images)")
    if not report["ours"]:
        print("  (accuracies need real test images: --data PATH; agreement alone is known)")
    elif report["eval_limit"]:
        print(f"  (accuracies of {report['eval_limit']} test images only)")
    for seed in report["seeds"]:
        values = [f"{text} {seed[key]:.2f}" for key, text in LINES.items() if seed[key] is not None]
        chosen = [] if seed["chosen_epoch"] is None else [f"chose epoch {seed['chosen_epoch'] + 1}"]
        print(f"  seed {seed['seed']}: " + "; ".join([*values, *chosen, f"{seed['minutes']:.1f} minutes"]))
