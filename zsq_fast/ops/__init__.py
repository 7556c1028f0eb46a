"""The operations. Each is one dispatcher op with a plain-PyTorch reference, a CPU kernel and a CUDA kernel behind it.

Tensors are float32, float64, bfloat16 or float16 unless said otherwise. 16-bit tensors are computed in float32; their
parameters, states and reduced results ("wide" below) are float32, those of float64 tensors float64.
Gradients: the fake quantizers use the identity straight-through estimator of the GDFQ family unless told otherwise; ranges get none.
Wrong types, dtypes, shapes, devices or bit widths raise `TypeError` or `ValueError` naming the op, the argument, and what came; what
tensors hold is not looked at, except for targets on the CPU: a value that makes no sense (a range whose end lies before its start, a
step of zero) gives NaN, on every device. A device without kernels raises `MissingKernelsError` with the reason
and the command that builds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from zsq_fast import _build
from zsq_fast.errors import UsageError
from zsq_fast.ops import library

__all__ = [
    "backends",
    "bn_act_fake_quant",
    "bn_eval_sums",
    "bn_stats_loss",
    "bn_stats_match",
    "distillation_loss",
    "fake_quant_act",
    "fake_quant_act_running",
    "fake_quant_learned",
    "fake_quant_weight",
    "fake_quant_weights",
    "feature_alignment",
    "gi_sgd_",
    "release_memory",
    "sign_perturb",
    "weight_codes",
]

_bn_act_fake_quant = library.operation("bn_act_fake_quant")
_bn_eval_sums = library.operation("bn_eval_sums")
_bn_stats_loss = library.operation("bn_stats_loss")
_bn_stats_match = library.operation("bn_stats_match")
_distillation_loss = library.operation("distillation_loss")
_fake_quant_act = library.operation("fake_quant_act")
_fake_quant_act_clip = library.operation("fake_quant_act_clip")
_fake_quant_act_running = library.operation("fake_quant_act_running")
_fake_quant_learned = library.operation("fake_quant_learned")
_fake_quant_weight = library.operation("fake_quant_weight")
_fake_quant_weights = library.operation("fake_quant_weights")
_feature_alignment = library.operation("feature_alignment")
_gi_sgd_ = library.operation("gi_sgd_")
_sign_perturb = library.operation("sign_perturb")
_track_range_ = library.operation("track_range_")
_weight_codes = library.operation("weight_codes")


def backends() -> dict[str, str]:
    """Which devices have kernels here: `{"cpu": "native" | "missing", "cuda": ...}`."""
    return {device: "native" if here else "missing" for device, here in library.built.items()}


def release_memory() -> int:
    """Give the memory kept for large CPU results back to the system; returns the number of bytes.

    Freed results of 1 MiB and more are kept for later ones, 1 GiB at most: a fresh 50 MB result would cost more in page faults than
    the kernel that fills it.
    """
    native = _build.native()
    if native is None:
        return 0
    kept: int = native.kept_memory()
    native.release_memory()
    return kept


def fake_quant_weight(weight: Tensor, bits: int) -> Tensor:
    """Quantize-dequantize a weight per output channel over the channel's own minimum and maximum (asymmetric grid).

    Args:
        weight: `[C, ...]`; row = output channel. Strides are kept (contiguous or channels_last).
        bits: 2 to 8.

    Source: ZeroQ/GDFQ quantizer. Exact arithmetic: multiply, subtract, round half to even, true division.
    """
    return _fake_quant_weight(weight, bits)


def _tensors(op: str, name: str, given: Sequence[Tensor]) -> list[Tensor]:
    """As a list; a tensor would be split along its first dimension instead."""
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"{op}: {name} must be a sequence of tensors, got {type(given).__name__}")
    return list(given)


def fake_quant_weights(weights: Sequence[Tensor], bits: int) -> list[Tensor]:
    """`fake_quant_weight` of many tensors in one call: one launch on CUDA (for each 1,000), one parallel region on the CPU.

    On the CPU the results share one block of memory, which lives as long as any of them.

    Args:
        weights: tensors `[C, ...]` of one dtype and device, e.g. all weights of a network.
        bits: 2 to 8, the same for all.
    """
    weights = _tensors("fake_quant_weights", "weights", weights)
    if weights:
        return _fake_quant_weights(weights, bits)
    if not isinstance(bits, int):  # without a tensor there is no device to dispatch to, and no kernel to check
        raise TypeError(f"fake_quant_weights: bits must be of type int, got {type(bits).__name__}")
    if not 2 <= bits <= 8:
        raise UsageError(f"fake_quant_weights: bits must be 2 to 8, got {bits}")
    return []


def weight_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer codes of a weight, `codes[c] = round(scale[c] * weight[c])` clamped to `[lo_code[c], lo_code[c] + 2**bits - 1]`.

    Returns:
        codes `[C, ...]` (integers held in the wide type), scale `[C]` in codes per unit, lo_code `[C]`; the fake-quantized
        value is `codes / scale`.
    """
    return _weight_codes(weight, bits)


