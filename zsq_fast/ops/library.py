"""Registers the operations: schemas, shapes for tracing, native kernels, and the reference where no kernel was built."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_fast import _build, reference
from zsq_fast.ops.schemas import NAMESPACE, SCHEMAS

_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
NAMES = tuple(schema.split("(")[0] for schema in SCHEMAS)

# What a caller may rely on: {"cpu": "native" | "reference", "cuda": ...}.
backends: dict[str, str] = {}


def _fallback(device: str, name: str, status: dict[str, Any]) -> Callable[..., Any]:
    function = getattr(reference, name)
    announced = False

    def run(*args: Any) -> Any:
        nonlocal announced
        message = (
            f"zsq_fast: no {device} kernels here ({status['reason']}), '{name}' runs its slow PyTorch reference. "
            f"To build them: {status['fix']}"
        )
        if device in _build.required_kernels():
            raise NotImplementedError(message)
        if not announced:
            announced = True
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        bits = args[next(i for i, a in enumerate(_arguments(name)) if a == "bits")] if "bits" in _arguments(name) else 8
        if not 2 <= bits <= 8:
            raise ValueError(f"{name}: bits must be 2 to 8, got {bits}")
        return function(*args)

    return run


def _arguments(name: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.zsq, name).default._schema.arguments]


class _StraightThrough(torch.autograd.Function):
    """Identity gradient for the fake quantizers when the C++ autograd is not there."""

    @staticmethod
    def forward(ctx: Any, op: Any, x: Tensor, *rest: Any) -> Tensor:
        ctx.extra = len(rest)
        with torch._C._AutoDispatchBelowAutograd():
            return op(x, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, grads[0], *[None] * ctx.extra)


class _BnStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, x: Tensor, mean: Tensor, var: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            loss, batch_mean, batch_var = op(x, mean, var)
        ctx.save_for_backward(x, mean, var, batch_mean, batch_var)
        ctx.mark_non_differentiable(batch_mean, batch_var)
        return loss, batch_mean, batch_var

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, torch.ops.zsq.bn_stats_match_backward(grads[0], *ctx.saved_tensors), None, None


def _register_python_autograd() -> None:
    for name in ("fake_quant_weight", "fake_quant_act", "fake_quant_act_running", "bn_stats_match"):
        op = getattr(torch.ops.zsq, name).default
        function = _BnStats if name == "bn_stats_match" else _StraightThrough
        _library.impl(name, lambda *args, op=op, function=function: function.apply(op, *args), "Autograd")


def _register_fakes() -> None:
    def like(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    def codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(weight), weight.new_empty(weight.shape[0]), weight.new_empty(weight.shape[0])

    def statistics(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty(()), torch.empty_like(mean), torch.empty_like(mean)

    fakes: dict[str, Callable[..., Any]] = {
        "fake_quant_weight": like,
        "weight_codes": codes,
        "fake_quant_act": like,
        "fake_quant_act_running": like,
        "bn_stats_match": statistics,
        "bn_stats_match_backward": lambda grad_loss, x, *_: torch.empty_like(x),
        "gi_sgd_": lambda *_: None,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _register() -> None:
    native = _build.load_native()
    status = _build.kernel_status()
    for device in ("cpu", "cuda"):
        built = native and status[device]["built"]
        backends[device] = "native" if built else "reference"
        if not built:
            for name in NAMES:
                _library.impl(name, _fallback(device, name, status[device]), device.upper())
    if not native:
        _register_python_autograd()
    _register_fakes()


_register()
