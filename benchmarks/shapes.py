"""Shapes of real networks: activations at the batch sizes of the papers' settings, single weights, and all weights of a network."""

from __future__ import annotations

Shape = tuple[int, ...]

ACTIVATIONS: dict[str, Shape] = {
    "ResNet-20, stage 1, batch 200": (200, 16, 32, 32),
    "ResNet-20, stage 2, batch 200": (200, 32, 16, 16),
    "ResNet-20, stage 3, batch 200": (200, 64, 8, 8),
    "ResNet-18, stem, batch 16": (16, 64, 112, 112),
    "ResNet-18, stage 1, batch 16": (16, 64, 56, 56),
    "ResNet-18, stage 4, batch 16": (16, 512, 7, 7),
    "ResNet-50, stage 1 wide, batch 16": (16, 256, 56, 56),
    "ResNet-50, stage 3 wide, batch 16": (16, 1024, 14, 14),
    "MobileNetV2, block 2 wide, batch 16": (16, 96, 112, 112),
    "MobileNetV2, last, batch 16": (16, 1280, 7, 7),
}

WEIGHTS: dict[str, Shape] = {
    "ResNet-20, stage 3": (64, 64, 3, 3),
    "ResNet-18, stem": (64, 3, 7, 7),
    "ResNet-18, stage 4": (512, 512, 3, 3),
    "ResNet-50, stage 4, 1x1": (2048, 512, 1, 1),
    "MobileNetV2, depthwise": (960, 1, 3, 3),
    "MobileNetV2, last": (1280, 320, 1, 1),
}

LOGITS: dict[str, Shape] = {"CIFAR-10, batch 200": (200, 10), "ImageNet, batch 16": (16, 1000)}


def _resnet(blocks: list[int], bottleneck: bool) -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7)]
    inside = 64
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        out = 4 * width if bottleneck else width
        for block in range(count):
            kernels = [(width, 1), (width, 3), (out, 1)] if bottleneck else [(width, 3), (width, 3)]
            if block == 0 and inside != out:
                shapes.append((out, inside, 1, 1))
            for channels, size in kernels:
                shapes.append((channels, inside, size, size))
                inside = channels
    return [*shapes, (1000, inside)]


def _mobilenet_v2() -> list[Shape]:
    shapes: list[Shape] = [(32, 3, 3, 3)]
    inside = 32
    for factor, out, count in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(count):
            wide = factor * inside
            shapes += [(wide, inside, 1, 1)] if factor > 1 else []
            shapes += [(wide, 1, 3, 3), (out, wide, 1, 1)]
            inside = out
    return [*shapes, (1280, inside, 1, 1), (1000, 1280)]


NETWORKS: dict[str, list[Shape]] = {
    "ResNet-18": _resnet([2, 2, 2, 2], bottleneck=False),
    "ResNet-50": _resnet([3, 4, 6, 3], bottleneck=True),
    "MobileNetV2": _mobilenet_v2(),
}
