"""Gradient cosines: closed forms, the same numbers during training and after it, and a training that does not notice."""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics

import pytest
import torch
from cli_support import SHORT, call, make_tiny
from networks import residual, tiny
from stopping import same_tensors
from torch import nn

import zsq_fast as zsq
from zsq_fast.analysis.gradients import CosineHistory, draw, draw_history, draw_tracked, gradient_cosines, tracked
from zsq_fast.analysis.losses import BatchLosses
from zsq_fast.errors import Interrupted, UsageError
from zsq_fast.methods import Trainer, load_recipe, run_together
from zsq_fast.methods.cosine import CosineMeter, CosineTracker
from zsq_fast.methods.recipe import Student
from zsq_fast.methods.steps import StudentStep
from zsq_fast.runs import RunDir

SIZE = (3, 8, 8)
TINY = ["schedule.epochs=4", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=2", "schedule.calibration_epochs=2",
        "quant.ema=plain", "quant.weight_bits=3", "images.count=12", "images.batch_size=8", "images.iterations=2",
        "student.lr=1e-3"]  # fmt: skip
ALL = Student(feature_weight=1.0)


def trainer(name: str = "kl_only", *more: str, teacher: nn.Module | None = None, **options) -> Trainer:
    recipe = load_recipe(name, input_size=SIZE, overrides=[*TINY, *more])
    return Trainer(teacher or residual(), recipe, input_size=SIZE, **options)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


# ---- the numbers -------------------------------------------------------------------------------------------------------


def test_the_meter_in_closed_form():
    """Losses that are linear in the weights: their gradients are given; one layer has no gradient, one batch none at all."""
    network = nn.Sequential(zsq.QuantLinear(4, 3), nn.BatchNorm1d(3), zsq.QuantLinear(3, 2, bias=False))
    shapes = {name: p.shape for name, p in network.named_parameters()}
    meter = CosineMeter(network, ("ce", "kl"))
    assert meter.pairs == ("ce-kl",) and meter.layers == ("0", "2")
    seen = []
    for factor in (1.0, 100.0, 0.0):
        given = {side: {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()} for side in ("ce", "kl")}
        del given["kl"]["2.weight"]
        losses = {}
        for side, parts in given.items():
            products = [(dict(network.named_parameters())[n] * g).sum() for n, g in parts.items()]
            losses[side] = torch.stack(products).sum() * (factor if side == "kl" else 1.0)
        meter.add(losses)
        if factor:
            given["kl"]["2.weight"] = torch.zeros(2, 3, dtype=torch.float64)
            for chosen in (["0.weight"], ["0.weight", "2.weight"], list(shapes)):
                sides = [torch.cat([given[side][n].flatten() for n in chosen]) for side in ("ce", "kl")]
                seen.append(cosine(*sides))
    found = meter.read()["ce-kl"]
    assert found["batches"] == 2 and found["per_batch"] == [*(pytest.approx(v, abs=1e-6) for v in seen[2::3]), None]
    assert all(p.grad is None for p in network.parameters())
    for key, values in (("weights", seen[1::3]), ("total", seen[2::3])):
        assert found[key] == pytest.approx(statistics.fmean(values), abs=1e-6)
        assert found[f"{key}_deviation"] == pytest.approx(statistics.stdev(values), abs=1e-6)
    assert found["layers"] == [pytest.approx(statistics.fmean(seen[::3]), abs=1e-6), None]
    assert found["layers_deviation"] == [pytest.approx(statistics.stdev(seen[::3]), abs=1e-6), None]
    meter.reset()
    assert meter.read() == {}


@pytest.mark.parametrize("ranges", ["minmax", "learned"])
@pytest.mark.parametrize(
    "change",
    [{}, {"kd_reduction": "batchmean", "temperature": 4.0}, {"alignment": "direct"}, {"alignment": "spatial"}],
    ids=str,
)
def test_losses_and_gradients_are_those_of_training(change, ranges):
    """Plain PyTorch against the fused kernels, value and gradient of each loss; learned steps have their scaled gradient."""
    teacher = residual().requires_grad_(False)
    teacher[4].weight *= 100  # a KL that float32 can tell from 0
    student = zsq.convert(teacher, 3, 3, ema="plain", ranges=ranges, input_size=SIZE).eval().requires_grad_(True)
    x, labels = torch.randn(8, *SIZE), torch.arange(8) % 4
    with zsq.nn.calibrating(student), torch.no_grad():
        student(x)
    zsq.nn.freeze_ranges(student)
    spec = dataclasses.replace(ALL, **change)
    trained = StudentStep(student, teacher, spec, SIZE).losses(zsq.methods.synthesis.Batch(x, labels))
    with zsq.nn.twice_differentiable(student):
        plain = student(x)
    assert torch.equal(plain, student(x)) and not any("_learned" in vars(m) for m in student.modules())
    ours = BatchLosses(teacher, x, labels, spec, ("ce", "fa", "kl")).values(student)
    for name in ("ce", "kl", "fa"):
        torch.testing.assert_close(ours[name].float(), trained[name], rtol=1e-4, atol=1e-9)
        parameters = list(student.parameters())
        grads = [
            torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
            for losses in (ours, trained)
        ]
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-8)


