"""Recipes and the trainer: schedules, what is trained when, every switch, sameness of runs."""

from __future__ import annotations

import contextlib
import re
import signal

import pytest
import torch
from networks import tiny
from stopping import same_tensors
from torch import nn

import zsq_fast as zsq
from zsq_fast.errors import Interrupted, TrainingError, UnsupportedModelError, UsageError
from zsq_fast.methods import Recipe, Trainer, available_recipes, load_recipe, run_together
from zsq_fast.methods.generators import ConditionalBatchNorm2d, Generator
from zsq_fast.runs import RunDir

SIZE = (3, 8, 8)
TINY = ["schedule.epochs=4", "schedule.iterations=3", "schedule.batch_size=8", "schedule.warmup_epochs=2", "schedule.calibration_epochs=2",
        "schedule.milestones=[3]", "quant.ema=plain"]  # fmt: skip


def recipe(name="ait", *more, **options) -> Recipe:
    return load_recipe(name, input_size=SIZE, overrides=[*TINY, *more], **options)


def train(name="ait", *more, teacher=None, **options):
    return Trainer(teacher or tiny(), recipe(name, *more), input_size=SIZE, **options).run()


# ---- recipes -----------------------------------------------------------------------------------------------------------


def test_published_numbers():
    """ait_family.md sections 1.4, 9.1 and 9.2."""
    for name, (lr_small, lr_large, decay, ce, inundated) in {
        "gdfq": (1e-4, 1e-6, 1e-4, 1.0, False), "kl_only": (1e-4, 1e-4, 0.0, 0.0, False), "ait": (1e-4, 1e-4, 0.0, 0.0, True),
    }.items():  # fmt: skip
        small, large = (load_recipe(name, input_size=(3, s, s)) for s in (32, 224))
        assert (small.student.lr, large.student.lr) == (lr_small, lr_large)
        for r, batch, warmup, kind, threshold in ((small, 200, 4, "plain", 1e-3), (large, 16, 50, "conditional", 1e-4)):
            assert (r.schedule.epochs, r.schedule.iterations, r.schedule.milestones, r.schedule.decay) == (
                400,
                200,
                (100, 200, 300),
                0.1,
            )
            assert (r.schedule.batch_size, r.schedule.warmup_epochs, r.schedule.calibration_epochs) == (
                batch,
                warmup,
                4,
            )
            assert (r.generator.kind, r.generator.lr, r.generator.betas, r.generator.bns_weight) == (
                kind,
                1e-3,
                (0.5, 0.999),
                0.1,
            )
            assert (r.student.temperature, r.student.kd_weight, r.student.kd_reduction) == (20.0, 1.0, "mean")
            assert (r.student.weight_decay, r.student.ce_weight, r.inundation.enabled) == (decay, ce, inundated)
            assert not inundated or (r.inundation.threshold, r.inundation.search_steps, r.inundation.capped_epochs) == (
                threshold,
                5,
                1,
            )
    assert load_recipe("ait", input_size=(3, 32, 32)).student_steps == 79_200
    assert load_recipe("rtn", input_size=(3, 32, 32)).student_steps == 0


def test_decay_indices():
    schedule = load_recipe("ait", input_size=(3, 32, 32)).schedule
    assert [round(schedule.factor(e), 6) for e in (0, 99, 100, 199, 200, 299, 300, 399)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
        0.001,
        0.001,
    ]


def test_recipes_load_and_come_back():
    assert {"ait", "autorecon", "gdfq", "hast", "intraq", "kl_only", "qimera", "rtn", "zeroq"} <= set(
        available_recipes()
    )
    for name in available_recipes():
        for schedule in ("paper", "short"):
            r = load_recipe(name, input_size=(3, 32, 32), schedule=schedule, weight_bits=3)
            assert Recipe.from_dict(r.to_dict()) == r and r.quant.weight_bits == 3 and r.title


