"""AutoReCon's decoder: a template whose operations a genotype names, the published genotypes, and the super-net to search it.

Source: Zhu et al., IJCAI 2021, as used by AIT (ait_family.md section 6).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.errors import UsageError, nearest
from zsq_fast.methods.blocks import ConditionalBatchNorm2d, to_maps

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHANNELS = 64
SEARCH = "search"  # as generator.genotype: find one for the teacher first
NONE, SKIP, NO_UP = "-", "skip", "Z"
UPS = {"N": "nearest", "B": "bilinear"}
OPERATIONS = (NONE, SKIP, "c1", "c3", "c5", "d3", "d5")  # cK: convolution K x K; dK: the same, dilated by 2
CROSS = (NO_UP, *UPS)

Genotype = dict[str, list[str]]

# Order: cells 0, 1, 2; ups: nodes 0 and 1; ops: 0->2, 1->2, 0->3, 1->3, 2->3; cross (cells 1, 2): the previous cell's nodes 0, 1, 2
# into node 2, then into node 3. ait_family.md 6.2.
PUBLISHED: dict[str, Genotype] = {
    "cifar10_resnet20": {
        "ups": ["NN", "NN", "BN"],
        "ops": ["d5 - d5 d3 c5", "d5 d5 c3 d3 d5", "d5 d5 c1 c5 d3"],
        "cross": ["ZZBZZN", "NNNBBB"],
    },
    "cifar100_resnet20": {
        "ups": ["BN", "NN", "NN"],
        "ops": ["d5 d5 d5 - c5", "d5 c5 c1 d3 d5", "d5 d3 c5 c5 d5"],
        "cross": ["ZBNZZN", "ZBNNBB"],
    },
    "resnet18": {
        "ups": ["BB", "BB", "BB"],
        "ops": ["d5 d5 d5 d5 d5", "d5 d5 d5 d5 d3", "d5 d5 c5 d3 d3"],
        "cross": ["NBNBBN", "BBNNBN"],
    },
    "resnet50": {
        "ups": ["BB", "BB", "BB"],
        "ops": ["d5 d5 d5 d5 d5", "d5 d5 c3 c1 c1", "d3 d5 d5 c5 d3"],
        "cross": ["BBBNNB", "NNNNBB"],
    },
    "mobilenetv2": {
        "ups": ["BB", "BB", "NB"],
        "ops": ["d5 d5 c5 d5 d5", "c5 d5 c1 c1 c1", "c3 d5 c5 d5 d3"],
        "cross": ["BBNBBB", "BNBBBN"],
    },
}


def check_source(source: str) -> None:
    """Raises UsageError unless `source` is a published name, 'search', or looks like JSON text or the name of a file (not read)."""
    if source not in (*PUBLISHED, SEARCH) and not source.startswith("{") and not source.endswith((".toml", ".json")):
        raise _unknown(source)


def _unknown(source: str) -> UsageError:
    near = nearest(source, PUBLISHED)
    return UsageError(f"unknown genotype '{source}'.{near} Or give a .toml or .json file, or '{SEARCH}'.")


def read_genotype(source: str | Mapping[str, Sequence[str]]) -> Genotype:
    """A checked genotype from a published name, a .toml or .json file, JSON text, or a mapping.

    Raises:
        UsageError: unknown name, unreadable file, or not a genotype.
    """
    table: object = source
    if isinstance(source, str):
        if source in PUBLISHED:
            table = PUBLISHED[source]
        elif source.startswith("{") or source.endswith((".toml", ".json")):
            try:
                text = source if source.startswith("{") else Path(source).read_text(encoding="utf-8")
                table = tomllib.loads(text) if source.endswith(".toml") else json.loads(text)
            except OSError as error:
                raise UsageError(f"the genotype file '{source}' cannot be read: {error.strerror}") from error
            except (ValueError, RecursionError) as error:  # of both parsers, and of bytes that are no text
                raise UsageError(f"the genotype '{source}' is neither valid JSON nor TOML: {error}") from error
        else:
            raise _unknown(source)
    if not isinstance(table, Mapping) or set(table) != {"ups", "ops", "cross"}:
        raise UsageError(f"a genotype is a table of ups, ops and cross, got {table!r}")
    for key, cells, edges, known in (("ups", 3, 2, tuple(UPS)), ("ops", 3, 5, OPERATIONS), ("cross", 2, 6, CROSS)):
        value = table[key]
        ok = isinstance(value, (list, tuple)) and len(value) == cells and all(isinstance(v, str) for v in value)
        letters = [v.split() if key == "ops" else list(v) for v in value] if ok else []
        if not ok or any(len(v) != edges or not set(v) <= set(known) for v in letters):
            raise UsageError(f"genotype.{key} must be {cells} texts of {edges} of {', '.join(known)}, got {value!r}")
    genotype = {key: list(table[key]) for key in ("ups", "ops", "cross")}
    for ops in genotype["ops"]:
        if not _connected(ops.split()):
            raise UsageError(f"no path leads from a cell's input to its output in genotype.ops '{ops}'")
    return genotype


def _connected(ops: Sequence[str]) -> bool:
    to2, to3 = (any(o != NONE for o in ops[i : i + 2]) for i in (0, 2))
    return to3 or (to2 and ops[4] != NONE)


def _cells(genotype: Genotype) -> list[list[tuple[str, ...]]]:
    """The candidates of every edge, cell by cell: one each."""
    rows = zip(genotype["ups"], genotype["ops"], ["", *genotype["cross"]])
    return [[(name,) for name in (*ups, *ops.split(), *cross)] for ups, ops, cross in rows]


class Branch(nn.Module):
    """Pre-activation: [up ->] conditional norm -> LeakyReLU -> convolution."""

    def __init__(self, name: str, num_classes: int, eps: float):
        super().__init__()
        self.up = UPS.get(name)
        kernel, dilation = (1, 1) if self.up else (int(name[1]), 2 if name[0] == "d" else 1)
        self.norm = ConditionalBatchNorm2d(num_classes, CHANNELS, eps)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=dilation * (kernel // 2), dilation=dilation)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.up == "bilinear":
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = self.conv(F.leaky_relu(self.norm(x, labels), 0.2))
        # Repeating pixels changes neither batch statistics nor anything pointwise: last, it costs a quarter and is the same.
        return F.interpolate(x, scale_factor=2.0) if self.up == "nearest" else x


class Edge(nn.Module):
    """One choice of the template: the candidate number `chosen`, times `gate` during a search."""

    def __init__(self, candidates: Sequence[str], num_classes: int, eps: float):
        super().__init__()
        self.candidates, self.chosen = tuple(candidates), 0
        self.gate: Tensor | None = None
        self.branches = nn.ModuleDict(
            {name: Branch(name, num_classes, eps) for name in candidates if name not in (NONE, SKIP, NO_UP)}
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor | None:
        """None for "nothing", which the published code computes and multiplies by zero."""
        name = self.candidates[self.chosen]
        if name in (NONE, NO_UP):
            return None
        y: Tensor = x if name == SKIP else self.branches[name](x, labels)
        return y if self.gate is None else y * self.gate


class Cell(nn.Module):
    """Doubles the resolution; the edges in the order of a genotype."""

    def __init__(self, edges: Sequence[Sequence[str]], num_classes: int, eps: float):
        super().__init__()
        self.edges = nn.ModuleList(Edge(candidates, num_classes, eps) for candidates in edges)

    def forward(self, x: Tensor, before: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x `[B, 64, h, w]`, nodes 0 to 2 of the previous cell (none for the first) -> nodes 0 to 3 `[B, 64, 2h, 2w]`."""
        up0, up1, op0, op1, op2, op3, op4, *cross = self.edges
        crossed = [edge(before[i % 3], labels) for i, edge in enumerate(cross)]
        n0, n1 = up0(x, labels), up1(x, labels)
        n2 = _total(n0, op0(n0, labels), op1(n1, labels), *crossed[:3])
        n3 = _total(n0, op2(n0, labels), op3(n1, labels), op4(n2, labels), *crossed[3:])
        return n0, n1, n2, n3


