"""zsq_fast: quantize a trained CNN to 3 to 5 bits without its data.

>>> import zsq_fast as zsq
>>> student = zsq.quantize(teacher, recipe="ait", weight_bits=4, act_bits=4, input_size=(3, 32, 32), seed=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsq_fast import errors as errors
    from zsq_fast import losses as losses
    from zsq_fast import methods as methods
    from zsq_fast import nn as nn
    from zsq_fast import ops as ops
    from zsq_fast import optim as optim
    from zsq_fast.errors import ZsqError as ZsqError
    from zsq_fast.methods import Recipe as Recipe
    from zsq_fast.methods import Result as Result
    from zsq_fast.methods import Trainer as Trainer
    from zsq_fast.methods import available_recipes as available_recipes
    from zsq_fast.methods import load_recipe as load_recipe
    from zsq_fast.methods import quantize as quantize
    from zsq_fast.nn import QuantAct as QuantAct
    from zsq_fast.nn import QuantConv2d as QuantConv2d
    from zsq_fast.nn import QuantLinear as QuantLinear
    from zsq_fast.nn import convert as convert
    from zsq_fast.nn import summarize as summarize

__version__ = "0.1.0"

# Resolved on first use: `zsq-fast --help` and a typing error should not wait seconds for torch.
_MODULES = ("errors", "losses", "methods", "nn", "ops", "optim")
_NAMES = {
    "ZsqError": "errors",
    **dict.fromkeys(("Recipe", "Result", "Trainer", "available_recipes", "load_recipe", "quantize"), "methods"),
    **dict.fromkeys(("QuantAct", "QuantConv2d", "QuantLinear", "convert", "summarize"), "nn"),
}
__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"zsq_fast.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"zsq_fast.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'zsq_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
