"""Image generators of the GDFQ family: noise and a label in, an image in the network's normalised input space out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.errors import UsageError
from zsq_fast.methods import recipe as recipes

# Inherited from DCGAN sample code, where the positional argument was meant as a momentum. It damps the normalisation of maps
# with a small variance and is part of the published results (ait_family.md 4.1).
DAMPED_EPS = 0.8


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift are looked up by class: `gamma[y] * norm(x) + beta[y]`; starts as the identity."""

    def __init__(self, num_classes: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gamma = nn.Embedding(num_classes, channels)
        self.beta = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * self.gamma(labels)[:, :, None, None] + self.beta(labels)[:, :, None, None]


class Generator(nn.Module):
    """GDFQ's decoder, in train mode for its whole life (ait_family.md 4.1).

    Linear -> 128 maps at a quarter of the image size -> norm -> up -> conv 128 -> norm -> LeakyReLU -> up -> conv 64 -> norm ->
    LeakyReLU -> conv -> tanh -> non-affine norm, which puts the images at zero mean and unit variance per channel.

    Args:
        kind: "plain" multiplies the noise with a label embedding (CIFAR); "conditional" feeds plain noise and puts the label
            into class-conditional batch norms (ImageNet).
        input_size: `(C, H, W)` of the images; H and W must be multiples of 4.
        latent: length of the noise vector.
    """

    def __init__(self, kind: str, num_classes: int, input_size: Sequence[int], latent: int = 100):
        super().__init__()
        channels, height, width = input_size
        if height % 4 or width % 4:
            raise UsageError(f"the generator needs image sizes that are multiples of 4, got {height} x {width}")
        self.kind, self.latent, self.base = kind, latent, (height // 4, width // 4)
        if kind == "plain":
            self.embedding = nn.Embedding(num_classes, latent)
        self.fc = nn.Linear(latent, 128 * self.base[0] * self.base[1])
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        for i, (maps, eps) in enumerate(((128, 1e-5), (128, DAMPED_EPS), (64, DAMPED_EPS))):
            norm = nn.BatchNorm2d(maps, eps=eps) if kind == "plain" else ConditionalBatchNorm2d(num_classes, maps, eps)
            self.add_module(f"norm{i}", norm)
        self.norm_out = nn.BatchNorm2d(channels, affine=False)

    def _norm(self, i: int, x: Tensor, labels: Tensor) -> Tensor:
        norm = getattr(self, f"norm{i}")
        return norm(x) if self.kind == "plain" else norm(x, labels)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise `[B, latent]`, labels `[B]` int64 -> images `[B, C, H, W]`."""
        u = self.embedding(labels) * noise if self.kind == "plain" else noise
        x = self.fc(u).view(-1, 128, *self.base)
        if self.conv1.weight.is_contiguous(memory_format=torch.channels_last) and not self.conv1.weight.is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.interpolate(self._norm(0, x, labels), scale_factor=2.0)
        x = F.leaky_relu(self._norm(1, self.conv1(x), labels), 0.2)
        x = F.leaky_relu(self._norm(2, self.conv2(F.interpolate(x, scale_factor=2.0)), labels), 0.2)
        return self.norm_out(torch.tanh(self.conv3(x)))


def build_generator(spec: recipes.Generator, num_classes: int, input_size: Sequence[int]) -> Generator:
    return Generator(spec.kind, num_classes, input_size, spec.latent)
