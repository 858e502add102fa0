"""The branch: one component carries the latent, from branch step b all M continue from it on their own paths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decuwatch_training.diffusion import Denoiser, NoiseSchedule, Sampler, first_latent
from decuwatch_training.errors import TrainingError
from decuwatch_training.paide import ESTIMATORS, estimate

DEFAULT_PROFILE: dict[str, Any] = {
    "steps": 20,
    "guidance_scale": 2.0,
    "eta": 0.0,
    "class_gap": {"branch_step": 0, "rollout_steps": 1, "estimator": "paide-w2"},
    "request_risk": {"branch_step": 10, "rollout_steps": 1, "estimator": "mean-w2"},
    "reason": "a first guess, before any evaluation of this ensemble",
}


def check_profile(profile: Any, schedule: NoiseSchedule) -> None:
    """Raise TrainingError that names the first profile field that a reader of the manifest would refuse."""

    def known(name: str, value: Any, fields: set[str]) -> None:
        if not isinstance(value, dict) or set(value) != fields:
            raise TrainingError(f"{name}: expected an object with the fields {', '.join(sorted(fields))}")

    def within(name: str, value: Any, low: float, high: float, whole: bool) -> None:
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise TrainingError(
                f"{name} {value!r}: expected {'an integer' if whole else 'a number'} from {low} to {high}"
            )

    known("profile", profile, {"steps", "guidance_scale", "eta", "class_gap", "request_risk", "reason"})
    within("profile.steps", profile["steps"], 1, 1000, whole=True)
    within("profile.guidance_scale", profile["guidance_scale"], 0, 30, whole=False)
    within("profile.eta", profile["eta"], 0, 1, whole=False)
    count = schedule.step_count(profile["steps"])
    for name in ("class_gap", "request_risk"):
        measure = profile[name]
        known(f"profile.{name}", measure, {"branch_step", "rollout_steps", "estimator"})
        within(f"profile.{name}.branch_step", measure["branch_step"], 0, count - 1, whole=True)
        within(f"profile.{name}.rollout_steps", measure["rollout_steps"], 1, count - measure["branch_step"], whole=True)
        if measure["estimator"] not in ESTIMATORS:
            raise TrainingError(
                f"profile.{name}.estimator {measure['estimator']!r}: expected one of {', '.join(ESTIMATORS)}"
            )


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


def step_variance(sampler: Sampler, step: int) -> float:
    """sigma_t^2 of DDIM's step at eta = 1. KL and Bhattacharyya's distance use this width; the path has eta = 0."""
    scheduler = sampler.schedule.scheduler(sampler.steps)
    timestep = int(scheduler.timesteps[step])
    return float(scheduler._get_variance(timestep, timestep - sampler.schedule.train_timesteps // sampler.steps))


def profile_scores(
    denoise: Denoiser, sampler: Sampler, tables: Tensor, requests: Requests, latents: Tensor, profile: dict[str, Any]
) -> dict[str, Tensor]:
    """``class_gap`` and ``request_risk`` [n] of the requests under a manifest's profile (eta = 0)."""
    measured = {
        name: Branch(profile[name]["branch_step"], profile[name]["rollout_steps"])
        for name in ("class_gap", "request_risk")
    }
    means = dict(
        branched_means(
            denoise,
            sampler,
            tables,
            requests,
            latents,
            sorted(set(measured.values()), key=lambda b: (b.step, b.rollout)),
        )
    )
    scores = {}
    for name, branch in measured.items():
        estimator = profile[name]["estimator"]
        assert estimator in ESTIMATORS
        scores[name] = estimate(estimator, means[branch], step_variance(sampler, branch.step + branch.rollout - 1))
    return scores
