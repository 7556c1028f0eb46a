"""A method is data: one TOML file of numbers per paper, resolved into a frozen, checked `Recipe`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from zsq_fast.errors import UsageError, nearest
from zsq_fast.methods.autorecon import check_source
from zsq_fast.nn.layers import EMAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGE_INPUT = 64  # pixels; above, a recipe's [large] tables apply (the papers' ImageNet settings)
SCHEDULES = ("paper", "short")
LONGEST_SHOWN = 200  # characters of a wrong value in a message
LARGEST = 10**15  # whole numbers stay below; floats hold all of those
MOST_HELD_OUT = 10_000_000  # images; all of them are made at once, and kept


QUIRK = ("faithful", "corrected")  # as the published code computes it, or as it evidently was meant


def _shown(value: Any) -> str:
    """`repr`, short; some values that TOML can spell have none (thousands of digits or of nested tables)."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _require(ok: bool, name: str, rule: str, value: Any) -> None:
    if not ok:
        raise UsageError(f"recipe option {name} must be {rule}, got {_shown(value)}")


def _same_as(options: Any, name: str, **values: str) -> None:
    """Other words for the values of an option."""
    object.__setattr__(options, name, values.get(getattr(options, name), getattr(options, name)))


@dataclass(frozen=True)
class Quant:
    """The quantizers.

    Attributes:
        weight_bits, act_bits: 2 to 8, of every weight and activation.
        ema: range tracking of the activations, see `zsq_fast.nn.QuantAct`; "faithful" and "corrected" stand for "reference" and
            "plain".
        calibrate_on: what the activation ranges follow during `schedule.calibration_epochs`: batches of the "generator", or of the
            optimised "images", in whole and without a generator (ZeroQ).
        average_weight_bits: 0, or 2 to 8: every layer's weight gets bits of its own instead of `weight_bits`, the least sensitive
            assignment whose packed weights are no larger than at this many bits throughout (ZeroQ's mixed precision).
        layer_bits: texts "layer=bits" of all such layers. Empty, with an average set: a run searches before it begins, and its
            resolved recipe holds what it found. Given, they are taken as they are.
        start: the student's weights before its first step: "nearest", those of the network, or "squant", moved so that their rounding
            errors cancel (SQuant, `zsq_fast.nn.balanced_rounding_`).
        ranges: "minmax", of weights and calibration images, or "learned": from the end of the calibration on one step size per
            output channel and per activation is trained with the student, without weight decay (LSQ; another protocol).
    """

    weight_bits: int = 4
    act_bits: int = 4
    ema: str = "reference"
    calibrate_on: str = "generator"
    average_weight_bits: float = 0.0
    layer_bits: tuple[str, ...] = ()
    start: str = "nearest"
    ranges: str = "minmax"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            _require(2 <= getattr(self, name) <= 8, f"quant.{name}", "an integer from 2 to 8", getattr(self, name))
        _same_as(self, "ema", faithful="reference", corrected="plain")
        _require(self.ema in EMAS, "quant.ema", " or ".join(map(repr, EMAS)), self.ema)
        _require(
            self.calibrate_on in ("generator", "images"),
            "quant.calibrate_on",
            "'generator' or 'images'",
            self.calibrate_on,
        )
        average = self.average_weight_bits
        _require(average == 0 or 2 <= average <= 8, "quant.average_weight_bits", "0 or from 2 to 8", average)
        for text in self.layer_bits:
            _require(text.rpartition("=")[2] in set("2345678") and "=" in text, "quant.layer_bits",
                     "texts 'layer=bits' with bits from 2 to 8", text)  # fmt: skip
        _require(
            len(self.layer_widths) == len(self.layer_bits), "quant.layer_bits", "one text per layer", self.layer_bits
        )
        _require(self.start in ("nearest", "squant"), "quant.start", "'nearest' or 'squant'", self.start)
        _require(self.ranges in ("minmax", "learned"), "quant.ranges", "'minmax' or 'learned'", self.ranges)
        _require(self.start == "nearest" or self.ranges == "minmax", "quant.start",
                 "'nearest' when quant.ranges is 'learned': SQuant's flips belong to the min/max grid", self.start)  # fmt: skip

    @property
    def layer_widths(self) -> dict[str, int]:
        """`layer_bits` as a mapping."""
        parts = [text.rpartition("=") for text in self.layer_bits]
        return {name: int(bits) for name, _, bits in parts}

    @property
    def widths(self) -> int | dict[str, int]:
        """The weight bits that `zsq_fast.nn.convert` takes. Raises UsageError while the search for them is still to be made."""
        if self.average_weight_bits and not self.layer_bits:
            raise UsageError(
                "quant.average_weight_bits leaves the bits of each layer to a search before the run: take the recipe it "
                "resolved (recipe.json of the run, Trainer.recipe), or zsq_fast.methods.mixed.settle_bits."
            )
        return self.layer_widths or self.weight_bits

    @property
    def nominal_weight_bits(self) -> float:
        """Of all weights, or on average: what a run is named after."""
        return self.average_weight_bits or self.weight_bits


