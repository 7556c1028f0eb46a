"""Losses against closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zsq_fast import losses
from zsq_fast.errors import UsageError


@pytest.mark.parametrize("classes", [10, 100])
def test_distillation_gradient(classes, device):
    """ait_family.md 13.4: the gradient with respect to the logits is T (q - p) / (B C); batchmean lacks the C."""
    s = torch.randn(8, classes, device=device, dtype=torch.float64, requires_grad=True)
    t = torch.randn(8, classes, device=device, dtype=torch.float64) * 5
    q, p = F.softmax(s / 20, 1), F.softmax(t / 20, 1)
    for reduction, count in (("mean", 8 * classes), ("batchmean", 8)):
        loss = losses.kd_kl(s, t, 20.0, reduction)
        torch.testing.assert_close(loss, 400 * (p * (p.log() - q.log())).sum() / count)
        torch.testing.assert_close(torch.autograd.grad(loss, s)[0], 20 * (q - p).detach() / count)
    assert losses.kd_kl(t, t).abs() < 1e-12


def test_unknown_reduction():
    with pytest.raises(UsageError, match="'mean' or 'batchmean'"):
        losses.kd_kl(torch.zeros(1, 2), torch.zeros(1, 2), 20.0, "sum")


def test_channel_attention_ignores_scale_and_position(device):
    f = torch.randn(3, 5, 4, 4, device=device, dtype=torch.float64)
    assert losses.channel_attention(2.5 * f.flip(2, 3), f) < 1e-20
    a, b = (F.normalize(x.square().mean((2, 3)), dim=1) for x in (f, f.roll(1, 1)))
    torch.testing.assert_close(losses.channel_attention(f, f.roll(1, 1)), ((2 - 2 * (a * b).sum(1)) / 5).mean())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_hard_sample_loss(gamma, device):
    z = torch.randn(6, 4, device=device, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 0, 1], device=device)
    p = F.softmax(z, 1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(losses.hard_sample_ce(z, y, gamma), ((1 - p) ** gamma * -p.log()).mean())
    assert torch.autograd.gradcheck(lambda t: losses.hard_sample_ce(t, y, gamma), z)
    sure = torch.tensor(
        [[80.0, 0.0]], device=device, requires_grad=True
    )  # p = 1: the published form divides by zero here
    (grad,) = torch.autograd.grad(losses.hard_sample_ce(sure, torch.tensor([0], device=device), gamma), sure)
    assert grad.isfinite().all()
