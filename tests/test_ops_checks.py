"""What is refused: by the fake kernels exactly what the CPU kernels refuse, and no tensor may lie on another device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zsq_fast import ops
from zsq_fast.ops import library

Given = dict[str, Any]
INF, NAN = float("inf"), float("nan")


def schema(name: str) -> Any:
    return getattr(torch.ops.zsq, name).default._schema


def sound(name: str) -> Given:
    """Arguments that the operation takes; one name means the same in all operations."""
    rng = torch.Generator().manual_seed(0)
    x, channels, one = torch.randn(2, 3, 4, 4, generator=rng), torch.rand(3, generator=rng), torch.ones(())
    logits = torch.randn(2, 5, generator=rng)
    given: Given = dict.fromkeys(("x", "residual", "grad", "grad_y", "student", "teacher"), x)
    given |= dict.fromkeys(("mean", "var", "weight", "bias", "batch_mean", "batch_var"), channels)
    given |= dict.fromkeys(("lo", "hi", "beta_t", "grad_loss", "step"), one)
    given |= dict.fromkeys(("sums", "grad_sums"), torch.rand(2, 3, generator=rng).double())
    given |= dict.fromkeys(("student_map", "teacher_map"), x.square().mean((2, 3)))
    given |= {key: [logits, x] for key in ("weights", "grads", "momenta")}
    given |= {"mask": torch.zeros(12, dtype=torch.uint8), "target": torch.tensor([0, 1])}
    given |= {"kappa": torch.zeros(2), "changed": torch.zeros(2, dtype=torch.int64)}
    given |= {
        "bits": 4,
        "search_steps": 5,
        "count": 32,
        "code_min": -8,
        "code_max": 7,
        "kind": "channel",
        "activation": "relu",
    }
    given |= dict.fromkeys(("plain", "clip", "affine", "batchmean", "both", "nesterov", "capped", "guaranteed"), True)
    given |= dict.fromkeys(("decay", "momentum", "temperature", "threshold"), 0.5)
    given |= dict.fromkeys(
        ("eps", "lr", "weight_decay", "epsilon", "gamma", "kd_weight", "ce_weight", "grad_factor"), 0.1
    )
    if name == "distillation_loss":
        given |= {"student": logits, "teacher": logits}
    if name == "bn_act_fake_quant_backward":
        given["residual"] = True
    return {a.name: given[a.name] for a in schema(name).arguments}


def copied(given: Given, device: str) -> Given:
    def copy(v: Any) -> Any:
        return v.clone().to(device) if isinstance(v, Tensor) else [copy(t) for t in v] if isinstance(v, list) else v

    return {name: copy(value) for name, value in given.items()}


def tensors_of(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results or ())


TENSORS = [
    (name, argument, index)
    for name in library.NAMES
    for argument, value in sound(name).items()
    if isinstance(value, Tensor | list)
    for index in (range(len(value)) if isinstance(value, list) else [None])
]


@pytest.mark.parametrize(("name", "argument", "index"), TENSORS)
def test_one_tensor_on_another_device(name, argument, index):
    """The dispatcher then takes the fake kernel, whose results for real tensors would be uninitialised memory."""
    given = copied(sound(name), "cpu")
    if len(tensors_of([v for v in given.values() if isinstance(v, Tensor)])) == 1 and index is None:
        return  # alone there is no other device
    if index is None:
        given[argument] = given[argument].to("meta")
    else:
        given[argument][index] = given[argument][index].to("meta")
        argument = f"{argument}[{index}]"
    with pytest.raises(ValueError, match=rf"^{name}: .*\bdevice of ") as caught:
        library.operation(name)(*given.values())
    assert argument in str(caught.value) and "meta" in str(caught.value)


@pytest.mark.parametrize("name", library.NAMES)
def test_sound_arguments_give_the_same_shapes_on_meta(name):
    real, fake = (tensors_of(library.operation(name)(*copied(sound(name), d).values())) for d in ("cpu", "meta"))
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]


def others(argument: str, value: Any) -> list[Any]:
    """Values to put in the place of a sound one; most of them are wrong."""
    if isinstance(value, list):
        first = [[v, *value[1:]] for v in others(argument, value[0])]
        return [[], value[:1], [*value, value[0]], None, *first, *([value[0], v] for v in others(argument, value[1]))]
    if isinstance(value, Tensor):
        dtypes = torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool
        shapes = (
            [value[None], value[:0], value[:1], value.flatten(), value.repeat_interleave(2, 0)] if value.dim() else []
        )
        return [None, 1.0, *(value.to(d) for d in dtypes), *shapes, value.new_zeros(()), value.new_zeros(3), value.new_zeros(1, 1),
                value.new_zeros(3, 0)]  # fmt: skip
    if isinstance(value, bool):
        return [None, "x"]
    if isinstance(value, int):
        return [None, 4.5, -1, 0, 1, 2, 6, 9, 99, 2**24 + 1, -(2**24) - 1]
    return (
        ["spatial", "direct", "none", "x", None, 1]
        if isinstance(value, str)
        else [None, -1.0, 0.0, 1.0, 9.0, NAN, INF, -INF]
    )


def refusal(name: str, given: Given) -> tuple[type, str] | None:
    try:
        library.operation(name)(*given.values())
    except (TypeError, ValueError) as error:
        found = re.match(rf"{name}: ([a-z_]+)(\[\d+\])?", str(error))
        assert found, error
        return type(error), found[1]
    return None


@pytest.mark.parametrize("name", library.NAMES)
def test_the_fake_kernel_refuses_what_the_kernel_refuses(name):
    start, differ, refused = sound(name), [], 0
    for argument, value in start.items():
        for i, other in enumerate(others(argument, value)):
            if name == "fake_quant_weights" and other == []:
                continue  # there is nothing to dispatch on; ops.fake_quant_weights takes it
            given = start | {argument: other}
            real, fake = (refusal(name, copied(given, device)) for device in ("cpu", "meta"))
            refused += real is not None
            # A change of the tensor that the others go with makes all of them wrong: either of them may be the one named.
            same = real == fake or (argument in ("x", "student") and real and fake)
            differ += [] if same else [(argument, i, real, fake)]
    assert differ == [] and refused > 5


Q = torch.ones(())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: ops.fake_quant_act(x, Q, Q, 4.5), TypeError, "fake_quant_act: bits must be of type int, got float"),
        (lambda x: ops.fake_quant_act(x, 0.0, Q, 4), TypeError, "fake_quant_act: lo must be of type Tensor, got float"),
        (lambda x: ops.fake_quant_weight(None, 4), TypeError, "fake_quant_weight: weight must be of type Tensor, got None"),
        (lambda x: ops.fake_quant_weights([x, None], 4), TypeError, r"fake_quant_weights: weights\[1\] must .*, got None"),
        (lambda x: ops.feature_alignment(x, x, None), TypeError, "feature_alignment: kind must be of type str, got None"),
        (lambda x: ops.sign_perturb(x, x, None), TypeError, "sign_perturb: epsilon must be of type float, got None"),
        (lambda x: ops.distillation_loss(None), TypeError, "distillation_loss: student must be of type Tensor, got None"),
        (lambda x: ops.fake_quant_weights([], 99), ValueError, "fake_quant_weights: bits must be 2 to 8, got 99"),
        (lambda x: ops.fake_quant_act_running(x, Q, Q, Q.clone(), 4), ValueError, "running: lo, hi and beta_t .* one twice"),
        (
            lambda x: ops.fake_quant_act_running(x, Q.clone(), Q.clone().requires_grad_(), Q.clone(), 4),
            ValueError,
            "fake_quant_act_running: lo, hi and beta_t .* must not require grad",
        ),
        (lambda x: ops.bn_act_fake_quant(x, nn.BatchNorm2d(3), Q - 1, Q, 4), ValueError, "norm must be in eval mode"),
        (lambda x: step([x, x], [x, x], [x.clone(), x.clone()]), ValueError, "gi_sgd_: weights and momenta .* one twice"),
        (lambda x: ops.fake_quant_weights(x, 4), TypeError, "weights must be a sequence of tensors, got Tensor"),
        (lambda x: ops.fake_quant_weights(None, 4), TypeError, "weights must be a sequence of tensors, got NoneType"),
        (lambda x: ops.fake_quant_weights([], 4.5), TypeError, "fake_quant_weights: bits must be of type int, got float"),
        (lambda x: step(x, [x], [x]), TypeError, "gi_sgd_: weights must be a sequence of tensors, got Tensor"),
        (lambda x: ops.bn_act_fake_quant(x, None, Q - 1, Q, 4), TypeError, "norm must be a batch norm, got NoneType"),
        (lambda x: ops.bn_act_fake_quant(x, nn.GroupNorm(3, 3), Q - 1, Q, 4), TypeError, "norm must be .* got GroupNorm"),
        (lambda x: ops.bn_act_fake_quant(x, nn.BatchNorm2d(3, eps=INF).eval(), Q - 1, Q, 4), ValueError, "eps must be finite"),
        (lambda x: ops.distillation_loss(x[0, 0], x[0, 1], kd_weight=INF), ValueError, "kd_weight must be finite, got inf"),
        (lambda x: step([x], [x], [x.view(3, 2, 4, 4)]), ValueError, r"momenta\[0\] must have shape"),
        (lambda x: step([x[:1]], [x[:1]], [x[:1]]), ValueError, "weights and momenta must not share memory"),
        (lambda x: step([x.flatten()[:40], x.flatten()[20:60]], [torch.ones(40)] * 2, [torch.zeros(40), torch.zeros(40)]),
         ValueError, "weights and momenta must not share memory"),
        (lambda x: step([x], [x], [x]), ValueError, "gi_sgd_: weights and momenta .* one twice"),
    ],
)  # fmt: skip
def test_refused_before_the_kernel(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(2, 3, 4, 4))


def test_states_that_share_memory_are_refused(device):
    state = torch.ones(2, device=device)
    with pytest.raises(ValueError, match="fake_quant_act_running: lo, hi and beta_t must be different tensors"):
        ops.fake_quant_act_running(torch.randn(4, device=device), state[:1], state[:1], state[1:], 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.fake_quant_weight(x, 4),
        lambda x: ops.fake_quant_weights([x, x], 4)[1],
        lambda x: ops.fake_quant_act(x, Q - 1, Q, 4),
        lambda x: ops.fake_quant_act(x, Q - 1, Q, 4, ste="clip"),
        lambda x: ops.fake_quant_act_running(x, Q.clone(), Q.clone(), Q.clone(), 4),
        lambda x: ops.fake_quant_learned(x, Q, -8, 7, 0.1),
        lambda x: ops.bn_act_fake_quant(x, nn.BatchNorm2d(3).eval(), Q - 1, Q, 4),
        lambda x: ops.bn_stats_match(x, torch.zeros(3), torch.ones(3)),
        lambda x: ops.distillation_loss(x[0, 0], x[0, 1]),
        lambda x: ops.feature_alignment(x, x + 1),
        lambda x: ops.sign_perturb(x, x, 0.1),
    ],
)
def test_forward_mode_raises_instead_of_a_zero_tangent(call):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (x,), (x,))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (x,), (x,))


def step(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
    n = len(weights)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0, "bits": 4, "threshold": 0.01}
    ops.gi_sgd_(weights, grads, momenta, torch.zeros(n), torch.zeros(n, dtype=torch.int64), **options)


def test_compiling_refuses_too():
    with pytest.raises(Exception, match="fake_quant_weight: bits must be 2 to 8, got 99"):
        torch.compile(lambda w: ops.fake_quant_weight(w, 99), backend="aot_eager", fullgraph=True)(torch.randn(2, 3))