@pytest.mark.parametrize(
    "run, words",
    [
        (lambda: load_recipe("aitt", input_size=SIZE), "unknown recipe 'aitt'. Did you mean 'ait'"),
        (lambda: load_recipe("nowhere.toml", input_size=SIZE), "cannot be read"),
        (lambda: load_recipe("ait", input_size=SIZE, schedule="sort"), "Did you mean 'short'"),
        (lambda: recipe("ait", "schedule.epoch=3"), "unknown recipe option 'schedule.epoch'. Did you mean 'epochs'"),
        (lambda: recipe("ait", "shedule.epochs=3"), "Did you mean 'schedule'"),
        (lambda: recipe("ait", "epochs=3"), "write section.option=value"),
        (lambda: recipe("ait", "schedule.epochs=many"), "schedule.epochs must be a whole number, got 'many'"),
        (lambda: recipe("ait", "schedule.epochs=0"), "schedule.epochs must be at least 1"),
        (lambda: recipe("ait", "student.lr=nan"), "student.lr must be a finite number"),
        (lambda: recipe("ait", "quant.ema=fast"), "'reference' or 'plain'"),
        (lambda: recipe("ait", "schedule.warmup_epochs=1"), "ranges must settle before the student trains"),
        (lambda: recipe("ait", weight_bits=1), "quant.weight_bits must be an integer from 2 to 8, got 1"),
        (lambda: Recipe.from_dict({"name": "x", "student": 3}), "must be a table of options"),
    ],
)
def test_wrong_recipes(run, words):
    with pytest.raises(UsageError, match=words):
        run()


def test_recipe_from_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('title = "mine"\nextends = "gdfq"\n[student]\nlr = 0.5\n')
    r = load_recipe(str(file), input_size=(3, 32, 32))
    assert r.name == "mine" and r.student.lr == 0.5 and r.student.weight_decay == 1e-4
    file.write_text("not toml at all = = 1")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_recipe(str(file), input_size=SIZE)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[large.student]\nlearning_rate = 1", "unknown recipe option 'large.student.learning_rate'"),
        ("[short.schedule]\nepoch = 1", "unknown recipe option 'short.schedule.epoch'. Did you mean 'epochs'"),
        ("[short.lrage.student]\nlr = 1", "unknown recipe section 'short.lrage'. Did you mean 'large'"),
        ("[lrage.student]\nlr = 1", "unknown recipe section 'lrage'. Did you mean 'large'"),
        ("[large]\nschedule = 5", "recipe section 'large.schedule' must be a table of options, got 5"),
        ("[short.large.student]\nlr = 'x'", "short.large.student.lr must be a finite number, got 'x'"),
        ("[short]\nlarge = 3", "must be tables, got 3"),
    ],
)
def test_tables_that_do_not_apply_are_checked(tmp_path, text, words):
    (tmp_path / "base.toml").write_text(f'extends = "gdfq"\n{text}')
    (tmp_path / "child.toml").write_text('extends = "base.toml"\n')
    for name in "base", "child":
        with pytest.raises(UsageError, match=re.escape(words)):
            load_recipe(str(tmp_path / f"{name}.toml"), input_size=SIZE)


def test_a_file_extends_one_beside_it(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "base.toml").write_text('extends = "gdfq"\n[student]\nlr = 0.5\n')
    (tmp_path / "other" / "base.toml").write_text('extends = "../base.toml"\n[student]\nmomentum = 0.25\n')
    child = tmp_path / "other" / "child.toml"
    child.write_text('extends = "base.toml"\n')
    monkeypatch.chdir(tmp_path)
    for path in child, "other/child.toml":
        student = load_recipe(str(path), input_size=SIZE).student
        assert (student.lr, student.momentum) == (0.5, 0.25)
    child.write_text('extends = "../other/child.toml"\n')
    with pytest.raises(UsageError, match="extends itself"):
        load_recipe("other/child.toml", input_size=SIZE)


# ---- generators --------------------------------------------------------------------------------------------------------


def test_generator_structure(device):
    """ait_family.md 4.1: sizes, the damped norms, zero mean and unit variance of the images."""
    g = Generator("plain", 10, (3, 32, 32)).to(device).train()
    assert round(sum(p.numel() for p in g.parameters()) / 1e6, 2) == 1.05
    images = g(torch.randn(64, 100, device=device), torch.randint(10, (64,), device=device))
    assert images.shape == (64, 3, 32, 32)
    assert images.mean((0, 2, 3)).abs().max() < 1e-4 and (images.var((0, 2, 3)) - 1).abs().max() < 1e-2
    assert [m.eps for m in g.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, 0.8, 0.8, 1e-5]
    large = Generator("conditional", 1000, (3, 224, 224))
    assert round(sum(p.numel() for p in large.parameters()) / 1e6, 1) == 41.4 and not hasattr(large, "embedding")
    with pytest.raises(UsageError, match="multiples of 4"):
        Generator("plain", 10, (3, 30, 32))


def test_conditional_norm():
    norm = ConditionalBatchNorm2d(3, 2).train()
    x, y = torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(norm(x, y), nn.BatchNorm2d(2, affine=False)(x))  # starts as the identity
    norm.gamma.weight.data[1], norm.beta.weight.data[2] = 3.0, 5.0
    want = nn.BatchNorm2d(2, affine=False)(x)
    want[y == 1] *= 3
    want[y == 2] += 5
    torch.testing.assert_close(norm(x, y), want)


