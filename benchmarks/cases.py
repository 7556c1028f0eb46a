"""What is timed: each kernel at a named size, and what it stands against.

Variants of a case: `kernel` (ours), `reference` (plain PyTorch as the research code writes it), `aten` (the best chain of PyTorch's
own operations; its quantizers are given their range), `compile` (torch.compile of the reference) and `copy` (`Tensor.copy_` of the
largest tensor into a buffer that is there). Everybody runs with PyTorch's allocator as it is; ours keep the memory of their results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zsq_fast as zsq
from benchmarks.shapes import ACTIVATIONS, LOGITS, NETWORKS, WEIGHTS, Shape
from zsq_fast import reference
from zsq_fast.models.resnet_cifar import ResNetCifar

Call = Callable[[], Any]


@dataclass
class Case:
    name: str
    size: int  # bytes that the kernel has to move between memory and processor
    copied: int  # bytes that `copy` reads and writes
    variants: dict[str, Call]
    gates: dict[str, float] = field(
        default_factory=dict
    )  # least `variant time / kernel time`, on two CPU cores or, GPU_CASES, an H200
    moonshots: dict[str, float] = field(default_factory=dict)
    before: Call = lambda: None  # not timed


class _Straight(torch.autograd.Function):
    """Reference activation quantizer with the identity straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
        return reference.fake_quant_act(x, lo, hi, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None, None


def compiled(function: Callable[..., Any], *args: Any) -> Call:
    """torch.compile of the function, compiled at the first call."""
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: fast(*args)


def gradients(loss: Callable[..., Tensor], inputs: list[Tensor], outgoing: Tensor | None = None) -> Call:
    return lambda: torch.autograd.grad(loss(), inputs, outgoing)


def weight_case(device: str, shape: Shape = (512, 512, 3, 3), where: str = "") -> Case:
    w = torch.randn(shape, device=device)
    spare = torch.empty_like(w)
    rows = w.flatten(1)
    scale = ((rows.amax(1) - rows.amin(1)) / 15).clamp(min=1e-8)
    zero = torch.zeros_like(scale)
    return Case(
        f"weight range + fake quantization, {f'{where}, ' if where else ''}{'x'.join(map(str, shape))}",
        8 * w.numel(),
        8 * w.numel(),
        {
            "kernel": lambda: zsq.ops.fake_quant_weight(w, 4),
            "reference": lambda: reference.fake_quant_weight(w, 4),
            "aten": lambda: torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -8, 7),
            "compile": compiled(reference.fake_quant_weight, w, 4),
            "copy": lambda: spare.copy_(w),
        },
        {"reference": 12, "aten": 12, "compile": 1.6},
        {"reference": 20, "compile": 2.2, "copy": 1 / 1.2},
    )


def network_weights_case(device: str, network: str = "ResNet-20") -> Case:
    if network == "ResNet-20":
        layers = [m for m in ResNetCifar(shortcut="B").modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        weights = [m.weight.detach().to(device) for m in layers]
    else:
        weights = [torch.randn(shape, device=device) * 0.02 for shape in NETWORKS[network]]
    spares = [torch.empty_like(w) for w in weights]
    scales = [((w.flatten(1).amax(1) - w.flatten(1).amin(1)) / 15).clamp(min=1e-8) for w in weights]
    zeros = [torch.zeros_like(scale) for scale in scales]

    def theirs() -> list[Tensor]:
        return [reference.fake_quant_weight(w, 4) for w in weights]

    def aten() -> list[Tensor]:
        found = zip(weights, scales, zeros, strict=True)
        return [torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -8, 7) for w, scale, zero in found]

    return Case(
        f"{len(weights)} {network} weights in one call",
        8 * sum(w.numel() for w in weights),
        8 * sum(w.numel() for w in weights),
        {
            "kernel": lambda: zsq.ops.fake_quant_weights(weights, 4),
            "reference": theirs,
            "aten": aten,
            "compile": compiled(theirs),
            "copy": lambda: torch._foreach_copy_(spares, weights),
        },
        {"reference": 30},
        {"reference": 100},
    )


def codes_case(device: str, shape: Shape = (512, 512, 3, 3)) -> Case:
    w = torch.randn(shape, device=device)
    spare = torch.empty_like(w)
    return Case(
        f"integer codes of a weight, {'x'.join(map(str, shape))}",
        8 * w.numel(),
        8 * w.numel(),
        {
            "kernel": lambda: zsq.ops.weight_codes(w, 4),
            "reference": lambda: reference.weight_codes(w, 4),
            "compile": compiled(reference.weight_codes, w, 4),
            "copy": lambda: spare.copy_(w),
        },
    )


