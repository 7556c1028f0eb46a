"""ResNet-20/32/44/... for CIFAR-sized images (He et al. 2016, section 4.2), in the layout public checkpoints use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError

SHORTCUTS = ("A", "B")


class SubsampleShortcut(nn.Module):
    """Kind "A": every second pixel, missing channels filled with zeros, half before and half after; no parameters."""

    def __init__(self, stride: int, extra_channels: int):
        super().__init__()
        self.stride = stride
        self.before = extra_channels // 2
        self.after = extra_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: str, in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    if kind == "A":
        return SubsampleShortcut(stride, channels - in_channels)
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. Each ReLU is its own module: the quantizer after it has its own range."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNetCifar(nn.Module):
    """ResNet of `depth` = 6n + 2 layers: images [N, in_channels, H, W] -> logits [N, num_classes].

    `widths` are the channels of the three stages; the second and third halve H and W. `shortcut` is the kind used
    where the shape changes: "A" (subsample and zero-pad) or "B" (1x1 convolution and batch norm). Raises UsageError for
    a depth that is not 6n + 2, for an unknown kind and, for kind "A", for widths that shrink.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        shortcut: str = "B",
    ):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"depth {depth} is not 6n + 2: use 8, 14, 20, 32, 44, 56 or 110.")
        if shortcut not in SHORTCUTS:
            raise UsageError(f"shortcut kind '{shortcut}' is unknown: use 'A' or 'B'.")
        if len(widths) != 3 or (shortcut == "A" and sorted(widths) != list(widths)):
            raise UsageError(f"widths {tuple(widths)}: give three stage widths, not shrinking for shortcut kind 'A'.")
        blocks = (depth - 2) // 6
        self.in_channels, self.num_classes = in_channels, num_classes
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(widths[0], widths[0], blocks, 1, shortcut)
        self.layer2 = self._stage(widths[0], widths[1], blocks, 2, shortcut)
        self.layer3 = self._stage(widths[1], widths[2], blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[2], num_classes)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(self.pool(x), 1))
