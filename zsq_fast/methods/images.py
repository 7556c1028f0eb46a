"""Images optimised from noise until a frozen teacher finds its own batch-norm statistics in them (ZeroQ, IntraQ, HAST).

One batched routine: the section [images] of a recipe decides whose images they are. Specification: hast_family.md sections
2 (ZeroQ), 4.1 (IntraQ) and 5.1 (HAST).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.errors import BadFileError, Interrupted, TrainingError, UnsupportedModelError, UsageError
from zsq_fast.losses import hard_sample_ce
from zsq_fast.methods.recipe import Images
from zsq_fast.methods.synthesis import derive_seed
from zsq_fast.nn import BNStatsTap, usable_batch_norms
from zsq_fast.nn.probe import probing
from zsq_fast.runs import Progress, StopRequest
from zsq_fast.runs.storage import make_directory, replace_file, writing
from zsq_fast.runs.tensors import pack, unpack

ALGORITHM = 1  # raise it when the same recipe and seed would give other images: kept ones are then made again
CROP_RATIOS = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10  # torchvision's; it takes a central crop when none fits
STD_EPS = 1e-6  # ZeroQ: std = sqrt(var + 1e-6), for images and running statistics alike
COSINE_EPS = 1e-6


class ImageSet(NamedTuple):
    """Images `[N, C, H, W]` float32 in the network's input space (normalised, not clipped), labels `[N]` int64."""

    images: Tensor
    labels: Tensor


# ---- crops -------------------------------------------------------------------------------------------------------------


