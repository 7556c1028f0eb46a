"""SynQ and PLF: the filter, the gate, activation maps and pseudo labels against their definitions, and whole runs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import Reuser, look_trained, residual, tiny
from stopping import metrics, same_tensors, whole_and_resumed
from torch import Tensor, nn

import zsq_fast as zsq
from zsq_fast.errors import UnsupportedModelError, UsageError
from zsq_fast.losses import kd_kl
from zsq_fast.methods import Recipe, Trainer, load_recipe, run_together
from zsq_fast.methods.batches import ImageBatches, low_pass
from zsq_fast.methods.images import ImageSet
from zsq_fast.methods.recipe import Student
from zsq_fast.methods.steps import StudentStep, class_activation_maps, pseudo_label_ce
from zsq_fast.methods.synthesis import Batch
from zsq_fast.nn import class_map_layers
from zsq_fast.ops import feature_alignment

SIZE = (3, 8, 8)
TINY = ["schedule.epochs=5", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=2", "schedule.calibration_epochs=2",
        "schedule.milestones=[4]", "quant.ema=plain", "quant.weight_bits=3", "images.count=12", "images.batch_size=8",
        "images.iterations=3", "student.batch_size=6", "student.lr=1e-3"]  # fmt: skip
# The tiny network is sure of nothing: thresholds at which some samples pass and others do not.
BOTH = ["student.pseudo_label=plf", "student.pseudo_threshold=[0.983,0.978]", "student.ce_gate=0.75"]
QUIET = dict(kd_weight=0.0, ce_weight=0.0)


def recipe(name="synq", *more) -> Recipe:
    return load_recipe(name, input_size=SIZE, overrides=[*TINY, *more])


def train(name="synq", *more):
    return Trainer(residual(), recipe(name, *more), input_size=SIZE).run()


def gradients(student: nn.Module) -> list[Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in student.parameters()]
    student.zero_grad(set_to_none=True)
    return found


# ---- the filter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (6, 9), (1, 4)], ids=str)
def test_low_pass_is_its_definition(size, device):
    """Against the Fourier sum written out, and against the dense circular convolution with the impulse response."""
    h, w = size
    x, radius = torch.randn(2, 3, h, w, device=device), 1.7
    found = low_pass(x, radius)
    assert found.shape == x.shape and found.dtype == torch.float32

    def centred(n: int) -> Tensor:  # the paper's picture: frequency 0 in the middle
        return torch.arange(n, dtype=torch.float64) - n // 2

    def waves(n: int) -> Tensor:
        return torch.exp(-2j * math.pi * centred(n)[:, None] * torch.arange(n) / n)

    gain = torch.exp(-(centred(h)[:, None] ** 2 + centred(w) ** 2) / (2 * radius**2))
    spectrum = torch.einsum("ua,vb,ncab->ncuv", waves(h), waves(w), x.cpu().to(torch.complex128)) * gain
    back = torch.einsum("ua,vb,ncuv->ncab", waves(h).conj(), waves(w).conj(), spectrum) / (h * w)
    assert back.imag.abs().max() < 1e-12
    torch.testing.assert_close(found.cpu().double(), back.real, rtol=1e-5, atol=1e-6)

    impulse = torch.zeros(h, w, device=device)
    impulse[0, 0] = 1
    kernel = low_pass(impulse, radius)
    dense = sum(kernel[a, b] * x.roll((a, b), (2, 3)) for a in range(h) for b in range(w))
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kernel.sum().cpu(), torch.tensor(1.0))


def test_low_pass_has_the_published_impulse_response(device):
    """hast_family.md 10.3, the note: 224 pixels, D0 = 80; 13 taps do, a sampled Gaussian does not."""
    line = torch.zeros(224, 224, device=device)
    line[0] = 1
    taps = low_pass(line, 80.0)[:, 0].cpu()
    torch.testing.assert_close(taps[:4], torch.tensor([0.751, 0.139, -0.019, 0.008]), rtol=0, atol=6e-4)
    noise = torch.randn(224, 224, device=device)
    exact = low_pass(noise, 80.0).cpu()

    def error(kernel: Tensor) -> float:
        spectrum = torch.fft.fft2(noise.cpu()) * torch.fft.fft(kernel)[:, None] * torch.fft.fft(kernel)
        return float((torch.fft.ifft2(spectrum).real - exact).norm() / exact.norm())

    offset = torch.fft.fftfreq(224, 1 / 224).abs()
    sampled = torch.exp(-(offset**2) / (2 * (224 / (2 * math.pi * 80)) ** 2))
    assert error(taps) < 1e-5 and error(torch.where(offset <= 6, taps, 0)) == pytest.approx(0.007, abs=5e-4)
    assert error(sampled / sampled.sum()) == pytest.approx(0.34, abs=5e-3)
    torch.testing.assert_close(low_pass(noise, 1e6), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_batches_are_filtered_after_the_crops(layout, device):
    images = ImageSet(torch.randn(9, 3, 7, 8, device=device), torch.arange(9, device=device))

    def make(radius: float) -> Batch:
        return ImageBatches(images, 4, (0.5, 1.0), 0.5, 3, torch.device(device), layout, radius).batch(2)

    plain, filtered = make(0.0), make(2.0)
    assert torch.equal(filtered.images, low_pass(plain.images.contiguous(), 2.0))
    assert filtered.images.is_contiguous(memory_format=layout) and filtered.images.dtype == torch.float32
    assert torch.equal(plain.labels, filtered.labels) and torch.equal(filtered.images, make(2.0).images)


# ---- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["hard labels", "soft labels"])
def test_gated_cross_entropy(pair, soft):
    teacher, student, batch = pair
    labels = torch.rand(8, 4, device=batch.images.device).softmax(1) if soft else batch.labels
    batch = batch._replace(labels=labels)
    p = teacher(batch.images).softmax(1)
    p_label = (p * labels).sum(1) if soft else p[range(8), labels]
    order = (1 - p_label).sort().values
    for count in (3, 8, 0):
        gate = float(order[count - 1] + order[min(count, 7)]) / 2 if count else float(order[0]) / 2
        spec = Student(**{**QUIET, "ce_weight": 2.0, "ce_gate": gate})
        loss, _ = StudentStep(student, teacher, spec, SIZE).backward(batch)
        found = gradients(student)
        ce = -(student(batch.images).log_softmax(1) * (labels if soft else F.one_hot(labels, 4))).sum(1)
        let_through = [i for i in range(8) if 1 - p_label[i] <= gate]
        assert len(let_through) == count
        want = 2 * sum((ce[i] for i in let_through), start=0 * ce.sum()) / max(count, 1)
        want.backward()
        torch.testing.assert_close(loss, want.detach())
        for a, b in zip(found, gradients(student), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- activation maps ---------------------------------------------------------------------------------------------------


def grad_cam(network: nn.Module, point: str, x: Tensor, labels: Tensor) -> Tensor:
    """Grad-CAM by its definition: channel weights are the mean gradient of the class's logit, and numbers."""
    kept: list[Tensor] = []
    hook = network.get_submodule(point).register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.enable_grad():
        logits = network(x.clone().requires_grad_())
    hook.remove()
    score = (logits * (F.one_hot(labels, logits.shape[1]) if labels.dim() == 1 else labels)).sum()
    (gradient,) = torch.autograd.grad(score, kept[-1], retain_graph=True)
    return (gradient.mean((2, 3), keepdim=True) * kept[-1]).sum(1).relu().flatten(1)