BATCH_200 = (200, 64, 32, 32)  # 52 MB


def _activation(
    device: str, shape: Shape = BATCH_200, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape, device=device).relu().to(dtype)
    return x, torch.tensor(0.0, device=device), torch.tensor(3.0, device=device)


def _what(x: Tensor, where: str = "") -> str:
    """How a case names its tensor: the layer, if it is one's, or the size; and what differs from the usual."""
    name = where or f"{x.nbytes / 1e6:.0f} MB"
    name += "" if x.dtype == torch.float32 else f", {str(x.dtype).removeprefix('torch.')}"
    return name + (", channels_last" if not x.is_contiguous() else "")


def act_case(device: str, shape: Shape = BATCH_200, where: str = "", dtype: torch.dtype = torch.float32) -> Case:
    x, lo, hi = _activation(device, shape, dtype)
    spare = torch.empty_like(x)
    return Case(
        f"activation fake quantization, frozen range, {_what(x, where)}",
        2 * x.nbytes,
        2 * x.nbytes,
        {
            "kernel": lambda: zsq.ops.fake_quant_act(x, lo, hi, 4),
            "reference": lambda: reference.fake_quant_act(x, lo, hi, 4),
            "aten": lambda: torch.fake_quantize_per_tensor_affine(x, 0.2, 0, 0, 15),
            "compile": compiled(reference.fake_quant_act, x, lo, hi, 4),
            "copy": lambda: spare.copy_(x),
        },
        {"aten": 8, "reference": 10, "compile": 2},
        {"aten": 15, "reference": 20, "compile": 4},
    )


def running_case(device: str, shape: Shape = BATCH_200, where: str = "") -> Case:
    x, *_ = _activation(device, shape)
    spare = torch.empty_like(x)
    states = [[torch.tensor(v, device=device) for v in (0.0, 3.0, 0.5)] for _ in range(3)]
    switch = torch.ones(1, dtype=torch.int64, device=device)
    observed = [torch.tensor([v], device=device) for v in (0.0, 3.0, 0.2)]  # smallest, largest, scale
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return Case(
        f"activation fake quantization, running range, {_what(x, where)}",
        12 * x.numel(),
        8 * x.numel(),
        {
            "kernel": lambda: zsq.ops.fake_quant_act_running(x, *states[0], 4),
            "reference": lambda: reference.fake_quant_act_running(x, *states[1], 4, 0.9, False),
            "aten": lambda: torch.fused_moving_avg_obs_fake_quant(x, switch, switch, *observed, zero, 0.1, 0, 15, 0),
            "compile": compiled(reference.fake_quant_act_running, x, *states[2], 4, 0.9, False),
            "copy": lambda: spare.copy_(x),
        },
    )


def clip_case(device: str, shape: Shape = BATCH_200, where: str = "") -> Case:
    x, lo, hi = _activation(device, shape)
    x.requires_grad_()
    g, spare, fixed = torch.randn_like(x), torch.empty_like(x), x.detach()

    def theirs(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        inside = reference.fake_quant.not_clamped(x, lo, hi, 4)
        return reference.fake_quant_act(x, lo, hi, 4), torch.where(inside, g, 0.0)

    return Case(
        f"activation fake quantization, clip estimator, forward + backward, {_what(x, where)}",
        int(16.25 * x.numel()),
        8 * x.numel(),
        {
            "kernel": gradients(lambda: zsq.ops.fake_quant_act(x, lo, hi, 4, ste="clip"), [x], g),
            "reference": lambda: theirs(fixed, g),
            "aten": gradients(lambda: torch.fake_quantize_per_tensor_affine(x, 0.2, 0, 0, 15), [x], g),
            "compile": compiled(theirs, fixed, g),
            "copy": lambda: spare.copy_(fixed),
        },
    )


def _statistics_loss(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    batch_var, batch_mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
    return F.mse_loss(batch_mean, mean) + F.mse_loss(batch_var, var)


def bn_sums_case(device: str, shape: Shape = BATCH_200, where: str = "") -> Case:
    x, *_ = _activation(device, shape)
    x.requires_grad_()
    g, spare = torch.randn_like(x), torch.empty_like(x)
    mean, var, weight, bias = (torch.rand(shape[1], device=device) + 0.5 for _ in range(4))
    count = x.numel() // shape[1]

    def ours() -> tuple[Tensor, Tensor]:
        y, sums = zsq.ops.bn_eval_sums(x, mean, var, weight, bias)
        return y, zsq.ops.bn_stats_loss(sums, var, count)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x - mean.view(-1, 1, 1)) * (weight / (var + 1e-5).sqrt()).view(-1, 1, 1) + bias.view(-1, 1, 1)
        return y, reference.bn_stats_match(x, mean, var)[0]

    def aten() -> tuple[Tensor, Tensor]:
        return F.batch_norm(x, mean, var, weight, bias), _statistics_loss(x, mean, var)

    fast = torch.compile(theirs, fullgraph=True, dynamic=False)
    chains: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "kernel": ours,
        "reference": lambda: theirs(x),
        "aten": aten,
        "compile": lambda: fast(x),
    }
    variants = {name: (lambda run=run: torch.autograd.grad(run(), [x], [g, None])) for name, run in chains.items()}
    return Case(
        f"BN-eval, its statistics and their loss, forward + backward, {_what(x, where)}",
        20 * x.numel(),  # read x, write y; read the gradient and x, write the gradient
        8 * x.numel(),
        {**variants, "copy": lambda: spare.copy_(x.detach())},
    )


