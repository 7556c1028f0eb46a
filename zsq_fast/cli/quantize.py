"""zsq-fast quantize: a new run."""

from __future__ import annotations

from collections.abc import Sequence

from zsq_fast.cli.arguments import Parser, add_job_options, bits, integer, seed

COSINE_EVERY = 40  # steps: --track-cosine without a number


def make_parser() -> Parser:
    parser = Parser("quantize", "Quantize a trained network without its data.")
    add = parser.add_argument
    add("model", help="resnet20, torchvision:NAME, timm:NAME, pytorchcv:NAME; with --allow-import module:factory")
    add("--recipe", required=True, help="a name from `zsq-fast recipes`, or a .toml file")
    add("-w", "--weight-bits", type=bits, metavar="BITS", help="2 to 8")
    add("-a", "--act-bits", type=bits, metavar="BITS", help="2 to 8")
    add("--seed", type=seed, default=0, metavar="N")
    add("--out", metavar="DIR", help="run directory (runs/MODEL-RECIPE-wXaY)")
    add(
        "--track-cosine",
        type=integer(0),
        nargs="?",
        default=0,
        const=COSINE_EVERY,
        metavar="N",
        help=f"record the cosines between the gradients of CE, KL and FA at every Nth step ({COSINE_EVERY}), for "
        "`analyze --what cosine_history`",
    )
    add(
        "--track-updates",
        action="store_true",
        help="record how many codes changed per epoch and layer, for `analyze --what updates`",
    )
    add("--tensorboard", action="store_true", help="write curves, synthetic images and histograms to DIR/tensorboard")
    add_job_options(parser, data="--eval-data", limit="--eval-limit")
    return parser


def run(words: Sequence[str]) -> int:
    arguments = make_parser().parse(words)
    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.result import print_result
    from zsq_fast.cli.training import begin, check_optimises, default_out, plan
    from zsq_fast.methods import load_recipe
    from zsq_fast.runs import Progress
    from zsq_fast.runs.directory import check_free

    if arguments.out:
        check_free(arguments.out)  # before minutes are spent on loading
    job = Job.from_arguments(
        arguments,
        model=arguments.model,
        seed=arguments.seed,
        track_cosine=arguments.track_cosine,
        track_updates=arguments.track_updates,
        tensorboard=arguments.tensorboard,
    )
    job, teacher = load(job)
    size = job.input_size or ()  # load() has filled it in
    recipe = load_recipe(
        arguments.recipe,
        input_size=size,
        schedule=arguments.schedule,
        overrides=arguments.overrides,
        weight_bits=arguments.weight_bits,
        act_bits=arguments.act_bits,
    )
    if arguments.images is not None:
        check_optimises(recipe)
    if arguments.dry_run:
        return plan(job, recipe, teacher, as_json=arguments.json)
    out = arguments.out or default_out(job, arguments.recipe, recipe)
    result = begin(out, job, recipe, teacher, Progress(quiet=arguments.quiet), arguments.images)
    print_result(result, as_json=arguments.json)
    return 0
