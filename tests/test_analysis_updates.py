"""Changed integer weights per layer and epoch: counted step by step and epoch by epoch with the reference quantizer."""

from __future__ import annotations

import pytest
import torch
from networks import residual, tiny
from stopping import metrics, same_tensors, whole_and_resumed
from torch import nn

import zsq_fast as zsq
from zsq_fast.analysis.updates import draw, update_ratios
from zsq_fast.errors import UsageError
from zsq_fast.methods import Recipe, Trainer, load_recipe, run_together
from zsq_fast.methods.updates import NetUpdates, weights_by_bits
from zsq_fast.reference.fake_quant import encode, row_grid

SIZE = (3, 8, 8)
NUMBERS = {"epochs": 5, "iterations": 4, "batch_size": 8, "warmup_epochs": 2, "calibration_epochs": 1, "held_out": 0}
OPTIONS = [
    *(f"schedule.{k}={v}" for k, v in NUMBERS.items()),
    "quant.ema=plain",
    "quant.weight_bits=3",
    "student.lr=0.02",
]


def recipe(name: str, *more: str) -> Recipe:
    return load_recipe(name, input_size=SIZE, overrides=[*OPTIONS, *more])


def trainer(name: str, *more: str, teacher: nn.Module | None = None, **options) -> Trainer:
    return Trainer(teacher or residual(), recipe(name, *more), input_size=SIZE, **options)


def codes(network: nn.Module) -> dict[str, torch.Tensor]:
    """Of every quantized weight, by the reference."""
    found = {}
    for name, weight in zsq.nn.quantized_weights(network).items():
        bits, rows = network.get_submodule(name.removesuffix(".weight")).weight_bits, weight.detach().flatten(1)
        found[name] = encode(rows, *row_grid(rows, bits), bits)
    return found


def share(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: (before[name] != after[name]).float().mean().item() for name in before}


@pytest.mark.parametrize("bits", [{"0": 2, "3": 8, "8": 5}, {"0": 3, "3": 3, "8": 3}])
def test_integer_codes_are_those_that_inundation_counts(bits, device):
    student = zsq.convert(tiny().to(device), bits, 4, input_size=SIZE)
    for name, expected in codes(student).items():
        layer = student.get_submodule(name.removesuffix(".weight"))
        found = layer.integer_codes()
        assert found.dtype == torch.uint8 and found.shape == layer.weight.shape
        assert torch.equal(found.flatten(1).float(), expected + 2 ** (layer.weight_bits - 1))


def test_codes_of_learned_ranges():
    student = zsq.convert(tiny(), 3, 4, input_size=SIZE, ranges="learned", ema="plain")
    with zsq.nn.calibrating(student), torch.no_grad():
        student(torch.ones(1, *SIZE))
    zsq.nn.freeze_ranges(student)
    step = student[0].step.detach().clone()
    with torch.no_grad():
        student[0].step *= 0.5
        student[0].weight[0] = step[0] * torch.tensor([0.26, -9, 9]).repeat(9).view(3, 3, 3)
    assert student[0].integer_codes()[0].flatten()[:3].tolist() == [
        5,
        0,
        7,
    ]  # 0.52 steps round to 1; the others are clamped
    assert student[8].integer_codes().max() == 7


