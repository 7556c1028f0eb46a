"""The epoch chosen without data: what is held out, how it is measured, and that the choice survives a stop and a lockstep."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from networks import residual
from stopping import whole_and_resumed
from torch import nn

from zsq_fast import nn as znn
from zsq_fast.errors import UsageError
from zsq_fast.methods import Recipe, Trainer, available_recipes, load_recipe, run_together
from zsq_fast.methods.held_out import HeldOut, chosen_record
from zsq_fast.runs import RunDir

SIZE = (3, 8, 8)
NUMBERS = {"epochs": 7, "iterations": 3, "batch_size": 8, "warmup_epochs": 2, "calibration_epochs": 2, "held_out": 20}
OPTIONS = [*(f"schedule.{k}={v}" for k, v in NUMBERS.items()), "quant.ema=plain", "quant.weight_bits=3"]
OPTIONS += ["student.lr=0.02", "images.count=16", "images.batch_size=8", "images.iterations=2"]


def recipe(name: str = "kl_only", *more: str) -> Recipe:
    return load_recipe(name, input_size=SIZE, overrides=[*OPTIONS, *more])


def trainer(name: str = "kl_only", *more: str, teacher: nn.Module | None = None, **options) -> Trainer:
    return Trainer(teacher or residual(), recipe(name, *more), input_size=SIZE, **options)


def same_state(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_measure_in_closed_form():
    """Agreement and KL against torch's own functions, over batches that do not divide the count."""
    one = trainer()
    held_out = HeldOut(one.synthesis, 20)
    assert held_out.images.shape == (20, *SIZE) and held_out.logits.shape == (20, 4)
    with torch.no_grad(), znn.calibrating(one.student):
        one.student(held_out.images)
    teacher, student = (network(held_out.images).detach() for network in (one.synthesis.teacher, one.student))
    found = held_out.measure(one.student)
    assert found["held_out_agreement"] == (teacher.argmax(1) == student.argmax(1)).float().mean().item()
    p, q = (logits.double().log_softmax(1) for logits in (teacher, student))
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert expected > 1e-6 and found["held_out_kl"] == pytest.approx(expected, rel=1e-4)
    itself = HeldOut(one.synthesis, 20).measure(one.synthesis.teacher)
    assert itself == {"held_out_agreement": 1.0, "held_out_kl": pytest.approx(0, abs=1e-6)}


def test_drawing_moves_nothing_and_repeats_no_training_batch():
    one = trainer()
    before = {name: t.clone() for name, t in one.synthesis.generator.state_dict().items()}
    images = HeldOut(one.synthesis, 8).images
    assert same_state(one.synthesis.generator.state_dict(), before)
    assert torch.equal(images, HeldOut(one.synthesis, 8).images)
    assert not any(torch.equal(images, one.synthesis.images(step)[0]) for step in range(21))


@pytest.mark.parametrize("name", ["kl_only", "ait", "qimera", "hast"])
def test_held_out_images_change_no_student(name):
    with_, without = (trainer(name, f"schedule.held_out={n}").run() for n in (20, 0))
    assert same_state(with_.student.state_dict(), without.student.state_dict())
    assert without.chosen_epoch is None and without.chosen_state is None
    names = {"held_out_agreement", "held_out_kl"}
    assert [names <= record.keys() for record in with_.history] == [False, False, *[True] * 5]
    assert [{k: v for k, v in r.items() if k not in names} for r in with_.history] == without.history


def test_the_rule():
    records = [dict(epoch=e, held_out_agreement=a, held_out_kl=k) for e, a, k in
               ((2, 0.5, 0.1), (3, 0.9, 0.3), (4, 0.9, 0.2), (5, 0.9, 0.2), (6, 0.8, 0.0))]  # fmt: skip
    assert chosen_record([{"epoch": 0}, *records])["epoch"] == 4
    assert chosen_record([{"epoch": 0}]) is None


