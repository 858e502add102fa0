"""The components' tables: their starts, the images each component sees, and joint training on the frozen backbone.

All tables of all components (and of all rotations) train in one process: every step sends the rows of every table
through the shared backbone at once. Each table has its own random generator for start, images, noise and order, so that
training it beside others or alone gives the same table, but for floating-point rounding.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decuwatch_training.backbone import Backbone
from decuwatch_training.checkpoint import load_checkpoint, save_checkpoint
from decuwatch_training.errors import TrainingError
from decuwatch_training.loop import Clock, Progress, cosine_rate, mixed_precision


@dataclass(frozen=True)
class TableSettings:
    """Everything that decides the tables but the backbone and the images."""

    components: int = 5
    rotations: int = 1
    bins: tuple[int, ...] = ()
    """Images of a class by bin; class k has bin (k + rotation) modulo their number. Empty: every image there is."""
    subset: str = "bootstrap"
    """``own``: each component draws its images from the whole class; ``bootstrap``: each draws with replacement from
    the same images; ``shared``: all see the same images.
    """
    regime: str = "disagreement"
    """``disagreement`` draws classes equally often, ``exposure`` by their natural frequency."""
    start: str = "mean"
    """``normal``: N(0, spread^2); ``mean``: the mean of the backbone's own rows plus N(0, spread^2)."""
    start_spread: float = 0.3
    anchor: float = 0.0
    """Weight lambda of lambda / (2 n_k) |row - start|^2 in each class's mean loss (an anchored ensemble, Pearce et al.
    2020): a prior worth lambda images, so that a row leaves its start only as far as its images ask. 0: none."""
    steps: int = 700
    batch: int = 8
    rate: float = 2e-2
    condition_dropout: float = 0.1
    seed: int = 1
    producer: str = "stand-in"
    """Stands for the production model. ``stand-in``: a table trained on all of production's images; ``reference``: the
    backbone's own table."""
    producers: int = 2
    """Further tables of the stand-in's kind, for evaluation only: the first from its start, others from their own."""
    producer_steps: int = 2800
    producer_batch: int = 16

    def validate(self, reference: Tensor | None) -> None:
        """Raise TrainingError that names the argument and its bounds."""
        checks = (
            (2 <= self.components <= 64, "components", "2 to 64", self.components),
            (self.rotations >= 1, "rotations", "at least 1", self.rotations),
            (
                not self.bins or self.rotations <= len(self.bins),
                "rotations",
                "at most the number of bins",
                self.rotations,
            ),
            (all(count >= 0 for count in self.bins), "bins", "counts of images, none below 0", self.bins),
            (self.subset in ("own", "bootstrap", "shared"), "subset", "own, bootstrap or shared", self.subset),
            (self.regime in ("exposure", "disagreement"), "regime", "exposure or disagreement", self.regime),
            (self.start in ("normal", "mean"), "start", "normal or mean", self.start),
            (
                self.start != "mean" or reference is not None,
                "start",
                "normal, since the backbone has no table of its own",
                self.start,
            ),
            (self.start_spread > 0, "start-spread", "more than 0", self.start_spread),
            (self.anchor >= 0, "anchor", "at least 0", self.anchor),
            (self.steps >= 1 and self.batch >= 1, "steps and batch", "at least 1", (self.steps, self.batch)),
            (self.producer in ("stand-in", "reference"), "producer", "stand-in or reference", self.producer),
            (
                self.producer != "reference" or reference is not None,
                "producer",
                "stand-in, since the backbone has no table of its own",
                self.producer,
            ),
            (0 <= self.producers <= 64, "producers", "0 to 64", self.producers),
            (
                self.producer_steps >= 1 and self.producer_batch >= 1,
                "producer-steps and producer-batch",
                "at least 1",
                (self.producer_steps, self.producer_batch),
            ),
            (
                0 < self.condition_dropout < 1,
                "condition-dropout",
                "more than 0 and less than 1",
                self.condition_dropout,
            ),
        )
        for holds, name, expected, found in checks:
            if not holds:
                raise TrainingError(f"--{name} {found}: expected {expected}")


