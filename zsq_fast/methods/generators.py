"""Image generators of the GDFQ family: noise and a label in, an image in the network's normalised input space out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq_fast.errors import UnsupportedModelError, UsageError
from zsq_fast.methods import recipe as recipes
from zsq_fast.methods.autorecon import SEARCH, AutoRecon, SuperNet, read_genotype
from zsq_fast.methods.blocks import NORM_EPS, ConditionalBatchNorm2d, mixed, to_maps

__all__ = ["ConditionalBatchNorm2d", "Generator", "Qimera", "build_generator", "classifier_rows"]

MAPPED = 100  # width of Qimera's disentanglement mapping, for every network (ait_family.md 5.2)


class Generator(nn.Module):
    """GDFQ's decoder, in train mode for its whole life (ait_family.md 4.1).

    Linear -> 128 maps at a quarter of the image size -> norm -> up -> conv 128 -> norm -> LeakyReLU -> up -> conv 64 -> norm ->
    LeakyReLU -> conv -> tanh -> non-affine norm, which puts the images at zero mean and unit variance per channel.

    Args:
        kind: "plain" multiplies the noise with a label embedding (CIFAR); "conditional" feeds plain noise and puts the label
            into class-conditional batch norms (ImageNet).
        input_size: `(C, H, W)` of the images; H and W must be multiples of 4.
        latent: length of the noise vector.
        eps: of the norms behind the first two convolutions.
        width: what the first linear layer reads, when that is not `latent`.
    """

    def __init__(
        self,
        kind: str,
        num_classes: int,
        input_size: Sequence[int],
        latent: int = 100,
        *,
        eps: float = NORM_EPS["faithful"],
        width: int | None = None,
    ):
        super().__init__()
        channels, *size = input_size
        if size[0] % 4 or size[1] % 4:
            raise UsageError(f"the generator needs image sizes that are multiples of 4, got {size[0]} x {size[1]}")
        self.kind, self.latent, self.base = kind, latent, (size[0] // 4, size[1] // 4)
        if kind == "plain":
            self.embedding = nn.Embedding(num_classes, latent)
        self.fc = nn.Linear(width or latent, 128 * self.base[0] * self.base[1])
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        for i, (maps, e) in enumerate(((128, 1e-5), (128, eps), (64, eps))):
            norm = nn.BatchNorm2d(maps, eps=e) if kind == "plain" else ConditionalBatchNorm2d(num_classes, maps, e)
            self.add_module(f"norm{i}", norm)
        self.norm_out = nn.BatchNorm2d(channels, affine=False)

    def _norm(self, i: int, x: Tensor, labels: Tensor, mix: Tensor | None) -> Tensor:
        norm = getattr(self, f"norm{i}")
        return norm(x) if self.kind == "plain" else norm(x, labels, mix)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise `[B, latent]`, labels `[B]` int64 -> images `[B, C, H, W]`."""
        return self.decode(self.embedding(labels) * noise if self.kind == "plain" else noise, labels)

    def decode(self, u: Tensor, labels: Tensor, mix: Tensor | None = None) -> Tensor:
        x = to_maps(self.fc(u), 128, self.base, self.conv1)
        x = F.interpolate(self._norm(0, x, labels, mix), scale_factor=2.0)
        x = F.leaky_relu(self._norm(1, self.conv1(x), labels, mix), 0.2)
        x = F.leaky_relu(self._norm(2, self.conv2(F.interpolate(x, scale_factor=2.0)), labels, mix), 0.2)
        return self.norm_out(torch.tanh(self.conv3(x)))


