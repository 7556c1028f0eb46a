"""The CUDA kernels, run on the CPU by the host executor, against the plain-torch reference and the recorded vectors."""

from __future__ import annotations

import ctypes as c
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_host import toolkit
from cuda_host.bindings import Kernels, as_c, same, shifted

from zsq_fast import reference

SHARED = Path(os.environ.get("ZSQ_SHARED") or toolkit.REPO.parent / "shared")
DTYPES = [torch.float32, torch.float64]


# ---- weights ---------------------------------------------------------------------------------------------------------

ROWS = "1x1 5x9 70x9 3x16 3x27 9x64 2x130 11x144 3x577 2x1024 3x1025 2x4608 2x11400".split()


def check_weight(kernels: Kernels, w: torch.Tensor, bits: int) -> None:
    rows, cols = w.shape
    out, codes = (torch.full_like(w, 7.0) for _ in range(2))
    scale, lo_code = (torch.full((rows,), 7.0, dtype=w.dtype) for _ in range(2))
    kernels("fake_quant_weight", w, out, rows, cols, c.c_int(bits))
    kernels("weight_codes", w, codes, scale, lo_code, rows, cols, c.c_int(bits))
    assert same(out, reference.fake_quant_weight(w, bits))
    for got, expected in zip((codes, scale, lo_code), reference.weight_codes(w, bits), strict=True):
        assert same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_weight(seeded: Kernels, shape: str, dtype: torch.dtype) -> None:
    rows, cols = map(int, shape.split("x"))
    w = torch.randn(rows, cols, dtype=dtype) * torch.logspace(-3, 2, rows, dtype=dtype)[:, None]
    for bits in (2, 4, 8):
        check_weight(seeded, w, bits)
    check_weight(seeded, shifted(w), 3)


def test_weight_special_rows(seeded: Kernels) -> None:
    for cols in (9, 144, 1100, 12000):
        w = torch.randn(7, cols)
        w[0], w[1], w[2, cols // 2], w[3, 0] = 0.0, 3.0, float("nan"), float("inf")
        w[4], w[5] = w[4].abs() + 5, w[5] * 1e-12
        check_weight(seeded, w, 4)
        assert reference.fake_quant_weight(w, 4)[2].isnan().all()


def test_empty_launches_nothing(kernels: Kernels) -> None:
    before, w, one = kernels.lib.zsq_launches(), torch.empty(0), torch.ones(1)
    kernels("fake_quant_weight", w, w, 0, 9, c.c_int(4))
    kernels("fake_quant_weight", w, w, 4, 0, c.c_int(4))
    kernels("fake_quant_act", w, one, one, w, 0, c.c_int(4))
    assert kernels.lib.zsq_launches() == before


def test_weight_recorded(kernels: Kernels) -> None:
    recorded = golden("weight_fake_quant.npz")
    keys = sorted({k.rsplit("_", 1)[0] for k in recorded.files})
    assert keys
    for k in keys:
        w = torch.from_numpy(recorded[k + "_w"])
        rows = w.reshape(w.shape[0], -1).contiguous()
        if rows.numel() > 40_000:
            rows = rows[: max(1, 40_000 // rows.shape[1])].contiguous()
        out, codes, small = torch.empty_like(rows), torch.empty_like(rows), torch.empty(2, rows.shape[0])
        bits = c.c_int(int(k.rsplit("_b", 1)[1]))
        kernels("fake_quant_weight", rows, out, *rows.shape, bits)
        kernels("weight_codes", rows, codes, small[0], small[1], *rows.shape, bits)
        for got, name in ((out, "_dequant"), (codes, "_code")):
            expected = recorded[k + name].reshape(w.shape[0], -1)[: rows.shape[0]]
            assert np.array_equal(got.numpy(), expected), k + name


def golden(name: str):
    if not (SHARED / "golden" / name).exists():
        pytest.skip(f"no recorded vectors: {name} is not in the folder that ZSQ_SHARED names")
    return np.load(SHARED / "golden" / name)


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 255, 4096, 4099, 20_001])
def test_act(seeded: Kernels, n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, dtype=dtype)
    x[n // 3] = float("nan")
    for source in (x, shifted(x)):
        for bits, lo, hi in ((4, 0.0, 1.5), (8, -1.0, 2.0), (2, 0.5, 0.5), (4, 2.0, -1.0)):
            ends = torch.tensor([[lo], [hi]], dtype=dtype)
            out = torch.full_like(source, 7.0)
            seeded("fake_quant_act", source, ends[0], ends[1], out, n, c.c_int(bits))
            assert same(out, reference.fake_quant_act(source, ends[0], ends[1], bits))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1023, 30_011, 300_011])
