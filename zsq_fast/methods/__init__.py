"""Methods: recipes, the trainer, and one call that does it all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from torch import nn

from zsq_fast.errors import UsageError
from zsq_fast.methods.recipe import Recipe, available_recipes, load_recipe
from zsq_fast.methods.search import search_generator
from zsq_fast.methods.trainer import Result, Trainer, make_student, run_together
from zsq_fast.runs import Progress, RunDir, reporting

__all__ = [
    "Recipe",
    "Result",
    "Trainer",
    "available_recipes",
    "load_recipe",
    "quantize",
    "run_together",
    "search_generator",
    "student_like",
]


def quantize(
    teacher: nn.Module,
    recipe: str | Recipe = "ait",
    *,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    input_size: Sequence[int] | None = None,
    seed: int = 0,
    schedule: str = "paper",
    overrides: Sequence[str] = (),
    run_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
    channels_last: bool | None = None,
    force: bool = False,
    track_cosine: int = 0,
    track_updates: bool = False,
) -> nn.Module:
    """Quantize a trained network without its data.

    Args:
        teacher: float network with BatchNorm2d layers, on the device to train on; it is not changed.
        recipe: built-in name ("ait", "gdfq", "kl_only", "rtn"), a .toml file, or a resolved `Recipe`.
        weight_bits, act_bits: 2 to 8; None keeps the recipe's. In a recipe of mixed widths `weight_bits` is their average.
        input_size: `(C, H, W)` of the network's input; asked for, never guessed.
        seed: every draw of the run follows from it.
        schedule: "paper" (80,000 iterations) or "short"; `overrides` such as `["schedule.epochs=20"]` change any number.
        run_dir: new directory for recipe, metrics, checkpoints, the final student and the one chosen on held-out images.
        resume: go on with the run in `run_dir` from its newest checkpoint, with the recipe and seed it began with.
        evaluate: returns top-1 in percent on real data; printed, never used to choose anything.
        track_cosine, track_updates: see `Trainer`; a resumed run goes on as it began.

    Returns:
        The quantized student in eval mode; `zsq_fast.nn.summarize(student)` tells what was quantized.

    Raises:
        UsageError, UnsupportedModelError, TrainingError, StorageError, Interrupted: see `zsq_fast.errors`.
    """
    if resume and run_dir is None:
        raise UsageError("resume=True needs the run_dir of the run to go on with")
    if input_size is None:
        raise UsageError("input_size is needed, for example input_size=(3, 224, 224)")
    if isinstance(recipe, str):
        recipe = load_recipe(
            recipe,
            input_size=input_size,
            schedule=schedule,
            overrides=overrides,
            weight_bits=weight_bits,
            act_bits=act_bits,
        )
    elif overrides or weight_bits is not None or act_bits is not None or schedule != "paper":
        raise UsageError("a resolved Recipe already holds its numbers: give bits and overrides to load_recipe")
    tracking: dict[str, Any] = {"track_cosine": track_cosine, "track_updates": track_updates}
    options: dict[str, Any] = dict(
        input_size=input_size,
        seed=seed,
        evaluate=evaluate,
        progress=Progress(quiet=not progress),
        channels_last=channels_last,
        force=force,
        **tracking,
    )
    if run_dir is None:
        return Trainer(teacher, recipe, **options).run().student
    if resume:
        with RunDir.open(run_dir) as run:
            options |= {"seed": run.info["seed"], "input_size": run.info["input_size"]}
            options |= {name: run.info.get(name, 0) for name in tracking}
            return _run(Trainer(teacher, Recipe.from_dict(run.recipe), **options), run)
    trainer = Trainer(teacher, recipe, **options)  # before the directory: a model that is refused leaves nothing behind
    info = {"seed": seed, "input_size": list(input_size), **tracking}
    with RunDir.create(run_dir, trainer.recipe.to_dict(), info) as run:
        return _run(trainer, run)


def _run(trainer: Trainer, run: RunDir) -> nn.Module:
    trainer.run_dir = run
    trainer.resume_hint = f"zsq_fast.quantize(..., run_dir={str(run.path)!r}, resume=True)"
    with reporting(run.path, trainer.progress):
        trainer.restore()
        result = trainer.run()
        students = {"student": result.student.state_dict(), "chosen": result.chosen_state}
        for name, state in students.items():
            if state is not None:
                run.save_tensors(f"{name}.safetensors", state, {"recipe": trainer.recipe.name})
    return result.student


def student_like(teacher: nn.Module, recipe: Recipe, input_size: Sequence[int]) -> nn.Module:
    """The untrained student of a recipe, to load a finished one's `state_dict` into; in eval mode, ranges frozen."""
    from zsq_fast.nn import freeze_ranges

    student = make_student(teacher, recipe.quant, input_size).eval()
    freeze_ranges(student)
    return student
