"""Bits per layer: sensitivity by KL divergence and a Pareto frontier (ZeroQ, CVPR 2020, sections 3.2 and 3.3; its authors released
neither, so this follows the paper's idea)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zsq_fast.errors import UsageError
from zsq_fast.methods.images import count_classes, synthesize_images
from zsq_fast.methods.recipe import Images, Recipe
from zsq_fast.methods.synthesis import derive_seed
from zsq_fast.nn import Site, convert, summarize
from zsq_fast.ops import fake_quant_weight

BITS = (2, 3, 4, 5, 6, 8)
RESOLUTION = 2**16  # sizes told apart by default between nothing and everything at its widest
# What a run judges by: one small batch that matches the batch-norm statistics alone, as ZeroQ's images do, after few steps. The
# recipe's own images would do as well, but they come later, and a generator's only with the student's warm-up.
PROBES = Images(count=32, batch_size=32, iterations=100)


def weight_sites(model: nn.Module, input_size: Sequence[int]) -> dict[str, Site]:
    """The layers whose weights `convert` quantizes, by module name."""
    sites = summarize(convert(model, input_size=input_size)).sites
    return {site.name: site for site in sites if site.kind in ("conv", "linear") and site.bits is not None}


def layer_sizes(sites: Mapping[str, Site], bits: Sequence[int] = BITS) -> dict[str, dict[int, int]]:
    """Packed bytes of every layer's weight at every width: codes, and a scale and zero point per row."""
    return {name: {b: site.packed_bytes(b) for b in bits} for name, site in sites.items()}


@torch.no_grad()
def sensitivity(
    teacher: nn.Module,
    images: Tensor,
    bits: Sequence[int] = BITS,
    *,
    input_size: Sequence[int],
    batch_size: int = 64,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, dict[int, float]]:
    """How much the network's answer changes when the weight of one layer alone is quantized: `mean KL(teacher || changed)`.

    Nats per image, at temperature 1, everything else float (ZeroQ section 3.2). Costs one forward pass over the images for every
    layer and width, and one more; the host waits once, at the end.

    Args:
        teacher: float network; a copy of it is run in eval mode, it is not changed.
        images: `[N, C, H, W]` in the network's input space; synthetic ones will do.
        bits: widths to try, each 2 to 8.
        input_size: `(C, H, W)`, to find the layers that `convert` quantizes.
        batch_size: images per forward pass.
        layout: memory format in which the network runs.

    Returns:
        `{layer: {bits: divergence}}`.

    Raises:
        UsageError: no images, or bits out of range. UnsupportedModelError: see `convert`.
    """
    if not len(images) or not bits:
        raise UsageError("sensitivity needs at least one image and one bit width")
    sites = weight_sites(teacher, input_size)
    network = copy.deepcopy(teacher).eval().to(memory_format=layout)
    device = next(network.parameters()).device
    batches = [part.to(device).contiguous(memory_format=layout) for part in images.split(batch_size)]

    def log_probabilities() -> list[Tensor]:
        return [network(batch).double().log_softmax(1) for batch in batches]

    whole, found = log_probabilities(), []
    for name in sites:
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        kept = weight.clone()
        for b in bits:
            weight.copy_(fake_quant_weight(kept, b))
            pairs = zip(whole, log_probabilities(), strict=True)
            found.append(torch.stack([(p.exp() * (p - q)).sum() for p, q in pairs]).sum())
        weight.copy_(kept)
    table = (torch.stack(found) / len(images)).view(len(sites), len(bits)).tolist()
    return {name: dict(zip(bits, row, strict=True)) for name, row in zip(sites, table, strict=True)}


@dataclass(frozen=True)
class Frontier:
    """The assignments that no other beats in size and sensitivity, smallest first.

    Attributes:
        layers: names, L of them.
        sizes: `[P]` int64, bytes, ascending.
        sensitivities: `[P]` float64, sums over the layers, descending.
        bits: `[P, L]` int8.
    """

    layers: tuple[str, ...]
    sizes: Tensor
    sensitivities: Tensor
    bits: Tensor


