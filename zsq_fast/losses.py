"""Losses of the generator and hard-sample families. All take logits or features and return a scalar."""

from __future__ import annotations

from torch import Tensor

from zsq_fast.errors import UsageError
from zsq_fast.ops import bn_stats_match, distillation_loss, feature_alignment

__all__ = ["bn_stats_match", "channel_attention", "hard_sample_ce", "kd_kl"]


def kd_kl(student: Tensor, teacher: Tensor, temperature: float = 20.0, reduction: str = "mean") -> Tensor:
    """Distillation loss `T^2 * KL(softmax(teacher/T) || softmax(student/T))`.

    Args:
        student, teacher: logits `[B, C]`.
        reduction: "mean" divides by B*C (GDFQ, AIT: the published code's default), "batchmean" by B (HAST).
    """
    if reduction not in ("mean", "batchmean"):
        raise UsageError(f"kd_kl: reduction must be 'mean' or 'batchmean', got {reduction!r}")
    return distillation_loss(student, teacher, temperature=temperature, reduction=reduction)[0]


def channel_attention(student_feat: Tensor, teacher_feat: Tensor) -> Tensor:
    """Relaxed feature alignment of one layer (HAST eq. 12): mean squared difference of L2-normalised channel energies.

    Args:
        student_feat, teacher_feat: `[N, C, H, W]`; the energy of a channel is the spatial mean of its squares.
    """
    return feature_alignment(student_feat, teacher_feat, "channel")


def hard_sample_ce(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Hard-sample cross entropy (HAST eq. 8): mean of `(1 - p_y)^gamma * CE`; the weight is part of the graph.

    `1 - p` is kept above 1e-6: below, the gradient of the power is infinite for gamma < 1.

    Args:
        logits: `[B, C]`.
        target: class indices `[B]`.
    """
    return distillation_loss(logits, target=target.long(), gamma=gamma)[0]
