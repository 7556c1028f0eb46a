"""Per layer: how well codes carry weights and activations, which of them are used, and what each layer costs the network."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import UsageError
from zsq_fast.methods.mixed import sensitivity
from zsq_fast.nn import QuantAct, QuantConv2d, QuantLinear, weights_quantized_together


@dataclass(frozen=True)
class Layer:
    """One quantized weight or activation.

    Attributes:
        name: of the module. kind: "weight" or "activation".
        bits: 2 to 8.
        sqnr_db: `10 log10(sum x^2 / sum (x - Q(x))^2)` in dB, infinite without any error; x is the student's own float weight, or what
            reaches the quantizer inside the student.
        lo, hi: lowest and highest of the weights; of an activation the frozen range, or what its learned step reaches.
        seen_lo, seen_hi: of the values measured.
        saturated: share of values below lo or above hi; 0 for a weight, whose range follows it.
        dead_codes: how many of the 2^bits codes no value takes; of a weight the mean over its rows, each of which has its own grid.
        histogram: `[2^bits]`, values per code, from the lowest code of the grid (of a weight: of each row's) up.
        divergence: mean KL(teacher || teacher with this quantizer alone) in nats per image, temperature 1; of a weight that of the
            teacher on its min/max grid (`zsq_fast.methods.mixed.sensitivity`), of an activation with the student's range.
    """

    name: str
    kind: str
    bits: int
    sqnr_db: float
    lo: float
    hi: float
    seen_lo: float
    seen_hi: float
    saturated: float
    dead_codes: float
    histogram: tuple[int, ...]
    divergence: float


@dataclass(frozen=True)
class Layers:
    """`layers` in the network's order, weights first; measured on `images` images; `divergence` of the whole student."""

    layers: tuple[Layer, ...]
    images: int
    divergence: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'':<{width}}  {'':<10} bits  SQNR dB  saturated  dead codes        KL alone"]
        lines += [
            f"{x.name:<{width}}  {x.kind:<10} {x.bits:>4}  {x.sqnr_db:7.2f}  {100 * x.saturated:7.3f} %  "
            f"{x.dead_codes:>5.2f} of {2**x.bits:<3}  {x.divergence:>12.3g}"
            for x in self.layers
        ]
        return "\n".join([*lines, f"KL(teacher || student) {self.divergence:.3g} nats, {self.images} images"])


def of_subject(subject: Subject) -> Layers:
    return measure_layers(
        subject.teacher, subject.student, subject.images, input_size=subject.input_size, layout=subject.layout
    )


@torch.no_grad()
def measure_layers(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    *,
    input_size: Sequence[int],
    batch_size: int = 64,
    layout: torch.memory_format = torch.contiguous_format,
) -> Layers:
    """All figures of all layers.

    Costs one forward pass over the images for the student, one per quantizer of an activation, and one per quantized weight and
    width that occurs in the student (mixed precision: `zsq_fast.methods.mixed.sensitivity` tries every layer at each).

    Args:
        teacher: float network in eval mode; copies of it are run.
        student: what `zsq_fast.nn.convert` made of it, in eval mode, ranges frozen.
        images: `[N, C, H, W]`, on the networks' device; synthetic ones will do.
        input_size: `(C, H, W)`.
        layout: memory format in which the networks run.

    Raises:
        UsageError: no images, or a student without quantizers.
    """
    weights = {n: m for n, m in student.named_modules() if isinstance(m, QuantConv2d | QuantLinear)}
    acts = {n: m for n, m in student.named_modules() if isinstance(m, QuantAct)}
    if not weights or not len(images):
        raise UsageError("the analysis 'layers' needs a quantized network and at least one image")
    batches = [part.contiguous(memory_format=layout) for part in images.split(batch_size)]
    meters, handles = {name: _Activation(act) for name, act in acts.items()}, []
    for name, act in acts.items():
        handles.append(act.register_forward_hook(lambda m, args, out, name=name: meters[name].add(args[0], out)))
    try:
        with weights_quantized_together(student):
            quantized = _log_probabilities(student, batches)
    finally:
        for handle in handles:
            handle.remove()
    whole = _log_probabilities(teacher, batches)
    widths = sorted({m.weight_bits for m in weights.values()})
    alone = sensitivity(teacher, images, widths, input_size=input_size, batch_size=batch_size, layout=layout)
    found = [_weight(name, m, alone[name][m.weight_bits]) for name, m in weights.items() if name in alone]
    for name, act in acts.items():
        if meters[name].count:  # not one that the forward never calls
            divergence = _divergence(whole, _log_probabilities(_with_one(teacher, name, act), batches))
            found.append(meters[name].read(name, divergence))
    return Layers(tuple(found), len(images), _divergence(whole, quantized))