@dataclass(frozen=True)
class Schedule:
    """Epochs of `iterations` steps each: the warm-up, of the generator alone, then the student's.

    Attributes:
        calibration_epochs: the first epochs of the warm-up, in which the activation ranges follow the images.
        milestones, decay: epoch indices at which learning rates and threshold are multiplied by `decay`.
        held_out: images drawn from the generator at the end of the warm-up and never trained on; by the student's agreement with
            the teacher there one epoch is chosen (`Result.chosen_epoch`). 0 chooses none.
    """

    epochs: int = 400
    iterations: int = 200
    batch_size: int = 200
    warmup_epochs: int = 4
    calibration_epochs: int = 4
    milestones: tuple[int, ...] = (100, 200, 300)
    decay: float = 0.1
    held_out: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.held_out <= MOST_HELD_OUT, "schedule.held_out", f"from 0 to {MOST_HELD_OUT}", self.held_out)
        _require(all(m >= 0 for m in self.milestones), "schedule.milestones", "indices of at least 0", self.milestones)
        for name in ("epochs", "iterations", "batch_size", "calibration_epochs"):
            _require(getattr(self, name) >= 1, f"schedule.{name}", "at least 1", getattr(self, name))
        _require(
            self.batch_size >= 2,
            "schedule.batch_size",
            "at least 2 (the generator normalises over the batch)",
            self.batch_size,
        )
        _require(self.warmup_epochs >= self.calibration_epochs, "schedule.warmup_epochs",
                 f"at least schedule.calibration_epochs ({self.calibration_epochs}): ranges must settle before the student trains",
                 self.warmup_epochs)  # fmt: skip
        _require(0 < self.decay <= 1, "schedule.decay", "in (0, 1]", self.decay)

    def factor(self, epoch: int) -> float:
        """Multiplier of learning rates and threshold in the epoch of this 0-based index."""
        return self.decay ** sum(epoch >= m for m in self.milestones)

    @property
    def steps(self) -> int:
        return self.epochs * self.iterations


def _below_one(betas: Sequence[float]) -> bool:
    return len(betas) == 2 and all(0 <= b < 1 for b in betas)


