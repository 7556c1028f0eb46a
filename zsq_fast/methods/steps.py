"""What one batch asks of a student: the losses of a recipe's [student] section and their gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast import nn as znn
from zsq_fast.errors import UnsupportedModelError
from zsq_fast.losses import kd_kl
from zsq_fast.methods import recipe as recipes
from zsq_fast.methods.synthesis import Batch, label_ce
from zsq_fast.ops import feature_alignment, sign_perturb


class _Output(NamedTuple):
    logits: Tensor
    features: Sequence[Tensor] = ()
    maps: Sequence[Tensor] = ()  # the last feature map, if anyone asks for it


def pseudo_label_ce(logits: Tensor, teacher: Tensor, threshold: float, weight: float) -> Tensor:
    """PLF's cross entropy of each sample, `[B]` (CVPR 2024; hast_family.md section 10.2).

    Where the entropy of softmax(teacher), over log(classes), is at most `threshold`: CE on the teacher's class; elsewhere `weight`
    times CE on its two likeliest classes, weighted by their probabilities, which are made to sum to 1.

    Args:
        logits, teacher: `[B, classes]`, two classes at least; no gradient for the teacher.
    """
    log_p = teacher.detach().log_softmax(1)
    best, classes = log_p.topk(2)
    confident = -(log_p.exp() * log_p).sum(1, keepdim=True) <= threshold * math.log(teacher.shape[1])
    alone = torch.eye(1, 2, device=best.device, dtype=best.dtype)
    targets = torch.where(confident, alone, weight * best.softmax(1))
    return -(targets * logits.log_softmax(1).gather(1, classes)).sum(1)


def class_activation_maps(features: Tensor, rows: Tensor) -> Tensor:
    """Grad-CAM at the last feature map of a network that ends in global average pooling and a linear classifier, `[B, H * W]`.

    `relu(sum_c a_c F_c)`, where a_c, the mean over the positions of d logit / d F_c, is `rows / (H * W)`. A map is not normalised:
    its sum is the positive part of what the class's logit owes to the positions, over `H * W`.

    Args:
        features: `[B, C, H, W]`.
        rows: `[B, C]`, the classifier's weights of each sample's class.
    """
    positions = features.movedim(1, -1).flatten(1, 2)  # [B, H * W, C], a view in either memory format
    return (positions @ rows[:, :, None]).squeeze(2).relu() / positions.shape[1]


def _of_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Rows of `values [classes, C]` for labels `[B]`, or their mean under soft ones `[B, classes]`: `[B, C]`."""
    return values[labels] if labels.dim() == 1 else labels @ values


