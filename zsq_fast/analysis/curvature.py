"""Curvature of the losses at a student: trace, top eigenvalues and eigenvalue density of the Hessian for its parameters.

The Hessian is never formed; everything comes from products with vectors, which automatic differentiation gives exactly
(`zsq_fast.analysis.losses`). Sources: Hutchinson's trace estimator, Lanczos and stochastic Lanczos quadrature as in Ubaru, Chen and
Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (SIMAX 2017), Ghorbani, Krishnan and Xiao, "An investigation
into neural net optimization via Hessian eigenvalue density" (ICML 2019), and Yao et al., "PyHessian" (IEEE Big Data 2020);
hast_family.md 7.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zsq_fast.analysis.losses import TITLES, BatchLosses, frozen_copy, mean_losses
from zsq_fast.analysis.losses import of_subject as losses_of
from zsq_fast.analysis.subject import Subject
from zsq_fast.errors import TrainingError, UsageError, nearest
from zsq_fast.methods.synthesis import derive_seed

COLOURS = {"ce": "#c4371f", "kl": "#0072b2", "fa": "#2a8c4a"}
WIDTH, POINTS = 0.003, 1000  # of the density's bells and curve
FLOOR = 1e-7  # lowest density drawn, as PyHessian's plots have it


class Operator:
    """A symmetric matrix `[size, size]` known by its products with vectors `[size]`."""

    def __init__(self, product: Callable[[Tensor], Tensor], size: int, like: Tensor):
        self._product, self.size, self.like = product, size, like

    def __call__(self, v: Tensor) -> Tensor:
        return self._product(v)

    def signs(self, seed: int, number: int) -> Tensor:
        """Random signs (Rademacher) `[size]`, the same on every device."""
        rng = torch.Generator().manual_seed(derive_seed(seed, "curvature", number))
        return torch.randint(0, 2, (self.size,), generator=rng).mul_(2).sub_(1).to(self.like)


class Hessian(Operator):
    """Of one loss over all images of the batches, for parameters of a student (a copy of it is used).

    A single batch keeps the graph of its gradient, and a product costs one pass through it, about two backward passes; several batches
    build theirs anew for every product, which adds a forward and a backward pass but needs the memory of one batch only.

    Attributes:
        names: of the parameters that make up the vector, in its order.

    Args:
        name: of the loss.
        parameters: names of parameters; None takes all, affine parts of batch norms and biases included, as PyHessian does.

    Raises:
        UsageError: no batch, or an unknown loss or parameter.
    """

    def __init__(
        self, student: nn.Module, batches: Sequence[BatchLosses], name: str, parameters: Sequence[str] | None = None
    ):
        if not batches:
            raise UsageError("a Hessian needs a batch at least")
        network = frozen_copy(student)
        known = dict(network.named_parameters())
        for parameter in parameters or ():
            if parameter not in known:
                raise UsageError(f"the student has no parameter '{parameter}'.{nearest(parameter, known)}")
        self.names = tuple(known if parameters is None else parameters)
        self._network, self._parameters = network, [known[n] for n in self.names]
        count = sum(map(len, batches))
        self._losses = [(batch.loss(name), len(batch) / count) for batch in batches]
        self._kept: list[Tensor | None] | None = None
        super().__init__(self._times, sum(p.numel() for p in self._parameters), self._parameters[0].detach())

    def _gradient(self, loss: Callable[[nn.Module], Tensor]) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss(self._network), self._parameters, create_graph=True, allow_unused=True))

    def _times(self, v: Tensor) -> Tensor:
        vectors = self.split(v).values()
        total = torch.zeros_like(v)
        for loss, share in self._losses:
            gradient = self._kept if self._kept is not None else self._gradient(loss)
            if len(self._losses) == 1:
                self._kept = gradient
            # A gradient without history is constant: nothing of it is left to differentiate.
            pairs = [(g, u) for g, u in zip(gradient, vectors, strict=True) if g is not None and g.requires_grad]
            if pairs:
                first, second = zip(*pairs, strict=True)
                keep = self._kept is not None
                found = torch.autograd.grad(first, self._parameters, second, retain_graph=keep, allow_unused=True)
                parts = zip(found, self._parameters, strict=True)
                total += share * torch.cat([(torch.zeros_like(p) if h is None else h).flatten() for h, p in parts])
        return total

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """A vector `[size]` by parameter, each part in its parameter's shape."""
        parts = v.split([p.numel() for p in self._parameters])
        return {n: part.view(p.shape) for n, part, p in zip(self.names, parts, self._parameters, strict=True)}