class Boxes(NamedTuple):
    """One crop per image: whole numbers of pixels `[B]`, float32."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def crop_boxes(count: int, height: int, width: int, generator: torch.Generator, scale: Sequence[float]) -> Boxes:
    """Boxes of torchvision's RandomResizedCrop for `count` images, all attempts drawn at once, on the generator's device.

    Args:
        scale: range of a box's share of the area; its aspect ratio is log-uniform in [3/4, 4/3].
    """
    u = torch.rand(4, count, CROP_ATTEMPTS, generator=generator, device=generator.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    low, high = map(math.log, CROP_RATIOS)
    ratio = torch.exp(low + (high - low) * u[1])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    whole_w, whole_h = (min(width, round(height * CROP_RATIOS[1])), min(height, round(width / CROP_RATIOS[0])))
    # The first that fits; the last candidate always does.
    w, h = F.pad(w, (0, 1), value=whole_w), F.pad(h, (0, 1), value=whole_h)
    order = torch.arange(CROP_ATTEMPTS + 1, 0, -1, device=u.device)
    first = (F.pad(fits, (0, 1), value=True) * order).argmax(1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    central = first[:, 0] == CROP_ATTEMPTS

    def offset(free: Tensor, draw: Tensor) -> Tensor:
        return torch.where(central, (free / 2).floor(), torch.minimum((draw * (free + 1)).floor(), free))

    return Boxes(offset(height - h, u[2, :, 0]), offset(width - w, u[3, :, 0]), h, w)


def resized_crops(x: Tensor, boxes: Boxes, flipped: Tensor) -> Tensor:
    """Crop every image to its box, resize to the full size (bilinear, no antialiasing), mirror where `flipped`.

    Differentiable; one grid_sample. Agrees with torchvision's `resized_crop` and `hflip` to the rounding of coordinates
    (about 1e-5 pixels).

    Args:
        x: `[B, C, H, W]`.
        flipped: `[B]` bool.
    """

    def coordinates(start: Tensor, length: Tensor, size: int) -> Tensor:
        at = (torch.arange(size, device=x.device) + 0.5) * (length / size)[:, None] - 0.5
        # Clamped to the box, not to the image: a resized crop repeats its own edge.
        return torch.minimum(at.clamp(min=0), length[:, None] - 1) + start[:, None]

    height, width = x.shape[-2:]
    rows = coordinates(boxes.top, boxes.height, height)
    columns = coordinates(boxes.left, boxes.width, width)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    rows, columns = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1)
    return F.grid_sample(x, grid.to(x.dtype), padding_mode="border", align_corners=False)


def random_crops(
    x: Tensor, generator: torch.Generator, scale: Sequence[float] = (0.5, 1.0), flip: float = 0.5
) -> Tensor:
    """RandomResizedCrop to the full size and horizontal flip, drawn per image, in one differentiable grid_sample.

    IntraQ's and HAST's augmentation, in synthesis (local object reinforcement) and in fine-tuning.

    Args:
        x: `[B, C, H, W]`; contiguous images are several times faster than channels-last ones on the CPU.
        generator: on x's device.
        scale: range of the crop's share of the area; the aspect ratio is log-uniform in [3/4, 4/3].
        flip: probability of a mirror image.
    """
    boxes = crop_boxes(len(x), x.shape[-2], x.shape[-1], generator, scale)
    flipped = torch.rand(len(x), generator=generator, device=generator.device) < flip
    return resized_crops(x, boxes, flipped)


# ---- losses ------------------------------------------------------------------------------------------------------------


def image_statistics_loss(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """ZeroQ's statistics of one layer: squared errors of each image's mean and standard deviation, a scalar.

    Summed over channels, averaged over images. The variance is the unbiased one; that of a single pixel counts as 0.

    Args:
        x: `[N, C, H, W]`.
        mean, std: `[C]`, the targets.
    """
    mu = x.mean((2, 3), keepdim=True)
    # Detached: deviations from a mean sum to zero, so its gradient through them is none. torch.var is several times slower.
    var = (x - mu.detach()).square().sum((2, 3)) / max(1, x.shape[2] * x.shape[3] - 1)
    mu = mu.flatten(1)
    return ((mu - mean).square() + ((var + STD_EPS).sqrt() - std).square()).sum() / len(x)


def soft_inception(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """IntraQ's soft inception loss: mean of `(softmax_y - t)^2`, no logarithm.

    Args:
        logits: `[B, classes]`.
        labels: `[B]` int64.
        targets: `[B]`, the probability t each image is to have.
    """
    return (logits.softmax(1).gather(1, labels[:, None])[:, 0] - targets).square().mean()


def marginal_distance(features: Tensor, centers: Tensor, known: Tensor, low: float, high: float) -> Tensor:
    """IntraQ's marginal distance constraint: the cosine distance to the class center is to lie in [low, high].

    The mean runs over the images whose class has a center; 0 when there is none.

    Args:
        features: `[B, D]`.
        centers: `[B, D]`, the center of each image's class.
        known: `[B]` bool, whether that class has one.
    """
    distance = 1 - F.cosine_similarity(features, centers, eps=COSINE_EPS)
    outside = (low - distance).clamp(min=0) + (distance - high).clamp(min=0)
    return (outside * known).sum() / known.sum().clamp(min=1)


class _ImageStatsTap:
    """Like BNStatsTap, with ZeroQ's statistics: per image, and layers summed."""

    def __init__(self, model: nn.Module):
        self._norms = usable_batch_norms(model)
        self._losses: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _ImageStatsTap:
        self._hooks = [norm.register_forward_pre_hook(self._record) for norm in self._norms.values()]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._losses.clear()

    def _record(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        self._losses.append(image_statistics_loss(args[0], norm.running_mean, (norm.running_var + STD_EPS).sqrt()))

    def loss(self) -> Tensor:
        if not self._losses:
            raise UnsupportedModelError(
                "no batch norm was run: the model's forward does not reach its BatchNorm2d layers."
            )
        total = torch.stack(self._losses).sum()
        self._losses.clear()
        return total


def find_classifier(model: nn.Module, images: Tensor) -> nn.Module:
    """The layer whose input is the pooled feature: the last nn.Linear, or 1x1 convolution on 1x1 features, of a forward pass.

    Raises:
        UnsupportedModelError: the last convolution or linear layer to run is neither.
    """
    ran: list[tuple[str, nn.Module, Tensor]] = []
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: ran.append((name, m, args[0])))
        for name, m in layers.items()
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise UnsupportedModelError("images.distance_weight needs a classifier, but no nn.Linear or nn.Conv2d was run.")
    name, last, x = ran[-1]
    if isinstance(last, nn.Linear) or (x.shape[-2:] == (1, 1) and last.kernel_size == (1, 1)):
        return last
    raise UnsupportedModelError(
        f"images.distance_weight needs pooled features, but the last layer to run, '{name}', is a convolution of "
        f"{tuple(x.shape[-2:])} features: set images.distance_weight=0 for this network."
    )


# ---- the optimiser -----------------------------------------------------------------------------------------------------


