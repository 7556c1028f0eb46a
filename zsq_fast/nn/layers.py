"""Drop-in layers that compute with fake-quantized weights and activations."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast import ops
from zsq_fast.errors import UsageError

SMALLEST_STEP = 1e-8  # of a learned range; the min/max grid, too, takes no range below this
EMAS = "reference", "plain", "extrema"  # how activation ranges follow the data


def check_bits(name: str, bits: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise UsageError(f"{name} must be an integer from 2 to 8, got {bits!r}")
    return bits


class _Ranged(nn.Module):
    """Mixin: a quantizer over minimum and maximum that can learn its range (LSQ, Esser et al., ICLR 2020).

    With `ranges="learned"` it has a parameter `step`, the units per code. Until `freeze()` the min/max range counts and the step is
    0; then it begins as the smallest one that clips nothing of that range, and is trained.
    """

    frozen: bool
    step: nn.Parameter | None

    def set_ranges(self, ranges: str, shape: Sequence[int], like: Tensor) -> None:
        """Choose "minmax" or "learned", with steps of this shape on the device of `like`; not frozen."""
        if ranges not in ("minmax", "learned"):
            raise UsageError(f"ranges must be 'minmax' or 'learned', got {ranges!r}")
        self.frozen = False
        self.register_parameter("step", nn.Parameter(like.new_zeros(shape)) if ranges == "learned" else None)

    @property
    def learns(self) -> bool:
        """Whether the step counts: it is there and the min/max range is frozen."""
        return self.frozen and self.step is not None

    def _begin(self, lo: Tensor, hi: Tensor, codes: tuple[int, int]) -> None:
        assert self.step is not None
        step = hi / codes[1]
        if codes[0]:
            step = torch.maximum(step, lo / codes[0])
        with torch.no_grad():  # one that was loaded is not 0 and stays
            self.step.copy_(torch.where(self.step == 0, step.clamp(min=SMALLEST_STEP), self.step))

    def _learned(self, x: Tensor, codes: tuple[int, int], sharing: int) -> Tensor:
        """x on the learned grid; the step's gradient is scaled for `sharing` values per step (LSQ section 2.2)."""
        return ops.fake_quant_learned(x, self.step, *codes, (max(sharing, 1) * codes[1]) ** -0.5)  # type: ignore[arg-type]


def _signed_codes(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class _QuantWeight(_Ranged):
    """What the layers share: a weight, fake-quantized per row."""

    weight: Tensor
    weight_bits: int

    def freeze(self) -> None:
        """Let the learned step count, if the layer has one; a min/max range always follows its weight."""
        self.frozen = True
        if self.step is not None and self.weight.numel():
            rows = self.weight.detach().flatten(1)
            self._begin(rows.amin(1), rows.amax(1), _signed_codes(self.weight_bits))

    def quantized_weight(self) -> Tensor:
        """The weight that the forward computes with."""
        ready: Tensor | None = self.__dict__.get(_READY)
        if ready is not None:
            return ready
        if self.learns:
            return self._learned(self.weight, _signed_codes(self.weight_bits), self.weight[0].numel())
        return ops.fake_quant_weight(self.weight, self.weight_bits)

    @torch.no_grad()
    def integer_codes(self) -> Tensor:
        """Codes of the weight, like it in shape, uint8: 0 to 2^bits - 1, counted from the lowest of its row's grid.

        Where the range is not learned they differ exactly where gradient inundation counts a change (ait_family.md 7.2).
        """
        rows = (-1, *[1] * (self.weight.dim() - 1))
        if self.learns:
            lowest, highest = _signed_codes(self.weight_bits)
            codes = (self.weight / self.step.view(rows)).round().clamp(lowest, highest) - lowest  # type: ignore[union-attr]
        else:
            codes, _, first = ops.weight_codes(self.weight, self.weight_bits)
            codes = codes - first.view(rows)
        return codes.to(torch.uint8)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}{_learned_repr(self)}"


def _learned_repr(module: _Ranged) -> str:
    return "" if module.step is None else ", ranges='learned'"


class QuantConv2d(_QuantWeight, nn.Conv2d):
    """`nn.Conv2d` whose weight is fake-quantized per output channel in every forward; the bias stays float.

    Takes `nn.Conv2d`'s arguments, `weight_bits` and `ranges`; parameters and `state_dict` keys are those of `nn.Conv2d`, and
    for `ranges="learned"` a `step` `[out_channels]`, which counts from `freeze()` on (LSQ with codes -2^(k-1) to 2^(k-1) - 1).
    """

    def __init__(self, *args: Any, weight_bits: int = 4, ranges: str = "minmax", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight_bits = check_bits("weight_bits", weight_bits)
        self.set_ranges(ranges, self.weight.shape[:1], self.weight)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight_bits: int = 4, ranges: str = "minmax") -> QuantConv2d:
        """A quantized copy of a float layer, hooks and memory layout included; the layer itself is not touched."""
        return _from_float(cls, nn.Conv2d, conv, weight_bits, ranges)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantized_weight(), self.bias)