@dataclass
class TrainedTables:
    """Tables [R, M, K + 1, T, D], their starts, the images [R, M, K] and updates [R, M, K + 1] of each row."""

    tables: Tensor
    start: Tensor
    images: Tensor
    updates: Tensor
    overlap: Tensor
    """[R, K]: mean share of images that two components have in common, 1 when they saw the same ones."""
    seconds: dict[str, float]


@dataclass
class TrainedProducers:
    """Producer tables [R, K + 1, T, D], further ones [R, Q, K + 1, T, D], and draws of each row [R, 1 + Q, K + 1]."""

    producer: Tensor
    producers: Tensor
    draws: Tensor
    """Draws of the backbone's own rows are unknown: 0."""
    seconds: dict[str, float]


def bin_of(index: int, rotation: int, bins: tuple[int, ...]) -> int:
    """Images of class ``index`` in ``rotation``: in as many rotations as bins each class visits each bin once."""
    return bins[(index + rotation) % len(bins)]


def choose_images(classes: Tensor, labels: tuple[str, ...], settings: TableSettings) -> list[list[list[Tensor]]]:
    """Positions of the training images by rotation, component and class.

    Raises TrainingError for a class that has fewer images than its bin asks.
    """
    by_class = [torch.nonzero(classes == index).flatten() for index in range(len(labels))]
    chosen: list[list[list[Tensor]]] = []
    for rotation, shared in enumerate(production_images(classes, labels, settings)):
        counts = [len(images) for images in shared]
        components = []
        for component in range(settings.components):
            own = torch.Generator().manual_seed(_seed(settings.seed, rotation, component + 1, "images"))
            if settings.subset == "shared":
                picked = shared
            elif settings.subset == "own" and settings.bins:
                picked = [
                    pool[torch.randperm(len(pool), generator=own)[:count]]
                    for pool, count in zip(by_class, counts, strict=True)
                ]
            else:  # without bins a component's own images can only be a bootstrap of the class
                picked = [
                    pool[torch.randint(len(pool), (len(pool),), generator=own)] if len(pool) else pool
                    for pool in shared
                ]
            components.append(picked)
        chosen.append(components)
    return chosen


def production_images(classes: Tensor, labels: tuple[str, ...], settings: TableSettings) -> list[list[Tensor]]:
    """Positions of the images that production has, by rotation and class: what a producer is trained on.

    Raises TrainingError for a class that has fewer images than its bin asks.
    """
    by_class = [torch.nonzero(classes == index).flatten() for index in range(len(labels))]
    result = []
    for rotation in range(settings.rotations):
        counts = [
            bin_of(index, rotation, settings.bins) if settings.bins else len(pool)
            for index, pool in enumerate(by_class)
        ]
        for label, pool, count in zip(labels, by_class, counts, strict=True):
            if len(pool) < count:
                raise TrainingError(
                    f"class {label!r} has {len(pool)} images, its bin in rotation {rotation} asks for {count}"
                )
        common = torch.Generator().manual_seed(_seed(settings.seed, rotation, 0, "images"))
        result.append(
            [
                pool[torch.randperm(len(pool), generator=common)[:count]]
                for pool, count in zip(by_class, counts, strict=True)
            ]
        )
    return result


def overlap_of(chosen: list[list[list[Tensor]]]) -> Tensor:
    """[R, K]: the mean over pairs of components of |A and B| / |A or B|, the distinct images they saw."""
    result = []
    for components in chosen:
        row = []
        for index in range(len(components[0])):
            sets = [set(component[index].tolist()) for component in components]
            pairs = [(a, b) for position, a in enumerate(sets) for b in sets[position + 1 :]]
            row.append(sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / len(pairs))
        result.append(row)
    return torch.tensor(result)


