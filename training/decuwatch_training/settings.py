"""The scores that an evaluation compares: estimators, branches, roll-outs, sums of branches, fewer components."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from decuwatch_training.branch import Branch
from decuwatch_training.measure import FRACTIONS, Shard, branch_step
from decuwatch_training.paide import mean_pairwise, paide
from decuwatch_training.quality import Cells

SUMS = (("25%", "50%"), ("50%", "75%"), ("25%", "50%", "75%"), ("first", "25%", "50%", "75%", "last"))


@dataclass(frozen=True)
class Setting:
    """One way to score a request; ``branches`` has several entries for a sum over branch points of the shared path."""

    steps: int
    guidance: float
    branches: tuple[Branch, ...]
    estimator: str
    components: int
    point: str
    """How tables name the branch: ``first``, ``50%``, ``first, 4 steps`` and so on."""

    @property
    def rows(self) -> int:
        """Rows of U-Net work for one request: the shared path once, and every branch."""
        shared = max(branch.step for branch in self.branches)
        fanned = self.components * sum(branch.rollout for branch in self.branches)
        return (1 if self.guidance == 1.0 else 2) * (shared + fanned)

    @property
    def name(self) -> str:
        """One line for tables and reasons."""
        fewer = f", M = {self.components}" if self.components == 3 else ""
        return f"S = {self.steps}, g = {self.guidance:g}, {self.point}, {self.estimator}{fewer}"


def settings_of(shard: Shard, components: int) -> Iterator[Setting]:
    """All settings that a shard's measurements allow."""
    steps, guidance = shard.steps, shard.guidance
    points = {point: branch_step(fraction, shard.count) for point, fraction in FRACTIONS.items()}
    for point, step in points.items():
        for estimator in ("paide-w2", "mean-w2", "pixel-paide-w2", "paide-kl", "paide-bhattacharyya"):
            yield Setting(steps, guidance, (Branch(step, 1),), estimator, components, point)
        if components > 3:
            yield Setting(steps, guidance, (Branch(step, 1),), "mean-w2", 3, point)
    for chosen in SUMS:
        branches = tuple(Branch(points[point], 1) for point in chosen)
        if len(set(branches)) == len(branches):
            for estimator in ("mean-w2", "log mean-w2"):
                yield Setting(steps, guidance, branches, estimator, components, f"sum of {' + '.join(chosen)}")
    for step, rollout in sorted(shard.distances):
        if rollout > 1:
            where = "first" if step == 0 else "50%"
            name = f"{where}, {'all ' if step + rollout == shard.count else ''}{rollout} steps"
            for estimator in ("paide-w2", "mean-w2"):
                yield Setting(steps, guidance, (Branch(step, rollout),), estimator, components, name)
            if components > 3:
                yield Setting(steps, guidance, (Branch(step, rollout),), "mean-w2", 3, name)


def scores_of(shards: Sequence[Shard], setting: Setting, components: int) -> np.ndarray:
    """Scores of all requests of the shards, one after another."""
    return np.concatenate([_scores(shard, setting, components) for shard in shards])


def _scores(shard: Shard, setting: Setting, components: int) -> np.ndarray:
    first = setting.branches[0]
    key = (first.step, first.rollout)
    if setting.estimator == "pixel-paide-w2":
        return shard.pixel[key]
    matrices = [_matrix(shard.distances[branch.step, branch.rollout], components) for branch in setting.branches]
    if setting.components < components:
        matrices = [_subset(matrix, shard.carriers, setting.components) for matrix in matrices]
    if setting.estimator == "mean-w2":
        return np.asarray(sum(mean_pairwise(matrix) for matrix in matrices))
    if setting.estimator == "log mean-w2":
        return np.asarray(sum(mean_pairwise(matrix).clamp(min=1e-300).log() for matrix in matrices))
    width = {"paide-w2": 1.0, "paide-kl": 2 * shard.variance[key], "paide-bhattacharyya": 8 * shard.variance[key]}[
        setting.estimator
    ]
    return np.asarray(paide(matrices[0] / width))


def saturated_share(scores: np.ndarray, components: int) -> float:
    """Share of PaiDE scores that are at ln M to within a millionth."""
    return float((scores >= np.log(components) * (1 - 1e-6)).mean())


def _matrix(pairs: np.ndarray, components: int) -> torch.Tensor:
    upper = torch.triu_indices(components, components, 1)
    matrix = torch.zeros(len(pairs), components, components, dtype=torch.float64)
    matrix[:, upper[0], upper[1]] = torch.from_numpy(pairs)
    return matrix + matrix.transpose(1, 2)


def _subset(matrix: torch.Tensor, carriers: np.ndarray, kept: int) -> torch.Tensor:
    """The carrier and the components that follow it."""
    components = matrix.shape[-1]
    chosen = (torch.from_numpy(carriers)[:, None] + torch.arange(kept)) % components
    rows = torch.arange(len(matrix))[:, None, None]
    return matrix[rows, chosen[:, :, None], chosen[:, None, :]]


def cells_of(shards: Iterable[Shard]) -> Cells:
    """Bin, class and cell of every request of the shards, in the order of ``scores_of``."""
    ordered = list(shards)
    cells = [shard.rotation * 100_000 + shard.classes for shard in ordered]
    return Cells(
        np.concatenate([shard.bins for shard in ordered]),
        np.concatenate([shard.classes for shard in ordered]),
        np.concatenate(cells),
    )
