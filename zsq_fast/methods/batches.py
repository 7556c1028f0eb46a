"""Optimised images of a run, and the shuffled, cropped and flipped batches that student steps take of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from zsq_fast.methods.images import ImageSet, random_crops, synthesize_images
from zsq_fast.methods.recipe import Recipe
from zsq_fast.methods.synthesis import Batch, Synthesis, derive_seed
from zsq_fast.runs import RunDir

FILE = "images.safetensors"  # in the run directory


class ImageBatches:
    """Batch i as a function of (seed, i) alone, so that a resumed run needs no replay.

    The batches walk through one random order of all images after another; each image is cropped and flipped anew.

    Args:
        images: moved to `device` and `layout`.
        batch_size: may be any number; a batch may end one pass over the images and begin the next.
        scale: area of a crop as a share of the image, lowest and highest.
        flip: probability of a mirrored crop.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        scale: tuple[float, float],
        flip: float,
        seed: int,
        device: torch.device,
        layout: torch.memory_format,
    ):
        self.images = images.images.to(device).contiguous(memory_format=layout)
        self.labels = images.labels.to(device)
        self.batch_size, self.scale, self.flip, self.seed, self.layout = batch_size, scale, flip, seed, layout
        self._order: tuple[int, Tensor] | None = None

    def _pass(self, number: int) -> Tensor:
        if self._order is None or self._order[0] != number:
            rng = torch.Generator(self.labels.device).manual_seed(derive_seed(self.seed, "image-order", number))
            self._order = number, torch.randperm(len(self.labels), device=self.labels.device, generator=rng)
        return self._order[1]

    def indices(self, step: int) -> Tensor:
        """Which images are in batch number `step`, `[batch_size]` int64."""
        count, parts, at = len(self.labels), [], step * self.batch_size
        end = at + self.batch_size
        while at < end:
            number, offset = divmod(at, count)
            parts.append(self._pass(number)[offset : offset + end - at])
            at += len(parts[-1])
        return torch.cat(parts)

    def batch(self, step: int) -> Batch:
        """Batch number `step`: crops `[batch_size, C, H, W]` and their labels."""
        chosen = self.indices(step)
        rng = torch.Generator(chosen.device).manual_seed(derive_seed(self.seed, "crops", step))
        crops = random_crops(self.images[chosen], rng, self.scale, self.flip)
        return Batch(crops.contiguous(memory_format=self.layout), self.labels[chosen])


def obtain_images(
    synthesis: Synthesis,
    recipe: Recipe,
    input_size: Sequence[int],
    layout: torch.memory_format,
    runs: Sequence[RunDir],
    given: ImageSet | None = None,
) -> ImageSet:
    """Those given, else those that one of the run directories holds, else new ones; every run directory keeps them."""
    images = given
    for run in runs:
        if images is None and run.holds(FILE):
            images = ImageSet(**run.load_tensors(FILE))
    if images is None:
        started = time.perf_counter()
        images = synthesize_images(
            synthesis.teacher, recipe.images, input_size, synthesis.num_classes, synthesis.seed, layout=layout
        )
        synthesis.seconds += time.perf_counter() - started
    for run in runs:
        if not run.holds(FILE):
            run.save_tensors(FILE, images._asdict())
    return images