def _total(like: Tensor, *terms: Tensor | None) -> Tensor:
    there = [t for t in terms if t is not None]
    return functools.reduce(torch.add, there) if there else torch.zeros_like(like)


class AutoRecon(nn.Module):
    """AutoReCon's decoder (ait_family.md 6.1). The noise enters through three linears, one per cell; labels through the norms.

    Args:
        genotype: of `read_genotype`, or the candidates of every edge (`SuperNet`).
        input_size: `(C, H, W)` of the images; H and W must be multiples of 8.
        latent: length of the noise vector, split into three parts.
        eps: of every conditional norm.
    """

    def __init__(
        self,
        genotype: Genotype | list[list[tuple[str, ...]]],
        num_classes: int,
        input_size: Sequence[int],
        latent: int,
        eps: float,
    ):
        super().__init__()
        channels, height, width = input_size
        if height % 8 or width % 8:
            raise UsageError(f"this generator needs image sizes that are multiples of 8, got {height} x {width}")
        self.latent = latent
        self.parts = [latent // 3, latent // 3, latent - 2 * (latent // 3)]
        self.bases = [(height // 8 * 2**i, width // 8 * 2**i) for i in range(3)]
        self.fc = nn.ModuleList(nn.Linear(p, CHANNELS * h * w) for p, (h, w) in zip(self.parts, self.bases))
        cells = _cells(genotype) if isinstance(genotype, dict) else genotype
        # The published code gives every cell's norms 1,000 classes; rows that no label reads are never trained.
        self.cells = nn.ModuleList(Cell(edges, num_classes, eps) for edges in cells)
        self.norm = ConditionalBatchNorm2d(num_classes, CHANNELS, eps)
        self.conv = nn.Conv2d(CHANNELS, channels, 3, padding=1)
        self.norm_out = nn.BatchNorm2d(channels, affine=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise `[B, latent]`, labels `[B]` int64 -> images `[B, C, H, W]`."""
        x, nodes = None, ()
        for part, fc, base, cell in zip(noise.split(self.parts, 1), self.fc, self.bases, self.cells):
            h = to_maps(fc(part), CHANNELS, base, self.conv)
            *nodes, x = cell(h if x is None else x + h, nodes, labels)
        return self.norm_out(torch.tanh(self.conv(F.leaky_relu(self.norm(x, labels), 0.2))))


class SuperNet(AutoRecon):
    """Every candidate of every edge, one of each drawn per step. `logits` are the architecture's parameters, one vector per edge.

    They stay on the CPU, where the choice is made, and out of `parameters()`, which train at another rate.
    """

    def __init__(self, num_classes: int, input_size: Sequence[int], latent: int, eps: float):
        space = [[tuple(UPS)] * 2 + [OPERATIONS] * 5 + [CROSS] * (6 if cell else 0) for cell in range(3)]
        super().__init__(space, num_classes, input_size, latent, eps)
        self.edges = [m for m in self.modules() if isinstance(m, Edge)]  # in the order of a genotype, cell by cell
        self.logits = [torch.zeros(len(edge.candidates), device="cpu", requires_grad=True) for edge in self.edges]

    def choose(self, seed: int, temperature: float) -> None:
        """Draw one candidate per edge by the Gumbel-max trick.

        Each is used with a gate of value 1 whose gradient is that of its share in the Gumbel softmax, so a step costs what the
        final generator costs and still tells every logit of the edge (Dong and Yang, CVPR 2019, section 3.2).
        """
        draw = torch.Generator().manual_seed(seed)
        gates = []
        for edge, logits in zip(self.edges, self.logits):
            gumbel = -torch.empty_like(logits, requires_grad=False).exponential_(generator=draw).log()
            shares = ((logits + gumbel) / temperature).softmax(0)
            edge.chosen = int(shares.argmax())
            share = shares[edge.chosen]
            gates.append(1 + (share - share.detach()))
        for edge, gate in zip(self.edges, torch.stack(gates).to(self.conv.weight.device).unbind()):
            edge.gate = gate

    def genotype(self) -> Genotype:
        """The likeliest candidate of every edge.

        "Nothing" counts only with more than half of the probability: it has no gradient when drawn, so its logit says little by
        itself (DARTS leaves it out for that reason). Where a cell's output would get no input, its best operation on node 0 stays.
        """
        order = []
        for edge, logits in zip(self.edges, self.logits):
            share = logits.detach().softmax(0)
            if edge.candidates[0] in (NONE, NO_UP) and share[0] <= 0.5:
                share[0] = 0
            order.append([edge.candidates[i] for i in share.argsort(descending=True, stable=True)])
        found: Genotype = {"ups": [], "ops": [], "cross": []}
        for start, stop in ((0, 7), (7, 20), (20, 33)):
            best = [names[0] for names in order[start:stop]]
            if not _connected(best[2:7]):
                best[4] = next(name for name in order[start + 4] if name != NONE)
            found["ups"].append("".join(best[:2]))
            found["ops"].append(" ".join(best[2:7]))
            found["cross"] += ["".join(best[7:])] if best[7:] else []
        return read_genotype(found)