def test_the_chosen_student_is_the_one_of_its_epoch(monkeypatch):
    """Whatever epoch agrees best, its state is kept while training goes on, and its accuracy is measured once, at the end."""
    states, scripted = [], iter([0.3, 0.9, 0.9, 0.2, 0.9])

    def measure(self, student):
        states.append({name: t.clone() for name, t in student.state_dict().items()})
        return {"held_out_agreement": next(scripted), "held_out_kl": 0.1 * len(states)}

    monkeypatch.setattr(HeldOut, "measure", measure)
    seen = []

    def evaluate(network):
        seen.append({name: t.clone() for name, t in network.state_dict().items()})
        return float(len(seen))

    result = trainer(evaluate=evaluate).run()
    assert result.chosen_epoch == 3 and same_state(result.chosen_state, states[1])
    assert same_state(result.student.state_dict(), states[4]) and not same_state(states[1], states[4])
    assert result.evaluations == {"float": 1.0, "rtn": 2.0, "last": 3.0, "chosen": 4.0}
    assert len(seen) == 4 and same_state(seen[3], states[1])


def test_with_every_epoch_measured_the_chosen_one_is_not_measured_again():
    scores = iter(range(100))
    result = trainer(evaluate=lambda network: float(next(scores)), eval_every=1).run()
    assert result.evaluations["chosen"] == result.history[result.chosen_epoch]["top1"] and next(scores) == 7


def test_no_student_no_choice():
    result = trainer("rtn").run()
    assert result.chosen_epoch is None and result.synthesis.held_out is None


def test_lockstep_shares_what_is_held_out():
    teacher, names, trainers = residual(), ["rtn", "ait", "gdfq", "kl_only"], []  # the first wants none
    for name in names:
        trainers.append(trainer(name, teacher=teacher, seed=3, share=trainers[0] if trainers else None))
    for name, result in zip(names, run_together(trainers), strict=True):
        alone = trainer(name, teacher=teacher, seed=3).run()
        assert result.synthesis.held_out is trainers[0].synthesis.held_out is not None
        assert result.history == alone.history and result.chosen_epoch == alone.chosen_epoch
        assert same_state(result.chosen_state or {}, alone.chosen_state or {})
        assert (result.chosen_state is None) == (name == "rtn")


@pytest.mark.parametrize("name", ["ait", "hast"])
@pytest.mark.parametrize("step", [4, 6, 13, 20])
def test_a_resumed_run_chooses_the_same(name, step, tmp_path):
    """Stopped in the warm-up, at its end, amid the student's epochs and in the last one."""
    options = dict(recipe=recipe(name), input_size=SIZE, progress=False)
    whole_and_resumed(residual, options, step, tmp_path)
    for file in ("chosen.safetensors", "student.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    with RunDir.open(tmp_path / "cut", read_only=True) as run:
        chosen = chosen_record(run.read_metrics())
        run.load_tensors("chosen.safetensors")  # entered in the manifest, verified
        assert chosen is not None


def test_time_is_counted_once(monkeypatch):
    """What lockstep shares counts as synthesis, as the generator's steps do."""
    monkeypatch.setattr(HeldOut, "__init__", lambda self, synthesis, count: time.sleep(0.5))
    monkeypatch.setattr(HeldOut, "measure", lambda self, s: {"held_out_agreement": 1.0, "held_out_kl": 0.0})
    one = trainer()
    began = time.perf_counter()
    result = one.run()
    assert 0.5 < one.synthesis.seconds < result.seconds <= time.perf_counter() - began


def test_refused():
    with pytest.raises(UsageError, match=r"schedule\.held_out must be from 0 to 10000000"):
        recipe("ait", "schedule.held_out=-1")


@pytest.mark.parametrize("name", [name for name in available_recipes() if name != "zeroq_calibrated"])
def test_every_built_in_recipe_holds_images_out(name):
    """All that draw from a generator."""
    for schedule in ("paper", "short"):
        found = [load_recipe(name, input_size=(3, s, s), schedule=schedule).schedule.held_out for s in (32, 224)]
        assert found == [512, 128]
