"""Figures per layer against the reference quantizers, applied by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Reuser, look_trained, tiny
from torch import nn

import zsq_fast as zsq
from zsq_fast import reference
from zsq_fast.analysis.layers import draw, measure_layers
from zsq_fast.errors import UsageError
from zsq_fast.reference.fake_quant import encode, grid

SIZE = (3, 8, 8)


def images(count: int = 10) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(5))


def student_of(teacher: nn.Module, device, bits=3, **options) -> nn.Module:
    """Its ranges follow the first half of the images alone, so that some of the others lie outside."""
    student = zsq.convert(teacher, bits, 4, ema="plain", input_size=SIZE, **options).eval()
    with zsq.nn.calibrating(student), torch.no_grad():
        student(images()[:5].to(device))
    zsq.nn.freeze_ranges(student)
    with torch.no_grad():  # a trained student's weights are not its teacher's
        for p in zsq.nn.quantized_weights(student).values():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(6)).to(device)
    return student


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(1), q.double().log_softmax(1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


def decibel(x: torch.Tensor, q: torch.Tensor) -> float:
    x, q = x.detach().double(), q.detach().double()
    return 20 * math.log10(x.norm() / (x - q).norm())


def test_weights(device):
    teacher = tiny().to(device)
    student = student_of(teacher, device, {"0": 3, "3": 2, "8": 5})
    found = measure_layers(teacher, student, images().to(device), input_size=SIZE, batch_size=4)
    assert [layer.name for layer in found.layers if layer.kind == "weight"] == ["0", "3", "8"]
    for layer in found.layers[:3]:
        module = student.get_submodule(layer.name)
        w, bits = module.weight.detach(), module.weight_bits
        assert layer.bits == bits and (layer.lo, layer.hi) == (w.min().item(), w.max().item()) == (
            layer.seen_lo,
            layer.seen_hi,
        )
        assert layer.sqnr_db == pytest.approx(decibel(w, reference.fake_quant_weight(w, bits)), abs=1e-9)
        rows, codes = w.flatten(1), []
        for row in rows:
            scale, zero = grid(row.min(), row.max(), bits)
            codes.append((encode(row, scale, zero, bits) + 2 ** (bits - 1)).cpu().numpy())
        assert layer.histogram == tuple(np.bincount(np.concatenate(codes).astype(int), minlength=2**bits))
        assert (
            layer.dead_codes == pytest.approx(np.mean([2**bits - len(set(c)) for c in codes])) and layer.saturated == 0
        )
        alone = tiny().to(device)
        weight = alone.get_submodule(layer.name).weight
        with torch.no_grad():
            weight.copy_(reference.fake_quant_weight(weight, bits))
            assert layer.divergence == pytest.approx(
                kl(teacher(images().to(device)), alone(images().to(device))), rel=1e-6
            )
    assert found.layers[1].dead_codes < 4 and found.images == 10
    assert found.divergence == pytest.approx(kl(teacher(images().to(device)), student(images().to(device))), rel=1e-6)


def activations(student: nn.Module, x: torch.Tensor, place: int) -> torch.Tensor:
    """What reaches the quantizer of the rectifier at this place of tiny()."""
    with torch.no_grad():
        x = student[:place](x)
        return F.relu6(x) if place == 5 else F.relu(x)


def test_activations(device):
    teacher, x = tiny().to(device), images().to(device)
    student = student_of(teacher, device)
    found = measure_layers(teacher, student, x, input_size=SIZE, batch_size=4).layers[3:]
    assert [layer.name for layer in found] == ["2.quant.0", "5.quant.0"]
    for layer, place in zip(found, (2, 5), strict=True):
        act, values = student[place].quant[0], activations(student, x, place)
        assert (layer.kind, layer.bits, layer.lo, layer.hi) == ("activation", 4, act.lo.item(), act.hi.item())
        assert (layer.seen_lo, layer.seen_hi) == (values.min().item(), values.max().item())
        outside = (values > act.hi).double().mean().item()
        assert 0 < layer.saturated == pytest.approx(outside)
        assert layer.sqnr_db == pytest.approx(
            decibel(values, reference.fake_quant_act(values, act.lo, act.hi, 4)), abs=1e-4
        )
        codes = (encode(values, *grid(act.lo, act.hi, 4), 4) + 8).long().flatten().bincount(minlength=16).tolist()
        assert list(layer.histogram) == codes and layer.dead_codes == codes.count(0)


def test_a_range_too_wide_leaves_codes_dead():
    teacher = tiny()
    student = student_of(teacher, "cpu")
    student[2].quant[0].hi *= 4
    layer = measure_layers(teacher, student, images(), input_size=SIZE).layers[3]
    assert layer.dead_codes >= 10 and layer.saturated == 0 and layer.seen_hi < layer.hi / 3


def test_learned_ranges():
    teacher, x = tiny(), images()
    student = student_of(teacher, "cpu", ranges="learned")
    with torch.no_grad():
        student[2].quant[0].step *= 0.7
        student[0].step *= 0.9
    found = {layer.name: layer for layer in measure_layers(teacher, student, x, input_size=SIZE).layers}
    act, values = student[2].quant[0], activations(student, x, 2)
    top = 15 * act.step.item()
    layer = found["2.quant.0"]
    assert (layer.lo, layer.hi) == (0, pytest.approx(top)) and layer.saturated == pytest.approx(
        (values > top).double().mean()
    )
    codes = (values / act.step).round().clamp(0, 15).detach()
    assert list(layer.histogram) == codes.long().flatten().bincount(minlength=16).tolist()
    assert layer.sqnr_db == pytest.approx(decibel(values, codes * act.step), abs=1e-4)
    w, step = student[0].weight, student[0].step.view(-1, 1, 1, 1)
    codes = (w / step).round().clamp(-4, 3).detach()
    assert list(found["0"].histogram) == (codes + 4).long().flatten().bincount(minlength=8).tolist()
    assert found["0"].sqnr_db == pytest.approx(decibel(w, codes * step), abs=1e-4)


def test_one_activation_alone_is_the_one_of_its_call():
    """A rectifier that is called twice has two quantizers; only the named call of the teacher goes through one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        teacher = look_trained(Reuser())
    student, x = student_of(teacher, "cpu"), images()
    found = {layer.name: layer for layer in measure_layers(teacher, student, x, input_size=SIZE, batch_size=4).layers}
    with torch.no_grad():
        for call, act in enumerate(student.relu.quant):
            y = F.relu(teacher.norm1(teacher.conv1(x)))
            y = act(y) if call == 0 else y
            y = F.relu(teacher.norm2(teacher.conv2(y)) + y)
            y = act(y) if call == 1 else y
            expected = kl(teacher(x), teacher.head(y.mean((2, 3))))
            assert 0 < found[f"relu.quant.{call}"].divergence == pytest.approx(expected, rel=1e-6)