def bn_stats_case(device: str, channels_last: bool = False, shape: Shape = BATCH_200, where: str = "") -> Case:
    x, *_ = _activation(device, shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    spare, mean, var = torch.empty_like(x), torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    def theirs(x: Tensor) -> Tensor:
        return reference.bn_stats_match(x, mean, var)[0]

    fast = torch.compile(theirs, fullgraph=True, dynamic=False)
    return Case(
        f"BN-statistics loss, forward + backward, {_what(x, where)}",
        12 * x.numel(),
        8 * x.numel(),
        {
            "kernel": gradients(lambda: zsq.ops.bn_stats_match(x, mean, var), [x]),
            "reference": gradients(lambda: theirs(x), [x]),
            "aten": gradients(lambda: _statistics_loss(x, mean, var), [x]),
            "compile": gradients(lambda: fast(x), [x]),
            "copy": lambda: spare.copy_(x.detach()),
        },
        {"reference": 12, "compile": 2.5},
        {"reference": 18, "compile": 4},
    )


def residual_case(device: str, shape: Shape = BATCH_200) -> Case:
    """The end of a residual block: BN + addition + ReLU + fake quantization."""
    x, lo, hi = _activation(device, shape)
    x, residual, g = (torch.randn_like(x) for _ in range(3))
    inputs = [x.requires_grad_(), residual.requires_grad_()]
    spare, norm = torch.empty_like(x), nn.BatchNorm2d(shape[1]).eval().to(device).requires_grad_(False)

    def chain(x: Tensor, residual: Tensor) -> Tensor:
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return _Straight.apply(F.relu(y + residual), lo, hi, 4)

    def aten() -> Tensor:
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return torch.fake_quantize_per_tensor_affine(F.relu_(y.add_(residual)), 0.2, 0, 0, 15)

    fast = torch.compile(chain, fullgraph=True, dynamic=False)
    return Case(
        f"BN + addition + ReLU + fake quantization, forward + backward, {_what(x)}",
        int(24.25 * x.numel()),
        8 * x.numel(),
        {
            "kernel": gradients(lambda: zsq.ops.bn_act_fake_quant(x, norm, lo, hi, 4, residual=residual), inputs, g),
            "reference": gradients(lambda: chain(*inputs), inputs, g),
            "aten": gradients(aten, inputs, g),
            "compile": gradients(lambda: fast(*inputs), inputs, g),
            "copy": lambda: spare.copy_(x.detach()),
        },
    )


def bn_act_case(
    device: str,
    channels_last: bool = False,
    shape: Shape = BATCH_200,
    where: str = "",
    part: str = "forward + backward",
) -> Case:
    """`part`: "forward", "backward" (of a forward pass that is not timed), or both."""
    x, lo, hi = _activation(device, shape)
    x = torch.randn_like(x)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(part != "forward")
    g, spare = torch.randn_like(x), torch.empty_like(x)
    norm = nn.BatchNorm2d(shape[1]).eval().to(device).requires_grad_(part != "forward")
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    inputs = [x, norm.weight, norm.bias]

    def chain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, eps=norm.eps)
        return _Straight.apply(F.relu(y), lo, hi, 4)

    def aten() -> Tensor:
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return torch.fake_quantize_per_tensor_affine(F.relu(y), 0.2, 0, 0, 15)

    fast = torch.compile(chain, fullgraph=True, dynamic=False)
    chains: dict[str, Callable[[], Tensor]] = {
        "kernel": lambda: zsq.ops.bn_act_fake_quant(x, norm, lo, hi, 4),
        "reference": lambda: chain(*inputs),
        "aten": aten,
        "compile": lambda: fast(*inputs),
    }
    variants: dict[str, Call]
    if part == "forward":
        variants = dict(chains)
    elif part == "backward":
        chains.pop("compile")  # its graph cannot be kept
        outs = {name: run() for name, run in chains.items()}
        variants = {
            name: lambda out=out: torch.autograd.grad(out, inputs, g, retain_graph=True) for name, out in outs.items()
        }
    else:
        variants = {name: gradients(run, inputs, g) for name, run in chains.items()}
    bytes_each = {"forward": 8 if part == "forward" else 8.125, "backward": 12.125}
    size = sum(count for name, count in bytes_each.items() if name in part)
    affine = "" if part == "forward" else " with affine gradients"
    return Case(
        f"BN + ReLU + fake quantization, {part}{affine}, {_what(x, where)}",
        int(size * x.numel()),
        8 * x.numel(),
        {**variants, "copy": lambda: spare.copy_(x.detach())},
        {"reference": 10, "aten": 10, "compile": 3},
        {"reference": 16, "compile": 4.5},
    )