class Qimera(Generator):
    """GDFQ's decoder behind noisy class embeddings, of one class or superposed from several (ait_family.md 5.1, 5.2).

    Args:
        rows: `[num_classes, latent]`, what the embedding starts as; None draws it from N(0, 1). Trained either way.
    """

    def __init__(
        self,
        spec: recipes.Generator,
        num_classes: int,
        input_size: Sequence[int],
        latent: int,
        rows: Tensor | None = None,
    ):
        kind, width = "conditional" if spec.conditional_norms else "plain", MAPPED if spec.disentangle else latent
        super().__init__(kind, num_classes, input_size, latent, eps=NORM_EPS[spec.norm_eps], width=width)
        self.spec = spec
        self.embedding = nn.Embedding(num_classes, latent)
        if rows is not None:
            self.embedding.weight.data.copy_(rows)
        self.mapping = nn.Linear(latent, MAPPED) if spec.disentangle else nn.Identity()

    def embed(self, noise: Tensor, labels: Tensor, mix: Tensor | None = None) -> Tensor:
        """What the mapping reads, `[B, latent]`: normalised noisy embeddings, superposed if there are weights."""
        noisy = self.embedding(labels) + self.spec.noise_scale * noise
        if mix is None:
            return F.layer_norm(noisy, noisy.shape[-1:])
        # The published code applies one batch norm to reversed axes: over the features of each sample for [B, latent] above, but
        # over batch and features together for [B, K, latent].
        if self.spec.embedding_norm == "faithful":
            return mixed(F.batch_norm(noisy, None, None, training=True), mix)
        return mixed(F.layer_norm(noisy, noisy.shape[-1:]), mix)

    def forward(self, noise: Tensor, labels: Tensor, mix: Tensor | None = None) -> Tensor:
        """Images `[B, C, H, W]`.

        Args:
            noise, labels: `[B, latent]` and `[B]` int64; superposed `[B, K, latent]` and `[B, K]`.
            mix: `[B, K]`, the weights of the K classes, each row with the sum 1; None when not superposed.
        """
        u = self.mapping(self.embed(noise, labels, mix))
        # The published code averages the K weighted scales and shifts instead of summing them.
        if mix is not None and self.spec.affine_scaling == "faithful":
            mix = mix / mix.shape[1]
        return self.decode(u, labels, mix)


def classifier_rows(model: nn.Module, num_classes: int) -> Tensor:
    """Weight `[num_classes, D]` of a network's classifier: its last linear layer, else its last 1x1 convolution, of that many outputs.

    Raises:
        UnsupportedModelError: there is neither.
    """
    layers = list(model.modules())[::-1]
    linear = [m.weight for m in layers if isinstance(m, nn.Linear)]
    pointwise = [m.weight for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1]
    for weight in (*linear, *pointwise):
        if weight.shape[0] == num_classes:
            return weight.detach().flatten(1)
    raise UnsupportedModelError(
        f"no classifier was found to take embeddings from: the model has no nn.Linear and no 1x1 nn.Conv2d with {num_classes} "
        'outputs; give their width as generator.latent and use generator.embedding = "random".'
    )


def build_generator(
    spec: recipes.Generator, num_classes: int, input_size: Sequence[int], teacher: nn.Module | None = None
) -> Generator | AutoRecon:
    """The generator of a recipe, initialised from torch's global generator.

    Args:
        teacher: needed for what Qimera takes from its classifier.
    """
    if spec.kind == "autorecon":
        size = (num_classes, input_size, spec.latent, NORM_EPS[spec.norm_eps])
        return SuperNet(*size) if spec.genotype == SEARCH else AutoRecon(read_genotype(spec.genotype), *size)
    if spec.kind != "qimera":
        return Generator(spec.kind, num_classes, input_size, spec.latent, eps=NORM_EPS[spec.norm_eps])
    rows = None
    if spec.latent == 0 or spec.embedding == "teacher":
        if teacher is None:
            raise UsageError("this generator is built from the teacher's classifier: give the teacher")
        rows = classifier_rows(teacher, num_classes)
        if spec.latent not in (0, rows.shape[1]):
            raise UsageError(
                f"generator.latent must be 0 or the width of the classifier ({rows.shape[1]}), got {spec.latent}"
            )
    latent = spec.latent if rows is None else rows.shape[1]
    return Qimera(spec, num_classes, input_size, latent, rows if spec.embedding == "teacher" else None)
