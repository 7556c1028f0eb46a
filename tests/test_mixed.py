"""Bits per layer: conversion, sensitivity, the frontier against brute force, and whole runs."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from cli_support import call, make_tiny
from networks import residual, tiny
from safetensors import safe_open
from stopping import same_tensors, whole_and_resumed
from torch import nn

import zsq_fast as zsq
from zsq_fast import reference
from zsq_fast.errors import UsageError
from zsq_fast.methods import Recipe, Trainer, available_recipes, load_recipe, mixed, run_together
from zsq_fast.methods.mixed import BITS, allocate, layer_sizes, pareto, sensitivity, weight_sites
from zsq_fast.reference import fake_quant_weight
from zsq_fast.runs import RunDir

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


# ---- runs --------------------------------------------------------------------------------------------------------------

TINY = ["schedule.epochs=4", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=2", "schedule.calibration_epochs=2",
        "schedule.milestones=[3]", "quant.ema=plain", "images.count=12", "images.batch_size=8", "images.iterations=3",
        "student.batch_size=6", "student.lr=1e-3"]  # fmt: skip
TINY_OPTIONS = [word for text in TINY for word in ("--set", text)]
GENERATED = ["images.enabled=false", "student.batch_size=0"]


def recipe(*more, name="zeroq_mixed", **options) -> Recipe:
    return load_recipe(name, input_size=SIZE, overrides=[*TINY, *more], **options)


def widths(student: nn.Module) -> dict[str, int]:
    return zsq.summarize(student).to_dict()["layer_bits"]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch) -> None:
    monkeypatch.setattr(mixed, "PROBES", replace(mixed.PROBES, iterations=5))


@pytest.fixture
def searches(monkeypatch) -> list[dict]:
    """What was found, one entry per search."""
    made: list[dict] = []

    def counted(*args, **options):
        made.append(sensitivity(*args, **options))
        return made[-1]

    monkeypatch.setattr("zsq_fast.methods.mixed.sensitivity", counted)
    return made


def test_off_unless_a_recipe_asks_for_it(searches):
    for name in available_recipes():
        quant = load_recipe(name, input_size=(3, 32, 32), weight_bits=3).quant
        on = name == "zeroq_mixed"
        assert (quant.average_weight_bits, quant.layer_bits) == (3.0 if on else 0.0, ())
        assert on or quant.widths == quant.nominal_weight_bits == 3
    trainer = Trainer(residual(), recipe(name="zeroq"), input_size=SIZE)
    assert not searches and trainer.recipe.quant.layer_bits == () and set(widths(trainer.student).values()) == {4}
    assert load_recipe("zeroq_mixed", input_size=SIZE).quant.nominal_weight_bits == 4.0


@pytest.mark.parametrize("average", [2, 2.5, 4, 8])
def test_a_run_stays_within_its_average(average, searches, device):
    more = [] if average == 4 else [f"quant.average_weight_bits={average}"]
    result = Trainer(teacher := residual().to(device), recipe(*more, *GENERATED), input_size=SIZE).run()
    sites, found = weight_sites(teacher, SIZE), widths(result.student)
    budget = sum(math.ceil(site.numel * average / 8) + 8 * site.rows for site in sites.values())
    assert sum(sites[name].packed_bytes(bits) for name, bits in found.items()) <= budget
    assert len(searches) == 1
    if average in (2, 8):
        assert set(found.values()) == {average}
    else:
        assert len(set(found.values())) > 1
        uniform = sum(row[int(average)] for row in searches[0].values())
        assert sum(searches[0][name][bits] for name, bits in found.items()) < uniform
    assert all(torch.isfinite(p).all() for p in result.student.parameters())


def test_the_resolved_recipe_stands_for_itself(searches):
    first = Trainer(residual(), recipe(), input_size=SIZE, seed=3)
    resolved = first.recipe
    assert resolved.quant.widths == widths(first.student) and len(searches) == 1
    assert Trainer(residual(), recipe(), input_size=SIZE, seed=3).recipe == resolved
    other = Trainer(residual(), recipe(), input_size=SIZE, seed=4)
    assert searches[0] == searches[1] and searches[0] != searches[2] and other.recipe.quant.average_weight_bits == 4
    again = Trainer(residual(), Recipe.from_dict(resolved.to_dict()), input_size=SIZE, seed=9)
    assert len(searches) == 3 and widths(again.student) == widths(first.student) and again.recipe == resolved
    assert widths(zsq.methods.student_like(residual(), resolved, SIZE)) == widths(first.student)
    with pytest.raises(UsageError, match="leaves the bits of each layer to a search"):
        zsq.methods.student_like(residual(), recipe(), SIZE)


def test_bits_by_hand():
    given = {name: 3 + i % 3 for i, name in enumerate(weight_sites(residual(), SIZE))}
    texts = [f"{name}={bits}" for name, bits in given.items()]
    plain = replace(recipe(name="zeroq").quant, layer_bits=tuple(texts))
    trainer = Trainer(residual(), replace(recipe(name="zeroq"), quant=plain), input_size=SIZE)
    assert widths(trainer.student) == given
    with pytest.raises(UsageError, match=r"no bits for the layer '0\.way_round\.0'"):
        Trainer(residual(), recipe('quant.layer_bits=["0.a=4"]'), input_size=SIZE)


@pytest.mark.parametrize(
    "change, words",
    [
        ("quant.average_weight_bits=1.5", "quant.average_weight_bits must be 0 or from 2 to 8, got 1.5"),
        ("quant.average_weight_bits=9", "0 or from 2 to 8"),
        ("quant.layer_bits=4", "quant.layer_bits must be a list"),
        ('quant.layer_bits=["conv"]', "texts 'layer=bits' with bits from 2 to 8, got 'conv'"),
        ('quant.layer_bits=["conv=9"]', "got 'conv=9'"),
        ('quant.layer_bits=["4"]', "got '4'"),
        ('quant.layer_bits=["conv=4", "conv=3"]', "one text per layer"),
    ],
)
def test_wrong_recipes(change, words):
    with pytest.raises(UsageError, match=words):
        recipe(change)


@pytest.mark.parametrize("step", [2, 8], ids=["in the warm-up", "on images"])
def test_a_resumed_run_ends_in_the_same_bits(step, tmp_path, searches):
    options = dict(recipe=recipe("inundation.enabled=true", "student.weight_decay=0"), input_size=SIZE, progress=False)
    whole, again = whole_and_resumed(residual, options, step, tmp_path)
    assert len(searches) == 2 and widths(again) == widths(whole) and same_tensors(again, whole)
    records = []
    for name in ("cut", "whole"):
        with RunDir.open(tmp_path / name, read_only=True) as run:
            records.append(run.read_metrics())
            assert Recipe.from_dict(run.recipe).quant.widths == widths(whole)
    assert records[0] == records[1] and len(records[0]) == 4


def test_training_in_lockstep_equals_training_alone():
    teacher, changes = residual(), [[], ["quant.average_weight_bits=3"], ["inundation.enabled=true"]]
    trainers: list[Trainer] = []
    for change in changes:
        share = trainers[0] if trainers else None
        trainers.append(Trainer(teacher, recipe(*change), input_size=SIZE, seed=3, share=share))
    for change, result in zip(changes, run_together(trainers), strict=True):
        alone = Trainer(teacher, recipe(*change), input_size=SIZE, seed=3).run()
        assert same_tensors(result.student, alone.student) and result.history == alone.history


def test_inundation_counts_the_codes_of_each_layers_bits(device):
    """One step of the trainer's optimizer is the reference's, tensor by tensor at its own bits."""
    trainer = Trainer(residual().to(device), recipe("inundation.enabled=true"), input_size=SIZE)
    found = widths(trainer.student)
    assert len(set(found.values())) > 1
    groups = trainer.gi.param_groups
    assert len({group["bits"] for group in groups}) == len(groups) == len(set(found.values()))
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in trainer.inundated.values()]
    assert trainer.inundated.keys() == {f"{name}.weight" for name in found}
    trainer._set_schedule(2)
    want, rng = {}, torch.Generator().manual_seed(1)
    for name, weight in trainer.inundated.items():
        weight.grad = (torch.randn(weight.shape, generator=rng) * 1e-2).to(device)
        w, v, kappa = weight.detach().clone(), torch.zeros_like(weight), torch.zeros(1, device=device)
        changed, spec = torch.zeros(1, dtype=torch.int64, device=device), trainer.recipe.student
        fixed = (spec.lr, spec.momentum, spec.nesterov, spec.weight_decay, found[name.removesuffix(".weight")])
        reference.gi_sgd_([w], [weight.grad.clone()], [v], kappa, changed, *fixed, 1e-3, 5, True)
        want[name] = (w, kappa, changed)
    trainer.gi.step()
    for i, (name, weight) in enumerate(trainer.inundated.items()):
        w, kappa, changed = want[name]
        assert torch.equal(weight, w) and trainer.gi.kappa[i] == kappa[0] and trainer.gi.changed[i] == changed[0]
    assert (trainer.gi.kappa > 1).any()


def test_command_line(capsys, tmp_path):
    made = make_tiny(tmp_path)
    words = ["quantize", *made.model, "--recipe", "zeroq_mixed", "-w", 3, "-a", 5, *TINY_OPTIONS]
    code, out, err = call(capsys, *words, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["bits_by_search"] and plan["recipe"]["quant"]["layer_bits"] == []
    assert plan["network"]["layer_bits"] == dict.fromkeys(("0", "3", "8"), 3), "as even as can be, until they are found"
    assert plan["recipe"]["quant"]["average_weight_bits"] == 3
    code, out, err = call(capsys, *words, "--out", tmp_path / "run")
    assert code == 0 and "W3A5" in out, err
    bits = json.loads((tmp_path / "run" / "result.json").read_text())["layer_bits"]
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["quant"]["layer_bits"] == [f"{name}={b}" for name, b in bits.items()]
    with safe_open(tmp_path / "run" / "student.safetensors", "pt") as file:
        assert file.metadata()["layer_bits"] == ",".join(f"{name}={b}" for name, b in bits.items())
    code, _, err = call(capsys, "evaluate", tmp_path / "run", "--allow-import", "--data", made.images)
    assert code == 0, err
