"""zsq-fast resume: goes on from the newest intact checkpoint, with the settings the run began with."""

from __future__ import annotations

from collections.abc import Sequence

from zsq_fast.cli.arguments import Parser


def run(words: Sequence[str]) -> int:
    parser = Parser("resume", "Continue a run that was stopped or killed; on the CPU the result is bit-identical.")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse(words)
    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.result import RESULT, print_result
    from zsq_fast.cli.training import execute, make_trainer
    from zsq_fast.methods import Recipe
    from zsq_fast.runs import RunDir
    from zsq_fast.runs.storage import from_json

    with RunDir.open(arguments.run) as run_dir:
        result = run_dir.path / RESULT
        if result.exists():
            print_result(from_json(result.read_bytes(), result), as_json=arguments.json)
            return 0
        job, teacher = load(Job.from_info(run_dir.info, run_dir.path))
        trainer = make_trainer(job, Recipe.from_dict(run_dir.recipe), teacher, quiet=arguments.quiet)
        return execute(run_dir, job, trainer, as_json=arguments.json)