class Head(nn.Module):
    """A convolution and some way to logits."""

    def __init__(self, *head: nn.Module, way=lambda x: x, rectifier: nn.Module | None = None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True) if rectifier is None else rectifier
        )
        self.head, self.way = nn.Sequential(*head), way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self.body(x)))


ENDS = {
    "modules": (tiny, ("5", "8")),
    "residual, one ReLU for two places": (residual, ("1.relu", "4")),
    "mean": (lambda: Head(nn.Linear(6, 4), way=lambda x: x.mean((2, 3))), ("body.2", "head.0")),
    "mean of means": (lambda: Head(nn.Linear(6, 4), way=lambda x: F.avg_pool2d(x, 8).flatten(1)), ("body.2", "head.0")),
    "functional": (
        lambda: Head(nn.Dropout(), nn.Linear(6, 4, False), way=lambda x: F.adaptive_avg_pool2d(x, (1, 1)).view(-1, 6)),
        ("body.2", "head.1"),
    ),
    "1x1 convolution": (
        lambda: Head(nn.AvgPool2d(8), nn.Conv2d(6, 4, 1), nn.Flatten()),
        ("body.2", "head.1"),
    ),
    "no rectifier": (lambda: Head(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(6, 4), rectifier=nn.Identity()), ("body.1", "head.2")),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_activation_maps_are_grad_cam(end, layout, device):
    """hast_family.md 10.3, rank 6: the closed form is Grad-CAM, for the float network and for the quantized one."""
    make, layers = ENDS[end]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        teacher = look_trained(make()).to(device, memory_format=layout)
    assert class_map_layers(teacher, SIZE) == layers
    student = zsq.convert(teacher, 3, 3, ema="plain", input_size=SIZE).eval()
    x, labels = torch.randn(6, *SIZE, device=device), torch.arange(6, device=device) % 4
    with zsq.nn.calibrating(student), torch.no_grad():
        student(x)
    spec = Student(**QUIET, cam_weight=3.0)
    step = StudentStep(student, teacher.requires_grad_(False), spec, SIZE)
    for targets in (labels, torch.rand(6, 4, device=device)):
        maps = [grad_cam(network, layers[0], x, targets).detach() for network in (student, teacher)]
        for network, want in zip((student, teacher), maps, strict=True):
            found = step._map(network, step._run(network, x), targets)
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)
            assert found.max() > 0
        loss, _ = step.backward(Batch(x, targets))
        torch.testing.assert_close(loss, 3 * (maps[0] - maps[1]).square().mean(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", ("layer4.1.relu", "fc")), ("mobilenet_v2", ("features.18.2", "classifier.1")), ("vgg11_bn", None)],
)
def test_activation_maps_of_torchvision(name, layers):
    network = pytest.importorskip("torchvision").models.get_model(name, weights=None).eval()
    if layers:
        assert class_map_layers(network, (3, 64, 64)) == layers
    else:
        with pytest.raises(UnsupportedModelError, match=r"'classifier\.6' comes from 'classifier\.4' \(ReLU\)"):
            class_map_layers(network, (3, 64, 64))


def test_activation_map_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # two channels of 1 x 2 pixels
    found = class_activation_maps(features, torch.tensor([[1.0, -0.5]]))
    assert torch.equal(found, torch.tensor([[0.0, 1.0]]))  # relu(1 - 1.5), relu(2), over 2 pixels


def test_the_classifier_is_not_trained_by_the_maps(pair):
    """At 8 bits: with few codes a map is 0 by cancellation at many positions, and rounding decides whether relu passes a gradient."""
    teacher, _, batch = pair
    student = zsq.convert(teacher, 8, 8, ema="plain", input_size=SIZE).eval().requires_grad_(True)
    with zsq.nn.calibrating(student), torch.no_grad():
        student(batch.images)
    StudentStep(student, teacher, Student(**QUIET, cam_weight=50.0), SIZE).backward(batch)
    assert student[4].weight.grad is None and student[4].bias.grad is None
    found = gradients(student)[:-2]
    own = grad_cam(student, "1.relu", batch.images, batch.labels)
    want = 50 * F.mse_loss(own, grad_cam(teacher, "1.relu", batch.images, batch.labels).detach())
    want.backward()
    for a, b in zip(found, gradients(student), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    assert all(g is not None and g.any() for g in found)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reuser(), "input of the pooling comes from an operation outside modules \\(ReluBackward0\\)"),
        (
            lambda: Head(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)),
            "input of its classifier 'head.4' comes from 'head.3' \\(ReLU\\)",
        ),
        (lambda: Head(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4)), "comes from 'head.0' \\(AdaptiveMaxPool2d\\)"),
        (lambda: Head(nn.Flatten(), nn.Linear(6 * 64, 4)), "comes from 'body.2' \\(ReLU\\)"),
        (
            lambda: Head(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 4)),
            "logits are not those of 'head.2' on the mean of 'body.2', \\[2, 6, 8, 8\\]",
        ),
        (lambda: Head(nn.Linear(8, 4), way=lambda x: x.mean((1, 2))), "logits are not those of 'head.0'"),
        (lambda: Head(nn.Linear(6, 4), way=lambda x: x.mean((2, 3)) * 2), "comes from an operation outside modules \\(Mul"),
        (lambda: Head(nn.Linear(6, 4), nn.Softmax(1), way=lambda x: x.mean((2, 3))), "logits come from 'head.1' \\(Softmax\\)"),
    ],
)  # fmt: skip
def test_networks_without_such_maps_are_refused(make, words):
    with pytest.raises(UnsupportedModelError, match=words):
        class_map_layers(make(), SIZE)
    trainer = make()
    if not isinstance(trainer, Reuser):
        with pytest.raises(UnsupportedModelError, match=r"student\.cam_weight=0"):
            Trainer(look_trained(trainer), recipe("intraq", "student.cam_weight=1"), input_size=SIZE)


