"""The toy task of the demo: handwritten digits that come with scikit-learn, and a small ResNet trained on the spot."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_fast.data import EvalData
from zsq_fast.errors import BadFileError, StorageError
from zsq_fast.models import ResNetCifar, apply_checkpoint, read_checkpoint
from zsq_fast.runs.storage import replace_file, writing
from zsq_fast.runs.tensors import pack

SIDE, TEST_IMAGES = 16, 600  # 8x8 pictures doubled: the generator starts at a quarter of the side


@dataclass(frozen=True)
class Settings:
    """Everything the trained network depends on; the name of its cache file is a hash of this."""

    depth: int = 14
    widths: tuple[int, int, int] = (8, 16, 32)
    epochs: int = 15
    batch: int = 64
    lr: float = 0.1
    seed: int = 0
    recipe: int = 1  # raise it when the training code below changes

    def cache_name(self) -> str:
        text = json.dumps([asdict(self), torch.__version__], sort_keys=True)
        return f"digits-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


@dataclass(frozen=True)
class Digits:
    """A fixed split. Train images are uint8 [N, 1, 16, 16]; `mean` and `std` are theirs, for pixels in 0..1."""

    train_images: Tensor
    train_labels: Tensor
    test: EvalData
    mean: tuple[float]
    std: tuple[float]


def load_digits() -> Digits:
    """1,197 training and 600 test images."""
    from sklearn import datasets

    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    pixels, test_images = images[train].float() / 255, images[test]
    held_out = EvalData(Path("scikit-learn digits"), labels[test], lambda start, stop: test_images[start:stop])
    return Digits(images[train], labels[train], held_out, (pixels.mean().item(),), (pixels.std().item(),))


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zsq_fast"


def trained_network(
    digits: Digits, settings: Settings, progress: Callable[[int, int], None] | None = None
) -> tuple[nn.Module, bool]:
    """The float network in eval mode, and whether it came from the cache.

    A damaged cache file is trained anew; an unwritable cache costs the next demo a few seconds, nothing more.
    """
    model, path = _network(settings), cache_folder() / settings.cache_name()
    try:
        apply_checkpoint(model, read_checkpoint(path))
        return model.eval(), True
    except BadFileError:
        pass
    _train(model, digits, settings, progress)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, pack(model.state_dict(), {"settings": json.dumps(asdict(settings))}))
    except StorageError as error:
        print(f"note: the trained network is not cached: {error}", file=sys.stderr)
    return model.eval(), False


def _network(settings: Settings) -> ResNetCifar:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ResNetCifar(settings.depth, 10, 1, settings.widths)


def _train(model: nn.Module, digits: Digits, settings: Settings, progress: Callable[[int, int], None] | None) -> None:
    draw = torch.Generator().manual_seed(settings.seed)
    images = (digits.train_images.float() / 255 - digits.mean[0]) / digits.std[0]
    steps = len(images) // settings.batch
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.epochs * steps)
    model.train()
    for epoch in range(settings.epochs):
        order = torch.randperm(len(images), generator=draw)[: steps * settings.batch].view(steps, -1)
        for batch in order:
            shift = torch.randint(-2, 3, (2,), generator=draw).tolist()  # the digits have a blank rim to roll into
            logits = model(torch.roll(images[batch], shift, (2, 3)))
            loss = F.cross_entropy(logits, digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(epoch + 1, settings.epochs)
