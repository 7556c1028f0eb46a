"""SQuant's rounding: its invariants, brute force on small cases, the layer's error on inputs with a mean, and whole runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import residual, tiny
from torch import Tensor, nn

import zsq_fast as zsq
from zsq_fast.errors import UsageError
from zsq_fast.methods import Trainer, load_recipe
from zsq_fast.nn import balanced_codes, balanced_rounding_
from zsq_fast.ops import weight_codes

SIZE = (3, 8, 8)
TINY = ["schedule.epochs=4", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=2", "schedule.calibration_epochs=2",
        "schedule.milestones=[3]", "quant.ema=plain", "quant.weight_bits=3"]  # fmt: skip
SHAPES = [(6, 4, 3, 3), (8, 16, 1, 1), (8, 1, 3, 3), (5, 40), (3, 7, 5)]


def errors(weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`[C, kernels, values]`, exact."""
    per_row = (codes.double().flatten(1) - scale.double()[:, None] * weight.double().flatten(1)).view(weight.shape)
    return per_row.reshape(*weight.shape[:2], -1)


def movable(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    ends = (rows == rows.amin(1, keepdim=True)) | (rows == rows.amax(1, keepdim=True))
    return ~ends.view(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_vanish(shape, bits, device):
    for seed in range(20):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        near, scale, _ = weight_codes(weight, bits)
        codes, same_scale = balanced_codes(weight, bits)
        assert torch.equal(scale, same_scale) and torch.equal(codes, codes.round())
        before, after = errors(weight, near, scale), errors(weight, codes, scale)
        # Where a sum stays larger, nothing is left that may move against it.
        total, ends = after.sum((1, 2)), (near.flatten(1).amin(1), near.flatten(1).amax(1))
        against = torch.where(total > 0, *ends)[:, None, None] != codes.reshape(before.shape)
        rest = movable(weight).reshape(before.shape) & against & (after * total[:, None, None].sign() > 0)
        stuck = ~rest.any(2) | (after.sum(2) * total[:, None].sign() <= 0)
        assert ((total.abs() <= 0.5 + 1e-9) | stuck.all(1)).all()
        assert (after.abs() < 1 + 1e-5).all() and ((codes - near).abs() <= 1).all()
        assert (after.sum(2).abs() <= torch.clamp(before.sum(2).abs(), min=1 + 1e-9)).all()
        assert torch.equal(codes[~movable(weight)], near[~movable(weight)])
        rows = codes.flatten(1), near.flatten(1)
        assert torch.equal(rows[0].amin(1), rows[1].amin(1)) and torch.equal(rows[0].amax(1), rows[1].amax(1))
    if shape[0] == 6:
        assert (total.abs() <= 0.5 + 1e-9).all() and before.sum((1, 2)).abs().max() > 1


def fewest(error: Tensor, free: Tensor, low: Tensor, high: Tensor) -> tuple[int, float] | None:
    """Brute force: fewest codes to move by one against their error so that the sum is within 1/2, and then the least squared error."""
    best = None
    for chosen in itertools.product((0, 1), repeat=len(error)):
        pick = torch.tensor(chosen, dtype=torch.bool)
        step = -error.sign() * pick
        if (pick & ~free).any() or (step[pick] == 0).any() or ((step < 0) & low).any() or ((step > 0) & high).any():
            continue
        if (error + step).sum().abs() <= 0.5:
            found = int(pick.sum()), float((error + step).square().sum())
            best = found if best is None else min(best, found)
    return best


@pytest.mark.parametrize("shape", [(40, 9), (40, 1, 3, 3)], ids=str)
def test_no_flip_more_than_needed_and_the_cheapest_ones(shape):
    """Rows of one kernel (stage 1) and rows of kernels of one value (stage 2), against every choice of flips."""
    weight = torch.randn(shape)
    near, scale, _ = weight_codes(weight, 3)
    codes, _ = balanced_codes(weight, 3)
    before, after = (errors(weight, c, scale).flatten(1) for c in (near, codes))
    flips = (codes - near).flatten(1)
    solved = 0
    for r in range(len(weight)):
        ends = near.flatten(1)[r]
        want = fewest(before[r], movable(weight).flatten(1)[r], ends == ends.min(), ends == ends.max())
        if want is not None:
            count, cost = want
            assert int(flips[r].abs().sum()) == count
            assert float(after[r].square().sum()) == pytest.approx(cost)
            solved += count > 0
    assert solved > 10


def test_a_kernel_that_overshot_is_taken_back():
    """Stage 2 undoes the last flip of a kernel rather than flipping another one: of two kernels with sums 0.6 and 0.7, only one moves."""
    near = torch.tensor([[[-4.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    offset = torch.tensor([[[0.0, 0.0, 0.3, 0.2, 0.1], [0.3, 0.2, 0.2, 0.0, 0.0]]])
    weight = near - offset  # errors are the offsets: at 3 bits the scale is 1
    codes, scale = balanced_codes(weight, 3)
    assert scale == 1 and torch.equal(weight_codes(weight, 3)[0], near)
    kernels = errors(weight, codes, scale).sum(2)
    assert (codes - near).abs().sum() == 1 and codes[0, 1, 0] == -1  # the other is back where it was
    torch.testing.assert_close(kernels, torch.tensor([[0.6, -0.3]], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_move_to_the_middle_of_the_new_cell(bits, device):
    model = zsq.convert(residual().to(device), bits, 4, input_size=SIZE)
    before = {k: w.detach().clone() for k, w in zsq.nn.quantized_weights(model).items()}
    others = {k: v.clone() for k, v in model.state_dict().items() if k not in before and not v.isnan().any()}
    balanced_rounding_(model)
    moved = 0
    for name, weight in zsq.nn.quantized_weights(model).items():
        old = before[name]
        codes, scale = balanced_codes(old, bits)
        found, same_scale, lowest = weight_codes(weight, bits)
        assert torch.equal(found, codes) and torch.equal(scale, same_scale)
        near, _, same_lowest = weight_codes(old, bits)
        assert torch.equal(lowest, same_lowest)
        rows = weight.flatten(1), old.flatten(1)
        assert torch.equal(rows[0].amin(1), rows[1].amin(1)) and torch.equal(rows[0].amax(1), rows[1].amax(1))
        stays = codes == near
        assert torch.equal(weight[stays], old[stays])
        inner = ~stays & (codes > near.flatten(1).amin(1).view(-1, *[1] * (old.dim() - 1)))
        inner &= codes < near.flatten(1).amax(1).view(-1, *[1] * (old.dim() - 1))
        position = weight.detach() * scale.view(-1, *[1] * (old.dim() - 1))
        torch.testing.assert_close(position[inner], codes[inner], rtol=1e-5, atol=1e-6)
        moved += int((~stays).sum())
    assert moved > 20
    assert all(torch.equal(model.state_dict()[k], v) for k, v in others.items())


def test_rows_that_cannot_move():
    """Rows of equal values, of two values, of zeros, of one value; empty weights; weights far from zero."""
    model = nn.Sequential(*(zsq.QuantLinear(n, 3, weight_bits=3) for n in (5, 6, 1, 7)), zsq.QuantConv2d(0, 2, 3))
    with torch.no_grad():
        model[0].weight.fill_(0.3)
        model[1].weight.copy_(torch.tensor([[1.0, -2.0, 1.0, 1.0, -2.0, -2.0]] * 3))
        model[3].weight.zero_()
    before = [m.weight.detach().clone() for m in model]
    balanced_rounding_(model)
    assert all(torch.equal(m.weight, w) for m, w in zip(model, before, strict=True))
    far = zsq.QuantLinear(50, 4, weight_bits=4)
    far.weight.data.add_(10)  # one-signed rows: codes far outside int8
    codes, scale = balanced_codes(far.weight, 4)
    error = errors(far.weight.detach(), codes, scale).sum((1, 2))
    balanced_rounding_(far)
    assert error.abs().max() <= 0.5 and torch.equal(weight_codes(far.weight, 4)[0], codes)


def test_tied_weights_move_once_and_layouts_agree():
    model = zsq.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), 3, 3)
    model[1].weight = model[0].weight
    last = zsq.convert(nn.Sequential(nn.Conv2d(4, 4, 3)), 3, 3)
    last.load_state_dict({"0.weight": model[0].weight.detach().clone(), "0.bias": model[0].bias.detach().clone()})
    last.to(memory_format=torch.channels_last)
    balanced_rounding_(model)
    balanced_rounding_(last)
    assert torch.equal(model[0].weight, last[0].weight) and last[0].weight.stride() != model[0].weight.stride()


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 32, 3), nn.Linear(64, 32)], ids=["conv", "linear"])
def test_inputs_with_a_mean_are_served_better(layer, device):
    """A post-ReLU input has a mean, and its values within a channel go together: errors that cancel beat errors that are small."""
    teacher = nn.Sequential(layer).to(device)
    shape = (64, 16, 6, 6) if isinstance(layer, nn.Conv2d) else (256, 64)
    level = (
        torch.rand(*shape[:2], *[1] * (len(shape) - 2), device=device)
        if len(shape) == 4
        else torch.rand(256, 1).to(device)
    )
    x = level + 0.1 * torch.randn(shape, device=device)
    off = {}
    for start in ("nearest", "squant"):
        student = zsq.convert(teacher, 3, 8)
        if start == "squant":
            balanced_rounding_(student)
        with torch.no_grad():
            off[start] = float((student(x) - teacher(x)).square().mean())
    assert off["squant"] < off["nearest"] / 3


# ---- runs --------------------------------------------------------------------------------------------------------------


def recipe(name: str, *more: str):
    return load_recipe(name, input_size=SIZE, overrides=[*TINY, *more])


def test_the_recipe_asks_for_it():
    assert recipe("ait").quant.start == "nearest"
    with pytest.raises(UsageError, match=r"quant\.start must be 'nearest' or 'squant', got 'squat'"):
        recipe("ait", "quant.start=squat")
    teacher = residual()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    want = zsq.convert(teacher, 3, 4, ema="plain", input_size=SIZE)
    balanced_rounding_(want)
    student = Trainer(teacher, recipe("rtn", "quant.start=squant"), input_size=SIZE).run().student
    for name, p in want.named_parameters():
        assert torch.equal(p, student.state_dict()[name])  # and the student of rtn takes no step
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_it_is_where_the_student_starts(tmp_path):
    options = dict(input_size=SIZE, seed=2)
    teacher = tiny()
    alone = Trainer(teacher, recipe("ait", "quant.start=squant"), **options).run()
    first = Trainer(teacher, recipe("ait"), **options)
    plain, together = zsq.methods.run_together(
        [first, Trainer(teacher, recipe("ait", "quant.start=squant"), share=first, **options)]
    )
    for a, b in zip(alone.student.state_dict().values(), together.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(plain.student[0].weight, together.student[0].weight)
