"""Fine-tuning on optimised images: HAST's step against its definition, batches, and whole runs."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch
import torch.nn.functional as F
from networks import residual
from stopping import same_tensors
from torch import Tensor, nn

import zsq_fast as zsq
from zsq_fast.errors import Interrupted, UsageError
from zsq_fast.losses import kd_kl
from zsq_fast.methods import Recipe, Trainer, images, load_recipe, run_together
from zsq_fast.methods.batches import ImageBatches
from zsq_fast.methods.images import ImageSet
from zsq_fast.methods.recipe import Student
from zsq_fast.methods.steps import StudentStep
from zsq_fast.methods.synthesis import Batch
from zsq_fast.ops import feature_alignment
from zsq_fast.runs import RunDir

SIZE, POINTS = (3, 8, 8), ("0.q", "1.q")
HAST = dict(ce_weight=0.0, kd_weight=20.0, kd_reduction="batchmean", feature_weight=1000.0, promoted_weight=1.0)
TINY = ["schedule.epochs=4", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=2", "schedule.calibration_epochs=2",
        "schedule.milestones=[3]", "quant.ema=plain", "quant.weight_bits=3", "images.count=12", "images.batch_size=8",
        "images.iterations=3", "student.batch_size=6", "student.lr=1e-3"]  # fmt: skip
RECIPES = ["intraq", "intraq_cifar100", "zeroq", "hast", "hast_cifar100", "hast_released", "hast_ait", "hast_squant",
           "hast_averaged"]  # fmt: skip


def recipe(name="hast", *more) -> Recipe:
    return load_recipe(name, input_size=SIZE, overrides=[*TINY, *more])


def train(name="hast", *more, **options):
    return Trainer(residual(), recipe(name, *more), input_size=SIZE, **options).run()


def gradients(student: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad(set_to_none=True)
    return found


def forward(network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and features, by hooks of the test's own; weights are quantized layer by layer."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        kept.append(out)
        return out.clone()

    handles = [network.get_submodule(name).register_forward_hook(keep) for name in POINTS]
    logits = network(x)
    for handle in handles:
        handle.remove()
    return logits, kept


def terms(spec: Student, s, t, labels: Tensor) -> dict[str, Tensor]:
    fa = torch.stack([feature_alignment(a, b, spec.alignment) for a, b in zip(s[1], t[1], strict=True)]).sum()
    return {
        "kl": spec.kd_weight * kd_kl(s[0], t[0], 20.0, spec.kd_reduction),
        "fa": spec.feature_weight * fa,
        "ce": spec.ce_weight * F.cross_entropy(s[0], labels),
    }


def two_backwards(teacher, student, batch: Batch, spec: Student) -> tuple[Tensor, Tensor]:
    """hast_family.md 5.5 as published: a gradient for the direction, then one backward of both losses. Loss, promoted samples."""
    x = batch.images.clone().requires_grad_()
    if spec.teacher_path == "both":
        t = forward(teacher, x)
    else:
        with torch.no_grad():
            t = forward(teacher, x)
    clean = terms(spec, forward(student, x), t, batch.labels)
    led = [clean[name] for name in spec.promote_by.split("+")]
    (grad,) = torch.autograd.grad(torch.stack(led).sum(), x, retain_graph=True)
    harder = (x + spec.epsilon * grad.sign()).detach()
    with torch.no_grad():
        t = forward(teacher, harder)
    promoted = terms(spec, forward(student, harder), t, batch.labels)
    active = [name for name in ("kl", "ce", "fa") if name != "ce" or spec.ce_weight]
    first, second = (torch.stack([losses[name] for name in active]).sum() for losses in (clean, promoted))
    loss = spec.clean_weight * first + spec.promoted_weight * second
    loss.backward()
    return loss.detach(), harder


# ---- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {}, {"promoted_weight": 3.0}, {"clean_weight": 2.0}, {"clean_weight": 0.0}, {"clean_weight": 0.0, "promote_by": "kl"},
        {"promote_by": "kl"}, {"promote_by": "fa"}, {"ce_weight": 1.0}, {"teacher_path": "student"}, {"alignment": "direct"},
        {"alignment": "spatial"}, {"epsilon": 0.3},
    ],
    ids=str,
)  # fmt: skip
def test_11_4_gradients_are_exactly_those_of_two_backwards(pair, change):
    """Checklist item 4, for (a, b) = (1, 1), (1, 3) and every switch; one quantization of the weights serves both forwards."""
    teacher, student, batch = pair
    spec = Student(**{**HAST, "epsilon": 0.05, **change})
    seen: list[Tensor] = []
    watch = student[0].a.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    loss, _ = StudentStep(student, teacher, spec, SIZE).backward(batch)
    watch.remove()
    found = gradients(student)
    want_loss, harder = two_backwards(teacher, student, batch, spec)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(student), strict=True))
    if spec.clean_weight:
        assert torch.equal(loss, want_loss)
    clean, promoted = seen
    assert torch.equal(clean, batch.images) and torch.equal(promoted, harder)
    moved = promoted - batch.images
    assert torch.allclose(moved.abs()[moved != 0], torch.tensor(spec.epsilon, device=moved.device), atol=1e-6)
    assert (moved != 0).float().mean() > 0.9


def test_an_odd_factor_differs_by_rounding_alone(pair):
    """Published (3, 1): the sign is read off 3 * L, whose gradient rounds otherwise than that of L."""
    teacher, student, batch = pair
    spec = Student(**{**HAST, "clean_weight": 3.0})
    StudentStep(student, teacher, spec, SIZE).backward(batch)
    found = gradients(student)
    two_backwards(teacher, student, batch, spec)
    for a, b in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_an_iteration_costs_nine_sweeps(pair, monkeypatch):
    """hast_family.md section 8.2: two forwards of each network, two backwards of the student, one quantization of the weights, no
    gradient of the teacher's parameters, which do not change."""
    teacher, student, batch = pair
    step = StudentStep(student, teacher, Student(**HAST), SIZE)
    forwards = {teacher: 0, student: 0}
    for network in forwards:
        network.register_forward_pre_hook(lambda m, args: forwards.update({m: forwards[m] + 1}))
    calls, quantize = [], zsq.ops.fake_quant_weights
    monkeypatch.setattr(zsq.ops, "fake_quant_weights", lambda *args: (calls.append(1), quantize(*args))[1])
    backwards: list[int] = []
    student[0].a.register_full_backward_hook(lambda *_: backwards.append(1))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    step.backward(batch)
    assert forwards == {teacher: 2, student: 2} and len(calls) == 1 and len(backwards) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and not teacher[0].q._forward_hooks


