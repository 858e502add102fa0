"""Run the requests of an evaluation through one ensemble and keep what was measured, shard by shard.

A shard is what one manifest gives in one setting, written when it is complete: an evaluation that was broken off goes
on with the shards that are missing.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decuwatch_training.branch import Requests, make_requests, measured_means, step_variance
from decuwatch_training.configuration import shorten
from decuwatch_training.diffusion import Denoiser, Sampler, schedule_of
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import write_file
from decuwatch_training.graphs import Graph
from decuwatch_training.imagerisk import Judge, predicted_latents
from decuwatch_training.manifest import inputs_digest, read_manifest, read_tables
from decuwatch_training.paide import ESTIMATORS, estimate
from decuwatch_training.profile import JUDGE
from decuwatch_training.settings import Setting

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Errors:
    """Squared distances of final latents from those of the backbone's own table, and the final latents.

    ``producers`` float64 [Q, n] and ``members`` float64 [M, n]; ``latents`` float32 [Q, n, C, H, W] of the producers.
    """

    producers: np.ndarray
    members: np.ndarray
    latents: np.ndarray


class Subject:
    """One manifest of an ensemble under evaluation: its tables, networks and requests."""

    def __init__(self, path: Path, seeds: int, work: Path, first_seed: int = 0, batch_rows: int = 320) -> None:
        """Requests are ``seeds`` of each class, from ``first_seed`` on. Raises TrainingError for a broken ensemble."""
        self.path, self.manifest, self.work = path, read_manifest(path), work
        self.seeds, self.first_seed, self.batch_rows = seeds, first_seed, batch_rows
        self.sets = read_tables(path.parent, self.manifest)
        self.schedule = schedule_of(self.manifest["diffusion"])
        self.requests = make_requests(
            range(len(self.manifest["classes"])), seeds, self.manifest["components"], first_seed
        )
        latent = self.manifest["latent"]
        self.shape = (latent["channels"], latent["height"], latent["width"])

    @cached_property
    def tables(self) -> dict[str, int]:
        """The number of tables by set."""
        return {name: len(tables) for name, tables in self.sets.measured().items()}

    @cached_property
    def latents(self) -> Tensor:
        return self.requests.latents(self.shape)

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        files, directory = self.manifest["files"], self.path.parent
        return {
            part: Graph(directory / files[part]["path"], self.manifest["graph"][part]) for part in ("unet", "decoder")
        }

    @cached_property
    def judge(self) -> Judge | None:
        return Judge.open(self.path.parent, self.manifest) if "judge" in self.manifest else None

    @property
    def denoise(self) -> Denoiser:
        return _in_batches(self.graphs["unet"], self.batch_rows)

    def scores(self, setting: Setting) -> np.ndarray:
        """Scores [n] of the requests; p(not the class) for the judge."""
        if setting.measure.estimator == JUDGE:
            return self._kept(setting.path.name, {JUDGE: (len(self.requests),)}, lambda: self._judged(setting))[JUDGE]
        shapes: Shapes = dict.fromkeys(ESTIMATORS, (len(self.requests),))
        return self._kept(setting.path.name, shapes, lambda: self._spreads(setting))[setting.measure.estimator]

    def errors(self, steps: int, scale: float) -> Errors | None:
        """Errors at ``steps`` steps and guidance ``scale``; None without a reference table or without producers."""
        sets, n = self.sets, len(self.requests)
        if sets.reference is None or sets.producers is None:
            return None
        counts = (len(sets.producers), len(sets.members))
        shapes: Shapes = {"producers": (counts[0], n), "members": (counts[1], n)}
        shapes["latents"] = (counts[0], n, *self.shape)
        name = f"errors:{steps}:g={scale:g}"
        return Errors(**self._kept(name, shapes, lambda: self._errors(steps, scale)))

    def decode(self, latents: Tensor, batch: int = 256) -> Tensor:
        """Images of scaled latents [n, C, H, W]."""
        latent = self.manifest["latent"]
        unscaled = latents / latent["scale"] + latent["shift"]
        return torch.cat([self.graphs["decoder"](part) for part in unscaled.split(batch)])

    def _spreads(self, setting: Setting) -> dict[str, np.ndarray]:
        measure = setting.measure
        tables = self.sets.measured()[measure.tables][: setting.count]
        sampler = Sampler(self.schedule, measure.steps, setting.scale)
        variance = step_variance(sampler, measure.branch_step + measure.rollout_steps - 1)
        parts: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
        for index in torch.arange(len(self.requests)).split(200):
            requests = self.requests
            own = Requests(requests.classes[index], requests.seeds[index], requests.carriers[index])
            means = measured_means(self.denoise, sampler, tables, own, self.latents[index], measure)
            for name in ESTIMATORS:
                parts[name].append(estimate(name, means, variance))
        return {name: torch.cat(values).double().numpy() for name, values in parts.items()}

    def _judged(self, setting: Setting) -> dict[str, np.ndarray]:
        assert self.judge is not None
        assert self.sets.producer is not None
        sampler = Sampler(self.schedule, setting.measure.steps, setting.scale)
        steps, classes = setting.measure.rollout_steps, self.requests.classes
        clean = predicted_latents(self.denoise, sampler, self.sets.producer, classes, self.latents, steps)
        return {JUDGE: self.risk(self.judge, self.decode(clean)).numpy()}

    def risk(self, judge: Judge, images: Tensor) -> Tensor:
        """1 - p(class) [n] of an image for each request."""
        return 1 - judge.probabilities(images).gather(1, self.requests.classes[:, None])[:, 0]

    def _errors(self, steps: int, scale: float) -> dict[str, np.ndarray]:
        assert self.sets.reference is not None
        assert self.sets.producers is not None
        sampler = Sampler(self.schedule, steps, scale)

        def final(table: Tensor) -> Tensor:
            context = table[self.requests.classes]
            without = table[-1].expand_as(context)
            return sampler.roll(self.denoise, 0, sampler.count, self.latents, context, without)

        with torch.no_grad():
            wanted = final(self.sets.reference)
            producers = torch.stack([final(table) for table in self.sets.producers])
            members = torch.stack([final(table) for table in self.sets.members])
        return {
            "producers": _squared(producers, wanted),
            "members": _squared(members, wanted),
            "latents": producers.numpy(),
        }

    def _kept(self, name: str, shapes: Shapes, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What an earlier run measured, or what ``compute`` gives, which is then kept."""
        text = f"{inputs_digest(self.manifest)} {self.seeds} {self.first_seed} {name}"
        file = self.work / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
        if not file.exists():
            arrays = compute()
            write_file(file, lambda aside: _save(aside, arrays))
        return _read(file, shapes)


