"""Gradient cosine similarity of a student's losses: whether they pull its weights the same way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.errors import UnsupportedModelError
from zsq_fast.methods import recipe as recipes
from zsq_fast.methods.steps import StudentStep
from zsq_fast.methods.synthesis import Batch
from zsq_fast.nn import quantized_weights

NAMES = ("ce", "fa", "kl")  # pairs are named in this order: "ce-fa", "ce-kl", "fa-kl"


class CosineMeter:
    """Running mean and deviation over batches of `<grad A, grad B> / (|grad A| |grad B|)` for every pair of losses.

    Of each quantized weight (a layer), of all of them as one vector, and of all trainable parameters as one vector
    (ait_family.md 8.1, hast_family.md 7.2). Factors of the losses cancel. A cosine with a gradient that is 0, such as that of
    feature alignment behind the last feature point, is not defined and not counted. Sums are float64 on the student's device.

    Attributes:
        layers: names of the quantized layers, in the order of `zsq_fast.nn.quantized_weights`.
        pairs: names "a-b" of the pairs.
        per_batch: the cosines `[pairs]` of all parameters, batch by batch; on the device, so that no step waits for them.
    """

    def __init__(self, student: nn.Module, names: Sequence[str]):
        self.names = tuple(names)
        self.pairs = tuple(f"{a}-{b}" for a, b in combinations(self.names, 2))
        weights = {id(weight): name.removesuffix(".weight") for name, weight in quantized_weights(student).items()}
        self.layers = tuple(weights.values())
        rows = {key: row for row, key in enumerate(weights)}
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self._rows = [rows.get(id(p), len(rows)) for p in self.parameters]  # all the others share the last row
        # Number, sum and sum of squares of the cosines per pair and place; the places are the layers, the weights, everything.
        shape = (3, len(self.pairs), len(rows) + 2)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=self.parameters[0].device)
        self.per_batch: list[Tensor] = []

    def add(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Count one batch: one backward pass per loss, the graph is used up, no `.grad` is touched.

        Returns:
            The cosines `[pairs, layers + 2]` float64, the last two of all quantized weights and of all parameters.
        """
        gradients = []
        for name in self.names:
            keep = name != self.names[-1]
            gradients.append(torch.autograd.grad(losses[name], self.parameters, retain_graph=keep, allow_unused=True))
        gram = self.sums.new_zeros(len(self.layers) + 1, len(self.names), len(self.names))
        for row, p, *parts in zip(self._rows, self.parameters, *gradients, strict=True):
            flat = (
                torch.stack([torch.zeros_like(p) if g is None else g for g in parts]).reshape(len(parts), -1).double()
            )
            gram[row] += flat @ flat.T
        gram = torch.cat([gram[:-1], gram[:-1].sum(0, keepdim=True), gram.sum(0, keepdim=True)])
        left, right = zip(*combinations(range(len(self.names)), 2), strict=True)
        squares = gram.diagonal(dim1=1, dim2=2)
        cosines = (gram[:, left, right] / (squares[:, left] * squares[:, right]).sqrt()).T
        defined = cosines.isfinite()
        counted = torch.where(defined, cosines, 0.0)
        self.sums += torch.stack([defined.to(counted.dtype), counted, counted.square()])
        self.per_batch.append(cosines[:, -1])
        return cosines

    def read(self) -> dict[str, dict[str, Any]]:
        """Per pair: `batches`, `per_batch` (of all parameters), the mean over them of `total` (all parameters), `weights` (all quantized
        ones) and `layers` (a list like `layers`), and the sample deviation of each, `*_deviation`. What is not defined is None; nothing
        counted: empty."""
        count, total, squares = self.sums.cpu()
        mean = total / count
        deviation = ((squares - count * mean.square()).clamp(min=0) / (count - 1)).sqrt()
        found: dict[str, dict[str, Any]] = {}
        each = torch.stack(self.per_batch).T.tolist() if self.per_batch else [[]] * len(self.pairs)
        parts = zip(self.pairs, each, count.tolist(), mean.tolist(), deviation.tolist(), strict=True)
        for pair, values, n, *rows in parts:
            if not any(n):
                continue
            per_batch = [v if math.isfinite(v) else None for v in values]
            found[pair] = {"batches": int(max(n)), "per_batch": per_batch}
            for suffix, row in zip(("", "_deviation"), rows, strict=True):
                *layers, weights, everything = (v if math.isfinite(v) else None for v in row)
                found[pair] |= {f"total{suffix}": everything, f"weights{suffix}": weights, f"layers{suffix}": layers}
        return found

    def reset(self) -> None:
        self.sums.zero_()
        self.per_batch.clear()

    def state_dict(self) -> dict[str, Tensor]:
        each = torch.stack(self.per_batch) if self.per_batch else self.sums.new_empty(0, len(self.pairs))
        return {"sums": self.sums, "per_batch": each}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums.copy_(state["sums"])
        self.per_batch = list(state.get("per_batch", self.sums[:0]).to(self.sums))  # older checkpoints hold none


class CosineTracker:
    """The cosines of cross entropy on the labels ("ce"), distillation ("kl") and feature alignment ("fa") while a student trains.

    Temperature, reduction, kind of alignment and feature points are the recipe's; every loss is measured, whether or not the recipe
    trains it. A network without feature points (`zsq_fast.nn.feature_points`) has only "ce-kl". Each measured batch costs one more
    forward pass of both networks and a backward pass of the student per loss, apart from the training, which it does not change.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: recipes.Student, input_size: Sequence[int]):
        every: dict[str, Any] = dict(ce_weight=1.0, kd_weight=1.0, feature_weight=1.0, promoted_weight=0.0)
        every |= dict(clean_weight=1.0, cam_weight=0.0, ce_gate=0.0, pseudo_label="none")
        names: tuple[str, ...] = NAMES
        try:
            self.step = StudentStep(student, teacher, dataclasses.replace(spec, **every), input_size)
        except UnsupportedModelError:
            names = ("ce", "kl")
            every |= dict(feature_weight=0.0, feature_points=())
            self.step = StudentStep(student, teacher, dataclasses.replace(spec, **every), input_size)
        self.meter = CosineMeter(student, names)

    def observe(self, batch: Batch) -> None:
        """Measure the student as it is now."""
        self.meter.add(self.step.losses(batch))
