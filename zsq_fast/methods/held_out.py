"""The epoch chosen without data: synthetic images that no step trains on, and the student that agrees best with the teacher there."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.losses import kd_kl
from zsq_fast.methods.synthesis import Synthesis
from zsq_fast.nn import weights_quantized_together


class HeldOut:
    """Images `[N, C, H, W]` of the generator as it is now, their labels (`Batch`) and the teacher's logits `[N, classes]` for them.

    Their seed purpose is their own, so no training batch repeats them. The generator is not changed.

    Args:
        count: N; the last of the batches of schedule.batch_size, by which the generator normalises, is cut.
        tensors: take these ("images", "logits" and, unless an older version wrote it, "labels") of a checkpoint instead.
    """

    def __init__(self, synthesis: Synthesis, count: int, tensors: Mapping[str, Tensor] | None = None):
        self.batch_size = synthesis.recipe.schedule.batch_size
        batches = range(-(-count // self.batch_size))
        if tensors is None:
            generator = copy.deepcopy(
                synthesis.generator
            )  # in train mode, so what one batch leaves in it changes no other
            images = torch.cat([synthesis.images("held-out", i, generator=generator)[0] for i in batches])[:count]
        else:
            images = tensors["images"]
        # A copy: with one channel `contiguous` may keep either layout, and a resumed run must convolve in the same one.
        self.images = torch.empty(images.shape, device=synthesis.device, memory_format=synthesis.layout).copy_(images)
        if tensors is not None and "labels" in tensors:
            self.labels = tensors["labels"].to(synthesis.device)
        else:
            drawn = [synthesis.sample("held-out", i).targets(synthesis.num_classes) for i in batches]
            self.labels = joined_labels(drawn, synthesis.num_classes)[:count]
        if tensors is None:
            with torch.no_grad():
                self.logits = torch.cat([synthesis.teacher(x) for x in self.images.split(self.batch_size)])
        else:
            self.logits = tensors["logits"].to(synthesis.device)

    def tensors(self) -> dict[str, Tensor]:
        return {"images": self.images, "logits": self.logits, "labels": self.labels}

    @torch.no_grad()
    def measure(self, student: nn.Module) -> dict[str, float]:
        """`held_out_agreement`, the share of images where the student's class is the teacher's, and `held_out_kl`, the mean of
        KL(teacher || student) at temperature 1. The student is in eval mode."""
        same, kl = self.logits.new_zeros((), dtype=torch.int64), self.logits.new_zeros((), dtype=torch.float64)
        with weights_quantized_together(student):
            parts = zip(self.images.split(self.batch_size), self.logits.split(self.batch_size), strict=True)
            for x, t in parts:
                s = student(x)
                same += (s.argmax(1) == t.argmax(1)).sum()
                kl += kd_kl(s, t, 1.0, "batchmean") * len(x)
        return {"held_out_agreement": int(same) / len(self.images), "held_out_kl": float(kl) / len(self.images)}


def joined_labels(parts: Sequence[Tensor], num_classes: int) -> Tensor:
    """Labels of several batches in one tensor: `[N]` int64, or soft `[N, num_classes]` if those of any batch are (Qimera)."""
    if any(part.dim() == 2 for part in parts):
        parts = [part if part.dim() == 2 else F.one_hot(part, num_classes).float() for part in parts]
    return torch.cat(list(parts))


def chosen_record(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of highest agreement, of lowest KL among equals, the first of those; None where nothing was held out."""
    measured = [record for record in history if "held_out_agreement" in record]
    return max(measured, key=lambda r: (r["held_out_agreement"], -r["held_out_kl"]), default=None)