class QuantLinear(_QuantWeight, nn.Linear):
    """`nn.Linear` whose weight is fake-quantized per output feature in every forward; see `QuantConv2d`."""

    def __init__(self, *args: Any, weight_bits: int = 4, ranges: str = "minmax", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight_bits = check_bits("weight_bits", weight_bits)
        self.set_ranges(ranges, self.weight.shape[:1], self.weight)

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_bits: int = 4, ranges: str = "minmax") -> QuantLinear:
        """A quantized copy of a float layer, hooks and memory layout included; the layer itself is not touched."""
        return _from_float(cls, nn.Linear, linear, weight_bits, ranges)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.quantized_weight(), self.bias)


def forward_weight(layer: nn.Module) -> Tensor:
    """The weight a linear or convolution layer computes with: the quantized one, with its gradient, where it quantizes."""
    weight: Tensor = layer.quantized_weight() if isinstance(layer, _QuantWeight) else layer.weight  # type: ignore[assignment]
    return weight


_READY = "_quantized_weight"  # in the instance's dictionary, past nn.Module's own bookkeeping


@contextmanager
def weights_quantized_together(model: nn.Module) -> Iterator[None]:
    """Quantize all weights of the model on entry, in one call, for the forward passes inside.

    Values and gradients are those of the layers quantizing one by one, which layers that learn their ranges go on doing. A weight
    must not change in between.
    """
    groups: dict[Any, list[QuantConv2d | QuantLinear]] = defaultdict(list)
    for layer in model.modules():
        if (
            isinstance(layer, QuantConv2d | QuantLinear) and not layer.learns
        ):  # a learned step's node serves one backward
            groups[layer.weight_bits, layer.weight.dtype, layer.weight.device].append(layer)
    try:
        for (bits, *_), layers in groups.items():
            ready = ops.fake_quant_weights([layer.weight for layer in layers], bits)
            for layer, weight in zip(layers, ready, strict=True):
                layer.__dict__[_READY] = weight
        yield
    finally:
        for layers in groups.values():
            for layer in layers:
                layer.__dict__.pop(_READY, None)


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Within: forward passes whose graph can be differentiated any number of times.

    The quantizers over minimum and maximum always can: their estimator is the identity. Learned steps, whose fused backward pass has
    no derivative, are computed in plain PyTorch, with LSQ's values bit for bit and its first derivatives; the estimator is linear in
    x and s (between the end codes `x + (round(x / s) - x / s) s`, the bracket a constant, outside `code s`), so it has no second ones.
    """
    learning = [m for m in model.modules() if isinstance(m, _Ranged) and m.learns]
    try:
        for module in learning:
            module.__dict__["_learned"] = partial(_plain_learned, module)
        yield
    finally:
        for module in learning:
            del module.__dict__["_learned"]


def _plain_learned(module: _Ranged, x: Tensor, codes: tuple[int, int], sharing: int) -> Tensor:
    """`_Ranged._learned` by operations that PyTorch can differentiate twice."""
    assert module.step is not None
    step = torch.where(module.step > 0, module.step, torch.nan)
    step = step.view([-1] + [1] * (x.dim() - 1)) if step.numel() > 1 else step
    position = (x / step).detach()
    inside = (position >= codes[0]) & (position <= codes[1])
    slope = (
        torch.where(inside, position.round() - position, position.clamp(*codes)) * (max(sharing, 1) * codes[1]) ** -0.5
    )
    linear = torch.where(inside, x, 0.0) + slope * step  # for its derivatives alone
    return (position.round().clamp(*codes) * step).detach() + (linear - linear.detach())


def _from_float(cls: type[nn.Module], base: type[nn.Module], layer: nn.Module, weight_bits: int, ranges: str) -> Any:
    if type(layer) not in (base, cls) or "weight" not in layer._parameters:
        raise UsageError(f"{cls.__name__}.from_float takes a plain nn.{base.__name__}, got {type(layer).__name__}")
    new = copy.deepcopy(layer)
    new.__class__ = cls
    new.weight_bits = check_bits("weight_bits", weight_bits)  # type: ignore[assignment]
    weight = new._parameters["weight"]
    new.set_ranges(ranges, weight.shape[:1], weight)  # type: ignore[operator, union-attr]
    return new


class QuantAct(_Ranged):
    """Per-tensor activation fake quantization with a running range.

    While in training mode and not frozen, each forward first updates the range with the batch's minimum and maximum
    (decay 0.9); in eval mode, or after `freeze()`, the range is used as it stands. A quantizer that has seen nothing yet
    has the range NaN and returns NaN.

    Args:
        bits: 2 to 8.
        ema: "reference" repeats the published code, which feeds the bias-corrected value back into the average and needs
            about 175 updates to settle; "plain" is an ordinary bias-corrected moving average; "extrema" is the smallest and the
            largest value of all batches (ZeroQ).
        ranges: "minmax", or "learned": from `freeze()` on a trained parameter `step` `[]` counts instead of the range (LSQ), with
            codes 0 to 2^k - 1, or -2^(k-1) to 2^(k-1) - 1 if the range went below 0.

    Buffers `lo`, `hi` and `beta_t` `[]` are updated in place.
    """

    decay = 0.9
    lo: Tensor
    hi: Tensor
    beta_t: Tensor

    def __init__(
        self,
        bits: int = 4,
        ema: str = "reference",
        device: Any = None,
        dtype: torch.dtype | None = None,
        ranges: str = "minmax",
    ):
        super().__init__()
        self.bits = check_bits("act_bits", bits)
        if ema not in EMAS:
            raise UsageError(f"QuantAct: ema must be {' or '.join(map(repr, EMAS))}, got {ema!r}")
        self.ema = ema
        self.codes = 0, 2**bits - 1  # of the learned grid
        self.register_buffer("lo", torch.tensor(float("nan"), device=device, dtype=dtype))
        self.register_buffer("hi", torch.tensor(float("nan"), device=device, dtype=dtype))
        self.register_buffer("beta_t", torch.tensor(1.0, device=device, dtype=dtype))
        self.set_ranges(ranges, (), self.lo)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantAct:
        # The ranges of half-precision activations are held in float32, as the kernels want them.
        kept = {name: getattr(self, name) for name in ("lo", "hi", "beta_t")}
        super()._apply(fn, recurse)
        for name, exact in kept.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, exact.to(moved.device, torch.float32))
        return self

    def freeze(self) -> QuantAct:
        """Keep the range as it is from now on, or begin to learn it."""
        self.frozen = True
        if self.step is not None:
            self._choose_codes()
            self._begin(self.lo, self.hi, self.codes)
        return self

    def unfreeze(self) -> QuantAct:
        """Let the range follow the data again; a learned one will begin anew."""
        self.frozen = False
        if self.step is not None:
            self.step.data.zero_()
        return self

    def grid(self) -> tuple[Tensor, Tensor]:
        """Codes per unit and the lowest code, `[]` each: the values that come out are `(lowest + i) / per_unit`, i from 0 to 2^bits - 1."""
        if self.learns:
            step = self.step.detach()  # type: ignore[union-attr]
            return torch.where(step > 0, step, torch.nan).reciprocal(), self.lo.new_tensor(self.codes[0])
        lo = torch.where(self.hi < self.lo, torch.nan, self.lo)
        per_unit = (self.hi - lo).clamp(min=SMALLEST_STEP).reciprocal() * (2**self.bits - 1)
        return per_unit, (per_unit * lo).round()

    def _widen(self, x: Tensor) -> None:
        first = self.beta_t == 1  # nothing seen yet
        for bound, new, both in zip((self.lo, self.hi), torch.aminmax(x), (torch.minimum, torch.maximum), strict=True):
            new = new.to(bound.dtype)
            bound.copy_(torch.where(first, new, both(bound, new)))
        self.beta_t.mul_(self.decay)

    def _choose_codes(self) -> None:
        if self.step is not None:  # the host reads the range: when it is frozen or loaded, not in a forward
            self.codes = _signed_codes(self.bits) if bool(self.lo < 0) else (0, 2**self.bits - 1)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._choose_codes()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            if self.ema != "extrema":
                return ops.fake_quant_act_running(
                    x, self.lo, self.hi, self.beta_t, self.bits, self.decay, self.ema == "plain"
                )
            self._widen(x.detach())
            return ops.fake_quant_act(x, self.lo, self.hi, self.bits)
        if self.learns:
            return self._learned(x, self.codes, x[:1].numel())  # features of one image
        return ops.fake_quant_act(x, self.lo, self.hi, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, ema={self.ema!r}{_learned_repr(self)}"
