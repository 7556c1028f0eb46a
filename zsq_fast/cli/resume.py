"""zsq-fast resume: goes on from the newest intact checkpoint, with the settings the run began with."""

from __future__ import annotations

from collections.abc import Sequence

from zsq_fast.cli.arguments import Parser


def run(words: Sequence[str]) -> int:
    parser = Parser("resume", "Continue a run that was stopped or killed; on the CPU the result is bit-identical.")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--allow-import", action="store_true", help="allow the run's model to import and run code")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_switch("--tensorboard", "whether to go on writing RUN/tensorboard (as the run began)")
    arguments = parser.parse(words)
    from zsq_fast.cli.result import print_result
    from zsq_fast.cli.training import proceed
    from zsq_fast.runs import RunDir

    with RunDir.open(arguments.run) as run_dir:
        result = proceed(
            run_dir, allow_import=arguments.allow_import, quiet=arguments.quiet, tensorboard=arguments.tensorboard
        )
    print_result(result, as_json=arguments.json)
    return 0
