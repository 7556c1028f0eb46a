"""Feature points found by structure, and taps on them."""

from __future__ import annotations

import pytest
import torch
from networks import residual, tiny
from torch import Tensor, nn

import zsq_fast as zsq
from zsq_fast.errors import UnsupportedModelError, UsageError
from zsq_fast.models.resnet_cifar import ResNetCifar
from zsq_fast.nn import FeatureTap, feature_points


def depthwise_separable() -> nn.Module:
    """MobileNetV1's 13 blocks at an eighth of its width."""

    def unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    widths, strides = (4, 8, 16, 16, 32, 32, 64, 64, 64, 64, 64, 64, 128, 128), (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    layers = unit(3, widths[0], 3, 2)
    for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
        layers += [*unit(before, before, 3, stride, before), *unit(before, after, 1, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4))


def torchvision_model(name: str) -> nn.Module:
    return getattr(pytest.importorskip("torchvision").models, name)()


@pytest.mark.parametrize(
    ("make", "size", "count", "last"),
    [
        (lambda: ResNetCifar(), 32, 9, "layer3.2.bn2"),
        (lambda: ResNetCifar(shortcut="A"), 32, 9, "layer3.2.bn2"),
        (lambda: torchvision_model("resnet18"), 64, 8, "layer4.1.bn2"),
        (lambda: torchvision_model("resnet50"), 64, 16, "layer4.2.bn3"),
        (lambda: torchvision_model("mobilenet_v2"), 64, 17, "features.17.conv.3"),
        (depthwise_separable, 32, 13, "79"),
    ],
)
def test_counts_of_the_papers_networks(make, size, count, last):
    """hast_family.md 5.3. MobileNetV2's first block, which expands nothing, and its blocks without a residual count too."""
    model = make().train()
    points = feature_points(model, (3, size, size))
    assert len(points) == count and points[-1] == last
    modules = dict(model.named_modules())
    assert all(isinstance(modules[name], nn.BatchNorm2d) for name in points)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) and m.num_batches_tracked for m in model.modules())


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.conv(torch.relu(self.norm(x)))).mean((2, 3)))


def test_names_mean_nothing():
    assert feature_points(residual(), (3, 8, 8)) == ("0.q", "1.q")
    assert feature_points(PreActivation(), (3, 8, 8)) == ("conv",)
    frozen = residual().requires_grad_(False)
    assert feature_points(frozen, (3, 8, 8)) == ("0.q", "1.q")


def test_networks_without_such_places():
    with pytest.raises(UnsupportedModelError, match=r"no feature points found.*student\.feature_points"):
        feature_points(tiny(), (3, 8, 8))
    with pytest.raises(UsageError, match="does not run on an input of size"):
        feature_points(residual(), (4, 8, 8))


def test_the_student_has_the_same_points():
    teacher = residual()
    student = zsq.convert(teacher, 3, 3, input_size=(3, 8, 8)).eval()
    points = feature_points(teacher, (3, 8, 8))
    assert feature_points(student, (3, 8, 8)) == points
    with zsq.nn.calibrating(student), torch.no_grad():
        student(torch.randn(4, 3, 8, 8))
    shapes = []
    for network in (teacher, student):
        with FeatureTap(network, points) as tap:
            network(torch.randn(2, 3, 8, 8))
            shapes.append([f.shape for f in tap.features()])
    assert shapes[0] == shapes[1] == [(2, 6, 8, 8), (2, 8, 8, 8)]


def test_tap_records_what_the_network_overwrites():
    """Before the addition and the activation, with its history; the forward's result keeps its bits."""
    model, x = residual(), torch.randn(2, 3, 8, 8)
    block = model[0]
    branch = block.q(block.b(torch.relu(block.p(block.a(x)))))
    want = model(x)
    tap = FeatureTap(model, ["0.q"])
    for _ in range(2):  # the first forward learns which outputs are written over
        with tap:
            out = model(x)
            (feature,) = tap.features()
        assert torch.equal(out, want) and torch.equal(feature, branch)
        grad = torch.autograd.grad(feature.square().sum() + out.sum(), block.a.weight)[0]
        assert grad.abs().sum() > 0
    assert tap._overwritten == {"0.q"} and not block.q._forward_hooks
    apart = ResNetCifar(8, widths=(4, 4, 4)).eval()
    with FeatureTap(apart, ["layer1.0.bn2"]) as tap:
        apart(torch.randn(1, 3, 8, 8))
        assert len(tap.features()) == 1 and tap._overwritten == set()  # no copy from now on
        with pytest.raises(UsageError, match=r"'layer1\.0\.bn2' gives no features: the forward does not run it"):
            tap.features()  # handed out already


def test_tap_refuses():
    with pytest.raises(UsageError, match=r"no module '0\.qq'.*Did you mean '0\.q'"):
        FeatureTap(residual(), ["0.qq"])

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = Two()
    with FeatureTap(model, [""]), pytest.raises(UsageError, match="returns tuple; features are taken from tensors"):
        model(torch.zeros(1))
