"""Estimates before a run: what is counted, that real batches are measured, that nothing stays behind."""

from __future__ import annotations

import time

import pytest
import torch
from networks import residual
from torch import nn

from zsq_fast.errors import UnsupportedModelError
from zsq_fast.methods import Trainer, load_recipe
from zsq_fast.methods import estimate as module
from zsq_fast.methods.estimate import estimate
from zsq_fast.methods.held_out import HeldOut
from zsq_fast.methods.search import Search
from zsq_fast.methods.synthesis import Synthesis

SIZE = (3, 8, 8)
LAYERS = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in residual().modules())  # whose weights are quantized


def recipe(name: str, *more: str):
    numbers = ["schedule.epochs=9", "schedule.iterations=40", "schedule.batch_size=12", "schedule.warmup_epochs=5"]
    numbers += ["schedule.calibration_epochs=2", "schedule.held_out=20", "quant.ema=plain"]
    numbers += ["images.count=20", "images.batch_size=8", "images.iterations=30"]
    return load_recipe(name, input_size=SIZE, overrides=[*numbers, *more])


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("rtn", {"generator steps": 360, "range calibration": 80}),
        ("ait", {"generator steps": 360, "range calibration": 80, "student steps": 160, "held-out agreement": 4}),
        ("hast", {"image iterations": 90, "generator steps": 200, "range calibration": 80, "student steps": 160,
                  "held-out agreement": 4}),
        ("zeroq_mixed", {"iterations of images to find bits": 100, "forward passes to find bits": 1 + 6 * LAYERS,
                         "image iterations": 90, "generator steps": 200, "range calibration": 80, "student steps": 160,
                         "held-out agreement": 4}),
    ],
)  # fmt: skip
def test_what_is_counted(name, counts, device):
    found = estimate(residual().to(device), recipe(name), input_size=SIZE)
    assert {stage.name: stage.count for stage in found.stages} == counts
    assert all(stage.each > 0 for stage in found.stages)
    assert found.seconds == pytest.approx(sum(s.count * s.each for s in found.stages))
    assert found.image_set_bytes == (20 * 3 * 8 * 8 * 4 if "image iterations" in counts else 0)
    assert found.peak_bytes is not None and (found.peak_bytes > 0 or device == "cpu")


def test_each_stage_is_timed_with_its_own_batches_after_a_warm_up(monkeypatch):
    """Scripted iterations: the first is slow and does not count."""
    seen: dict[str, list] = {"generator": [], "student": [], "held-out": []}

    def slow(name, function):
        def run(self, *args):
            seen[name].append(len(args[0].images) if name == "student" else None)
            time.sleep(0.5 if len(seen[name]) == 1 else 0.02)
            return function(self, *args)

        return run

    for cls, method, name in ((Synthesis, "step", "generator"), (Trainer, "_student_step", "student"),
                              (HeldOut, "measure", "held-out")):  # fmt: skip
        monkeypatch.setattr(cls, method, slow(name, getattr(cls, method)))
    found = {stage.name: stage.each for stage in estimate(residual(), recipe("intraq"), input_size=SIZE).stages}
    assert seen["student"] == [256] * 3, "the batch of the student, not the generator's"
    for name in ("generator steps", "student steps", "held-out agreement"):
        assert 0.02 <= found[name] < 0.4, name


def test_nothing_changes_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = residual()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    state = torch.get_rng_state()
    for name in ("hast", "autorecon", "qimera_ait", "zeroq_mixed"):
        estimate(
            teacher, recipe(name, *(["generator.genotype=search"] if name == "autorecon" else [])), input_size=SIZE
        )
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert not teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert torch.equal(torch.get_rng_state(), state) and list(tmp_path.iterdir()) == []


def test_memory_on_the_cpu_is_the_rise_of_the_peak(monkeypatch):
    peaks = iter([1000, 1750])
    monkeypatch.setattr(module, "_peak_bytes", lambda device, reset=False: next(peaks))
    assert estimate(residual(), recipe("rtn"), input_size=SIZE).peak_bytes == 750


def test_the_peak_is_in_bytes():
    """A block that is written to must show up in the process's peak."""
    before = module._peak_bytes(torch.device("cpu"))
    block = torch.ones(max(before, 1 << 28) // 4 + (64 << 20) // 4)
    rise = module._peak_bytes(torch.device("cpu")) - before
    assert 0 < rise < 2 * block.nbytes


def test_what_a_run_refuses_is_refused():
    untrained = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="looks untrained"):
        estimate(untrained.eval(), recipe("ait"), input_size=SIZE)


def test_the_search_for_a_generator_is_counted(monkeypatch):
    """On the super-net, with its choices and both optimizers; the generator steps are those of a usual generator."""
    seen = []
    step = Search.step
    monkeypatch.setattr(Search, "step", lambda self, i: (seen.append(type(self.net).__name__), step(self, i))[1])
    monkeypatch.setattr("zsq_fast.methods.search.search_generator", lambda *_, **__: pytest.fail("it ran"))
    search = recipe("autorecon", "generator.genotype=search", "generator.search_steps=70")
    stages = estimate(residual(), search, input_size=SIZE).stages
    assert (stages[0].name, stages[0].count) == ("search steps", 70) and stages[0].each > 0
    assert seen == ["SuperNet"] * 3
    assert stages[1:] and [s.name for s in stages[1:]] == [
        s.name for s in estimate(residual(), recipe("autorecon"), input_size=SIZE).stages
    ]


def test_bits_are_not_looked_for(monkeypatch):
    """That can take longer than everything that is measured."""
    monkeypatch.setattr("zsq_fast.methods.mixed.sensitivity", lambda *_, **__: pytest.fail("it ran"))
    estimate(residual(), recipe("zeroq_mixed"), input_size=SIZE)


def test_only_what_the_process_computes_counts(monkeypatch):
    step = Synthesis.step

    def waits(self, *args):
        time.sleep(0.5)  # as if others had the machine
        return step(self, *args)

    monkeypatch.setattr(Synthesis, "step", waits)
    found = estimate(residual(), recipe("rtn"), input_size=SIZE, now=time.process_time)
    assert {stage.name: stage.each for stage in found.stages}["generator steps"] < 0.4


def test_averaged_parameters_cost_no_error():
    """The estimate takes student steps where a run would not be in its schedule yet."""
    quick = recipe("ait", "schedule.warmup_epochs=2", "schedule.iterations=5", "student.average=0.9")
    assert estimate(residual(), quick, input_size=SIZE).seconds > 0
