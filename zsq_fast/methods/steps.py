"""What one batch asks of a student: the losses of a recipe's [student] section and their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zsq_fast import nn as znn
from zsq_fast.losses import kd_kl
from zsq_fast.methods import recipe as recipes
from zsq_fast.methods.synthesis import Batch, label_ce
from zsq_fast.ops import feature_alignment, sign_perturb


class _Output(NamedTuple):
    logits: Tensor
    features: Sequence[Tensor] = ()


class StudentStep:
    """Gradient of `clean_weight * L(x) + promoted_weight * L(x')` for a student (hast_family.md 5.2 to 5.5).

    `L = kd_weight * T^2 * KL + ce_weight * CE + feature_weight * alignment`. The promoted sample is `x' = x + epsilon * sign(g)`, with
    g the gradient of distillation and alignment (`promote_by`) for x; the teacher sees x' anew. Both networks are in eval mode,
    the teacher is frozen.

    Args:
        input_size: `(C, H, W)`, to look for feature points where the recipe names none.

    Raises:
        UsageError, UnsupportedModelError: the feature points named are not there or give no tensor, or none are found.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: recipes.Student, input_size: Sequence[int]):
        self.student, self.teacher, self.spec = student, teacher, spec
        self.points: tuple[str, ...] = ()
        if spec.feature_weight:
            self.points = spec.feature_points or znn.feature_points(teacher, input_size)
        self._taps = {network: znn.FeatureTap(network, self.points) for network in (student, teacher)}
        if spec.feature_points:
            self._teacher(
                torch.zeros(1, *input_size, device=next(teacher.parameters()).device)
            )  # wrong names show at once

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the gradient to the student's parameters; returns the loss and the share of clean samples on which the
        student's class is the teacher's, both detached scalars."""
        with znn.weights_quantized_together(self.student):  # one quantization for both forward passes
            if not self.spec.promoted_weight:
                x = batch.images
                known = None if self.points else batch.teacher_logits
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
        with self._taps[network] as tap:
            return _Output(network(x), tap.features())

    def _teacher(self, x: Tensor) -> _Output:
        with torch.no_grad():
            return self._run(self.teacher, x)

    def _terms(self, s: _Output, t: _Output, labels: Tensor) -> dict[str, Tensor]:
        """The weighted losses, named as in `promote_by`."""
        spec, terms = self.spec, {}
        if spec.kd_weight:
            terms["kl"] = spec.kd_weight * kd_kl(s.logits, t.logits, spec.temperature, spec.kd_reduction)
        if spec.ce_weight:
            terms["ce"] = spec.ce_weight * label_ce(s.logits, labels)
        if self.points:
            pairs = zip(s.features, t.features, strict=True)
            terms["fa"] = spec.feature_weight * _sum([feature_alignment(*pair, spec.alignment) for pair in pairs])
        return terms


def _sum(terms: dict[str, Tensor] | Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms.values() if isinstance(terms, dict) else terms)).sum()
