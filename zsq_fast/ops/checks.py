"""What the kernels refuse, in Python: for tracing and the meta device, where no kernel looks at the arguments.

`csrc/ops/*/checks.h` decides what that is. One argument name means the same in all operations, so the checks go by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_SEARCH_STEPS = 5
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WIDE = _FLOATS[:2]
_TYPES: dict[str, Any] = {
    "Tensor": Tensor,
    "List[Tensor]": list,
    "int": (int, torch.SymInt),
    "float": (float, int, torch.SymFloat, torch.SymInt),
    "bool": (bool, torch.SymBool),
    "str": str,
}
# The tensor that the others go with is the first of these that an operation has.
_MAINS = ("x", "student", "weights[0]", "weight", "var", "grad")

# Of every argument that is no tensor, by name: what holds of it, and the same in words.
_RULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bits": (lambda v: 2 <= v <= 8, "be 2 to 8"),
    "decay": (lambda v: 0 < v < 1, "lie between 0 and 1"),
    "count": (lambda v: v > 0, "be positive"),
    "grad_factor": (lambda v: abs(v) < math.inf, "be finite"),
    "eps": (lambda v: 0 <= v < math.inf, "be finite and not negative"),
    "kd_weight": (lambda v: abs(v) < math.inf, "be finite"),
    "ce_weight": (lambda v: abs(v) < math.inf, "be finite"),
    "epsilon": (lambda v: abs(v) < math.inf, "be finite"),
    "temperature": (lambda v: 0 < v < math.inf, "be positive and finite"),
    "gamma": (lambda v: 0 <= v < math.inf, "be at least 0 and finite"),
    "lr": (lambda v: 0 <= v < math.inf, "be finite and not negative"),
    "momentum": (lambda v: 0 <= v < 1, "lie in [0, 1)"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "be finite and not negative"),
    "threshold": (lambda v: 0 <= v <= 1, "lie in [0, 1]"),
    "search_steps": (lambda v: 0 <= v <= MAX_SEARCH_STEPS, f"be 0 to {MAX_SEARCH_STEPS}"),
    "activation": (lambda v: v in ("relu", "relu6", "none"), "be 'relu', 'relu6' or 'none'"),
    "kind": (lambda v: v in ("channel", "spatial", "direct"), "be 'channel', 'spatial' or 'direct'"),
}


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mask_shape(x: Tensor) -> tuple[int]:
    return ((x.numel() + 7) // 8,)


def map_shape(student: Tensor, kind: str) -> tuple[int, ...]:
    n, c = student.shape[:2]
    return {"channel": (n, c), "spatial": (n, student[0, 0].numel())}.get(kind, (0,))


def _need(op: str, argument: str, holds: Any, what: str, got: Any, error: type[Exception] = ValueError) -> None:
    # torch's own check, not `if`: where a size is known at run time only, tracing notes the condition and goes on.
    check = torch._check_type if error is TypeError else torch._check_value
    check(holds, lambda: f"{op}: {argument} must {what}, got {got}")


def _expected(name: str, index: int, given: Mapping[str, Any], x: Tensor) -> tuple[torch.dtype, Sequence[int] | None]:
    """Data type and shape of a tensor that goes with `x`; no shape for what has one element, or any."""
    match name:
        case "residual" | "grad" | "grad_y" | "teacher":
            return x.dtype, x.shape
        case "grads" | "momenta":
            return x.dtype, given["weights"][index].shape
        case "weights":
            return x.dtype, None
        case "mean" | "var" | "weight" | "bias" | "batch_mean" | "batch_var":
            return wide(x), (x.shape[1],)
        case "sums" | "grad_sums":
            return torch.float64, (2, x.shape[min(1, x.dim() - 1)])
        case "step":
            return wide(x), None if given["step"].numel() == 1 else x.shape[:1]
        case "mask":
            return torch.uint8, mask_shape(x)
        case "target":
            return torch.int64, x.shape[:1]
        case "student_map" | "teacher_map":
            return wide(x), map_shape(x, given["kind"])
        case "kappa" | "changed":
            return torch.float32 if name == "kappa" else torch.int64, (len(given["weights"]),)
    return wide(x), None  # lo, hi, beta_t, grad_loss


def _check_main(op: str, main: str, x: Tensor) -> None:
    dtypes = (torch.float32,) if op == "gi_sgd_" else _WIDE if main == "var" else _FLOATS
    _need(op, main, x.dtype in dtypes, f"be one of {dtypes}", x.dtype, TypeError)
    least = {"weights[0]": 1, "weight": 1, "var": 1, "student": 2}.get(main, 2 if op.startswith("bn_") else 0)
    exactly = main == "var" or op == "distillation_loss"
    _need(op, main, x.dim() == least if exactly else x.dim() >= least, f"have {least} dimensions", list(x.shape))
    if (
        main in ("student", "var")
        or op in ("track_range_", "fake_quant_act_running")
        or op.startswith("bn_stats_match")
    ):
        _need(op, main, x.numel() > 0, "not be empty", list(x.shape))


def check_types(op: str, schema: Any, args: Sequence[Any]) -> None:
    """A TypeError for the first argument that is not of the schema's type: the dispatcher's own words vary, and so does its error."""
    for argument, value in zip(schema.arguments, args, strict=True):
        kind = str(argument.type)
        if kind.startswith("Optional["):
            if value is None:
                continue
            kind = kind[len("Optional[") : -1]
        values = {argument.name: value}
        if kind == "List[Tensor]" and isinstance(value, list | tuple):
            kind, values = "Tensor", {f"{argument.name}[{i}]": v for i, v in enumerate(value)}
        for name, v in values.items():
            if not isinstance(v, _TYPES[kind]):
                raise TypeError(f"{op}: {name} must be of type {kind}, got {type(v).__name__}") from None


def check(op: str, given: Mapping[str, Any]) -> None:
    """Raises what the kernels would: TypeError and ValueError naming op, argument, what is expected and what came."""
    for name, value in given.items():
        if name in _RULES:
            _need(op, name, _RULES[name][0](value), _RULES[name][1], repr(value))
    if "code_min" in given:
        lo, hi = given["code_min"], given["code_max"]
        _need(
            op, "code_min", -(1 << 24) <= lo < hi <= 1 << 24, "lie below code_max, both within 2^24", f"{lo} and {hi}"
        )
    counts = [len(given[name]) for name in ("weights", "grads", "momenta") if name in given]
    if counts:
        _need(op, "weights", counts[0] > 0, "not be empty", counts[0])
        _need(op, "weights, grads and momenta", len(set(counts)) == 1, "be as many", counts)
    tensors = {name: (name, 0, t) for name, t in given.items() if isinstance(t, Tensor)}
    for name, ts in given.items():
        if isinstance(ts, list | tuple):
            tensors |= {f"{name}[{i}]": (name, i, t) for i, t in enumerate(ts)}
    main = next(name for name in _MAINS if name in tensors)
    x = tensors[main][2]
    _check_main(op, main, x)
    for argument, (name, i, t) in tensors.items():
        if argument == main:
            continue
        _need(op, argument, t.device == x.device, f"be on the device of {main} ({x.device})", t.device)
        dtype, shape = _expected(name, i, given, x)
        _need(op, argument, t.dtype == dtype, f"be {dtype} for {main} of {x.dtype}", t.dtype, TypeError)
        if shape is not None:
            _need(op, argument, t.shape == tuple(shape), f"have shape {list(shape)}", list(t.shape))
        elif name == "weights":
            _need(op, argument, t.dim() >= 1, "have at least one dimension (the output channels)", list(t.shape))
        else:
            _need(op, argument, t.numel() == 1, "have one element", list(t.shape))
        if name in ("kappa", "changed") or op == "masked":
            _need(op, argument, t.is_contiguous(), "be contiguous", t.stride())
