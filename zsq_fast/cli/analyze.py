"""zsq-fast analyze: numbers and pictures of a finished run."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zsq_fast.analysis import ANALYSES, check_name, find, options, read_options
from zsq_fast.cli.arguments import Parser, device, integer
from zsq_fast.errors import BadFileError, LimitError, UnsupportedModelError, UsageError, ZsqError

FOLDER, ALL = "analysis", "all"


def _points(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"'{text}' is not a number of points")
    return value


def make_parser() -> Parser:
    parser = Parser("analyze", f"Look into a finished run; writes RUN/{FOLDER}/NAME.json and NAME.png.")
    add = parser.add_argument
    add("run", metavar="RUN", help="the directory of a finished run")
    add(
        "--what",
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"any of: {', '.join(ANALYSES)}; or {ALL} that the run allows",
    )
    add("--chosen", action="store_true", help="the student of the chosen epoch, not of the last one")
    add(
        "--images",
        type=integer(1),
        default=256,
        metavar="N",
        help="synthetic images to look at, at most (256)",
    )
    add("--batch-size", type=integer(1), default=64, metavar="N")
    add(
        "--set",
        dest="options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME.OPTION=VALUE",
        help="options of analyses, such as surface.directions=eigenvectors surface.points=21 hessian.losses=ce,kl",
    )
    add(
        "--fail-above",
        type=_points,
        metavar="DROP",
        help="with forecast: exit 7 when it expects to lose more points, 2 beyond its calibration",
    )
    add("--no-pictures", action="store_true", help="numbers only; needs no matplotlib")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--allow-import", action="store_true", help="allow the run's model to import and run your code")
    add("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> int:
    arguments = make_parser().parse(words)
    asked = {check_name(name) for name in arguments.what if name != ALL}
    if arguments.fail_above is not None:
        if not {ALL, "forecast"} & set(arguments.what):
            raise UsageError("--fail-above is a limit to the forecast: add it to --what.")
        asked.add("forecast")
    given = read_options(arguments.options)
    for name in given:
        if not {ALL, name} & set(arguments.what):
            raise UsageError(f"--set has options of '{name}': add it to --what.")
    asked |= given.keys()
    names = list(ANALYSES) if ALL in arguments.what else list(dict.fromkeys(arguments.what))
    figure = None if arguments.no_pictures else figure_class()
    from zsq_fast.runs.storage import make_directory, replace_file, to_json, writing

    subject, folder = _load(arguments), Path(arguments.run) / FOLDER
    with writing(folder):
        make_directory(folder)
    results: dict[str, dict[str, Any]] = {}
    refusals, left_out = list[ZsqError](), list[str]()
    for name in names:
        compute, draw = find(name)
        used = {**options(name), **given.get(name, {})}
        try:
            result = compute(subject, **used)
        except ZsqError as error:
            if name not in asked and isinstance(error, UsageError | UnsupportedModelError):
                left_out.append(f"{name} ({_sentence(error)})")
            else:
                print(f"zsq-fast: error: {name}: {_sentence(error)}", file=sys.stderr)
                refusals.append(error)
            continue
        results[name] = {**result.to_dict(), **({"options": used} if used else {})}
        replace_file(folder / f"{name}.json", to_json(results[name]))
        if figure is not None:
            replace_file(folder / f"{name}.png", _png(figure, draw, result))
        if not arguments.json:
            print(f"{name}\n{result}\n")
    if arguments.json:
        print(to_json(results).decode(), end="")
    elif results:
        print(f"numbers{'' if figure is None else ' and pictures'}: {folder}")
    if left_out:
        print(f"zsq-fast: not for this run: {'; '.join(left_out)}", file=sys.stderr)
    if refusals:
        return refusals[0].exit_code
    if arguments.fail_above is not None:
        _check_limit(results["forecast"]["forecast"], arguments.fail_above)
    return 0


def _sentence(error: ZsqError) -> str:
    return " ".join(str(error).split())


def _check_limit(found: Mapping[str, Any], limit: float) -> None:
    if found["beyond"]:  # nobody knows how wrong the number is, so it lets nothing pass
        raise UsageError(
            f"the run is beyond the calibration of the forecast ({', '.join(found['beyond'])}), which therefore is no gate for it."
        )
    drop, low, high = (found[key] for key in ("drop", "low", "high"))
    if not drop <= limit:
        raise LimitError(
            f"the forecast drop of {drop:.2f} points ({low:.2f} to {high:.2f}) is above the limit of {limit:g}."
        )


def _load(arguments: Any) -> Any:
    """The subject, its networks loaded as `evaluate` loads them."""
    from zsq_fast.analysis.subject import load_subject
    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.result import CHOSEN, RESULT, STUDENT, load_student
    from zsq_fast.runs import RunDir

    run_dir = RunDir.open(arguments.run, read_only=True)
    job = Job.from_info(run_dir.info, run_dir.path, allow_import=arguments.allow_import)
    job, teacher = load(replace(job, device=arguments.device, eval_data=None))
    epoch = -1
    if arguments.chosen:
        if not run_dir.holds(CHOSEN):
            raise BadFileError(f"{run_dir.path} chose no epoch ({CHOSEN} is missing); leave --chosen out.")
        epoch = run_dir.load_json(RESULT)["chosen_epoch"]
    student = load_student(run_dir, job, teacher, CHOSEN if arguments.chosen else STUDENT)
    return load_subject(
        run_dir,
        teacher,
        student,
        input_size=job.input_size or (),
        seed=job.seed,
        count=arguments.images,
        batch_size=arguments.batch_size,
        epoch=epoch,
        channels_last=job.channels_last,
    )


def figure_class() -> Any:
    """Before work that its absence would waste."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'zsq-fast[demo]', or use --no-pictures.") from None
    return Figure


def _png(figure_class: Any, draw: Any, result: Any) -> bytes:
    import io

    figure, stream = figure_class(dpi=120, facecolor="white"), io.BytesIO()
    draw(result, figure)
    figure.savefig(stream, format="png", bbox_inches="tight")
    return stream.getvalue()