# ---- pseudo labels -----------------------------------------------------------------------------------------------------


def plf_by_hand(s: Tensor, t: Tensor, threshold: float, weight: float) -> Tensor:
    losses = []
    for student, teacher in zip(s.log_softmax(1), t.softmax(1).tolist(), strict=True):
        entropy = -sum(p * math.log(p) for p in teacher) / math.log(len(teacher))
        first, second, *_ = sorted(range(len(teacher)), key=lambda c: -teacher[c])
        if entropy <= threshold:
            losses.append(-student[first])
        else:
            both = teacher[first] + teacher[second]
            losses.append(-weight * (teacher[first] * student[first] + teacher[second] * student[second]) / both)
    return torch.stack(losses)


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_pseudo_labels_by_hand(classes, threshold, device):
    torch.manual_seed(0)
    t = torch.randn(40, classes, dtype=torch.float64) * torch.linspace(0.1, 6, 40, dtype=torch.float64)[:, None]
    s = torch.randn(40, classes, dtype=torch.float64, requires_grad=True)
    want = plf_by_hand(s, t, threshold, 0.3)
    own = s.detach().to(device).requires_grad_()
    teacher = t.to(device).requires_grad_()
    found = pseudo_label_ce(own, teacher, threshold, 0.3)
    torch.testing.assert_close(found.cpu(), want)
    found.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(own.grad.cpu(), s.grad)
    assert teacher.grad is None


