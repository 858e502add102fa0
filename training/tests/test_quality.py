"""Statistics against scikit-learn and scipy, and what intervals are made of."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from decuwatch_training.quality import (
    Cells,
    auroc,
    auroc_by_bin,
    auroc_same_class,
    detection,
    false_alarms,
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


def test_within_cells_of_several_tables_is_the_mean_over_them() -> None:
    chosen, generator = cells(), np.random.default_rng(5)
    scores, errors = generator.random(len(chosen.bins)), generator.random((3, len(chosen.bins)))
    found = within_cells(scores, errors, chosen).value
    assert found == pytest.approx(np.mean([within_cells(scores, each, chosen).value for each in errors]))
    assert within_cells(errors, errors, chosen).value == pytest.approx(1)
    assert within_cells(scores, errors, chosen, 1.0).value == pytest.approx(
        np.mean([within_cells(scores, each, chosen, 1.0).value for each in errors])
    )


def test_wrong_images_are_found_overall_and_within_cells() -> None:
    chosen, generator = cells(seeds=50), np.random.default_rng(6)
    wrong = generator.random(len(chosen.bins)) < np.where(chosen.bins == 1, 0.6, 0.1)
    wrong[chosen.cells == chosen.cells[0]] = False  # a cell without wrong images has no AUROC of its own
    scores = generator.random(len(wrong)) + wrong
    found = detection(scores, wrong, chosen, replicates=100)
    assert found.auroc.value == pytest.approx(roc_auc_score(wrong, scores))
    assert found.auprc == pytest.approx(average_precision_score(wrong, scores))
    assert found.cells == 7
    assert found.auroc.low <= found.auroc.value <= found.auroc.high
    by_class = detection(1 / chosen.bins, wrong, chosen)  # a table by class finds them overall, and never within
    assert by_class.auroc.value > 0.7
    assert by_class.within.value == 0.5
    assert np.isnan(detection(scores, np.zeros(len(wrong), bool), chosen).auroc.value)


def test_false_alarms_are_counted_on_scores_that_were_not_calibrated_on() -> None:
    generator = np.random.default_rng(7)
    groups = np.repeat(np.arange(20), 400)
    scores = generator.random(len(groups)) + groups  # each class has its own scale
    total, by_group = false_alarms(scores, groups)
    assert (total.scores, len(by_group)) == (20 * 200, 20)
    assert total.low <= total.alarms <= total.high
    assert 0.03 < total.low / total.scores < 0.05 < total.high / total.scores < 0.07
    assert all(rate.low <= 0.05 * rate.scores <= rate.high for rate in by_group.values())
    drifted = scores + np.where(np.arange(len(groups)) % 2 == 1, 0.1, 0)
    assert false_alarms(drifted, groups)[0].alarms > total.high
    assert false_alarms(scores[::25], groups[::25])[0].scores == 0  # 8 scores cannot carry a rate of 5%
