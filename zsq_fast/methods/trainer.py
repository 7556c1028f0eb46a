"""The training loop of the generator family: one generator step, then one student step on the very same images."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast import nn as znn
from zsq_fast.errors import Interrupted, TrainingError, UnsupportedModelError, UsageError
from zsq_fast.losses import kd_kl
from zsq_fast.methods.generators import build_generator
from zsq_fast.methods.meters import Meters
from zsq_fast.methods.recipe import Recipe
from zsq_fast.nn.taps import look_untrained
from zsq_fast.optim import GISGD
from zsq_fast.runs import Progress, RunDir, StopRequest


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose and step: draws depend on nothing that came before, so a resumed run needs no replay."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Result:
    """Outcome of a run.

    Attributes:
        student: the quantized network in eval mode.
        generator: the image generator at the end (train mode, as it is used).
        summary: what was quantized and what stayed float.
        history: one record per epoch: losses, agreement, share of changed codes.
        evaluations: top-1 in percent: "float", "rtn" (ranges calibrated, before the first student step) and "last".
        seconds: time of training, evaluations included.
    """

    student: nn.Module
    generator: nn.Module
    summary: znn.Summary
    history: list[dict[str, Any]]
    evaluations: dict[str, float]
    seconds: float


@dataclass
class _State:
    """Everything of a run that is not a tensor."""

    step: int = 0
    seconds: float = 0.0
    evaluations: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


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
        channels_last: memory layout of networks and images; None takes channels_last on the CPU, where it is several times faster.
        force: go on with batch-norm statistics that look untrained.

    Raises:
        UnsupportedModelError: nothing to quantize, no usable batch norm, NaN weights, or untrained statistics.
        TrainingError: a loss or a weight became NaN; names the step.
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
        progress: Progress | None = None,
        channels_last: bool | None = None,
        force: bool = False,
    ):
        if len(input_size) != 3 or min(input_size) < 1:
            raise UsageError(f"input_size must be (channels, height, width), got {tuple(input_size)}")
        self.recipe, self.input_size, self.seed, self.run_dir = recipe, tuple(input_size), seed, run
        self.evaluate, self.eval_every, self.progress = evaluate, eval_every, progress or Progress(quiet=True)
        norms = znn.usable_batch_norms(teacher)
        if look_untrained(norms) and not force:
            raise UnsupportedModelError(
                "every batch-norm statistic has its initial value (mean 0, variance 1): the model looks untrained; load a "
                "trained checkpoint, or use force (--force) to go on."
            )
        self.device = next(teacher.parameters()).device
        layout = torch.channels_last if (channels_last if channels_last is not None else self.device.type == "cpu") else torch.contiguous_format  # fmt: skip
        quant = recipe.quant
        self.student = znn.convert(teacher, quant.weight_bits, quant.act_bits, ema=quant.ema, input_size=input_size).eval()
        self.summary = znn.summarize(self.student)
        # A frozen teacher saves a third of its backward pass and keeps the user's network out of our autograd graph.
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.student.requires_grad_(True)
        with torch.no_grad():
            probe = self.teacher(torch.zeros(1, *input_size, device=self.device))
        if probe.dim() != 2:
            raise UnsupportedModelError(f"the model must return class logits [N, classes], got shape {tuple(probe.shape)}")
        self.num_classes = probe.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "generator-init"))
            self.generator = build_generator(recipe.generator, self.num_classes, input_size).to(self.device).train()
        for network in (self.teacher, self.student, self.generator):
            network.to(memory_format=layout)
        self._build_optimizers()
        self.meters = Meters(self.device, len(self.inundated))
        self.state = _State()

    def _build_optimizers(self) -> None:
        spec, student = self.recipe.student, self.student
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=self.recipe.generator.lr, betas=self.recipe.generator.betas
        )
        weights = znn.quantized_weights(student)
        self.inundated = weights if self.recipe.inundation.enabled else {}
        taken = {id(p) for p in self.inundated.values()}
        sgd: dict[str, Any] = dict(lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay)
        rest = [p for p in student.parameters() if id(p) not in taken]
        self.student_optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(rest, **sgd)] if rest else []
        if self.inundated:
            gi = self.recipe.inundation
            self.gi = GISGD(
                self.inundated.values(), **sgd, bits=self.recipe.quant.weight_bits, threshold=gi.threshold, search_steps=gi.search_steps
            )
            self.student_optimizers.append(self.gi)

    # ---- one iteration ----------------------------------------------------------------------------------------------

    def sample(self, step: int) -> tuple[Tensor, Tensor]:
        """Noise `[B, latent]` and labels `[B]` of one iteration, a function of (seed, step) alone."""
        batch = self.recipe.schedule.batch_size
        rng = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "images", step))
        noise = torch.randn(batch, self.recipe.generator.latent, device=self.device, generator=rng)
        return noise, torch.randint(self.num_classes, (batch,), device=self.device, generator=rng)

    def _generator_step(self, tap: znn.BNStatsTap, step: int) -> tuple[Tensor, Tensor, Tensor]:
        noise, labels = self.sample(step)
        images = self.generator(noise, labels)
        logits = self.teacher(images)
        spec = self.recipe.generator
        ce, bns = F.cross_entropy(logits, labels), tap.loss()
        self.generator_optimizer.zero_grad(set_to_none=True)
        (spec.ce_weight * ce + spec.bns_weight * bns).backward()
        self.generator_optimizer.step()
        self.meters.add(generator_ce=ce, generator_bns=bns)
        return images.detach(), labels, logits.detach()

    def _student_step(self, images: Tensor, labels: Tensor, teacher_logits: Tensor) -> None:
        spec = self.recipe.student
        logits = self.student(images)
        loss = logits.new_zeros(())
        if spec.kd_weight:
            loss = loss + spec.kd_weight * kd_kl(logits, teacher_logits, spec.temperature, spec.kd_reduction)
        if spec.ce_weight:
            loss = loss + spec.ce_weight * F.cross_entropy(logits, labels)
        for optimizer in self.student_optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.student_optimizers:  # plain SGD first, then inundation (ait_family.md 7.2)
            optimizer.step()
        agreement = (logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
        self.meters.add(student_loss=loss, agreement=agreement)
        if self.inundated:
            self.meters.add_inundation(self.gi.changed, self.gi.kappa)

    def _iterate(self, tap: znn.BNStatsTap, epoch: int) -> None:
        schedule = self.recipe.schedule
        batch = self._generator_step(tap, self.state.step)
        if epoch < schedule.calibration_epochs:
            with torch.no_grad(), znn.calibrating(self.student):
                self.student(batch[0])
        if epoch >= schedule.warmup_epochs:
            self._student_step(*batch)
        self.state.step += 1

    # ---- epochs -----------------------------------------------------------------------------------------------------

    def _set_schedule(self, epoch: int) -> None:
        recipe, factor = self.recipe, self.recipe.schedule.factor(epoch)
        for optimizer, lr in [(self.generator_optimizer, recipe.generator.lr)] + [(o, recipe.student.lr) for o in self.student_optimizers]:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        if self.inundated:
            for group in self.gi.param_groups:
                group["threshold"] = recipe.inundation.threshold * factor
                group["capped"] = epoch < recipe.schedule.warmup_epochs + recipe.inundation.capped_epochs
        if epoch >= recipe.schedule.calibration_epochs:
            znn.freeze_ranges(self.student)

    def _evaluate(self, name: str, network: nn.Module) -> float | None:
        if self.evaluate is None:
            return None
        top1 = self.evaluate(network)
        if name in ("float", "rtn", "last"):
            self.state.evaluations[name] = top1
        self.progress.message(f"{name}: top-1 {top1:.2f} %")
        return top1

    def _finish_epoch(self, epoch: int) -> None:
        schedule = self.recipe.schedule
        record: dict[str, Any] = {"epoch": epoch, "step": self.state.step, "lr_factor": schedule.factor(epoch)}
        record.update(self.meters.read(self.inundated))
        self._check_finite(record)
        self.meters.reset()
        done = epoch + 1
        if done == schedule.epochs:
            record["top1"] = self._evaluate("last", self.student)
        elif self.eval_every and done % self.eval_every == 0 and done > schedule.warmup_epochs:
            record["top1"] = self._evaluate(f"epoch {epoch}", self.student)
        self.state.history.append(record)
        if self.run_dir:
            self.run_dir.log(**record)
        if done in (schedule.warmup_epochs, schedule.epochs) and "rtn" not in self.state.evaluations:
            self._evaluate("rtn", self.student)

    def _check_finite(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                kept = " The last checkpoint is sound." if self.run_dir else ""
                raise TrainingError(f"{name.replace('_', ' ')} became {value} in epoch {record['epoch']}: stopped.{kept} Try a lower learning rate.")
        for name, p in self.student.named_parameters():
            if not bool(torch.isfinite(p).all()):
                raise TrainingError(f"the student's weight '{name}' became NaN or infinite in epoch {record['epoch']}: stopped. Try a lower learning rate.")

    def run(self) -> Result:
        """Train from the current state to the end of the schedule and return the result."""
        schedule, state = self.recipe.schedule, self.state
        self.progress.start(schedule.generator_steps, self.recipe.name, done=state.step)
        started = time.monotonic() - state.seconds
        try:
            with znn.BNStatsTap(self.teacher) as tap, StopRequest() as stop:
                if "float" not in state.evaluations and state.step == 0:
                    with tap.paused():
                        self._evaluate("float", self.teacher)
                while state.step < schedule.generator_steps:
                    epoch = state.step // schedule.iterations
                    self._set_schedule(epoch)
                    self._iterate(tap, epoch)
                    self.progress.advance(epoch=f"{epoch + 1}/{schedule.epochs}")
                    if state.step % schedule.iterations == 0:
                        self._finish_epoch(epoch)
                        state.seconds = time.monotonic() - started
                        self.save()
                    if stop:
                        state.seconds = time.monotonic() - started
                        self._stop(stop)
        finally:
            self.progress.stop()
        return Result(self.student, self.generator, self.summary, state.history, state.evaluations, time.monotonic() - started)

    def _stop(self, stop: StopRequest) -> None:
        assert stop.signal is not None
        if self.run_dir is None:
            raise Interrupted("stopped; nothing was saved because there is no run directory (--out).", stop.signal)
        if self.state.step % self.recipe.schedule.iterations:  # at an epoch's end it has just been saved
            self.save()
        raise Interrupted(f"stopped at step {self.state.step} and saved; go on with: zsq-fast resume {self.run_dir.path}", stop.signal)

    # ---- state ------------------------------------------------------------------------------------------------------

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"generator_optimizer": self.generator_optimizer, **{f"student_optimizer{i}": o for i, o in enumerate(self.student_optimizers)}}

    def save(self) -> None:
        """Write a checkpoint of the whole state into the run directory, if there is one."""
        if self.run_dir is None:
            return
        groups: dict[str, dict[str, Tensor]] = {
            "student": dict(self.student.state_dict()),
            "generator": dict(self.generator.state_dict()),
            "meters": self.meters.state_dict(),
        }
        for name, optimizer in self._optimizers().items():
            saved = optimizer.state_dict()["state"]
            groups[name] = {f"{i}.{key}": torch.as_tensor(value) for i, entry in saved.items() for key, value in entry.items() if value is not None}
        state = {"seconds": self.state.seconds, "evaluations": self.state.evaluations, "history": self.state.history}
        self.run_dir.save_checkpoint(self.state.step, groups, state)

    def restore(self) -> int:
        """Load the newest sound checkpoint of the run directory, if there is one; returns the step to go on from."""
        loaded = self.run_dir.load_checkpoint() if self.run_dir else None
        if loaded is None:
            return 0
        step, groups, state = loaded
        self.student.load_state_dict(groups["student"])
        self.generator.load_state_dict(groups["generator"])
        self.meters.load_state_dict(groups["meters"])
        for name, optimizer in self._optimizers().items():
            _restore_optimizer(optimizer, groups[name])
        self.state = _State(step, state["seconds"], state["evaluations"], state["history"])
        return step


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill the per-parameter state, in each parameter's own memory layout; step counters stay where the optimizer keeps them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        p = params[int(index)]
        own = torch.empty_like(p) if value.shape == p.shape and name != "step" else torch.empty_like(value)
        optimizer.state[p][name] = own.copy_(value)

