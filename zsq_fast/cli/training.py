"""From a job and a run directory to a result: what `quantize` and `resume` share."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zsq_fast.analysis.forecast import network_of
from zsq_fast.cli.job import Job, evaluator, load
from zsq_fast.cli.result import CHOSEN, RESULT, STUDENT, expectation, print_plan, record
from zsq_fast.errors import Interrupted, UsageError
from zsq_fast.methods import Recipe, Trainer, student_like
from zsq_fast.methods.estimate import estimate
from zsq_fast.methods.images import batch_files, cached_images, count_classes, set_name
from zsq_fast.methods.mixed import even_bits
from zsq_fast.nn import summarize
from zsq_fast.runs import Progress, RunDir, reporting
from zsq_fast.runs.directory import TENSORBOARD, check_free
from zsq_fast.runs.storage import link


def default_out(job: Job, recipe_name: str, recipe: Recipe) -> Path:
    name = (
        f"{Path(job.model).name}-{Path(recipe_name).stem}-w{recipe.quant.nominal_weight_bits:g}a{recipe.quant.act_bits}"
    )
    return Path("runs") / re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def plan(job: Job, recipe: Recipe, teacher: nn.Module, *, runs: int = 1, as_json: bool = False) -> int:
    """--dry-run: prints what would be done and what it would take, for so many runs."""
    assert job.input_size is not None
    student = student_like(teacher, even_bits(recipe, teacher, job.input_size), job.input_size)
    options: dict[str, Any] = dict(seed=job.seed, channels_last=job.channels_last, force=job.force)
    cost = estimate(teacher, recipe, input_size=job.input_size, **options)
    network = network_of(teacher, job.input_size)
    print_plan(job, recipe, summarize(student), network, cost, runs=runs, as_json=as_json)
    return 0


def make_trainer(job: Job, recipe: Recipe, teacher: nn.Module, progress: Progress) -> Trainer:
    """Everything that can be wrong with the input is found here, before a run directory exists."""
    if job.tensorboard:
        from zsq_fast.live.tensorboard import writer_class

        writer_class()
    measure = evaluator(job)
    assert job.input_size is not None
    return Trainer(
        teacher,
        recipe,
        input_size=job.input_size,
        seed=job.seed,
        evaluate=None if measure is None else lambda model: measure(model).top1,
        eval_every=job.eval_every,
        track_cosine=job.track_cosine,
        progress=progress,
        channels_last=job.channels_last,
        force=job.force,
        track_updates=job.track_updates,
    )


def check_optimises(recipe: Recipe) -> None:
    """UsageError unless the recipe's images can be made before its students train."""
    if not recipe.images.enabled:
        raise UsageError(
            f"the recipe '{recipe.name}' has no optimised images (images.enabled is false): a generator makes its images during training."
        )


def keep_images(job: Job, recipe: Recipe, teacher: nn.Module, folder: str | Path, **options: Any) -> Path:
    """The directory in `folder` that holds the optimised images of the recipe, after those that were missing have been made.

    `options`: of `synthesize_images`.
    """
    assert job.input_size is not None
    source = (teacher, recipe.images, job.input_size, count_classes(teacher, job.input_size), job.seed)
    cached_images(folder, *source, layout=job.layout, **options)
    return Path(folder) / set_name(*source)


def begin(
    out: str | Path, job: Job, recipe: Recipe, teacher: nn.Module, progress: Progress, images: str | None = None
) -> dict[str, Any]:
    """A new run in `out`, from the start to the end: see `execute`.

    Its optimised images are those of the directory `images`, where that is given. The run gets them as links and knows nothing else of
    where they came from, so it can be resumed, analysed and moved without that directory.
    """
    trainer = make_trainer(job, recipe, teacher, progress)
    shelf = None
    if images is not None:
        check_free(out)  # before hours of images
        shelf = keep_images(job, recipe, teacher, images, progress=progress)
    with RunDir.create(out, trainer.recipe.to_dict(), job.to_info()) as run_dir:
        if shelf is not None:
            for name in batch_files(recipe.images):
                if not (target := run_dir.image_dir / shelf.name / name).exists():  # a sweep brings some along
                    link(shelf / name, target)
        return execute(run_dir, job, trainer)


def execute(run_dir: RunDir, job: Job, trainer: Trainer) -> dict[str, Any]:
    """Trains from the newest checkpoint (or the start) to the end, writes the students and result.json, returns its content."""
    trainer.run_dir = run_dir
    trainer.resume_hint = f"zsq-fast resume {run_dir.path}{' --allow-import' if job.allow_import else ''}"
    network = network_of(trainer.synthesis.source, trainer.input_size)
    if (before := expectation(trainer.recipe, network)) is not None:
        trainer.progress.message(str(before))
    log: Any = nullcontext()
    if job.tensorboard:
        from zsq_fast.live.tensorboard import TensorBoard

        trainer.on_epoch = log = TensorBoard(run_dir.path / TENSORBOARD, job.mean or (), job.std or ())
    try:
        with reporting(run_dir.path, trainer.progress), log:
            trainer.restore()
            result = trainer.run()
            if result.chosen_state is not None:
                run_dir.save_tensors(CHOSEN, result.chosen_state, job.metadata(trainer.recipe))
            student = run_dir.save_tensors(STUDENT, result.student.state_dict(), job.metadata(trainer.recipe))
            summary = record(job, trainer.recipe, result, student, network)
            run_dir.write_json(RESULT, summary)
            return summary
    except KeyboardInterrupt:  # the second Ctrl-C
        raise Interrupted(f"stopped at once; `{trainer.resume_hint}` goes on from the last checkpoint.") from None
    except Exception:
        if not run_dir.has_checkpoint:  # nothing to go on from, and it would be in the way of the next try
            run_dir.discard()
        raise


def proceed(run_dir: RunDir, *, allow_import: bool, quiet: bool, tensorboard: bool | None = None) -> dict[str, Any]:
    """The result of a run that was begun: read if it is finished, else the run goes on with the settings it began with, but
    for `tensorboard` where it is not None."""
    if run_dir.holds(RESULT):
        return run_dir.load_json(RESULT)
    info, progress = run_dir.info, Progress(quiet=quiet)
    job = Job.from_info(info, run_dir.path, allow_import=allow_import)
    with reporting(run_dir.path, progress):  # from here on, or who looks on sees how the run ended before
        job, teacher = load(job if tensorboard is None else replace(job, tensorboard=tensorboard))
        if (began := info.get("versions", {}).get("torch")) != torch.__version__:
            warnings.warn(
                f"the run began with torch {began}, this is {torch.__version__}: the result may not be bit-identical.",
                stacklevel=2,
            )
        return execute(run_dir, job, make_trainer(job, Recipe.from_dict(run_dir.recipe), teacher, progress))
