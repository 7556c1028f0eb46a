"""Registers the operations: schemas, shapes for tracing, native kernels. A device without kernels raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq_fast import _build
from zsq_fast.errors import MissingKernelsError
from zsq_fast.ops.checks import check, check_types, map_shape, mask_shape, wide
from zsq_fast.ops.schemas import NAMESPACE, SCHEMAS

_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
NAMES = tuple(schema.split("(")[0] for schema in SCHEMAS)

# Whether the kernels of a device are here: {"cpu": True, "cuda": False}.
built: dict[str, bool] = {}


def _missing(device: str, name: str, status: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise MissingKernelsError(
            f"{name}: no {device} kernels here ({status['reason']}). To build them: {status['fix']}"
        )

    return run


def _checked(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` behind the kernels' checks: the dispatcher takes it, too, where one tensor among real ones lies on `meta`."""

    def run(*args: Any) -> Any:
        refuse(name, *args)
        return fake(*args)

    return run


def _fakes() -> dict[str, Callable[..., Any]]:
    def like(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    def mask(x: Tensor) -> Tensor:
        return x.new_empty(mask_shape(x), dtype=torch.uint8)

    def codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        of_rows = weight.new_empty(weight.shape[0], dtype=wide(weight))
        return torch.empty_like(weight, dtype=wide(weight)), of_rows, torch.empty_like(of_rows)

    def statistics(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mean.new_empty(()), torch.empty_like(mean), torch.empty_like(mean)

    def bn_act_backward(
        grad: Tensor,
        mask: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Any,
        eps: float,
        residual: bool,
        affine: bool,
    ) -> tuple[Tensor, ...]:
        of_channels = [mean.new_empty(mean.shape if affine else 0) for _ in range(2)]
        return torch.empty_like(x), torch.empty_like(x) if residual else x.new_empty(0), *of_channels

    def distillation(student: Tensor, teacher: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        both = options[-1] and teacher is not None
        scalars = (student.new_empty((), dtype=wide(student)) for _ in range(3))
        return *scalars, student.new_empty(student.shape), student.new_empty(student.shape if both else 0)

    def alignment(student: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        maps = [student.new_empty(map_shape(student, kind), dtype=wide(student)) for _ in range(2)]
        return student.new_empty((), dtype=wide(student)), maps[0], maps[1]

    def alignment_backward(
        grad_loss: Tensor,
        student: Tensor,
        teacher: Tensor,
        student_map: Tensor,
        teacher_map: Tensor,
        kind: str,
        both: bool,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(student), torch.empty_like(teacher) if both else student.new_empty(0)

    return {
        "fake_quant_weight": like,
        "fake_quant_weights": lambda weights, bits: [torch.empty_like(w) for w in weights],
        "weight_codes": codes,
        "fake_quant_act": like,
        "fake_quant_act_clip": lambda x, *_: (torch.empty_like(x), mask(x)),
        "masked": like,
        "track_range_": lambda *_: None,
        "fake_quant_act_running": like,
        "fake_quant_learned": like,
        "fake_quant_learned_backward": lambda grad, x, step, *_: (torch.empty_like(x), torch.empty_like(step)),
        "bn_stats_match": statistics,
        "bn_stats_match_backward": lambda grad_loss, x, *_: torch.empty_like(x),
        "bn_eval_sums": lambda x, *_: (torch.empty_like(x), x.new_empty(2, x.shape[1], dtype=torch.float64)),
        "bn_eval_sums_backward": lambda grad_y, grad_sums, x, *_: torch.empty_like(x),
        "bn_stats_loss": lambda sums, var, count: var.new_empty(()),
        "bn_stats_loss_backward": lambda grad_loss, sums, var, count: torch.empty_like(sums),
        "bn_act_fake_quant": lambda x, *_: (torch.empty_like(x), mask(x)),
        "bn_act_fake_quant_backward": bn_act_backward,
        "distillation_loss": distillation,
        "feature_alignment": alignment,
        "feature_alignment_backward": alignment_backward,
        "sign_perturb": like,
        "gi_sgd_": lambda *_: None,
    }


def _register() -> None:
    _build.native()
    for device, status in _build.kernel_status().items():
        built[device] = status["built"]
        if not status["built"]:
            for name in NAMES:
                _library.impl(name, _missing(device, name, status), device.upper())
    for name, fake in _fakes().items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", _checked(name, fake), lib=_library)


_register()


def refuse(name: str, *args: Any) -> None:
    """Raises what the operation would, without running it."""
    schema = getattr(torch.ops.zsq, name).default._schema
    check_types(name, schema, args)
    check(name, {a.name: value for a, value in zip(schema.arguments, args, strict=True)})


def operation(name: str) -> Callable[..., Any]:
    """The operation, its arguments in the order of the schema. Resolved once: attributes of torch.ops cost as much as a small kernel."""
    op = getattr(torch.ops.zsq, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():  # which follows a refusal into the handler below and stops there
            return op(*args)
        try:
            return op(*args)
        except (
            RuntimeError
        ):  # also what the dispatcher raises for a number where a tensor belongs, or a float for an int
            check_types(name, op._schema, args)
            raise

    return call
