"""Networks and their weights: `load_model("resnet20", "weights.safetensors")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..errors import BadFileError, UsageError
from .checkpoint import Checkpoint, apply_checkpoint, preprocessing, read_checkpoint
from .resnet_cifar import ResNetCifar
from .sources import BUILT_IN, LIBRARIES, build

__all__ = [
    "BUILT_IN",
    "LIBRARIES",
    "Checkpoint",
    "LoadedModel",
    "ResNetCifar",
    "apply_checkpoint",
    "load_model",
    "read_checkpoint",
]


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode and what is known about it.

    `input_size` is (channels, height, width); `mean` and `std` are per channel for images in 0..1; each is None when
    neither the checkpoint nor the model's library tells. `random_weights` is True when no trained weights were given
    (False for a user's factory, which may load its own). `metadata` is the text header of a safetensors checkpoint.
    """

    model: nn.Module
    spec: str
    checkpoint: Path | None
    sha256: str | None
    input_size: tuple[int, int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    num_classes: int | None
    random_weights: bool
    metadata: Mapping[str, str] = field(default_factory=dict)


def load_model(
    spec: str, checkpoint: str | Path | None = None, *, num_classes: int | None = None, allow_import: bool = False
) -> LoadedModel:
    """Build the network that `spec` names and load its weights from `checkpoint` (never from the network).

    Specs: "resnet20" (shortcut kind from the checkpoint, else "B"), "resnet20_a", "resnet20_b"; "torchvision:NAME",
    "timm:NAME", "pytorchcv:NAME"; with `allow_import` also "module.path:factory" and "file.py:factory", called without
    arguments or with `num_classes` if given. Raises UsageError for a bad spec and BadFileError for a bad file.
    """
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"num_classes {num_classes} must be at least 1.")
    weights = None if checkpoint is None else read_checkpoint(checkpoint)
    source = build(spec, weights, num_classes, allow_import)
    if weights is not None:
        apply_checkpoint(source.model, weights)
    mean, std = source.mean, source.std
    if weights is not None:
        try:
            mean, std = preprocessing(weights.metadata, source.input_size[0] if source.input_size else 3) or (mean, std)
        except UsageError as error:
            raise BadFileError(f"{weights.path}: {error}") from None
    return LoadedModel(
        model=source.model.eval(),
        spec=spec,
        checkpoint=weights.path if weights else None,
        sha256=weights.sha256 if weights else None,
        input_size=_header_size(weights) or source.input_size,
        mean=mean,
        std=std,
        num_classes=_count_classes(source.model),
        random_weights=source.random_weights and weights is None,
        metadata=dict(weights.metadata) if weights else {},
    )


def _header_size(weights: Checkpoint | None) -> tuple[int, int, int] | None:
    text = weights.metadata.get("input_size") if weights else None
    if weights is None or text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadFileError(f"{weights.path}: header entry input_size '{text}' is not 'channels,height,width'.")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def _count_classes(model: nn.Module) -> int | None:
    declared = getattr(model, "num_classes", None)
    if isinstance(declared, int):
        return declared
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return heads[-1].out_features if heads else None