def subjects_of(paths: Sequence[Path], seeds: int, work: Path, first_seed: int = 0) -> list[Subject]:
    """The manifests of one directory. Raises TrainingError unless they differ in tables and their images only."""
    subjects = [Subject(path, seeds, work, first_seed) for path in paths]
    first = subjects[0].manifest
    for path, manifest in ((subject.path, subject.manifest) for subject in subjects[1:]):
        for field in ("components", "posterior", "latent", "context", "diffusion", "profile", "judge"):
            if manifest.get(field) != first.get(field):
                raise TrainingError(f"{path}: {field}: expected that of {paths[0].name}")
        if [entry["label"] for entry in manifest["classes"]] != [entry["label"] for entry in first["classes"]]:
            raise TrainingError(f"{path}: classes: expected the labels of {paths[0].name}")
    return subjects


def _squared(finals: Tensor, wanted: Tensor) -> np.ndarray:
    return (finals.double() - wanted.double()).flatten(2).square().sum(-1).numpy()


def _in_batches(denoise: Denoiser, rows: int) -> Denoiser:
    def batched(latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        parts = zip(latent.split(rows), timestep.split(rows), context.split(rows), strict=True)
        return torch.cat([denoise(*part) for part in parts])

    return batched


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _read(path: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    """A shard that was kept. Raises TrainingError for one that is not what a run writes."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: dict[str, Any] = dict(stored)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as err:
        raise TrainingError(
            f"{path}: not a shard that can be read; delete it to measure it anew: {shorten(str(err))}"
        ) from err
    for name in shapes.keys() | arrays.keys():
        if name not in arrays or arrays[name].shape != shapes.get(name) or arrays[name].dtype.kind != "f":
            raise TrainingError(f"{path}: {shorten(name)}: not what a shard holds; delete it to measure it anew")
        if not np.isfinite(arrays[name]).all():
            raise TrainingError(f"{path}: {name} holds a value that is not finite; delete it to measure it anew")
    return arrays