def learned_case(device: str, shape: Shape = (512, 512, 3, 3), where: str = "") -> Case:
    w = torch.randn(shape, device=device, requires_grad=True)
    step = torch.full(shape[:1], 0.3, device=device, requires_grad=True)
    g, spare, zero = torch.randn_like(w), torch.empty_like(w), torch.zeros(shape[0], device=device)
    fixed = (w.detach(), step.detach(), -8, 7, 1.0)

    def theirs(*fixed: Any) -> tuple[Tensor, ...]:
        return reference.fake_quant_learned(*fixed), *reference.fake_quant_learned_backward(g, *fixed)

    return Case(
        f"learned step sizes, forward + backward, {f'{where}, ' if where else ''}{'x'.join(map(str, shape))}",
        20 * w.numel(),
        8 * w.numel(),
        {
            "kernel": gradients(lambda: zsq.ops.fake_quant_learned(w, step, -8, 7), [w, step], g),
            "reference": lambda: theirs(*fixed),
            "aten": gradients(
                lambda: torch._fake_quantize_learnable_per_channel_affine(w, step, zero, 0, -8, 7, 1.0), [w, step], g
            ),
            "compile": compiled(theirs, *fixed),
            "copy": lambda: spare.copy_(w.detach()),
        },
    )


def distillation_case(device: str, shape: Shape = (200, 10), where: str = "") -> Case:
    student, teacher = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
    target = torch.randint(0, shape[1], shape[:1], device=device)

    def theirs(student: Tensor) -> Tensor:
        kd = F.kl_div(F.log_softmax(student / 20, 1), F.log_softmax(teacher / 20, 1), reduction="mean", log_target=True)
        return 400 * kd + F.cross_entropy(student, target)

    fast = torch.compile(theirs, fullgraph=True, dynamic=False)
    return Case(
        f"distillation + cross entropy, forward + backward, {f'{where}, ' if where else ''}{'x'.join(map(str, shape))}",
        12 * student.numel(),
        0,
        {
            "kernel": gradients(lambda: zsq.ops.distillation_loss(student, teacher, target)[0], [student]),
            "reference": gradients(lambda: theirs(student), [student]),
            "compile": gradients(lambda: fast(student), [student]),
        },
    )


def hard_case(device: str, shape: Shape = (200, 1000)) -> Case:
    logits, target = torch.randn(shape, device=device, requires_grad=True), torch.arange(shape[0], device=device)
    target %= shape[1]

    def theirs(logits: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, 1).gather(1, target[:, None])
        return ((1 - log_p.exp()).square() * -log_p).mean()

    fast = torch.compile(theirs, fullgraph=True, dynamic=False)
    return Case(
        f"hard-sample cross entropy, forward + backward, {'x'.join(map(str, shape))}",
        8 * logits.numel(),
        0,
        {
            "kernel": gradients(lambda: zsq.ops.distillation_loss(logits, None, target, gamma=2.0)[0], [logits]),
            "reference": gradients(lambda: theirs(logits), [logits]),
            "compile": gradients(lambda: fast(logits), [logits]),
        },
    )