@dataclass(frozen=True)
class Generator:
    kind: str = "plain"
    latent: int = 100
    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    ce_weight: float = 1.0
    bns_weight: float = 0.1
    norm_eps: str = "faithful"
    # Of kind "qimera"
    conditional_norms: bool = False
    superpose_probability: float = 0.4
    superposed_classes: int = 2
    embedding: str = "random"
    noise_scale: float = 1.0
    disentangle: bool = False
    embedding_norm: str = "faithful"
    affine_scaling: str = "faithful"
    # Of kind "autorecon"
    genotype: str = "cifar10_resnet20"
    search_steps: int = 2000
    search_lr: float = 3e-3
    search_temperature: float = 5.0

    def __post_init__(self) -> None:
        kinds = ("plain", "conditional", "qimera", "autorecon")
        _require(self.kind in kinds, "generator.kind", "'plain', 'conditional', 'qimera' or 'autorecon'", self.kind)
        least = {"qimera": 0, "autorecon": 3}.get(self.kind, 1)
        _require(self.latent >= least, "generator.latent", f"at least {least} for kind '{self.kind}'", self.latent)
        _require(self.lr > 0, "generator.lr", "positive", self.lr)
        _require(_below_one(self.betas), "generator.betas", "two numbers in [0, 1)", self.betas)
        for name in ("norm_eps", "embedding_norm", "affine_scaling"):
            _require(
                getattr(self, name) in QUIRK, f"generator.{name}", "'faithful' or 'corrected'", getattr(self, name)
            )
        _require(
            self.embedding in ("random", "teacher"), "generator.embedding", "'random' or 'teacher'", self.embedding
        )
        p = self.superpose_probability
        _require(0 <= p <= 1, "generator.superpose_probability", "in [0, 1]", p)
        for name in ("ce_weight", "bns_weight", "noise_scale"):
            _require(getattr(self, name) >= 0, f"generator.{name}", "at least 0", getattr(self, name))
        check_source(self.genotype)
        for name in ("superposed_classes", "search_steps"):
            _require(getattr(self, name) >= 1, f"generator.{name}", "at least 1", getattr(self, name))
        for name in ("search_lr", "search_temperature"):
            _require(getattr(self, name) > 0, f"generator.{name}", "positive", getattr(self, name))


_STUDENT_CHOICES = {
    "optimizer": ("sgd", "adam", "rmsprop"),
    "kd_reduction": ("mean", "batchmean"),
    "alignment": ("channel", "direct", "spatial"),
    "promote_by": ("kl", "fa", "kl+fa"),
    "teacher_path": ("both", "student"),
    "pseudo_label": ("none", "plf"),
}


