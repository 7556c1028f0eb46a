"""Synthetic images as the teacher sees them: difficulty, confidence, entropy, and how much images of a class differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import UnsupportedModelError, UsageError
from zsq_fast.methods.images import ImageSet, find_classifier

BINS = 20
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Spread:
    """Of one figure over all images: mean, the quantiles 5, 25, 50, 75 and 95 %, and counts in 20 equal bins from 0 to `top`."""

    mean: float
    quantiles: tuple[float, ...]
    counts: tuple[int, ...]
    top: float


@dataclass(frozen=True)
class ClassSpread:
    """Of the images made for one class.

    Attributes:
        count: images. difficulty: their mean `1 - p_label`.
        to_center: mean cosine distance `1 - cos(f, c)` of their pooled features f to the mean feature c of the class (the distance that
            IntraQ's constraint bounds, hast_family.md 4.1); None without an image, or where the network pools no features.
        pairwise: mean cosine distance of two different images; None with fewer than two.
    """

    label: int
    count: int
    difficulty: float | None
    to_center: float | None
    pairwise: float | None


@dataclass(frozen=True)
class Samples:
    """What the teacher makes of a set of images.

    Attributes:
        source: "optimised images" that the student was trained on, or "held-out images" of the generator.
        count: images.
        difficulty: `1 - p_label`, p the teacher's softmax at temperature 1 (HAST, hast_family.md 5.1); soft labels weigh p.
        hard_share: share of images with a difficulty above 1/2.
        confidence: the highest probability. entropy: in nats, from 0 to log(classes).
        agreement: share of images whose label (of a soft one the likeliest) is the teacher's class.
        classes: one entry per class.
        to_center, pairwise: means over the images of `ClassSpread`'s distances, each class weighted by its images.
    """

    source: str
    count: int
    difficulty: Spread
    hard_share: float
    confidence: Spread
    entropy: Spread
    agreement: float
    classes: tuple[ClassSpread, ...]
    to_center: float | None
    pairwise: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.count} {self.source}", f"{'':<28}{'mean':>8}{'5 %':>8}{'median':>8}{'95 %':>8}"]
        rows = {
            "difficulty 1 - p_label": self.difficulty,
            "teacher's confidence": self.confidence,
            "teacher's entropy, nats": self.entropy,
        }
        for text, x in rows.items():
            lines.append(f"{text:<28}{x.mean:>8.3f}{x.quantiles[0]:>8.3f}{x.quantiles[2]:>8.3f}{x.quantiles[4]:>8.3f}")
        lines.append(f"difficulty above 1/2: {100 * self.hard_share:.1f} %; label is the teacher's class: "
                     f"{100 * self.agreement:.1f} %")  # fmt: skip
        if self.to_center is not None:
            pairs = "" if self.pairwise is None else f", between two images {self.pairwise:.3f}"
            lines.append(f"intra-class cosine distance: to the class's mean {self.to_center:.3f}{pairs}")
        return "\n".join(lines)


def of_subject(subject: Subject) -> Samples:
    """Of the optimised images where there are any, else of the held-out ones."""
    if subject.trained_on is not None:
        return measure_samples(subject.teacher, [subject.trained_on], source="optimised images", layout=subject.layout)
    return measure_samples(subject.teacher, subject.batches, source="held-out images", layout=subject.layout)


@torch.no_grad()
def measure_samples(
    teacher: nn.Module,
    batches: Sequence[ImageSet],
    *,
    source: str = "images",
    batch_size: int = 64,
    layout: torch.memory_format = torch.contiguous_format,
) -> Samples:
    """Difficulty, confidence, entropy and intra-class distances of images with labels, in one forward pass.

    Args:
        teacher: float network in eval mode that returns logits `[B, classes]`.
        batches: images `[B, C, H, W]` on its device, and labels `[B]` int64 or soft ones `[B, classes]`, all of one kind.
        layout: memory format in which the teacher runs.

    Raises:
        UsageError: no images.
    """
    if not any(len(batch.images) for batch in batches):
        raise UsageError("the analysis 'samples' needs at least one image")
    labels = torch.cat([batch.labels for batch in batches])
    parts = [part.contiguous(memory_format=layout) for batch in batches for part in batch.images.split(batch_size)]
    features: list[Tensor] = []
    try:
        handle = find_classifier(teacher, parts[0][:1]).register_forward_pre_hook(
            lambda m, args: features.append(args[0].flatten(1).double())
        )
    except UnsupportedModelError:  # it pools no features: no distances then
        handle = None
    try:
        log_p = torch.cat([teacher(part).double().log_softmax(1) for part in parts])
    finally:
        if handle is not None:
            handle.remove()
    p, classes = log_p.exp(), log_p.shape[1]
    if labels.dim() == 1:
        p_label, of_class = p.gather(1, labels[:, None])[:, 0], labels
    else:
        p_label, of_class = (p * labels).sum(1), labels.argmax(1)
    difficulty, entropy = 1 - p_label, -(p * log_p).sum(1)
    spreads = _classes(difficulty, of_class, torch.cat(features) if features else None, classes)
    return Samples(
        source, len(labels), _spread(difficulty, 1.0), float((difficulty > 0.5).double().mean()), _spread(p.amax(1), 1.0),
        _spread(entropy, math.log(classes)), float((p.argmax(1) == of_class).double().mean()), spreads,
        _weighted([(c.to_center, c.count) for c in spreads]), _weighted([(c.pairwise, c.count) for c in spreads]),
    )  # fmt: skip


def _spread(values: Tensor, top: float) -> Spread:
    place = (values * (BINS / top if top else 0)).long().clamp(0, BINS - 1)
    quantiles = values.quantile(values.new_tensor(QUANTILES))
    return Spread(float(values.mean()), tuple(quantiles.tolist()), tuple(place.bincount(minlength=BINS).tolist()), top)


def _classes(difficulty: Tensor, labels: Tensor, features: Tensor | None, classes: int) -> tuple[ClassSpread, ...]:
    found = []
    for label in range(classes):
        mine = labels == label
        n = int(mine.sum())
        to_center = pairwise = None
        if n and features is not None:
            f = features[mine]
            to_center = float((1 - F.cosine_similarity(f, f.mean(0, keepdim=True), eps=1e-6)).mean())
            if n > 1:  # the cosines of all ordered pairs add up to |sum u|^2 - n, u the unit vectors
                u = F.normalize(f, eps=1e-6)
                pairwise = 1 - (float(u.sum(0).square().sum()) - float(u.square().sum())) / (n * (n - 1))
        found.append(ClassSpread(label, n, float(difficulty[mine].mean()) if n else None, to_center, pairwise))
    return tuple(found)


def _weighted(values: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(value, count) for value, count in values if value is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None


def draw(result: Samples, figure: Any) -> None:
    """Histograms of difficulty, confidence and entropy; difficulty and intra-class distance per class (the first 50 of many)."""
    figure.set_size_inches(12, 6.5)
    figure.set_layout_engine("constrained")
    panels = figure.subplot_mosaic([["difficulty", "confidence", "entropy"], ["classes"] * 3])
    titles = {
        "difficulty": "difficulty 1 - p_label",
        "confidence": "confidence of the teacher",
        "entropy": "its entropy, nats",
    }
    for name, text in titles.items():
        spread, axes = getattr(result, name), panels[name]
        width = spread.top / BINS
        axes.bar([(k + 0.5) * width for k in range(BINS)], spread.counts, width, color="#0072b2")
        axes.axvline(spread.mean, color="#d55e00")
        axes.set_title(f"{text}: mean {spread.mean:.3f}", loc="left", fontsize=10)
    shown, axes = result.classes[:50], panels["classes"]
    rows = {"difficulty": "difficulty", "to_center": "cosine distance to the class's mean", "pairwise": "of two images"}
    for i, (name, text) in enumerate(rows.items()):
        heights = [math.nan if (value := getattr(c, name)) is None else value for c in shown]
        axes.bar([c.label + 0.28 * (i - 1) for c in shown], heights, 0.26, label=text)
    axes.set_xlabel("class")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    figure.suptitle(f"{result.count} {result.source}")
