"""Layers as drop-ins, conversion and its account, taps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import Reuser, look_trained, tiny
from torch import nn
from torch.nn.utils import prune

import zsq_fast as zsq
from zsq_fast.errors import UnsupportedModelError, UsageError
from zsq_fast.models.resnet_cifar import ResNetCifar


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"groups": 4, "bias": False},
        {"dilation": 2, "padding_mode": "reflect", "padding": 2},
    ],
)
def test_conv_is_a_drop_in(options, device):
    conv = nn.Conv2d(4, 8, 3, **options).to(device)
    quant = zsq.QuantConv2d.from_float(conv, weight_bits=4)
    x = torch.randn(2, 4, 9, 9, device=device)
    want = conv._conv_forward(x, zsq.ops.fake_quant_weight(conv.weight, 4), conv.bias)
    assert torch.equal(quant(x), want) and not torch.equal(quant(x), conv(x))
    assert quant.weight is not conv.weight and quant.weight.device == conv.weight.device
    plain = zsq.QuantConv2d(4, 8, 3, weight_bits=4, **options).to(device)
    plain.load_state_dict(conv.state_dict())  # the float keys load
    assert torch.equal(plain(x), want)
    assert isinstance(quant, nn.Conv2d) and "weight_bits=4" in repr(quant)


def test_linear_is_a_drop_in(device):
    linear = nn.Linear(7, 3).to(device)
    quant, x = zsq.QuantLinear.from_float(linear, weight_bits=3), torch.randn(5, 7, device=device)
    assert torch.equal(quant(x), nn.functional.linear(x, zsq.ops.fake_quant_weight(linear.weight, 3), linear.bias))
    other = zsq.QuantLinear(7, 3, weight_bits=3).to(device)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), quant(x))


@pytest.mark.parametrize("bits", [1, 9, 0, 2.5, "4", True])
def test_wrong_bits(bits):
    for build in (
        lambda: zsq.QuantConv2d(1, 1, 1, weight_bits=bits),
        lambda: zsq.QuantAct(bits),
        lambda: zsq.convert(tiny(), bits, 4),
    ):
        with pytest.raises(UsageError, match="must be an integer from 2 to 8"):
            build()


def test_act_range_life(device):
    act, x = zsq.QuantAct(4, ema="plain").to(device), torch.rand(4, 3, device=device) * 3
    assert act.eval()(x).isnan().all()  # never calibrated: not a plausible number
    act.train()(x)
    assert torch.equal(act.hi, (x.max() * (1 - torch.tensor(0.9))) / (1 - torch.tensor(0.9))) or torch.isclose(
        act.hi, x.max()
    )
    range_before = act.hi.clone()
    act.eval()(2 * x)
    act.train().freeze()(2 * x)
    assert torch.equal(act.hi, range_before)
    act.unfreeze()(2 * x)
    assert act.hi > range_before
    with pytest.raises(UsageError, match="'reference' or 'plain'"):
        zsq.QuantAct(4, ema="emma")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_students_in_half_precision(dtype, device):
    """Weights and activations are cast, ranges stay as they were found."""
    student = zsq.convert(tiny(), 4, 4, ema="plain", input_size=(3, 8, 8)).to(device)
    x = torch.rand(4, 3, 8, 8, device=device)
    student.train()(x)
    student.eval()
    before, want = {n: b.clone() for n, b in student.named_buffers() if n.endswith((".lo", ".hi"))}, student(x).detach()
    student.to(dtype)
    after = dict(student.named_buffers())
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], b) for n, b in before.items()) and before
    got = student(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.3, atol=0.3 * float(want.abs().max()))


def test_extrema_never_shrink(device):
    act, rng = zsq.QuantAct(4, ema="extrema").to(device), torch.Generator().manual_seed(0)
    batches = [(torch.randn(5, 3, generator=rng) * scale).to(device) for scale in (1, 3, 0.1)]
    for i, x in enumerate(batches):
        y = act.train()(x.requires_grad_())
        seen = torch.cat(batches[: i + 1]).detach()
        assert torch.equal(act.lo, seen.min()) and torch.equal(act.hi, seen.max())
        assert torch.equal(y, act.eval()(x))
    act.train()(torch.full((2, 2), float("nan"), device=device))
    assert act.lo.isnan() and act.hi.isnan()


def test_layers_survive_copy_and_serialisation():
    student = zsq.convert(tiny(), 4, 4, input_size=(3, 8, 8))
    for m in student.modules():
        if isinstance(m, zsq.QuantAct):
            m.lo.zero_(), m.hi.fill_(2.0)
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):  # noqa: S301  (what DataLoader workers and DDP do)
        assert torch.equal(other(x), student(x))


def test_counts_of_resnet20():
    """ait_family.md section 2, table row ResNet-20 C10."""
    teacher = ResNetCifar(shortcut="B").eval()
    summary = zsq.summarize(zsq.convert(teacher, 4, 4, input_size=(3, 32, 32)))
    assert (summary.weight_tensors, summary.quantized_weights, summary.act_quantizers) == (22, 270_896, 19)
    others = [p for p in teacher.parameters() if p.dim() == 1]
    assert (len(others), sum(p.numel() for p in others)) == (43, 1_578)
    norms = zsq.nn.usable_batch_norms(teacher)
    assert (len(norms), sum(m.num_features for m in norms.values())) == (21, 784)
    assert summary.packed_bytes == 270_896 // 2 + 8 * 794 + 4 * 1_578 and not summary.left_float


def test_conversion_leaves_the_float_model_alone_and_keeps_names():
    teacher = tiny()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = zsq.convert(teacher, 3, 4, input_size=(3, 8, 8))
    for p in student.parameters():
        p.data.add_(1)
    student[1].running_mean.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert type(teacher[0]) is nn.Conv2d and type(teacher[2]) is nn.ReLU
    missing, unexpected = student.load_state_dict(before, strict=False)
    assert not unexpected and all(k.rsplit(".", 1)[1] in ("lo", "hi", "beta_t") for k in missing)


def test_a_reused_rectifier_gets_one_quantizer_per_call():
    student = zsq.convert(look_trained(Reuser()), 4, 4, input_size=(3, 8, 8))
    assert len(student.relu.quant) == 2
    with torch.no_grad(), zsq.nn.calibrating(student):
        student(torch.randn(4, 3, 8, 8))
    assert not torch.equal(student.relu.quant[0].hi, student.relu.quant[1].hi)
    with pytest.raises(RuntimeError):
        student(torch.randn(4, 9, 8, 8))  # fails in the first convolution; the next forward starts over
    student(torch.randn(4, 3, 8, 8))
    assert student.relu.next_call == 0
    summary = str(zsq.summarize(student))
    assert "2 act at 4 bits" in summary and "1 rectifier calls are not those of nn.ReLU" in summary


def test_shared_modules_stay_shared():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    student = zsq.convert(nn.Sequential(conv, nn.ReLU(), conv), 4, 4)
    assert student[0] is student[2] and len(zsq.nn.quantized_weights(student)) == 1


def test_what_stays_float_is_told():
    class Own(nn.Conv2d):
        pass

    student = zsq.convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), Own(4, 4, 1), nn.ReLU()), 4, 4, input_size=(3, 4, 4)
    )
    told = {s.name: s.kind for s in zsq.summarize(student).left_float}
    assert told == {"1": "SiLU", "2": "Own"}


def test_quantizers_live_where_the_weights_live():
    """On a GPU a range left on the CPU fails at the first forward; the meta device shows it without one."""
    model = tiny().double()
    with torch.device("meta"):
        student = zsq.convert(model, 4, 4)
    assert {b.device.type for b in student.buffers()} == {"cpu"}
    assert {b.dtype for m in student.modules() if isinstance(m, zsq.QuantAct) for b in m.buffers()} == {torch.float64}
    with torch.no_grad(), zsq.nn.calibrating(student):
        assert student(torch.randn(2, 3, 8, 8, dtype=torch.float64)).isfinite().all()


class Indirect(nn.Module):
    """Reaches its layers through a bound method and a plain list."""

    def __init__(self):
        super().__init__()
        body = tiny()
        self.body, self.layers, self.run = body, list(body), self._run

    def _run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        return self.run(x)


@pytest.mark.parametrize("wrap", [lambda m: Indirect(), torch.compile], ids=["references", "compiled"])
def test_the_copy_computes_with_its_own_layers(wrap):
    teacher = wrap(tiny())
    student = zsq.convert(teacher, 2, 8, input_size=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), zsq.nn.calibrating(student):
        student(x)
    student(x).sum().backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


def test_a_copy_that_calls_the_original_is_refused():
    model = tiny()
    original = model.forward
    model.forward = lambda x: original(x)
    with pytest.raises(UnsupportedModelError, match="does not call the copy's '0'"):
        zsq.convert(model, input_size=(3, 8, 8))


@pytest.mark.parametrize(
    "spoil",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.parametrizations.weight_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
    ids=["weight_norm", "parametrized", "pruned"],
)
@pytest.mark.filterwarnings("ignore")
def test_computed_weights_are_refused_with_the_remedy(spoil):
    model = tiny()
    spoil(model[0])
    with pytest.raises(UnsupportedModelError, match="weight of '0' is computed from others"):
        zsq.convert(model)


def test_hooks_ties_and_modes_survive():
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, bias=False))
    model[2].weight = model[0].weight
    model[0].register_forward_hook(lambda m, i, out: out + 100)
    model.train()
    model[1].eval()
    student = zsq.convert(model, input_size=(3, 4, 4))
    assert [m.training for m in model] == [True, False, True] == [m.training for m in student]
    assert student[0].weight is student[2].weight and student[0](torch.zeros(1, 3, 4, 4)).min() > 90


def test_layers_that_are_never_called_stay_float():
    model = tiny()
    model.add_module("spare", nn.Linear(3, 3))
    model.forward = None  # type: ignore[assignment]
    del model.forward
    model.__class__ = type(
        "Skipping", (nn.Sequential,), {"forward": lambda self, x: nn.Sequential.forward(self[:9], x)}
    )
    student = zsq.convert(model, input_size=(3, 8, 8))
    assert type(student.spare) is nn.Linear
    assert {s.name: s.note for s in zsq.summarize(student).left_float} == {"spare": "never called in the forward"}


def test_models_that_cannot_be_quantized():
    with pytest.raises(UnsupportedModelError, match="nothing in the model can be quantized"):
        zsq.convert(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    with pytest.raises(UnsupportedModelError, match="no BatchNorm2d"):
        zsq.nn.usable_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(3)))
    with pytest.raises(UnsupportedModelError, match="keep no running statistics"):
        zsq.nn.usable_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)))
    sick = tiny()
    sick[3].weight.data[0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"in '3\.weight'"):
        zsq.convert(sick)
    with pytest.raises(UsageError, match="does not run on an input of size"):
        zsq.convert(tiny(), input_size=(5, 8, 8))


def test_tap_equals_hooks_by_hand_and_lets_go():
    teacher = tiny()
    x = torch.randn(8, 3, 8, 8, requires_grad=True)
    with zsq.nn.BNStatsTap(teacher) as tap:
        teacher(x)
        got = tap.loss()
    first = teacher[0](x)
    inputs = [first, teacher[3](teacher[2](teacher[1](first)))]
    norms = [teacher[1], teacher[4]]
    want = sum(
        (i.mean((0, 2, 3)) - n.running_mean).square().mean() + (i.var((0, 2, 3), correction=0) - n.running_var).square().mean()
        for i, n in zip(inputs, norms, strict=True)
    ) / 2  # fmt: skip
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0], rtol=1e-4, atol=1e-7)
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def tapped(teacher: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits, tap loss, and the gradient of both to the input."""
    x = x.clone().requires_grad_()
    with zsq.nn.BNStatsTap(teacher) as tap:
        logits = teacher(x)
        loss = tap.loss()
    return [logits, loss, *torch.autograd.grad(logits.square().mean() + loss, x)]


