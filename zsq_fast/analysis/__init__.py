"""Analyses of a finished run: what `zsq-fast analyze RUN --what NAME` computes and draws.

An analysis is a function of a `Subject` and a function `draw(result, figure)`; its result is a frozen dataclass with `to_dict()`, for
JSON, whose `str()` is a short table. None changes the networks it is given, or any global random state.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from zsq_fast.errors import UsageError, nearest

# name: (compute, draw), as "module:function" of this package, so that a list of the names does not wait for torch
ANALYSES = {
    "layers": ("layers:of_subject", "layers:draw"),
    "samples": ("samples:of_subject", "samples:draw"),
    "updates": ("updates:of_subject", "updates:draw"),
    "forecast": ("forecast:of_subject", "forecast:draw"),
    "cosine": ("gradients:of_subject", "gradients:draw"),
    "hessian": ("curvature:of_subject", "curvature:draw"),
    "surface": ("surface:of_subject", "surface:draw"),
}


def check_name(name: str) -> str:
    """Raises UsageError unless there is such an analysis (nearest name offered)."""
    if name not in ANALYSES:
        raise UsageError(f"there is no analysis '{name}'.{nearest(name, ANALYSES)}")
    return name


def find(name: str) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    """The functions of an analysis: `compute(subject) -> result` and `draw(result, figure)`, which fills a matplotlib figure.

    Raises UsageError: there is no such analysis.
    """
    parts = (text.split(":") for text in ANALYSES[check_name(name)])
    compute, draw = (getattr(importlib.import_module(f"{__name__}.{module}"), function) for module, function in parts)
    return compute, draw
