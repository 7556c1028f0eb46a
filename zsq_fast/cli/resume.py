"""zsq-fast resume: goes on from the newest intact checkpoint, with the settings the run began with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from zsq_fast.cli.arguments import Parser


def run(words: Sequence[str]) -> int:
    parser = Parser("resume", "Continue a run that was stopped or killed; on the CPU the result is bit-identical.")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--allow-import", action="store_true", help="allow the run's model to import and run code")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse(words)
    import torch

    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.result import RESULT, print_result
    from zsq_fast.cli.training import execute, make_trainer
    from zsq_fast.methods import Recipe
    from zsq_fast.runs import RunDir

    with RunDir.open(arguments.run) as run_dir:
        if run_dir.holds(RESULT):
            print_result(run_dir.load_json(RESULT), as_json=arguments.json)
            return 0
        info = run_dir.info
        job, teacher = load(Job.from_info(info, run_dir.path, allow_import=arguments.allow_import))
        if (began := info.get("versions", {}).get("torch")) != torch.__version__:
            warnings.warn(
                f"the run began with torch {began}, this is {torch.__version__}: the result may not be bit-identical.",
                stacklevel=2,
            )
        trainer = make_trainer(job, Recipe.from_dict(run_dir.recipe), teacher, quiet=arguments.quiet)
        return execute(run_dir, job, trainer, as_json=arguments.json)
