"""The specification: what every operation computes, in plain PyTorch, written to be read beside the papers.

Names and signatures equal those of the dispatcher ops (`zsq_fast/ops/schemas.py`), one file per family. The kernels are tested
against this package; nothing else calls it. Products and sums are separate calls on purpose: each is rounded once, as in the
kernels. 16-bit inputs are widened to float32, and only the result is rounded to 16 bits.
"""

from zsq_fast.reference.bn_act import bn_act_fake_quant, bn_act_fake_quant_backward
from zsq_fast.reference.bn_stats import (
    bn_eval_sums,
    bn_eval_sums_backward,
    bn_stats_loss,
    bn_stats_loss_backward,
    bn_stats_match,
    bn_stats_match_backward,
)
from zsq_fast.reference.fake_quant import (
    fake_quant_act,
    fake_quant_act_clip,
    fake_quant_act_running,
    fake_quant_weight,
    fake_quant_weights,
    masked,
    track_range_,
    weight_codes,
)
from zsq_fast.reference.gi_sgd import gi_sgd_
from zsq_fast.reference.learned_step import fake_quant_learned, fake_quant_learned_backward
from zsq_fast.reference.losses import (
    distillation_loss,
    feature_alignment,
    feature_alignment_backward,
    sign_perturb,
)

__all__ = [
    "bn_act_fake_quant",
    "bn_act_fake_quant_backward",
    "bn_eval_sums",
    "bn_eval_sums_backward",
    "bn_stats_loss",
    "bn_stats_loss_backward",
    "bn_stats_match",
    "bn_stats_match_backward",
    "distillation_loss",
    "fake_quant_act",
    "fake_quant_act_clip",
    "fake_quant_act_running",
    "fake_quant_learned",
    "fake_quant_learned_backward",
    "fake_quant_weight",
    "fake_quant_weights",
    "feature_alignment",
    "feature_alignment_backward",
    "gi_sgd_",
    "masked",
    "sign_perturb",
    "track_range_",
    "weight_codes",
]
