"""Analyses of a finished run: what `zsq-fast analyze RUN --what NAME` computes and draws.

An analysis is a function of a `Subject` and a function `draw(result, figure)`; its result is a frozen dataclass with `to_dict()`, for
JSON, whose `str()` is a short table. Its options are the keyword-only arguments of the first, of type int, float, str or, comma-separated,
tuple of str, as their defaults are. None changes the networks it is given, or any global random state.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from zsq_fast.errors import UsageError, nearest

# name: (compute, draw), as "module:function" of this package, so that a list of the names does not wait for torch
ANALYSES = {
    "layers": ("layers:of_subject", "layers:draw"),
    "samples": ("samples:of_subject", "samples:draw"),
    "updates": ("updates:of_subject", "updates:draw"),
    "forecast": ("forecast:of_subject", "forecast:draw"),
    "cosine": ("gradients:of_subject", "gradients:draw"),
    "cosine_history": ("gradients:history_of_subject", "gradients:draw_tracked"),
    "hessian": ("curvature:of_subject", "curvature:draw"),
    "surface": ("surface:of_subject", "surface:draw"),
}


def check_name(name: str) -> str:
    """Raises UsageError unless there is such an analysis (nearest name offered)."""
    if name not in ANALYSES:
        raise UsageError(f"there is no analysis '{name}'.{nearest(name, ANALYSES)}")
    return name


def find(name: str) -> tuple[Callable[..., Any], Callable[[Any, Any], None]]:
    """The functions of an analysis: `compute(subject, **options) -> result` and `draw(result, figure)`, which fills a matplotlib figure.

    Raises UsageError: there is no such analysis.
    """
    parts = (text.split(":") for text in ANALYSES[check_name(name)])
    compute, draw = (getattr(importlib.import_module(f"{__name__}.{module}"), function) for module, function in parts)
    return compute, draw


def options(name: str) -> dict[str, Any]:
    """The options of an analysis and their defaults. Raises UsageError: there is no such analysis."""
    parameters = inspect.signature(find(name)[0]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def read_options(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per analysis the options set by words such as "surface.points=21".

    Raises:
        UsageError: no such analysis or option (nearest name offered), or no value of its type.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        path, equals, text = word.partition("=")
        name, dot, option = path.partition(".")
        if not equals or not dot:
            raise UsageError(f"'{word}' is not an option of an analysis such as surface.points=21.")
        known = options(check_name(name))
        if option not in known:
            raise UsageError(
                f"the analysis '{name}' has no option '{option}'.{nearest(option, known) if known else ' It has none.'}"
            )
        kind = type(known[option])
        try:
            value = tuple(filter(None, text.split(","))) if kind is tuple else kind(text)
        except ValueError:
            raise UsageError(f"{path} takes a number ({kind.__name__}), got '{text}'.") from None
        found.setdefault(name, {})[option] = value
    return found