@dataclass(frozen=True)
class Trace:
    """Hutchinson's estimate: the mean of `v' H v` over random signs v, its standard error, and the samples."""

    mean: float
    standard_error: float
    samples: list[float]


def trace(matrix: Operator, probes: int = 50, seed: int = 0) -> Trace:
    """`tr H = E[v' H v]`; one product per probe.

    The number of probes is fixed: stopping when the running mean settles, as PyHessian does, would not bound the error. For random
    signs the variance of a sample is `2 sum_{i != j} H_ij^2`.
    """
    if probes < 2:
        raise UsageError(f"a trace with a standard error needs two probes at least, got {probes}")
    samples = []
    for number in range(probes):
        v = matrix.signs(seed, number)
        samples.append(_dot(v, matrix(v)))
    mean = math.fsum(samples) / probes
    variance = math.fsum((s - mean) ** 2 for s in samples) / (probes - 1)
    return Trace(mean, math.sqrt(variance / probes), samples)


@dataclass(frozen=True)
class _Krylov:
    """Lanczos's tridiagonal matrix by its eigenvalues `values [m]`, eigenvectors `vectors [m, m]` and the norm `rest` of what the last
    step left over; `basis [m, size]`."""

    values: Tensor
    vectors: Tensor
    rest: float
    basis: Tensor

    @property
    def residuals(self) -> Tensor:
        """`|H y - theta y|` of each Ritz pair."""
        return self.rest * self.vectors[-1].abs()


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _lanczos(
    matrix: Operator, start: Tensor, steps: int, done: Callable[[_Krylov], bool] = lambda found: False
) -> _Krylov:
    """At most `steps` steps with full reorthogonalisation, twice each; the basis takes `steps * size` numbers."""
    steps = min(steps, matrix.size)
    basis = torch.empty(steps, matrix.size, dtype=start.dtype, device=start.device)
    tridiagonal = torch.zeros(steps, steps, dtype=torch.float64)
    vector = start / start.norm()
    for m in range(1, steps + 1):
        basis[m - 1] = vector
        vector = matrix(vector)
        tridiagonal[m - 1, m - 1] = _dot(basis[m - 1], vector)
        for _ in range(2):
            vector = vector - basis[:m].T @ (basis[:m] @ vector)
        rest = float(vector.norm())
        if not math.isfinite(rest):
            raise TrainingError(
                "the Hessian is not finite here: the student has diverged, or float32 is too narrow for it."
            )
        values, vectors = torch.linalg.eigh(tridiagonal[:m, :m])
        found = _Krylov(values, vectors, rest, basis[:m])
        # What is left is rounding: the space is invariant under the matrix.
        if m == steps or rest <= 10 * torch.finfo(start.dtype).eps * float(values.abs().max()) or done(found):
            break
        tridiagonal[m - 1, m] = tridiagonal[m, m - 1] = rest
        vector = vector / rest
    return found


@dataclass(frozen=True)
class TopEigenvalues:
    """The eigenvalues of largest magnitude, that one first, with their signs.

    Attributes:
        residuals: `|H y - lambda y|` for the unit vector y: an eigenvalue lies no farther from each value than this.
        products: how many it took.
    """

    values: list[float]
    residuals: list[float]
    products: int
    _coordinates: Tensor
    _basis: Tensor

    @property
    def vectors(self) -> Tensor:
        """The y, `[count, size]`; not part of `to_dict`."""
        return self._coordinates.T.to(self._basis) @ self._basis

    def to_dict(self) -> dict[str, Any]:
        return {"values": self.values, "residuals": self.residuals, "products": self.products}


