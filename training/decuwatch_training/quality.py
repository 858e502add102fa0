"""How good a score is: at the class level (does it find under-sampled classes?) and at the request level (does it rank
the requests of one class by their error?). Independent samples are cells, a class in a rotation, not requests:
intervals come from resampling cells.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import betabinom, rankdata, spearmanr
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
    """Spearman's rho between scores [n] and errors [n] of a cell's requests, averaged over the cells of one bin, or of
    all. With errors [Q, n] of several tables, and scores [n] or [Q, n], it is averaged over them as well.
    """
    chosen = np.ones(scores.shape[-1], bool) if size is None else cells.bins == size
    every = np.atleast_2d(errors)
    pairs = zip(np.broadcast_to(scores, every.shape), every, strict=True)
    values = np.mean([_correlations(one[chosen], other[chosen], cells.cells[chosen]) for one, other in pairs], axis=0)
    return _resampled_mean(values, replicates, seed)


def _correlations(scores: np.ndarray, errors: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Spearman's rho of each cell; NaN for scores that are all alike, which have none."""
    ranks = [rankdata(np.stack(_cells(values, cells)), axis=1) for values in (scores, errors)]
    centred = [matrix - matrix.mean(1, keepdims=True) for matrix in ranks]
    with np.errstate(invalid="ignore"):
        return (centred[0] * centred[1]).sum(1) / np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))


@dataclass(frozen=True)
class Detection:
    """How well scores find wrong images; NaN if all are right, or all wrong."""

    auroc: Estimate
    auprc: float
    tpr_at_5pct_fpr: float
    within: Estimate
    """AUROC within a cell, averaged over the cells that have right and wrong images."""
    cells: int
    """Their number."""


def detection(scores: np.ndarray, wrong: np.ndarray, cells: Cells, replicates: int = 0, seed: int = 0) -> Detection:
    """Of scores [n] against ``wrong`` bool [n]; intervals resample cells."""
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    if wrong.all() or not wrong.any():
        return Detection(nothing, float("nan"), float("nan"), nothing, 0)
    groups = [(scores[cells.cells == cell], wrong[cells.cells == cell]) for cell in np.unique(cells.cells)]
    inside = np.array([auroc(s[w], s[~w]) for s, w in groups if w.any() and not w.all()])
    value = auroc(scores[wrong], scores[~wrong])
    pooled = Estimate(value, float("nan"), float("nan"))
    if replicates:
        generator, drawn = np.random.default_rng(seed), []
        for _ in range(replicates):
            picked = [groups[index] for index in generator.integers(len(groups), size=len(groups))]
            own, which = (np.concatenate(parts) for parts in zip(*picked, strict=True))
            if which.any() and not which.all():
                drawn.append(auroc(own[which], own[~which]))
        if drawn:
            low, high = np.quantile(drawn, (0.025, 0.975))
            pooled = Estimate(value, float(low), float(high))
    return Detection(
        pooled,
        average_precision(scores[wrong], scores[~wrong]),
        true_positive_rate(scores[wrong], scores[~wrong], 0.05),
        _resampled_mean(inside, replicates, seed) if len(inside) else nothing,
        len(inside),
    )


@dataclass(frozen=True)
class AlarmRate:
    """Alarms among scores that the threshold was not calibrated on."""

    alarms: int
    scores: int
    low: int
    high: int
    """The range that holds 95% of such counts if calibrated and counted scores have one distribution."""


def false_alarms(
    scores: np.ndarray, groups: np.ndarray, rate: float = 0.05, draws: int = 20_000
) -> tuple[AlarmRate, dict[int, AlarmRate]]:
    """Calibrate a threshold on every other score of each group, and count the rest above it: over all groups, by group.

    The threshold is the k-th smallest of n scores, k = ceil((1 - rate) (n + 1)), as in conformal prediction. The share
    of further scores above it is then Beta(n + 1 - k, k) distributed, so a count is beta-binomial. Groups whose half
    is too small for the rate (k > n) are left out.
    """
    result, simulated = {}, np.zeros(draws, np.int64)
    for group in np.unique(groups).tolist():
        own = scores[groups == group]
        calibrated, rest = np.sort(own[::2]), own[1::2]
        n, m = len(calibrated), len(rest)
        k = int(np.ceil((1 - rate) * (n + 1)))
        if k > n or not m:
            continue
        spread = betabinom(m, n + 1 - k, k)
        low, high = (int(value) for value in spread.ppf((0.025, 0.975)))
        result[group] = AlarmRate(int((rest > calibrated[k - 1]).sum()), m, low, high)
        simulated += spread.rvs(draws, random_state=np.random.default_rng(group))
    low, high = (int(value) for value in np.quantile(simulated, (0.025, 0.975)))
    rates = result.values()
    return AlarmRate(sum(r.alarms for r in rates), sum(r.scores for r in rates), low, high), result


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