def test_networks_and_random_state_stay_as_they_are():
    teacher = tiny()
    student = student_of(teacher, "cpu")
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in (teacher, student)]
    random = torch.get_rng_state()
    first = measure_layers(teacher, student, images(), input_size=SIZE)
    for network, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert not network.training and all(p.grad is None for p in network.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert measure_layers(teacher, student, images(), input_size=SIZE) == first


def test_table_and_picture():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    teacher = tiny()
    student = student_of(teacher, "cpu", {"0": 8, "3": 2, "8": 5})
    with torch.no_grad():
        student[8].weight.copy_(student[8].quantized_weight())  # no error: an infinite ratio
    found = measure_layers(teacher, student, images(), input_size=SIZE)
    assert found.layers[2].sqnr_db > 100
    lines = str(found).splitlines()
    assert len(lines) == 7 and "2.quant.0" in lines[4] and lines[-1].startswith("KL(teacher || student)")
    draw(found, figure)
    figure.canvas.draw()
    assert [a.get_title(loc="left").split("s,")[0] for a in figure.axes[:2]] == ["weight", "activation"]
    assert len(figure.axes[0].patches) == 3 and len(figure.axes[1].patches) == 2
    assert found.to_dict()["layers"][0]["name"] == "0"


def test_refused():
    teacher = tiny()
    with pytest.raises(UsageError, match="at least one image"):
        measure_layers(teacher, student_of(teacher, "cpu"), images(0), input_size=SIZE)
    with pytest.raises(UsageError, match="needs a quantized network"):
        measure_layers(teacher, teacher, images(), input_size=SIZE)