def test_over_batches(pair):
    """Against gradients by hand, over two batches; feature alignment does not reach the classifier."""
    teacher, student, batch = pair
    batches = [BatchLosses(teacher, batch.images[i:], batch.labels[i:], ALL, ("ce", "kl", "fa")) for i in (0, 4)]
    before = {n: t.clone() for n, t in student.state_dict().items()}
    found = gradient_cosines(student.requires_grad_(False), batches)
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())
    assert not any(p.requires_grad for p in student.parameters())
    student.requires_grad_(True)
    totals = []
    for one in batches:
        flat = {}
        for name in ("ce", "kl", "fa"):
            grads = torch.autograd.grad(one.loss(name)(student), list(student.parameters()), materialize_grads=True)
            flat[name] = torch.cat([g.flatten() for g in grads]).double()
        totals.append([cosine(flat[a], flat[b]) for a, b in (("ce", "fa"), ("ce", "kl"), ("fa", "kl"))])
    assert list(found.pairs) == ["ce-fa", "ce-kl", "fa-kl"]
    for pair_found, values in zip(found.pairs.values(), zip(*totals, strict=True), strict=True):
        assert pair_found.per_batch == pytest.approx(values, abs=1e-5)
        assert pair_found.total == pytest.approx(statistics.fmean(values), abs=1e-5)
        assert pair_found.total_deviation == pytest.approx(statistics.stdev(values), abs=1e-5)
    assert len(found.layers) == 7 and found.layers[-1] == "4"
    assert found.pairs["fa-kl"].layers[-1] is None is found.pairs["fa-kl"].layers_deviation[-1]
    assert all(-1 <= v <= 1 for v in found.pairs["ce-kl"].layers)
    assert gradient_cosines(student, batches[:1], ("kl", "ce")).pairs["ce-kl"].total_deviation is None


def test_soft_labels(pair):
    """Qimera's: the mean of the cross entropies with two classes."""
    teacher, student, batch = pair
    sides = [batch.labels, (batch.labels + 1) % 4]
    hard = [BatchLosses(teacher, batch.images, side, ALL, ("ce",)).values(student)["ce"] for side in sides]
    soft = 0.25 * nn.functional.one_hot(sides[0], 4) + 0.75 * nn.functional.one_hot(sides[1], 4)
    found = BatchLosses(teacher, batch.images, soft, ALL, ("ce",)).values(student)["ce"]
    torch.testing.assert_close(found, 0.25 * hard[0] + 0.75 * hard[1])


def test_losses_that_are_the_same(pair):
    """The distillation of a teacher that is sure of its classes, at temperature 1, is the cross entropy with them."""
    teacher, student, batch = pair
    labels = teacher(batch.images).argmax(1)
    with torch.no_grad():
        for p in teacher[4].parameters():
            p *= 1e4
    losses = BatchLosses(teacher, batch.images, labels, Student(temperature=1.0))
    (found,) = gradient_cosines(student, [losses], ("ce", "kl")).pairs.values()
    assert found.total == pytest.approx(1, abs=1e-6) and found.layers == pytest.approx([1] * 7, abs=1e-6)


# ---- during training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ait", "hast_lsq", "qimera", "synq"])
def test_tracking_changes_no_bit_of_the_training(name):
    plain, tracked = (trainer(name, track_cosine=n).run() for n in (0, 2))
    assert same_tensors(plain.student, tracked.student)
    assert [{k: v for k, v in r.items() if k != "cosine"} for r in tracked.history] == plain.history
    found = [r.get("cosine") for r in tracked.history]
    assert found[:2] == [None, None] and [r["ce-kl"]["batches"] for r in found[2:]] == [2, 1]  # steps 6, 8 and 10
    assert all(-1 <= r[p]["total"] <= 1 for r in found[2:] for p in ("ce-fa", "ce-kl", "fa-kl"))
    assert found[3]["fa-kl"]["total_deviation"] is None and "cosine" not in str(plain.history)


def test_tracked_numbers_are_those_of_the_student_at_that_step(monkeypatch):
    observe, afterwards = CosineTracker.observe, []

    def both(self, batch):
        step = self.step
        batches = [BatchLosses(step.teacher, batch.images, batch.labels, step.spec, ("ce", "kl", "fa"))]
        afterwards.append(gradient_cosines(step.student, batches))
        observe(self, batch)

    monkeypatch.setattr(CosineTracker, "observe", both)
    history = trainer("gdfq", track_cosine=1).run().history
    assert len(afterwards) == 6
    for epoch, some in ((2, afterwards[:3]), (3, afterwards[3:])):
        for pair, found in history[epoch]["cosine"].items():
            assert found["total"] == pytest.approx(statistics.fmean(a.pairs[pair].total for a in some), abs=1e-4)
            wanted = [None if None in v else pytest.approx(statistics.fmean(v), abs=1e-4)
                      for v in zip(*(a.pairs[pair].layers for a in some), strict=True)]  # fmt: skip
            assert found["layers"] == wanted