def test_act_running(seeded: Kernels, n: int, dtype: torch.dtype, plain: bool) -> None:
    got = [torch.tensor([v], dtype=dtype) for v in (9.0, -9.0, 1.0)]  # lo and hi mean nothing before the first update
    expected = [t.clone() for t in got]
    scratch = seeded.workspace("running", got[0].element_size())
    for step in range(4):
        x = torch.randn(n, dtype=dtype) * (step + 1)
        x[n // 2] = float("nan") if step == 3 else 5.0
        out = torch.full_like(x, 7.0)
        seeded("fake_quant_act_running", x, *got, out, n, c.c_int(4), 0.9, plain, as_c(scratch))
        assert same(out, reference.fake_quant_act_running(x, *expected, 4, 0.9, plain)), step
        for a, b in zip(got, expected, strict=True):
            assert same(a, b), step
    assert got[0].isnan().all()


# ---- batch-norm statistics -------------------------------------------------------------------------------------------

BN = "2x3x5 1x1x1 4x16x64 2x5x3000 3x130x49 64x33x1 2x8x4096 700x6x49 3x257x8".split()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", BN)
def test_bn_stats(kernels: Kernels, shape: str, channels_last: bool, dtype: torch.dtype) -> None:
    n, channels, s = map(int, shape.split("x"))
    torch.manual_seed(n * s)
    offset = torch.randn(channels, 1, dtype=dtype)
    x = torch.randn(n, channels, s, dtype=dtype) * 2 + offset
    mean, var = offset[:, 0] + 0.25 * torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 1
    grad_loss = torch.tensor([1.7], dtype=dtype)
    exact = [t.double() for t in (x, mean, var)]
    truth = reference.bn_stats_match(*exact)
    truth_grad = reference.bn_stats_match_backward(grad_loss.double()[0], *exact, *truth[1:])
    stored = x.transpose(1, 2).contiguous() if channels_last else x
    close = 1e-6 if dtype == torch.float32 else 1e-13
    for source in (stored, shifted(stored)):
        runs = []
        for seed in (0, 3):
            kernels.lib.zsq_seed(c.c_uint64(seed))
            loss, bm, bv = torch.full((1,), 7.0, dtype=dtype), torch.full_like(mean, 7.0), torch.full_like(mean, 7.0)
            scratch = kernels.workspace("bn_stats", n, channels, s, channels_last, loss.element_size())
            kernels("bn_stats", source, mean, var, loss, bm, bv, n, channels, s, channels_last, as_c(scratch))
            runs.append((loss, bm, bv))
        assert all(same(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        for got, expected in zip(runs[0], truth, strict=True):
            assert (got.double() - expected).norm() <= close * expected.norm()
        grad = torch.full_like(source, 7.0)
        kernels("bn_stats_backward", source, grad_loss, mean, var, *runs[0][1:], grad, n, channels, s, channels_last)
        grad = grad.transpose(1, 2) if channels_last else grad
        assert (grad.double() - truth_grad).norm() <= 3 * close * truth_grad.norm()


def test_bn_stats_nan_stays_in_its_channel(seeded: Kernels) -> None:
    x, mean, var = torch.randn(4, 6, 40), torch.zeros(6), torch.ones(6)
    x[1, 2, 3] = float("nan")
    loss, bm, bv = torch.zeros(1), torch.zeros(6), torch.zeros(6)
    scratch = seeded.workspace("bn_stats", 4, 6, 40, False, 4)
    seeded("bn_stats", x, mean, var, loss, bm, bv, 4, 6, 40, False, as_c(scratch))
    assert loss.isnan().all() and bm.isnan().tolist() == bv.isnan().tolist() == [i == 2 for i in range(6)]


# ---- gradient inundation ---------------------------------------------------------------------------------------------


def compare_gi(kernels: Kernels, weights, grads, momenta, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """One step by both; returns kappa and changed and leaves the step in `weights` and `momenta`."""
    ours, their = ([[t.clone() for t in group] for group in (weights, momenta)] for _ in range(2))
    kappa, changed = torch.zeros(len(weights)), torch.zeros(len(weights), dtype=torch.long)
    reference.gi_sgd_(their[0], grads, their[1], kappa, changed, **options)
    got = kernels.gi_sgd(ours[0], grads, ours[1], **options)
    assert same(got[0], kappa), (got[0], kappa)
    assert torch.equal(got[1], changed), (got[1], changed)
    for i in range(len(weights)):
        assert same(ours[0][i], their[0][i]) and same(ours[1][i], their[1][i]), i
        weights[i].copy_(ours[0][i])
        momenta[i].copy_(ours[1][i])
    return got


def gi_case(shapes: list[tuple[int, ...]], size: float = 1e-3):
    return tuple([torch.randn(s) * scale for s in shapes] for scale in (1, size, size))


DEFAULT = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0} | {
    "bits": 4,
    "threshold": 1e-2,
    "search_steps": 5,
    "capped": False,
    "guaranteed": False,
}


@pytest.mark.parametrize(
    "change",
    [{}, {"capped": True}, {"search_steps": 0}, {"search_steps": 2}, {"nesterov": False}, {"momentum": 0.0},
     {"weight_decay": 0.3}, {"threshold": 0.5}, {"bits": 8, "threshold": 0.1}, {"lr": 0.3}, {"threshold": 1.0},
     {"threshold": 0.0}, {"guaranteed": True}, {"guaranteed": True, "capped": True, "lr": 1e-6}],
    ids=str,
)  # fmt: skip
def test_gi_options(seeded: Kernels, change: dict) -> None:
    weights, grads, momenta = gi_case([(5, 9), (4, 3, 3, 3), (2, 700)])
    for _ in range(2):
        compare_gi(seeded, weights, grads, momenta, **(DEFAULT | change))


@pytest.mark.parametrize("cols", [1, 31, 640, 641, 5120, 5121])
def test_gi_row_lengths(kernels: Kernels, cols: int) -> None:
    compare_gi(kernels, *gi_case([(2, cols)]), **(DEFAULT | {"search_steps": 3}))


def test_gi_unusual_tensors(seeded: Kernels) -> None:
    weights, grads, momenta = gi_case([(3, 20)] * 8 + [(0, 4)])
    grads[0][1, 2], momenta[1][0, 0] = float("nan"), float("inf")  # left alone
    grads[2].zero_(), momenta[2].zero_()  # nothing to amplify
    grads[3].fill_(1e-38), momenta[3].zero_()  # never reaches the threshold
    weights[4][1, 1] = float("nan")
    weights[5].zero_()
    weights[6], grads[6], momenta[6] = shifted(weights[6]), shifted(grads[6]), shifted(momenta[6])
    for capped in (False, True):
        kappa, changed = compare_gi(seeded, weights, grads, momenta, **(DEFAULT | {"capped": capped}))
        assert kappa[:2].isnan().all() and kappa[2] == 1 and kappa[8] == 1 and changed[8] == 0
        assert kappa[3] == (126 if capped else 1)


@pytest.mark.parametrize("count, launches, weight_decay", [(80, 3, 0.3), (83, 3, 0.0), (83, 3, 0.3), (801, 6, 0.3)])
def test_gi_launches_and_many_tensors(kernels: Kernels, count: int, launches: int, weight_decay: float) -> None:
    """Three launches for as many tensors as the larger of two argument tables holds."""
    weights, grads, momenta = gi_case([(2, 9)] * count)
    for i, g in enumerate(grads):
        g.mul_(1.1 ** (i % 83))
    before = kernels.lib.zsq_launches()
    options = DEFAULT | {"capped": True, "search_steps": 1, "weight_decay": weight_decay}
    kappa, _ = compare_gi(kernels, weights, grads, momenta, **options)
    assert kernels.lib.zsq_launches() - before == launches and len(kappa.unique()) > 3


@pytest.mark.parametrize("cols", [1, 3, 31, 640, 641, 5120, 5121])
def test_gi_counts_with_weight_decay(seeded: Kernels, cols: int) -> None:
    """Rows of every length, and more of them than a block takes."""
    compare_gi(seeded, *gi_case([(19, cols), (2, cols)]), **(DEFAULT | {"search_steps": 2, "weight_decay": 0.3}))


def test_gi_channels_last(kernels: Kernels) -> None:
    groups = [[t.to(memory_format=torch.channels_last) for t in group] for group in gi_case([(4, 6, 3, 3)])]
    compare_gi(kernels, *groups, **DEFAULT)


def test_gi_recorded(kernels: Kernels) -> None:
    recorded = golden("gradient_inundation.npz")
    cases = sorted({k.split("_")[0] for k in recorded.files})
    assert cases
    for case in cases:
        bits, threshold, capped, lr = recorded[case + "_cfg"].tolist()
        options = DEFAULT | {"bits": int(bits), "threshold": threshold, "capped": bool(capped), "lr": lr}
        count = sum(k.startswith(case + "_p") and k.endswith("_init") for k in recorded.files)
        weights = [torch.tensor(recorded[f"{case}_p{k}_init"]) for k in range(count)]
        momenta = [torch.zeros_like(w) for w in weights]
        for t in range(4):
            grads = [torch.tensor(recorded[f"{case}_t{t}_g{k}"]) for k in range(count)]
            kappa, _ = kernels.gi_sgd(weights, grads, momenta, **options)
            assert np.array_equal(kappa.numpy(), recorded[f"{case}_t{t}_kappa"].astype(np.float32)), (case, t)
            for k, w in enumerate(weights):
                truth = recorded[f"{case}_t{t}_p{k}"]
                assert np.linalg.norm(w.numpy() - truth) <= 3e-7 * np.linalg.norm(truth)


# ---- sanitizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["address,undefined", "thread"])
def test_sanitized(kernels: Kernels, tmp_path: Path, flags: str) -> None:
    """A memory error, undefined behaviour or a data race between CUDA threads in any kernel ends the program."""
    keep = ["-fno-sanitize-recover=all"] if flags != "thread" else []
    program = toolkit.build_host(tmp_path / "kernels", "main.cpp", f"-fsanitize={flags}", *keep)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    seeds = "1" if flags == "thread" else "2"  # two: results must not depend on the order of threads
    done = subprocess.run([str(program), seeds], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "all kernels ran" in done.stdout