# ---- trainer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "gdfq", "kl_only", "ait", "ait_adam", "ait_rmsprop"])
def test_every_recipe_runs(name, device):
    result = train(name, teacher=tiny().to(device))
    assert len(result.history) == 4 and all(torch.isfinite(p).all() for p in result.student.parameters())
    assert not result.student.training and ("student_loss" in result.history[-1]) == (name != "rtn")
    assert all(m.frozen for m in result.student.modules() if isinstance(m, zsq.QuantAct))
    assert ("update_ratio" in result.history[-1]) == name.startswith("ait")


@pytest.mark.parametrize(
    "switch",
    ["quant.ema=reference", "student.kd_reduction=batchmean", "student.nesterov=false", "student.ce_weight=0.5",
     "generator.kind=conditional", "inundation.search_steps=0", "inundation.capped_epochs=0", "inundation.bisection=corrected",
     "quant.ema=faithful", "quant.ema=extrema", "student.kd_reduction=corrected", "student.optimizer=adam",
     "student.optimizer=rmsprop", "student.weight_decay=0.01", "student.average=0.9",
     "generator.bns_weight=0", "generator.norm_eps=corrected"],
)  # fmt: skip
def test_every_switch_changes_the_result(switch):
    plain, switched = (train("ait", *s, "quant.weight_bits=3") for s in ((), (switch,)))
    a, b = (torch.cat([t.flatten() for t in r.student.state_dict().values()]) for r in (plain, switched))
    assert torch.isfinite(b).all() and not torch.equal(a, b)


@pytest.mark.parametrize("ranges", ["minmax", "learned"])
def test_averaged_parameters(ranges):
    """What counts is the moving average of what the optimizer leaves, which the training does not see."""
    switches = [] if ranges == "minmax" else ["quant.ranges=learned", "inundation.enabled=false"]
    plain, averaged = (
        Trainer(tiny(), recipe("ait", *switches, f"student.average={a}"), input_size=SIZE) for a in (0, 0.2)
    )
    means: list[torch.Tensor] = []
    step = averaged._student_step

    def record(batch):
        step(batch)
        n, now = record.count, [p.detach().clone() for p in averaged.student.parameters()]
        decay = min(0.2, n / (n + 10))  # from the third step on the former
        means[:] = [decay * m + (1 - decay) * p for m, p in zip(means or now, now, strict=True)]
        record.count += 1

    record.count = 0
    averaged._student_step = record  # type: ignore[method-assign]
    assert averaged.outcome() is averaged.student  # no step yet
    results = plain.run(), averaged.run()
    assert record.count == averaged.recipe.student_steps and same_tensors(plain.student, averaged.student)
    assert results[0].student is plain.student and results[1].student is not averaged.student
    for mean, p in zip(means, results[1].student.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), mean, rtol=1e-5, atol=1e-7)
    assert not same_tensors(results[0].student, results[1].student)
    assert all(m.frozen for m in results[1].student.modules() if isinstance(m, zsq.QuantAct))


def test_a_run_without_student_steps_has_nothing_to_average():
    switches = "quant.ranges=learned", "student.average=0.9"
    trainer = Trainer(tiny(), recipe("rtn", *switches), input_size=SIZE)
    assert trainer.run().student is trainer.student


def test_what_is_averaged_is_what_is_measured_and_chosen():
    seen = []

    def measure(network: torch.nn.Module) -> float:
        seen.append([p.detach().clone() for p in network.parameters()])
        return 50.0

    switches = "student.average=0.9", "schedule.held_out=8"
    trainer = Trainer(tiny(), recipe("ait", *switches), input_size=SIZE, evaluate=measure, eval_every=1)
    result = trainer.run()
    assert all(torch.equal(a, b.detach()) for a, b in zip(seen[-1], result.student.parameters(), strict=True))
    assert result.chosen_state is not None and result.chosen_epoch is not None
    at = result.chosen_epoch - trainer.recipe.schedule.epochs  # measured after every epoch, the last one at the end
    names = [name for name, _ in result.student.named_parameters()]
    assert all(torch.equal(result.chosen_state[name], p) for name, p in zip(names, seen[at], strict=True))