@dataclass(frozen=True)
class Student:
    """Fine-tuning: KL distillation (AIT section 7), cross entropy, HAST (hast_family.md 5.2 to 5.5), SynQ and PLF (10.2).

    Attributes:
        batch_size, crop_scale, flip: of the batches of optimised images, each image through a random resized crop of this share
            of its area, mirrored with probability `flip`; batch_size 0 is schedule.batch_size. No part in other recipes.
        lr, weight_decay: of every optimizer; the decay is added to the gradient.
        optimizer: "sgd" with `momentum` and `nesterov`, "adam" with `betas`, or "rmsprop" with `square_decay`; the last two divide by
            a root plus `optimizer_eps`.
        average: decay of the moving average of the student's parameters (Polyak averaging), or n / (n + 10) after n steps where that
            is less: a memory of n / 11 steps. The average is what is quantized, measured and kept; the steps do not see it. 0: the
            parameters themselves.
        ce_weight, kd_weight, kd_reduction: factors of CE and of `temperature^2 * KL`; "mean" divides by batch and classes (as AIT's
            family is released, "faithful" for short), "batchmean" by the batch ("corrected").
        feature_weight: lambda, of the feature alignment summed over the layers; 0 leaves it out.
        alignment: "channel" attention (relaxed, HAST eq. 12), "spatial" attention, or "direct", the features themselves.
        feature_points: module names; empty: found by structure (`zsq_fast.nn.feature_points`).
        clean_weight, promoted_weight: a and b, of the loss on the samples and on the samples made harder; b = 0 makes none.
        epsilon: length of the step that makes them harder, per value of the normalised image, which is not clipped.
        promote_by: the losses whose gradient leads that step, "kl", "fa" or "kl+fa".
        teacher_path: that gradient goes through teacher and student ("both", as released) or through the student alone.
        low_pass: D0 of SynQ's filter `exp(-d^2 / (2 D0^2))` on every batch of optimised images, d in cycles per image; 0: none.
        ce_gate: tau of SynQ; CE over the samples with `1 - p_y <= tau` alone, p_y the teacher's for the image at hand; 0: over all.
        cam_weight: of SynQ's mean squared difference of the networks' class activation maps; 0 leaves it out.
        pseudo_label: labels of the CE: those the images were made for ("none"), or the teacher's, one or two by its entropy ("plf").
        pseudo_threshold: of PLF: entropy over log(classes) up to which the teacher's class alone is the label; it falls linearly
            from the first number in the student's first epoch to the second in its last.
        pseudo_weight: of PLF: factor of the CE of the other samples, which have two labels.
    """

    enabled: bool = True
    batch_size: int = 0
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    optimizer: str = "sgd"
    lr: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    square_decay: float = 0.99
    optimizer_eps: float = 1e-8
    average: float = 0.0
    weight_decay: float = 1e-4
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 20.0
    kd_reduction: str = "mean"
    feature_weight: float = 0.0
    alignment: str = "channel"
    feature_points: tuple[str, ...] = ()
    clean_weight: float = 1.0
    promoted_weight: float = 0.0
    epsilon: float = 0.01
    promote_by: str = "kl+fa"
    teacher_path: str = "both"
    low_pass: float = 0.0
    ce_gate: float = 0.0
    cam_weight: float = 0.0
    pseudo_label: str = "none"
    pseudo_threshold: tuple[float, float] = (0.5, 0.2)
    pseudo_weight: float = 0.3

    def __post_init__(self) -> None:
        _require(
            self.batch_size >= 0, "student.batch_size", "at least 1, or 0 for schedule.batch_size", self.batch_size
        )
        lowest, highest = self.crop_scale if len(self.crop_scale) == 2 else (0, 0)
        _require(0 < lowest <= highest <= 1, "student.crop_scale", "two shares of the area in (0, 1]", self.crop_scale)
        _require(0 <= self.flip <= 1, "student.flip", "a probability", self.flip)
        _require(self.lr > 0, "student.lr", "positive", self.lr)
        _require(0 <= self.momentum < 1, "student.momentum", "in [0, 1)", self.momentum)
        _require(not self.nesterov or self.momentum > 0, "student.nesterov", "false without momentum", self.nesterov)
        _require(_below_one(self.betas), "student.betas", "two numbers in [0, 1)", self.betas)
        _require(0 <= self.square_decay < 1, "student.square_decay", "in [0, 1)", self.square_decay)
        _require(self.optimizer_eps > 0, "student.optimizer_eps", "positive", self.optimizer_eps)
        _require(0 <= self.average < 1, "student.average", "in [0, 1)", self.average)
        _same_as(self, "kd_reduction", faithful="mean", corrected="batchmean")
        _require(self.temperature > 0, "student.temperature", "positive", self.temperature)
        weights = (
            "ce_weight",
            "kd_weight",
            "feature_weight",
            "clean_weight",
            "promoted_weight",
            "cam_weight",
            "pseudo_weight",
        )
        for name in (*weights, "weight_decay", "epsilon", "low_pass"):
            _require(getattr(self, name) >= 0, f"student.{name}", "at least 0", getattr(self, name))
        for name, choices in _STUDENT_CHOICES.items():
            words = " or ".join(map(repr, choices))
            _require(getattr(self, name) in choices, f"student.{name}", words, getattr(self, name))
        _require(any((self.ce_weight, self.kd_weight, self.feature_weight, self.cam_weight)), "student.kd_weight",
                 "positive when ce_weight, feature_weight and cam_weight are 0", self.kd_weight)  # fmt: skip
        _require(0 <= self.ce_gate <= 1, "student.ce_gate", "in [0, 1]", self.ce_gate)
        first, last = self.pseudo_threshold if len(self.pseudo_threshold) == 2 else (0, 1)
        _require(
            0 <= last <= first <= 1, "student.pseudo_threshold", "two numbers in [0, 1], falling", self.pseudo_threshold
        )
        if not self.ce_weight:
            _require(not self.ce_gate, "student.ce_gate", "0 when ce_weight is", self.ce_gate)
            _require(
                self.pseudo_label == "none", "student.pseudo_label", "'none' when ce_weight is 0", self.pseudo_label
            )
        _require(self.clean_weight > 0 or self.promoted_weight > 0, "student.clean_weight",
                 "positive when promoted_weight is 0", self.clean_weight)  # fmt: skip
        _require(self.feature_weight > 0 or not self.feature_points, "student.feature_points",
                 "empty when feature_weight is 0", list(self.feature_points))  # fmt: skip
        if self.promoted_weight:
            _require(self.epsilon > 0, "student.epsilon", "positive when promoted_weight is", self.epsilon)
            led = {"kl": self.kd_weight, "fa": self.feature_weight}
            _require(any(led[name] for name in self.promote_by.split("+")), "student.promote_by",
                     "a loss whose weight is not 0", self.promote_by)  # fmt: skip