@pytest.mark.parametrize(("name", "lr"), [("ait", 0.02), ("kl_only", 1), ("gdfq", 0.2)])
def test_ratios_of_a_run(name, lr, monkeypatch):
    """Net against the states of the epochs' ends, step-summed against codes before and after every single step."""
    states, summed, step_of = [], {}, Trainer._student_step

    def counted(self, batch):
        before = codes(self.student)
        step_of(self, batch)
        for layer, ratio in share(before, codes(self.student)).items():
            summed.setdefault(self.state.step // 4, {}).setdefault(layer, []).append(ratio)

    monkeypatch.setattr(Trainer, "_student_step", counted)
    evaluate = lambda network: states.append(codes(network)) or 0.0  # noqa: E731
    one = trainer(name, f"student.lr={lr}", evaluate=evaluate, eval_every=1, track_updates=True)
    result = one.run()
    del states[0]  # the float network; then the student before its first step and after each epoch
    assert [set(r) & {"update_ratio", "net_update_ratio"} for r in result.history] == [
        *[set()] * 2, *[{"net_update_ratio"} | ({"update_ratio"} if name == "ait" else set())] * 3]  # fmt: skip
    found = update_ratios(result.student, result.history)
    assert found.epochs == (2, 3, 4) and set(found.layers) == set(codes(result.student))
    for row, before, after in zip(found.net, states[:-1], states[1:], strict=True):
        assert dict(zip(found.layers, row, strict=True)) == pytest.approx(share(before, after), rel=1e-6)
    assert max(found.net[-1]) > 0
    assert (found.step_summed is None) == (name != "ait")
    for epoch, row in zip(found.epochs, found.step_summed or (), strict=False):
        for layer, ratio, net in zip(found.layers, row, found.net[epoch - 2], strict=True):
            assert ratio == pytest.approx(sum(summed[epoch][layer]), rel=1e-5) and ratio >= net * (1 - 1e-6)


@pytest.mark.parametrize(
    "options", [("ait",), ("kl_only",), ("hast_lsq", "images.count=16", "images.batch_size=8", "images.iterations=2")]
)
def test_tracking_changes_no_student(options):
    on, off = (trainer(*options, track_updates=flag).run() for flag in (True, False))
    assert same_tensors(on.student, off.student)
    assert [{k: v for k, v in r.items() if k != "net_update_ratio"} for r in on.history] == off.history
    assert "net_update_ratio" in on.history[-1] and "net_update_ratio" not in off.history[-1]


def test_names_follow_the_order_of_mixed_bits():
    bits = 'quant.layer_bits=["0=4","3=2","8=4"]'
    one = trainer("ait", bits, teacher=tiny(), track_updates=True)
    result = one.run()
    found = update_ratios(result.student, result.history)
    assert list(found.layers) == list(one.inundated) == ["0.weight", "8.weight", "3.weight"]
    assert [len(row) for row in found.step_summed] == [3, 3, 3] == [len(row) for row in found.net]


@pytest.mark.parametrize("step", [3, 10, 16])
def test_a_resumed_run_counts_the_same(step, tmp_path):
    """Stopped in the warm-up, in the middle and at the end of an epoch of the student."""
    options = dict(recipe=recipe("ait"), input_size=SIZE, progress=False, track_cosine=2, track_updates=True)
    whole, again = whole_and_resumed(residual, options, step, tmp_path)
    cut, uncut = metrics(tmp_path)
    assert same_tensors(whole, again) and cut == uncut and {"net_update_ratio", "cosine"} <= cut[2].keys()


def test_lockstep_counts_as_alone():
    teacher, names, trainers = residual(), ["rtn", "ait", "kl_only"], []
    for name in names:
        share_ = trainers[0] if trainers else None
        trainers.append(trainer(name, teacher=teacher, seed=3, share=share_, track_updates=True))
    for name, result in zip(names, run_together(trainers), strict=True):
        assert result.history == trainer(name, teacher=teacher, seed=3, track_updates=True).run().history
        assert ("net_update_ratio" in result.history[-1]) == (name != "rtn")


def test_counting_leaves_the_student_alone():
    student = zsq.convert(tiny(), 3, 4, input_size=SIZE)
    before, tracker = [p.clone() for p in student.parameters()], NetUpdates(student)
    assert tracker.tensors() == {} and tracker.next_epoch() == {}
    assert tracker.next_epoch() == {"net_update_ratio": [0.0, 0.0, 0.0]}
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))
    with torch.no_grad():
        student[8].weight[1] = student[8].weight[1].flip(0)  # one row of four
    kept = tracker.tensors()
    (ratios,) = tracker.next_epoch().values()
    assert ratios[:2] == [0, 0] and 0 < ratios[2] <= 0.25
    tracker.load(kept)
    assert tracker.next_epoch() == {"net_update_ratio": ratios}
    assert [len(group) for group in weights_by_bits(student).values()] == [3]


def test_table_picture_and_refusal():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    student = zsq.convert(tiny(), 3, 4, input_size=SIZE)
    records = [
        {"epoch": e, "update_ratio": [0.1 * e, 0.0, 2.0], "net_update_ratio": [0.01, 0.0, 0.5]} for e in (4, 5, 6)
    ]
    found = update_ratios(student, [{"epoch": 3}, *records])
    assert found.layers == ("0.weight", "3.weight", "8.weight") and found.step_summed[1] == (0.5, 0.0, 2.0)
    table = str(found).splitlines()
    assert len(table) == 10 and table[2].split() == ["5", "0", "40", "200"]  # epochs count from 1 here
    draw(found, figure)
    figure.canvas.draw()
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (3, 3) and image[0, 2] == pytest.approx(60) and bool(image.mask[1, 0])
    assert figure.axes[0].images[0].get_extent() == [4.5, 7.5, 2.5, -0.5]
    alone = update_ratios(student, [{k: v for k, v in r.items() if k != "update_ratio"} for r in records])
    assert alone.step_summed is None and len(alone.net) == 3
    with pytest.raises(UsageError, match="--track-updates"):
        update_ratios(student, [{"epoch": 0}])
