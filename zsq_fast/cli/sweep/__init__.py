"""zsq-fast sweep: a run for every value of some recipe options, in several processes, with one table and one plot."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsq_fast.cli.arguments import Parser, add_images_option, add_job_options, bits, integer, seed
from zsq_fast.cli.sweep.options import PLAN, option
from zsq_fast.errors import BadFileError, Interrupted, TrainingError, UsageError

if TYPE_CHECKING:
    from zsq_fast.cli.job import Job
    from zsq_fast.cli.sweep.plan import Plan, Run


def make_parser() -> Parser:
    parser = Parser("sweep", "Quantize with several values of recipe options; one table and one plot.")
    add = parser.add_argument
    add("model", metavar="MODEL_OR_DIR", help="a model as `quantize` takes it, or a sweep that was begun: it goes on")
    add("--recipe", required=True, help="a name from `zsq-fast recipes`, or a .toml file")
    add("-w", "--weight-bits", type=bits, metavar="BITS", help="2 to 8")
    add("-a", "--act-bits", type=bits, metavar="BITS", help="2 to 8")
    add(
        "--vary",
        type=option,
        action="append",
        required=True,
        metavar="A.B=V,V,...",
        help="an option and its values; A.B:C.D=V:V,V:V sets two together; several times: all combinations",
    )
    add("--one-at-a-time", action="store_true", help="vary each option alone in place of all combinations")
    add("--seeds", type=seed, nargs="+", default=[0], metavar="N", help="of every point (0)")
    add("--out", metavar="DIR", help="goes on with what is there (runs/MODEL-RECIPE-wXaY-sweep)")
    _add_own(parser)
    add_job_options(parser, data="--eval-data", limit="--eval-limit")
    return parser


def make_directory_parser() -> Parser:
    """Of `zsq-fast sweep DIR`, which knows everything else."""
    parser = Parser("sweep DIR", "Go on with a sweep.")
    add = parser.add_argument
    add("directory", metavar="DIR")
    _add_own(parser)
    add_images_option(parser)
    add("--dry-run", action="store_true", help="print the points, estimates of time and memory, and stop")
    add("--allow-import", action="store_true", help="allow the model to import and run your code")
    add("--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_own(parser: Parser) -> None:
    add = parser.add_argument
    add("--jobs", type=integer(1, 1024), default=1, metavar="N", help="runs at a time (1); they share the CPU threads")
    add("--table-only", action="store_true", help="train nothing; show what is there")
    add("--no-pictures", action="store_true", help="no plot; needs no matplotlib")


def run(words: Sequence[str]) -> int:
    pairs = zip(["", *words], words)
    # os.path: a list of values may be longer than a file's name, which Path takes for an error.
    going_on = any(before != "--out" and os.path.isfile(os.path.join(word, PLAN)) for before, word in pairs)
    arguments = (make_directory_parser() if going_on else make_parser()).parse(words)
    from zsq_fast.cli.sweep.plan import Plan

    if going_on:
        out = Path(arguments.directory)
        plan = Plan.load(out, allow_import=arguments.allow_import)
    else:
        plan, out = _plan(arguments)
    runs = plan.runs(out)
    if arguments.images is not None and not any(run.point.recipe.images.enabled for run in runs):
        from zsq_fast.cli.training import check_optimises

        check_optimises(runs[0].point.recipe)
    if arguments.dry_run:
        from zsq_fast.cli.sweep.cost import print_cost

        print_cost(plan, runs, arguments.jobs, as_json=arguments.json)
        return 0
    from zsq_fast.cli.analyze import figure_class
    from zsq_fast.cli.sweep.results import collect, failures, kept_errors, table

    figure = None if arguments.no_pictures else figure_class()
    errors = kept_errors(out)
    if not arguments.table_only:
        if going_on and any(run.result() is None for run in runs):
            _network(plan.job)  # the one it was begun with, or nothing is trained
        _train(plan, out, runs, errors, arguments)
    elif not (out / PLAN).is_file():
        raise UsageError(f"there is no sweep in {out}; leave --table-only out to begin one.")
    sweep = collect(plan, runs, errors)
    _write(out, sweep, figure)
    if arguments.json:
        print(json.dumps(sweep, indent=1))
    else:
        print(table(sweep))
        print(f"numbers{'' if figure is None else ' and plot'}: {out}/sweep.*; runs: {out}/POINT/seed-N")
    if failed := failures(sweep):
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again.")
    return 0


def _plan(arguments: argparse.Namespace) -> tuple[Plan, Path]:
    """From a whole command line. What is wrong with options, values, files and the network's name is found here, before there is a
    directory; what a run refuses in the network itself (nothing to quantize, unknown feature points), that run says."""
    from zsq_fast.cli.job import Job, evaluator
    from zsq_fast.cli.sweep.plan import Plan
    from zsq_fast.cli.training import default_out

    job = _network(Job.from_arguments(arguments, model=arguments.model))
    recipe = arguments.recipe
    plan = Plan(
        job,
        str(Path(recipe).absolute()) if recipe.endswith(".toml") else recipe,
        arguments.weight_bits,
        arguments.act_bits,
        arguments.schedule,
        tuple(arguments.overrides),
        tuple(arguments.vary),
        arguments.one_at_a_time,
        tuple(dict.fromkeys(arguments.seeds)),
    )
    points = plan.points()
    blind = [p.name for p in points if not (p.recipe.schedule.held_out and p.recipe.student.enabled)]
    if blind and not job.eval_data:
        raise UsageError(f"nothing would be measured of the point {blind[0]}: give test images by --eval-data.")
    evaluator(job)
    out = Path(arguments.out or default_out(job, recipe, plan.resolve()).as_posix() + "-sweep")
    begun = Plan.load(out) if (out / PLAN).is_file() else None
    plan = replace(plan, job=_settled(job, begun, arguments.jobs))
    if begun is not None:
        plan.check_continues(begun, out)
    return plan, out


def _network(job: Job) -> Job:
    """With what the network tells. It is built on the CPU: the runs load it themselves."""
    from zsq_fast.cli.job import load

    loaded, _ = load(replace(job, device="cpu", threads=0))
    return replace(loaded, device=job.device, threads=job.threads)


def _settled(job: Job, begun: Plan | None, jobs: int) -> Job:
    """Device and threads of every run, for its bits depend on both: as given, as begun, or as this machine has them."""
    import torch

    from zsq_fast.cli.job import pick_device

    device = begun.job.device if begun is not None and job.device == "auto" else pick_device(job.device)
    share = begun.job.threads if begun is not None else max(1, torch.get_num_threads() // jobs)
    return replace(job, device=device, threads=job.threads or share)


def _train(plan: Plan, out: Path, runs: Sequence[Run], errors: dict[str, str], arguments: argparse.Namespace) -> None:
    """All runs that are not finished. `errors` holds those of runs that failed afterwards.

    Raises:
        Interrupted: a signal arrived, and every process has saved its state.
    """
    from zsq_fast.cli.sweep.results import collect
    from zsq_fast.cli.sweep.workers import work
    from zsq_fast.runs import Progress, RunDir
    from zsq_fast.runs.directory import IMAGES, MANIFEST
    from zsq_fast.runs.storage import replace_file, to_json

    with _locked(out):
        replace_file(out / PLAN, to_json(plan.to_dict()))
        todo = [run for run in runs if run.result() is None]
        for run in todo:
            errors.pop(run.label, None)
            for path in (run.path.parent, run.path, run.path / IMAGES):
                if path.is_symlink():
                    raise BadFileError(f"{path} is a link, which could lead anywhere; remove it.")
            if (run.path / MANIFEST).is_file():
                with contextlib.suppress(BadFileError):  # the run itself will tell
                    RunDir.open(run.path).close()  # StorageError: another process is training it
        progress = Progress(quiet=arguments.quiet)

        def ended(run: Run, failure: str | None) -> None:
            if failure is not None:
                errors[run.label] = failure
            _write(out, collect(plan, runs, errors), None)
            progress.message(f"{run.label}: {failure or 'done'}")
            progress.advance()

        progress.start(len(runs), "runs", done=len(runs) - len(todo))
        number: int | None = signal.SIGINT
        how = "stopped at once"
        try:
            number = work(
                runs,
                todo,
                arguments.jobs,
                lambda run: plan.command(run, allow_import=arguments.allow_import, images=arguments.images),
                lambda run: progress.message(f"{run.label}: begun, log in {run.log}"),
                ended,
            )
            how = "stopped and saved"
        except KeyboardInterrupt:  # the second signal
            pass
        finally:
            progress.stop()
        _write(out, collect(plan, runs, errors), None)
        if number is not None:
            done = sum(run.result() is not None for run in runs)
            hint = f"zsq-fast sweep {out}{' --allow-import' if arguments.allow_import else ''}"
            raise Interrupted(f"{how}; {done} of {len(runs)} runs are finished; `{hint}` goes on.", number)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One sweep at a time in a directory that is made here, or holds one already."""
    from zsq_fast.runs.directory import acquire, check_free
    from zsq_fast.runs.storage import make_directory, writing

    if not (out / PLAN).is_file():
        check_free(out)
    with writing(out):
        make_directory(out)
    lock = acquire(out)
    try:
        yield
    finally:
        lock.release()


def _write(out: Path, sweep: Mapping[str, Any], figure: Any) -> None:
    """sweep.json, and with a figure class the plot, if there is anything to draw yet."""
    from zsq_fast.runs.storage import replace_file, to_json

    replace_file(out / "sweep.json", to_json(sweep))
    if figure is not None and any(point[sweep["measure"]] for point in sweep["points"]):
        from zsq_fast.cli.sweep.plot import pictures

        for name, data in pictures(sweep, figure).items():
            replace_file(out / name, data)