def pareto(
    sizes: Mapping[str, Mapping[int, int]],
    sensitivities: Mapping[str, Mapping[int, float]],
    resolution: int | None = None,
) -> Frontier:
    """Pareto frontier of total bytes and summed sensitivity over all assignments of bits to layers.

    Layers count as independent (ZeroQ section 3.3), so it is built layer by layer: all pairs of a point so far and a width of
    the next layer, less those that another one beats.

    Args:
        sizes, sensitivities: `{layer: {bits: value}}`, of the same layers and widths.
        resolution: bytes. After each layer, of the points that share a multiple of it only the least sensitive one stays, and
            the smallest of all. For every assignment the frontier then holds one that is no more sensitive and at most
            `resolution` bytes per layer larger; 1 is exact. Sizes are true in any case. None: a 65,536th of the largest size.

    Raises:
        UsageError: no layers, layers or widths that differ, or a sensitivity that is not finite.
    """
    if not sizes or sizes.keys() != sensitivities.keys():
        raise UsageError("pareto needs sizes and sensitivities of the same layers, at least one")
    if resolution is None:
        resolution = max(1, sum(max(of.values()) for of in sizes.values()) // RESOLUTION)
    if resolution < 1:
        raise UsageError(f"pareto: resolution is a number of bytes from 1, got {resolution}")
    size, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    bits = torch.empty(1, 0, dtype=torch.int8)
    for name, of in sizes.items():
        if not of or of.keys() != sensitivities[name].keys():
            raise UsageError(f"pareto needs sizes and sensitivities of the same bits, at least one; '{name}' differs")
        widths = torch.tensor(list(of), dtype=torch.int8)
        losses = torch.tensor([sensitivities[name][b] for b in of], dtype=torch.float64)
        if not bool(losses.isfinite().all()):
            raise UsageError(f"pareto: a sensitivity of '{name}' is not finite")
        all_sizes = (size[:, None] + torch.tensor(list(of.values()))).flatten()
        all_losses = (loss[:, None] + losses).flatten()
        order = all_losses.argsort(stable=True)
        order = order[all_sizes[order].argsort(stable=True)]  # by size, then by loss
        least = all_losses[order].cummin(0).values
        order = order[torch.cat([least.new_ones(1, dtype=torch.bool), least[1:] < least[:-1]])]
        place = all_sizes[order] // resolution
        last = torch.cat([place[1:] != place[:-1], place.new_ones(1, dtype=torch.bool)])
        last[0] = True
        order = order[last]
        size, loss = all_sizes[order], all_losses[order]
        bits = torch.cat([bits[order // len(of)], widths[order % len(of), None]], 1)
    return Frontier(tuple(sizes), size, loss, bits)


def allocate(frontier: Frontier, budget_bytes: int) -> dict[str, int]:
    """Bits by layer of the least sensitive assignment of at most `budget_bytes`.

    Raises UsageError when even the smallest is larger.
    """
    at = int((frontier.sizes <= budget_bytes).sum()) - 1
    if at < 0:
        raise UsageError(f"the budget of {budget_bytes} bytes is below the {int(frontier.sizes[0])} of the fewest bits")
    return dict(zip(frontier.layers, frontier.bits[at].tolist(), strict=True))


def bits_are_open(recipe: Recipe) -> bool:
    """Whether the bits of every layer are left to a search before the run."""
    return bool(recipe.quant.average_weight_bits) and not recipe.quant.layer_bits


def even_bits(recipe: Recipe, teacher: nn.Module, input_size: Sequence[int]) -> Recipe:
    """The recipe with bits as even as whole numbers can be, where `settle_bits` would look for them: costs the same, at once."""
    if not bits_are_open(recipe):
        return recipe
    texts = tuple(f"{name}={int(recipe.quant.average_weight_bits)}" for name in weight_sites(teacher, input_size))
    return replace(recipe, quant=replace(recipe.quant, layer_bits=texts))


def settle_bits(
    recipe: Recipe,
    teacher: nn.Module,
    input_size: Sequence[int],
    seed: int,
    layout: torch.memory_format = torch.contiguous_format,
) -> Recipe:
    """The recipe with the bits of every layer written out, if it leaves them to `quant.average_weight_bits`.

    The budget is what the weights would take at that many bits throughout, fractions included.

    Raises: see `synthesize_images` and `sensitivity`.
    """
    if not bits_are_open(recipe):
        return recipe
    sites = weight_sites(teacher, input_size)
    classes = count_classes(teacher, input_size)
    made = synthesize_images(teacher, PROBES, input_size, classes, derive_seed(seed, "sensitivity"), layout=layout)
    found = sensitivity(teacher, made.images, input_size=input_size, layout=layout)
    budget = sum(site.packed_bytes(recipe.quant.average_weight_bits) for site in sites.values())
    bits = allocate(pareto(layer_sizes(sites), found), budget)
    texts = tuple(f"{name}={b}" for name, b in bits.items())
    return replace(recipe, quant=replace(recipe.quant, layer_bits=texts))
