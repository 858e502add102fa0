"""How good a score is: at the class level (does it find under-sampled classes?) and at the request level (does it rank
the requests of one class by their error?). Independent samples are cells, a class in a rotation, not requests:
intervals come from resampling cells.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


@dataclass(frozen=True)
class Cells:
    """Which bin, class and cell (class in a rotation) each of n requests belongs to."""

    bins: np.ndarray
    classes: np.ndarray
    cells: np.ndarray

    @property
    def sizes(self) -> list[float]:
        """The bins' sizes, smallest first."""
        return sorted({float(value) for value in self.bins})


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over resampled cells."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        """``.997 [.990, 1.00]``"""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half."""
    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the precision-recall curve."""
    return float(average_precision_score(*_labelled(positive, negative)))


def true_positive_rate(positive: np.ndarray, negative: np.ndarray, at: float = 0.01) -> float:
    """Largest share of positives above a threshold that at most a share ``at`` of the negatives passes."""
    false, true, _ = roc_curve(*_labelled(positive, negative), drop_intermediate=False)
    return float(true[false <= at].max())


def roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """scikit-learn's AUROC, which tests hold ``auroc`` against."""
    return float(roc_auc_score(*_labelled(positive, negative)))


def _labelled(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.ones(len(positive)), np.zeros(len(negative))]), np.concatenate([positive, negative])


def auroc_by_bin(scores: np.ndarray, cells: Cells, size: float, replicates: int = 0, seed: int = 0) -> Estimate:
    """AUROC of one bin against the largest; the interval resamples the cells of each."""
    sizes = cells.sizes
    groups = [_by_cell(scores, cells, wanted) for wanted in (size, sizes[-1])]
    value = auroc(np.concatenate(groups[0]), np.concatenate(groups[1]))
    if not replicates:
        return Estimate(value, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    # [replicates, requests]: all replicates are ranked at once.
    resampled = [
        np.stack(group)[generator.integers(len(group), size=(replicates, len(group)))].reshape(replicates, -1)
        for group in groups
    ]
    n, m = resampled[0].shape[1], resampled[1].shape[1]
    ranks = rankdata(np.concatenate(resampled, axis=1), axis=1)
    drawn = (ranks[:, :n].sum(1) - n * (n + 1) / 2) / (n * m)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def auroc_same_class(scores: np.ndarray, cells: Cells, size: float) -> tuple[float, int, int]:
    """One bin's requests against the largest bin's, by class: mean AUROC, classes at 0.99 or more, classes."""
    values = []
    for label in np.unique(cells.classes):
        own = cells.classes == label
        positive, negative = scores[own & (cells.bins == size)], scores[own & (cells.bins == cells.sizes[-1])]
        if len(positive) and len(negative):
            values.append(auroc(positive, negative))
    return float(np.mean(values)) if values else float("nan"), sum(value >= 0.99 for value in values), len(values)


def rank_correlation(scores: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho."""
    return float(spearmanr(scores, other).statistic)


def mean_by_bin(scores: np.ndarray, cells: Cells, replicates: int = 0, seed: int = 0) -> dict[str, Estimate]:
    """Mean score of each bin; the interval resamples its cells."""
    result = {}
    for size in cells.sizes:
        means = np.array([group.mean() for group in _by_cell(scores, cells, size)])
        result[f"{size:g}"] = _resampled_mean(means, replicates, seed)
    return result


def within_cells(
    scores: np.ndarray, errors: np.ndarray, cells: Cells, size: float | None = None, replicates: int = 0, seed: int = 0
) -> Estimate:
    """Spearman's rho between scores and errors of a cell's requests, averaged over the cells of one bin, or of all."""
    chosen = np.ones(len(scores), bool) if size is None else cells.bins == size
    own = Cells(cells.bins[chosen], cells.classes[chosen], cells.cells[chosen])
    ranks = [rankdata(np.stack(_cells(values[chosen], own.cells)), axis=1) for values in (scores, errors)]
    centred = [matrix - matrix.mean(1, keepdims=True) for matrix in ranks]
    with np.errstate(invalid="ignore"):  # scores that are all alike have no rank correlation
        values = (centred[0] * centred[1]).sum(1) / np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return _resampled_mean(values, replicates, seed)


def variation_within_cells(scores: np.ndarray, cells: Cells) -> float:
    """Standard deviation / mean, averaged over the largest bin's cells: how seeds of a well-sampled class differ."""
    groups = _by_cell(scores, cells, cells.sizes[-1])
    return float(np.mean([group.std(ddof=1) / group.mean() for group in groups]))


def _resampled_mean(values: np.ndarray, replicates: int, seed: int) -> Estimate:
    if not replicates:
        return Estimate(float(values.mean()), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    drawn = values[generator.integers(len(values), size=(replicates, len(values)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def _by_cell(scores: np.ndarray, cells: Cells, size: float) -> list[np.ndarray]:
    chosen = cells.bins == size
    return _cells(scores[chosen], cells.cells[chosen])


def _cells(values: np.ndarray, cells: np.ndarray) -> list[np.ndarray]:
    """The values of each cell; every cell has as many requests as the others."""
    order = np.argsort(cells, kind="stable")
    return np.split(values[order], len(np.unique(cells)))
