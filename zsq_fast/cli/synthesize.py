"""zsq-fast synthesize: optimised images as a stage of their own, made once for any run that wants the same."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zsq_fast.cli.arguments import Parser, add_network_options, seed, shard

if TYPE_CHECKING:
    from torch import nn

    from zsq_fast.cli.job import Job
    from zsq_fast.methods import Recipe


def make_parser() -> Parser:
    parser = Parser("synthesize", "Make the optimised images of a recipe; `quantize --images DIR` takes them.")
    add = parser.add_argument
    add("model", help="resnet20, torchvision:NAME, timm:NAME, pytorchcv:NAME; with --allow-import module:factory")
    add("--recipe", required=True, help="a name from `zsq-fast recipes`, or a .toml file; its [images] count")
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="holds sets of any recipe, network and seed; goes on with what is there",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of the runs that are to use them (0)")
    add(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="only part I of N (0 to N - 1), for N processes at once",
    )
    add_network_options(parser)
    return parser


def run(words: Sequence[str]) -> int:
    arguments = make_parser().parse(words)
    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.training import check_optimises, keep_images
    from zsq_fast.methods import load_recipe
    from zsq_fast.methods.images import batch_files
    from zsq_fast.methods.trainer import check_teacher
    from zsq_fast.runs import Progress

    job, teacher = load(Job.from_arguments(arguments, model=arguments.model, seed=arguments.seed))
    recipe = load_recipe(
        arguments.recipe,
        input_size=job.input_size or (),
        schedule=arguments.schedule,
        overrides=arguments.overrides,
    )
    check_optimises(recipe)
    check_teacher(teacher, force=job.force)
    names, (part, parts) = batch_files(recipe.images), arguments.shard
    report: dict[str, Any] = {
        "model": job.model,
        "recipe": recipe.name,
        "seed": job.seed,
        "device": job.device,
        "threads": job.threads,
        "images": recipe.to_dict()["images"],
        "shard": [part, parts],
        "batches": len(names[part::parts]),
    }
    if arguments.dry_run:
        report["seconds_each"] = _seconds_each(job, recipe, teacher)
        report["seconds"] = report["batches"] * recipe.images.iterations * report["seconds_each"]
        print(json.dumps(report, indent=1)) if arguments.json else _print_plan(report)
        return 0
    made, began = list[int](), time.perf_counter()
    shelf = keep_images(
        job,
        recipe,
        teacher,
        arguments.out,
        progress=Progress(quiet=arguments.quiet),
        shard=arguments.shard,
        log=lambda **record: made.append(record["images_batch"]),
    )
    report["made"], report["missing"] = len(made), sum(not (shelf / name).is_file() for name in names)
    report["directory"], report["minutes"] = str(shelf.resolve()), (time.perf_counter() - began) / 60
    print(json.dumps(report, indent=1)) if arguments.json else _print(report)
    return 0


def _seconds_each(job: Job, recipe: Recipe, teacher: nn.Module) -> float:
    from zsq_fast.methods.estimate import time_images
    from zsq_fast.methods.images import count_classes

    size = job.input_size or ()
    return time_images(teacher, recipe.images, size, count_classes(teacher, size), job.seed, layout=job.layout)[0]


def _head(report: Mapping[str, Any]) -> str:
    images, (part, parts) = report["images"], report["shard"]
    share = f", part {part} of {parts}" if parts > 1 else ""
    return (
        f"{report['model']}, images of {report['recipe']}, seed {report['seed']}: "
        f"{images['count']}, {images['batch_size']} at a time{share}"
    )


def _print_plan(report: Mapping[str, Any]) -> None:
    from zsq_fast.cli.result import duration_text

    where = report["device"] if report["device"] != "cpu" else f"cpu, {report['threads']} threads"
    count, each = report["batches"] * report["images"]["iterations"], report["seconds_each"]
    print(_head(report))
    print(f"time ({where}; 2 iterations measured): {count} x {each:.4g} s = {duration_text(report['seconds'])}")


def _print(report: Mapping[str, Any]) -> None:
    print(_head(report))
    print(f"  batches made: {report['made']}, there before: {report['batches'] - report['made']}")
    if report["missing"]:
        print(f"  of the whole set {report['missing']} batches are missing still")
    print(f"{report['minutes']:.1f} minutes; set: {report['directory']}")
