"""Posterior tables: draws of what the data leave open about the producer's table (a Laplace approximation).

With J the derivative of a prediction [d] with respect to a row [D], and T a temperature,

    H = (2 / d) mean of J^T J,    Sigma_c = (n_c H / T + I / s^2)^-1,    row c ~ N(producer's row c, Sigma_c)

and the class gap, the mean pairwise squared distance of the draws' first step, has the closed form

    gap_c = 2 g^2 coef^2 tr(J_first^T J_first Sigma_c)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decuwatch_training.backbone import Backbone
from decuwatch_training.diffusion import Sampler, first_latent
from decuwatch_training.errors import TrainingError
from decuwatch_training.paide import estimate
from decuwatch_training.profile import DEFAULT_PROFILE, Measure, measures_of
from decuwatch_training.tables import TrainedProducers

DELTA = 0.05
"""Step of the finite differences."""
CURVATURE_DRAWS = 32
LARGEST_FULL = 1024
"""Rows with more numbers than this have a diagonal H."""
SKETCHES = 8
GAP_LATENTS = 16


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
    directions of their own for each class; there are at most P of them.
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


def curvature(
    backbone: Backbone, table: Tensor, latents: Tensor, classes: Tensor, draws: int = CURVATURE_DRAWS, seed: int = 3
) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues [P] and eigenvectors [P, P] of H = (2 / d) mean J^T J at a table's rows [K + 1, T, D].

    Each draw is an image with its class, a timestep and a noise. Rows of more than LARGEST_FULL numbers get H's
    diagonal, estimated by random projections of J, and None.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(classes), (draws,), generator=generator)
    timestep = backbone.schedule.times(torch.randint(backbone.schedule.train_timesteps, (draws,), generator=generator))
    noise = torch.randn(latents[picked].shape, generator=generator)
    noisy = backbone.schedule.noisy(latents[picked], noise, timestep)
    rows = table[classes[picked]]
    size, dimension = rows[0].numel(), noisy[0].numel()
    parts = [
        _full(backbone, x, t, row) if size <= LARGEST_FULL else _diagonal(backbone, x, t, row, generator)
        for x, t, row in zip(noisy, timestep, rows, strict=True)
    ]
    mean = 2 / dimension * torch.stack(parts).mean(0)
    if size > LARGEST_FULL:
        return mean.float(), None
    values, vectors = torch.linalg.eigh(mean)
    return values.clamp(min=0).float(), vectors.float()


@torch.no_grad()
def _full(backbone: Backbone, latent: Tensor, timestep: Tensor, row: Tensor) -> Tensor:
    """J^T J [P, P] of one prediction, by finite differences: P + 1 rows of U-Net work."""
    device = next(backbone.denoiser.parameters()).device
    size = row.numel()
    offsets = torch.cat([torch.zeros(1, size), DELTA * torch.eye(size)]).view(-1, *row.shape)
    outputs = torch.cat(
        [
            backbone.denoiser(
                latent.expand(len(part), *latent.shape).to(device),
                timestep.expand(len(part)).to(device),
                part.to(device),
            ).cpu()
            for part in (row + offsets).split(256)
        ]
    ).flatten(1)
    jacobian = (outputs[1:] - outputs[0]).double() / DELTA
    return jacobian @ jacobian.T


def _diagonal(backbone: Backbone, latent: Tensor, timestep: Tensor, row: Tensor, generator: torch.Generator) -> Tensor:
    """The diagonal [P] of J^T J: the mean of (J^T v)^2 over random signs v."""
    device = next(backbone.denoiser.parameters()).device
    context = row[None].to(device).requires_grad_()
    prediction = backbone.denoiser(latent[None].to(device), timestep[None].to(device), context)
    total = torch.zeros(row.numel(), dtype=torch.float64)
    for _ in range(SKETCHES):
        signs = torch.randint(2, prediction.shape, generator=generator).to(device) * 2.0 - 1.0
        (gradient,) = torch.autograd.grad(prediction, context, signs, retain_graph=True)
        total += gradient.cpu().double().flatten().square()
    return total / SKETCHES


@dataclass(frozen=True)
class Posterior:
    """The posterior tables of a run, and what they stand on."""

    tables: Tensor
    """[R, P', K + 1, T, D]"""
    laplace: Laplace
    worth: Tensor
    """[R, K]: min(n_eff, draws), the images that each class is worth."""
    measured: float | None
    """tr(H Sigma) of the best-sampled classes as two trainings have it; None without two trainings, then T is 1."""

    def describe(self) -> str:
        """One line for the terminal."""
        found = "no two trainings to fit T" if self.measured is None else f"half of |P - P'|^2 in H {self.measured:.3g}"
        return f"posterior: s^2 {self.laplace.variance:.3g}, T {self.laplace.temperature:.3g} ({found})"

    def record(self) -> dict[str, Any]:
        """The numbers that run.json keeps."""
        numbers = {"temperature": self.laplace.temperature, "variance": self.laplace.variance}
        return numbers | {"measured": self.measured, "worth": self.worth.tolist()}

    def tensors(self) -> dict[str, Tensor]:
        """What the run's tables file keeps."""
        tensors = {"posterior": self.tables, "curvature_values": self.laplace.values}
        return tensors if self.laplace.vectors is None else tensors | {"curvature_vectors": self.laplace.vectors}


def read_posterior(tensors: dict[str, Tensor], record: dict[str, Any], file: Path) -> dict[str, Any]:
    """``laplace`` and ``worth`` of a run. Raises TrainingError if a part is missing."""
    found = record.get("posterior")
    values = tensors.get("curvature_values")
    if not isinstance(found, dict) or values is None or {"temperature", "variance", "worth"} - found.keys():
        raise TrainingError(f"{file}: posterior tables without the numbers that they were drawn by")
    laplace = Laplace(values, tensors.get("curvature_vectors"), found["temperature"], found["variance"])
    return {"laplace": laplace, "worth": torch.tensor(found["worth"])}


def fit_posterior(
    backbone: Backbone,
    latents: Tensor,
    classes: Tensor,
    produced: TrainedProducers,
    counts: Tensor,
    worth: Tensor,
    tables: int,
    seed: int,
) -> Posterior:
    """Draw ``tables`` tables around each rotation's producer.

    latents [n, C, H, W] with classes [n]; counts and worth [R, K]: images of each class, and how many different ones
    they amount to. A row is worth at most its draws, if they are known. T makes tr(H Sigma) of the best-sampled classes
    what two trainings on the same images show; s^2 is the variance of those classes' rows about their mean.
    """
    values, vectors = curvature(backbone, produced.producer[0], latents, classes)
    draws = produced.draws[:, 0, :-1].float()
    capped = torch.where(draws > 0, torch.minimum(worth, draws), worth)
    best = counts == counts.max()
    rows = produced.producer[:, :-1][best].flatten(1)
    if len(rows) < 2:
        rows = produced.producer[:, :-1].flatten(0, 1).flatten(1)
    variance = float(rows.var(dim=0, unbiased=True).mean()) if len(rows) > 1 else 1.0
    pair = _two_trainings(produced)
    temperature, measured = 1.0, None
    if pair is not None:
        halves = squared_distance(values, vectors, *(table[:, :-1] for table in pair)) / 2
        measured = float(halves[best].mean())
        temperature = fit_temperature(values, variance, capped[best], measured)
    laplace = Laplace(values, vectors, temperature, variance)
    measure = measures_of(DEFAULT_PROFILE)["class_gap"]
    drawn = []
    for rotation, (table, count) in enumerate(zip(produced.producer, capped, strict=True)):
        free = posterior_tables(table, laplace, count, tables, seed * 1009 + rotation)
        drawn.append(matched(backbone, measure, table, free, laplace, count))
    return Posterior(torch.stack(drawn), laplace, capped, measured)


def _two_trainings(produced: TrainedProducers) -> tuple[Tensor, Tensor] | None:
    """Two tables [R, K + 1, T, D] that were trained alike: the backbone's own table is not one of them."""
    alike = [produced.producers[:, index] for index in range(produced.producers.shape[1])]
    if bool((produced.draws[:, 0] > 0).any()):
        alike.insert(0, produced.producer)
    return (alike[0], alike[1]) if len(alike) > 1 else None


def squared_distance(values: Tensor, vectors: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """(left - right)^T H (left - right) of rows [..., T, D]."""
    difference = (left - right).flatten(-2).double()
    rotated = difference if vectors is None else difference @ vectors.double()
    return (values.double() * rotated.square()).sum(-1)


def fit_temperature(values: Tensor, variance: float, counts: Tensor, wanted: float) -> float:
    """T for which the mean of tr(H Sigma_c) over classes worth ``counts`` images is ``wanted``.

    The trace grows with T from 0 to s^2 tr(H); the nearest T of [1e-9, 1e9] is returned.
    """

    def trace(temperature: float) -> float:
        spread = counts.double()[:, None] * values.double() / temperature + 1 / variance
        return float((values.double() / spread).sum(1).mean())

    low, high = -9.0, 9.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if trace(10**middle) < wanted else (low, middle)
    return float(10**low)


@torch.no_grad()
def matched(
    backbone: Backbone, measure: Measure, producer: Tensor, tables: Tensor, laplace: Laplace, counts: Tensor
) -> Tensor:
    """The tables [P', K + 1, T, D] with the draws of each class scaled together, so that their gap is the expected one.

    A few draws vary a lot, and the class gap should not depend on which ones they are.
    """
    device = next(backbone.denoiser.parameters()).device
    latents = torch.stack([first_latent(seed, backbone.latent_shape) for seed in range(GAP_LATENTS)]).to(device)
    sampler = Sampler(backbone.schedule, measure.steps, 1.0)
    result = tables.clone()
    for label, count in enumerate(counts.tolist()):
        ends = torch.stack(
            [
                sampler.step(
                    backbone.denoiser, 0, latents, *[row.to(device).expand(len(latents), *row.shape)] * 2
                ).cpu()
                for row in tables[:, label]
            ],
            1,
        )
        measured = float(estimate("mean-w2", ends, 1.0).mean())
        wanted = expected_gap(backbone, measure, 1.0, producer[label], laplace.root(count))
        if measured > 0:
            result[:, label] = producer[label] + (wanted / measured) ** 0.5 * (tables[:, label] - producer[label])
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