def test_clean_only_is_plain_distillation(pair):
    teacher, student, batch = pair
    spec = Student(**{**HAST, "promoted_weight": 0.0, "feature_weight": 0.0, "ce_weight": 1.0})
    loss, same = StudentStep(student, teacher, spec, SIZE).backward(batch)
    found = gradients(student)
    logits, soft = student(batch.images), teacher(batch.images)
    want = 20 * kd_kl(logits, soft, 20.0, "batchmean") + F.cross_entropy(logits, batch.labels)
    want.backward()
    torch.testing.assert_close(loss, want.detach())
    assert same == (logits.argmax(1) == soft.argmax(1)).float().mean()
    for a, b in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(a, b)
    known = batch._replace(teacher_logits=soft)  # the generator's batches bring them along
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run again"))
    assert torch.equal(StudentStep(student, teacher, spec, SIZE).backward(known)[0], loss)


@pytest.mark.parametrize("kind", ["channel", "direct"])
def test_11_3_alignment_gradient_has_the_closed_form(kind, device):
    """hast_family.md 5.3: dL/dF = (2 / HW) F dL/da with dL/da = 2 / (NC |a|) (D - A <A, D>); direct: 2 (F_S - F_T) / NCHW."""
    s, t = (torch.randn(4, 6, 5, 3, device=device, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    (found,) = torch.autograd.grad(feature_alignment(s, t, kind), s)
    n, c, h, w = s.shape
    f = s.detach()
    if kind == "direct":
        want = 2 * (f - t) / f.numel()
    else:
        a, b = f.square().mean((2, 3)), t.square().mean((2, 3))
        norm = a.norm(dim=1, keepdim=True)
        unit = a / norm
        d = unit - b / b.norm(dim=1, keepdim=True)
        per_energy = 2 / (n * c * norm) * (d - unit * (unit * d).sum(1, keepdim=True))
        want = 2 / (h * w) * f * per_energy[:, :, None, None]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-12)


def test_relaxed_alignment_is_free_of_scale_and_direct_is_not(pair):
    teacher, _, batch = pair
    losses = {}
    for kind in ("channel", "direct", "spatial"):
        spec = Student(ce_weight=0.0, kd_weight=0.0, feature_weight=1.0, alignment=kind)
        doubled = zsq.convert(teacher, 8, 8, ema="plain", input_size=SIZE).eval().requires_grad_(True)
        with torch.no_grad():
            for name in POINTS:
                doubled.get_submodule(name).weight *= 2
                doubled.get_submodule(name).bias *= 2
        step = StudentStep(doubled, teacher, dataclasses.replace(spec, feature_points=("0.q",)), SIZE)
        with zsq.nn.calibrating(doubled), torch.no_grad():
            doubled(batch.images)
        losses[kind] = float(step.backward(batch)[0])
    assert losses["channel"] < 1e-4 and losses["spatial"] < 1e-4 and losses["direct"] > 0.01


def test_11_2_range_after_800_updates_is_a_plain_average(device):
    """Checklist item 2: the compounded bias correction of the published tracker has worn off."""
    act = zsq.QuantAct(4, ema="reference").to(device).train()
    average = torch.zeros((), dtype=torch.float64)
    for i in range(800):
        x = torch.rand(7, generator=torch.Generator().manual_seed(i)) * (1 + i % 3)
        act(x.to(device))
        average = 0.9 * average + 0.1 * x.max().double()
    torch.testing.assert_close(act.hi.cpu().double(), average, rtol=1e-6, atol=0)


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_batches_follow_from_seed_and_step(device):
    n = 10
    marked = torch.arange(n, dtype=torch.float32, device=device)[:, None, None, None].expand(n, *SIZE).clone()
    labels = torch.arange(n, device=device)

    def make(seed=0):
        options = dict(scale=(0.5, 1.0), flip=0.5, seed=seed, device=torch.device(device), layout=torch.channels_last)
        return ImageBatches(ImageSet(marked, labels), 4, **options)

    batches = make()
    drawn = torch.cat([batches.indices(i) for i in range(10)])
    for i in range(4):  # whole passes, though 4 does not divide 10
        assert drawn[10 * i : 10 * i + 10].sort().values.tolist() == list(range(n))
    assert not torch.equal(drawn[:10], drawn[10:20]) and not torch.equal(drawn, make(1).indices(0))
    for step in (7, 2, 3):
        a, b = batches.batch(step), make().batch(step)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.teacher_logits is None
        assert a.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a.images.amax((1, 2, 3)), a.labels.float())  # the label stays with its image
    assert torch.equal(make().batch(5).images, batches.batch(5).images)
    many = ImageBatches(ImageSet(marked, labels), 25, (1, 1), 0, 0, torch.device(device), torch.contiguous_format)
    assert len(many.indices(1)) == 25 and set(many.indices(1).bincount().tolist()) == {2, 3}


