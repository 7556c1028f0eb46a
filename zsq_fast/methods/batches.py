"""Shuffled, cropped and flipped batches of optimised images for the student steps."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_fast.methods.images import ImageSet, random_crops
from zsq_fast.methods.synthesis import Batch, derive_seed


class ImageBatches:
    """Batch i as a function of (seed, i) alone, so that a resumed run needs no replay.

    The batches walk through one random order of all images after another; each image is cropped and flipped anew.

    Args:
        images: moved to `device`.
        batch_size: may be any number; a batch may end one pass over the images and begin the next.
        scale: area of a crop as a share of the image, lowest and highest.
        flip: probability of a mirrored crop.
        layout: memory format of the batches.
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
        self.images = images.images.to(device).contiguous()
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
