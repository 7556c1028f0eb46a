"""What the generators share: class-conditional batch norm, the damped normalisation, the step from a vector to maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Inherited from DCGAN sample code, where the positional argument was meant as a momentum. It damps the normalisation of maps
# with a small variance and is part of the published results (ait_family.md 4.1); "corrected" is the default of batch norm.
NORM_EPS = {"faithful": 0.8, "corrected": 1e-5}


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift are looked up by class: `gamma[y] * norm(x) + beta[y]`; starts as the identity."""

    def __init__(self, num_classes: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gamma = nn.Embedding(num_classes, channels)
        self.beta = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x: Tensor, labels: Tensor, mix: Tensor | None = None) -> Tensor:
        """x `[B, C, H, W]` with labels `[B]`, or labels `[B, K]` whose scales and shifts are summed with the weights mix `[B, K]`."""
        gamma, beta = self.gamma(labels), self.beta(labels)
        if mix is not None:
            gamma, beta = mixed(gamma, mix), mixed(beta, mix)
        return self.norm(x) * gamma[:, :, None, None] + beta[:, :, None, None]


def mixed(rows: Tensor, mix: Tensor) -> Tensor:
    """Weighted sums: rows `[B, K, D]`, mix `[B, K]` -> `[B, D]`."""
    return torch.bmm(mix.unsqueeze(1), rows).squeeze(1)


def to_maps(x: Tensor, channels: int, base: tuple[int, int], conv: nn.Conv2d) -> Tensor:
    """x `[B, channels * h * w]` as maps `[B, channels, h, w]` in the memory layout of the convolution that will read them."""
    x = x.view(-1, channels, *base)
    if conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
    return x
