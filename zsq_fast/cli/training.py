"""From a job and a run directory to a result: what `quantize` and `resume` share."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from zsq_fast.cli.job import Job, evaluator
from zsq_fast.cli.result import RESULT, STUDENT, print_result, record
from zsq_fast.errors import Interrupted
from zsq_fast.methods import Recipe, Trainer
from zsq_fast.runs import Progress, RunDir


def default_out(job: Job, recipe_name: str, recipe: Recipe) -> Path:
    name = (
        f"{Path(job.model).name}-{Path(recipe_name).stem}-w{recipe.quant.nominal_weight_bits:g}a{recipe.quant.act_bits}"
    )
    return Path("runs") / re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def make_trainer(job: Job, recipe: Recipe, teacher: nn.Module, *, quiet: bool = False) -> Trainer:
    """Everything that can be wrong with the input is found here, before a run directory exists."""
    measure = evaluator(job)
    assert job.input_size is not None
    return Trainer(
        teacher,
        recipe,
        input_size=job.input_size,
        seed=job.seed,
        evaluate=None if measure is None else lambda model: measure(model).top1,
        progress=Progress(quiet=quiet),
        channels_last=job.channels_last,
        force=job.force,
    )


def execute(run_dir: RunDir, job: Job, trainer: Trainer, *, as_json: bool = False) -> int:
    """Trains from the newest checkpoint (or the start) to the end, writes the student and result.json, prints it."""
    trainer.run_dir = run_dir
    trainer.resume_hint = f"zsq-fast resume {run_dir.path}{' --allow-import' if job.allow_import else ''}"
    try:
        trainer.restore()
        result = trainer.run()
    except KeyboardInterrupt:  # the second Ctrl-C
        raise Interrupted(f"stopped at once; `{trainer.resume_hint}` goes on from the last checkpoint.") from None
    except Exception:
        if not run_dir.has_checkpoint:  # nothing to go on from, and it would be in the way of the next try
            run_dir.discard()
        raise
    student = run_dir.save_tensors(STUDENT, result.student.state_dict(), job.metadata(trainer.recipe))
    summary = record(job, trainer.recipe, result, student)
    run_dir.write_json(RESULT, summary)
    print_result(summary, as_json=as_json)
    return 0
