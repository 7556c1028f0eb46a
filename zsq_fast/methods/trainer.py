"""The training loop: generator steps that calibrate the student, then student steps on generated or on optimised images."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from zsq_fast import nn as znn
from zsq_fast.errors import Interrupted, TrainingError, UnsupportedModelError, UsageError
from zsq_fast.methods.batches import ImageBatches
from zsq_fast.methods.cosine import CosineTracker
from zsq_fast.methods.held_out import HeldOut, chosen_record
from zsq_fast.methods.images import ImageSet, cached_images, synthesize_images
from zsq_fast.methods.meters import Meters
from zsq_fast.methods.mixed import settle_bits
from zsq_fast.methods.recipe import Images, Quant, Recipe, Student
from zsq_fast.methods.search import settle_genotype
from zsq_fast.methods.state import State, optimizer_tensors, restore_optimizer
from zsq_fast.methods.steps import StudentStep
from zsq_fast.methods.synthesis import Batch, Synthesis
from zsq_fast.methods.updates import NetUpdates, weights_by_bits
from zsq_fast.nn.layers import SMALLEST_STEP
from zsq_fast.nn.taps import look_untrained
from zsq_fast.optim import GISGD, GIAdam, GIRMSprop
from zsq_fast.runs import Progress, RunDir, StopRequest

SETTLING_UPDATES = 175  # of the published range tracker, to within 0.1 % (ait_family.md section 2)


# Of `student.optimizer`: of the parameters that are not quantized, and of the weights whose codes inundation counts.
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (torch.optim.SGD, GISGD),
    "adam": (torch.optim.Adam, GIAdam),
    "rmsprop": (torch.optim.RMSprop, GIRMSprop),
}


def optimizer_options(spec: Student) -> dict[str, Any]:
    """What is the optimizer's own."""
    own: dict[str, dict[str, Any]] = {
        "sgd": {"momentum": spec.momentum, "nesterov": spec.nesterov},
        "adam": {"betas": spec.betas, "eps": spec.optimizer_eps},
        "rmsprop": {"alpha": spec.square_decay, "eps": spec.optimizer_eps},
    }
    return own[spec.optimizer]