def top_eigenvalues(
    matrix: Operator, count: int = 5, steps: int = 60, tolerance: float = 1e-3, seed: int = 0
) -> TopEigenvalues:
    """By Lanczos with full reorthogonalisation, until every residual is at most `tolerance` times its eigenvalue, or `steps`.

    It needs far fewer products than power iteration with deflation and tells how good each value is. An eigenvalue that occurs several
    times is found once. Memory: `steps` vectors.
    """
    _check_count(count, steps)

    def converged(found: _Krylov) -> bool:
        top = _top(found, count)
        bounds = zip(top.residuals, top.values, strict=True)
        return len(top.values) == count and all(r <= tolerance * abs(v) for r, v in bounds)

    return _top(_lanczos(matrix, matrix.signs(seed, 0), steps, converged), count)


def _check_count(count: int, steps: int) -> None:
    if not 1 <= count <= steps:
        raise UsageError(f"the number of eigenvalues must lie between 1 and steps ({steps}), got {count}")


def _top(found: _Krylov, count: int) -> TopEigenvalues:
    chosen = found.values.abs().argsort(descending=True)[:count]
    values, residuals = found.values[chosen].tolist(), found.residuals[chosen].tolist()
    return TopEigenvalues(values, residuals, len(found.values), found.vectors[:, chosen], found.basis)


@dataclass(frozen=True)
class Density:
    """Eigenvalues as a distribution of total mass 1.

    Attributes:
        nodes, weights: the quadrature's points and masses, of all runs together; the masses add up to 1. Without smoothing:
            `sum weights f(nodes)` estimates `tr f(H) / size`.
        sigma: standard deviation of the Gaussian that stands for each node.
        grid, density: the smoothed curve, per unit of eigenvalue.
    """

    nodes: list[float]
    weights: list[float]
    sigma: float
    grid: list[float]
    density: list[float]


def density(
    matrix: Operator, runs: int = 1, steps: int = 60, seed: int = 0, width: float = WIDTH, points: int = POINTS
) -> Density:
    """Stochastic Lanczos quadrature: `phi(t) = 1/runs sum_l sum_k tau_lk^2 g(t; theta_lk, sigma)`.

    theta are the eigenvalues of the tridiagonal matrix that Lanczos gives from random signs, tau the first components of its unit
    eigenvectors; `steps` steps have the first `2 steps - 1` moments right, in the mean over starts. Costs `runs * steps` products and the
    memory of `steps` vectors.

    Args:
        width: sigma over the distance between lowest and highest node (over its magnitude, where all nodes are one). The default is
            PyHessian's variance of 1e-5 for eigenvalues that span 1, made to follow the scale of the loss.
        points: of the curve, evenly spaced from 5 sigma below the lowest to 5 sigma above the highest node.
    """
    return _density(_runs(matrix, runs, steps, seed), width, points)


def _runs(matrix: Operator, runs: int, steps: int, seed: int) -> list[_Krylov]:
    if runs < 1 or steps < 1:
        raise UsageError(f"a density needs one run and one step at least, got {runs} and {steps}")
    return [_lanczos(matrix, matrix.signs(seed, number), steps) for number in range(runs)]