def starts(settings: TableSettings, shape: tuple[int, int, int], reference: Tensor | None) -> Tensor:
    """Each member's own start [R, M, K + 1, T, D] from its own generator."""
    tables = [
        _start(settings, shape, reference, rotation, component + 1)
        for rotation in range(settings.rotations)
        for component in range(settings.components)
    ]
    return torch.stack(tables).view(settings.rotations, settings.components, *shape)


def _start(
    settings: TableSettings, shape: tuple[int, int, int], reference: Tensor | None, rotation: int, component: int
) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(settings.seed, rotation, component, "start"))
    table = settings.start_spread * torch.randn(shape, generator=generator)
    if settings.start == "mean":
        assert reference is not None
        table += reference.mean(0)
    return table


def train_tables(
    backbone: Backbone,
    latents: Tensor,
    classes: Tensor,
    labels: tuple[str, ...],
    settings: TableSettings,
    tokens: int = 1,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    device: torch.device | None = None,
    only: tuple[int, int] | None = None,
) -> TrainedTables:
    """Minimise each member's noise-prediction loss with Adam; nothing but the tables changes.

    latents [n,C,H,W] are scaled; classes int64 [n]. ``only`` trains the one table (rotation, component) and leaves the
    others at their starts. With ``checkpoint`` a run that was broken off goes on from it.
    Raises TrainingError for settings out of bounds or a class with too few images.
    """
    settings.validate(backbone.reference)
    _check_reference(backbone, labels, tokens)
    chosen = choose_images(classes, labels, settings)
    everyone = [
        (rotation, component) for rotation in range(settings.rotations) for component in range(settings.components)
    ]
    training = everyone if only is None else [only]
    start = starts(settings, (len(labels) + 1, tokens, backbone.context_dim), backbone.reference)
    jobs = [Job(chosen[r][m], start[r, m], _seed(settings.seed, r, m + 1, "steps")) for r, m in training]
    kept = Checkpoints(checkpoint, checkpoint_every, _identity(settings, MEMBERS_ALONE, backbone, classes, labels))
    tables, updates, seconds = _train(backbone, latents, jobs, settings, kept, device or torch.device("cpu"), "tables")
    result = start.clone()
    all_updates = torch.zeros(settings.rotations, settings.components, len(labels) + 1, dtype=torch.int64)
    for position, (rotation, component) in enumerate(training):
        result[rotation, component] = tables[position]
        all_updates[rotation, component] = updates[position]
    images = torch.tensor(
        [[[len(images) for images in component] for component in components] for components in chosen]
    )
    return TrainedTables(result, start, images, all_updates, overlap_of(chosen), seconds)


def train_producers(
    backbone: Backbone,
    latents: Tensor,
    classes: Tensor,
    labels: tuple[str, ...],
    settings: TableSettings,
    tokens: int = 1,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    device: torch.device | None = None,
) -> TrainedProducers:
    """Train the stand-in and the further producers of every rotation, each on all of production's images.

    They share images, regime and rate with each other and have ``producer_steps`` of ``producer_batch`` rows. The first
    of the further ones has the stand-in's start and another order and noise; others also have their own start.
    """
    settings.validate(backbone.reference)
    _check_reference(backbone, labels, tokens)
    shape = (len(labels) + 1, tokens, backbone.context_dim)
    first = 0 if settings.producer == "stand-in" else 1
    numbers = range(first, 1 + settings.producers)
    jobs = []
    for rotation, images in enumerate(production_images(classes, labels, settings)):
        for number in numbers:
            begun = settings.components + 1 + (0 if number <= 1 else number)
            start = _start(settings, shape, backbone.reference, rotation, begun)
            order = settings.components + 1 + number
            jobs.append(Job(images, start, _seed(settings.seed, rotation, order, "steps")))
    longer = replace(settings, steps=settings.producer_steps, batch=settings.producer_batch, anchor=0.0)
    kept = Checkpoints(checkpoint, checkpoint_every, _identity(settings, (), backbone, classes, labels))
    seconds = {"wall_seconds": 0.0, "processor_seconds": 0.0}
    tables = torch.zeros(settings.rotations, 1 + settings.producers, *shape)
    draws = torch.zeros(settings.rotations, 1 + settings.producers, len(labels) + 1, dtype=torch.int64)
    if jobs:
        trained, updates, seconds = _train(
            backbone, latents, jobs, longer, kept, device or torch.device("cpu"), "producers"
        )
        tables[:, first:] = trained.view(settings.rotations, len(numbers), *shape)
        draws[:, first:] = updates.view(settings.rotations, len(numbers), -1)
    if first == 1:
        assert backbone.reference is not None
        tables[:, 0] = backbone.reference.cpu()
    return TrainedProducers(tables[:, 0], tables[:, 1:], draws, seconds)