def test_a_sure_teacher_gives_finite_losses():
    s, t = torch.randn(3, 5, requires_grad=True), 1e4 * torch.eye(5)[:3]
    loss = pseudo_label_ce(s, t, 0.2, 0.3)
    torch.testing.assert_close(loss, F.cross_entropy(s, torch.arange(3), reduction="none"))


def test_the_threshold_falls_over_the_epochs_of_the_student(monkeypatch):
    seen: list[float] = []
    monkeypatch.setattr(
        "zsq_fast.methods.steps.pseudo_label_ce",
        lambda s, t, threshold, weight: (seen.append(threshold), pseudo_label_ce(s, t, threshold, weight))[1],
    )
    train("plf", "schedule.epochs=6", "student.pseudo_threshold=[0.5,0.2]")
    assert seen == pytest.approx([0.5] * 3 + [0.4] * 3 + [0.3] * 3 + [0.2] * 3)
    seen.clear()
    train("plf", "schedule.epochs=3", "student.pseudo_threshold=[0.5,0.2]")  # one epoch of the student
    assert seen == pytest.approx([0.5] * 3)


# ---- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{}, {"promoted_weight": 0.0}, {"promoted_weight": 3.0}, {"clean_weight": 0.0}, {"promote_by": "kl"}, {"teacher_path": "student"},
     {"pseudo_label": "none"}, {"ce_gate": 0.0}],
    ids=str,
)  # fmt: skip
def test_all_terms_act_on_clean_and_promoted_samples(pair, change):
    """The whole loss written out: KL, alignment, gated and pseudo-labelled CE and maps, on x and on x'."""
    teacher, student, batch = pair
    p = teacher(batch.images).softmax(1)
    entropy, doubt = -(p * p.log()).sum(1) / math.log(4), 1 - p[range(8), batch.labels]
    threshold, gate = (float(values.sort().values[3:5].mean()) for values in (entropy, doubt))
    spec = Student(**{**dict(
        ce_weight=0.5, ce_gate=gate, kd_weight=20.0, kd_reduction="batchmean", feature_weight=1000.0, promoted_weight=1.0,
        epsilon=0.05, cam_weight=50.0, pseudo_label="plf", pseudo_weight=0.4,
        pseudo_threshold=(threshold + 0.01, threshold - 0.01)), **change})  # fmt: skip
    step = StudentStep(student, teacher, spec, SIZE)
    step.progress = 0.5
    loss, same = step.backward(batch)
    found = gradients(student)

    def run(network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []
        hooks = [
            network[i].q.register_forward_hook(lambda m, a, out: (kept.append(out), out.clone())[1]) for i in (0, 1)
        ]
        logits = network(x)
        for hook in hooks:
            hook.remove()
        return logits, kept

    def terms(x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        (s, fs), (t, ft) = run(student, x), run(teacher, x)
        if spec.teacher_path == "student":
            t, ft = t.detach(), [f.detach() for f in ft]
        ce = F.cross_entropy(s, labels, reduction="none")
        if spec.pseudo_label == "plf":
            ce = plf_by_hand(s, t, threshold, 0.4)
        kept = 1 - t.softmax(1)[range(len(x)), labels] <= gate
        maps = [grad_cam(network, "1.relu", x, labels) for network in (student, teacher)]
        return {
            "kl": 20 * kd_kl(s, t, 20.0, "batchmean"),
            "fa": 1000 * sum(feature_alignment(a, b, "channel") for a, b in zip(fs, ft, strict=True)),
            "ce": 0.5 * (ce[kept].sum() / max(1, int(kept.sum())) if spec.ce_gate else ce.mean()),
            "cam": 50 * (maps[0] - maps[1].detach()).square().mean(),
        }

    x = batch.images.clone().requires_grad_()
    clean = terms(x, batch.labels)
    want = spec.clean_weight * sum(clean.values())
    if spec.promoted_weight:
        led = sum(clean[name] for name in spec.promote_by.split("+"))
        (grad,) = torch.autograd.grad(led, x, retain_graph=True)
        promoted = terms((x + spec.epsilon * grad.sign()).detach(), batch.labels)
        want = want + spec.promoted_weight * sum(promoted.values())
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    assert same == (student(batch.images).argmax(1) == teacher(batch.images).argmax(1)).float().mean()
    for a, b in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_known_logits_are_used_unless_maps_are_asked_for(pair):
    teacher, student, batch = pair
    batch, ran = batch._replace(teacher_logits=teacher(batch.images)), []
    steps = [StudentStep(student, teacher, Student(cam_weight=w, ce_gate=0.8), SIZE) for w in (0.0, 1.0)]
    teacher.register_forward_pre_hook(lambda *_: ran.append(1))
    for step in steps:
        step.backward(batch)
    assert ran == [1]


# ---- recipes and runs --------------------------------------------------------------------------------------------------


def test_published_numbers():
    """hast_family.md section 10.2; what the section does not name is the parent's."""
    for side in (32, 224):
        large = side == 224
        for schedule in ("paper", "short"):
            names = ("hast", "synq", "synq_cifar100", "intraq", "plf")
            r = {name: load_recipe(name, input_size=(3, side, side), schedule=schedule) for name in names}
            s = r["synq"].student
            assert (s.low_pass, s.cam_weight, s.ce_weight) == (80.0 if large else 8.0, 50.0, 0.5)
            assert (s.ce_gate, r["synq_cifar100"].student.ce_gate) == (0.5 if large else 0.7, 0.5)
            assert (s.promoted_weight, s.lr, r["synq"].images) == (1.0, r["hast"].student.lr, r["hast"].images)
            p = r["plf"].student
            assert (p.pseudo_label, p.kd_weight, p.feature_weight) == ("plf", 1.0, 4000 if large else 100)
            assert (p.lr, p.pseudo_weight) == ((1e-5, 0.5) if large else (1e-3 if schedule == "paper" else 2.5e-4, 0.3))
            assert p.pseudo_threshold == ((0.4, 0.1) if large else (0.5, 0.2))
            assert (r["plf"].schedule, r["plf"].images) == (r["intraq"].schedule, r["intraq"].images)
            if schedule == "short":
                assert r["synq"].schedule == r["hast"].schedule
            else:
                assert r["synq"].schedule.epochs == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["student.low_pass=-1"], "student.low_pass must be at least 0"),
        (["images.enabled=false", "student.batch_size=0"], "student.low_pass must be 0 when images.enabled is false"),
        (["student.ce_gate=1.5"], "student.ce_gate must be in \\[0, 1\\]"),
        (["student.ce_weight=0"], "student.ce_gate must be 0 when ce_weight is"),
        (["student.ce_weight=0", "student.ce_gate=0", "student.pseudo_label=plf"], "student.pseudo_label must be 'none' when"),
        (["student.cam_weight=-1"], "student.cam_weight must be at least 0"),
        (["student.pseudo_label=plc"], "student.pseudo_label must be 'none' or 'plf', got 'plc'"),
        (["student.pseudo_threshold=[0.2,0.5]"], "student.pseudo_threshold must be two numbers in \\[0, 1\\], falling"),
        (["student.pseudo_threshold=[0.2]"], "student.pseudo_threshold must be two numbers"),
        (["student.pseudo_weight=-1"], "student.pseudo_weight must be at least 0"),
    ],
)  # fmt: skip
def test_wrong_recipes(change, words):
    with pytest.raises(UsageError, match=words):
        recipe("synq", *change)


