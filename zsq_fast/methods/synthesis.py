"""Images on the fly: a generator trained on the teacher's batch-norm statistics, one step per batch (GDFQ)."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.errors import UnsupportedModelError
from zsq_fast.methods.generators import build_generator
from zsq_fast.methods.recipe import Recipe
from zsq_fast.nn import BNStatsTap

if TYPE_CHECKING:
    from zsq_fast.methods.held_out import HeldOut


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose and step: draws depend on nothing that came before, so a resumed run needs no replay."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Draw(NamedTuple):
    """What a generator is given: noise `[B, latent]` and labels `[B]`; superposed (Qimera) `[B, K, latent]`, `[B, K]`, weights `[B, K]`."""

    noise: Tensor
    labels: Tensor
    mix: Tensor | None = None

    def targets(self, num_classes: int) -> Tensor:
        """Labels `[B]`, or for superposed images soft ones `[B, num_classes]`: the weights, added up where a class occurs twice."""
        if self.mix is None:
            return self.labels
        rows = torch.arange(len(self.labels), device=self.labels.device)[:, None].expand_as(self.labels)
        soft = self.mix.new_zeros(len(self.labels), num_classes)
        # Not scatter_add_: on a GPU the order of its additions changes from call to call.
        return soft.index_put_((rows, self.labels), self.mix, accumulate=True)


def label_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits `[B, classes]` with labels `[B]` int64, or with soft ones `[B, classes]`: `-t . log_softmax`."""
    return F.cross_entropy(logits, labels)


class Batch(NamedTuple):
    """What one iteration hands to the students, detached: images `[B, C, H, W]` and labels; from the generator also the teacher's
    logits `[B, classes]` and the generator's losses.

    The labels are `[B]` int64, or for superposed images (Qimera) soft, `[B, classes]`; `label_ce` takes both.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    generator_ce: Tensor | None = None
    generator_bns: Tensor | None = None


class Synthesis:
    """The frozen teacher, the generator and its optimizer. It never looks at a student, so several may share it.

    Context manager: inside, the teacher's batch norms are tapped.
    """

    def __init__(
        self, teacher: nn.Module, recipe: Recipe, input_size: Sequence[int], seed: int, layout: torch.memory_format
    ):
        self.recipe, self.seed, self.source, self.layout = recipe, seed, teacher, layout
        self.device = next(teacher.parameters()).device
        # A frozen copy saves a third of the teacher's backward pass and keeps the user's network out of our graphs.
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False).to(memory_format=layout)
        with torch.no_grad():
            probe = self.teacher(torch.zeros(1, *input_size, device=self.device))
        if not isinstance(probe, Tensor) or probe.dim() != 2:
            found = tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
            raise UnsupportedModelError(f"the model must return class logits [N, classes], got {found}")
        self.num_classes = probe.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "generator-init"))  # the CPU's alone
            self.generator = build_generator(recipe.generator, self.num_classes, input_size, self.teacher)
        self.generator.to(self.device).to(memory_format=layout).train()
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=recipe.generator.lr, betas=recipe.generator.betas
        )
        self.tap = BNStatsTap(self.teacher)
        self.seconds = 0.0
        self.held_out: HeldOut | None = None  # there from the end of the warm-up on, if a recipe wants it

    def sample(self, *which: object) -> Draw:
        """Noise and labels of one iteration (a step) or of another named batch, a function of (seed, which) alone."""
        spec, batch = self.recipe.generator, self.recipe.schedule.batch_size
        rng = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "images", *which))
        # Whether a batch is superposed is drawn on the host, from 63 random bits of its own.
        superposed = (
            spec.kind == "qimera" and derive_seed(self.seed, "superpose", *which) < spec.superpose_probability * 2**63
        )
        shape = (batch, spec.superposed_classes) if superposed else (batch,)
        noise = torch.randn(*shape, self.generator.latent, device=self.device, generator=rng)
        labels = torch.randint(self.num_classes, shape, device=self.device, generator=rng)
        mix = torch.randn(shape, device=self.device, generator=rng).softmax(1) if superposed else None
        return Draw(noise, labels, mix)

    def _generate(self, draw: Draw, generator: nn.Module) -> Tensor:
        images: Tensor = generator(*(part for part in draw if part is not None))
        return images

    def images(self, *which: object, generator: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels (`Batch`) of an iteration or another named batch (`sample`) from the generator as it is now, without
        training it; for many batches give one copy of it."""
        draw = self.sample(*which)
        with torch.no_grad():  # from a copy: in train mode its running statistics would move
            return self._generate(draw, generator or copy.deepcopy(self.generator)), draw.targets(self.num_classes)

    def step(self, step: int) -> Batch:
        """One generator step; the images and logits are those from before it."""
        started = time.perf_counter()
        spec = self.recipe.generator
        for group in self.optimizer.param_groups:
            group["lr"] = spec.lr * self.recipe.schedule.factor(step // self.recipe.schedule.iterations)
        draw = self.sample(step)
        labels = draw.targets(self.num_classes)
        images = self._generate(draw, self.generator)
        with self.tap:
            logits = self.teacher(images)
            ce, bns = label_ce(logits, labels), self.tap.loss()
        self.optimizer.zero_grad(set_to_none=True)
        (spec.ce_weight * ce + spec.bns_weight * bns).backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - started
        return Batch(images.detach(), labels, logits.detach(), ce.detach(), bns.detach())