def _density(found: Sequence[_Krylov], width: float, points: int) -> Density:
    if points < 2 or not width > 0:
        raise UsageError(f"a density needs two points at least and a positive width, got {points} and {width}")
    nodes = torch.cat([run.values for run in found])
    weights = torch.cat([run.vectors[0].square() for run in found]) / len(found)
    low, high = float(nodes.min()), float(nodes.max())
    span = high - low if high - low > 1e-6 * abs(high) else abs(high) or 1.0
    sigma = width * span
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64)
    bells = torch.exp(-0.5 * ((grid[:, None] - nodes) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
    return Density(nodes.tolist(), weights.tolist(), sigma, grid.tolist(), (bells @ weights).tolist())


@dataclass(frozen=True)
class LossCurvature:
    """Of one loss without its factor; everything scales with it.

    Attributes:
        factor: the recipe's; times this, trace and eigenvalues are those of the loss as the recipe trains it (0: it does not).
        value: the loss itself.
    """

    factor: float
    value: float
    trace: Trace
    top: TopEigenvalues
    density: Density

    def to_dict(self) -> dict[str, Any]:
        parts = {"trace": asdict(self.trace), "top": self.top.to_dict(), "density": asdict(self.density)}
        return {"factor": self.factor, "value": self.value, **parts}


@dataclass(frozen=True)
class Curvature:
    """Of every loss asked for, over `images` images and `parameters` parameters."""

    images: int
    parameters: int
    losses: dict[str, LossCurvature]

    def to_dict(self) -> dict[str, Any]:
        losses = {name: found.to_dict() for name, found in self.losses.items()}
        return {"images": self.images, "parameters": self.parameters, "losses": losses}

    def __str__(self) -> str:
        lines = [f"{self.parameters} parameters, {self.images} images; losses without the recipe's factors",
                 f"{'':<6}{'loss':>10}{'trace':>12}{'+-':>10}  largest eigenvalues"]  # fmt: skip
        for name, found in self.losses.items():
            top = " ".join(f"{v:.3g}" for v in found.top.values[:3])
            lines.append(
                f"{name:<6}{found.value:>10.4g}{found.trace.mean:>12.4g}{found.trace.standard_error:>10.2g}  {top}"
            )
        return "\n".join(lines)


def of_subject(
    subject: Subject,
    *,
    losses: tuple[str, ...] = (),
    parameters: tuple[str, ...] = (),
    probes: int = 50,
    count: int = 5,
    steps: int = 60,
    runs: int = 1,
    seed: int = 0,
    batches: int = 1,
) -> Curvature:
    """On the first batches: every product costs two backward passes over the images. Without losses or parameters named, of all."""
    numbers: dict[str, Any] = dict(probes=probes, count=count, steps=steps, runs=runs, seed=seed)
    return curvature(subject.student, *losses_of(subject, batches, losses), parameters=parameters or None, **numbers)


def curvature(
    student: nn.Module,
    batches: Sequence[BatchLosses],
    names: Sequence[str] = ("ce", "kl", "fa"),
    *,
    parameters: Sequence[str] | None = None,
    probes: int = 50,
    count: int = 5,
    steps: int = 60,
    runs: int = 1,
    seed: int = 0,
) -> Curvature:
    """Trace, top eigenvalues and density of the Hessian of every named loss, from the same random vectors.

    Top eigenvalues are read off the first Lanczos run of the density. Costs `probes + runs * steps` Hessian products per loss.
    Arguments: see `Hessian`, `trace`, `top_eigenvalues`, `density`.
    """
    _check_count(count, steps)
    values = mean_losses(frozen_copy(student), batches, names)
    found, size = dict[str, LossCurvature](), 0
    for name in names:
        matrix = Hessian(student, batches, name, parameters)
        krylov, size = _runs(matrix, runs, steps, seed), matrix.size
        parts = trace(matrix, probes, seed), _top(krylov[0], count), _density(krylov, WIDTH, POINTS)
        found[name] = LossCurvature(batches[0].factors[name], values[name], *parts)
    return Curvature(sum(map(len, batches)), size, found)


def draw(result: Curvature, figure: Any) -> None:
    """The densities on a logarithmic axis, the top eigenvalues as marks at its foot; beside it the traces with standard errors."""
    figure.set_size_inches(9, 4)
    figure.set_layout_engine("constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    for name, found in result.losses.items():
        axes.semilogy(found.density.grid, found.density.density, color=COLOURS[name], lw=1.2, label=TITLES[name])
        foot = [0.03] * len(found.top.values)
        axes.plot(found.top.values, foot, "|", ms=10, color=COLOURS[name], transform=axes.get_xaxis_transform())
    axes.set_ylim(FLOOR, 3 * max(max(found.density.density) for found in result.losses.values()))
    axes.set_xlabel(
        f"eigenvalue of the Hessian; marks: the {max(len(f.top.values) for f in result.losses.values())} largest"
    )
    axes.set_ylabel("density")
    axes.legend()
    names = list(result.losses)
    traces = [result.losses[name].trace for name in names]
    drawn = bars.bar([name.upper() for name in names], [t.mean for t in traces], capsize=4,
                     yerr=[t.standard_error for t in traces], color=[COLOURS[name] for name in names])  # fmt: skip
    bars.bar_label(
        drawn, [f"{t.mean:.4g}" for t in traces], padding=2
    )  # a small one beside a large one is hardly a bar
    bars.margins(y=0.12)
    bars.set_title("trace", fontsize=10)
