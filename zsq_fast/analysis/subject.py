"""What is looked at: the networks of a finished run and synthetic images with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.errors import BadFileError
from zsq_fast.methods.held_out import HeldOut
from zsq_fast.methods.images import ImageSet, load_images
from zsq_fast.methods.recipe import Recipe
from zsq_fast.methods.synthesis import Synthesis
from zsq_fast.runs import RunDir


@dataclass(frozen=True)
class Subject:
    """Networks in eval mode on one device, and images of their input space in their memory format.

    Attributes:
        teacher: the float network, its parameters frozen.
        student: the quantized one, its ranges frozen, its parameters trainable.
        recipe: of the run. input_size: `(C, H, W)`.
        batches: held-out synthetic images `[B, C, H, W]`, on which nothing was trained, and what they were made for: `labels`, `[B]`
            int64 or, superposed (Qimera), soft `[B, classes]`.
        trained_on: optimised images (HAST, ZeroQ, ...) that the student was trained on; None where a generator made them on the fly.
        history: one record per epoch, as `zsq_fast.methods.Result` has it.
        epoch: index of the record of the epoch that the student comes from.
        evaluations: top-1 in percent on real test images where the run measured them, as `zsq_fast.methods.Result` has it.
        layout: memory format of networks and images.
    """

    teacher: nn.Module
    student: nn.Module
    recipe: Recipe
    input_size: tuple[int, ...]
    batches: tuple[ImageSet, ...]
    trained_on: ImageSet | None = None
    history: Sequence[Mapping[str, Any]] = ()
    epoch: int = -1
    evaluations: Mapping[str, float] = field(default_factory=dict)
    layout: torch.memory_format = torch.contiguous_format

    @property
    def images(self) -> Tensor:
        """Those of all batches, `[N, C, H, W]`."""
        return torch.cat([batch.images for batch in self.batches])


def load_subject(
    run: RunDir,
    teacher: nn.Module,
    student: nn.Module,
    *,
    input_size: Sequence[int],
    seed: int,
    count: int = 256,
    batch_size: int = 64,
    epoch: int = -1,
    channels_last: bool | None = None,
) -> Subject:
    """The subject of a finished run, its images drawn from what the newest checkpoint holds.

    They are those that the run held out, or where it held none out (`rtn`, schedule.held_out = 0) are drawn from its generator in
    the same way; at most `count` of them, and of the optimised images.

    Args:
        teacher: the float network of the run, on the device to compute on; it is copied, never changed.
        student: the quantized network, as `zsq_fast.methods.student_like` makes it; moved and laid out like the teacher.
        input_size, seed: of the run.
        epoch: that the student comes from; -1 is the last one.
        channels_last: memory format; None takes channels_last on the CPU.

    Raises:
        BadFileError: no checkpoint is there or intact.
    """
    recipe, loaded = Recipe.from_dict(run.recipe), run.load_checkpoint()
    if loaded is None:
        raise BadFileError(f"{run.path} holds no checkpoint, and without its generator there are no images to look at.")
    _, groups, state = loaded
    device = next(teacher.parameters()).device
    last = device.type == "cpu" if channels_last is None else channels_last
    layout = torch.channels_last if last else torch.contiguous_format
    synthesis = Synthesis(teacher, recipe, input_size, seed, layout)
    synthesis.generator.load_state_dict(groups["generator"])
    held_out = HeldOut(synthesis, recipe.schedule.held_out or count, groups.get("held_out"))
    images, labels = held_out.images[:count], held_out.labels[:count]
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return Subject(
        synthesis.teacher,
        student.to(device).to(memory_format=layout).eval(),
        recipe,
        tuple(input_size),
        tuple(ImageSet(x.contiguous(memory_format=layout), y) for x, y in pairs),
        _trained_on(run, device, count) if recipe.images.enabled else None,
        tuple(state["history"]),
        epoch,
        state["evaluations"],
        layout,
    )


def _trained_on(run: RunDir, device: torch.device, count: int) -> ImageSet | None:
    sets: list[ImageSet] = []
    for file in sorted(run.image_dir.glob("*/batch-*.safetensors")):
        if sum(len(found.labels) for found in sets) < count:  # a whole set may weigh gigabytes
            sets.append(load_images(file)[0])  # verifies itself
    return ImageSet(*(torch.cat(parts)[:count].to(device) for parts in zip(*sets, strict=True))) if sets else None