def _log_probabilities(network: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([network(x).double().log_softmax(1) for x in batches])


def _divergence(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(1).mean())


def _sqnr(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _weight(name: str, layer: QuantConv2d | QuantLinear, divergence: float) -> Layer:
    w, q = layer.weight.double(), layer.quantized_weight().double()
    codes = layer.integer_codes().flatten(1).long()
    used = torch.zeros(len(codes), 2**layer.weight_bits, device=w.device).scatter_(1, codes, 1.0)
    histogram = codes.flatten().bincount(minlength=2**layer.weight_bits)
    lo, hi = float(w.min()), float(w.max())
    return Layer(
        name, "weight", layer.weight_bits, _sqnr(float(w.square().sum()), float((w - q).square().sum())), lo, hi, lo, hi, 0.0,
        float((1 - used).sum(1).mean()), tuple(histogram.tolist()), divergence,
    )  # fmt: skip


class _Activation:
    """Running figures of one quantizer, on its device."""

    def __init__(self, act: QuantAct):
        self.act, self.count = act, 0
        self.per_unit, self.lowest = act.grid()
        self.lo, self.hi = act.lo, act.hi
        if act.learns:
            self.lo, self.hi = (code / self.per_unit for code in act.codes)
        zero = act.lo.new_zeros((), dtype=torch.float64)
        self.signal, self.noise, self.outside = zero, zero, zero
        self.seen_lo, self.seen_hi = act.lo.new_tensor(math.inf), act.lo.new_tensor(-math.inf)
        self.histogram = torch.zeros(2**act.bits, dtype=torch.int64, device=act.lo.device)

    def add(self, x: Tensor, out: Tensor) -> None:
        self.count += x.numel()
        self.signal = self.signal + x.double().square().sum()
        self.noise = self.noise + (x.double() - out.double()).square().sum()
        self.outside = self.outside + ((x < self.lo) | (x > self.hi)).sum()
        self.seen_lo, self.seen_hi = torch.minimum(self.seen_lo, x.amin()), torch.maximum(self.seen_hi, x.amax())
        # Back from the values that came out, so that the decision at a rounding boundary is the quantizer's own.
        codes = (out * self.per_unit).round() - self.lowest
        self.histogram += codes.flatten().long().bincount(minlength=2**self.act.bits)

    def read(self, name: str, divergence: float) -> Layer:
        return Layer(
            name, "activation", self.act.bits, _sqnr(float(self.signal), float(self.noise)), float(self.lo), float(self.hi),
            float(self.seen_lo), float(self.seen_hi), float(self.outside) / self.count, int((self.histogram == 0).sum()),
            tuple(self.histogram.tolist()), divergence,
        )  # fmt: skip


def _with_one(teacher: nn.Module, name: str, act: QuantAct) -> nn.Module:
    """The teacher with this quantizer of its student alone: behind its rectifier, at its call site."""
    network = copy.deepcopy(teacher)
    rectifier, _, site = name.rpartition(".quant.")
    calls: Counter[str] = Counter()

    def quantize(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls[name] += 1
        return act(out) if calls[name] == int(site) + 1 else out

    network.register_forward_pre_hook(lambda *_: calls.clear())
    network.get_submodule(rectifier).register_forward_hook(quantize)
    return network


def draw(result: Layers, figure: Any) -> None:
    """SQNR, unused codes and divergence of each layer, its values per code, and the share outside the range; weights on the left."""
    figure.set_size_inches(12, 13)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(5, 2, sharex="col")
    for column, kind in enumerate(("weight", "activation")):
        layers = [layer for layer in result.layers if layer.kind == kind]
        rows = {
            "SQNR, dB": [layer.sqnr_db if math.isfinite(layer.sqnr_db) else math.nan for layer in layers],
            "unused codes, %": [100 * layer.dead_codes / 2**layer.bits for layer in layers],
            "KL, this layer alone": [layer.divergence for layer in layers],
            "outside the range, %": [100 * layer.saturated for layer in layers],
        }
        for axes, (text, values) in zip(panels[:4, column], rows.items(), strict=True):
            axes.bar(range(len(layers)), values, color=("#0072b2", "#d55e00")[column])
            axes.set_ylabel(text)
            if not any(values):
                axes.set_ylim(0, 1)
        panels[3][column].set_visible(kind == "activation")  # the range of a weight follows it
        if any(layer.divergence > 0 for layer in layers):
            panels[2][column].set_yscale("log")
        axes, codes = panels[4][column], max((len(layer.histogram) for layer in layers), default=0)
        shares = [
            [count / sum(layer.histogram) or math.nan for count in layer.histogram] for layer in layers
        ]  # dead: blank
        padded = [row + [math.nan] * (codes - len(row)) for row in shares]
        if padded:
            image = axes.imshow(
                list(zip(*padded, strict=True)), aspect="auto", origin="lower", cmap="viridis", norm="log"
            )
            figure.colorbar(image, ax=axes, location="bottom", label="share of values")
        axes.set_ylabel("code")
        axes.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=90, fontsize=7)
        panels[0][column].set_title(f"{kind}s, in the order of the network", loc="left")
