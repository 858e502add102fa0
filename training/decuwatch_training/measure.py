"""Run the requests of an evaluation through one ensemble and keep every pairwise distance, shard by shard.

A shard is one manifest at one number of steps and one guidance, written when it is complete: an evaluation that was
broken off goes on with the shards that are missing. Scores of any estimator, of fewer components and of sums over
branch points are computed from the shards afterwards.
"""

import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from decuwatch_training.branch import Branch, branched_means, contexts_of, make_requests, step_variance
from decuwatch_training.configuration import shorten
from decuwatch_training.diffusion import Denoiser, NoiseSchedule, Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import write_file
from decuwatch_training.graphs import Graph
from decuwatch_training.manifest import inputs_digest, read_manifest, read_tables
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
    """Roll-outs are measured if S is at most this; else only the first branched step."""

    def branches(self, steps: int) -> list[Branch]:
        """The first branched step at each branch point; roll-outs of 2, 4, 8, ... steps from first and middle."""
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
    manifests = [read_manifest(path) for path in paths]
    _check_rotations(paths, manifests)
    total = len(paths) * len(plan.steps) * len(plan.guidance)
    with tqdm(total=total, desc="evaluate", unit="shard") as bar:
        for rotation, (path, manifest) in enumerate(zip(paths, manifests, strict=True)):
            unet = manifest["files"]["unet"]
            if unet["sha256"] not in graphs:
                graphs[unet["sha256"]] = Graph(path.parent / unet["path"], manifest["graph"]["unet"])
            inputs = inputs_digest(manifest)[:16]
            for steps in plan.steps:
                for guidance in plan.guidance:
                    name = f"{inputs}-S{steps}-g{guidance:g}-n{plan.seeds}-r{plan.rollouts_up_to}.npz"
                    file = work / name
                    if not file.exists():
                        _run_shard(path, manifest, graphs[unet["sha256"]], plan, steps, guidance, file, batch_rows)
                    shards.append(_read_shard(file, manifest, plan, rotation, steps, guidance))
                    bar.update()
    return shards


def _check_rotations(paths: list[Path], manifests: list[dict[str, Any]]) -> None:
    """Rotations are compared class by class: they differ in their tables and in the images that those saw."""
    for path, manifest in zip(paths, manifests, strict=True):
        for field in ("components", "latent", "context", "diffusion"):
            if manifest[field] != manifests[0][field]:
                raise TrainingError(f"{path}: {field}: expected that of {paths[0].name}")
        if [entry["label"] for entry in manifest["classes"]] != [entry["label"] for entry in manifests[0]["classes"]]:
            raise TrainingError(f"{path}: classes: expected the labels of {paths[0].name}")


def _in_batches(denoise: Denoiser, rows: int) -> Denoiser:
    def batched(latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        parts = zip(latent.split(rows), timestep.split(rows), context.split(rows), strict=True)
        return torch.cat([denoise(*part) for part in parts])

    return batched


def _run_shard(
    path: Path,
    manifest: dict[str, Any],
    graph: Graph,
    plan: Plan,
    steps: int,
    guidance: float,
    out: Path,
    batch_rows: int,
) -> None:
    sets = read_tables(path.parent, manifest)
    tables, reference = sets.members, sets.reference
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


def _read_shard(path: Path, manifest: dict[str, Any], plan: Plan, rotation: int, steps: int, guidance: float) -> Shard:
    """A shard that was kept. Raises TrainingError for one that is not what ``_run_shard`` writes."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as err:
        raise TrainingError(
            f"{path}: not a shard that can be read; delete it to measure it anew: {shorten(str(err))}"
        ) from err
    sampler = Sampler(NoiseSchedule(**manifest["diffusion"]), steps, guidance)
    requests, components = plan.seeds * len(manifest["classes"]), manifest["components"]
    shapes: dict[str, tuple[int, ...]] = {"count": (), "error": (requests, components)}
    shapes |= dict.fromkeys(("classes", "carriers", "bins"), (requests,))
    branches = [(branch.step, branch.rollout) for branch in plan.branches(sampler.count)]
    for step, rollout in branches:
        shapes[f"distances-{step}-{rollout}"] = (requests, components * (components - 1) // 2)
        shapes[f"pixel-{step}-{rollout}"], shapes[f"variance-{step}-{rollout}"] = (requests,), ()
    for name in shapes.keys() | arrays.keys():
        if name not in arrays or arrays[name].shape != shapes.get(name) or arrays[name].dtype.kind not in "if":
            raise TrainingError(f"{path}: {shorten(name)}: not what a shard holds; delete it to measure it anew")
        if name != "error" and not np.isfinite(arrays[name]).all():
            raise TrainingError(f"{path}: {name} holds a value that is not finite; delete it to measure it anew")
    if arrays["count"] != sampler.count or not np.isin(arrays["carriers"], range(components)).all():
        raise TrainingError(f"{path}: count or carriers: not those of {steps} steps; delete it to measure it anew")
    distances, pixel = (
        {key: arrays[f"{kind}-{key[0]}-{key[1]}"] for key in branches} for kind in ("distances", "pixel")
    )
    variance = {key: float(arrays[f"variance-{key[0]}-{key[1]}"]) for key in branches}
    error = arrays["error"]
    carrier_error = error[np.arange(len(error)), arrays["carriers"]]
    sampled = (arrays["classes"], arrays["bins"], arrays["carriers"])
    return Shard(rotation, steps, sampler.count, guidance, *sampled, distances, pixel, variance, carrier_error, error)
