"""Conversion of a float network into its fake-quantized student, and the account of what was done."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zsq_fast.errors import UnsupportedModelError, UsageError
from zsq_fast.nn.layers import QuantAct, QuantConv2d, QuantLinear, check_bits

_RELU_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.hardtanh, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_,
}  # fmt: skip
_FLOAT_ACTIVATIONS = (
    nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.Mish, nn.Tanh, nn.Softplus,
)  # fmt: skip


class ActThenQuant(nn.Module):
    """An activation followed by its quantizer; one quantizer per call site when the network calls the module several times."""

    def __init__(self, act: nn.Module, bits: int, ema: str = "reference", calls: int = 1):
        super().__init__()
        self.act = act
        self.quant = nn.ModuleList(QuantAct(bits, ema) for _ in range(calls))
        self.next_call = 0

    def forward(self, x: Tensor) -> Tensor:
        quant = self.quant[self.next_call]
        self.next_call = (self.next_call + 1) % len(self.quant)
        return quant(self.act(x))


def _restart_calls(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of a converted network: a forward that failed half-way must not shift the call sites."""
    for module in model.modules():
        if isinstance(module, ActThenQuant):
            module.next_call = 0


@dataclass(frozen=True)
class Site:
    """One place of the network: its name, what it is, its bits (None: float), its size and why it stayed float."""

    name: str
    kind: str
    bits: int | None
    numel: int = 0
    rows: int = 0
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """What was quantized, at how many bits, and what stayed float and why."""

    sites: tuple[Site, ...]
    float_parameters: int

    def _of(self, *kinds: str) -> list[Site]:
        return [s for s in self.sites if s.kind in kinds and s.bits is not None]

    @property
    def weight_tensors(self) -> int:
        return len(self._of("conv", "linear"))

    @property
    def quantized_weights(self) -> int:
        return sum(s.numel for s in self._of("conv", "linear"))

    @property
    def act_quantizers(self) -> int:
        return len(self._of("act"))

    @property
    def left_float(self) -> list[Site]:
        return [s for s in self.sites if s.bits is None]

    @property
    def float_bytes(self) -> int:
        """Size of all parameters in float32."""
        return 4 * (self.quantized_weights + self.float_parameters)

    @property
    def packed_bytes(self) -> int:
        """Size with codes packed at their bits, a float32 scale and zero point per row, and the rest in float32."""
        weights = self._of("conv", "linear")
        return sum(-(-s.numel * (s.bits or 0) // 8) + 8 * s.rows for s in weights) + 4 * self.float_parameters

    def to_dict(self) -> dict[str, Any]:
        return {
            "weight_tensors": self.weight_tensors,
            "quantized_weights": self.quantized_weights,
            "act_quantizers": self.act_quantizers,
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
            "left_float": [{"name": s.name, "kind": s.kind, "why": s.note} for s in self.left_float],
        }

    def __str__(self) -> str:
        bits = Counter((s.kind, s.bits) for s in self.sites if s.bits is not None)
        parts = ", ".join(f"{n} {kind} at {b} bits" for (kind, b), n in sorted(bits.items(), key=str))
        lines = [f"quantized: {parts} ({self.quantized_weights:,} weights)"]
        lines += [f"float: {s.name or '(model)'} [{s.kind}]: {s.note}" for s in self.left_float]
        lines.append(f"size: {self.float_bytes / 1e6:.2f} MB float, {self.packed_bytes / 1e6:.2f} MB packed")
        return "\n".join(lines)


class _ReluCalls(TorchFunctionMode):
    """Counts rectifier calls, made by modules or directly."""

    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += func in _RELU_FUNCTIONS
        return func(*args, **(kwargs or {}))


def _is_relu(module: nn.Module) -> bool:
    return type(module) in (nn.ReLU, nn.ReLU6)


def _count_calls(model: nn.Module, input_size: Sequence[int]) -> tuple[Counter[int], int]:
    """Calls per rectifier module (by id) in one forward, and the number of rectifier calls made outside modules."""
    calls: Counter[int] = Counter()
    handles = [m.register_forward_hook(lambda m, *_: calls.update([id(m)])) for m in model.modules() if _is_relu(m)]
    weight = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _ReluCalls() as mode:
            model(torch.zeros(2, *input_size, device=weight.device, dtype=weight.dtype))
    except Exception as error:
        raise UsageError(f"the model does not run on an input of size {tuple(input_size)}: {error}") from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return calls, mode.total - sum(calls.values())


def convert(
    model: nn.Module,
    weight_bits: int = 4,
    act_bits: int = 4,
    *,
    ema: str = "reference",
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    """A copy of a float network with every Conv2d and Linear weight, and every ReLU/ReLU6 output, fake-quantized.

    First and last layers included; biases, batch norms and everything else stay float (ait_family.md section 2).

    Args:
        weight_bits, act_bits: 2 to 8.
        ema: range tracking of the activations, see `QuantAct`.
        input_size: `(C, H, W)`. With it the network is run once on zeros, so that a ReLU module that is called several times
            gets one quantizer per call; without it every module counts as called once.

    Raises:
        UnsupportedModelError: nothing in the network can be quantized, or its weights hold NaN or infinity.
    """
    check_bits("weight_bits", weight_bits)
    check_bits("act_bits", act_bits)
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise UnsupportedModelError(
                f"the weights hold NaN or infinite values in '{name}'; load a sound checkpoint."
            )
    if not any(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules()):
        kinds = ", ".join(sorted({type(m).__name__ for m in model.modules()})[:12])
        raise UnsupportedModelError(
            f"nothing in the model can be quantized: no nn.Conv2d or nn.Linear (it holds {kinds})."
        )
    if sum(p.numel() for p in model.parameters()) and input_size is not None:
        calls, functional = _count_calls(model, input_size)
    else:
        calls, functional = Counter({id(m): 1 for m in model.modules()}), 0

    done: dict[int, nn.Module] = {}

    def build(module: nn.Module) -> nn.Module:
        """The quantized twin of one module; a module shared by several parents stays shared."""
        if id(module) not in done:
            if type(module) is nn.Conv2d:
                done[id(module)] = QuantConv2d.from_float(module, weight_bits)
            elif type(module) is nn.Linear:
                done[id(module)] = QuantLinear.from_float(module, weight_bits)
            elif _is_relu(module) and calls[id(module)]:
                done[id(module)] = ActThenQuant(copy.deepcopy(module), act_bits, ema, calls[id(module)]).train(
                    module.training
                )
            else:
                # A shallow copy, so that children are converted rather than copied; own tensors are copied below.
                twin = copy.copy(module)
                twin._modules = {n: child and build(child) for n, child in module._modules.items()}
                twin._parameters = copy.deepcopy(module._parameters, memo)
                twin._buffers = copy.deepcopy(module._buffers, memo)
                twin._forward_hooks, twin._forward_pre_hooks = (
                    module._forward_hooks.copy(),
                    module._forward_pre_hooks.copy(),
                )
                done[id(module)] = twin
        return done[id(module)]

    memo: dict[int, Any] = {}
    student = build(model)
    student.register_forward_pre_hook(_restart_calls)
    student.zsq_functional_relus = functional  # type: ignore[assignment]
    return student


def _sites(model: nn.Module) -> Iterator[Site]:
    for name, m in model.named_modules():
        if isinstance(m, (QuantConv2d, QuantLinear)):
            kind = "conv" if isinstance(m, QuantConv2d) else "linear"
            yield Site(name, kind, m.weight_bits, m.weight.numel(), m.weight.shape[0])
        elif isinstance(m, (nn.Conv2d, nn.Linear)):
            why = "its class overrides nn.Conv2d or nn.Linear, whose arithmetic is not known"
            yield Site(name, type(m).__name__, None, m.weight.numel(), note=why)
        elif isinstance(m, QuantAct):
            yield Site(name, "act", m.bits)
        elif _is_relu(m) and not name.endswith(".act"):
            yield Site(name, type(m).__name__, None, note="never called in the forward")
        elif isinstance(m, _FLOAT_ACTIVATIONS):
            yield Site(name, type(m).__name__, None, note="only ReLU and ReLU6 outputs are quantized")
    functional = getattr(model, "zsq_functional_relus", 0)
    if functional:
        yield Site(
            "", "F.relu", None, note=f"{functional} rectifier calls are functions, not modules; use nn.ReLU modules"
        )


def summarize(model: nn.Module) -> Summary:
    """What of a converted network is quantized, at how many bits, and what stayed float and why."""
    sites = tuple(_sites(model))
    quantized = sum(s.numel for s in sites if s.bits is not None)
    return Summary(sites, sum(p.numel() for p in model.parameters()) - quantized)


def quantized_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every quantized layer, by parameter name."""
    found: dict[str, nn.Parameter] = {}
    for name, m in model.named_modules():
        if isinstance(m, (QuantConv2d, QuantLinear)):
            found[f"{name}.weight" if name else "weight"] = m.weight  # type: ignore[assignment]
    return found


def freeze_ranges(model: nn.Module) -> None:
    """Freeze the range of every activation quantizer."""
    for m in model.modules():
        if isinstance(m, QuantAct):
            m.freeze()


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Within: the network is in eval mode (batch norms fixed) while the activation ranges follow the data."""
    model.eval()
    quantizers = [m for m in model.modules() if isinstance(m, QuantAct)]
    for m in quantizers:
        m.train()
    try:
        yield
    finally:
        for m in quantizers:
            m.eval()