def test_a_network_without_feature_points():
    history = trainer(teacher=tiny(), track_cosine=1).run().history
    assert list(history[-1]["cosine"]) == ["ce-kl"]
    with pytest.raises(UsageError, match="track_cosine must be a number of steps"):
        trainer(track_cosine=-1)
    assert "cosine" not in trainer("rtn", "schedule.epochs=2", track_cosine=1).run().history[-1]


def test_in_lockstep():
    teacher = residual()
    first = trainer("ait", teacher=teacher, track_cosine=2)
    results = run_together([first, trainer("gdfq", teacher=teacher, share=first, track_cosine=1)])
    for name, every, result in (("ait", 2, results[0]), ("gdfq", 1, results[1])):
        assert result.history == trainer(name, teacher=teacher, track_cosine=every).run().history


def test_a_resumed_run_has_the_same_cosines(tmp_path, monkeypatch):
    """Stopped amid an epoch, with two of its three steps counted."""

    def run(name, **options):
        one = trainer("ait", track_cosine=1)
        with (RunDir.open if options else RunDir.create)(tmp_path / name, *(() if options else ({}, {}))) as folder:
            one.run_dir = folder
            one.restore()
            result = one.run()
            return result, folder.read_metrics()

    whole, records = run("whole")
    iterate = Trainer._iterate

    def stop(self, batch):
        iterate(self, batch)
        if self.state.step == 8:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_iterate", stop)
        with pytest.raises(Interrupted):
            run("cut")
    again, resumed = run("cut", again=True)
    assert same_tensors(again.student, whole.student) and again.history == whole.history
    assert resumed == records and records[2]["cosine"]["fa-kl"]["batches"] == 3
    found = records[2]["cosine"]["fa-kl"]
    assert len(found["per_batch"]) == 3 and statistics.fmean(found["per_batch"]) == pytest.approx(found["total"])


def test_on_the_command_line(tmp_path, capsys):
    network = make_tiny(tmp_path)
    words = ["quantize", *network.model, "--recipe", "kl_only", *SHORT, "--quiet", "--out", tmp_path / "run"]
    code, _, err = call(capsys, *words, "--track-cosine", 1)
    assert code == 0, err
    with RunDir.open(tmp_path / "run", read_only=True) as run:
        assert run.info["job"]["track_cosine"] == 1 and run.read_metrics()[1]["cosine"]["ce-kl"]["batches"] == 2
        history = run.read_metrics()
    code, out, err = call(
        capsys, "analyze", tmp_path / "run", "--allow-import", "--what", "cosine_history", "--no-pictures"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "analysis" / "cosine_history.json").read_text())
    assert found["epochs"] == [{"epoch": r["epoch"], "cosine": r["cosine"]} for r in history if "cosine" in r]
    kept = found["epochs"][0]["cosine"]["ce-kl"]
    assert found["layers"] == ["0", "3", "8"] and len(kept["layers"]) == 3 and len(kept["per_batch"]) == 2
    assert f"{kept['total']:+.3f}" in out and "CE-KL" in out
    code, _, err = call(capsys, *words, "--track-cosine", -1)
    assert code == 2 and "'-1' is not a number of at least 0" in err


# ---- pictures and refusals -----------------------------------------------------------------------------------------------


def test_pictures(pair, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    teacher, student, batch = pair
    found = gradient_cosines(student, [BatchLosses(teacher, batch.images, batch.labels, ALL, ("ce", "kl", "fa"))])
    assert (
        json.loads(json.dumps(found.to_dict(), allow_nan=False))["pairs"]["ce-kl"]["total"]
        == found.pairs["ce-kl"].total
    )
    history = trainer(track_cosine=2).run().history
    for name, picture in (
        ("now", lambda canvas: draw(found, canvas)),
        ("run", lambda canvas: draw_history(history, canvas)),
        ("steps", lambda canvas: draw_tracked(CosineHistory([], tracked(history)), canvas)),
    ):
        canvas = figure()
        picture(canvas)
        canvas.savefig(tmp_path / f"{name}.png")
        assert len(canvas.axes[0].get_legend().get_texts()) == 3
    points = {
        (x, y) for line in canvas.axes[0].lines if line.get_marker() == "." for x, y in line.get_xydata().tolist()
    }
    assert {
        (2.5, history[2]["cosine"]["fa-kl"]["per_batch"][0]),
        (3, history[2]["cosine"]["ce-kl"]["per_batch"][1]),
    } < points


def test_refused(pair):
    teacher, student, batch = pair
    batches = [BatchLosses(teacher, batch.images, batch.labels, ALL, ("ce", "kl"))]
    for call_, words in (
        (lambda: gradient_cosines(student, batches), "without the loss 'fa'"),
        (lambda: gradient_cosines(student, batches, ("ce",)), "two losses at least"),
        (lambda: gradient_cosines(student, [], ("ce", "kl")), "need a batch"),
        (lambda: draw_history([{"epoch": 0}], None), "--track-cosine"),
    ):
        with pytest.raises(UsageError, match=words):
            call_()
