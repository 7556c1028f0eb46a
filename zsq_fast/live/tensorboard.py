"""Curves, synthetic images and histograms of a run, in TensorBoard's event files."""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.errors import UsageError
from zsq_fast.methods import Recipe, Trainer
from zsq_fast.methods.updates import weights_by_bits
from zsq_fast.nn import QuantAct
from zsq_fast.report.images import strips
from zsq_fast.runs.storage import writing

MOST = 1024  # images that a contact sheet is chosen from
PICTURES = 20  # epochs with images and histograms, at most, and the last one
# key of a record -> tag
SCALARS = {
    "student_loss": "loss/student",
    "generator_ce": "loss/generator_ce",
    "generator_bns": "loss/generator_bns",
    "agreement": "agreement/training",
    "held_out_agreement": "agreement/held_out",
    "held_out_kl": "kl/held_out",
    "top1": "top1/test_images",
}
# key of a record with one number per quantized weight -> tag of the mean, and of each below it
PER_WEIGHT = {"update_ratio": "updates", "net_update_ratio": "net_updates", "log2_kappa": "log2_kappa"}


def writer_class() -> Any:
    """SummaryWriter; UsageError where its package is missing."""
    try:
        import PIL.Image  # noqa: F401  add_image imports it at the first picture
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard needs the packages tensorboard and pillow: pip install 'zsq-fast[tensorboard]', or leave it out "
            "(resume: --no-tensorboard)."
        ) from None
    return SummaryWriter


class TensorBoard:
    """To be called at the end of an epoch (`Trainer.on_epoch`), for one run; context manager.

    The step of everything is the trainer's. Once per epoch what its record holds is written, which the host has read already; at
    some 20 epochs also a contact sheet of synthetic images, of the same noise every time or of the optimised images once, and
    histograms: the integer codes of every quantized weight, and the ends of the activation ranges over the network. A run that goes
    on in a folder hides what a killed process wrote behind the checkpoint; in a new folder it begins with the epochs so far. No
    training ends because of it: what keeps it from being written is a warning, and nothing more is written.

    Args:
        folder: of the event files; TensorBoard names them after the time, the host and the process.
        mean, std: of the images' normalisation, per channel; empty: their range becomes black to white.

    Raises:
        UsageError: the package tensorboard, or pillow, is missing.
    """

    def __init__(self, folder: Path, mean: Sequence[float] = (), std: Sequence[float] = ()):
        self.folder, self.mean, self.std = folder, mean, std
        self._class = writer_class()
        self._writer: Any = None
        self._given_up = False

    def __call__(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        if not self._given_up:
            with self._excused():
                self._add(trainer, record)

    @contextlib.contextmanager
    def _excused(self) -> Iterator[None]:
        try:
            with writing(self.folder):
                yield
        except Exception as error:
            self._given_up = True
            warnings.warn(f"nothing more is written for TensorBoard: {error}", stacklevel=2)

    def _add(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        history, schedule = trainer.state.history, trainer.recipe.schedule
        names = [name.removesuffix(".weight") for group in weights_by_bits(trainer.student).values() for name in group]
        first = len(history) == 1
        if self._writer is None and not any(self.folder.glob("events.*")):
            first = True
            self._open(history[0]["step"])
            for earlier in history[:-1]:
                self._add_scalars(earlier, trainer.recipe, names)
        elif self._writer is None:
            self._open(record["step"])
        self._add_scalars(record, trainer.recipe, names)
        done = record["epoch"] + 1
        due = first or done == schedule.epochs or done % -(-schedule.epochs // PICTURES) == 0
        if due:
            self._add_histograms(trainer.outcome(), record["step"])
        if due and (trainer.batches is None or first):  # optimised images stay what they are
            self._add_images(trainer, record["step"])
        self._writer.flush()

    def _open(self, step: int) -> None:
        self._writer = self._class(str(self.folder), purge_step=step)

    def _add_scalars(self, record: Mapping[str, Any], recipe: Recipe, names: Sequence[str]) -> None:
        for tag, value in scalars(record, recipe, names):
            self._writer.add_scalar(tag, value, record["step"])

    @torch.no_grad()
    def _add_histograms(self, student: nn.Module, step: int) -> None:
        for bits, layers in weights_by_bits(student).items():
            for name, layer in layers.items():
                codes: Tensor = layer.integer_codes()  # type: ignore[operator]
                counts = codes.flatten().bincount(minlength=2**bits).cpu().double()
                values = torch.arange(2**bits).double()
                self._writer.add_histogram_raw(
                    f"codes/{name.removesuffix('.weight')}",
                    min=-0.5,  # every code has a bucket of width 1 around it
                    max=2**bits - 0.5,
                    num=codes.numel(),
                    sum=float(counts @ values),
                    sum_squares=float(counts @ values.square()),
                    bucket_limits=(values + 0.5).tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=step,
                )
        ends = [torch.stack(_ends(m)) for m in student.modules() if isinstance(m, QuantAct)]
        known = [pair for pair in torch.stack(ends).tolist() if all(map(float.__eq__, pair, pair))] if ends else []
        for tag, values_of_all in zip(("low", "high"), zip(*known, strict=True), strict=False):
            self._writer.add_histogram(f"activation_range/{tag}", torch.tensor(values_of_all), step)

    def _add_images(self, trainer: Trainer, step: int) -> None:
        if trainer.batches is None:
            images, labels = trainer.synthesis.images("tensorboard")
        else:
            images, labels = trainer.batches.images[:MOST], trainer.batches.labels[:MOST]
        rows = [pixels for _, _, pixels in strips(images.cpu(), labels.cpu(), self.mean, self.std)]
        width = max(row.shape[1] for row in rows)
        sheet = torch.cat([F.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows])
        self._writer.add_image("synthetic_images/row_per_class", sheet, step, dataformats="HWC")

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None and not self._given_up:
            with self._excused():
                self._writer.close()


def _ends(quantizer: QuantAct) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that comes out, or the running range while there is one."""
    if not quantizer.learns:
        return quantizer.lo, quantizer.hi
    per_unit, lowest = quantizer.grid()
    return lowest / per_unit, (lowest + 2**quantizer.bits - 1) / per_unit


def scalars(record: Mapping[str, Any], recipe: Recipe, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Tags and values of an epoch's record; `names` are those of the quantized weights in the order of its lists."""
    factor = record["lr_factor"]
    if recipe.student.enabled:
        yield "lr/student", recipe.student.lr * factor
    if "generator_ce" in record:
        yield "lr/generator", recipe.generator.lr * factor
    for key, tag in SCALARS.items():
        if record.get(key) is not None:
            yield tag, record[key]
    for key, tag in PER_WEIGHT.items():
        if record.get(key):
            yield f"{tag}/mean", statistics.fmean(record[key])
            for name, value in zip(names, record[key], strict=True):
                yield f"{tag}/{name or 'weight'}", value
    for pair, found in record.get("cosine", {}).items():
        for part in ("total", "weights"):
            if found[part] is not None:
                yield f"cosine_{part}/{pair}", found[part]
