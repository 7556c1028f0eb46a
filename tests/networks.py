"""Small networks for the tests, with batch-norm statistics that look trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def look_trained(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


def tiny(classes: int = 4, channels: int = 3) -> nn.Module:
    """Two convolutions, one of them depthwise, and a classifier, for 8 x 8 inputs; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return look_trained(
            nn.Sequential(
                nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
            )
        )  # fmt: skip


class Reuser(nn.Module):
    """Calls one ReLU module twice, as torchvision's residual blocks do, and once as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)) + x)
        return self.head(torch.relu(x).mean((2, 3)))


class Block(nn.Module):
    """Writes over its branch in place, as torchvision does; the shortcut stands first and holds a convolution."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.way_round = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
        self.a, self.b = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.p, self.q, self.relu = nn.BatchNorm2d(after), nn.BatchNorm2d(after), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        short = self.way_round(x)
        x = self.q(self.b(self.relu(self.p(self.a(x)))))
        x += short
        return self.relu(x)


def residual(classes: int = 4) -> nn.Module:
    """Two such blocks and a classifier, for 8 x 8 inputs; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        layers = [Block(3, 6), Block(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)]
        return look_trained(nn.Sequential(*layers))
