"""What holds of every operation: the same bits for any number of threads and from run to run; on a GPU also in a graph, on a side
stream, and without waiting for the device."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_op import EVERY_OP, inputs

from zsq_fast import ops
from zsq_fast.ops.schemas import SCHEMAS

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = list(EVERY_OP)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


def test_none_is_missing():
    source = inspect.getsource(inspect.getmodule(inputs))
    assert [
        name for name in ops.__all__ if name not in ("backends", "release_memory") and f"ops.{name}(" not in source
    ] == []


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_gives_the_same_bits(name, dtype, channels_last):
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            results.append(EVERY_OP[name](inputs("cpu", dtype, channels_last)))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(results[0], r) for r in results[1:])
    assert all(t.isfinite().all() for t in results[0])


LOSSES = {
    "bn_eval_sums": lambda t, x: ops.bn_eval_sums(x, t["mean"], t["var"])[1].sum(),
    "bn_stats_loss": lambda t, x: ops.bn_stats_loss(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]), t["var"], 4761),
    "bn_stats_match": lambda t, x: ops.bn_stats_match(x, t["mean"], t["var"]),
    "fake_quant_learned": lambda t, x: ops.fake_quant_learned(x, t["step"], -4, 3).square().sum(),
    "feature_alignment": lambda t, x: ops.feature_alignment(x, t["other"]),
}  # fmt: skip


def test_every_backward_pass_is_known_here():
    """bn_act_fake_quant's refusal is tested with its other gradients."""
    passes = {schema.split("(")[0] for schema in SCHEMAS if "_backward(" in schema}
    assert passes == {f"{name}_backward" for name in (*LOSSES, "bn_act_fake_quant")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_not_zero(name, device):
    t = inputs(device, torch.float64)
    x = t["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"zsq::{name}_backward: no second derivative"):
        torch.autograd.grad(LOSSES[name](t, x), x, create_graph=True)


VALUES = (
    "test_ops_bn_act.py::test_values_masks_and_gradients",
    "test_ops_bn_stats.py::test_values_and_gradient_of_the_sums",
    "test_ops_bn_stats.py::test_statistics_loss_of_16_bit",
    "test_ops_learned_step.py::test_values_and_gradients",
    "test_ops_losses.py::test_alignment_values_and_gradients",
    "test_ops_losses.py::test_distillation_values_and_gradients",
    "test_ops_losses.py::test_perturb",
    "test_optim.py::test_equals_the_reference",
)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets_agree_with_the_reference(isa):
    """Forward and backward, in a process that must not use the newest instructions; the fake quantizers: test_ops_fake_quant.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *VALUES]
    environment = os.environ | {"ZSQ_CPU_ISA": isa, "CUDA_VISIBLE_DEVICES": ""}
    # From here, not from the root: -m puts the working directory first, and the source tree there is not what is installed.
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def _state(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    x, lo, hi = t["x"] * 2, t["state_lo"] + 0, t["state_hi"] + 0
    return [ops.fake_quant_act_running(x, lo, hi, t["beta_t"], 4) + 1, lo, hi, t["beta_t"]]


def _track(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    x, state = t["x"] * 2, [t[name] + 0 for name in ("state_lo", "state_hi", "beta_t")]
    return [ops.fake_quant_act_running(x, *state, 4, ste="clip") + 1, *state]


def _inundate(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    w, g, v = ([t[f"gi_{kind}{i}"] for i in range(3)] for kind in "wgv")
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "bits": 4, "threshold": 1e-2}
    ops.gi_sgd_(w, [2 * each for each in g], v, t["kappa"], t["changed"], **options)
    return [w[0] * 2, *w, *v, t["kappa"], t["changed"]]


COMPILED: dict[str, Callable[[dict[str, torch.Tensor]], list[torch.Tensor]]] = {
    "weight_codes": lambda t: [each * 2 for each in ops.weight_codes(t["w1"] * 2, 4)],
    "fake_quant_act_running": _state,
    "track_range_": _track,
    "gi_sgd_": _inundate,
    "spatial": lambda t: [ops.feature_alignment(t["x"] * 2, t["other"], "spatial") * 3],
    "direct": lambda t: [ops.feature_alignment(t["x"] * 2, t["other"], "direct") * 3],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name, device):
    """Those that the tests of their own files do not compile; arguments updated in place included."""
    results = []
    for run in (COMPILED[name], torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")):
        t = inputs(device)
        leaves = [t[key].requires_grad_() for key in ("x", "other")] if name in ("spatial", "direct") else []
        out = run(t)
        results.append([*out, *(torch.autograd.grad(out[0], leaves) if leaves else ())])
    assert equal(*results)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gpu_repeats_without_waiting_for_the_device(name, dtype):
    first = EVERY_OP[name](inputs("cuda", dtype))
    again = inputs("cuda", dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = EVERY_OP[name](again)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(first, second)


@gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_graph_replays_what_eager_computes(name):
    eager = EVERY_OP[name](inputs("cuda"))
    static, start = inputs("cuda"), inputs("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # also shows that a side stream is used
        for _ in range(3):
            EVERY_OP[name](static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = EVERY_OP[name](static)
    for _ in range(2):
        for key, value in start.items():
            static[key].copy_(value)
        graph.replay()
        assert equal(eager, captured)


@gpu
def test_gpu_other_device_is_made_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (EVERY_OP["bn_act_fake_quant"](inputs(f"cuda:{i}")) for i in range(2))
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in there) and equal(here, there)
