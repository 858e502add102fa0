"""Run the requests of an evaluation through one ensemble and keep every pairwise distance, shard by shard.

A shard is one manifest at one number of steps and one guidance, written when it is complete: an evaluation that was
broken off goes on with the shards that are missing. Scores of any estimator, of fewer components and of sums over branch
points are computed from the shards afterwards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from decuwatch_training.branch import Branch, branched_means, contexts_of, make_requests, step_variance
from decuwatch_training.check import read_tables
from decuwatch_training.diffusion import Denoiser, NoiseSchedule, Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import read_json, sha256_file, write_file
from decuwatch_training.graphs import Graph
from decuwatch_training.paide import estimate

FRACTIONS = {"first": 0.0, "25%": 0.25, "50%": 0.5, "75%": 0.75, "last": 1.0}
"""Branch points, as shares of the steps; ``last`` is the last step, the authors' default."""


@dataclass(frozen=True)
class Plan:
    """What an evaluation measures: requests of every class, settings of the sampler, branches."""

    seeds: int
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    rollouts_up_to: int
    """Roll-outs are measured where S is at most this; beyond, only the first branched step."""

    def branches(self, steps: int) -> list[Branch]:
        """The first branched step at each branch point, and roll-outs of 2, 4, 8, ... steps from the first and the middle step."""
        branches = {Branch(branch_step(fraction, steps), 1) for fraction in FRACTIONS.values()}
        if steps <= self.rollouts_up_to:
            for first in (0, steps // 2):
                left = steps - first
                branches |= {Branch(first, min(2**power, left)) for power in range(math.ceil(math.log2(left)) + 1)}
        return sorted(branches, key=lambda branch: (branch.step, branch.rollout))


def branch_step(fraction: float, steps: int) -> int:
    """The step at a share of the trajectory; the last step for 1."""
    return min(steps - 1, int(fraction * steps))


@dataclass(frozen=True)
class Shard:
    """Measurements of n requests under one manifest, number of steps and guidance.

    ``distances`` maps (branch step, roll-out) to squared distances [n, M (M - 1) / 2], summed over dimensions;
    ``pixel`` to pixel-paide-w2 [n]; ``variance`` to sigma^2 of the last step. ``error`` [n, M] is the squared distance
    of each component's own final latent to the one under the fully trained table (NaN without roll-outs).
    """

    rotation: int
    steps: int
    count: int
    """Steps that were taken when ``steps`` were asked for: the same number, except with compvis spacing."""
    guidance: float
    classes: np.ndarray
    bins: np.ndarray
    carriers: np.ndarray
    distances: dict[tuple[int, int], np.ndarray]
    pixel: dict[tuple[int, int], np.ndarray]
    variance: dict[tuple[int, int], float]
    carrier_error: np.ndarray
    error: np.ndarray


def measure(paths: list[Path], plan: Plan, work: Path, batch_rows: int = 320) -> list[Shard]:
    """Every shard of the plan, those that ``work`` holds already read from there."""
    graphs: dict[str, Graph] = {}
    shards = []
    total = len(paths) * len(plan.steps) * len(plan.guidance)
    with tqdm(total=total, desc="evaluate", unit="shard") as bar:
        for rotation, path in enumerate(paths):
            manifest = read_json(path)
            digest = manifest["files"]["unet"]["sha256"]
            if digest not in graphs:
                file = path.parent / manifest["files"]["unet"]["path"]
                if sha256_file(file) != digest:
                    raise TrainingError(f"{file}: SHA-256 is not what {path.name} says")
                graphs[digest] = Graph(file)
            tables_digest = manifest["files"]["tables"]["sha256"]
            for steps in plan.steps:
                for guidance in plan.guidance:
                    name = f"{tables_digest[:16]}-S{steps}-g{guidance:g}-n{plan.seeds}-r{plan.rollouts_up_to}.npz"
                    file = work / name
                    if not file.exists():
                        _run_shard(path, manifest, graphs[digest], plan, steps, guidance, file, batch_rows)
                    shards.append(_read_shard(file, rotation, steps, guidance))
                    bar.update()
    return shards


def _in_batches(denoise: Denoiser, rows: int) -> Denoiser:
    def batched(latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        parts = zip(latent.split(rows), timestep.split(rows), context.split(rows), strict=True)
        return torch.cat([denoise(*part) for part in parts])

    return batched


def _run_shard(path: Path, manifest: dict[str, Any], graph: Graph, plan: Plan, steps: int, guidance: float, out: Path, batch_rows: int) -> None:
    tables, reference = read_tables(path.parent, manifest)
    components, classes = manifest["components"], len(manifest["classes"])
    requests = make_requests(range(classes), plan.seeds, components)
    shape = (manifest["latent"]["channels"], manifest["latent"]["height"], manifest["latent"]["width"])
    latents = requests.latents(shape)
    sampler = Sampler(NoiseSchedule(**manifest["diffusion"]), steps, guidance)
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor] = _in_batches(graph, batch_rows)
    upper = torch.triu_indices(components, components, 1)
    arrays: dict[str, np.ndarray] = {}
    finals: Tensor | None = None
    for branch, means in branched_means(denoise, sampler, tables, requests, latents, plan.branches(sampler.count)):
        flat = means.flatten(2).double()
        key = f"{branch.step}-{branch.rollout}"
        arrays[f"distances-{key}"] = (flat[:, upper[0]] - flat[:, upper[1]]).square().sum(-1).numpy()
        arrays[f"pixel-{key}"] = estimate("pixel-paide-w2", means, 1.0).numpy()
        arrays[f"variance-{key}"] = np.array(step_variance(sampler, branch.step + branch.rollout - 1))
        if branch.step == 0 and branch.rollout == sampler.count:
            finals = flat
    arrays["count"] = np.array(sampler.count)
    arrays["error"] = np.full((len(requests), components), np.nan)
    if finals is not None and reference is not None:
        conditional, unconditional = contexts_of(reference[None], requests.classes)
        with torch.no_grad():
            wanted = sampler.roll(denoise, 0, sampler.count, latents, conditional[:, 0], unconditional[:, 0])
        arrays["error"] = (finals - wanted.flatten(1).double()[:, None]).square().sum(-1).numpy()
    images = torch.tensor([entry["images"] for entry in manifest["classes"]]).float().mean(1)
    arrays["classes"], arrays["carriers"] = requests.classes.numpy(), requests.carriers.numpy()
    arrays["bins"] = images[requests.classes].numpy()
    write_file(out, lambda aside: _savez(aside, arrays))


def _savez(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _read_shard(path: Path, rotation: int, steps: int, guidance: float) -> Shard:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError) as err:
        raise TrainingError(f"{path}: not a shard that can be read; delete it to measure it anew: {err}") from err
    keyed: dict[str, dict[tuple[int, int], np.ndarray]] = {"distances": {}, "pixel": {}, "variance": {}}
    for name, array in arrays.items():
        kind, _, key = name.partition("-")
        if kind in keyed:
            step, _, rollout = key.partition("-")
            keyed[kind][int(step), int(rollout)] = array
    error = arrays["error"]
    carrier_error = error[np.arange(len(error)), arrays["carriers"]]
    variance = {key: float(value) for key, value in keyed["variance"].items()}
    count = int(arrays.get("count", steps))
    sampled = (arrays["classes"], arrays["bins"], arrays["carriers"])
    return Shard(rotation, steps, count, guidance, *sampled, keyed["distances"], keyed["pixel"], variance, carrier_error, error)
