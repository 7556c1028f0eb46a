"""Ten thousand cases against the reference: types, shapes, layouts, bits, degenerate values; not one different code or value."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zsq_fast import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["normal", "constant", "zero", "one-sided", "denormal", "huge", "infinite", "nan", "ties"]
LAYOUTS = ["contiguous", "channels_last", "slice", "transposed", "offset"]

cases = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "shape": st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 6), st.integers(1, 7)),
        "kind": st.sampled_from(KINDS),
        "layout": st.sampled_from(LAYOUTS),
        "bits": st.integers(2, 8),
        "seed": st.integers(0, 2**20),
    }
)
many = settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def values(case: dict, device: str) -> Tensor:
    """On the device, in the layout of the case there; the reference reads it from the CPU, where it is exact by construction."""
    rng = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(case["shape"], generator=rng, dtype=torch.float64)
    tiny = 1e-40 if case["dtype"] != torch.float64 else 1e-310
    x = {
        "normal": lambda: x, "constant": lambda: x.new_full(x.shape, 0.37), "zero": lambda: torch.zeros_like(x),
        "one-sided": lambda: x.abs() + 0.1, "denormal": lambda: x * tiny, "huge": lambda: x * 1e30,
        "infinite": lambda: x.masked_fill(x > 1.5, float("inf")), "nan": lambda: x.masked_fill(x > 1.5, float("nan")),
        "ties": lambda: (x * 4).round() / 2,
    }[case["kind"]]().to(case["dtype"]).to(device)  # fmt: skip
    match case["layout"]:
        case "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        case "slice":
            return torch.stack([x, x.flip(0)], -1).flatten(-2)[..., ::2].copy_(x)
        case "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "offset":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def same(ours: Tensor, theirs: Tensor) -> None:
    ours = ours.cpu()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


@many
@given(cases)
def test_weights(device, case):
    w, bits = values(case, device), case["bits"]
    same(ops.fake_quant_weight(w, bits), reference.fake_quant_weight(w.cpu(), bits))
    for ours, theirs in zip(ops.weight_codes(w, bits), reference.weight_codes(w.cpu(), bits), strict=True):
        same(ours, theirs)


@many
@given(cases, st.floats(-3, 3), st.floats(0, 6))
def test_activations(device, case, lo, width):
    x, bits = values(case, device), case["bits"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ends = torch.tensor(lo, dtype=wide), torch.tensor(lo + width, dtype=wide)
    there = [end.to(device) for end in ends]
    same(ops.fake_quant_act(x, *there, bits), reference.fake_quant_act(x.cpu(), *ends, bits))
    x = x.contiguous()  # a mask lies in the order of memory
    clipped = reference.fake_quant_act_clip(x.cpu(), *ends, bits)
    for ours, theirs in zip(torch.ops.zsq.fake_quant_act_clip(x, *there, bits), clipped, strict=True):
        same(ours, theirs)


@many
@given(cases, st.sampled_from(["none", "relu", "relu6"]), st.booleans(), st.booleans())
def test_batch_norm_activation(device, case, activation, clip, residual):
    x = values(case, device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = nn.BatchNorm2d(x.shape[1], dtype=wide).eval()
    rng = torch.Generator().manual_seed(case["seed"] + 1)
    with torch.no_grad():
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            t.copy_(torch.randn(t.shape, generator=rng, dtype=wide))
        norm.running_var.abs_()
    other = x.roll(1, 0) if residual else None
    norms = [norm.running_mean, norm.running_var, norm.weight.detach(), norm.bias.detach()]
    ends = [torch.zeros((), dtype=wide), torch.tensor(2.5, dtype=wide)]

    def run(function, at):
        y = None if other is None else other.to(at)
        options = (norm.eps, activation, *(end.to(at) for end in ends), case["bits"], clip)
        return function(x.to(at), y, *(t.to(at) for t in norms), *options)[0]

    with torch.no_grad():
        same(run(torch.ops.zsq.bn_act_fake_quant, device), run(reference.bn_act_fake_quant, "cpu"))


@many
@given(cases, st.booleans(), st.floats(0.01, 2))
def test_learned_steps(device, case, per_row, size):
    x = values(case, device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = torch.full((x.shape[0] if per_row else 1,), size, dtype=wide)
    half = 2 ** (case["bits"] - 1)
    ours = ops.fake_quant_learned(x, step.to(device), -half, half - 1)
    same(ours, reference.fake_quant_learned(x.cpu(), step, -half, half - 1, 1.0))
