"""STUB of the optimised images (helper `images` writes the real module): the API, with short plain optimisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.methods.recipe import Images
from zsq_fast.methods.synthesis import derive_seed
from zsq_fast.nn import BNStatsTap


class ImageSet(NamedTuple):
    images: Tensor  # [N, C, H, W] float32, in the network's input space
    labels: Tensor  # [N] int64


def synthesize_images(
    teacher: nn.Module,
    spec: Images,
    input_size: Sequence[int],
    num_classes: int,
    seed: int,
    *,
    layout: torch.memory_format = torch.contiguous_format,
    progress: Any = None,
    keep: Callable[..., Any] | None = None,
) -> ImageSet:
    device = next(teacher.parameters()).device
    rng = torch.Generator(device).manual_seed(derive_seed(seed, "image-set"))
    labels = torch.randint(num_classes, (spec.count,), device=device, generator=rng)
    x = torch.randn(spec.count, *input_size, device=device, generator=rng).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=spec.lr)
    tap = BNStatsTap(teacher)
    for _ in range(spec.iterations):
        with tap:
            loss = F.cross_entropy(teacher(x), labels) + tap.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ImageSet(x.detach(), labels)


def random_crops(
    x: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.5, 1.0), flip: float = 0.5
) -> Tensor:
    def uniform(lo: float, hi: float) -> Tensor:
        return torch.empty(len(x), device=x.device).uniform_(lo, hi, generator=generator)

    area, ratio = uniform(*scale), torch.exp(uniform(-0.287682, 0.287682))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirrored = torch.where(uniform(0, 1) < flip, -1.0, 1.0)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = w * mirrored, h
    theta[:, 0, 2], theta[:, 1, 2] = (1 - w) * uniform(-1, 1), (1 - h) * uniform(-1, 1)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