def check_teacher(teacher: nn.Module, *, force: bool = False) -> None:
    """Raises UnsupportedModelError for a network that no images can be made of: untrained (but for `force`), or not float32."""
    if look_untrained(znn.usable_batch_norms(teacher)) and not force:
        raise UnsupportedModelError(
            "every batch-norm statistic has its initial value (mean 0, variance 1): the model looks untrained; load a "
            "trained checkpoint, or use force (--force) to go on."
        )
    other = next((p.dtype for p in teacher.parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise UnsupportedModelError(f"the model holds {other} parameters; training needs float32: call .float() first.")


def make_student(teacher: nn.Module, quant: Quant, input_size: Sequence[int]) -> nn.Module:
    """The quantized copy that a recipe asks for, its weights those of the teacher. Raises: see `zsq_fast.nn.convert`."""
    options: dict[str, Any] = dict(ema=quant.ema, ranges=quant.ranges, input_size=input_size)
    return znn.convert(teacher, quant.widths, quant.act_bits, **options)


@dataclass
class Result:
    """Outcome of a run.

    Attributes:
        student: the quantized network in eval mode.
        synthesis: the generator at the end and its frozen teacher; `synthesis.images(step)` draws images.
        summary: what was quantized and what stayed float.
        history: one record per epoch: losses, agreement with the teacher, share of changed codes.
        evaluations: top-1 in percent: "float", "rtn" (ranges calibrated, before the first student step), "last" and "chosen".
        seconds: time of synthesis, student steps and checkpoints, evaluations left out.
        chosen_epoch: index of the epoch whose student agreed best with the teacher on images held out (`schedule.held_out`), by
            `held_out_agreement` and `held_out_kl` of the history; None where nothing was held out or no student trained.
        chosen_state: the `state_dict` of that student, on the CPU; `student` itself is that of the last epoch.
    """

    student: nn.Module
    synthesis: Synthesis
    summary: znn.Summary
    history: list[dict[str, Any]]
    evaluations: dict[str, float]
    seconds: float
    chosen_epoch: int | None = None
    chosen_state: dict[str, Tensor] | None = None


class Trainer:
    """Quantizes one network after a recipe.

    Args:
        teacher: the float network, on the device to train on; it is copied, frozen and never changed.
        recipe: a resolved recipe (`load_recipe`).
        input_size: `(C, H, W)` of the network's input.
        seed: every draw of the run follows from it.
        run: directory for metrics and checkpoints (one per epoch); None keeps nothing on disk.
        evaluate: returns top-1 in percent of a network on real data, for reporting only; nothing is chosen by it.
        eval_every: also evaluate after every this many epochs.
        track_cosine: measure the gradient cosines of the losses at every step whose number this divides
            (`zsq_fast.methods.cosine`); 0: at none. Their means are in the history, as "cosine". The training stays the same.
        channels_last: memory layout of networks and images; None takes channels_last on the CPU, where convolutions are
            several times faster in it.
        force: go on with batch-norm statistics that look untrained.
        share: take the images of this trainer instead of making the same ones again (see `run_together`).
        image_dir: where optimised images (`recipe.images`) are kept and looked for; None takes the run directory's own place.
        on_epoch: called at the end of every epoch with this trainer and the epoch's record, before the checkpoint is saved. It looks
            on: it must change nothing of the trainer, and no global random state.
        track_updates: the history also holds `net_update_ratio`: per weight the share of integer codes that differ between the start
            and the end of the epoch. `update_ratio`, summed over the steps, comes of gradient inundation and is always there.

    Raises:
        UnsupportedModelError: nothing to quantize, no usable batch norm, NaN weights, or untrained statistics.
        TrainingError: a loss or a weight became NaN.
        Interrupted: SIGINT or SIGTERM arrived; the state was saved first if there is a run directory.
    """

    def __init__(
        self,
        teacher: nn.Module,
        recipe: Recipe,
        *,
        input_size: Sequence[int],
        seed: int = 0,
        run: RunDir | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        eval_every: int | None = None,
        track_cosine: int = 0,
        progress: Progress | None = None,
        channels_last: bool | None = None,
        force: bool = False,
        share: Trainer | None = None,
        image_dir: str | PathLike[str] | None = None,
        track_updates: bool = False,
        on_epoch: Callable[[Trainer, dict[str, Any]], None] | None = None,
    ):
        if len(input_size) != 3 or min(input_size) < 1:
            raise UsageError(f"input_size must be (channels, height, width), got {tuple(input_size)}")
        if track_cosine < 0:
            raise UsageError(f"track_cosine must be a number of steps of at least 0, got {track_cosine}")
        self.recipe, self.input_size, self.seed, self.run_dir = recipe, tuple(input_size), seed, run
        self.evaluate, self.eval_every, self.progress = evaluate, eval_every, progress or Progress(quiet=True)
        self.on_epoch = on_epoch
        check_teacher(teacher, force=force)
        settling = recipe.schedule.calibration_epochs * recipe.schedule.iterations
        if recipe.quant.ema == "reference" and settling < SETTLING_UPDATES:
            warnings.warn(
                f"{settling} calibration steps are fewer than the {SETTLING_UPDATES} that the published range tracker needs to "
                "settle, and the activation ranges will be far too wide: set quant.ema=plain.",
                stacklevel=2,
            )
        device = next(teacher.parameters()).device
        if channels_last is None:
            channels_last = device.type == "cpu"
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.recipe = recipe = settle_bits(recipe, teacher, self.input_size, seed, self.layout)
        quant = recipe.quant
        self.student = make_student(teacher, quant, input_size)
        if quant.start == "squant":
            znn.balanced_rounding_(self.student)
        self.student.eval().requires_grad_(True).to(memory_format=self.layout)
        self.summary = znn.summarize(self.student)
        self.recipe = recipe = settle_genotype(recipe, teacher, self.input_size, seed, self.layout, self.progress)
        if share is not None:
            theirs, mine = (
                (
                    *(t.recipe.generator, t.recipe.images.enabled, t.recipe.quant.calibrate_on, t.recipe.schedule),
                    *(t.seed, t.input_size, t.layout),
                )
                for t in (share, self)
            )
            if theirs != mine or share.synthesis.source is not teacher:
                raise UsageError(
                    "trainers can share images only with the same teacher, generator, images.enabled, quant.calibrate_on, schedule, "
                    "seed, input size and layout"
                )
            self.synthesis: Synthesis = share.synthesis
        else:
            self.synthesis = Synthesis(teacher, recipe, input_size, seed, self.layout)
        self.image_dir = image_dir
        self.batches: ImageBatches | None = None  # there once the run has begun
        averaging = recipe.student.enabled and recipe.student.average
        parameters = self.student.parameters() if averaging else ()
        self.averages = [p.detach().clone() for p in parameters]  # see `outcome`
        self.losses = StudentStep(self.student, self.synthesis.teacher, recipe.student, input_size)
        self.track_cosine, self.cosines = track_cosine, None
        if track_cosine and recipe.student.enabled:
            self.cosines = CosineTracker(self.student, self.synthesis.teacher, recipe.student, input_size)
        self._build_optimizers()
        self.meters = Meters(device, len(self.inundated))
        self.updates = NetUpdates(self.student) if track_updates and recipe.student.enabled else None
        self.state = State()
        self.resume_hint = "Trainer.restore() and run() go on from there"
        self._scheduled_epoch = -1
        self._evaluation_seconds = 0.0
        self._chosen: dict[str, Tensor] | None = None

    def _build_optimizers(self) -> None:
        spec = self.recipe.student
        groups = (
            weights_by_bits(self.student) if self.recipe.inundation.enabled else {}
        )  # whose codes inundation counts
        self.inundated: dict[str, Any] = {name: m.weight for group in groups.values() for name, m in group.items()}
        self.learned: list[Tensor] = list(znn.learned_steps(self.student).values())
        taken = {id(p) for p in (*self.inundated.values(), *self.learned)}
        options = {"lr": spec.lr, "weight_decay": spec.weight_decay, **optimizer_options(spec)}
        plain, inundating = OPTIMIZERS[spec.optimizer]
        rest = [p for p in self.student.parameters() if id(p) not in taken]
        self.optimizers: list[torch.optim.Optimizer] = [plain(rest, **options)] if rest else []
        if self.learned:
            self.optimizers[0].add_param_group({"params": self.learned, "weight_decay": 0.0})
        if self.inundated:
            gi = self.recipe.inundation
            self.gi = inundating(
                [{"params": [m.weight for m in group.values()], "bits": bits} for bits, group in groups.items()],
                **options,
                threshold=gi.threshold,
                search_steps=gi.search_steps,
                guaranteed=gi.bisection == "corrected",
            )
            self.optimizers.append(self.gi)

    # ---- one iteration ----------------------------------------------------------------------------------------------

    def _student_step(self, batch: Batch) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss, agreement = self.losses.backward(batch)
        for optimizer in self.optimizers:  # the plain one first, then inundation (ait_family.md 7.2)
            optimizer.step()
        if self.learned:
            with torch.no_grad():  # below 0 there is no grid, only NaN
                torch._foreach_clamp_min_(self.learned, SMALLEST_STEP)
        if self.averages:
            self._average()
        self.meters.add(student_loss=loss, agreement=agreement)
        if self.inundated:
            self.meters.add_inundation(self.gi.changed, self.gi.kappa)

    @property
    def _student_steps(self) -> int:
        schedule = self.recipe.schedule
        return max(0, self.state.step - schedule.warmup_epochs * schedule.iterations)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.student.average, self._student_steps / (self._student_steps + 10))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.student.parameters()], 1 - decay)

    @torch.no_grad()
    def outcome(self) -> nn.Module:
        """The student as it counts: itself, or a copy with the averages of its parameters (`student.average`)."""
        if not self.averages or not self._student_steps:
            return self.student
        network = copy.deepcopy(self.student)
        torch._foreach_copy_(list(network.parameters()), self.averages)
        return network

    @property
    def _wants_generator(self) -> bool:
        """Whether the next iteration is one of the generator's: all of them, or the warm-up before optimised images."""
        return not self.recipe.images.enabled or self.state.step < self._first_image_step

    @property
    def _first_image_step(self) -> int:
        schedule = self.recipe.schedule
        return 0 if self.recipe.quant.calibrate_on == "images" else schedule.warmup_epochs * schedule.iterations

    def _make_images(self) -> ImageSet:
        started, folder = time.perf_counter(), self.image_dir
        if folder is None and self.run_dir is not None:
            folder = self.run_dir.image_dir
        args = (self.synthesis.source, self.recipe.images, self.input_size, self.synthesis.num_classes, self.seed)
        options: dict[str, Any] = dict(layout=self.layout, progress=self.progress)
        try:
            images = synthesize_images(*args, **options) if folder is None else cached_images(folder, *args, **options)
        except Interrupted as stopped:
            if self.run_dir is not None:
                stopped.args = (f"stopped while the images were made; go on with: {self.resume_hint}",)
            raise
        self.synthesis.seconds += time.perf_counter() - started
        return images

    def _use_images(self, images: ImageSet) -> None:
        spec = self.recipe.student
        size, device = spec.batch_size or self.recipe.schedule.batch_size, self.synthesis.device
        self.batches = ImageBatches(
            images, size, spec.crop_scale, spec.flip, self.seed, device, self.layout, spec.low_pass
        )

    def _iterate(self, batch: Batch | None) -> None:
        """What one batch of the generator means to this student (None: it takes one of its own), and the bookkeeping of the
        epoch it ends."""
        started, schedule = time.perf_counter(), self.recipe.schedule
        epoch = self.state.step // schedule.iterations
        if epoch != self._scheduled_epoch:
            self._set_schedule(epoch)
        elsewhere = self._evaluation_seconds + self.synthesis.seconds
        if batch is None:
            assert self.batches is not None
            batch = self.batches.batch(self.state.step - self._first_image_step)
        elif batch.generator_ce is not None and batch.generator_bns is not None:
            self.meters.add(generator_ce=batch.generator_ce, generator_bns=batch.generator_bns)
        if epoch < schedule.calibration_epochs:
            with torch.no_grad(), znn.calibrating(self.student):
                self.student(batch.images)
        if self.recipe.student.enabled and epoch >= schedule.warmup_epochs:
            if self.cosines is not None and self.state.step % self.track_cosine == 0:
                self.cosines.observe(batch)
            self._student_step(batch)
        self.state.step += 1
        self.progress.advance(epoch=f"{epoch + 1}/{schedule.epochs}")
        if self.state.step % schedule.iterations == 0:
            self._finish_epoch(epoch)
        elsewhere -= self._evaluation_seconds + self.synthesis.seconds
        self.state.seconds += time.perf_counter() - started + elsewhere

    # ---- epochs -----------------------------------------------------------------------------------------------------

    def _set_schedule(self, epoch: int) -> None:
        self._scheduled_epoch = epoch
        recipe, factor = self.recipe, self.recipe.schedule.factor(epoch)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.student.lr * factor
        first, last = recipe.schedule.warmup_epochs, recipe.schedule.epochs - 1
        self.losses.progress = max(0, epoch - first) / max(1, last - first)
        if self.inundated:
            for group in self.gi.param_groups:
                group["threshold"] = recipe.inundation.threshold * factor
                group["capped"] = epoch < recipe.schedule.warmup_epochs + recipe.inundation.capped_epochs
        if epoch >= recipe.schedule.calibration_epochs:
            znn.freeze_ranges(self.student)

    def _measure(self, name: str, network: nn.Module) -> float | None:
        if self.evaluate is None:
            return None
        self.progress.doing("measuring on test images")
        started = time.perf_counter()
        top1 = self.evaluate(network)
        network.eval()  # whatever mode the caller's function leaves behind
        self._evaluation_seconds += time.perf_counter() - started
        if name in ("float", "rtn", "last", "chosen"):
            self.state.evaluations[name] = top1
        self.progress.message(f"{name}: top-1 {top1:.2f} %")
        return top1

    def _finish_epoch(self, epoch: int) -> None:
        schedule, done, student = self.recipe.schedule, epoch + 1, self.outcome()
        record: dict[str, Any] = {"epoch": epoch, "step": self.state.step, "lr_factor": schedule.factor(epoch)}
        record.update(self.meters.read(self.inundated))
        if self.cosines is not None and (cosines := self.cosines.meter.read()):
            record["cosine"] = cosines
            self.cosines.meter.reset()
        if schedule.held_out and self.recipe.student.enabled and done >= schedule.warmup_epochs:
            held_out = self._held_out()
            if done > schedule.warmup_epochs:
                record.update(held_out.measure(student))
        self._check_finite(epoch, record)
        self.meters.reset()
        if done == schedule.calibration_epochs:
            znn.freeze_ranges(self.student)  # learned ranges begin here: "rtn" is measured on them
            student = self.outcome()
        if self.updates is not None and done >= schedule.warmup_epochs:
            record.update(self.updates.next_epoch())
        if done == min(schedule.warmup_epochs, schedule.epochs):
            record["top1"] = self._measure("rtn", student)
        if done == schedule.epochs:
            record["top1"] = self._measure("last", student)
        elif self.eval_every and done > schedule.warmup_epochs and done % self.eval_every == 0:
            record["top1"] = self._measure(f"epoch {done}", student)
        self.state.history.append(record)
        if chosen_record(self.state.history) is record:
            self._chosen = {name: t.detach().to("cpu", copy=True) for name, t in student.state_dict().items()}
        if done == schedule.epochs:
            self._measure_chosen()
        if self.run_dir:
            self.run_dir.log(**record)
        if self.on_epoch is not None:
            self.on_epoch(self, record)
        self.save()

    def _held_out(self) -> HeldOut:
        """The images held out, made at the end of the warm-up, once for all students of one synthesis."""
        synthesis = self.synthesis
        if synthesis.held_out is None:
            started = time.perf_counter()
            synthesis.held_out = HeldOut(synthesis, self.recipe.schedule.held_out)
            synthesis.seconds += time.perf_counter() - started
        return synthesis.held_out

    def _measure_chosen(self) -> None:
        record = chosen_record(self.state.history)
        if record is None or self._chosen is None or self.evaluate is None:
            return
        if record.get("top1") is not None:  # of the last epoch, or with eval_every
            self.state.evaluations["chosen"] = record["top1"]
        else:
            network = copy.deepcopy(self.student)
            network.load_state_dict(self._chosen)
            self._measure("chosen", network)

    def _check_finite(self, epoch: int, record: dict[str, Any]) -> None:
        bad = [name.replace("_", " ") for name, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
        bad += [
            f"the weight {name}" for name, p in self.student.named_parameters() if not bool(torch.isfinite(p).all())
        ]
        if bad:
            kept = " The last checkpoint is sound." if self.run_dir and self.state.history else ""
            raise TrainingError(
                f"{bad[0]} became NaN or infinite in epoch {epoch + 1}: stopped.{kept} Try a lower learning rate."
            )

    def run(self) -> Result:
        """Train from the current state to the end of the schedule."""
        (result,) = run_together([self])
        assert isinstance(result, Result)  # an error of the only student was raised
        return result

    def _result(self) -> Result:
        state = self.state
        chosen = chosen_record(state.history)
        znn.freeze_ranges(self.student)
        return Result(
            self.outcome(),
            self.synthesis,
            self.summary,
            state.history,
            state.evaluations,
            state.seconds + self.synthesis.seconds,
            None if chosen is None else chosen["epoch"],
            self._chosen,
        )

    def _save_midway(self) -> None:
        """Raises TrainingError instead of keeping a student that is not sound."""
        if (
            self.run_dir is not None and self.state.step % self.recipe.schedule.iterations
        ):  # at an epoch's end it is saved
            self._check_finite(self.state.step // self.recipe.schedule.iterations, {})
            self.save()

    # ---- state ------------------------------------------------------------------------------------------------------

    def _all_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "generator_optimizer": self.synthesis.optimizer,
            **{f"student_optimizer{i}": o for i, o in enumerate(self.optimizers)},
        }

    def save(self) -> None:
        """Write a checkpoint of the whole state into the run directory, if there is one."""
        if self.run_dir is None:
            return
        groups: dict[str, dict[str, Tensor]] = {
            "student": dict(self.student.state_dict()),
            "generator": dict(self.synthesis.generator.state_dict()),
            "meters": self.meters.state_dict(),
        }
        for name, optimizer in self._all_optimizers().items():
            groups[name] = optimizer_tensors(optimizer)
        if self.synthesis.held_out is not None:
            groups["held_out"] = self.synthesis.held_out.tensors()
        if self._chosen is not None:
            groups["chosen"] = self._chosen
        if self.averages:
            groups["averages"] = {str(i): t for i, t in enumerate(self.averages)}
        if self.cosines is not None:
            groups["cosines"] = self.cosines.meter.state_dict()
        if self.updates is not None:
            groups["updates"] = self.updates.tensors()
        state = {
            "seconds": self.state.seconds,
            "synthesis_seconds": self.synthesis.seconds,
            "evaluations": self.state.evaluations,
            "history": self.state.history,
        }
        self.run_dir.save_checkpoint(self.state.step, groups, state)

    def restore(self) -> int:
        """Load the newest sound checkpoint of the run directory, if there is one; returns the step to go on from."""
        loaded = self.run_dir.load_checkpoint() if self.run_dir else None
        if loaded is None:
            return 0
        step, groups, state = loaded
        self.student.load_state_dict(groups["student"])
        self.synthesis.generator.load_state_dict(groups["generator"])
        self.meters.load_state_dict(groups["meters"])
        for name, optimizer in self._all_optimizers().items():
            restore_optimizer(optimizer, groups[name])
        if "held_out" in groups:
            self.synthesis.held_out = HeldOut(self.synthesis, self.recipe.schedule.held_out, groups["held_out"])
        self._chosen = groups.get("chosen")
        for i, t in enumerate(self.averages):
            t.copy_(groups["averages"][str(i)])
        if self.cosines is not None and "cosines" in groups:
            self.cosines.meter.load_state_dict(groups["cosines"])
        if self.updates is not None:
            self.updates.load(groups.get("updates", {}))
        self.synthesis.seconds = state["synthesis_seconds"]
        self.state = State(step, state["seconds"], state["evaluations"], state["history"])
        return step


def run_together(trainers: Sequence[Trainer]) -> list[Result | TrainingError]:
    """Train several students in lockstep on the images of one synthesis; each result equals that of a run of its own.

    Neither the generator nor the optimised images depend on a student, so students of different bits or losses
    (`Trainer(..., share=first)`) need the images only once, those held out too, and each set if their recipes want several.
    `seconds` of each result counts all synthesis in full. A student that diverges drops out and has its error for a result; the
    error is raised only when none is left.
    """
    first = trainers[0]
    schedule, synthesis = first.recipe.schedule, first.synthesis
    if any(t.synthesis is not synthesis or t.state.step != first.state.step for t in trainers):
        raise UsageError("run_together needs trainers that share one synthesis and stand at the same step")
    if first.recipe.images.enabled and first.state.step < schedule.steps:
        _provide_images(trainers)
    first.progress.start(schedule.steps, first.recipe.name, done=first.state.step)
    training, errors = list(trainers), dict[int, TrainingError]()
    try:
        with StopRequest() as stop:
            for trainer in trainers:
                if trainer.state.step == 0:
                    trainer._measure("float", synthesis.teacher)
            while training[0].state.step < schedule.steps:
                batch = synthesis.step(training[0].state.step) if training[0]._wants_generator else None
                for trainer in list(training):
                    try:
                        trainer._iterate(batch)
                    except TrainingError as error:
                        errors[id(trainer)] = error
                        training.remove(trainer)
                        if not training:
                            raise
                if stop.signal is not None:
                    _stop(training, stop.signal)
    finally:
        first.progress.stop()
    return [errors[id(t)] if id(t) in errors else t._result() for t in trainers]


def _stop(training: Sequence[Trainer], signal: int) -> NoReturn:
    """Saves every student that is sound and raises Interrupted, or TrainingError if none is."""
    sound, error = list[Trainer](), None
    for trainer in training:
        try:
            trainer._save_midway()
            sound.append(trainer)
        except TrainingError as found:
            error = found
    if not sound:
        assert error is not None
        raise error
    state, hint = sound[0].state, sound[0].resume_hint
    if sound[0].run_dir is None:
        raise Interrupted("stopped; nothing was saved because there is no run directory (--out).", signal)
    raise Interrupted(f"stopped at step {state.step} and saved; go on with: {hint}", signal)


def _provide_images(trainers: Sequence[Trainer]) -> None:
    """Gives every trainer its optimised images, each set made once or read from where it is kept."""
    made: dict[Images, ImageSet] = {}
    for trainer in trainers:
        spec = trainer.recipe.images
        if spec not in made:
            try:
                made[spec] = trainer._make_images()
            except Interrupted:
                for one in trainers:
                    if one.state.step == 0:
                        one.save()  # a run that is stopped meanwhile can be resumed
                raise
        trainer._use_images(made[spec])
