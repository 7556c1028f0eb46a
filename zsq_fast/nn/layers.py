"""Drop-in layers that compute with fake-quantized weights and activations."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast import ops
from zsq_fast.errors import UsageError


def check_bits(name: str, bits: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise UsageError(f"{name} must be an integer from 2 to 8, got {bits!r}")
    return bits


class QuantConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight is fake-quantized per output channel in every forward; the bias stays float.

    Takes `nn.Conv2d`'s arguments and `weight_bits`; parameters and `state_dict` keys are those of `nn.Conv2d`.
    """

    def __init__(self, *args: Any, weight_bits: int = 4, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight_bits = check_bits("weight_bits", weight_bits)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight_bits: int = 4) -> QuantConv2d:
        """A quantized copy of a float layer, hooks and memory layout included; the layer itself is not touched."""
        return _from_float(cls, nn.Conv2d, conv, weight_bits)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _quantized_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


class QuantLinear(nn.Linear):
    """`nn.Linear` whose weight is fake-quantized per output feature in every forward; the bias stays float."""

    def __init__(self, *args: Any, weight_bits: int = 4, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight_bits = check_bits("weight_bits", weight_bits)

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_bits: int = 4) -> QuantLinear:
        """A quantized copy of a float layer, hooks and memory layout included; the layer itself is not touched."""
        return _from_float(cls, nn.Linear, linear, weight_bits)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _quantized_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}"


def _quantized_weight(layer: QuantConv2d | QuantLinear) -> Tensor:
    ready: Tensor | None = layer.__dict__.get(_READY)
    return ops.fake_quant_weight(layer.weight, layer.weight_bits) if ready is None else ready


def forward_weight(layer: nn.Module) -> Tensor:
    """The weight a linear or convolution layer computes with: the quantized one, with its gradient, where it quantizes."""
    weight: Tensor = _quantized_weight(layer) if isinstance(layer, QuantConv2d | QuantLinear) else layer.weight  # type: ignore[assignment]
    return weight


_READY = "_quantized_weight"  # in the instance's dictionary, past nn.Module's own bookkeeping


@contextmanager
def weights_quantized_together(model: nn.Module) -> Iterator[None]:
    """Quantize all weights of the model on entry, in one call, for the forward passes inside.

    Values and gradients are those of the layers quantizing one by one. A weight must not change in between.
    """
    groups: dict[Any, list[QuantConv2d | QuantLinear]] = defaultdict(list)
    for layer in model.modules():
        if isinstance(layer, QuantConv2d | QuantLinear):
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


def _from_float(cls: type[nn.Module], base: type[nn.Module], layer: nn.Module, weight_bits: int) -> Any:
    if type(layer) not in (base, cls) or "weight" not in layer._parameters:
        raise UsageError(f"{cls.__name__}.from_float takes a plain nn.{base.__name__}, got {type(layer).__name__}")
    new = copy.deepcopy(layer)
    new.__class__ = cls
    new.weight_bits = check_bits("weight_bits", weight_bits)  # type: ignore[assignment]
    return new


class QuantAct(nn.Module):
    """Per-tensor activation fake quantization with a running range.

    While in training mode and not frozen, each forward first updates the range with the batch's minimum and maximum
    (decay 0.9); in eval mode, or after `freeze()`, the range is used as it stands. A quantizer that has seen nothing yet
    has the range NaN and returns NaN.

    Args:
        bits: 2 to 8.
        ema: "reference" repeats the published code, which feeds the bias-corrected value back into the average and needs
            about 175 updates to settle; "plain" is an ordinary bias-corrected moving average.

    Buffers `lo`, `hi` and `beta_t` `[]` are updated in place.
    """

    decay = 0.9
    lo: Tensor
    hi: Tensor
    beta_t: Tensor

    def __init__(self, bits: int = 4, ema: str = "reference", device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.bits = check_bits("act_bits", bits)
        if ema not in ("reference", "plain"):
            raise UsageError(f"QuantAct: ema must be 'reference' or 'plain', got {ema!r}")
        self.ema = ema
        self.frozen = False
        self.register_buffer("lo", torch.tensor(float("nan"), device=device, dtype=dtype))
        self.register_buffer("hi", torch.tensor(float("nan"), device=device, dtype=dtype))
        self.register_buffer("beta_t", torch.tensor(1.0, device=device, dtype=dtype))

    def freeze(self) -> QuantAct:
        """Keep the range as it is from now on."""
        self.frozen = True
        return self

    def unfreeze(self) -> QuantAct:
        self.frozen = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            return ops.fake_quant_act_running(
                x, self.lo, self.hi, self.beta_t, self.bits, self.decay, self.ema == "plain"
            )
        return ops.fake_quant_act(x, self.lo, self.hi, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, ema={self.ema!r}"
