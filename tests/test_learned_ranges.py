"""Learned ranges (LSQ): layers, conversion, whole runs, and what they are refused with."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import residual, tiny
from stopping import metrics, same_tensors, whole_and_resumed
from torch import nn

import zsq_fast as zsq
from zsq_fast.errors import UsageError
from zsq_fast.methods import Trainer, load_recipe, run_together, student_like
from zsq_fast.nn import calibrating, freeze_ranges, learned_steps
from zsq_fast.nn.layers import SMALLEST_STEP

SIZE = (3, 8, 8)
TINY = ["schedule.epochs=4", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=2", "schedule.calibration_epochs=2",
        "schedule.milestones=[3]", "quant.ema=plain", "quant.weight_bits=3"]  # fmt: skip
IMAGES = ["images.count=16", "images.batch_size=8", "images.iterations=3", "student.batch_size=6", "student.lr=1e-3"]


def recipe(name="hast_lsq", *more):
    return load_recipe(name, input_size=SIZE, overrides=[*TINY, *(IMAGES if "hast" in name else []), *more])


def calibrated(device="cpu", bits=3, **options) -> nn.Module:
    student = zsq.convert(residual().to(device), bits, bits, ema="plain", input_size=SIZE, **options)
    with torch.no_grad(), calibrating(student):
        student(torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(1)).to(device))
    return student


# ---- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda r: zsq.QuantConv2d(4, 6, 3, weight_bits=3, ranges=r),
                                  lambda r: zsq.QuantLinear(36, 6, weight_bits=3, ranges=r)], ids=["conv", "linear"])  # fmt: skip
def test_a_weight_begins_at_its_range_and_learns_by_the_published_gradient(make, device):
    layer, plain = make("learned").to(device), make("minmax").to(device)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "step"})  # min/max keys are those of nn
    x = torch.randn(2, 4, 5, 5, device=device) if isinstance(layer, nn.Conv2d) else torch.randn(2, 36, device=device)
    assert torch.equal(layer(x), plain(x)) and "ranges='learned'" in repr(layer)  # until it is frozen
    with torch.no_grad():
        layer.weight[0].abs_()  # a row of one sign, and one of zeros
        layer.weight[1].zero_()
        layer.weight[2].abs_().neg_()
    layer.freeze()
    rows = layer.weight.detach().flatten(1)
    want = torch.maximum(rows.amax(1) / 3, rows.amin(1) / -4).clamp(min=SMALLEST_STEP)
    assert torch.equal(layer.step.detach(), want)
    q = layer.quantized_weight().flatten(1)
    assert ((q - rows).abs() <= layer.step[:, None] / 2 * (1 + 1e-5)).all()  # nothing is clipped
    with torch.no_grad():
        layer.step[3:] /= 2  # now something is
        layer.step[[0, 2]] *= 1.01  # off the end code, where one-sided derivatives differ
    layer(x).square().sum().backward()
    s = layer.step.detach().clone().requires_grad_()
    w = layer.weight.detach().clone().requires_grad_()
    steps = s.view(-1, *[1] * (w.dim() - 1))
    position = w / steps
    clipped = position.clamp(-4, 3)
    value = (clipped + (clipped.round() - clipped).detach()) * steps  # LSQ eq. 1 to 3
    out = F.conv2d(x, value, layer.bias) if isinstance(layer, nn.Conv2d) else F.linear(x, value, layer.bias)
    out.square().sum().backward()
    torch.testing.assert_close(layer.step.grad, s.grad * (36 * 3) ** -0.5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signed", [False, True])
def test_an_activation_begins_at_its_range(signed, device):
    act = zsq.QuantAct(3, ema="plain", ranges="learned").to(device)
    x = torch.randn(6, 5, 4, device=device)
    x = x if signed else x.relu()
    plain = zsq.QuantAct(3, ema="plain").to(device)
    assert torch.equal(act.train()(x), plain.train()(x))
    act.eval(), plain.eval()
    assert torch.equal(act(x), plain(x)) and not act.learns
    act.freeze()
    low, high = (-4, 3) if signed else (0, 7)
    assert act.codes == (low, high)
    want = torch.maximum(act.hi / 3, act.lo / -4) if signed else act.hi / 7
    torch.testing.assert_close(act.step.detach(), want)
    if not signed:  # the same grid
        torch.testing.assert_close(act(x), plain(x))
    act(x).square().sum().backward()
    position = x / act.step.detach()
    slope = torch.where((position >= low) & (position <= high), position.round() - position, position.clamp(low, high))
    grad = (2 * act(x).detach() * slope).sum() / (20 * high) ** 0.5  # 20 features of an image
    torch.testing.assert_close(act.step.grad, grad, rtol=1e-4, atol=1e-5)
    again = zsq.QuantAct(3, ema="plain", ranges="learned").to(device).freeze()
    again.load_state_dict(act.state_dict())
    assert torch.equal(again(x), act(x)) and again.codes == act.codes
    with torch.no_grad():
        act.step.mul_(2)
    kept = act.step.detach().clone()
    assert torch.equal(act.freeze().step, kept)  # frozen again: goes on
    act.unfreeze().train()(x), act.freeze()
    torch.testing.assert_close(act.step.detach(), torch.maximum(act.hi / high, act.lo / -4 if signed else act.lo))


def test_wrong_words():
    for build in (
        lambda: zsq.QuantAct(4, ranges="lsq"),
        lambda: zsq.QuantLinear(2, 2, ranges="lsq"),
        lambda: zsq.QuantConv2d.from_float(nn.Conv2d(1, 1, 1), ranges="lsq"),
        lambda: zsq.convert(tiny(), 4, 4, ranges="lsq"),
    ):
        with pytest.raises(UsageError, match="ranges must be 'minmax' or 'learned', got 'lsq'"):
            build()
    layer = zsq.QuantLinear.from_float(nn.Linear(3, 2), ranges="learned")
    assert layer.step.shape == (2,) and zsq.QuantConv2d.from_float(nn.Conv2d(1, 1, 1)).step is None
    zsq.QuantLinear(0, 2, ranges="learned").freeze()


# ---- networks ----------------------------------------------------------------------------------------------------------


def test_conversion_state_and_account(device):
    student, plain = calibrated(device, ranges="learned"), calibrated(device)
    steps = learned_steps(student)
    assert len(steps) == sum(isinstance(m, zsq.QuantAct | nn.Conv2d | nn.Linear) for m in student.modules())
    assert not learned_steps(plain) and set(student.state_dict()) == set(plain.state_dict()) | set(steps)
    x = torch.randn(4, *SIZE, device=device)
    one, other = zsq.summarize(student), zsq.summarize(plain)
    assert (one.float_bytes, one.quantized_weights) == (other.float_bytes, other.quantized_weights)
    rows = sum(m.weight.shape[0] for m in student.modules() if isinstance(m, zsq.QuantConv2d | zsq.QuantLinear))
    assert other.packed_bytes - one.packed_bytes == 4 * rows  # no zero points
    assert torch.equal(student(x), plain(x))
    freeze_ranges(student), freeze_ranges(plain)
    assert all((s > 0).all() for s in steps.values()) and not torch.equal(student(x), plain(x))
    want = student(x)
    with zsq.nn.weights_quantized_together(student):  # leaves them alone: one graph per forward pass
        assert torch.equal(student(x), want)
        for _ in range(2):
            student(x).sum().backward()
    again = zsq.convert(residual().to(device), 3, 3, input_size=SIZE, ranges="learned").eval()
    freeze_ranges(again)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(x), student(x)) and torch.equal(copy.deepcopy(student)(x), student(x))
    late = zsq.convert(residual().to(device), 3, 3, input_size=SIZE, ranges="learned").eval()
    late.load_state_dict(student.state_dict())
    with torch.no_grad():
        for step in learned_steps(late).values():
            step.mul_(1.1)
    freeze_ranges(late)  # what was loaded is not begun anew
    assert all(torch.equal(a, steps[name] * 1.1) for name, a in learned_steps(late).items())


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(UsageError, match=r"inundation\.enabled must be false when quant\.ranges is 'learned'"):
        recipe("ait", "quant.ranges=learned")
    with pytest.raises(UsageError, match=r"quant\.start must be 'nearest' when quant\.ranges is 'learned'"):
        recipe("hast_lsq", "quant.start=squant")
    with pytest.raises(UsageError, match=r"quant\.ranges must be 'minmax' or 'learned', got 'lsq'"):
        recipe("hast", "quant.ranges=lsq")
    hast, lsq = (load_recipe(name, input_size=SIZE).to_dict() for name in ("hast", "hast_lsq"))
    assert {k for k in hast if hast[k] != lsq[k]} == {"name", "title", "quant"}
    assert {k for k in hast["quant"] if hast["quant"][k] != lsq["quant"][k]} == {"ranges"}
    assert "separate protocol" in lsq["title"]


@pytest.mark.parametrize("warmup", [2, 3])
def test_timeline(warmup):
    """Min/max until the calibration ends, then the steps count, and move with the first student step, without weight decay."""
    more = ["student.lr=1e-2", "student.weight_decay=0.1", f"schedule.warmup_epochs={warmup}"]
    trainer = Trainer(residual(), recipe("gdfq", "quant.ranges=learned", *more), input_size=SIZE)
    decays = {id(p): g["weight_decay"] for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    steps = learned_steps(trainer.student)
    assert len(decays) == len(list(trainer.student.parameters()))
    assert all(decays[id(p)] == (0.0 if name in steps else 0.1) for name, p in trainer.student.named_parameters())
    measured: dict[str, bool] = {}
    trainer.evaluate = lambda network: measured.update(rtn=getattr(network[0].a, "learns", False)) or 50.0
    seen, iterate = [], trainer._iterate

    def watched(batch) -> None:
        seen.append(torch.cat([s.detach().flatten() for s in steps.values()]))
        iterate(batch)
        if trainer.state.step == 3 * warmup:
            assert measured["rtn"]  # on the grid that the student starts from

    trainer._iterate = watched
    result = trainer.run()
    seen.append(torch.cat([s.detach().flatten() for s in steps.values()]))
    assert all((s == 0).all() for s in seen[:6]) and (seen[6] > 0).all()
    assert all(torch.equal(s, seen[6]) for s in seen[6 : 3 * warmup + 1])
    assert not torch.equal(seen[3 * warmup], seen[3 * warmup + 1]) and (seen[-1] >= SMALLEST_STEP).all()
    assert all(m.learns for m in result.student.modules() if isinstance(m, zsq.QuantAct | zsq.QuantConv2d))


def test_a_step_never_falls_below_zero():
    """A mirrored grid would go unnoticed."""
    trainer = Trainer(residual(), recipe("gdfq", "quant.ranges=learned", "student.momentum=0", "student.nesterov=false",
                                         "student.lr=1e-3"), input_size=SIZE)  # fmt: skip
    step = next(iter(learned_steps(trainer.student).values()))
    backward = trainer.losses.backward

    def against(batch):
        result = backward(batch)
        step.grad = torch.full_like(step, 1e6)
        return result

    trainer.losses.backward = against
    trainer.run()
    assert (step == SMALLEST_STEP).all()


def test_recipe_runs_in_lockstep_and_comes_back(device, tmp_path):
    teacher = residual().to(device)
    trainers = [Trainer(teacher, recipe("hast"), input_size=SIZE, seed=3)]
    trainers.append(Trainer(teacher, recipe(), input_size=SIZE, seed=3, share=trainers[0]))
    plain, learned = run_together(trainers)
    alone = Trainer(teacher, recipe(), input_size=SIZE, seed=3).run()
    assert same_tensors(learned.student, alone.student) and learned.history == alone.history
    assert not learned_steps(plain.student) and not torch.equal(plain.student[0].a.weight, learned.student[0].a.weight)
    loaded = student_like(teacher, recipe(), SIZE).to(memory_format=trainers[1].layout)
    loaded.load_state_dict(learned.student.state_dict())
    x = torch.randn(4, *SIZE, device=device)
    assert torch.equal(loaded(x), learned.student(x))


@pytest.mark.parametrize(
    ("step", "which"),
    [
        (4, ["hast_lsq"]),
        (6, ["hast_lsq"]),
        (8, ["hast_lsq"]),
        (4, ["hast", "quant.start=squant"]),
        (8, ["hast", "quant.start=squant"]),
    ],
    ids=["in the calibration", "at its end", "while steps are learned", "squant, in the calibration", "squant, later"],
)
def test_a_resumed_run_ends_in_the_same_bits(step, which, tmp_path):
    """Steps are not begun anew, nor weights rounded twice."""
    options = dict(recipe=recipe(*which), input_size=SIZE, progress=False)
    whole, again = whole_and_resumed(residual, options, step, tmp_path)
    assert same_tensors(again, whole) and bool(learned_steps(again)) == (which == ["hast_lsq"])
    records = metrics(tmp_path)
    assert records[0] == records[1] and len(records[0]) == 4


def test_learning_the_steps_lowers_the_loss():
    """The output error of a layer whose step begins far too large falls by learning the step alone."""
    layer = zsq.QuantConv2d(8, 8, 3, weight_bits=3, ranges="learned")
    x, target = torch.randn(16, 8, 6, 6), None
    with torch.no_grad():
        target = layer._conv_forward(x, layer.weight, layer.bias)
        layer.step.fill_(0.08)
    layer.freeze()
    optimizer, losses = torch.optim.SGD([layer.step], lr=1.0), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