def test_timeline():
    """Ranges follow the data in the calibration epochs only, the student moves from the warm-up's end on, kappa is capped one epoch."""
    trainer = Trainer(tiny(), recipe("ait", "schedule.epochs=5"), input_size=SIZE)
    seen: list[tuple] = []

    def snapshot() -> tuple:
        acts = [m for m in trainer.student.modules() if isinstance(m, zsq.QuantAct)]
        gi = trainer.gi.param_groups[0]
        weights = torch.cat([p.detach().flatten() for p in trainer.student.parameters()]).clone()
        return (
            weights,
            torch.stack([a.hi for a in acts]).clone(),
            gi["capped"],
            gi["threshold"],
            gi["lr"],
            trainer.synthesis.optimizer.param_groups[0]["lr"],
        )

    start, finish = snapshot(), trainer._finish_epoch
    trainer._finish_epoch = lambda epoch: (finish(epoch), seen.append(snapshot()))  # type: ignore[method-assign]
    trainer.run()
    weights, ranges = [s[0] for s in (start, *seen)], [s[1] for s in seen]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])
    assert not torch.equal(ranges[0], ranges[1]) and all(torch.equal(r, ranges[1]) for r in ranges[2:])
    assert [s[2] for s in seen] == [True, True, True, False, False]
    for column, base in ((3, 1e-3), (4, 1e-4), (5, 1e-3)):
        assert [s[column] for s in seen] == pytest.approx([base] * 3 + [0.1 * base] * 2)


def test_inundated_parameters_are_exactly_the_quantized_weights():
    trainer = Trainer(tiny(), recipe(), input_size=SIZE)
    inundated = {id(p) for p in trainer.gi.param_groups[0]["params"]}
    assert inundated == {id(m.weight) for m in trainer.student.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    plain = {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}
    assert not plain & inundated and len(plain | inundated) == len(list(trainer.student.parameters()))


def test_teacher_is_frozen_and_untouched():
    teacher = tiny()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    trainer = Trainer(teacher, recipe(), input_size=SIZE)
    trainer.run()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters()) and not any(
        m._forward_pre_hooks for m in teacher.modules()
    )
    assert all(not p.requires_grad and p.grad is None for p in trainer.synthesis.teacher.parameters())


def test_same_seed_same_bits_other_seed_other_bits():
    one, two, other = train(seed=5), train(seed=5), train(seed=6)
    assert same_tensors(one.student, two.student) and not same_tensors(one.student, other.student)
    assert one.history == two.history


def test_training_in_lockstep_equals_training_alone():
    teacher, names = tiny(), ["ait", "gdfq", "kl_only"]
    trainers: list[Trainer] = []
    for name in names:
        trainers.append(
            Trainer(teacher, recipe(name), input_size=SIZE, seed=3, share=trainers[0] if trainers else None)
        )
    for name, result in zip(names, run_together(trainers), strict=True):
        alone = train(name, teacher=teacher, seed=3)
        assert same_tensors(result.student, alone.student) and result.history == alone.history
    for other, seed in ((teacher, 4), (tiny(), 3)):
        with pytest.raises(UsageError, match="share images only"):
            Trainer(other, recipe(), input_size=SIZE, seed=seed, share=trainers[0])


def test_a_student_that_diverges_leaves_the_others_alone(monkeypatch, tmp_path):
    """Even the one whose trainer makes the images."""
    teacher = tiny()
    bad = Trainer(teacher, recipe("gdfq", "student.lr=1e30"), input_size=SIZE, seed=3)
    good = Trainer(teacher, recipe("gdfq"), input_size=SIZE, seed=3, share=bad)
    error, result = run_together([bad, good])
    assert isinstance(error, TrainingError) and "NaN or infinite" in str(error)
    assert same_tensors(result.student, train("gdfq", teacher=teacher, seed=3).student)

    def stop_with_nan(trainer: Trainer, batch: object) -> None:
        iterate(trainer, batch)
        if trainer.state.step == 8 and trainer is first:
            signal.raise_signal(signal.SIGINT)
            next(trainer.student.parameters()).data.fill_(float("nan"))

    iterate = Trainer._iterate
    with (
        monkeypatch.context() as patched,
        contextlib.ExitStack() as stack,
    ):  # stopped in an epoch: the sound one is saved
        runs = [stack.enter_context(RunDir.create(tmp_path / name, {}, {})) for name in ("nan", "sound")]
        first = Trainer(teacher, good.recipe, input_size=SIZE, seed=3, run=runs[0])
        second = Trainer(teacher, good.recipe, input_size=SIZE, seed=3, run=runs[1], share=first)
        patched.setattr(Trainer, "_iterate", stop_with_nan)
        with pytest.raises(Interrupted, match="stopped at step 8 and saved"):
            run_together([first, second])
        assert [run.load_checkpoint()[0] for run in runs] == [6, 8]
    again = [Trainer(teacher, bad.recipe, input_size=SIZE, seed=3)]
    again.append(Trainer(teacher, bad.recipe, input_size=SIZE, seed=3, share=again[0]))
    with pytest.raises(TrainingError):
        run_together(again)