def alignment_case(
    device: str, shape: Shape = (64, 64, 32, 32), where: str = "", kind: str = "channel", channels_last: bool = False
) -> Case:
    student, teacher = (torch.randn(shape, device=device) for _ in range(2))
    if channels_last:
        student, teacher = (t.to(memory_format=torch.channels_last) for t in (student, teacher))
    student.requires_grad_()
    spare = torch.empty_like(student)

    def theirs(student: Tensor) -> Tensor:
        if kind == "direct":
            return F.mse_loss(student, teacher)
        over = {"channel": (2, 3), "spatial": 1}[kind]
        maps = (F.normalize(f.square().mean(over).flatten(1), dim=1) for f in (student, teacher))
        return F.mse_loss(*maps)

    fast = torch.compile(theirs, fullgraph=True, dynamic=False)
    return Case(
        f"{kind} {'' if kind == 'direct' else 'attention '}alignment, forward + backward, {_what(student, where)}",
        (20 if kind == "direct" else 16) * student.numel(),
        8 * student.numel(),
        {
            "kernel": gradients(lambda: zsq.ops.feature_alignment(student, teacher, kind), [student]),
            "reference": gradients(lambda: theirs(student), [student]),
            "compile": gradients(lambda: fast(student), [student]),
            "copy": lambda: spare.copy_(student.detach()),
        },
    )


def perturb_case(device: str, shape: Shape = BATCH_200, where: str = "") -> Case:
    x, g = (torch.randn(shape, device=device) for _ in range(2))
    spare = torch.empty_like(x)
    return Case(
        f"sign perturbation, {_what(x, where)}",
        12 * x.numel(),
        8 * x.numel(),
        {
            "kernel": lambda: zsq.ops.sign_perturb(x, g, 0.01),
            "reference": lambda: reference.sign_perturb(x, g, 0.01),
            "aten": lambda: torch.add(x, torch.sign(g), alpha=0.01),
            "compile": compiled(reference.sign_perturb, x, g, 0.01),
            "copy": lambda: spare.copy_(x),
        },
    )


