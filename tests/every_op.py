"""Each operation once, forward and backward, on tensors big enough for several blocks and threads: for what must hold of all of them.

Also a program for compute-sanitizer: `python tests/every_op.py cuda`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zsq_fast import ops

Inputs = dict[str, Tensor]
SHAPE = (9, 24, 23, 23)  # odd, more than one block and, on the CPU, more than one chunk of work per thread


def inputs(device: str, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Inputs:
    rng = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def values(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(device, kind)

    made = {name: values(*SHAPE) for name in ("x", "other", "grad")}
    if channels_last:
        made = {name: t.contiguous(memory_format=torch.channels_last) for name, t in made.items()}
    made |= {name: values(24, kind=wide) for name in ("mean", "weight", "bias")}
    made |= {
        "var": values(24, kind=wide).abs() + 0.5,
        "lo": values(kind=wide).abs() - 1,
        "hi": values(kind=wide).abs() + 2,
    }
    made |= {
        "beta_t": torch.ones((), device=device, dtype=wide),
        "state_lo": torch.zeros((), device=device, dtype=wide),
    }
    made |= {"state_hi": torch.ones((), device=device, dtype=wide)}
    made |= {f"w{i}": values(*shape) for i, shape in enumerate([(16, 3, 3, 3), (40, 24, 3, 3), (70, 9), (3, 4700)])}
    made |= {"logits": values(33, 100), "teacher": values(33, 100), "step": values(9, kind=wide).abs() + 0.1}
    made["target"] = torch.randint(0, 100, (33,), generator=rng).to(device)
    weights = [values(*s, kind=torch.float32) for s in ((16, 27), (40, 216), (2, 6000))]
    for i, w in enumerate(weights):
        made |= {f"gi_w{i}": w, f"gi_g{i}": 1e-3 * w.flip(0), f"gi_v{i}": 1e-3 * w.roll(1, 0)}
    made |= {"kappa": torch.zeros(3, device=device), "changed": torch.zeros(3, device=device, dtype=torch.int64)}
    return made


def _with_grad(call: Callable[..., Tensor], grad: Tensor | None, *wanted: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in wanted]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def _norm(t: Inputs) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(24).to(t["mean"]).eval()
    norm.running_mean, norm.running_var = t["mean"], t["var"]
    norm.weight, norm.bias = nn.Parameter(t["weight"]), nn.Parameter(t["bias"])
    return norm


def _bn_act(t: Inputs) -> list[Tensor]:
    norm = _norm(t)
    x, residual = (t[name].detach().requires_grad_() for name in ("x", "other"))
    out = ops.bn_act_fake_quant(x, norm, t["lo"], t["hi"], 4, activation="relu6", residual=residual, ste="clip")
    return [out, *torch.autograd.grad(out, [x, residual, norm.weight, norm.bias], t["grad"])]


def _bn_sums(t: Inputs) -> list[Tensor]:
    x = t["x"].detach().requires_grad_()
    y, sums = ops.bn_eval_sums(x, t["mean"], t["var"], t["weight"], t["bias"])
    loss = ops.bn_stats_loss(sums, t["var"], x.numel() // 24)
    return [y, sums, loss, *torch.autograd.grad([y, loss], [x], [t["grad"], None])]


def _inundation(t: Inputs) -> list[Tensor]:
    w, g, v = ([t[f"gi_{kind}{i}"] for i in range(3)] for kind in "wgv")
    ops.gi_sgd_(
        w,
        g,
        v,
        t["kappa"],
        t["changed"],
        lr=1e-2,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        bits=4,
        threshold=1e-2,
    )
    return [*w, *v, t["kappa"], t["changed"]]


def _running_at_once(t: Inputs) -> list[Tensor]:
    """Large enough for one cooperative launch on CUDA (2 MB and more of whatever type)."""
    x, state = t["x"].repeat(10, 1, 1, 1), [t[name].clone() for name in ("state_lo", "state_hi", "beta_t")]
    return [ops.fake_quant_act_running(x, *state, 4), *state]


def _inundation_of_long_rows(t: Inputs) -> list[Tensor]:
    """Rows that no block holds in its shared memory, without decay, and more tensors than a small argument table has room for."""
    long = [t[f"gi_{kind}2"].repeat(1, 3) for kind in "wgv"]
    many = [[each[:1, :9].clone() for each in long] for _ in range(90)]
    w, g, v = ([long[i], *(each[i] for each in many)] for i in range(3))
    kappa = torch.zeros(len(w), device=w[0].device)
    changed = torch.zeros(len(w), device=w[0].device, dtype=torch.int64)
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "bits": 3, "threshold": 1e-2}
    ops.gi_sgd_(w, g, v, kappa, changed, guaranteed=True, **options)
    return [w[0], v[0], kappa, changed]


EVERY_OP: dict[str, Callable[[Inputs], list[Tensor]]] = {
    "fake_quant_weight": lambda t: _with_grad(lambda w: ops.fake_quant_weight(w, 4), t["w1"], t["w1"]),
    "fake_quant_weights": lambda t: ops.fake_quant_weights([t[f"w{i}"] for i in range(4)], 3),
    "weight_codes": lambda t: list(ops.weight_codes(t["w1"], 4)),
    "fake_quant_act": lambda t: _with_grad(lambda x: ops.fake_quant_act(x, t["lo"], t["hi"], 4), t["grad"], t["x"]),
    "fake_quant_act_clip": lambda t: _with_grad(
        lambda x: ops.fake_quant_act(x, t["lo"], t["hi"], 4, ste="clip"), t["grad"], t["x"]
    ),
    "fake_quant_act_running": lambda t: [
        ops.fake_quant_act_running(t["x"], t["state_lo"], t["state_hi"], t["beta_t"], 4),
        t["state_lo"], t["state_hi"], t["beta_t"],
    ],
    "track_range_": lambda t: [
        ops.fake_quant_act_running(t["x"], t["state_lo"], t["state_hi"], t["beta_t"], 4, ste="clip"),
        t["state_lo"], t["state_hi"], t["beta_t"],
    ],
    "fake_quant_learned": lambda t: _with_grad(
        lambda x, step: ops.fake_quant_learned(x, step, -8, 7, 0.01), t["grad"], t["x"], t["step"]
    ),
    "bn_stats_match": lambda t: _with_grad(lambda x: ops.bn_stats_match(x, t["mean"], t["var"]), None, t["x"]),
    "bn_eval_sums": _bn_sums,
    "bn_act_fake_quant": _bn_act,
    "distillation_loss": lambda t: _with_grad(
        lambda z: ops.distillation_loss(z, t["teacher"], t["target"], gamma=2.0)[0], None, t["logits"]
    ),
    **{
        f"feature_alignment_{kind}": lambda t, kind=kind: _with_grad(
            lambda a, b: ops.feature_alignment(a, b, kind), None, t["x"], t["other"]
        )
        for kind in ("channel", "spatial", "direct")
    },
    "sign_perturb": lambda t: [ops.sign_perturb(t["x"], t["grad"], 0.01)],
    "gi_sgd_": _inundation,
    "fake_quant_act_running, large": _running_at_once,
    "gi_sgd_, long rows": _inundation_of_long_rows,
}  # fmt: skip


if __name__ == "__main__":
    device = sys.argv[1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for channels_last in (False, True):
            for name, run in EVERY_OP.items():
                assert all(
                    t.isfinite().all() for t in run(inputs(device, dtype, channels_last)) if t.is_floating_point()
                ), name
    print(f"{len(EVERY_OP)} operations ran on {device}")