@pytest.mark.parametrize("name", ["synq", "synq_cifar100", "plf"])
def test_every_recipe_runs(name, device):
    result = Trainer(residual().to(device), recipe(name), input_size=SIZE).run()
    assert len(result.history) == 5 and all(torch.isfinite(p).all() for p in result.student.parameters())
    assert "student_loss" not in result.history[1] and "student_loss" in result.history[2]


@pytest.fixture(scope="module")
def combined() -> nn.Module:
    return train("synq", *BOTH).student


@pytest.mark.parametrize(
    "switch",
    ["student.low_pass=0", "student.low_pass=1", "student.ce_gate=0", "student.ce_gate=0.9", "student.cam_weight=0",
     "student.cam_weight=500", "student.pseudo_label=none", "student.pseudo_threshold=[0.983,0.983]", "student.pseudo_weight=1",
     "student.ce_weight=5", "student.promoted_weight=0", "student.promote_by=kl", "student.teacher_path=student"],
)  # fmt: skip
def test_every_switch_changes_the_result(switch, combined):
    switched = train("synq", *BOTH, switch).student
    assert all(torch.isfinite(p).all() for p in switched.parameters()) and not same_tensors(combined, switched)


def test_switched_off_nothing_changes():
    off = ["student.low_pass=0", "student.cam_weight=0", "student.ce_gate=0", "student.ce_weight=0", "student.pseudo_weight=9",
           "student.pseudo_threshold=[1,0]"]  # fmt: skip
    assert same_tensors(train("hast").student, train("synq", *off).student)


