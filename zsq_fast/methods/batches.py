"""Shuffled, cropped, flipped and filtered batches of optimised images for the student steps."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_fast.methods.images import ImageSet, random_crops
from zsq_fast.methods.synthesis import Batch, derive_seed


def low_pass(x: Tensor, radius: float) -> Tensor:
    """SynQ's filter against the noise of synthetic images: every Fourier coefficient times `exp(-d^2 / (2 radius^2))`.

    A circular convolution, since the image is taken to be periodic. Where radius is large against the image's highest frequency
    its kernel is a truncated Gaussian's with side lobes and not the Gaussian of `side / (2 pi radius)` pixels that it is otherwise.
    Source: SynQ (ICLR 2025), hast_family.md sections 10.2 and 10.3.

    Args:
        x: `[..., H, W]` float.
        radius: D0, as d, the distance from frequency 0, in cycles per image along either axis.
    """
    h, w = x.shape[-2:]
    rows, columns = torch.fft.fftfreq(h, 1 / h, device=x.device), torch.fft.rfftfreq(w, 1 / w, device=x.device)
    gain = torch.exp((rows.square()[:, None] + columns.square()) / (-2 * radius**2))
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(h, w))  # s: an odd width cannot be told otherwise
    return filtered


class ImageBatches:
    """Batch i as a function of (seed, i) alone, so that a resumed run needs no replay.

    The batches walk through one random order of all images after another; each image is cropped and flipped anew.

    Args:
        images: moved to `device`.
        batch_size: may be any number; a batch may end one pass over the images and begin the next.
        scale: area of a crop as a share of the image, lowest and highest; (1, 1) without flips takes whole images.
        flip: probability of a mirrored crop.
        layout: memory format of the batches.
        radius: of the low-pass filter on the crops (`low_pass`); 0: none.
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
        radius: float = 0.0,
    ):
        self.images = images.images.to(device).contiguous()
        self.labels = images.labels.to(device)
        self.batch_size, self.scale, self.flip, self.seed, self.layout = batch_size, scale, flip, seed, layout
        self.radius = radius
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
        crops = self.images[chosen]
        if self.scale != (1, 1) or self.flip:
            crops = random_crops(crops, rng, self.scale, self.flip)
        if self.radius:
            crops = low_pass(crops, self.radius)
        return Batch(crops.contiguous(memory_format=self.layout), self.labels[chosen])
