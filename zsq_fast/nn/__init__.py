"""Layers, whole-model conversion, and taps on batch-norm statistics."""

from zsq_fast.nn.conversion import (
    QuantReLU,
    QuantReLU6,
    Site,
    Summary,
    calibrating,
    convert,
    freeze_ranges,
    learned_steps,
    quantized_weights,
    summarize,
)
from zsq_fast.nn.features import FeatureTap, class_map_layers, feature_points
from zsq_fast.nn.layers import (
    QuantAct,
    QuantConv2d,
    QuantLinear,
    forward_weight,
    twice_differentiable,
    weights_quantized_together,
)
from zsq_fast.nn.rounding import balanced_codes, balanced_rounding_
from zsq_fast.nn.taps import BNStatsTap, usable_batch_norms

__all__ = [
    "BNStatsTap",
    "FeatureTap",
    "QuantAct",
    "QuantConv2d",
    "QuantLinear",
    "QuantReLU",
    "QuantReLU6",
    "Site",
    "Summary",
    "balanced_codes",
    "balanced_rounding_",
    "calibrating",
    "class_map_layers",
    "convert",
    "feature_points",
    "forward_weight",
    "freeze_ranges",
    "learned_steps",
    "quantized_weights",
    "summarize",
    "twice_differentiable",
    "usable_batch_norms",
    "weights_quantized_together",
]