class StudentStep:
    """Gradient of `clean_weight * L(x) + promoted_weight * L(x')` for a student (hast_family.md 5.2 to 5.5).

    `L = kd_weight * T^2 * KL + ce_weight * CE + feature_weight * alignment + cam_weight * CAM`. The promoted
    sample is `x' = x + epsilon * sign(g)`, with g the gradient of distillation and alignment (`promote_by`) for x; the teacher sees
    x' anew. Both networks are in eval mode, the teacher is frozen.

    CE is the mean over the batch, whatever the labels (PLF's: both kinds of samples over the size of the batch). With `ce_gate` it is
    the sum over the samples let through, over their number, or 0 where there is none; whether the papers' code divides by the batch
    instead is not in the specification. CAM is the mean over batch and positions of the squared difference of the networks'
    `class_activation_maps` for the label. Their a_c are numbers, as gradients are in Grad-CAM: those of the student follow its
    quantized classifier, but only its features are trained by them, and the teacher's map is a constant.

    Attributes:
        progress: how far the student's epochs are, 0 in the first to 1 in the last; for PLF's threshold, set by the trainer.

    Args:
        input_size: `(C, H, W)`, to look for feature points where the recipe names none.

    Raises:
        UsageError, UnsupportedModelError: the feature points named are not there or give no tensor, or none are found; the
            network has no class activation maps of closed form (`zsq_fast.nn.class_map_layers`) and cam_weight is not 0.
    """

    progress = 0.0

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: recipes.Student, input_size: Sequence[int]):
        self.student, self.teacher, self.spec = student, teacher, spec
        self.points: tuple[str, ...] = ()
        if spec.feature_weight:
            self.points = spec.feature_points or znn.feature_points(teacher, input_size)
        map_points: tuple[str, ...] = ()
        if spec.cam_weight:
            point, self.classifier = znn.class_map_layers(teacher, input_size)
            map_points = (point,)
        self._taps = {
            network: (znn.FeatureTap(network, self.points), znn.FeatureTap(network, map_points))
            for network in (student, teacher)
        }
        if spec.feature_points or spec.pseudo_label == "plf":
            out = self._teacher(
                torch.zeros(1, *input_size, device=next(teacher.parameters()).device)
            )  # wrong names show at once
            if spec.pseudo_label == "plf" and out.logits.shape[1] < 2:
                raise UnsupportedModelError("student.pseudo_label=plf needs two classes at least, the network has one.")

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the gradient to the student's parameters; returns the loss and the share of clean samples on which the
        student's class is the teacher's, both detached scalars."""
        with znn.weights_quantized_together(self.student):  # one quantization for both forward passes
            if not self.spec.promoted_weight:
                x = batch.images
                known = None if self.points or self.spec.cam_weight else batch.teacher_logits
                t = self._teacher(x) if known is None else _Output(known)
                s = self._run(self.student, x)
                loss = self.spec.clean_weight * _sum(self._terms(s, t, batch.labels))
                loss.backward()
                same = s.logits.argmax(1) == t.logits.argmax(1)
            else:
                loss, grad, same = self._clean(batch)
                x = sign_perturb(batch.images, grad, self.spec.epsilon)
                t = self._teacher(x)
                promoted = self.spec.promoted_weight * _sum(self._terms(self._run(self.student, x), t, batch.labels))
                promoted.backward()
                loss = loss + promoted.detach()
        return loss.detach(), same.float().mean()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted losses on the clean samples, with their graph, named as in `promote_by`, and "ce"."""
        with znn.weights_quantized_together(self.student):
            return self._terms(self._run(self.student, batch.images), self._teacher(batch.images), batch.labels)

    def _clean(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradient of the clean samples, the direction that makes them harder, and where the classes agree."""
        spec = self.spec
        x = batch.images.detach().requires_grad_()
        t = self._run(self.teacher, x) if spec.teacher_path == "both" else self._teacher(batch.images)
        s = self._run(self.student, x)
        terms = self._terms(s, t, batch.labels)
        same = s.logits.argmax(1) == t.logits.argmax(1)
        leading = {name: term for name, term in terms.items() if name in spec.promote_by.split("+")}
        if not spec.clean_weight:
            (grad,) = torch.autograd.grad(_sum(leading), x)
            return same.new_zeros((), dtype=x.dtype), grad, same
        loss = spec.clean_weight * _sum(terms)
        if leading.keys() == terms.keys():
            loss.backward()  # parameters and direction at once: the sign does not see the factor (hast_family.md 5.5)
            assert x.grad is not None
            return loss.detach(), x.grad, same
        (grad,) = torch.autograd.grad(_sum(leading), x, retain_graph=True)
        loss.backward(inputs=list(self.student.parameters()))
        return loss.detach(), grad, same

    def _run(self, network: nn.Module, x: Tensor) -> _Output:
        points, maps = self._taps[network]
        with points, maps:
            return _Output(network(x), points.features(), maps.features())

    def _teacher(self, x: Tensor) -> _Output:
        with torch.no_grad():
            return self._run(self.teacher, x)

    def _terms(self, s: _Output, t: _Output, labels: Tensor) -> dict[str, Tensor]:
        """The weighted losses, named as in `promote_by`."""
        spec, terms = self.spec, {}
        if spec.kd_weight:
            terms["kl"] = spec.kd_weight * kd_kl(s.logits, t.logits, spec.temperature, spec.kd_reduction)
        if spec.ce_weight:
            terms["ce"] = spec.ce_weight * self._cross_entropy(s.logits, t.logits, labels)
        if self.points:
            pairs = zip(s.features, t.features, strict=True)
            terms["fa"] = spec.feature_weight * _sum([feature_alignment(*pair, spec.alignment) for pair in pairs])
        if spec.cam_weight:
            student_map, teacher_map = self._map(self.student, s, labels), self._map(self.teacher, t, labels).detach()
            terms["cam"] = spec.cam_weight * F.mse_loss(student_map, teacher_map)
        return terms

    def _cross_entropy(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        spec = self.spec
        if spec.pseudo_label == "plf":
            first, last = spec.pseudo_threshold
            ce = pseudo_label_ce(s, t, first + (last - first) * self.progress, spec.pseudo_weight)
        elif spec.ce_gate:
            ce = F.cross_entropy(s, labels, reduction="none")
        else:
            return label_ce(s, labels)
        if not spec.ce_gate:
            return ce.mean()
        p = t.detach().softmax(1)
        p_label = p.gather(1, labels[:, None])[:, 0] if labels.dim() == 1 else (p * labels).sum(1)
        kept = (1 - p_label <= spec.ce_gate).to(ce.dtype)
        return (kept * ce).sum() / kept.sum().clamp(min=1)

    def _map(self, network: nn.Module, out: _Output, labels: Tensor) -> Tensor:
        rows = znn.forward_weight(network.get_submodule(self.classifier)).detach().flatten(1)
        return class_activation_maps(out.maps[-1], _of_labels(rows, labels))


def _sum(terms: dict[str, Tensor] | Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms.values() if isinstance(terms, dict) else terms)).sum()