@pytest.mark.parametrize("kind", ["plain", "qimera"])
def test_on_batches_of_a_generator(kind):
    more = [
        f"generator.kind={kind}",
        "generator.superpose_probability=1",
        "images.enabled=false",
        "student.batch_size=0",
        *BOTH,
    ]
    result = train("synq", *more, "student.low_pass=0")
    assert all(torch.isfinite(p).all() for p in result.student.parameters())
    assert not same_tensors(result.student, train("synq", *more, "student.low_pass=0", "student.cam_weight=0").student)


def test_training_in_lockstep_equals_training_alone():
    teacher = residual()
    changes = [BOTH, [*BOTH, "student.low_pass=0"], ["student.cam_weight=0", "quant.act_bits=3"]]
    trainers: list[Trainer] = []
    for change in changes:
        share = trainers[0] if trainers else None
        trainers.append(Trainer(teacher, recipe("synq", *change), input_size=SIZE, seed=3, share=share))
    for change, result in zip(changes, run_together(trainers), strict=True):
        alone = Trainer(teacher, recipe("synq", *change), input_size=SIZE, seed=3).run()
        assert same_tensors(result.student, alone.student) and result.history == alone.history


@pytest.mark.parametrize(
    "step", [4, 8, 9, 13], ids=["in the warm-up", "on images", "between epochs", "in the last epoch"]
)
def test_a_resumed_run_ends_in_the_same_bits(step, tmp_path):
    options = dict(recipe=recipe("synq", *BOTH), input_size=SIZE, progress=False)
    whole, again = whole_and_resumed(residual, options, step, tmp_path)
    assert same_tensors(again, whole)
    records = metrics(tmp_path)
    assert records[0] == records[1] and len(records[0]) == 5
