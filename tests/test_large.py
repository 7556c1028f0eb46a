"""More than 2^31 elements, every operation: what comes last in the tensor is what a small tensor of the same ending gives.

Zeros but for the last values, which only 64-bit indices reach. Two such tensors of 16 bits take 9 GB.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zsq_fast import ops

zsq = torch.ops.zsq
LENGTH = 2**30 + 2052  # of each of two channels; both are whole vectors
TAIL = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.5, 1.0, 2.0, 9.0])
CLASSES = 1024


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024


@pytest.fixture(scope="module", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def pair(request) -> Iterator[tuple[Tensor, Tensor]]:
    """Large and small, `[1, 2, positions]`."""
    if free_bytes(request.param) < 12e9:
        pytest.skip("needs 12 GB of free memory")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # not this process's share: the pages are what takes the time
    large = torch.zeros(1, 2, LENGTH, dtype=torch.float16, device=request.param)
    small = torch.zeros(1, 2, len(TAIL), dtype=torch.float16, device=request.param)
    for x in (large, small):
        x[0, 1, -len(TAIL) :] = TAIL
    yield large, small
    del large
    ops.release_memory()
    torch.set_num_threads(threads)


def same_end(large: Tensor, small: Tensor) -> None:
    """And nothing was written over what lies 2^31 and 2^32 bytes or elements before the end."""
    large, small = large.flatten(), small.flatten()
    assert torch.equal(large[-len(TAIL) :], small[-len(TAIL) :])
    for before in (2**30, 2**31):
        at = large.numel() - before - len(TAIL)
        assert large[at : at + 2 * len(TAIL)].unique().numel() == 1


def scalars(x: Tensor, *values: float) -> list[Tensor]:
    return [torch.tensor([float(v)], device=x.device) for v in values]


def test_activations(pair):
    got, want = (ops.fake_quant_act(x, *scalars(x, 0, 1), 4) for x in pair)
    same_end(got, want)
    del got
    states = [scalars(x, 0, 0, 1) for x in pair]
    got, want = (ops.fake_quant_act_running(x, *state, 4) for x, state in zip(pair, states, strict=True))
    same_end(got, want)
    assert [s.item() for s in states[0]] == [s.item() for s in states[1]]


def test_odd_length(pair):
    """A tail that fills neither a vector nor a byte of the mask."""
    for x in pair:
        odd = x.flatten()[:-1]
        end = ops.fake_quant_act(odd, *scalars(x, 0, 1), 4)[-7:].clone()
        out, mask = zsq.fake_quant_act_clip(odd, *scalars(x, 0, 1), 4)
        assert torch.equal(end, ops.fake_quant_act(odd[-7:].clone(), *scalars(x, 0, 1), 4)) and torch.equal(
            out[-7:], end
        )
        assert mask[-1] == 0b00111111


def test_clip(pair):
    for x in pair:
        out, mask = zsq.fake_quant_act_clip(x, *scalars(x, 0, 1), 4)
        assert mask[-1] == 0b00111111  # 2 and 9 were clamped
        assert mask[-2] == 255 or x is pair[1]
        del out
        passed = zsq.masked(x, mask).flatten()
        assert torch.equal(passed[-8:-2], x.flatten()[-8:-2]) and not passed[-2:].any()


def test_weights(pair):
    got, want = (ops.fake_quant_weight(x[0], 4) for x in pair)
    same_end(got, want)
    del got
    (got, few), (want, again) = (ops.fake_quant_weights([x[0], x[0, :, -8:].contiguous()], 4) for x in pair)
    same_end(got, want)
    assert torch.equal(few, again)


def test_weight_codes(pair):
    if free_bytes(pair[0].device.type) < 16e9:
        pytest.skip("needs 16 GB more")
    got, want = (ops.weight_codes(x[0], 4) for x in pair)
    same_end(got[0], want[0])
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


def test_learned_steps(pair):
    steps = torch.tensor([0.25, 0.3], device=pair[0].device)
    got, want = (ops.fake_quant_learned(x[0], steps, 0, 15) for x in pair)
    same_end(got, want)
    del got
    got, want = (zsq.fake_quant_learned_backward(x[0], x[0], steps, 0, 15, 1.0) for x in pair)
    same_end(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def test_batch_norm_activation(pair):
    norm = nn.BatchNorm1d(2).eval().to(pair[0].device)
    norm.running_mean.copy_(torch.tensor([0.25, -0.5])), norm.running_var.copy_(torch.tensor([1.0, 2.0]))
    arguments = norm.running_mean, norm.running_var, norm.weight.detach()
    results = []
    for x in pair:
        out, mask = zsq.bn_act_fake_quant(x, None, *arguments, None, 1e-5, "relu", *scalars(x, 0, 1), 4, True)
        end = out.flatten()[-8:].clone()
        del out
        grad_x, _, *affine = zsq.bn_act_fake_quant_backward(x, mask, x, *arguments, 1e-5, False, True)
        results.append((torch.cat([end, grad_x.flatten()[-8:]]), mask[-1].item(), torch.stack(affine)))
        del grad_x
    (got, got_mask, got_affine), (want, want_mask, want_affine) = results
    assert torch.equal(got, want) and got_mask == want_mask
    torch.testing.assert_close(got_affine, want_affine)  # zeros add nothing


def test_batch_norm_statistics(pair):
    count, total, squares = LENGTH, TAIL.half().double().sum(), TAIL.half().double().square().sum()
    x, small = pair
    mean, var = torch.tensor([0.0, 0.5], device=x.device), torch.tensor([1.0, 1.0], device=x.device)
    loss, batch_mean, batch_var = zsq.bn_stats_match(x, mean, var)
    assert loss.item() == pytest.approx((0.5**2 + 2 * 1.0**2) / 2, rel=1e-6)
    assert batch_mean[0] == 0 and batch_mean[1].item() == pytest.approx(total.item() / count, rel=1e-5)
    assert batch_var[0] == 0 and batch_var[1].item() == pytest.approx(squares.item() / count, rel=1e-5)
    grads = [
        zsq.bn_stats_match_backward(
            torch.tensor(float(a.numel()), device=a.device), a, mean, var, batch_mean, batch_var
        )
        for a in pair
    ]
    same_end(*grads)
    del grads
    _, sums = zsq.bn_eval_sums(x, mean, var, None, None, 1e-5)
    moved = TAIL.half().double() - 0.5
    want = [[0, moved.sum() - 0.5 * (count - 8)], [0, moved.square().sum() + 0.25 * (count - 8)]]
    torch.testing.assert_close(sums.cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)
    y, _ = zsq.bn_eval_sums(small, mean, var, None, None, 1e-5)
    big, _ = zsq.bn_eval_sums(x, mean, var, None, None, 1e-5)
    same_end(big, y)
    del big
    got, want = (zsq.bn_eval_sums_backward(None, sums, a, mean, var, None, 1e-5) for a in pair)
    assert torch.equal(got.flatten()[-8:], want.flatten()[-8:])


def test_perturbation(pair):
    got, want = (ops.sign_perturb(x, x, 0.5) for x in pair)
    same_end(got, want)


def test_alignment(pair):
    x, _ = pair
    squares = TAIL.half().double().square().sum().item()
    loss, of_student, _ = zsq.feature_alignment(x, x, "channel")
    assert loss == 0 and of_student[0, 0] == 0
    assert of_student[0, 1].item() == pytest.approx(squares / LENGTH, rel=1e-5)
    assert zsq.feature_alignment(x, x, "direct")[0] == 0
    other = torch.zeros_like(x)
    assert zsq.feature_alignment(x, other, "direct")[0].item() == pytest.approx(squares / x.numel(), rel=1e-5)
    del other
    maps = [torch.tensor([[3.0, 4.0]], device=x.device), torch.tensor([[4.0, 3.0]], device=x.device)]
    got, want = (
        zsq.feature_alignment_backward(
            torch.tensor(a.shape[2] * 100.0, device=a.device), a, a, *maps, "channel", False
        )[0]
        for a in pair
    )
    same_end(got, want)


def test_cross_entropy(pair):
    x = pair[0].flatten()[-(2**21 + 4) * CLASSES :]
    logits = x[(-x.numel()) // CLASSES * CLASSES :].view(-1, CLASSES)
    target = torch.full((logits.shape[0],), CLASSES - 1, device=x.device)
    _, _, ce, grad, _ = zsq.distillation_loss(logits, None, target, 1.0, False, 1.0, float(logits.shape[0]), 0.0, False)
    want = zsq.distillation_loss(logits[-1:].clone(), None, target[:1], 1.0, False, 1.0, 1.0, 0.0, False)
    assert torch.equal(grad[-1:], want[3])
    alone = torch.log(torch.tensor(float(CLASSES))).item()
    mean = (alone * (logits.shape[0] - 1) + want[2].item()) / logits.shape[0]
    assert ce.item() == pytest.approx(mean, rel=1e-6)


def test_gpu_inundation(pair):
    if pair[0].device.type != "cuda" or free_bytes("cuda") < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    weight = pair[0][0].float()
    weights, grads, momenta = ([t] for t in (weight, weight.clone(), torch.zeros_like(weight)))
    kappa, changed = torch.zeros(1, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    ops.gi_sgd_(
        weights,
        grads,
        momenta,
        kappa,
        changed,
        lr=0.5,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        bits=4,
        threshold=0.0,
    )
    torch.testing.assert_close(weight[1, -8:], 0.5 * TAIL.half().float().to("cuda"))