def _inundation(name: str, weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> Case:
    kappa = weights[0].new_zeros(len(weights))
    changed = torch.zeros(len(weights), dtype=torch.int64, device=kappa.device)
    start, start_momenta = [w.clone() for w in weights], [m.clone() for m in momenta]
    options = dict(
        lr=1e-4, momentum=0.9, nesterov=True, weight_decay=0.0, bits=4, threshold=1e-3, search_steps=5, capped=False
    )

    def restore() -> None:
        torch._foreach_copy_(weights, start)
        torch._foreach_copy_(momenta, start_momenta)

    return Case(
        name,
        20 * sum(w.numel() for w in weights),
        16 * sum(w.numel() for w in weights),
        {
            "kernel": lambda: zsq.ops.gi_sgd_(weights, grads, momenta, kappa, changed, **options),
            "reference": lambda: reference.gi_sgd_(weights, grads, momenta, kappa, changed, **options),
            "copy": restore,
        },
        {"reference": 25},
        {"reference": 60},
        restore,
    )


def inundation_case(device: str) -> Case:
    w = torch.randn(512, 512, 3, 3, device=device) * 0.02
    grads = [1e-3 * torch.randn_like(w)]  # a dozen candidates, as in training; at 1 the first would do
    return _inundation("gradient inundation, 2.4 M weights in one tensor", [w], grads, [torch.randn_like(w) * 1e-3])


def network_inundation_case(device: str) -> Case:
    """The inundation part of one AIT student step; gradients from a real step on a network with batch-norm statistics."""
    torch.manual_seed(0)
    teacher = ResNetCifar(shortcut="B").eval().to(device, memory_format=torch.channels_last)
    student = zsq.convert(teacher, 4, 4, input_size=(3, 32, 32)).to(memory_format=torch.channels_last)
    images = torch.randn(200, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad(), zsq.nn.calibrating(student):
        for _ in range(200):
            student(images[:20])
    weights = list(zsq.nn.quantized_weights(student).values())
    zsq.losses.kd_kl(student(images), teacher(images).detach()).backward()
    grads = [w.grad for w in weights]
    momenta = [0.9 * g for g in grads]
    return _inundation("gradient inundation, ResNet-20, batch 200", [w.detach() for w in weights], grads, momenta)


def weights_inundation_case(device: str, network: str) -> Case:
    """All weights of a network, random; gradients small enough for a dozen candidates."""
    weights = [torch.randn(shape, device=device) * 0.02 for shape in NETWORKS[network]]
    grads, momenta = ([1e-3 * torch.randn_like(w) for w in weights] for _ in range(2))
    return _inundation(f"gradient inundation, {len(weights)} {network} weights", weights, grads, momenta)


Make = Callable[[str], Case]
CASES: list[Make] = [
    weight_case,
    network_weights_case,
    codes_case,
    act_case,
    running_case,
    clip_case,
    bn_stats_case,
    partial(bn_stats_case, channels_last=True),
    bn_sums_case,
    bn_act_case,
    partial(bn_act_case, channels_last=True),
    residual_case,
    learned_case,
    distillation_case,
    hard_case,
    alignment_case,
    partial(alignment_case, kind="spatial"),
    partial(alignment_case, kind="direct"),
    perturb_case,
    inundation_case,
    network_inundation_case,
]


def layer_cases() -> Iterator[Make]:
    """Every kernel at the shapes of real networks; no gates."""
    for where, shape in WEIGHTS.items():
        for make in (weight_case, learned_case):
            yield _ungated(make, shape=shape, where=where)
    for where, shape in ACTIVATIONS.items():
        for make in (act_case, running_case, clip_case, bn_act_case, bn_stats_case, alignment_case):
            yield _ungated(make, shape=shape, where=where)
    for where, shape in LOGITS.items():
        yield _ungated(distillation_case, shape=shape, where=where)
    yield _ungated(perturb_case, shape=(16, 3, 224, 224), where="images of 224 x 224, batch 16")
    for network in NETWORKS:
        yield _ungated(network_weights_case, network=network)
        yield _ungated(weights_inundation_case, network=network)


def _ungated(make: Callable[..., Case], **shape: Any) -> Make:
    def made(device: str) -> Case:
        case = make(device, **shape)
        case.gates, case.moonshots = {}, {}
        return case

    return made


# ---- a GPU's table: tensors beyond its caches, forward and backward apart -----------------------------------------------

STAGE_1 = (256, 64, 64, 64)  # 268 MB
NARROW = (512, 16, 96, 96)  # 302 MB in 16 channels, of which PyTorch's own backward pass makes 16 blocks


def gpu_cases(device: str) -> Iterator[Case]:
    """What is promised for an H200, with its gates: streaming kernels at 85 % of the bandwidth of a copy, or more."""
    streaming = [
        weight_case(device, (2048, 1024, 3, 3)),
        act_case(device, STAGE_1),
        act_case(device, STAGE_1, dtype=torch.bfloat16),
        running_case(device, STAGE_1),
        clip_case(device, STAGE_1),
        learned_case(device, (2048, 1024, 3, 3)),
        perturb_case(device, STAGE_1),
        *(alignment_case(device, STAGE_1, kind=kind) for kind in ("channel", "spatial", "direct")),
        alignment_case(device, STAGE_1, channels_last=True),
        bn_sums_case(device, STAGE_1),
        bn_stats_case(device, shape=STAGE_1),
        bn_stats_case(device, True, STAGE_1),
        bn_act_case(device, True, STAGE_1, part="backward"),
        bn_act_case(device, shape=STAGE_1, part="forward"),
        bn_act_case(device, shape=STAGE_1, part="backward"),
        bn_act_case(device, shape=NARROW, part="forward"),
        bn_act_case(device, shape=NARROW, part="backward"),
    ]
    promised = {"BN-statistics": {"reference": 4.0}, "forward, ": {"aten": 2.8}, "backward with": {"aten": 3.0}}
    for case in streaming:
        case.gates = {"copy": 0.85 * case.copied / case.size}
        case.moonshots = {"copy": 0.92 * case.copied / case.size}
        for part, gates in promised.items():
            if part in case.name:
                case.gates |= gates
        yield case
    weights = network_weights_case(device)
    weights.gates, weights.moonshots = {"aten": 20}, {"aten": 100}
    yield weights
    for case in (network_inundation_case(device), weights_inundation_case(device, "ResNet-50")):
        case.gates, case.moonshots = {"reference": 50}, {"reference": 500 if "ResNet-20" in case.name else 100}
        yield case
