"""zsq_fast: quantize a trained CNN to 3 to 5 bits without its data.

>>> import zsq_fast as zsq
>>> student = zsq.quantize(teacher, recipe="ait", weight_bits=4, act_bits=4, input_size=(3, 32, 32), seed=0)
"""

from zsq_fast import errors, losses, nn, ops, optim
from zsq_fast.errors import ZsqError
from zsq_fast.methods import Recipe, Result, Trainer, available_recipes, load_recipe, quantize
from zsq_fast.nn import QuantAct, QuantConv2d, QuantLinear, convert, summarize

__version__ = "0.1.0"

__all__ = [
    "QuantAct",
    "QuantConv2d",
    "QuantLinear",
    "Recipe",
    "Result",
    "Trainer",
    "ZsqError",
    "available_recipes",
    "convert",
    "errors",
    "load_recipe",
    "losses",
    "nn",
    "ops",
    "optim",
    "quantize",
    "summarize",
]
