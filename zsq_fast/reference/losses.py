"""Losses on logits and features: distillation, (hard-sample) cross entropy, feature alignment; sample perturbation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq_fast.reference.number import wide


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    temperature: float,
    batchmean: bool,
    kd_weight: float,
    ce_weight: float,
    gamma: float,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kd_weight * kd + ce_weight * ce`, its two terms, its gradient for the student's logits and, if `both`, the teacher's.

    kd: T^2 * KL(softmax(teacher/T) || softmax(student/T)), divided by the batch, or by batch and classes (ait_family.md 7).
    ce: mean of (1 - p)^gamma * CE with 1 - p kept above 1e-6, the weight part of the graph (HAST eq. 8); gamma 0: plain CE.
    """
    logits = wide(student.detach()).requires_grad_()
    soft = None if teacher is None else wide(teacher.detach()).requires_grad_()
    with torch.enable_grad():
        kd = ce = logits.new_zeros(())
        if soft is not None:
            log_q = F.log_softmax(logits / temperature, 1)
            log_p = F.log_softmax(soft / temperature, 1)
            total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            kd = temperature**2 * total / (student.shape[0] if batchmean else student.numel())
        if target is not None:
            log_p = F.log_softmax(logits, 1).gather(1, target.view(-1, 1)).squeeze(1)
            difficulty = torch.clamp(-torch.expm1(log_p), min=1e-6)
            ce = ((difficulty**gamma if gamma else 1.0) * -log_p).mean()
        loss = kd_weight * kd + ce_weight * ce
        wanted = [logits, soft] if both and soft is not None else [logits]
        grads = torch.autograd.grad(loss + 0 * logits.sum(), wanted)
    grad, grad_teacher = (*grads, student.new_empty(0))[:2]
    return loss.detach(), kd.detach(), ce.detach(), grad.to(student.dtype), grad_teacher.to(student.dtype)


def _map(features: Tensor, kind: str) -> Tensor:
    """Mean squares: per sample and channel (HAST eq. 12), or per sample and position (Zagoruyko and Komodakis, 2017)."""
    squares = wide(features).unsqueeze(-1).flatten(2).square()
    return {
        "channel": lambda: squares.mean(2),
        "spatial": lambda: squares.mean(1),
        "direct": lambda: squares.new_empty(0),
    }[kind]()


def feature_alignment(student: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared difference of the L2-normalised maps ("channel", "spatial") or of the features ("direct"), and the maps."""
    maps = _map(student, kind), _map(teacher, kind)
    if kind == "direct":
        return F.mse_loss(wide(student), wide(teacher)), *maps
    return F.mse_loss(F.normalize(maps[0], dim=1), F.normalize(maps[1], dim=1)), *maps


def feature_alignment_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, student_map: Tensor, teacher_map: Tensor, kind: str, both: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of student and, if `both`, of teacher (else empty)."""
    features = [wide(f.detach()).requires_grad_() for f in (student, teacher)]
    with torch.enable_grad():
        loss = feature_alignment(features[0], features[1], kind)[0]
        grads = torch.autograd.grad(loss, features, grad_loss)
    return grads[0].to(student.dtype), grads[1].to(student.dtype) if both else student.new_empty(0)


def sign_perturb(x: Tensor, grad: Tensor, epsilon: float) -> Tensor:
    """`x + epsilon * sign(grad)` (HAST eq. 9, one fast-gradient-sign step); NaN and zeros of either sign are their own signs."""
    sign = torch.where(grad.isnan() | (grad == 0), grad, torch.sign(grad))
    return (wide(x) + epsilon * wide(sign)).to(x.dtype)
