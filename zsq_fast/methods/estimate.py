"""Time and memory of a run before it starts: every kind of iteration measured on the device, with the recipe's own batches."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zsq_fast import nn as znn
from zsq_fast.methods.autorecon import SEARCH
from zsq_fast.methods.held_out import HeldOut
from zsq_fast.methods.images import ImageSet, synthesize_images
from zsq_fast.methods.mixed import BITS, PROBES, bits_are_open, even_bits
from zsq_fast.methods.recipe import Generator, Images, Recipe
from zsq_fast.methods.search import Search
from zsq_fast.methods.trainer import Trainer
from zsq_fast.runs import Progress

TIMED = 2  # iterations, after one to warm up
IMAGE_STAGE = "image iterations"


@dataclass(frozen=True)
class Stage:
    """`count` iterations of a run at `each` seconds."""

    name: str
    count: int
    each: float

    @property
    def seconds(self) -> float:
        return self.count * self.each


@dataclass(frozen=True)
class Estimate:
    """What a run would take, without evaluations and checkpoints.

    Attributes:
        stages: in the order of a run.
        peak_bytes: with CUDA the most that was allocated while measuring; on the CPU by how much the highest resident memory that
            the process has had rose meanwhile, which is too little where it had been higher before; None where the system does
            not tell.
        image_set_bytes: of all optimised images; one batch of them was measured, so most of it comes on top.
        device: on which it was measured.
    """

    stages: tuple[Stage, ...]
    peak_bytes: int | None
    image_set_bytes: int
    device: str

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        stages = [{"name": s.name, "count": s.count, "seconds_each": s.each, "seconds": s.seconds} for s in self.stages]
        measured = {"device": self.device, "peak_bytes": self.peak_bytes, "image_set_bytes": self.image_set_bytes}
        return {"stages": stages, "seconds": self.seconds, **measured}


def estimate(
    teacher: nn.Module,
    recipe: Recipe,
    *,
    input_size: Sequence[int],
    seed: int = 0,
    channels_last: bool | None = None,
    force: bool = False,
    now: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Measure one iteration of every stage: one to warm up, two that are timed.

    Arguments and errors are those of `Trainer`; `now` tells the time in seconds: `time.process_time` counts what the process's own
    threads compute, whatever else the machine does. The teacher is not changed and nothing is written.
    """
    asked = recipe
    if recipe.generator.genotype == SEARCH:  # a generator of the kind that would be found
        recipe = replace(recipe, generator=replace(recipe.generator, genotype=Generator.genotype))
    device = next(teacher.parameters()).device
    recipe = even_bits(recipe, teacher, input_size)
    before = _peak_bytes(device, reset=True)
    trainer = Trainer(
        teacher, recipe, input_size=input_size, seed=seed, channels_last=channels_last, force=force
    )  # without a run directory: keeps nothing
    schedule, spec, synthesis = recipe.schedule, recipe.images, trainer.synthesis
    stages: list[Stage] = []

    def measure(name: str, count: int, iteration: Callable[[int], Any]) -> None:
        clock = _Clock(device, now)
        for i in range(1 + TIMED):
            iteration(i)
            clock.advance()
        stages.append(Stage(name, count, clock.each))

    def synthesize(name: str, spec: Images) -> ImageSet:
        each, images = time_images(
            teacher, spec, input_size, synthesis.num_classes, seed, layout=trainer.layout, now=now
        )
        stages.append(Stage(name, -(-spec.count // spec.batch_size) * spec.iterations, each))
        return images

    if bits_are_open(asked):
        probes = synthesize("iterations of images to find bits", PROBES).images.to(device)
        network = copy.deepcopy(teacher).eval().to(memory_format=trainer.layout)

        def forward(_: int) -> None:
            with torch.no_grad():
                network(probes.contiguous(memory_format=trainer.layout))

        measure("forward passes to find bits", 1 + len(recipe.quant.layer_bits) * len(BITS), forward)
    if asked.generator.kind == "autorecon" and asked.generator.genotype == SEARCH:
        search = Search(teacher, asked, input_size, seed, trainer.layout)
        measure("search steps", asked.generator.search_steps, search.step)
        del search  # a run has none of it left either
    if spec.enabled:
        trainer._use_images(synthesize(IMAGE_STAGE, spec))
    if recipe.quant.calibrate_on == "images":
        assert trainer.batches is not None
        batch = trainer.batches.batch(0)
    else:
        measure("generator steps", recipe.generator_steps, synthesis.step)
        batch = synthesis.step(1 + TIMED)

    def calibrate(_: int) -> None:
        with torch.no_grad(), znn.calibrating(trainer.student):
            trainer.student(batch.images)

    measure("range calibration", schedule.calibration_epochs * schedule.iterations, calibrate)
    if recipe.student.enabled:
        trainer._set_schedule(schedule.warmup_epochs)
        own = trainer.batches
        measure(
            "student steps",
            recipe.student_steps,
            lambda i: trainer._student_step(batch if own is None else own.batch(i)),
        )
        if schedule.held_out:
            held_out = HeldOut(synthesis, schedule.held_out)
            epochs = schedule.epochs - schedule.warmup_epochs
            measure("held-out agreement", epochs, lambda _: held_out.measure(trainer.student))
    after = _peak_bytes(device)
    peak = None if after is None or before is None else after - (0 if device.type == "cuda" else before)
    total = spec.count * math.prod(input_size) * 4 if spec.enabled else 0
    return Estimate(tuple(stages), peak, total, str(device))


def time_images(
    teacher: nn.Module,
    spec: Images,
    input_size: Sequence[int],
    num_classes: int,
    seed: int,
    *,
    layout: torch.memory_format,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[float, ImageSet]:
    """Seconds of one iteration of optimised images, and the batch it was measured on. Arguments: see `synthesize_images`."""
    clock = _Clock(next(teacher.parameters()).device, now)
    few = replace(spec, count=min(spec.count, spec.batch_size), iterations=1 + TIMED)
    images = synthesize_images(teacher, few, input_size, num_classes, seed, layout=layout, progress=clock)
    return clock.each, images


class _Clock(Progress):
    """Notes when each iteration ended."""

    def __init__(self, device: torch.device, now: Callable[[], float]):
        super().__init__(quiet=True)
        self.device, self.now, self.ends = device, now, list[float]()

    def advance(self, n: int = 1, **_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(self.now())

    @property
    def each(self) -> float:
        return (self.ends[-1] - self.ends[0]) / TIMED


def _peak_bytes(device: torch.device, *, reset: bool = False) -> int | None:
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
