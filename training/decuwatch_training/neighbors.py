"""Exact nearest neighbors and groups of near duplicates, in blocks: memory does not grow with n squared."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

SPARE = 8
"""Candidates beyond k. Blocks are compared in float32; the candidates' distances are then computed again in float64."""
PAIRS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Neighbors:
    """``index`` int64 [n, k] and ``distance`` float64 [n, k], nearest first; -1 and infinity if there are fewer than k.

    ``groups`` int64 [n]: points have the same number if a chain of pairs nearer than the radius joins them.
    """

    index: Tensor
    distance: Tensor
    groups: Tensor


class _Groups:
    """Connected components that grow pair by pair."""

    def __init__(self, first: np.ndarray) -> None:
        self.of = first

    def apart(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.flatnonzero(self.of[left] != self.of[right])

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        if len(left):
            edges = coo_array((np.ones(len(left), np.int8), (self.of[left], self.of[right])), shape=(len(self.of),) * 2)
            self.of = connected_components(edges, directed=False)[1].astype(np.int64)[self.of]


def search(
    points: Tensor, contents: Tensor, k: int, radius: float, block: int = 4096, progress: bool = False
) -> Neighbors:
    """The k nearest neighbors of every point by Euclidean distance, and the groups of points nearer than ``radius``.

    points float32 [n, D]; contents int64 [n], from 0 to n - 1, equal if two points show the same picture. Points of one
    content are in one group and never each other's neighbors. Memory grows with n D, n k and block^2.
    """
    count = len(points)
    if not count:
        return Neighbors(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k, dtype=torch.float64), contents)
    centered = points - points.mean(0)  # so that little cancels
    squares = centered.square().sum(1)
    bound = radius**2 + 1e-5 * float(squares.max())  # float32's error is well below
    groups = _Groups(contents.numpy().copy())
    kept_index = torch.full((count, k), -1)
    kept_distance = torch.full((count, k), torch.inf, dtype=torch.float64)
    starts = range(0, count, block)
    for first in tqdm(starts, desc="neighbors", unit="block", mininterval=1.0, disable=not progress):
        rows = slice(first, min(first + block, count))
        nearest, index = torch.empty(rows.stop - first, 0), torch.empty(rows.stop - first, 0, dtype=torch.int64)
        for start in starts:
            columns = slice(start, min(start + block, count))
            squared = torch.addmm(squares[columns][None], centered[rows], centered[columns].T, alpha=-2).add_(
                squares[rows][:, None]
            )
            squared.masked_fill_(contents[rows][:, None] == contents[columns], torch.inf)
            if start >= first:
                _join(groups, points, torch.nonzero(squared < bound) + torch.tensor([first, start]), radius)
            values, where = squared.topk(min(k + SPARE, squared.shape[1]), largest=False)
            nearest, index = torch.cat([nearest, values], 1), torch.cat([index, where + start], 1)
            nearest, order = nearest.topk(min(k + SPARE, nearest.shape[1]), largest=False)
            index = index.gather(1, order)
        exact = _exact(points, torch.arange(first, rows.stop)[:, None].expand_as(index), index)
        exact[torch.isinf(nearest)] = torch.inf
        by_distance = torch.from_numpy(np.lexsort((index.numpy(), exact.numpy()))[:, :k])  # then by position
        found = exact.gather(1, by_distance)
        kept_distance[rows, : found.shape[1]] = found
        kept_index[rows, : found.shape[1]] = index.gather(1, by_distance).masked_fill(torch.isinf(found), -1)
    return Neighbors(kept_index, kept_distance, torch.from_numpy(groups.of))


def _join(groups: _Groups, points: Tensor, pairs: Tensor, radius: float) -> None:
    """Join the pairs that are nearer than the radius; those that are joined already need no distance."""
    left, right = pairs.numpy().T
    chosen = groups.apart(left, right)
    while len(chosen):
        now, chosen = chosen[:PAIRS_AT_ONCE], chosen[PAIRS_AT_ONCE:]
        exact = _exact(points, torch.from_numpy(left[now]), torch.from_numpy(right[now])).numpy()
        near = now[exact < radius]
        groups.join(left[near], right[near])
        chosen = chosen[groups.apart(left[chosen], right[chosen])]


def _exact(points: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Distances of pairs in float64, in parts that fit in memory."""
    parts = [
        (points[a].double() - points[b].double()).square().sum(-1).sqrt()
        for a, b in zip(left.flatten().split(PAIRS_AT_ONCE), right.flatten().split(PAIRS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).view(left.shape) if parts else torch.empty(left.shape, dtype=torch.float64)