# ---- recipes -----------------------------------------------------------------------------------------------------------


def test_published_numbers():
    """hast_family.md sections 4.2, 5.4 and 5.6."""
    for name in RECIPES:
        for side, batch, milestones in (
            (32, 256, (20, 40, 60)),
            (224, 16, (100,) if "hast" in name else (100, 200, 350)),
        ):
            r = load_recipe(name, input_size=(3, side, side))
            s = r.schedule
            assert (s.epochs, s.iterations, s.warmup_epochs, s.calibration_epochs) == (151, 200, 4, 4)
            assert (s.batch_size, s.milestones, s.decay, r.student_steps) == (16, milestones, 0.1, 29_400)
            t = r.student
            assert (t.batch_size, t.kd_weight * t.temperature**2, t.kd_reduction) == (batch, 8000, "batchmean")
            assert (t.momentum, t.nesterov, r.quant.ema) == (0.9, True, "reference")
            assert (t.weight_decay, r.inundation.enabled) == ((0.0, True) if name == "hast_ait" else (1e-4, False))
            assert (t.crop_scale, t.flip, r.images.count) == ((0.5, 1.0), 0.5, 5120)
            large = side == 224
            lr = 1e-6 if large else 1e-5 if "hast" in name else 1e-4
            assert (t.lr, t.ce_weight) == (lr, 0.0 if "hast" in name else 1.0)
            if name == "hast":
                assert (t.feature_weight, t.epsilon) == (4000 if large else 1000, 0.01)
                assert (r.images.hard_weight, r.images.hard_gamma) == ((0.1, 0.5) if large else (10, 2))
                assert (r.images.crop_probability, r.images.soft_weight) == (0.5 if large else 0, 0)
            if "hast" in name:
                assert (t.clean_weight, t.promoted_weight, t.promote_by, t.teacher_path, t.alignment) == (
                    1, 1, "kl+fa", "both", "channel")  # fmt: skip
            else:
                assert (t.feature_weight, t.promoted_weight) == (0, 0)
    cifar100 = load_recipe("hast_cifar100", input_size=(3, 32, 32)).student
    assert (cifar100.feature_weight, cifar100.epsilon) == (2000, 0.02)
    for side, threshold in ((32, 1e-3), (224, 1e-4)):
        released, inundated = (load_recipe(name, input_size=(3, side, side)) for name in ("hast_released", "hast_ait"))
        assert (released.student.feature_weight, released.student.epsilon) == (1000, 0.01)
        assert inundated.inundation.threshold == threshold
    for name in RECIPES:
        short = load_recipe(name, input_size=(3, 32, 32), schedule="short")
        steps, count = (2000, 2048) if "hast" in name else (1000, 1024)
        assert (short.generator_steps, short.student_steps) == (800, steps)
        assert (short.images.count, short.images.iterations, short.student.batch_size) == (count, 250, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["student.alignment=chanel"], "student.alignment must be 'channel' or 'direct' or 'spatial', got 'chanel'"),
        (["student.promote_by=ce"], "student.promote_by must be 'kl' or 'fa' or 'kl\\+fa', got 'ce'"),
        (["student.teacher_path=teacher"], "student.teacher_path must be 'both' or 'student'"),
        (["student.promote_by=fa", "student.feature_weight=0"], "promote_by must be a loss whose weight is not 0"),
        (["student.epsilon=0"], "student.epsilon must be positive"),
        (["student.promoted_weight=-1"], "student.promoted_weight must be at least 0"),
        (["student.clean_weight=0", "student.promoted_weight=0"], "student.clean_weight must be positive"),
        (["student.feature_weight=0", 'student.feature_points=["0.q"]'], "student.feature_points must be empty"),
        (["student.crop_scale=[0.5, 1.5]"], "student.crop_scale must be two shares"),
        (["student.crop_scale=[0.5]"], "student.crop_scale must be two shares"),
        (["student.flip=2"], "student.flip must be a probability"),
        (["images.enabled=false"], "student.batch_size must be 0 when images.enabled is false"),
        (["student.enabled=false"], "images.enabled must be false when student.enabled is"),
        (["student.batch_size=-1"], "student.batch_size must be at least 1, or 0"),
        (["quant.calibrate_on=image"], "quant.calibrate_on must be 'generator' or 'images'"),
        (["quant.calibrate_on=images"], "schedule.held_out must be 0 when quant.calibrate_on is 'images'"),
        (
            ["quant.calibrate_on=images", "images.enabled=false", "student.batch_size=0"],
            "calibrate_on must be 'generator'",
        ),
        (["student.optimizer=adagrad"], "student.optimizer must be 'sgd' or 'adam' or 'rmsprop'"),
        (["student.betas=[0.9]"], "student.betas must be two numbers"),
        (["student.square_decay=1"], "student.square_decay must be in"),
        (["student.optimizer_eps=0"], "student.optimizer_eps must be positive"),
        (["inundation.bisection=last"], "inundation.bisection must be 'faithful' or 'corrected'"),
    ],
)
def test_wrong_recipes(change, words):
    with pytest.raises(UsageError, match=words):
        recipe("hast", *change)


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_named_feature_points():
    with pytest.raises(UsageError, match=r"no module '0\.bn'"):
        Trainer(residual(), recipe("hast", 'student.feature_points=["0.bn"]'), input_size=SIZE)
    teacher = residual()
    teacher.unused = nn.Sequential(nn.Identity())
    teacher.forward = nn.Sequential(*list(teacher)[:5]).forward  # all but the unused one
    with pytest.raises(UsageError, match="'unused' gives no features"):
        step = Student(**HAST, feature_points=("unused",))
        StudentStep(teacher, teacher, step, SIZE)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name, device):
    result = Trainer(residual().to(device), recipe(name), input_size=SIZE).run()
    assert len(result.history) == 4 and all(torch.isfinite(p).all() for p in result.student.parameters())
    assert "generator_bns" in result.history[1] and "generator_bns" not in result.history[2]
    assert "student_loss" not in result.history[1] and "student_loss" in result.history[2]
    assert all(m.frozen for m in result.student.modules() if isinstance(m, zsq.QuantAct))


