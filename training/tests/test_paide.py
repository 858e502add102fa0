"""The estimators against sums written out, and their bounds."""

import math

import pytest
import torch

from decuwatch_training.paide import estimate, mean_pairwise, paide, squared_distances


def test_against_the_formula_written_out() -> None:
    means = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distances = squared_distances(means)
    for request in range(3):
        total = 0.0
        pairs = []
        for i in range(4):
            inner = 0.0
            for j in range(4):
                distance = sum(float(means[request, i, d] - means[request, j, d]) ** 2 for d in range(5))
                assert float(distances[request, i, j]) == pytest.approx(distance)
                inner += math.exp(-distance) / 4
                pairs += [distance] if i != j else []
            total -= math.log(inner) / 4
        assert float(paide(distances)[request]) == pytest.approx(total)
        assert float(mean_pairwise(distances)[request]) == pytest.approx(sum(pairs) / len(pairs))


def test_bounds_and_saturation() -> None:
    same = torch.zeros(1, 5, 2, 4, 4)
    far = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(1, 5, 2, 4, 4) * 1e6
    for estimator in ("paide-w2", "paide-kl", "paide-bhattacharyya", "pixel-paide-w2"):
        assert float(estimate(estimator, same, 1.0)) == pytest.approx(0, abs=1e-12)
        assert float(estimate(estimator, far, 1.0)) == pytest.approx(math.log(5))
    assert float(estimate("mean-w2", far, 1.0)) > 1e12


def test_distances_of_gaussians_with_equal_variance() -> None:
    """KL(N(a, s^2), N(b, s^2)) = |a - b|^2 / 2 s^2, Bhattacharyya |a - b|^2 / 8 s^2: torch and quadrature agree."""
    a, b, variance = 0.3, 1.1, 0.5
    means = torch.tensor([a, b]).view(1, 2, 1, 1, 1)
    first, second = (torch.distributions.Normal(mean, math.sqrt(variance)) for mean in (a, b))
    divergence = float(torch.distributions.kl_divergence(first, second))
    x = torch.linspace(-10, 12, 200_001, dtype=torch.float64)
    overlap = float(torch.trapezoid((0.5 * (first.log_prob(x) + second.log_prob(x))).exp(), x))
    for estimator, distance in (("paide-kl", divergence), ("paide-bhattacharyya", -math.log(overlap))):
        expected = -math.log(0.5 + 0.5 * math.exp(-distance))
        assert float(estimate(estimator, means, variance)) == pytest.approx(expected, rel=1e-5)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        estimate("paide", torch.zeros(1, 2, 1, 1, 1), 1.0)