def _clips(op: str, ste: str) -> bool:
    if ste not in ("identity", "clip"):
        raise UsageError(f"{op}: ste must be 'identity' or 'clip', got {ste!r}")
    return ste == "clip"


def fake_quant_act(x: Tensor, lo: Tensor, hi: Tensor, bits: int, ste: str = "identity") -> Tensor:
    """Quantize-dequantize an activation of any shape over the given per-tensor range.

    Args:
        x: any shape.
        lo, hi: range, one element each, wide, on the device of x; not read by the host. Where hi - lo is below 1e-8, that takes its
            place; a NaN, or hi below lo, gives NaN everywhere.
        bits: 2 to 8.
        ste: straight-through estimator: "identity" (the papers) passes every gradient, "clip" only those of elements inside the
            code range, for which it keeps 1 bit per element.
    """
    return (
        _fake_quant_act_clip(x, lo, hi, bits)[0] if _clips("fake_quant_act", ste) else _fake_quant_act(x, lo, hi, bits)
    )


def fake_quant_act_running(
    x: Tensor,
    lo: Tensor,
    hi: Tensor,
    beta_t: Tensor,
    bits: int,
    decay: float = 0.9,
    plain: bool = False,
    ste: str = "identity",
) -> Tensor:
    """Update the running range with the minimum and maximum of x, in place, then quantize-dequantize x over it.

    Args:
        x: any shape, not empty.
        lo, hi, beta_t: state, three tensors of one element each, wide, without gradient, updated in place; beta_t starts at 1 and
            is the decay's running product; outside [0, 1] it, the range and the result become NaN.
        plain: False follows the published code, which feeds the bias-corrected value back into the average (it overshoots
            up to 4,000-fold and settles after about 175 updates); True is an ordinary bias-corrected moving average.
        ste: as in `fake_quant_act`; "clip" always reads x twice.
    """
    if lo is hi or lo is beta_t or hi is beta_t:
        raise UsageError("fake_quant_act_running: lo, hi and beta_t must be three tensors, got one twice")
    if lo.requires_grad or hi.requires_grad or beta_t.requires_grad:
        raise UsageError("fake_quant_act_running: lo, hi and beta_t are updated in place and must not require grad")
    if not _clips("fake_quant_act_running", ste):
        return _fake_quant_act_running(x, lo, hi, beta_t, bits, decay, plain)
    if not torch.compiler.is_compiling():  # tracing refuses before anything runs
        library.refuse("fake_quant_act_running", x, lo, hi, beta_t, bits, decay, plain)  # before the state changes
    _track_range_(x, lo, hi, beta_t, decay, plain)
    return _fake_quant_act_clip(x, lo, hi, bits)[0]


