"""Conversion of a float network into its fake-quantized student, and the account of what was done."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from zsq_fast.errors import UnsupportedModelError, UsageError, nearest
from zsq_fast.nn.layers import QuantAct, QuantConv2d, QuantLinear, check_bits
from zsq_fast.nn.probe import probing

_RELU_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.hardtanh, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_,
}  # fmt: skip
_FLOAT_ACTIVATIONS = (
    nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.Mish, nn.Tanh, nn.Softplus,
)  # fmt: skip


class _ThenQuant(nn.Module):
    """Mixin: an activation followed by its quantizer, one per call site when the network calls the module several times."""

    quant: nn.ModuleList
    next_call: int

    def forward(self, x: Tensor) -> Tensor:
        quant = self.quant[self.next_call]
        self.next_call = (self.next_call + 1) % len(self.quant)
        return quant(super().forward(x))


class QuantReLU(_ThenQuant, nn.ReLU):
    """`nn.ReLU` whose output is fake-quantized."""


class QuantReLU6(_ThenQuant, nn.ReLU6):
    """`nn.ReLU6` whose output is fake-quantized."""


def _restart_calls(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of a converted network: a forward that failed half-way must not shift the call sites."""
    for module in model.modules():
        if isinstance(module, _ThenQuant):
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
    row_bytes: int = 8

    def packed_bytes(self, bits: int | float | None = None) -> int:
        """Size of a quantized weight: codes packed at `bits` (None: its own), and what every row needs beside."""
        return math.ceil(self.numel * ((self.bits or 0) if bits is None else bits) / 8) + self.row_bytes * self.rows


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
        """Size with codes packed at their bits, a float32 scale and zero point (learned: a step) per row, the rest in float32."""
        return sum(s.packed_bytes() for s in self._of("conv", "linear")) + 4 * self.float_parameters

    def to_dict(self) -> dict[str, Any]:
        return {
            "weight_tensors": self.weight_tensors,
            "quantized_weights": self.quantized_weights,
            "layer_bits": {s.name: s.bits for s in self._of("conv", "linear")},
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


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The class a module of this exact type turns into, None if it stays as it is."""
    twins: dict[type, type[nn.Module]] = {
        nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear, nn.ReLU: QuantReLU, nn.ReLU6: QuantReLU6
    }  # fmt: skip
    return twins.get(type(module))


def _count_calls(
    model: nn.Module, watched: dict[str, nn.Module], input_size: Sequence[int]
) -> tuple[Counter[str], int]:
    """Calls of each watched module in one forward on zeros, and of rectifiers made outside modules."""
    calls: Counter[str] = Counter()
    handles = [m.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, m in watched.items()]
    by_modules: Counter[str] = Counter()
    rectifiers = [m for m in model.modules() if isinstance(m, (nn.ReLU, nn.Hardtanh))]  # ReLU6 is a Hardtanh
    handles += [m.register_forward_hook(lambda *_: by_modules.update(["relu"])) for m in rectifiers]
    with probing(model, input_size, handles) as zeros, torch.no_grad(), _ReluCalls() as mode:
        model(zeros)
    return calls, mode.total - by_modules["relu"]


def _refuse(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise UnsupportedModelError(
                f"the weights hold NaN or infinite values in '{name}'; load a sound checkpoint."
            )
    for name, m in model.named_modules():
        computed = parametrize.is_parametrized(m) or (
            _kind(m) in (QuantConv2d, QuantLinear) and "weight" not in m._parameters
        )
        if computed:
            raise UnsupportedModelError(
                f"the weight of '{name}' is computed from others (weight norm, spectral norm, pruning, parametrization); "
                "make it permanent first: remove_weight_norm, remove_spectral_norm, prune.remove or remove_parametrizations."
            )
    if not any(_kind(m) in (QuantConv2d, QuantLinear) for m in model.modules()):
        kinds = ", ".join(sorted({type(m).__name__ for m in model.modules()})[:12])
        raise UnsupportedModelError(
            f"nothing in the model can be quantized: no nn.Conv2d or nn.Linear (it holds {kinds})."
        )


def _widths(weight_bits: Mapping[str, int], layers: Sequence[str]) -> Mapping[str, int]:
    """The mapping, if it gives exactly these layers sound bits."""
    for name, bits in weight_bits.items():
        if name not in layers:
            raise UsageError(
                f"weight_bits names '{name}', no layer whose weight is quantized.{nearest(str(name), layers)}"
            )
        check_bits(f"weight_bits['{name}']", bits)
    missing = [name for name in layers if name not in weight_bits]
    if missing:
        raise UsageError(f"weight_bits gives no bits for the layer '{missing[0]}' ({len(missing)} missing)")
    return weight_bits


def convert(
    model: nn.Module,
    weight_bits: int | Mapping[str, int] = 4,
    act_bits: int = 4,
    *,
    ema: str = "reference",
    ranges: str = "minmax",
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    """A copy of a float network with every Conv2d and Linear weight, and every ReLU/ReLU6 output, fake-quantized.

    First and last layers included; biases, batch norms and everything else stay float (ait_family.md section 2).

    Args:
        weight_bits, act_bits: 2 to 8. A mapping gives every layer whose weight is quantized, by module name, bits of its own.
        ema: range tracking of the activations, see `QuantAct`.
        ranges: "minmax", or "learned" from `freeze_ranges` on, see `QuantConv2d` and `QuantAct`.
        input_size: `(C, H, W)`. With it network and copy are run once on zeros: a ReLU module that is called several times
            gets one quantizer per call, a layer that is never called stays float, and a copy that does not call its own
            layers is refused. Without it every module counts as called once.

    Raises:
        UnsupportedModelError: nothing in the network can be quantized, its weights hold NaN or infinity, or it reaches its
            layers in a way that a copy does not carry over (a forward patched with a closure).
        UsageError: bits out of range, or a mapping that misses such a layer or names another.
    """
    if not isinstance(weight_bits, Mapping):
        check_bits("weight_bits", weight_bits)
    check_bits("act_bits", act_bits)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    _refuse(model)
    watched = {name: m for name, m in model.named_modules() if _kind(m)}
    calls, functional = Counter(dict.fromkeys(watched, 1)), 0
    if input_size is not None:
        calls, functional = _count_calls(model, watched, input_size)
    weighted = [name for name, m in watched.items() if calls[name] and _kind(m) in (QuantConv2d, QuantLinear)]
    widths = (
        _widths(weight_bits, weighted) if isinstance(weight_bits, Mapping) else dict.fromkeys(weighted, weight_bits)
    )
    # The copy's modules change their class in place: whatever refers to them (lists, bound methods, hooks, tied weights)
    # keeps referring to them.
    student = copy.deepcopy(model)
    weight = next(student.parameters())
    for name, m in list(student.named_modules()):
        twin = _kind(m)
        if twin is None or not calls[name]:
            continue
        m.__class__ = twin
        if isinstance(m, _ThenQuant):
            acts = (QuantAct(act_bits, ema, weight.device, weight.dtype, ranges) for _ in range(calls[name]))
            m.quant, m.next_call = nn.ModuleList(acts).train(m.training), 0
        else:
            m.weight_bits = widths[name]
            m.set_ranges(ranges, m.weight.shape[:1], m.weight)
    if input_size is not None:
        own = {name: m for name, m in student.named_modules() if name in watched}
        again, _ = _count_calls(student, own, input_size)
        missed = [name for name in calls if calls[name] != again[name]]
        if missed:
            raise UnsupportedModelError(
                f"the forward of a copy of the model does not call the copy's '{missed[0]}': the model reaches its layers "
                "through a patched forward or a closure; define forward in the class."
            )
    if any(n > 1 for n in calls.values()):
        student.register_forward_pre_hook(_restart_calls)
    student.zsq_functional_relus = functional
    return student


def _sites(model: nn.Module) -> Iterator[Site]:
    for name, m in model.named_modules():
        kind, size = type(m).__name__, sum(p.numel() for p in m.parameters(recurse=False) if p.dim() > 1)
        if isinstance(m, (QuantConv2d, QuantLinear)):
            yield Site(
                name,
                "conv" if isinstance(m, QuantConv2d) else "linear",
                m.weight_bits,
                m.weight.numel(),
                m.weight.shape[0],
                row_bytes=8 if m.step is None else 4,
            )
        elif isinstance(m, QuantAct):
            yield Site(name, "act", m.bits)
        elif isinstance(m, _ThenQuant):
            continue
        elif _kind(m):
            yield Site(name, kind, None, size, note="never called in the forward")
        elif size:
            yield Site(name, kind, None, size, note="only nn.Conv2d and nn.Linear weights are quantized, no subclasses")
        elif isinstance(m, (nn.ReLU, nn.Hardtanh, *_FLOAT_ACTIVATIONS)):
            yield Site(name, kind, None, note="only nn.ReLU and nn.ReLU6 outputs are quantized, no subclasses")
    functional = getattr(model, "zsq_functional_relus", 0)
    if functional:
        note = f"{functional} rectifier calls are not those of nn.ReLU or nn.ReLU6 modules; use such modules"
        yield Site("", "F.relu", None, note=note)


def summarize(model: nn.Module) -> Summary:
    """What of a converted network is quantized, at how many bits, and what stayed float and why."""
    sites = tuple(_sites(model))
    counted = sum(s.numel for s in sites if s.bits is not None) + sum(p.numel() for p in learned_steps(model).values())
    return Summary(sites, sum(p.numel() for p in model.parameters()) - counted)


def quantized_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every quantized layer, by parameter name."""
    found: dict[str, nn.Parameter] = {}
    for name, m in model.named_modules():
        if isinstance(m, (QuantConv2d, QuantLinear)):
            found[f"{name}.weight" if name else "weight"] = m.weight  # type: ignore[assignment]
    return found


def learned_steps(model: nn.Module) -> dict[str, nn.Parameter]:
    """The step of every quantizer with a learned range, by parameter name."""
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, QuantAct | QuantConv2d | QuantLinear)}
    steps = {f"{name}.step" if name else "step": m.step for name, m in quantizers.items()}
    return {name: step for name, step in steps.items() if step is not None}


def freeze_ranges(model: nn.Module) -> None:
    """Freeze the range of every activation quantizer, or begin to learn it, and those of the weights, where ranges are learned."""
    for m in model.modules():
        if isinstance(m, QuantAct | QuantConv2d | QuantLinear):
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
