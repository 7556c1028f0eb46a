"""Real test images, and the accuracy of a network on them. Nothing else in the package reads real data."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BadFileError, UsageError

_CROP, _RESIZE = 224, 256
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class EvalData:
    """Labelled images. `labels` is int64 [N]; `fetch(start, stop)` gives uint8 images [n, C, H, W] of that slice."""

    path: Path
    labels: Tensor
    fetch: Callable[[int, int], Tensor]
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


class EvalResult(NamedTuple):
    """Accuracies in percent of `count` images and the wall time in seconds; top5 looks at min(5, classes) logits."""

    top1: float
    top5: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls here
    seconds: float


def load_eval_data(path: str | Path, *, limit: int | None = None, image_size: int | None = None) -> EvalData:
    """Open labelled test images; `limit` keeps so many: the first of a .npz, evenly spread over a sorted folder.

    A .npz holds `labels` [N] and either `images` (uint8 [N,H,W,C] or [N,H,W]) or `jpeg` (all files as one uint8 array)
    with `offsets` [N+1]. A folder holds one sub-folder per class, in the order of their sorted names; hidden ones are
    skipped. JPEGs and folders need Pillow and get the ImageNet treatment: shorter side to 256 (bilinear), centre crop
    224. `image_size` changes the crop (resize in proportion); pictures of just that size are then taken as they are.
    They are decoded on demand. Raises BadFileError naming the file, UsageError for a bad limit.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit} must be at least 1.")
    if image_size is not None and image_size < 1:
        raise UsageError(f"image size {image_size} must be at least 1.")
    if os.path.isdir(path):
        return _open_folder(path, limit, image_size)
    if path.suffix.lower() != ".npz":
        what = "neither .npz nor a folder of class folders" if os.path.exists(path) else "no such file or folder"
        raise BadFileError(f"{path}: {what}: check the path of the test images.")
    arrays = _read_npz(path)
    labels = _check_labels(path, arrays)[:limit]
    if "images" in arrays:
        return EvalData(path, labels, _array_fetcher(path, arrays["images"], len(arrays["labels"])))
    return EvalData(path, labels, _jpeg_fetcher(path, arrays, len(arrays["labels"]), image_size))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    wanted = ("images", "jpeg", "offsets", "labels")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in wanted if name in archive.files}
    except FileNotFoundError:
        raise BadFileError(f"{path}: no such file: check the path of the test images.") from None
    except Exception as error:  # zipfile, zlib and numpy answer damage with a dozen kinds, MemoryError among them
        problem = f"truncated, pickled or not an .npz file ({error})"
        raise BadFileError(f"{path}: {problem}: write it with numpy.savez.") from None
    if "images" not in arrays and not {"jpeg", "offsets"} <= arrays.keys():
        raise BadFileError(f"{path}: has no array 'images' (nor 'jpeg' and 'offsets'): store the pixels there.")
    return arrays


def _check_labels(path: Path, arrays: dict[str, np.ndarray]) -> Tensor:
    labels = arrays.get("labels")
    if labels is None:
        raise BadFileError(f"{path}: has no array 'labels': store one class index per image.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        found = f"'labels' is {labels.dtype} {list(labels.shape)}"
        raise BadFileError(f"{path}: {found}: it must be class indices >= 0, one per image.")
    return torch.from_numpy(labels.astype(np.int64))


def _array_fetcher(path: Path, images: np.ndarray, count: int) -> Callable[[int, int], Tensor]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        found = f"'images' is {images.dtype} {list(images.shape)}"
        raise BadFileError(f"{path}: {found}: it must be uint8 [N,H,W,C] or [N,H,W].")
    if len(images) != count:
        raise BadFileError(f"{path}: {len(images)} images but {count} labels: they must match.")
    pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    return lambda start, stop: pixels[start:stop]


def _jpeg_fetcher(
    path: Path, arrays: dict[str, np.ndarray], count: int, size: int | None
) -> Callable[[int, int], Tensor]:
    jpeg, offsets = arrays["jpeg"], arrays["offsets"]
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.shape != (count + 1,):
        raise BadFileError(f"{path}: 'jpeg' must be uint8 and 'offsets' hold one more entry than the {count} labels.")
    bounds = offsets.astype(np.int64)
    if bounds[0] < 0 or bounds[-1] > len(jpeg) or (np.diff(bounds) <= 0).any():
        raise BadFileError(f"{path}: 'offsets' do not rise inside 'jpeg' ({len(jpeg)} bytes): write both again.")
    _pillow(path)

    def fetch(start: int, stop: int) -> Tensor:
        pieces = [jpeg[bounds[i] : bounds[i + 1]].tobytes() for i in range(start, stop)]
        return torch.stack([_decode(io.BytesIO(p), f"{path}: image {start + i}", size) for i, p in enumerate(pieces)])

    return fetch


def _open_folder(path: Path, limit: int | None, size: int | None) -> EvalData:
    _pillow(path)
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = []
    for label, name in enumerate(classes):
        shown = (f for f in (path / name).rglob("*") if not any(p.startswith(".") for p in f.relative_to(path).parts))
        files = sorted(file for file in shown if file.suffix.lower() in _SUFFIXES)
        if not files:  # it would move the numbers of all classes behind it, should it not be meant as one
            raise BadFileError(f"{path / name}: no pictures in this class folder: fill or remove it.")
        found += [(file, label) for file in files]
    if not found:
        raise BadFileError(f"{path}: no pictures in class folders: expected {path}/CLASS/PICTURE.jpg.")
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]

    def fetch(start: int, stop: int) -> Tensor:
        return torch.stack([_decode(file, str(file), size) for file, _ in found[start:stop]])

    return EvalData(path, torch.tensor([label for _, label in found]), fetch, tuple(classes))