def bn_stats_match(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Batch-norm statistics loss: MSE(batch mean, mean) + MSE(biased batch variance, var), a scalar (GDFQ, L_BNS of one layer).

    Args:
        x: `[N, C, ...]`, the input of the batch norm layer.
        mean, var: `[C]`, wide, its running statistics (constants: no gradient).
    """
    return _bn_stats_match(x, mean, var)[0]


def fake_quant_learned(x: Tensor, step: Tensor, code_min: int, code_max: int, grad_factor: float = 1.0) -> Tensor:
    """Quantize-dequantize with learned step sizes: `clamp(round(x / step), code_min, code_max) * step` (LSQ, Esser et al. 2020).

    Args:
        x: any shape.
        step: units per code, wide: one element, or `[x.shape[0]]`, one per output channel of a weight. Where it is not
            positive, the result and the step's gradient are NaN.
        code_min, code_max: end codes, e.g. -8 and 7, or 0 and 15.
        grad_factor: multiplies the gradient of the step (LSQ section 2.2: `1 / sqrt(numel * code_max)`).
    """
    return _fake_quant_learned(x, step, code_min, code_max, grad_factor)


def bn_eval_sums(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode and, from the same read of x, the raw sums behind its batch statistics.

    Args:
        x: `[N, C, ...]`.
        mean, var, weight, bias: `[C]`, wide, constants (no gradient: the network is frozen).

    Returns:
        y like x, and sums `[2, C]` float64 of (x - mean) and (x - mean)^2, differentiable. The sums of several ranks may be
        added up before `bn_stats_loss`.
    """
    return _bn_eval_sums(x, mean, var, weight, bias, eps)


def bn_stats_loss(sums: Tensor, var: Tensor, count: int) -> Tensor:
    """The loss of `bn_stats_match` from the sums of `bn_eval_sums`, a scalar.

    Args:
        sums: `[2, C]` float64.
        var: `[C]`, running variance.
        count: values per channel behind the sums: N times positions, over all ranks.
    """
    return _bn_stats_loss(sums, var, count)


def bn_act_fake_quant(
    x: Tensor,
    norm: nn.BatchNorm2d,
    lo: Tensor,
    hi: Tensor,
    bits: int,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
    ste: str = "identity",
) -> Tensor:
    """`fake_quant_act(activation(norm(x) + residual))` with the batch norm in eval mode, as one kernel.

    Gradients flow to x, residual and the affine parameters of `norm`; the backward pass needs 1 bit per element, and x only for
    the affine parameters.

    Args:
        x: `[N, C, ...]`.
        norm: batch norm with running statistics, in eval mode.
        lo, hi: range, one element each, wide.
        activation: "relu", "relu6" or "none".
        residual: like x, added before the activation.
        ste: as in `fake_quant_act`.
    """
    clips = _clips("bn_act_fake_quant", ste)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"bn_act_fake_quant: norm must be a batch norm, got {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise UsageError("bn_act_fake_quant: norm keeps no running statistics (track_running_stats=False)")
    if norm.training:
        raise UsageError("bn_act_fake_quant: norm must be in eval mode, got training mode; call norm.eval()")
    out: Tensor = _bn_act_fake_quant(
        x,
        residual,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.eps,
        activation,
        lo,
        hi,
        bits,
        clips,
    )[0]
    return out


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None = None,
    target: Tensor | None = None,
    *,
    temperature: float = 20.0,
    reduction: str = "mean",
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distillation and (hard-sample) cross entropy with their gradient, from one read of the logits.

    Args:
        student, teacher: logits `[B, C]`; without a teacher the distillation term is 0. A logit that is not finite makes the
            loss and its row's gradient NaN.
        target: class indices `[B]` int64; without one the cross entropy is 0. An index out of range is a `ValueError` on the
            CPU and makes the loss and its row's gradient NaN on CUDA, where the host does not look.
        temperature: T of `T^2 * KL(softmax(teacher/T) || softmax(student/T))` (ait_family.md section 7).
        reduction: of the distillation term: "mean" divides by B*C, "batchmean" by B.
        kd_weight, ce_weight: factors of the two terms in the loss.
        gamma: exponent of HAST eq. 8, `(1 - p)^gamma * CE` with 1 - p at least 1e-6; 0 is plain cross entropy.

    Returns:
        loss, with gradients for the student and, if it wants one, the teacher (first derivatives only); distillation term and
        cross-entropy term, constants for the record.
    """
    if reduction not in ("mean", "batchmean"):
        raise UsageError(f"distillation_loss: reduction must be 'mean' or 'batchmean', got {reduction!r}")
    loss, kd, ce, _, _ = _distillation_loss(
        student, teacher, target, temperature, reduction == "batchmean", kd_weight, ce_weight, gamma, False
    )
    return loss, kd, ce


def feature_alignment(student: Tensor, teacher: Tensor, kind: str = "channel") -> Tensor:
    """Feature alignment of one layer, a scalar; gradients go to both.

    Args:
        student, teacher: `[N, C, ...]`.
        kind: "channel": mean squared difference of L2-normalised channel energies (HAST eq. 12); "spatial": the same of the
            energies of positions (attention transfer, Zagoruyko and Komodakis 2017); "direct": of the features themselves.
    """
    return _feature_alignment(student, teacher, kind)[0]


def sign_perturb(x: Tensor, grad: Tensor, epsilon: float) -> Tensor:
    """`x + epsilon * sign(grad)`, the sample made harder in one step (HAST section 3.3).

    The gradient passes to x unchanged; none goes to `grad`, whose sign is piecewise constant. NaN in `grad` gives NaN.
    """
    return _sign_perturb(x, grad, epsilon)


def gi_sgd_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    kappa: Tensor,
    changed: Tensor,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    bits: int,
    threshold: float,
    search_steps: int = 5,
    capped: bool = False,
    guaranteed: bool = False,
) -> None:
    """One SGD step with gradient inundation on all tensors together (AIT, ait_family.md 7.2). No host synchronisation on CUDA.

    Per tensor the step is amplified by kappa >= 1 so that about a share `threshold` of its integer codes changes.

    Args:
        weights, momenta: float32 tensors `[C, ...]`, all different, updated in place; momenta start at zero.
        kappa: `[len(weights)]` float32, receives the amplification; NaN marks a tensor with a NaN or infinite step direction,
            which is left untouched.
        changed: `[len(weights)]` int64, receives the number of integer codes the step changed.
        threshold: share of codes, 0 to 1.
        search_steps: bisection steps, 0 to 5.
        capped: stop doubling at kappa = 128.
        guaranteed: take the smallest factor tried that reaches the threshold. The published code takes the last one tried, which
            may fall short of it.
    """
    weights, grads, momenta = (
        _tensors("gi_sgd_", name, given)
        for name, given in (("weights", weights), ("grads", grads), ("momenta", momenta))
    )
    if len({id(t) for t in weights + momenta}) < len(weights) + len(momenta):
        raise UsageError("gi_sgd_: weights and momenta must be different tensors, got one twice")
    _gi_sgd_(
        weights, grads, momenta, kappa, changed, lr, momentum, nesterov, weight_decay, bits, threshold, search_steps,
        capped, guaranteed,
    )  # fmt: skip
