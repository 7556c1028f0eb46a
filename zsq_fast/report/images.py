"""Synthetic images of a run, as strips of pixels by class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_fast.errors import BadFileError
from zsq_fast.methods.images import load_images
from zsq_fast.runs import RunDir
from zsq_fast.runs import checkpoint as checkpoints
from zsq_fast.runs.directory import CHECKPOINTS

CLASSES, COLUMNS, PIXELS, FILES = 10, 10, 48, 4
GAP = 1  # transparent pixels right of an image and below it
FILE_LIMIT = 1 << 30  # bytes of one file of images or tensors


@dataclass(frozen=True)
class Sheet:
    """Images side by side, one strip per class.

    Attributes:
        source: what they are. by: what the class of an image is.
        count: how many images there were to choose from.
        strips: label, number of images and uint8 pixels with alpha `[H, columns * W, 4]`.
    """

    source: str
    by: str
    count: int
    strips: tuple[tuple[int, int, Tensor], ...]


def read_sheet(run: RunDir, mean: Sequence[Any], std: Sequence[Any]) -> Sheet | None:
    """Of the optimised images that the student was trained on, else of those that were held out; None where a run kept neither.

    Args:
        mean, std: of the normalisation, per channel; empty: the range of the images becomes black to white.

    Raises:
        BadFileError: they are damaged or too large.
    """
    found = _optimised(run.image_dir) or _held_out(run)
    if found is None:
        return None
    source, by, images, labels = found
    if (
        images.dim() != 4
        or labels.dim() not in (1, 2)
        or not images.is_floating_point()
        or not len(images) == len(labels) > 0
    ):
        raise BadFileError(f"{run.path}: the synthetic images have no shape [N, C, H, W], or not one label each.")
    return Sheet(source, by, len(images), tuple(strips(images, labels, mean, std)))


def strips(
    images: Tensor, labels: Tensor, mean: Sequence[Any], std: Sequence[Any]
) -> Iterator[tuple[int, int, Tensor]]:
    """The strips of a `Sheet` of images `[N, C, H, W]` with labels `[N]` or soft ones `[N, classes]`: some classes, a few of each."""
    if labels.dim() == 2:
        labels = labels.argmax(1)
    scale = _scale(images, mean, std)
    for label in _spread(sorted(set(labels.tolist())), CLASSES):
        chosen = images[labels == label][:COLUMNS]
        pixels = F.pad(_pixels(_small(chosen), *scale), (0, 0, 0, GAP, 0, GAP))
        yield label, len(chosen), pixels.permute(1, 0, 2, 3).flatten(1, 2)


def _optimised(folder: Path) -> tuple[str, str, Tensor, Tensor] | None:
    if folder.is_symlink() or not folder.is_dir():
        return None
    sets = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    files = sorted(sets[0].glob("batch-*.safetensors"))[:FILES] if sets else []
    if not files:
        return None
    _check_sizes(files)
    parts = [load_images(file)[0] for file in files]
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    return "optimised images, which the student was trained on", "asked for", images, labels


def _held_out(run: RunDir) -> tuple[str, str, Tensor, Tensor] | None:
    root = run.path / CHECKPOINTS
    steps = checkpoints.steps(root)
    if not steps:
        return None
    folder = root / checkpoints.directory_name(steps[-1])
    _check_sizes([path for path in folder.iterdir() if path.is_file()])
    _, groups, _ = checkpoints.read(folder)
    tensors = groups.get("held_out", {})
    source = "images of the generator, held out: the student was not trained on them"
    if "images" in tensors and "labels" in tensors:
        return source, "asked for", tensors["images"], tensors["labels"]
    if "images" in tensors and "logits" in tensors:
        return source, "that the float network sees", tensors["images"], tensors["logits"]
    return None


def _check_sizes(files: Sequence[Path]) -> None:
    for file in files:
        if file.stat().st_size > FILE_LIMIT:
            raise BadFileError(f"{file} is too large for a report: at most {FILE_LIMIT:,} bytes.")


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most so many, evenly over all."""
    step = max(1.0, len(values) / count)
    return [values[int(i * step)] for i in range(min(count, len(values)))]


def _small(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    scale = min(1.0, PIXELS / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return images.float() if scale == 1 else F.interpolate(images.float(), size, mode="area")


def _scale(images: Tensor, mean: Sequence[Any], std: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(mean, std) `[C, 1, 1]` that make pixels in 0..1 of values."""
    channels = images.shape[1]
    numbers = [v for v in (*mean, *std) if isinstance(v, (int, float)) and abs(v) < 1e6]
    if len(mean) == len(std) == channels and len(numbers) == 2 * channels:
        return torch.tensor(mean).float()[:, None, None], torch.tensor(std).float()[:, None, None]
    low, high = images.float().nan_to_num().aminmax()
    return low.expand(channels, 1, 1), (high - low).clamp_min(1e-6).expand(channels, 1, 1)


def _pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 `[N, H, W, 4]`, opaque; other than 3 channels become grey."""
    values = (images * std + mean).nan_to_num().clamp(0, 1)
    if values.shape[1] != 3:
        values = values.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
    return (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