@dataclass(frozen=True)
class Inundation:
    """Gradient inundation of AIT, whatever the optimizer; ait_family.md 7.2.

    Attributes:
        threshold: share of the integer codes of each weight that a step should change; follows the schedule's milestones.
        search_steps: bisection steps for the factor of a step, 0 to 5.
        bisection: the factor is the last one tried, which may fall short of the threshold ("faithful"), or the smallest one tried
            that reaches it ("corrected").
        capped_epochs: epochs of student training during which the factor stays at most 128.
    """

    enabled: bool = False
    threshold: float = 1e-3
    search_steps: int = 5
    bisection: str = "faithful"
    capped_epochs: int = 1

    def __post_init__(self) -> None:
        _require(0 < self.threshold <= 1, "inundation.threshold", "a share of codes in (0, 1]", self.threshold)
        _require(0 <= self.search_steps <= 5, "inundation.search_steps", "0 to 5", self.search_steps)
        _require(self.bisection in QUIRK, "inundation.bisection", "'faithful' or 'corrected'", self.bisection)
        _require(self.capped_epochs >= 0, "inundation.capped_epochs", "at least 0", self.capped_epochs)


@dataclass(frozen=True)
class Images:
    """Images optimised from noise before the student trains (ZeroQ, IntraQ, HAST); hast_family.md sections 2, 4.1 and 5.1.

    Each `*_weight` switches its loss on; 0 leaves it out, and what belongs to it has no effect.

    Attributes:
        count, batch_size, iterations: images in all, images optimised together, Adam steps of each batch.
        lr, patience, plateau_factor, min_lr: Adam's rate; after more than `patience` steps without a better loss it is
            multiplied by `plateau_factor`, never below `min_lr` (torch's ReduceLROnPlateau, relative threshold 1e-4).
        init: "normal", N(0, 1), or "zeroq", about uniform in +-0.0235 (its slip: divided by the variance).
        statistics: of batch-norm inputs; "batch": mean and biased variance over the batch, averaged over layers and channels
            (GDFQ family); "image": ZeroQ's mean and unbiased deviation of each image, summed over layers and channels.
        input_weight: ZeroQ's per-image statistics of the image itself, against mean 0 and deviation 1.
        hard_weight, hard_gamma: HAST's beta and gamma, `beta * mean((1 - p_y)^gamma * CE)`; gamma 0 is plain CE.
        soft_weight, soft_floor: IntraQ's soft inception loss; the targets are 1 or, every other time, U(soft_floor, 1).
        distance_weight, distance_low, distance_high: IntraQ's marginal distance constraint, in cosine distances.
        crop_probability, crop_scale, flip: IntraQ's local object reinforcement; the share of iterations that see every image
            through a random resized crop of this share of its area, mirrored with probability `flip`.
    """

    enabled: bool = False
    count: int = 5120
    batch_size: int = 256
    iterations: int = 1000
    lr: float = 0.5
    patience: int = 50
    plateau_factor: float = 0.1
    min_lr: float = 1e-4
    init: str = "normal"
    statistics: str = "batch"
    bns_weight: float = 1.0
    input_weight: float = 0.0
    hard_weight: float = 0.0
    hard_gamma: float = 2.0
    soft_weight: float = 0.0
    soft_floor: float = 1.0
    distance_weight: float = 0.0
    distance_low: float = 0.0
    distance_high: float = 2.0
    crop_probability: float = 0.0
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "iterations"):
            _require(getattr(self, name) >= 1, f"images.{name}", "at least 1", getattr(self, name))
        _require(self.lr > 0, "images.lr", "positive", self.lr)
        _require(self.patience >= 0, "images.patience", "at least 0", self.patience)
        _require(0 < self.plateau_factor < 1, "images.plateau_factor", "in (0, 1)", self.plateau_factor)
        _require(0 <= self.min_lr <= self.lr, "images.min_lr", f"from 0 to images.lr ({self.lr})", self.min_lr)
        _require(self.init in ("normal", "zeroq"), "images.init", "'normal' or 'zeroq'", self.init)
        _require(self.statistics in ("batch", "image"), "images.statistics", "'batch' or 'image'", self.statistics)
        weights = [name for name in vars(self) if name.endswith("_weight")]
        for name in (*weights, "hard_gamma"):
            _require(getattr(self, name) >= 0, f"images.{name}", "at least 0", getattr(self, name))
        _require(any(getattr(self, name) for name in weights), "images.bns_weight",
                 "positive when every other weight is 0", self.bns_weight)  # fmt: skip
        for name in ("soft_floor", "crop_probability", "flip"):
            _require(0 <= getattr(self, name) <= 1, f"images.{name}", "in [0, 1]", getattr(self, name))
        low, high = self.distance_low, self.distance_high
        _require(
            0 <= low <= high <= 2, "images.distance_low", f"from 0 to images.distance_high ({high}, at most 2)", low
        )
        scale = self.crop_scale
        _require(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "images.crop_scale",
                 "two shares of the area, ascending, in (0, 1]", scale)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Every number of a run. `to_dict` and `from_dict` are inverse; a run directory holds the resolved form."""

    name: str
    title: str = ""
    quant: Quant = field(default_factory=Quant)
    schedule: Schedule = field(default_factory=Schedule)
    generator: Generator = field(default_factory=Generator)
    student: Student = field(default_factory=Student)
    inundation: Inundation = field(default_factory=Inundation)
    images: Images = field(default_factory=Images)

    def __post_init__(self) -> None:
        epochs, warmup = self.schedule.epochs, self.schedule.warmup_epochs
        _require(not self.student.enabled or epochs > warmup, "schedule.epochs",
                 f"more than schedule.warmup_epochs ({warmup}), or the student takes no step", epochs)  # fmt: skip
        on_images = self.quant.calibrate_on == "images"
        _require(self.student.enabled or on_images or not self.images.enabled, "images.enabled",
                 "false when student.enabled is: nothing would use the images", self.images.enabled)  # fmt: skip
        _require(
            self.images.enabled or not on_images,
            "quant.calibrate_on",
            "'generator' when images.enabled is false",
            "images",
        )
        _require(not on_images or not self.schedule.held_out, "schedule.held_out",
                 "0 when quant.calibrate_on is 'images': there is no generator to draw them from", self.schedule.held_out)  # fmt: skip
        _require(not self.inundation.enabled or self.quant.ranges == "minmax", "inundation.enabled",
                 "false when quant.ranges is 'learned': it counts codes of the min/max grid", self.inundation.enabled)  # fmt: skip
        late = self.quant.ranges == "learned" and self.schedule.calibration_epochs > warmup
        _require(not late or not self.student.average, "student.average",
                 "0 when quant.ranges is 'learned' and begins after the student's first step", self.student.average)  # fmt: skip
        _require(self.images.enabled or not self.student.batch_size, "student.batch_size",
                 "0 when images.enabled is false: the student trains on the generator's batches", self.student.batch_size)  # fmt: skip
        _require(self.images.enabled or not self.student.low_pass, "student.low_pass",
                 "0 when images.enabled is false: it filters optimised images", self.student.low_pass)  # fmt: skip

    @property
    def student_steps(self) -> int:
        epochs = self.schedule.epochs - self.schedule.warmup_epochs
        return epochs * self.schedule.iterations if self.student.enabled else 0

    @property
    def generator_steps(self) -> int:
        """All of them, or those of the warm-up when the student then trains on optimised images, or none if these calibrate too."""
        if self.quant.calibrate_on == "images":
            return 0
        epochs = self.schedule.warmup_epochs if self.images.enabled else self.schedule.epochs
        return epochs * self.schedule.iterations

    def to_dict(self) -> dict[str, Any]:
        # Through JSON, so that what a run directory holds compares equal.
        result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises UsageError for an unknown key (nearest name offered), a wrong type or a value out of range."""
        types = get_type_hints(cls)
        made: dict[str, Any] = {}
        for key, value in _checked(values).items():
            made[key] = value if isinstance(value, str) else types[key](**value)
        return cls(**made)


