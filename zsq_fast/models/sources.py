"""Where a network comes from: ours, a model library (random weights, nothing downloaded), or the user's factory."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import BadFileError, UsageError, nearest
from .checkpoint import Checkpoint
from .resnet_cifar import ResNetCifar

BUILT_IN = ("resnet20", "resnet20_a", "resnet20_b")
LIBRARIES = ("torchvision", "timm", "pytorchcv")
Numbers = tuple[float, ...]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR_NORMS: Mapping[str, tuple[Numbers, Numbers]] = {
    "cifar100": ((0.50705882, 0.48666667, 0.44078431), (0.26745098, 0.25568627, 0.27607843)),
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
}


@dataclass(frozen=True)
class Source:
    """A fresh network and what its library says about the input it was designed for."""

    model: nn.Module
    random_weights: bool
    input_size: tuple[int, int, int] | None = None
    mean: Numbers | None = None
    std: Numbers | None = None


def build(spec: str, checkpoint: Checkpoint | None, num_classes: int | None, allow_import: bool) -> Source:
    """The network that `spec` names; `checkpoint` settles what the spec leaves open (shortcuts, classes, channels)."""
    if spec in BUILT_IN:
        return _resnet20(spec, checkpoint, num_classes)
    origin, colon, name = spec.rpartition(":")
    if not colon or not origin or not name:
        others = "Others: torchvision:NAME, timm:NAME, pytorchcv:NAME."
        raise UsageError(f"model '{spec}' is unknown.{nearest(spec, BUILT_IN)} {others}")
    if origin in LIBRARIES:
        return _FROM_LIBRARY[origin](name, {} if num_classes is None else {"num_classes": num_classes})
    if "." not in origin and nearest(origin, LIBRARIES).startswith(" Did"):
        raise UsageError(f"model library '{origin}' is unknown.{nearest(origin, LIBRARIES)}")
    if not allow_import:
        advice = "pass allow_import=True (--allow-import) if you trust it"
        raise UsageError(f"model '{spec}' would run code from '{origin}': {advice}.")
    return _from_factory(origin, name, num_classes)


def _resnet20(spec: str, checkpoint: Checkpoint | None, num_classes: int | None) -> Source:
    kind, channels = spec[-1].upper() if "_" in spec else "B", 3
    if checkpoint is not None:
        weights = checkpoint.tensors
        if spec == "resnet20":
            kind = "B" if any(".shortcut." in name for name in weights) else "A"
        if num_classes is None and "linear.weight" in weights and weights["linear.weight"].dim() == 2:
            num_classes = weights["linear.weight"].shape[0]
        if "conv1.weight" in weights and weights["conv1.weight"].dim() == 4:
            channels = weights["conv1.weight"].shape[1]
    model = ResNetCifar(20, 10 if num_classes is None else num_classes, channels, shortcut=kind)
    # No mean and std: the training recipe of a checkpoint is not the network's to know, and a guess costs accuracy.
    return Source(model, checkpoint is None, (channels, 32, 32))


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UsageError(f"model '{name}:...' needs the package {name}: pip install {name}") from None


def _unknown(library: str, name: str, known: list[str]) -> UsageError:
    near = nearest(name, known)  # with no near name it would print the library's whole catalogue
    advice = near if near.startswith(" Did") else " See its list of models."
    return UsageError(f"{library} has no model '{name}'.{advice}")


def _torchvision(name: str, options: dict[str, Any]) -> Source:
    models = _library("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    if name in ("googlenet", "inception_v3"):
        options = {**options, "init_weights": True}
    model = models.get_model(name, weights=None, **options)
    preset = models.get_model_weights(name).DEFAULT.transforms()
    size = preset.crop_size[0]
    return Source(model, True, (3, size, size), tuple(preset.mean), tuple(preset.std))


def _timm(name: str, options: dict[str, Any]) -> Source:
    timm = _library("timm")
    if not timm.is_model(name.split(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        raise _unknown("timm", name, timm.list_pretrained()) from None
    config = getattr(model, "default_cfg", None) or {}
    found = {key: tuple(config[key]) if config.get(key) else None for key in ("input_size", "mean", "std")}
    return Source(model, True, **found)


def _pytorchcv(name: str, options: dict[str, Any]) -> Source:
    _library("pytorchcv")
    provider = importlib.import_module("pytorchcv.model_provider")
    try:
        model = provider.get_model(name, pretrained=False, **options)
    except ValueError:
        raise _unknown("pytorchcv", name, list(getattr(provider, "_models", {}))) from None
    size = getattr(model, "in_size", None)
    data = next((data for data in _CIFAR_NORMS if name.endswith(data)), None)
    other = re.search(r"_(svhn|cub|celeba|voc|coco|ade20k|cityscapes)\w*$", name)
    mean, std = _CIFAR_NORMS[data] if data else (None, None) if other else _IMAGENET
    return Source(model, True, (getattr(model, "in_channels", 3), *size) if size else None, mean, std)


_FROM_LIBRARY: Mapping[str, Callable[[str, dict[str, Any]], Source]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "pytorchcv": _pytorchcv,
}


def _from_factory(origin: str, name: str, num_classes: int | None) -> Source:
    try:
        factory = getattr(_import_origin(origin), name, None)
        if not callable(factory):
            raise UsageError(f"'{origin}' has no callable '{name}': name a function that returns the network.")
        model = factory() if num_classes is None else factory(num_classes=num_classes)
    except SystemExit as stop:  # a script without `if __name__ == "__main__"`
        raise UsageError(f"'{origin}:{name}' ended by sys.exit({stop.code!r}): it must return the network.") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"'{origin}:{name}' returned a {type(model).__name__}: it must return a torch.nn.Module.")
    return Source(model, False)


def _import_origin(origin: str) -> ModuleType:
    if not origin.endswith(".py"):
        try:
            return importlib.import_module(origin)
        except ModuleNotFoundError as error:
            if error.name is None or not (origin == error.name or origin.startswith(error.name + ".")):
                raise
            raise UsageError(f"module '{origin}' cannot be found: check its name and PYTHONPATH.") from None
    if not os.path.isfile(origin):
        raise BadFileError(f"{origin}: no such file: check the path of the model's source.")
    module_spec = importlib.util.spec_from_file_location(f"zsq_user_{Path(origin).stem}", origin)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickling in the user's file look themselves up here
    module_spec.loader.exec_module(module)
    return module
