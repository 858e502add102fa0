"""Posterior tables: draws of what the data leave open about the producer's table (a Laplace approximation).

With J the derivative of a prediction [d] with respect to a row [D], and T a temperature,

    H = (2 / d) mean of J^T J,    Sigma_c = (n_c H / T + I / s^2)^-1,    row c ~ N(producer's row c, Sigma_c)

and the class gap, the mean pairwise squared distance of the draws' first step, has the closed form

    gap_c = 2 g^2 coef^2 tr(J_first^T J_first Sigma_c)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decuwatch_training.backbone import Backbone
from decuwatch_training.diffusion import Sampler, first_latent
from decuwatch_training.profile import Measure

DELTA = 0.05
"""Step of the finite differences."""


@dataclass(frozen=True)
class Laplace:
    """What all Sigma_c have in common: H = V diag(values) V^T, T and s^2."""

    values: Tensor
    """Eigenvalues of H, or its diagonal, [P] with P = tokens * width."""
    vectors: Tensor | None
    """V [P, P]; None if H is diagonal."""
    temperature: float
    variance: float

    def root(self, count: float) -> Tensor:
        """A root of Sigma_c for a class that is worth ``count`` images: [P, P], or [P] for a diagonal."""
        scale = (count * self.values / self.temperature + 1 / self.variance).rsqrt()
        return scale if self.vectors is None else self.vectors * scale


def posterior_tables(producer: Tensor, laplace: Laplace, counts: Tensor, tables: int, seed: int) -> Tensor:
    """Draws [P', K + 1, T, D] around the producer's table [K + 1, T, D]; all keep its unconditional row.

    counts [K] are the images that each class is worth. The draws of a class are orthogonal before they are scaled, with
    directions of their own for each class. There are at most P of them.
    """
    generator = torch.Generator().manual_seed(seed)
    size = producer[0].numel()
    result = producer.repeat(tables, 1, 1, 1)
    for label, count in enumerate(counts.tolist()):
        directions, _ = torch.linalg.qr(torch.randn(size, tables, generator=generator, dtype=torch.float64))
        root = laplace.root(count).double()
        z = directions.T * size**0.5
        offsets = z * root if root.dim() == 1 else z @ root.T
        result[:, label] += offsets.float().view(tables, *producer.shape[1:])
    return result


@torch.no_grad()
def expected_gap(
    backbone: Backbone, measure: Measure, guidance: float, row: Tensor, root: Tensor, draws: int = 64, seed: int = 5
) -> float:
    """The mean pairwise squared distance that posterior tables of one class are expected to have under ``measure``.

    row [T, D]; root [P, P] or [P] (a diagonal) with root root^T = Sigma, P = T D. Estimated as 2 g^2 coef^2 E |J root
    z|^2 with z ~ N(0, I), by finite differences at ``draws`` first latents.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(backbone.denoiser.parameters()).device
    z = torch.randn(draws, row.numel(), generator=generator)
    offsets = (z * root if root.dim() == 1 else z @ root.T).view(draws, *row.shape)
    length = offsets.flatten(1).norm(dim=1).view(-1, 1, 1).clamp(min=1e-12)
    directions = offsets / length
    seeds = torch.randint(2**31, (draws,), generator=generator).tolist()
    latents = torch.stack([first_latent(value, backbone.latent_shape) for value in seeds])
    sampler = Sampler(backbone.schedule, measure.steps, 1.0)
    contexts = torch.stack([row + DELTA * directions, row - DELTA * directions], 1)
    ends = torch.cat(
        [
            sampler.step(backbone.denoiser, 0, x.to(device), context.to(device), context.to(device)).cpu()
            for x, context in zip(
                latents.repeat_interleave(2, 0).split(64), contexts.flatten(0, 1).split(64), strict=True
            )
        ]
    ).view(draws, 2, -1)
    slopes = (ends[:, 0] - ends[:, 1]).double() / (2 * DELTA) * length.view(-1, 1)
    return 2 * guidance**2 * float(slopes.square().sum(1).mean())