def test_tap_of_a_frozen_network_equals_the_tap_of_a_trained_one(monkeypatch):
    """Frozen batch norms compute output and statistics in one pass, the others beside their own forward."""
    x, calls, fused = torch.randn(8, 3, 8, 8), [], zsq.ops.bn_eval_sums
    monkeypatch.setattr(zsq.ops, "bn_eval_sums", lambda *args: calls.append(args) or fused(*args))
    want = tapped(tiny(), x)
    assert not calls
    got = tapped(tiny().requires_grad_(False), x)
    assert len(calls) == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    calls.clear()
    training = tiny().requires_grad_(False).train()
    before = training[1].running_mean.clone()
    tapped(training, x)
    assert not calls and not training[1].running_mean.equal(before)


def test_tap_with_others_around():
    """Copies are not tapped, hooks run, taps nest, replaced and inherited forwards are called, errors leave nothing behind."""

    class Twice(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    x, seen = torch.randn(4, 3, 8, 8), []
    teacher = tiny().requires_grad_(False)
    teacher[4].__class__ = Twice
    own = teacher[1].forward = lambda x: nn.BatchNorm2d.forward(teacher[1], x) + 1
    plain = teacher(x)
    teacher[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.raises(KeyError), zsq.nn.BNStatsTap(teacher) as outer:
        with zsq.nn.BNStatsTap(teacher) as inner:
            torch.testing.assert_close(teacher(x), plain)
            twin = copy.deepcopy(teacher)
            torch.testing.assert_close(inner.loss(), outer.loss())
            zsq.convert(teacher, 4, 4, input_size=(3, 8, 8))  # runs the network
            inner.loss(), outer.loss()
        torch.testing.assert_close(twin(x), plain)
        with pytest.raises(UnsupportedModelError):
            outer.loss()  # the copy recorded nothing
        raise KeyError
    assert len(seen) >= 2 and teacher[1].forward is own and "forward" not in vars(teacher[4])


def test_training_through_the_layers(device):
    student = zsq.convert(tiny(), 4, 4, input_size=(3, 8, 8)).to(device)
    x = torch.randn(8, 3, 8, 8, device=device)
    with torch.no_grad(), zsq.nn.calibrating(student):
        student(x)
    assert not student.training
    student(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_weights_quantized_together_change_nothing_but_the_number_of_calls(device):
    student = zsq.convert(tiny().to(device), 3, 4, input_size=(3, 16, 16))
    x = torch.randn(2, 3, 16, 16, device=device)
    with zsq.nn.calibrating(student):
        student(x)
    zsq.nn.freeze_ranges(student)
    weights = list(zsq.nn.quantized_weights(student).values())
    want = student(x)
    want_grads = torch.autograd.grad(want.square().sum(), weights)
    with zsq.nn.weights_quantized_together(student):
        got = student(x)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got.square().sum(), weights), want_grads, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad(), pytest.raises(RuntimeError, match="inside"), zsq.nn.weights_quantized_together(student):
        weights[0].neg_()
        assert torch.equal(student(x), want)  # quantized on entry
        raise RuntimeError("inside")
    assert not torch.equal(student(x), want) and not [m for m in student.modules() if "_quantized_weight" in m.__dict__]