def _checked(values: Mapping[str, Any], where: str = "", more: Sequence[str] = ()) -> dict[str, Any]:
    """The sections and texts of a recipe, or of the part of its file whose names begin with `where`, all of their types.

    Args:
        more: other keys that belong there, for the message alone.
    """
    types = get_type_hints(Recipe)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            raise UsageError(f"unknown recipe section '{where}{key}'.{nearest(key, (*types, *more))}")
        check = _options if dataclasses.is_dataclass(types[key]) else _typed
        checked[key] = check(f"{where}{key}", types[key], value)
    return checked


def _options(section: str, cls: Any, values: Any) -> dict[str, Any]:
    """The options of a table, of their types."""
    if not isinstance(values, Mapping):
        raise UsageError(f"recipe section '{section}' must be a table of options, got {_shown(values)}")
    types = get_type_hints(cls)
    for key in values:
        if key not in types:
            raise UsageError(f"unknown recipe option '{section}.{key}'.{nearest(key, types)}")
    return {key: _typed(f"{section}.{key}", types[key], value) for key, value in values.items()}


def _typed(name: str, kind: Any, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is int and number and abs(value) < LARGEST and float(value).is_integer():
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if kind not in (float, int, str, bool) and isinstance(value, (list, tuple)):
        element = kind.__args__[0]
        return tuple(_typed(name, element, v) for v in value)
    words = {float: "a finite number", int: "a whole number", str: "a text", bool: "true or false"}
    if kind is int and number and abs(value) >= LARGEST:  # infinity too
        words[int] = f"a whole number below {LARGEST:.0e}"
    raise UsageError(f"recipe option {name} must be {words.get(kind, 'a list of numbers')}, got {_shown(value)}")


def _merge(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        if isinstance(value, Mapping):
            below = base.get(key, {})
            if not isinstance(below, Mapping):
                raise UsageError(f"recipe entry '{key}' is {_shown(below)}, not a table of options")
            value = _merge(dict(below), value)
        base[key] = value
    return base


def _builtin() -> dict[str, Any]:
    return {
        p.name[:-5]: p for p in resources.files("zsq_fast").joinpath("recipes").iterdir() if p.name.endswith(".toml")
    }


def available_recipes() -> dict[str, str]:
    """Name and title of every built-in recipe."""
    return {name: _read(name)["title"] for name in sorted(_builtin())}


def _read(name_or_path: str) -> dict[str, Any]:
    builtin = _builtin()
    if not isinstance(name_or_path, str) or (name_or_path not in builtin and not name_or_path.endswith(".toml")):
        near = nearest(name_or_path, builtin) if isinstance(name_or_path, str) else ""
        raise UsageError(f"unknown recipe {_shown(name_or_path)}.{near} Or give a .toml file.")
    try:
        data = builtin.get(name_or_path, Path(name_or_path)).read_bytes()
    except OSError as error:
        raise UsageError(f"the recipe file '{name_or_path}' cannot be read: {error.strerror}") from error
    except ValueError as error:  # no name of a file: a zero byte, half a surrogate pair
        raise UsageError(f"the recipe file {name_or_path!r} cannot be read: {error}") from error
    try:
        table = tomllib.loads(data.decode())
    except RecursionError as error:
        raise UsageError(f"the recipe '{name_or_path}' is nested too deeply.") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, thousands of digits
        raise UsageError(f"the recipe '{name_or_path}' is not valid TOML: {error}") from error
    return table


def _resolve(name: str, large: bool, schedule: str, children: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tables of a file over those of its parents, each file's [large] and [short] tables settled before its child's.

    Keys and types of all tables are checked, be they used or not. A parent's path is relative to the file that names it.
    """
    table, builtin = _read(name), _builtin()
    file = name if name in builtin else os.path.realpath(name)
    if file in children:
        raise UsageError(f"the recipe '{name}' extends itself; remove or change its line 'extends'.")
    parent = table.pop("extends", None)
    if name not in builtin and isinstance(parent, str) and parent.endswith(".toml"):
        parent = os.path.join(os.path.dirname(name), parent)
    resolved = {} if parent is None else _resolve(parent, large, schedule, (*children, file))
    for_large, short = table.pop("large", {}), table.pop("short", {})
    for_short_large = short.pop("large", {}) if isinstance(short, dict) else {}
    layers: list[tuple[bool, Any, str, tuple[str, ...]]] = [
        (True, table, "", ("extends", "large", "short")),
        (large, for_large, "large.", ()),
        (schedule == "short", short, "short.", ("large",)),
        (large and schedule == "short", for_short_large, "short.large.", ()),
    ]
    for applies, layer, where, more in layers:
        if not isinstance(layer, Mapping):
            raise UsageError(f"[large] and [short] of the recipe '{name}' must be tables, got {_shown(layer)}")
        checked = _checked(layer, where, more)
        if applies:
            _merge(resolved, checked)
    return resolved


def parse_override(text: str) -> dict[str, Any]:
    """`section.option=value` as a nested table; the value in TOML syntax, a bare word counts as a text."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts) or "\n" in text or "\r" in text:
        shown = text if text.isprintable() else repr(text)[1:-1]
        raise UsageError(f"'{shown}' is no override; write section.option=value, for example schedule.epochs=10")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except (ValueError, RecursionError):  # no TOML, or more of it than can be read
        parsed = value.strip()
    return {parts[0]: {parts[1]: parsed}}


def load_recipe(
    name_or_path: str,
    *,
    input_size: Sequence[int],
    schedule: str = "paper",
    overrides: Sequence[str] = (),
    weight_bits: int | None = None,
    act_bits: int | None = None,
) -> Recipe:
    """Resolve a recipe for an input size.

    Order, later wins: the recipe it extends, resolved; the file; its [large] tables for inputs above 64 pixels; its [short]
    tables (and [short.large]) for `schedule="short"`; the bit widths; the overrides.

    Args:
        name_or_path: a built-in name (`available_recipes()`) or a .toml file.
        input_size: `(C, H, W)`.
        schedule: "paper" or "short".
        weight_bits, act_bits: of the quantizers; in a recipe of mixed widths `weight_bits` is their average.
        overrides: texts `section.option=value`.

    Raises:
        UsageError: unknown recipe, section or option (nearest name offered), or a value out of range.
    """
    if schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule '{schedule}'.{nearest(schedule, SCHEDULES)}")
    table = _resolve(name_or_path, max(input_size[-2:]) > LARGE_INPUT, schedule)
    mixed = table.get("quant", {}).get("average_weight_bits")
    for key, bits in (
        ("weight_bits", weight_bits),
        ("act_bits", act_bits),
        ("average_weight_bits", mixed and weight_bits),
    ):
        if bits is not None:
            _merge(table, {"quant": {key: bits}})
    for text in overrides:
        _merge(table, parse_override(text))
    return Recipe.from_dict({"name": Path(name_or_path).stem, **table})
