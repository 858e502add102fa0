"""Pairwise-distance estimators of epistemic uncertainty (Kolchinsky, Tracey 2017; Berry, Meger, PaiDE).

With weights 1/M:  I = - sum_i 1/M ln( sum_j 1/M exp(-D(p_i || p_j)) )  in nats, 0 <= I <= ln M.
"""

import math

import torch
from torch import Tensor

ESTIMATORS = ("paide-w2", "paide-kl", "paide-bhattacharyya", "mean-w2", "pixel-paide-w2")
NEED_VARIANCE = ("paide-kl", "paide-bhattacharyya")


def squared_distances(means: Tensor) -> Tensor:
    """|mu_i - mu_j|^2 summed over the last dimension: [..., M, d] to [..., M, M]. In float64."""
    means = means.double()
    return (means.unsqueeze(-2) - means.unsqueeze(-3)).square().sum(-1)


def paide(distances: Tensor) -> Tensor:
    """I of pairwise distances [..., M, M], by log-sum-exp; at most ln M, which it meets exactly when saturated."""
    components = distances.shape[-1]
    inner = torch.logsumexp(-distances, dim=-1) - math.log(components)
    return -inner.mean(-1)


def mean_pairwise(distances: Tensor) -> Tensor:
    """Mean of the M (M - 1) distances between different components: [..., M, M] to [...]. Cannot saturate."""
    components = distances.shape[-1]
    return distances.sum((-1, -2)) / (components * (components - 1))


def estimate(estimator: str, means: Tensor, variance: float) -> Tensor:
    """One score for each request: ``means`` [n, M, C, H, W] to [n].

    ``variance`` is that of every dimension of the step's Gaussian, for paide-kl and paide-bhattacharyya: with equal
    variances KL is |mu_i - mu_j|^2 / 2 s^2 and Bhattacharyya's distance |mu_i - mu_j|^2 / 8 s^2. The other estimators
    do not use it.
    """
    flat = squared_distances(means.flatten(2))
    if estimator == "paide-w2":
        return paide(flat)
    if estimator == "mean-w2":
        return mean_pairwise(flat)
    if estimator == "paide-kl":
        return paide(flat / (2 * variance))
    if estimator == "paide-bhattacharyya":
        return paide(flat / (8 * variance))
    if estimator == "pixel-paide-w2":
        positions = means.flatten(3).permute(0, 3, 1, 2)  # [n, H W, M, C]
        return paide(squared_distances(positions)).mean(-1)
    raise ValueError(f"estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}")
