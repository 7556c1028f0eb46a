"""What, besides the recipe, decides a run. `quantize` writes it to run.json, `resume` and `evaluate` read it back."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zsq_fast import data as evaluation
from zsq_fast.errors import BadFileError, UsageError
from zsq_fast.methods import Recipe
from zsq_fast.models import load_model


@dataclass(frozen=True)
class Job:
    """Sizes are (channels, height, width); `mean` and `std` are per channel for pixels in 0..1."""

    model: str
    checkpoint: str | None = None
    sha256: str | None = None
    weights_sha256: str | None = None
    num_classes: int | None = None
    allow_import: bool = False
    input_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    channels_last: bool | None = None
    force: bool = False
    eval_data: str | None = None
    eval_limit: int | None = None
    eval_every: int | None = None
    track_cosine: int = 0
    track_updates: bool = False
    tensorboard: bool = False

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace, **more: Any) -> Job:
        """From the options of `add_job_options`, or of `add_network_options` alone, and what else is known."""
        names = ("num_classes", "allow_import", "input_size", "device", "threads", "channels_last", "force")
        given = vars(arguments)
        values: dict[str, Any] = {name: given.get(name) for name in ("mean", "std", "eval_limit")}
        values |= {name: given[name] for name in names}
        job = cls(**values, **more)
        return job.with_files(checkpoint=arguments.checkpoint, eval_data=given.get("eval_data"))

    @classmethod
    def from_info(cls, info: dict[str, Any], path: Path, *, allow_import: bool) -> Job:
        """The recorded job; consent to run code is the caller's alone, for a stranger may have written the record."""
        stored = info.get("job")
        known = {field.name for field in fields(cls)}
        if not isinstance(stored, dict) or not stored.keys() <= known or not isinstance(stored.get("model"), str):
            raise BadFileError(f"{path} was not written by `zsq-fast quantize`, or by a newer version.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return cls(**{**values, "allow_import": allow_import})

    def with_files(self, **paths: str | None) -> Job:
        """Absolute, like the file of a factory, so that a run can be resumed from another directory."""
        absolute: dict[str, Any] = {key: path and os.path.abspath(path) for key, path in paths.items()}
        origin, _, name = self.model.rpartition(":")
        if origin.endswith(".py"):
            absolute["model"] = f"{os.path.abspath(origin)}:{name}"
        return replace(self, **absolute)

    @property
    def layout(self) -> torch.memory_format:
        """In which networks run: the trainer's rule."""
        last = self.device == "cpu" if self.channels_last is None else self.channels_last
        return torch.channels_last if last else torch.contiguous_format

    def metadata(self, recipe: Recipe) -> dict[str, str]:
        """The header of the student file, in the form `load_model` understands."""
        texts = {
            "model": self.model,
            "weight_bits": f"{recipe.quant.nominal_weight_bits:g}",
            "act_bits": str(recipe.quant.act_bits),
        }
        texts["format"] = "zsq_fast fake-quantized student"
        texts["input_size"] = ",".join(map(str, self.input_size or ()))
        if recipe.quant.layer_bits:
            texts["layer_bits"] = ",".join(recipe.quant.layer_bits)
        if self.mean and self.std:
            texts["norm"] = f"mean {','.join(map(repr, self.mean))} std {','.join(map(repr, self.std))}"
        return texts

    def to_info(self) -> dict[str, Any]:
        return {
            "job": asdict(self),
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": _versions(),
            "commit": _commit(),
            "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("zsq-fast", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None when it was installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def pick_device(name: str) -> str:
    """ "auto" resolved; UsageError when CUDA is asked for and absent."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name} is not available to this torch ({torch.__version__}); use --device cpu.")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UsageError(f"device {name} does not exist; this machine has {torch.cuda.device_count()}.")
    return name


def load(job: Job) -> tuple[Job, nn.Module]:
    """The network on the job's device and the job with what the network tells filled in.

    UsageError: size unknown, random weights, evaluation without normalisation. BadFileError: the checkpoint is not
    the one of the recorded SHA-256, or unusable.
    """
    torch.manual_seed(job.seed)  # only random weights (--force) depend on it
    loaded = load_model(job.model, job.checkpoint, num_classes=job.num_classes, allow_import=job.allow_import)
    if job.sha256 and loaded.sha256 != job.sha256:
        raise BadFileError(f"{job.checkpoint} is not the file this run began with: its SHA-256 differs; restore it.")
    weights = fingerprint(loaded.model)
    if job.weights_sha256 and weights != job.weights_sha256:
        raise BadFileError(f"'{job.model}' has other weights than when this run began; restore what it was built from.")
    if loaded.random_weights and not job.force:
        raise UsageError(f"model '{job.model}' has random weights; give trained ones by --checkpoint FILE.")
    size = job.input_size or loaded.input_size
    if size is None:
        raise UsageError(f"the input size of '{job.model}' is not known; give it as --input-size C,H,W.")
    mean, std = job.mean or loaded.mean, job.std or loaded.std
    if job.eval_data and (mean is None or std is None):
        raise UsageError(f"the normalisation of '{job.model}' is not known; give --mean and --std with --eval-data.")
    full = replace(job, sha256=loaded.sha256, weights_sha256=weights, input_size=tuple(size), mean=mean, std=std)
    full = replace(full, device=pick_device(job.device))
    if full.threads:
        torch.set_num_threads(full.threads)
    full = replace(full, threads=torch.get_num_threads())  # sums depend on it: a resumed run must use as many
    return full, loaded.model.to(full.device)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the state of a network, for those that do not come from a checkpoint file."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def evaluator(job: Job, batch_size: int = 250) -> Callable[[nn.Module], evaluation.EvalResult] | None:
    """Accuracy on the job's test images, which are opened at once; None without any."""
    if job.eval_data is None:
        return None
    size = job.input_size
    assert size is not None and job.mean is not None and job.std is not None
    images = evaluation.load_eval_data(
        job.eval_data, limit=job.eval_limit, image_size=size[1] if size[1] == size[2] else None
    )
    options = {"mean": job.mean, "std": job.std, "batch_size": batch_size, "device": job.device}

    def measure(model: nn.Module) -> evaluation.EvalResult:
        return evaluation.evaluate(model, images, channels_last=job.layout == torch.channels_last, **options)  # type: ignore[arg-type]

    return measure
