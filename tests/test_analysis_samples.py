"""What the teacher makes of synthetic images: closed forms on a network whose logits are the means of the image's channels."""

from __future__ import annotations

import math

import pytest
import torch
from networks import tiny
from torch import nn

from zsq_fast.analysis.samples import BINS, draw, measure_samples
from zsq_fast.errors import UsageError
from zsq_fast.methods.images import ImageSet


def means(classes: int = 3) -> nn.Module:
    linear = nn.Linear(classes, classes, bias=False)
    nn.init.eye_(linear.weight)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval()


def flat(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2).clone()


def batch(rows: list[tuple[float, ...]], labels: list) -> ImageSet:
    return ImageSet(flat(*rows), torch.tensor(labels))


def test_difficulty_confidence_and_entropy(device):
    log3 = math.log(3)  # softmax of (log 3, 0, 0) is 3/5, 1/5, 1/5
    rows = [(log3, 0, 0), (0, 0, log3), (0, 0, 0), (log3, 0, 0)]
    parts = [ImageSet(*(t.to(device) for t in batch(rows[i : i + 3], [0, 2, 1, 1][i : i + 3]))) for i in (0, 3)]
    found = measure_samples(means().to(device), parts, source="x", batch_size=2)
    assert (found.source, found.count) == ("x", 4)
    difficulty = [0.4, 0.4, 2 / 3, 0.8]
    assert found.difficulty.mean == pytest.approx(sum(difficulty) / 4) and found.hard_share == 0.5
    assert found.difficulty.quantiles[2] == pytest.approx((0.4 + 2 / 3) / 2)
    assert sum(found.difficulty.counts) == 4 and found.difficulty.counts[13] == 1
    assert sum(found.difficulty.counts[7:9]) == 2 and sum(found.difficulty.counts[15:17]) == 1
    assert found.confidence.mean == pytest.approx((3 * 0.6 + 1 / 3) / 4)
    sharp = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2))
    assert found.entropy.mean == pytest.approx((3 * sharp + math.log(3)) / 4) and found.entropy.top == math.log(3)
    assert found.entropy.counts[-1] == 1  # the highest entropy there is belongs to the last bin
    assert found.agreement == pytest.approx(0.5)  # a tie goes to the first class
    assert [c.count for c in found.classes] == [1, 2, 1]
    assert [c.difficulty for c in found.classes] == pytest.approx([0.4, (2 / 3 + 0.8) / 2, 0.4])


def test_intra_class_distances():
    rows = [(2, 0, 0), (0, 2, 0), (1, 1, 0), (3, 3, 0), (0, 0, 1)]
    found = measure_samples(means(), [batch(rows, [0, 0, 1, 1, 2])])
    zero, one, two = found.classes
    assert zero.pairwise == pytest.approx(1) and zero.to_center == pytest.approx(1 - math.sqrt(0.5))
    assert one.pairwise == pytest.approx(0, abs=1e-6) and one.to_center == pytest.approx(0, abs=1e-6)  # of any length
    assert two.pairwise is None and two.to_center == pytest.approx(0, abs=1e-6)
    assert found.to_center == pytest.approx(2 * (1 - math.sqrt(0.5)) / 5, abs=1e-6) and found.pairwise == pytest.approx(
        0.5
    )


def test_pairwise_is_the_mean_over_all_pairs():
    x = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    teacher = tiny(2)
    found = measure_samples(teacher, [ImageSet(x, torch.zeros(7, dtype=torch.int64))], layout=torch.channels_last)
    with torch.no_grad():
        f = teacher[:8](x)
    cosines = [torch.cosine_similarity(f[i], f[j], dim=0).item() for i in range(7) for j in range(i)]
    assert found.classes[0].pairwise == pytest.approx(1 - sum(cosines) / 21, abs=1e-6)
    assert found.classes[1].count == 0 and found.classes[1].difficulty is None and found.classes[1].to_center is None


def test_soft_labels_weigh_the_probabilities():
    soft = batch([(math.log(3), 0, 0)] * 2, [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    found = measure_samples(means(), [soft])
    assert found.difficulty.mean == pytest.approx((0.6 + 0.8) / 2) and found.agreement == 0.5
    assert [c.count for c in found.classes] == [1, 0, 1]


def test_a_network_without_pooled_features_has_no_distances():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = measure_samples(teacher, [ImageSet(torch.randn(5, 3, 6, 6), torch.arange(5) % 4)])
    assert found.to_center is None and found.pairwise is None and found.difficulty.mean > 0
    assert "intra-class" not in str(found)


def test_table_and_picture():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    found = measure_samples(means(), [batch([(2, 0, 0), (0, 2, 0), (1, 1, 0)], [0, 0, 1])], source="held-out images")
    assert str(found).splitlines()[0] == "3 held-out images" and "intra-class cosine distance" in str(found)
    draw(found, figure)
    figure.canvas.draw()
    assert len(figure.axes) == 4 and len(figure.axes[0].patches) == BINS
    assert found.to_dict()["classes"][1] == {
        "label": 1, "count": 1, "difficulty": pytest.approx(1 - math.e / (2 * math.e + 1)), "to_center": pytest.approx(0, abs=1e-6),
        "pairwise": None}  # fmt: skip


def test_nothing_is_changed_and_nothing_asked_of_no_images():
    teacher, state = tiny(), torch.get_rng_state()
    measure_samples(teacher, [ImageSet(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.modules())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UsageError, match="at least one image"):
        measure_samples(teacher, [ImageSet(torch.ones(0, 3, 8, 8), torch.ones(0, dtype=torch.int64))])