def _pillow(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(f"{path}: decoding pictures needs the package pillow: pip install pillow") from None
    return Image


def _decode(file: Any, name: str, size: int | None) -> Tensor:
    image_module = _pillow(Path(name))
    try:
        with image_module.open(file) as picture:
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise BadFileError(f"{name}: not a readable picture ({error}): remove or replace it.") from None
    crop = size or _CROP
    if size is None or picture.size != (size, size):
        short, long = round(crop * _RESIZE / _CROP), max(picture.size)
        scaled = max(short, int(short * long / min(picture.size)))  # the longer side rounds down, as in torchvision
        wide = picture.width >= picture.height
        picture = picture.resize((scaled, short) if wide else (short, scaled), image_module.Resampling.BILINEAR)
        left, top = (round((extent - crop) / 2) for extent in picture.size)
        picture = picture.crop((left, top, left + crop, top + crop))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@contextmanager
def _evaluating(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """The model in eval mode (on `device`, if given); every module's own mode and the device come back afterwards."""
    modes = {module: module.training for module in model.modules()}
    home = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    try:
        model.eval()
        if place != home:
            model.to(place)
        yield place
    finally:
        for module, mode in modes.items():
            module.training = mode
        if place != home:
            model.to(home)


def evaluate(
    model: nn.Module,
    data: EvalData,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 250,
    device: torch.device | str | None = None,
    channels_last: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Accuracy of `model` on all of `data`; pixels enter as (value / 255 - mean) / std, per channel.

    The model runs in eval mode under inference_mode and is handed back as it was. `progress` gets (images done, of).
    `channels_last` changes the memory format of the inputs, which speeds up CPU convolutions. An image whose logits
    are not all finite counts as wrong. Raises UsageError when mean, std, batch size or the model's output do not fit,
    BadFileError when a label has no logit.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} must be at least 1.")
    shift, scale = (torch.tensor(tuple(values), dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
    if not (torch.isfinite(shift).all() and torch.isfinite(scale).all() and (scale > 0).all()):
        raise UsageError(f"mean {tuple(mean)} and std {tuple(std)} must be finite, std above 0.")
    began, hits = time.perf_counter(), torch.zeros(2, dtype=torch.int64)
    with _evaluating(model, device) as place, torch.inference_mode():
        shift, scale = shift.to(place), scale.to(place)
        for start in range(0, len(data), batch_size):
            stop = min(start + batch_size, len(data))
            pixels = data.fetch(start, stop)
            if pixels.shape[1] != shift.shape[1] or shift.shape != scale.shape:
                given = f"mean has {shift.numel()} values, std {scale.numel()}"
                raise UsageError(f"{data.path}: images have {pixels.shape[1]} channels, {given}: they must agree.")
            images = (pixels.to(place).float() / 255 - shift) / scale
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            hits += _count_hits(model(images), data, start, stop)
            if progress is not None:
                progress(stop, len(data))
    top1, top5 = (100.0 * int(hit) / len(data) for hit in hits)
    return EvalResult(top1, top5, len(data), time.perf_counter() - began)


def _count_hits(logits: Any, data: EvalData, start: int, stop: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != stop - start:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the model returned {shape} for {stop - start} images: it must return logits [N, classes].")
    if int(data.labels.max()) >= logits.shape[1]:
        most = int(data.labels.max())
        raise BadFileError(f"{data.path}: labels up to {most}, the model has {logits.shape[1]} outputs: wrong pair.")
    best = logits.topk(min(5, logits.shape[1])).indices.cpu()
    right = (best == data.labels[start:stop, None]) & torch.isfinite(logits).all(1).cpu()[:, None]
    return torch.stack((right[:, 0].sum(), right.any(1).sum()))
