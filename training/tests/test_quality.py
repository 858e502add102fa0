"""Statistics against scikit-learn and scipy, and what intervals are made of."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from decuwatch_training.quality import (
    Cells,
    auroc,
    auroc_by_bin,
    auroc_same_class,
    mean_by_bin,
    roc_auc,
    true_positive_rate,
    within_cells,
)


def test_auroc_is_scikit_learns() -> None:
    generator = np.random.default_rng(1)
    positive, negative = generator.integers(0, 20, 50).astype(float), generator.integers(0, 15, 70).astype(float)
    assert auroc(positive, negative) == pytest.approx(roc_auc(positive, negative))


def test_true_positive_rate_at_a_false_alarm_rate() -> None:
    negative = np.arange(200.0)
    positive = np.array([0.0, 150.0, 198.5, 300.0])
    assert true_positive_rate(positive, negative, at=0.01) == 0.5


def cells(rotations: int = 2, classes: int = 4, seeds: int = 6) -> Cells:
    index = np.arange(rotations * classes * seeds)
    rotation, label = index // (classes * seeds), index // seeds % classes
    return Cells(np.where((label + rotation) % 2, 1.0, 100.0), label, rotation * 100_000 + label)


def test_scores_of_the_class_alone_win_nothing_on_the_same_class() -> None:
    chosen = cells()
    scores = chosen.classes + np.random.default_rng(2).normal(0, 1e-3, len(chosen.classes))
    value, at_99, classes = auroc_same_class(scores, chosen, 1.0)
    assert classes == 4
    assert 0.2 < value < 0.8
    assert at_99 < 4


def test_perfect_scores() -> None:
    chosen = cells()
    scores = -chosen.bins + np.random.default_rng(3).random(len(chosen.bins))
    estimate = auroc_by_bin(scores, chosen, 1.0, replicates=50)
    assert (estimate.value, estimate.low, estimate.high) == (1, 1, 1)
    assert auroc_same_class(scores, chosen, 1.0) == (1, 4, 4)
    assert mean_by_bin(scores, chosen)["1"].value > mean_by_bin(scores, chosen)["100"].value


def test_within_cells_does_not_see_what_lies_between_cells() -> None:
    chosen = cells(seeds=40)
    generator = np.random.default_rng(4)
    errors = generator.random(len(chosen.bins)) + 10 * chosen.cells
    scores = generator.random(len(chosen.bins)) + 10 * chosen.cells
    assert spearmanr(scores, errors).statistic > 0.9
    assert abs(within_cells(scores, errors, chosen).value) < 0.2
    each = [
        spearmanr(scores[chosen.cells == cell], errors[chosen.cells == cell]).statistic
        for cell in np.unique(chosen.cells)
    ]
    assert within_cells(scores, errors, chosen).value == pytest.approx(np.mean(each))
    assert within_cells(errors, errors, chosen, replicates=20).low == pytest.approx(1)
