"""zsq-fast quantize: a new run."""

from __future__ import annotations

from collections.abc import Sequence

from zsq_fast.cli.arguments import Parser, bits, device, input_size, integer, numbers, seed


def make_parser() -> Parser:
    parser = Parser("quantize", "Quantize a trained network without its data.")
    add = parser.add_argument
    add("model", help="resnet20, torchvision:NAME, timm:NAME, pytorchcv:NAME; with --allow-import module:factory")
    add("--recipe", required=True, help="a name from `zsq-fast recipes`, or a .toml file")
    add("-w", "--weight-bits", type=bits, metavar="BITS", help="2 to 8")
    add("-a", "--act-bits", type=bits, metavar="BITS", help="2 to 8")
    add("--checkpoint", metavar="FILE", help="trained weights: .safetensors, or .pt/.pth holding tensors only")
    add(
        "--num-classes", type=integer(1), metavar="N", help="outputs of the network, where it can be built with several"
    )
    add("--input-size", type=input_size, metavar="C,H,W", help="needed when the network does not tell")
    parser.add_choice("--schedule", choices=("paper", "short"), default="paper", help="how long to train (paper)")
    add("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="change one recipe setting")
    add("--seed", type=seed, default=0, metavar="N")
    add("--out", metavar="DIR", help="run directory (runs/MODEL-RECIPE-wXaY)")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--threads", type=integer(1, 1024), default=0, metavar="N", help="CPU threads (torch's choice)")
    parser.add_switch("--channels-last", help="memory format of the convolutions (chosen by device)")
    add("--eval-data", metavar="PATH", help="real test images (.npz or a folder): printed, never used for decisions")
    add(
        "--eval-limit", type=integer(1), metavar="N", help="only N test images: the first, of a folder every so-manieth"
    )
    add("--mean", type=numbers, metavar="M,M,M", help="normalisation of the test images, pixels in 0..1")
    add("--std", type=numbers, metavar="S,S,S")
    add("--dry-run", action="store_true", help="print the resolved plan and stop")
    add("--force", action="store_true", help="go on although the network looks untrained")
    add("--allow-import", action="store_true", help="allow MODEL to import and run your code")
    add("--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def run(words: Sequence[str]) -> int:
    arguments = make_parser().parse(words)
    from zsq_fast.cli.job import Job, load
    from zsq_fast.cli.result import print_plan
    from zsq_fast.cli.training import default_out, execute, make_trainer
    from zsq_fast.methods import load_recipe, student_like
    from zsq_fast.methods.mixed import settle_bits
    from zsq_fast.nn import summarize
    from zsq_fast.runs import RunDir
    from zsq_fast.runs.directory import check_free

    if arguments.out:
        check_free(arguments.out)  # before minutes are spent on loading
    names = ("model", "num_classes", "allow_import", "input_size", "mean", "std", "seed", "device", "threads")
    job = Job(**{name: getattr(arguments, name) for name in (*names, "channels_last", "force", "eval_limit")})
    job = job.with_files(checkpoint=arguments.checkpoint, eval_data=arguments.eval_data)
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
    if arguments.dry_run:
        recipe = settle_bits(recipe, teacher, size, job.seed)
        student = student_like(teacher, recipe, size)
        print_plan(job, recipe, summarize(student), as_json=arguments.json)
        return 0
    trainer = make_trainer(job, recipe, teacher, quiet=arguments.quiet)
    out = arguments.out or default_out(job, arguments.recipe, recipe)
    with RunDir.create(out, trainer.recipe.to_dict(), job.to_info()) as run_dir:
        return execute(run_dir, job, trainer, as_json=arguments.json)