def test_zeroq_calibrates_and_trains_nothing(tmp_path, device):
    """hast_family.md section 2: ranges are the extrema over the images, whole ones; no generator, no student step."""
    given = ["images.count=8", "images.batch_size=8", "images.iterations=3", "student.batch_size=8"]
    spec = load_recipe("zeroq_calibrated", input_size=SIZE, overrides=given, weight_bits=8, act_bits=8)
    trainer = Trainer(residual().to(device), spec, input_size=SIZE, image_dir=tmp_path)
    before = [p.detach().clone() for p in (*trainer.student.parameters(), *trainer.synthesis.generator.parameters())]
    result = trainer.run()
    assert spec.generator_steps == spec.student_steps == 0 and not result.evaluations
    after = (*result.student.parameters(), *result.synthesis.generator.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    seen: dict[str, list[Tensor]] = {}
    acts = {name: m for name, m in result.student.named_modules() if isinstance(m, zsq.QuantAct)}
    for name, act in acts.items():
        act.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    assert trainer.batches is not None
    result.student(trainer.batches.images)
    for act in acts.values():
        assert act.frozen and torch.isfinite(act.lo) and act.lo < act.hi
    first = next(iter(seen))
    assert torch.equal(acts[first].lo, seen[first][0].min()) and torch.equal(acts[first].hi, seen[first][0].max())


def test_calibration_on_images_before_a_student(device):
    """Ranges that follow the optimised images need no generator, student or not; the training batches begin where those ended."""
    result = train("intraq", "quant.calibrate_on=images", "schedule.held_out=0")
    assert "generator_bns" not in result.history[0] and "student_loss" in result.history[2]
    other = train("intraq", "schedule.held_out=0")
    assert not same_tensors(result.student, other.student)


@pytest.mark.parametrize(
    "switch",
    ["student.batch_size=5", "student.batch_size=0", "student.crop_scale=[0.2,0.4]", "student.flip=0", "student.feature_weight=1",
     "student.alignment=direct", "student.alignment=spatial", 'student.feature_points=["0.q"]', "student.clean_weight=0",
     "student.promoted_weight=3", "student.promoted_weight=0", "student.epsilon=0.5", "student.promote_by=kl",
     "student.promote_by=fa", "student.teacher_path=student", "student.ce_weight=1", "student.kd_weight=1",
     "images.enabled=false student.batch_size=0", "images.count=9", "inundation.enabled=true"],
)  # fmt: skip
def test_every_switch_changes_the_result(switch):
    plain, switched = (train("hast", "student.epsilon=0.05", *s) for s in ((), switch.split()))
    assert all(torch.isfinite(p).all() for p in switched.student.parameters())
    assert not same_tensors(plain.student, switched.student)


def test_inundation_on_hast():
    """ait_family.md 7 on top of HAST, by recipe: quantized weights by GISGD, the rest by SGD."""
    result = train("hast_ait", "inundation.threshold=1e-2")
    assert min(result.history[-1]["update_ratio"]) > 0


def test_training_in_lockstep_equals_training_alone(monkeypatch):
    teacher, made = residual(), []
    synthesize = images.synthesize_images
    monkeypatch.setattr(
        "zsq_fast.methods.trainer.synthesize_images", lambda *a, **k: made.append(1) or synthesize(*a, **k)
    )
    changes = [
        [],
        ["student.batch_size=5", "quant.act_bits=3"],
        ["student.promoted_weight=0", "student.crop_scale=[0.8,1]"],
        ["images.lr=0.1"],  # images of its own
    ]
    trainers: list[Trainer] = []
    for change in changes:
        share = trainers[0] if trainers else None
        trainers.append(Trainer(teacher, recipe("hast", *change), input_size=SIZE, seed=3, share=share))
    results = run_together(trainers)
    assert made == [1, 1]
    for change, result in zip(changes, results, strict=True):
        alone = Trainer(teacher, recipe("hast", *change), input_size=SIZE, seed=3).run()
        assert same_tensors(result.student, alone.student) and result.history == alone.history
    with pytest.raises(UsageError, match="share images only"):
        Trainer(teacher, recipe("hast", "generator.lr=0.1"), input_size=SIZE, seed=3, share=trainers[0])


@pytest.mark.parametrize(
    "step", [0, 4, 8, 11], ids=["while images are made", "in the warm-up", "on images", "in the last epoch"]
)
def test_a_resumed_run_ends_in_the_same_bits(step, tmp_path, monkeypatch):
    more = ["inundation.enabled=true", "images.count=16"]
    options = dict(recipe=recipe("hast", *more), input_size=SIZE, progress=False)
    whole = zsq.quantize(residual(), run_dir=tmp_path / "whole", **options)
    iterate, done, step_of = Trainer._iterate, [], torch.optim.Adam.step

    def stop_after(self, batch):
        iterate(self, batch)
        done.append(1)
        if len(done) == step:
            signal.raise_signal(signal.SIGINT)

    def stop_in_second_batch(self, *args):
        done.append(1)
        if len(done) == 5 and step == 0:
            signal.raise_signal(signal.SIGINT)
        return step_of(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_iterate", stop_after)
        if step == 0:
            patched.setattr(torch.optim.Adam, "step", stop_in_second_batch)
        with pytest.raises(Interrupted, match="resume=True"):
            zsq.quantize(residual(), run_dir=tmp_path / "cut", **options)
    again = zsq.quantize(residual(), run_dir=tmp_path / "cut", resume=True, input_size=SIZE, progress=False)
    assert same_tensors(again, whole)
    records = []
    for name in ("cut", "whole"):
        with RunDir.open(tmp_path / name, read_only=True) as run:
            records.append(run.read_metrics())
    assert records[0] == records[1] and len(records[0]) == 4


def test_images_are_kept_and_found_again(tmp_path, monkeypatch):
    shelf = tmp_path / "shelf"
    first = train("hast", image_dir=shelf)
    kept = list(shelf.rglob("*.safetensors"))
    assert kept
    monkeypatch.setattr(images._Optimiser, "batch", lambda *a: pytest.fail("made again"))
    other = train("hast", "student.promoted_weight=3", image_dir=shelf)
    assert not same_tensors(first.student, other.student) and list(shelf.rglob("*.safetensors")) == kept
    assert same_tensors(first.student, train("hast", image_dir=shelf).student)
