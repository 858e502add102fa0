"""The branch: one component carries the latent, from branch step b all M continue from it on their own paths."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decuwatch_training.diffusion import Denoiser, Sampler, Schedule, first_latent
from decuwatch_training.paide import estimate
from decuwatch_training.profile import SPREADS, Measure, measures_of


@dataclass(frozen=True)
class Requests:
    """n requests: class [n], seed [n], the component that carries the shared path [n]."""

    classes: Tensor
    seeds: Tensor
    carriers: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def latents(self, shape: Sequence[int]) -> Tensor:
        """First latents [n, C, H, W], each from its own seed."""
        return torch.stack([first_latent(int(seed), tuple(shape)) for seed in self.seeds])


def make_requests(classes: Sequence[int], seeds: int, components: int, first_seed: int = 0) -> Requests:
    """``seeds`` requests of each class; the carriers follow each other in turn."""
    pairs = [(label, first_seed + seed) for label in classes for seed in range(seeds)]
    carriers = [(label + seed) % components for label, seed in pairs]
    return Requests(torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]), torch.tensor(carriers))


@dataclass(frozen=True)
class Branch:
    """The step at which the M components leave the shared path, and how many steps each then takes."""

    step: int
    rollout: int

    def rows(self, steps: int, components: int, guidance: float) -> int:
        """Rows of U-Net work for one request: (b + r M), twice that with guidance."""
        assert self.step + self.rollout <= steps
        return (1 if guidance == 1.0 else 2) * (self.step + self.rollout * components)


def contexts_of(table: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional contexts [n, M, T, D] of tables [M, K + 1, T, D]."""
    conditional = table[:, classes].transpose(0, 1)
    unconditional = table[:, -1].expand(len(classes), *table[:, -1].shape)
    return conditional, unconditional


@torch.no_grad()
def branched_means(
    denoise: Denoiser, sampler: Sampler, tables: Tensor, requests: Requests, latents: Tensor, branches: Sequence[Branch]
) -> Iterator[tuple[Branch, Tensor]]:
    """The M latents [n, M, C, H, W] at the end of each branch; branches that share a step share its work.

    tables [M, K + 1, T, D]; latents [n, C, H, W] are the requests' first ones, on the device of the denoiser.
    """
    components = len(tables)
    conditional, unconditional = contexts_of(tables, requests.classes)
    rows = torch.arange(len(requests))
    carried, carried_without = conditional[rows, requests.carriers], unconditional[rows, requests.carriers]
    every, every_without = conditional.flatten(0, 1), unconditional.flatten(0, 1)
    wanted: dict[int, list[int]] = {}
    for branch in branches:
        wanted.setdefault(branch.step, []).append(branch.rollout)
    shared = latents
    for step in range(max(wanted) + 1):
        if step in wanted:
            fanned = shared.repeat_interleave(components, 0)
            for length in range(1, max(wanted[step]) + 1):
                fanned = sampler.step(denoise, step + length - 1, fanned, every, every_without)
                if length in wanted[step]:
                    yield Branch(step, length), fanned.view(len(requests), components, *latents.shape[1:])
        if step < max(wanted):
            shared = sampler.step(denoise, step, shared, carried, carried_without)


def shared_row(tables: Tensor) -> Tensor:
    """The unconditional row of a whole set [M, K + 1, T, D] under shared guidance: the mean of its rows, [T, D]."""
    return tables[:, -1].double().mean(0).float()


@torch.no_grad()
def shared_means(
    denoise: Denoiser, sampler: Sampler, tables: Tensor, requests: Requests, latents: Tensor, steps: int
) -> Tensor:
    """The latents [n, M, C, H, W] of all M tables after ``steps`` steps under shared guidance.

    tables [M, K + 1, T, D]; latents [n, C, H, W] are the requests' first ones. Each step evaluates one unconditional
    row for each request, at the mean of its M latents: M + 1 rows (M at guidance 1).
    """
    conditional, _ = contexts_of(tables, requests.classes)
    unconditional = shared_row(tables)
    paths = latents.unsqueeze(1).expand(-1, len(tables), *latents.shape[1:])
    for index in range(steps):
        paths = sampler.shared_step(denoise, index, paths, conditional, unconditional)
    return paths


def step_variance(sampler: Sampler, step: int) -> float:
    """sigma^2 of a step at eta = 1. KL and Bhattacharyya's distance use this width; the path has eta = 0."""
    return sampler.schedule.variance(sampler.steps, step)


def measured_means(
    denoise: Denoiser, sampler: Sampler, tables: Tensor, requests: Requests, latents: Tensor, measure: Measure
) -> Tensor:
    """The latents [n, M, C, H, W] of one measurement's tables [M, K + 1, T, D] after its last step."""
    if measure.guidance == "shared":
        return shared_means(denoise, sampler, tables, requests, latents, measure.rollout_steps)
    branch = Branch(measure.branch_step, measure.rollout_steps)
    own = Requests(requests.classes, requests.seeds, requests.carriers % len(tables))
    return dict(branched_means(denoise, sampler, tables, own, latents, [branch]))[branch]


def profile_scores(
    denoise: Denoiser,
    schedule: Schedule,
    sets: Mapping[str, Tensor],
    requests: Requests,
    latents: Tensor,
    profile: Mapping[str, Any],
) -> dict[str, Tensor]:
    """``class_gap`` and ``request_risk`` [n] of the requests under a manifest's profile (eta = 0).

    ``sets`` has the tables [M, K + 1, T, D] of each set that the profile names.
    """
    scores = {}
    for name, measure in measures_of(profile).items():
        if name in SPREADS:
            sampler = Sampler(schedule, measure.steps, float(profile["guidance_scale"]))
            means = measured_means(denoise, sampler, sets[measure.tables], requests, latents, measure)
            last = measure.branch_step + measure.rollout_steps - 1
            scores[name] = estimate(measure.estimator, means, step_variance(sampler, last))
    return scores
