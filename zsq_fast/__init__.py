"""zsq_fast: quantize a trained CNN to 3 to 5 bits without its data."""

from zsq_fast import losses, nn, ops, optim
from zsq_fast.nn import QuantAct, QuantConv2d, QuantLinear

__version__ = "0.1.0"

__all__ = ["QuantAct", "QuantConv2d", "QuantLinear", "losses", "nn", "ops", "optim"]