MEMBERS_ALONE = ("producer", "producers", "producer_steps", "producer_batch")
"""Settings that change nothing about the members."""


@dataclass(frozen=True)
class Job:
    """One table to train: the images of each class, its start [K + 1, T, D], the seed of its order and noise."""

    images: list[Tensor]
    start: Tensor
    seed: int


@dataclass(frozen=True)
class Checkpoints:
    """Where a training keeps its state, every how many steps, and what must not change in between."""

    path: Path | None
    every: int
    identity: dict[str, Any]


def _identity(
    settings: TableSettings, ignored: tuple[str, ...], backbone: Backbone, classes: Tensor, labels: tuple[str, ...]
) -> dict[str, Any]:
    named = {name: str(value) for name, value in asdict(settings).items() if name not in ignored}
    return named | {"backbone": backbone.digest(), "images": _digest(classes, labels)}


def _check_reference(backbone: Backbone, labels: tuple[str, ...], tokens: int) -> None:
    if backbone.reference is not None and (
        len(backbone.reference) != len(labels) + 1 or backbone.reference.shape[1] != tokens
    ):
        raise TrainingError(
            f"the backbone's own table has shape {list(backbone.reference.shape)}, expected [{len(labels) + 1}, "
            f"{tokens}, {backbone.context_dim}]"
        )


