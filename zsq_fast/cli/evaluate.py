"""zsq-fast evaluate: top-1 accuracy on real test images, of a run's network before and after, or of any network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from zsq_fast.cli.arguments import Parser, device, input_size, integer, numbers
from zsq_fast.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def make_parser() -> Parser:
    parser = Parser("evaluate", "Accuracy on real test images.")
    add = parser.add_argument
    add("subject", metavar="RUN_OR_MODEL", help="a run directory, or a model as `quantize` takes it")
    add("--data", required=True, metavar="PATH", help="a .npz with images and labels, or a folder of class folders")
    add("--limit", type=integer(1), metavar="N", help="only N images: the first, of a folder every so-manieth")
    add("--batch-size", type=integer(1), default=250, metavar="N")
    add("--checkpoint", metavar="FILE", help="trained weights, for a model")
    add("--num-classes", type=integer(1), metavar="N")
    add("--input-size", type=input_size, metavar="C,H,W")
    add("--mean", type=numbers, metavar="M,M,M", help="normalisation of pixels in 0..1")
    add("--std", type=numbers, metavar="S,S,S")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--allow-import", action="store_true", help="allow a model to import and run your code")
    add("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> int:
    arguments = make_parser().parse(words)
    from zsq_fast.cli.job import Job, evaluator, load
    from zsq_fast.cli.result import CHOSEN, STUDENT, load_student
    from zsq_fast.runs import RunDir

    given = {name: getattr(arguments, name) for name in ("num_classes", "input_size", "mean", "std")}
    given = {name: value for name, value in given.items() if value is not None}
    is_run = RunDir.is_run(arguments.subject)
    if is_run:
        if arguments.checkpoint:
            raise UsageError("--checkpoint is for a model; a run has its weights: leave it out.")
        run_dir = RunDir.open(arguments.subject, read_only=True)
        job = Job.from_info(run_dir.info, run_dir.path, allow_import=arguments.allow_import)
    else:
        job = Job(arguments.subject, allow_import=arguments.allow_import).with_files(checkpoint=arguments.checkpoint)
    job = replace(job, device=arguments.device, eval_limit=arguments.limit, **given).with_files(
        eval_data=arguments.data
    )
    job, teacher = load(job)
    networks: dict[str, nn.Module] = {"float": teacher}
    if is_run:
        networks["quantized"] = load_student(run_dir, job, teacher, STUDENT)
        if run_dir.holds(CHOSEN):  # the epoch that agreed best with the float network
            networks["chosen"] = load_student(run_dir, job, teacher, CHOSEN)
    measure = evaluator(job, arguments.batch_size)
    assert measure is not None
    results = {name: measure(network) for name, network in networks.items()}
    if arguments.json:
        print(json.dumps({name: result._asdict() for name, result in results.items()}, indent=1))
    for name, result in results.items() if not arguments.json else ():
        print(f"{name:<10} top-1 {result.top1:6.2f} %  top-5 {result.top5:6.2f} %  ({result.count} images)")
    return 0