class Plateau:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` (minimum, relative threshold 1e-4) that never asks the host.

    Attributes:
        lr: the learning rate, a float64 scalar on the device.
    """

    def __init__(self, lr: float, factor: float, patience: int, min_lr: float, device: torch.device | str = "cpu"):
        self.factor, self.patience, self.min_lr = factor, patience, min_lr
        self.lr, self.best, self.bad = torch.tensor([lr, math.inf, 0], dtype=torch.float64, device=device).unbind()

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        better = loss < self.best * (1 - 1e-4)
        self.best = torch.where(better, loss.double(), self.best)
        bad = torch.where(better, 0, self.bad + 1)
        reduce = bad > self.patience
        self.bad = torch.where(reduce, 0, bad)
        lower = (self.lr * self.factor).clamp(min=self.min_lr)
        self.lr = torch.where(reduce & (self.lr - lower > 1e-8), lower, self.lr)  # torch's eps


class _Task(NamedTuple):
    """What a batch aims at; fixed while it is optimised."""

    labels: Tensor
    targets: Tensor
    centers: Tensor
    known: Tensor


class _Optimiser:
    """The frozen teacher and what earlier batches left behind: the class centers of the marginal distance constraint."""

    def __init__(
        self,
        teacher: nn.Module,
        spec: Images,
        input_size: Sequence[int],
        num_classes: int,
        seed: int,
        layout: torch.memory_format,
    ):
        self.spec, self.input_size, self.num_classes = spec, tuple(input_size), num_classes
        self.seed, self.layout = seed, layout
        self.device = next(teacher.parameters()).device
        # A frozen copy saves a third of the backward pass and keeps the user's network out of our graphs.
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False).to(memory_format=layout)
        probe = torch.zeros(1, *input_size, device=self.device)
        with torch.no_grad():
            logits = self.teacher(probe)
        if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedModelError(f"the model must return class logits [N, {num_classes}], got {found}")
        self.tap = BNStatsTap(self.teacher) if spec.statistics == "batch" else _ImageStatsTap(self.teacher)
        self._features: Tensor | None = None
        self.counts = torch.zeros(num_classes, 1, device=self.device)
        self.sums = torch.zeros(num_classes, 1, device=self.device)
        if spec.distance_weight:
            find_classifier(self.teacher, probe).register_forward_pre_hook(self._keep_features)

    def _keep_features(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._features = args[0].flatten(1)

    def remember(self, batch: ImageSet) -> None:
        """Add the features of a finished batch to the class centers."""
        with self.tap, torch.no_grad():  # tapped as in training: the same rounding, whether the batch is new or kept
            self.teacher(batch.images.contiguous(memory_format=self.layout))
        assert self._features is not None
        member = F.one_hot(batch.labels, self.num_classes).T.to(self._features.dtype)  # a product: sums in fixed order
        self.sums = self.sums + member @ self._features
        self.counts = self.counts + member.sum(1, keepdim=True)

    def _losses(self, x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
        """Total loss, its batch-norm part, and logits. The tap must be on."""
        spec = self.spec
        logits = self.teacher(x.contiguous(memory_format=self.layout))
        bns = self.tap.loss()
        loss = spec.bns_weight * bns
        if spec.input_weight:
            zeros, ones = (torch.full((x.shape[1],), v, device=x.device) for v in (0.0, 1.0))
            loss = loss + spec.input_weight * image_statistics_loss(x, zeros, ones)
        if spec.hard_weight:
            loss = loss + spec.hard_weight * hard_sample_ce(logits, task.labels, spec.hard_gamma)
        if spec.soft_weight:
            loss = loss + spec.soft_weight * soft_inception(logits, task.labels, task.targets)
        if self._features is not None:
            margin = marginal_distance(self._features, task.centers, task.known, spec.distance_low, spec.distance_high)
            loss = loss + spec.distance_weight * margin
        return loss, bns, logits

    def start(self, index: int, size: int) -> tuple[Tensor, _Task, torch.Generator]:
        """Noise, targets and the generator of the crops: functions of (seed, index), and of earlier batches by the centers."""
        rng = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "optimised images", index))
        labels = torch.randint(self.num_classes, (size,), device=self.device, generator=rng)
        soft, value = torch.rand(2, size, device=self.device, generator=rng)
        floor = self.spec.soft_floor
        targets = torch.where(soft < 0.5, 1.0, floor + (1 - floor) * value)
        shape = (size, *self.input_size)
        if self.spec.init == "normal":
            x = torch.randn(shape, device=self.device, generator=rng)
        else:
            x = (torch.randint(255, shape, device=self.device, generator=rng) - 127.5) / 5418.75
        centers = (self.sums / self.counts.clamp(min=1))[labels]
        return x, _Task(labels, targets, centers, self.counts[labels, 0] > 0), rng

    def batch(self, index: int, size: int, each: Callable[[], None]) -> tuple[ImageSet, dict[str, float]]:
        """One finished batch and its record; `each` is called once per iteration. TrainingError if an image is not finite."""
        spec = self.spec
        x, task, rng = self.start(index, size)
        coin_rng = torch.Generator().manual_seed(derive_seed(self.seed, "crop coins", index))  # the host must know them
        coins = (torch.rand(spec.iterations, generator=coin_rng) < spec.crop_probability).tolist()
        x.requires_grad_(True)
        plateau = Plateau(spec.lr, spec.plateau_factor, spec.patience, spec.min_lr, self.device)
        lr = plateau.lr.float()
        optimizer = torch.optim.Adam([x], lr=lr, fused=True)  # fused: reads a learning rate on the device
        with self.tap:
            for coin in coins:
                seen = random_crops(x, rng, spec.crop_scale, spec.flip) if coin else x
                loss = self._losses(seen, task)[0]
                x.grad = torch.autograd.grad(loss, x)[0].contiguous()
                optimizer.step()
                plateau.step(loss.detach())
                lr.copy_(plateau.lr)
                each()
            x = x.detach()
            with torch.no_grad():
                loss, bns, logits = self._losses(x, task)
        p = logits.softmax(1).gather(1, task.labels[:, None])[:, 0]
        right = (logits.argmax(1) == task.labels).float()
        values = torch.stack([loss, bns, 100 * right.mean(), (1 - p > 0.5).float().mean()]).tolist()
        if not (torch.isfinite(x).all() and all(map(math.isfinite, values))):
            raise TrainingError(
                f"batch {index + 1} of the optimised images became NaN or infinite; none of it is kept. Lower images.lr."
            )
        return ImageSet(x, task.labels), dict(zip(("loss", "bns", "teacher_top1", "hard_share"), values))


def count_classes(teacher: nn.Module, input_size: Sequence[int]) -> int:
    """Logits per image. UnsupportedModelError: it returns something else. UsageError: it does not run on that size."""
    with probing(teacher, input_size, ()) as zeros, torch.no_grad():
        logits = teacher(zeros)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(f"the model must return class logits [N, classes], got {found}")
    return logits.shape[1]


def synthesize_images(
    teacher: nn.Module,
    spec: Images,
    input_size: Sequence[int],
    num_classes: int,
    seed: int,
    *,
    layout: torch.memory_format = torch.contiguous_format,
    progress: Progress | None = None,
    keep: str | PathLike[str] | None = None,
    shard: tuple[int, int] = (0, 1),
    log: Callable[..., None] | None = None,
) -> ImageSet:
    """Optimise `spec.count` images from noise, batch by batch, with labels drawn uniformly.

    A batch is a function of (seed, its index) alone, and with `spec.distance_weight` of the batches before it. On the CPU it
    repeats bit for bit; on a GPU torch's convolutions and grid_sample add up gradients in varying order.

    Args:
        teacher: float network with BatchNorm2d layers that returns logits `[N, num_classes]`; copied, never changed. The
            images are made on its device.
        spec: the recipe's [images]; `enabled` is not looked at.
        input_size: `(C, H, W)`.
        layout: memory format in which the teacher runs; images come back contiguous.
        progress: shows iterations and one line per batch.
        keep: directory for finished batches. Sound ones of the same provenance that lie there are taken as they are, so a
            killed call goes on with the batch it was in; all others are written anew.
        shard: (i, n) makes and returns the batches i, i + n, i + 2n, ... alone. When every shard has filled the same `keep`,
            a call without it reads the whole set. Not with `spec.distance_weight`, where batches follow from earlier ones.
        log: called after each new batch with `images_batch` (index), `images_loss` and `images_bns` (of the finished
            images, without crops), `images_teacher_top1` (percent of labels that the teacher agrees with) and
            `images_hard_share` (share of images with 1 - p_y > 0.5).

    Raises:
        TrainingError: an image became NaN or infinite. UnsupportedModelError: no usable batch norm, other logits, or no
        classifier on pooled features for `spec.distance_weight`. Interrupted: SIGINT or SIGTERM. StorageError.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise UsageError(f"input_size must be (channels, height, width), got {tuple(input_size)}")
    part, parts = shard
    if not 0 <= part < parts or (spec.distance_weight and parts > 1):
        rule = "(i, n) with 0 <= i < n, and n = 1 with images.distance_weight"
        raise UsageError(f"shard must be {rule}, got {shard}")
    progress = progress or Progress(quiet=True)
    optimiser = _Optimiser(teacher, spec, input_size, num_classes, seed, layout)
    shelf = None if keep is None else _Shelf(Path(keep), provenance(teacher, spec, input_size, num_classes, seed))
    indices = range(part, -(-spec.count // spec.batch_size), parts)
    sizes = [_batch_size(spec, i) for i in indices]
    images = torch.empty(sum(sizes), *input_size, device=optimiser.device)  # filled in place: a set may weigh gigabytes
    labels = torch.empty(sum(sizes), dtype=torch.int64, device=optimiser.device)
    places = [ImageSet(*place) for place in zip(images.split(sizes), labels.split(sizes))] if sizes else []
    missing = [i for i, place in zip(indices, places) if shelf is None or not shelf.load(i, place)]
    progress.start(len(indices) * spec.iterations, "images", done=(len(indices) - len(missing)) * spec.iterations)
    try:
        with StopRequest() as stop:

            def each() -> None:
                progress.advance(batch=f"{index + 1}")
                if stop.signal is not None:
                    where = f"is kept in {keep}; run again to go on" if keep else "was not kept: no directory was given"
                    raise Interrupted(f"stopped in batch {index + 1}; what was finished {where}.", stop.signal)

            for index, place in zip(indices, places):
                if index in missing:
                    made, record = optimiser.batch(index, len(place.labels), each)
                    if shelf:
                        shelf.save(index, made)
                    place.images.copy_(made.images)
                    place.labels.copy_(made.labels)
                    progress.message(
                        f"images, batch {index + 1}: loss {record['loss']:.4g}, bns {record['bns']:.4g}, "
                        f"teacher {record['teacher_top1']:.1f} %, 1-p > 0.5: {record['hard_share']:.3f}"
                    )
                    if log:
                        log(images_batch=index, **{f"images_{name}": value for name, value in record.items()})
                if spec.distance_weight and any(i > index for i in missing):
                    optimiser.remember(place)
    finally:
        progress.stop()
    return ImageSet(images, labels)


# ---- files -------------------------------------------------------------------------------------------------------------


def _tensors_sha256(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Over names, types, shapes and bytes, and `text`."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def provenance(
    teacher: nn.Module, spec: Images, input_size: Sequence[int], num_classes: int, seed: int
) -> dict[str, Any]:
    """Everything that a batch of images follows from, as JSON holds it; `teacher` is the SHA-256 of its parameters and buffers.

    How many batches there are is no part of it: a smaller set is the beginning of a larger one.
    """
    images = {name: value for name, value in dataclasses.asdict(spec).items() if name not in ("enabled", "count")}
    result: dict[str, Any] = json.loads(
        json.dumps(
            {
                "algorithm": ALGORITHM,
                "images": images,
                "input_size": list(input_size),
                "num_classes": num_classes,
                "seed": seed,
                "teacher": _tensors_sha256(teacher.state_dict()),
            }
        )
    )
    return result


def save_images(path: str | PathLike[str], image_set: ImageSet, provenance: Mapping[str, Any]) -> None:
    """Write images as safetensors: tensors `images` and `labels`, metadata `provenance` (JSON) and `sha256` over all of it.

    Atomic and durable. Raises BadFileError for NaN or infinite images and labels of no class, StorageError.
    """
    _check(image_set, Path(path), provenance.get("num_classes"))
    text = json.dumps(provenance, sort_keys=True)
    tensors = image_set._asdict()
    replace_file(Path(path), pack(tensors, {"provenance": text, "sha256": _tensors_sha256(tensors, text)}))


def load_images(
    path: str | PathLike[str], provenance: Mapping[str, Any] | None = None
) -> tuple[ImageSet, dict[str, Any]]:
    """The images of a file (CPU) and its provenance.

    Raises BadFileError: missing, unreadable, changed since it was written, NaN or infinite images, labels of no class, or
    another provenance than the given one; the message names what differs.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadFileError(f"{path} cannot be read ({error.strerror}).") from error
    tensors = unpack(data, path)
    try:
        # The library gives no metadata of bytes in memory; it has just validated the header that is parsed here.
        text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        intact = text["sha256"] == _tensors_sha256(tensors, text["provenance"])
        image_set = ImageSet(tensors["images"], tensors["labels"])
        found: dict[str, Any] = json.loads(text["provenance"])
        if not isinstance(found, dict):
            raise ValueError("the provenance is no table")
    except (KeyError, ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is damaged, or no file of optimised images.") from error
    if not intact:
        raise BadFileError(f"{path} is damaged: its SHA-256 is not the recorded one.")
    _check(image_set, path, found.get("num_classes"))
    if provenance is not None and found != provenance:
        differing = [k for k in {**provenance, **found} if found.get(k, ...) != provenance.get(k, ...)]
        raise BadFileError(f"{path} holds images of another {differing[0]}.")
    return image_set, found


def _check(image_set: ImageSet, path: Path, num_classes: Any) -> None:
    """`num_classes` as a provenance holds it; anything but an integer leaves the number of classes open."""
    images, labels = image_set
    typed = images.dtype == torch.float32 and labels.dtype == torch.int64
    if not typed or images.dim() != 4 or labels.shape != images.shape[:1]:
        raise BadFileError(f"{path}: images must be float32 [N, C, H, W] with int64 labels [N].")
    if not torch.isfinite(images).all():
        raise BadFileError(f"{path}: the images contain NaN or infinite values.")
    classes = num_classes if type(num_classes) is int else None
    wrong = labels[(labels < 0) | (labels >= (math.inf if classes is None else classes))]
    if len(wrong):
        rule = "at least 0" if classes is None else f"from 0 to {classes - 1}"
        raise BadFileError(f"{path}: labels must be {rule}, got {int(wrong[0])}.")


def batch_files(spec: Images) -> list[str]:
    """Names of the files of a complete set, one per batch, in the subdirectory that `cached_images` keeps it in."""
    return [_file_name(i, _batch_size(spec, i)) for i in range(-(-spec.count // spec.batch_size))]


def _batch_size(spec: Images, index: int) -> int:
    return min(spec.batch_size, spec.count - index * spec.batch_size)


def _file_name(index: int, size: int) -> str:
    return f"batch-{index:05d}x{size}.safetensors"


class _Shelf:
    """A directory of finished batches of one provenance."""

    def __init__(self, directory: Path, provenance: Mapping[str, Any]):
        self.directory, self.provenance = directory, provenance
        with writing(directory):
            make_directory(directory)

    def _entry(self, index: int, size: int) -> tuple[Path, dict[str, Any]]:
        return self.directory / _file_name(index, size), {**self.provenance, "batch": index}

    def load(self, index: int, place: ImageSet) -> bool:
        """Whether the batch lies here intact; it is then copied to `place`."""
        try:
            found, _ = load_images(*self._entry(index, len(place.labels)))
        except BadFileError:
            return False
        if found.images.shape != place.images.shape:
            return False
        place.images.copy_(found.images)
        place.labels.copy_(found.labels)
        return True

    def save(self, index: int, batch: ImageSet) -> None:
        path, wanted = self._entry(index, len(batch.labels))
        save_images(path, batch, wanted)


def set_name(teacher: nn.Module, spec: Images, input_size: Sequence[int], num_classes: int, seed: int) -> str:
    """Of the subdirectory in which `cached_images` keeps a set."""
    text = json.dumps(provenance(teacher, spec, input_size, num_classes, seed), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_images(
    directory: str | PathLike[str],
    teacher: nn.Module,
    spec: Images,
    input_size: Sequence[int],
    num_classes: int,
    seed: int,
    **options: Any,
) -> ImageSet:
    """`synthesize_images`, kept in a subdirectory of `directory` that is named after the provenance.

    Sets of other recipes, seeds or teachers lie beside it untouched; one that differs in `count` alone shares its batches. A
    complete set is only read; an incomplete or damaged one is completed. Several processes may do so at once: each writes the same bytes.
    """
    keep = Path(directory) / set_name(teacher, spec, input_size, num_classes, seed)
    return synthesize_images(teacher, spec, input_size, num_classes, seed, keep=keep, **options)