def test_evaluations_are_reported_and_choose_nothing():
    scores = iter([90.0, 50.0, 99.0, 10.0])
    result = train(evaluate=lambda network: next(scores), eval_every=1)
    chosen = result.history[result.chosen_epoch]["top1"]  # by agreement on synthetic images
    assert result.evaluations == {"float": 90.0, "rtn": 50.0, "last": 10.0, "chosen": chosen}
    assert same_tensors(
        result.student, train().student
    )  # the best-looking epoch was the third; the last one is returned


def test_rtn_moves_no_weight():
    teacher = tiny()
    result = Trainer(teacher, recipe("rtn"), input_size=SIZE).run()  # epochs after the warm-up train only the generator
    for name, p in teacher.state_dict().items():
        assert torch.equal(result.student.state_dict()[name], p)


def test_a_schedule_without_a_student_step_is_refused():
    with pytest.raises(UsageError, match=r"schedule\.epochs must be more than schedule\.warmup_epochs \(50\)"):
        load_recipe("ait", input_size=(3, 224, 224), overrides=["schedule.epochs=20"])


def test_a_child_recipe_stands_above_its_parents_tables(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('extends = "gdfq"\n[schedule]\nepochs = 77\n[student]\nlr = 0.5\n')
    for schedule in ("paper", "short"):
        r = load_recipe(str(file), input_size=(3, 224, 224), schedule=schedule)
        assert (r.schedule.epochs, r.student.lr, r.generator.kind) == (77, 0.5, "conditional")


def test_an_evaluation_that_leaves_train_mode_behind_changes_nothing():
    def careless(network: nn.Module) -> float:
        network.train()
        return 50.0

    assert same_tensors(train(evaluate=careless, eval_every=1).student, train().student)


def test_only_float32_is_trained():
    for wrong in (tiny().double(), tiny().bfloat16()):
        with pytest.raises(UnsupportedModelError, match=r"training needs float32: call \.float\(\) first"):
            train(teacher=wrong)


def test_too_short_a_calibration_is_told():
    with pytest.warns(UserWarning, match="6 calibration steps are fewer than the 175"):
        train("ait", "quant.ema=reference")


@pytest.mark.parametrize("average", [0, 0.9])
def test_resume_from_python(tmp_path, monkeypatch, average):
    overrides = [*TINY, f"student.average={average}"]
    options = dict(recipe="ait", input_size=SIZE, overrides=overrides, progress=False)
    whole = zsq.quantize(tiny(), run_dir=tmp_path / "whole", **options)
    save, saves = Trainer.save, []

    def save_then_stop(self: Trainer) -> None:
        save(self)
        saves.append(1)
        if len(saves) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "save", save_then_stop)
    with pytest.raises(zsq.errors.Interrupted, match="resume=True"):
        zsq.quantize(tiny(), run_dir=tmp_path / "cut", **options)
    again = zsq.quantize(tiny(), run_dir=tmp_path / "cut", resume=True, **options)
    assert same_tensors(again, whole)


def test_divergence_stops_with_a_name():
    with pytest.raises(TrainingError, match="became NaN or infinite in epoch"):
        train("gdfq", "student.lr=1e30")


def test_models_refused():
    fresh = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    with pytest.raises(UnsupportedModelError, match="looks untrained"):
        train(teacher=fresh)
    train(teacher=fresh, force=True)
    with pytest.raises(UnsupportedModelError, match="class logits"):
        train(teacher=tiny()[:6])


def test_one_call(tmp_path):
    teacher = tiny()
    student = zsq.quantize(
        teacher,
        recipe="ait",
        weight_bits=4,
        act_bits=3,
        input_size=SIZE,
        seed=0,
        overrides=TINY,
        run_dir=tmp_path / "run",
        progress=False,
    )
    assert zsq.summarize(student).act_quantizers == 2 and student(torch.randn(2, *SIZE)).shape == (2, 4)
    again = zsq.methods.student_like(teacher, recipe(act_bits=3), SIZE)
    from zsq_fast.runs import RunDir

    with RunDir.open(tmp_path / "run", read_only=True) as run:
        again.load_state_dict(run.load_tensors("student.safetensors"))
        assert len(run.read_metrics()) == 4 and Recipe.from_dict(run.recipe).quant.act_bits == 3
    assert same_tensors(student, again)
    with pytest.raises(UsageError, match="input_size is needed"):
        zsq.quantize(teacher)
