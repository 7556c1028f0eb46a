"""Bits per layer: conversion, sensitivity, the frontier against brute force, and whole runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import residual, tiny
from torch import nn

import zsq_fast as zsq
from zsq_fast.errors import UsageError
from zsq_fast.methods.mixed import BITS, allocate, layer_sizes, pareto, sensitivity, weight_sites
from zsq_fast.reference import fake_quant_weight

SIZE = (3, 8, 8)
LAYERS = ("0", "3", "8")  # of tiny(): two convolutions and the classifier


def images(count: int = 12) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(5))


# ---- conversion --------------------------------------------------------------------------------------------------------


def test_conversion_takes_bits_per_layer(device):
    teacher, bits = tiny().to(device), {"0": 8, "3": 2, "8": 5}
    student, x = zsq.convert(teacher, bits, 4, input_size=SIZE), images(2).to(device)
    assert {name: student.get_submodule(name).weight_bits for name in LAYERS} == bits
    for name in LAYERS:
        want = fake_quant_weight(teacher.get_submodule(name).weight, bits[name])
        with zsq.nn.weights_quantized_together(student):
            assert torch.equal(student.get_submodule(name).__dict__["_quantized_weight"], want)
    uniform, plain = zsq.convert(teacher, dict.fromkeys(bits, 3), 4), zsq.convert(teacher, 3, 4)
    for network in (student, uniform, plain):
        with zsq.nn.calibrating(network), torch.no_grad():
            network(x)
    assert torch.equal(uniform(x), plain(x)) and bool((student(x) != plain(x)).all())


def test_summary_reports_and_sizes_count_bits_per_layer():
    summary = zsq.summarize(zsq.convert(tiny(), {"0": 8, "3": 3, "8": 5}, 4))
    assert summary.to_dict()["layer_bits"] == {"0": 8, "3": 3, "8": 5}
    assert "1 conv at 3 bits, 1 conv at 8 bits, 1 linear at 5 bits" in str(summary)
    # 216 weights in 8 rows, 72 in 8, 32 in 4; 27 bytes of 72 weights at 3 bits
    assert summary.packed_bytes == 216 + 27 + 20 + 8 * (8 + 8 + 4) + 4 * summary.float_parameters


class Unused(nn.Module):
    """Holds a layer that its forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = tiny(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize(
    "bits, words",
    [
        ({"0": 4, "3": 4}, r"no bits for the layer '8' \(1 missing\)"),
        ({}, r"no bits for the layer '0' \(3 missing\)"),
        ({"0": 4, "3": 4, "8": 4, "1": 4}, "names '1', no layer whose weight is quantized"),
        ({"0": 4, "3": 9, "8": 4}, r"weight_bits\['3'\] must be an integer from 2 to 8, got 9"),
        ({"0": 4, "3": 4.0, "8": 4}, r"got 4\.0"),
    ],
)
def test_wrong_bits_per_layer(bits, words):
    with pytest.raises(UsageError, match=words):
        zsq.convert(tiny(), bits, input_size=SIZE)


def test_a_layer_that_is_never_called_wants_no_bits():
    bits = {f"body.{name}": 4 for name in LAYERS}
    assert zsq.summarize(zsq.convert(Unused(), bits, input_size=SIZE)).weight_tensors == 3
    with pytest.raises(UsageError, match=r"names 'spare'"):
        zsq.convert(Unused(), {**bits, "spare": 4}, input_size=SIZE)
    assert weight_sites(Unused(), SIZE).keys() == bits.keys()


# ---- sensitivity -------------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_divergence_of_one_quantized_layer(device):
    teacher, x = residual().to(device), images().to(device)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    found = sensitivity(teacher.train(), x, (2, 4, 8), input_size=SIZE, batch_size=5)
    assert teacher.training and all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert list(found) == [name for name, m in teacher.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, row in found.items():
        assert list(row) == [2, 4, 8]
        for bits, value in row.items():
            changed = residual().to(device)
            weight = changed.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(fake_quant_weight(weight, bits))
                p, q = teacher.eval()(x).double().softmax(1), changed(x).double().softmax(1)
            assert value == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3, abs=1e-9)
        assert row[2] > row[4] > row[8] >= 0


def test_sensitivity_does_not_depend_on_the_batches():
    one, many = (sensitivity(tiny(), images(), (2,), input_size=SIZE, batch_size=size) for size in (12, 1))
    for name in LAYERS:
        assert one[name][2] == pytest.approx(many[name][2], rel=1e-3)


def test_what_sensitivity_refuses():
    with pytest.raises(UsageError, match="at least one image"):
        sensitivity(tiny(), images(0), input_size=SIZE)
    with pytest.raises(UsageError, match="at least one image and one bit width"):
        sensitivity(tiny(), images(), (), input_size=SIZE)
    with pytest.raises(ValueError, match="bits"):
        sensitivity(tiny(), images(), (9,), input_size=SIZE)


# ---- frontier ----------------------------------------------------------------------------------------------------------


def problem(layers: int, seed: int):
    """Sizes that collide often, and sensitivities that need not fall with the bits."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, (), generator=rng))  # noqa: E731
    sizes = {f"l{i}": {b: b * n for b in BITS} for i in range(layers) for n in [draw(9)]}
    losses = {name: {b: draw(1000) / b**2 for b in BITS} for name in sizes}
    return sizes, losses


def brute_force(sizes, losses) -> list[tuple[int, float]]:
    points = [
        (sum(sizes[n][b] for n, b in zip(sizes, bits)), sum(losses[n][b] for n, b in zip(sizes, bits)))
        for bits in itertools.product(BITS, repeat=len(sizes))
    ]
    best: list[tuple[int, float]] = []
    for size, loss in sorted(points):
        if not best or loss < best[-1][1] * (1 - 1e-12):
            best.append((size, loss))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_frontier_equals_brute_force(seed):
    sizes, losses = problem(1 + seed % 5, seed)
    found, want = pareto(sizes, losses), brute_force(sizes, losses)
    assert found.sizes.tolist() == [size for size, _ in want]
    assert found.sensitivities.tolist() == pytest.approx([loss for _, loss in want])
    for i, bits in enumerate(found.bits.tolist()):  # each point is what its bits give
        assert sum(sizes[n][b] for n, b in zip(found.layers, bits)) == int(found.sizes[i])
        assert sum(losses[n][b] for n, b in zip(found.layers, bits)) == pytest.approx(float(found.sensitivities[i]))


@pytest.mark.parametrize("resolution", [2, 7, 40])
def test_a_coarse_frontier_keeps_its_bound(resolution):
    sizes, losses = problem(5, 3)
    coarse, exact = pareto(sizes, losses, resolution), brute_force(sizes, losses)
    assert len(coarse.sizes) < len(exact) and int(coarse.sizes[0]) == exact[0][0]
    for size, loss in exact:
        held = coarse.sizes <= size + 5 * resolution
        assert float(coarse.sensitivities[held][-1]) <= loss * (1 + 1e-12)
    for i, bits in enumerate(coarse.bits.tolist()):
        assert sum(sizes[n][b] for n, b in zip(coarse.layers, bits)) == int(coarse.sizes[i])


def test_frontier_is_monotone_and_large_ones_are_bounded():
    rng = torch.Generator().manual_seed(0)
    numel = torch.randint(1000, 2_000_000, (50,), generator=rng).tolist()
    sizes = {f"l{i}": {b: n * b // 8 for b in BITS} for i, n in enumerate(numel)}
    losses = {name: {b: float(torch.rand((), generator=rng)) / 4**b for b in BITS} for name in sizes}
    found = pareto(sizes, losses)
    assert bool((found.sizes.diff() > 0).all()) and bool((found.sensitivities.diff() < 0).all())
    assert len(found.sizes) <= 2**16 + 2


def test_budget_is_kept():
    sizes, losses = problem(4, 1)
    frontier, want = pareto(sizes, losses), brute_force(sizes, losses)
    for budget in range(want[0][0], want[-1][0] + 5):
        bits = allocate(frontier, budget)
        assert bits.keys() == sizes.keys() and sum(sizes[n][b] for n, b in bits.items()) <= budget
        best = min(loss for size, loss in want if size <= budget)
        assert sum(losses[n][b] for n, b in bits.items()) == pytest.approx(best)
    with pytest.raises(UsageError, match=f"budget of {want[0][0] - 1} bytes is below the {want[0][0]} of the fewest"):
        allocate(frontier, want[0][0] - 1)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s, k: (s.clear(), k.clear()), "same layers, at least one"),
        (lambda s, _: s.pop("l0"), "same layers"),
        (lambda _, k: k["l1"].pop(4), "same bits, at least one; 'l1' differs"),
        (lambda _, k: k["l1"].update({4: float("nan")}), "sensitivity of 'l1' is not finite"),
    ],
)
def test_what_pareto_refuses(change, words):
    sizes, losses = problem(2, 0)
    change(sizes, losses)
    with pytest.raises(UsageError, match=words):
        pareto(sizes, losses)
    with pytest.raises(UsageError, match="bytes from 1, got 0"):
        pareto(*problem(2, 0), resolution=0)


def test_a_sensitive_layer_gets_more_bits():
    """One far weight per row makes the steps of its grid coarse for all others."""

    def bits_of(network: nn.Module) -> dict[str, int]:
        sizes = layer_sizes(weight_sites(network, SIZE))
        frontier = pareto(sizes, sensitivity(network, images(), input_size=SIZE))
        return allocate(frontier, sum(of[4] for of in sizes.values()))

    spoiled = residual()
    with torch.no_grad():
        spoiled[1].b.weight[:, 0, 0, 0] = 2.0
    before, after = bits_of(residual()), bits_of(spoiled)
    assert after["1.b"] > before["1.b"]
    assert len(set(before.values())) > 1