def _train(
    backbone: Backbone,
    latents: Tensor,
    jobs: list[Job],
    settings: TableSettings,
    kept: Checkpoints,
    device: torch.device,
    name: str,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Train all jobs at once: their tables [J, K + 1, T, D] on the CPU, draws of each row [J, K + 1], and the time."""
    draws = [_Drawing(job.images, settings, job.seed) for job in jobs]
    anchors = torch.stack([job.start for job in jobs]).to(device)
    rows_of_table = anchors.shape[1]
    tables = nn.Parameter(anchors.clone())
    optimizer = torch.optim.Adam([tables], lr=settings.rate)
    updates = torch.zeros(len(jobs), rows_of_table, dtype=torch.int64)
    # Weight of the prior by row: lambda / n_k of the mean loss; the unconditional row counts all images.
    counts = torch.tensor([[len(images) for images in job.images] for job in jobs], dtype=torch.float32)
    prior = (settings.anchor / torch.cat([counts, counts.sum(1, keepdim=True)], 1).clamp(min=1e-3)).to(device)
    first, clock = 0, Clock()
    if kept.path is not None and (state := load_checkpoint(kept.path, kept.identity)):
        tables.data.copy_(state["tables"])
        optimizer.load_state_dict(state["optimizer"])
        updates.copy_(state["updates"])
        for drawing, generator in zip(draws, state["generators"], strict=True):
            drawing.generator.set_state(generator)
        first, clock = state["step"], Clock(state["clock"]["wall_seconds"], state["clock"]["processor_seconds"])

    def save(step: int) -> None:
        if kept.path is not None:
            state = {"tables": tables.detach().cpu(), "optimizer": optimizer.state_dict(), "updates": updates}
            generators = [drawing.generator.get_state() for drawing in draws]
            begun = {"settings": kept.identity, "step": step, "clock": clock.read()}
            save_checkpoint(kept.path, {**begun, "generators": generators, **state})

    table_index = torch.arange(len(jobs)).repeat_interleave(settings.batch)
    progress = Progress(name, first, settings.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, settings.steps, settings.rate)
        batches = [drawing.next(backbone.schedule.train_timesteps, latents.shape[1:]) for drawing in draws]
        picked, rows, index, noise = (torch.cat(part) for part in zip(*batches, strict=True))
        clean, timestep = latents[picked], backbone.schedule.times(index)
        noisy = backbone.schedule.noisy(clean, noise, timestep).to(device)
        context = tables[table_index.to(device), rows.to(device)]
        with mixed_precision(device):
            prediction = backbone.denoiser(noisy, timestep.to(device), context)
        error = (
            (prediction.float() - backbone.schedule.target(clean, noise, timestep).to(device))
            .square()
            .mean(dim=(1, 2, 3))
        )
        # Summed over tables: each table's gradient is what it would be alone.
        loss = error.sum() / settings.batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.anchor:
            _pull_to_anchors(tables, anchors, prior, counts.to(device), settings)
        optimizer.step()
        updates.view(-1).index_add_(0, table_index * rows_of_table + rows, torch.ones_like(rows))
        progress.loss(loss.detach() / len(jobs))
        if (step + 1) % kept.every == 0:
            save(step + 1)
    if first < settings.steps:
        save(settings.steps)
    return tables.detach().cpu(), updates, clock.read()


def _pull_to_anchors(
    tables: nn.Parameter, anchors: Tensor, prior: Tensor, counts: Tensor, settings: TableSettings
) -> None:
    """Add the prior's gradient, weighted by the row's share of the drawn rows, so that its minimum stays put."""
    drawn = counts if settings.regime == "exposure" else (counts > 0).float()
    share = drawn / drawn.sum(1, keepdim=True)
    dropout = settings.condition_dropout
    share = torch.cat([share * (1 - dropout), torch.full_like(share[:, :1], dropout)], 1)
    assert tables.grad is not None
    tables.grad += (share * prior)[..., None, None] * (tables.detach() - anchors)


class _Drawing:
    """One table's rows of a step: images, their rows of the table, timesteps and noise, from its own generator."""

    def __init__(self, images: list[Tensor], settings: TableSettings, seed: int) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = torch.tensor([len(part) for part in images])
        self.offsets = torch.cumsum(self.counts, 0) - self.counts
        self.pool = torch.cat(images)
        self.classes = torch.repeat_interleave(torch.arange(len(images)), self.counts)
        self.drawable = torch.nonzero(self.counts).flatten()
        if len(self.pool) == 0:
            raise TrainingError("every class has 0 images: expected at least one image for each component")

    def next(self, timesteps: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, generator = self.settings.batch, self.generator
        if self.settings.regime == "exposure":
            position = torch.randint(len(self.pool), (batch,), generator=generator)
        else:
            label = self.drawable[torch.randint(len(self.drawable), (batch,), generator=generator)]
            position = self.offsets[label] + (torch.rand(batch, generator=generator) * self.counts[label]).long()
        dropped = torch.rand(batch, generator=generator) < self.settings.condition_dropout
        rows = torch.where(dropped, len(self.counts), self.classes[position])
        timestep = torch.randint(timesteps, (batch,), generator=generator)
        return self.pool[position], rows, timestep, torch.randn((batch, *shape), generator=generator)


def _digest(classes: Tensor, labels: tuple[str, ...]) -> str:
    """Says whether a run goes on with the same classes in the same order, and as many images of each."""
    return hashlib.sha256(json.dumps([labels, classes.tolist()]).encode()).hexdigest()[:16]


def _seed(seed: int, rotation: int, component: int, purpose: str) -> int:
    """A seed of its own for every table and purpose."""
    purposes = ("images", "start", "steps")
    return ((seed * 1009 + rotation) * 1009 + component) * len(purposes) + purposes.index(purpose)
