"""The differentiable search of a generator for a teacher (AutoReCon).

The paper's search is not public beyond its results (ait_family.md section 6), so its details are chosen here:
- One-shot and single-level: weights (Adam, as in `[generator]`) and architecture logits (Adam, search_lr) step on the same loss L_G.
  DARTS separates the two by a split of the data; here every batch is new noise, so there is nothing to overfit.
- One candidate per edge and step, by Gumbel-max with a straight-through gate (`SuperNet.choose`): the memory of one generator, where
  a softmax mixture of all candidates at 224 x 224 would need seven.
- The softmax temperature falls linearly to a tenth; learning rates stay constant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from zsq_fast.errors import TrainingError
from zsq_fast.methods.autorecon import PUBLISHED, SEARCH, Genotype, SuperNet, read_genotype
from zsq_fast.methods.recipe import Recipe
from zsq_fast.methods.synthesis import Batch, Synthesis, derive_seed
from zsq_fast.runs import Progress


class Search:
    """The super-net of a teacher and what trains it. Arguments: see `search_generator`."""

    def __init__(
        self, teacher: nn.Module, recipe: Recipe, input_size: Sequence[int], seed: int, layout: torch.memory_format
    ):
        spec = recipe.generator
        self.spec = spec = replace(spec, kind="autorecon", genotype=SEARCH, latent=spec.latent or 100)
        recipe = replace(recipe, generator=spec, schedule=replace(recipe.schedule, milestones=()))
        self.seed = seed
        self.synthesis = Synthesis(teacher, recipe, input_size, derive_seed(seed, "search"), layout)
        net = self.synthesis.generator
        assert isinstance(net, SuperNet)
        self.net = net
        self.optimizer = torch.optim.Adam(net.logits, lr=spec.search_lr, betas=spec.betas)

    def step(self, step: int) -> Batch:
        """Step number `step` of weights and logits."""
        temperature = self.spec.search_temperature * (1 - 0.9 * step / self.spec.search_steps)
        self.net.choose(derive_seed(self.seed, "search-choice", step), temperature)
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.synthesis.step(step)
        self.optimizer.step()
        return batch


def search_generator(
    teacher: nn.Module,
    recipe: Recipe,
    input_size: Sequence[int],
    seed: int,
    *,
    layout: torch.memory_format = torch.contiguous_format,
    losses: list[Tensor] | None = None,
    progress: Progress | None = None,
) -> Genotype:
    """Find a genotype for a teacher in `recipe.generator.search_steps` steps.

    Args:
        recipe: batch size, latent (100 for 0), losses and rates are read from it; of any generator kind.
        input_size: `(C, H, W)`; H and W must be multiples of 8.
        losses: receives L_G of every step, scalars on the teacher's device.
        progress: shows the steps.

    Returns:
        A mapping of texts that JSON and TOML can hold; `generator.genotype` takes a file of it.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    search = Search(teacher, recipe, input_size, seed, layout)
    spec, progress = search.spec, progress or Progress(quiet=True)
    progress.start(spec.search_steps, "search for a generator")
    try:
        for step in range(spec.search_steps):
            batch = search.step(step)
            if losses is not None and batch.generator_ce is not None and batch.generator_bns is not None:
                losses.append(spec.ce_weight * batch.generator_ce + spec.bns_weight * batch.generator_bns)
            progress.advance()
    finally:
        progress.stop()
    if not all(bool(v.isfinite().all()) for v in search.net.logits):
        raise TrainingError("the search for a generator diverged: try a lower generator.lr or generator.search_lr.")
    return search.net.genotype()


def settle_genotype(
    recipe: Recipe,
    teacher: nn.Module,
    input_size: Sequence[int],
    seed: int,
    layout: torch.memory_format,
    progress: Progress | None = None,
) -> Recipe:
    """The recipe with a genotype that was to be searched or read from a file written out, so that it stands for itself."""
    spec = recipe.generator
    if spec.kind != "autorecon" or spec.genotype in PUBLISHED:
        return recipe
    if spec.genotype == SEARCH:
        found = search_generator(teacher, recipe, input_size, seed, layout=layout, progress=progress)
    else:
        found = read_genotype(spec.genotype)
    return replace(recipe, generator=replace(spec, genotype=json.dumps(found)))
