"""The losses whose gradients and curvature are looked at: of any student on one batch, differentiable any number of times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import UnsupportedModelError, UsageError, nearest
from zsq_fast.methods.cosine import NAMES
from zsq_fast.methods.recipe import Student
from zsq_fast.methods.synthesis import label_ce
from zsq_fast.nn import FeatureTap, feature_points, freeze_ranges, twice_differentiable

TITLES = {"ce": "cross entropy", "fa": "feature alignment", "kl": "distillation (KL)"}


def frozen_copy(student: nn.Module) -> nn.Module:
    """A copy to analyse, the student itself stays as it is: eval mode, ranges frozen, every parameter differentiable."""
    network = copy.deepcopy(student).eval().requires_grad_(True)
    freeze_ranges(network)
    return network


class BatchLosses:
    """Losses of students against a teacher on one batch, each without the recipe's factor (`factors` holds it).

    - "ce": mean cross entropy with the labels.
    - "kl": `T^2 KL(softmax(teacher / T) || softmax(student / T))`, over the batch or, with reduction "mean", over batch and classes.
    - "fa": feature alignment summed over the feature points, by default of channel attention (HAST eq. 12):
      `mean_nc (A_S - A_T)^2`, A the L2-normalised spatial mean of squares per channel.

    The teacher's logits and features are constants. The student runs through its quantizers, whose straight-through estimator is the
    identity: its derivative is 1 and its second derivative 0, so that gradient and Hessian for the weights are those of the loss of a
    network without quantizers, taken at the quantized weights and activations (ait_family.md 8.2, hast_family.md 7.1). Automatic
    differentiation gives both exactly. The fused losses of training refuse a second derivative, hence these are plain PyTorch, learned
    ranges included (`zsq_fast.nn.twice_differentiable`); values and gradients equal those of training up to rounding (a test compares).
    Logits and attentions are taken to float64 first: at T = 20 the KL is a small difference of large terms.

    Args:
        teacher: the float network; run once, not changed.
        images, labels: `[B, C, H, W]`, and class indices `[B]` or soft labels `[B, classes]`.
        spec: the recipe's `student` section: temperature, reduction, alignment and feature points.
        names: the losses wanted.

    Raises:
        UsageError: an unknown name. UnsupportedModelError: "fa" is wanted, but no feature points are named or found by structure.
    """

    def __init__(
        self, teacher: nn.Module, images: Tensor, labels: Tensor, spec: Student, names: Sequence[str] = ("ce", "kl")
    ):
        for name in names:
            if name not in NAMES:
                raise UsageError(f"there is no loss '{name}' (ce, kl, fa).{nearest(name, NAMES)}")
        self.images, self.labels, self.spec, self.names = images, labels, spec, tuple(names)
        self.factors = {"ce": spec.ce_weight, "kl": spec.kd_weight, "fa": spec.feature_weight}
        self.points: tuple[str, ...] = ()
        if "fa" in names:
            self.points = spec.feature_points or feature_points(teacher, tuple(images.shape[1:]))
        network = copy.deepcopy(teacher).eval() if teacher.training else teacher
        with torch.no_grad():
            self.teacher_logits, self.teacher_features = self._run(network, self.points)

    def __len__(self) -> int:
        return len(self.images)

    def _run(self, network: nn.Module, points: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        with FeatureTap(network, points) as tap:
            return network(self.images), tap.features()

    def values(self, student: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Scalars with their graph, from one forward pass of a student in eval mode (`frozen_copy`)."""
        names = self.names if names is None else names
        if student.training:
            raise UsageError("losses are taken of a student in eval mode, whose ranges do not move: call .eval()")
        with twice_differentiable(student):
            logits, features = self._run(student, self.points if "fa" in names else ())
        logits = logits.double()
        of: dict[str, Callable[[], Tensor]] = {
            "ce": lambda: label_ce(logits, self.labels.double() if self.labels.dim() > 1 else self.labels),
            "kl": lambda: self._distillation(logits),
            "fa": lambda: self._alignment(features),
        }
        return {name: of[name]() for name in names}

    def loss(self, name: str) -> Callable[[nn.Module], Tensor]:
        """One of them, as a function of the student."""
        if name not in self.names:
            raise UsageError(f"the loss '{name}' was not asked for ({', '.join(self.names)})")
        return lambda student: self.values(student, (name,))[name]

    def _distillation(self, logits: Tensor) -> Tensor:
        t = self.spec.temperature
        log_q, log_p = F.log_softmax(logits / t, 1), F.log_softmax(self.teacher_logits.double() / t, 1)
        count = len(logits) if self.spec.kd_reduction == "batchmean" else logits.numel()
        return t**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / count

    def _alignment(self, features: Sequence[Tensor]) -> Tensor:
        def normal(x: Tensor) -> Tensor:
            if self.spec.alignment == "direct":
                return x.double()
            squares = x.flatten(2).square()  # [N, C, positions]
            return F.normalize(squares.mean(2 if self.spec.alignment == "channel" else 1).double(), dim=1)

        pairs = zip(features, self.teacher_features, strict=True)
        return torch.stack([F.mse_loss(normal(s), normal(t)) for s, t in pairs]).sum()


def mean_losses(student: nn.Module, batches: Sequence[BatchLosses], names: Sequence[str]) -> dict[str, float]:
    """Losses over all images of the batches, without gradients."""
    count = sum(map(len, batches))
    total = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for batch in batches:
            for name, value in batch.values(student, names).items():
                total[name] += len(batch) / count * float(value)
    return total


def of_subject(
    subject: Subject, batches: int | None = None, names: Sequence[str] = ()
) -> tuple[list[BatchLosses], tuple[str, ...]]:
    """The losses on its first `batches` batches, all by default, and their names: those given, or all, "fa" where the network has
    feature points."""
    spec, names = subject.recipe.student, tuple(names)
    if not names:
        names = ("ce", "kl", "fa")
        try:
            spec.feature_points or feature_points(subject.teacher, subject.input_size)
        except UnsupportedModelError:
            names = names[:2]
    if batches is not None and batches < 1:
        raise UsageError(f"the number of batches must be 1 at least, got {batches}")
    return [BatchLosses(subject.teacher, x, y, spec, names) for x, y in subject.batches[:batches]], names
