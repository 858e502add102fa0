"""What the images of each class are worth, and which files to look at: the data card.

Counts mislead: a thousand copies of one image are one image, and a wrong label is worse than none. For class c with n
images

    n_eff = 1 / (1 / n + p)

is the number of different images that it amounts to; p is the share of pairs among up to 1,000 of its images that are
nearer than tau. tau is a third of the smallest class's median distance to the nearest neighbor. The labels of each
image's nearest neighbors, in all classes, tell which labels look wrong.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decuwatch_training.data import Images
from decuwatch_training.neighbors import search

FORMAT = "decuwatch-data-card/1"
SAMPLE = 1000
"""Images of a class among which pairs are compared."""
NEIGHBORS = 10
TAU_SHARE = 1 / 3
TYPICAL = 0.5
"""A class may set tau only if its median distance is at least this share of the median class's."""
FOREIGN = 0.8
"""An image looks mislabeled if at least this share of its neighbors has one label, another than its own."""
FAR = 2.0
"""An outlier is at least this many times as far from its neighbors as the median image of its class."""


@dataclass(frozen=True)
class ClassCard:
    """One class. What cannot be known is None: distances of a class with one picture, labels of one with at most k."""

    index: int
    label: str
    n: int
    distinct: int
    n_eff: float
    close_pairs: float
    median_nearest: float | None
    near_duplicate_groups: int
    images_in_groups: int
    neighbor_label_share: float | None
    likely_mislabeled: int
    outliers: int


@dataclass(frozen=True)
class Suspect:
    """One image whose label looks wrong: what it is labeled, what its neighbors are."""

    position: int
    own_share: float
    other: int
    other_share: float


@dataclass(frozen=True)
class Outlier:
    """One image that is ``ratio`` times as far from its neighbors as the median image of its class."""

    position: int
    ratio: float


@dataclass(frozen=True)
class DataCard:
    """Numbers by class, and positions of the images to look at, most suspicious first."""

    images: Images
    features: dict[str, Any]
    seed: int
    neighbors: int
    tau: float
    tau_from: int | None
    classes: list[ClassCard]
    suspects: list[Suspect]
    groups: list[list[int]]
    outliers: list[Outlier]
    own_share: Tensor
    """Share of each image's neighbors that have its label, float64 [n]; NaN if its class has too few pictures to tell.
    """

    def file(self, position: int) -> str:
        """The name of an image's file, or its position."""
        return self.images.files[position] if self.images.files else f"image {position}"

    def label(self, position: int) -> str:
        """The label that an image has in the data."""
        return self.images.labels[int(self.images.classes[position])]

    def numbers(self) -> dict[str, Any]:
        """The document without the files: what a run keeps of it."""
        return {
            "format": FORMAT,
            "data": self.images.source,
            "images": len(self.images),
            "features": self.features,
            "seed": self.seed,
            "neighbors": self.neighbors,
            "tau": self.tau,
            "tau_from": None if self.tau_from is None else self.images.labels[self.tau_from],
            "classes": [asdict(entry) for entry in self.classes],
        }

    def document(self) -> dict[str, Any]:
        """The whole card as JSON, described in docs/training.md."""
        labels = self.images.labels
        suspects = [
            {
                "file": self.file(entry.position),
                "label": self.label(entry.position),
                "own_share": entry.own_share,
                "neighbors_label": labels[entry.other],
                "neighbors_share": entry.other_share,
            }
            for entry in self.suspects
        ]
        groups = [
            {"files": [self.file(position) for position in group], "labels": self.labels_of(group)}
            for group in self.groups
        ]
        outliers = [
            {"file": self.file(entry.position), "label": self.label(entry.position), "ratio": round(entry.ratio, 3)}
            for entry in self.outliers
        ]
        return {**self.numbers(), "likely_mislabeled": suspects, "near_duplicates": groups, "outliers": outliers}

    def labels_of(self, group: Sequence[int]) -> dict[str, int]:
        """How many images of a group have which label."""
        counts = torch.bincount(self.images.classes[list(group)], minlength=len(self.images.labels))
        return {self.images.labels[index]: int(counts[index]) for index in torch.nonzero(counts).flatten().tolist()}

    def table(self) -> str:
        """One line a class, and a last line with what the numbers stand on."""
        width = max(5, *(len(label) for label in self.images.labels))
        header = (
            f"{'class':<{width}}{'n':>8}{'distinct':>10}{'n_eff':>9}{'groups':>8}"
            f"{'in groups':>11}{'own label':>11}{'mislabeled?':>13}{'outliers':>10}"
        )
        lines = [header]
        for row in self.classes:
            share = "-" if row.neighbor_label_share is None else f"{row.neighbor_label_share:.3f}"
            lines.append(
                f"{row.label:<{width}}{row.n:>8}{row.distinct:>10}{row.n_eff:>9.1f}"
                f"{row.near_duplicate_groups:>8}{row.images_in_groups:>11}"
                f"{share:>11}{row.likely_mislabeled:>13}{row.outliers:>10}"
            )
        source = (
            "given, or no class has two pictures"
            if self.tau_from is None
            else f"a third of the median of {self.images.labels[self.tau_from]}"
        )
        lines.append(
            f"by {self.features['kind']}, {self.neighbors} neighbors, tau {self.tau:.4g} ({source}), seed {self.seed}"
        )
        return "\n".join(lines)


def class_data(entry: dict[str, Any]) -> dict[str, Any]:
    """The manifest's ``data`` of a class, of its entry in a card's ``numbers``."""
    names = {"images": "n", "near_duplicates": "images_in_groups"}
    fields = ("images", "distinct", "n_eff", "near_duplicates", "near_duplicate_groups", "neighbor_label_share")
    return {name: entry[names.get(name, name)] for name in (*fields, "likely_mislabeled", "outliers")}


def pixel_features(images: Images, size: int = 16) -> Tensor:
    """The plain feature: each image averaged down to at most 16 x 16, centered, and scaled to variance 1."""
    parts = []
    for index in torch.arange(len(images)).split(4096):
        pixels = images.scaled(index)
        if max(pixels.shape[-2:]) > size:
            pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="area")
        parts.append(pixels.flatten(1))
    features = torch.cat(parts)
    features -= features.mean(0)
    deviation = float(features.square().mean().sqrt())
    return features / deviation if deviation > 0 else features


def n_effective(count: int, close_pairs: float) -> float:
    """n_eff = 1 / (1 / n + p), at least 1 for a class that has images."""
    return max(1.0, 1 / (1 / count + close_pairs)) if count else 0.0


def contents_of(images: Images) -> Tensor:
    """A number for each picture, int64 [n]: equal for equal pixels."""
    seen: dict[bytes, int] = {}
    digests = (hashlib.sha256(image.tobytes()).digest() for image in images.pixels.numpy())
    return torch.tensor([seen.setdefault(digest, len(seen)) for digest in digests], dtype=torch.int64)


def data_card(
    images: Images,
    features: Tensor,
    described: dict[str, Any],
    seed: int = 1,
    neighbors: int = NEIGHBORS,
    tau: float | None = None,
    progress: bool = False,
) -> DataCard:
    """The card of all images by features float32 [n, D]; ``described`` says in the document what they are.

    Deterministic: ``seed`` draws the sample of a class with more than 1,000 images, and nothing else is random.
    """
    classes, contents, rows = images.classes, contents_of(images), len(images.labels)
    features = features.flatten(1).float()
    samples = [_sample(images.of_class(label), seed + label) for label in range(rows)]
    medians = [_median_nearest(features[sample], contents[sample]) for sample in samples]
    tau_from = None
    if tau is None:
        tau, tau_from = _tau(medians)
    shares = [_close_pairs(features[sample], contents[sample], tau) for sample in samples]
    # Copies with the same label say nothing about the label, and must not crowd out other neighbors: one item for each
    # picture and label. The copies of an image with another label are in its group.
    pairs = torch.stack([contents, classes], 1).numpy()
    _, first, item_of = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    item = torch.from_numpy(item_of.reshape(-1))
    picked = torch.from_numpy(first)
    found = search(features[picked], contents[picked], neighbors, tau, progress=progress)
    own, other, other_share = _votes(found.index, classes[picked], rows)
    # Neighbors of a rare class are of other classes, whatever its labels are worth: it has too few pictures to tell.
    own[(torch.bincount(classes[picked], minlength=rows) <= neighbors)[classes[picked]]] = torch.nan
    own_share = own[item]
    far = _far(found.distance, classes[picked], found.groups, rows)[item]
    groups = _groups(found.groups[item])
    foreign = (own <= 1 - FOREIGN) & (other_share >= FOREIGN)
    order = sorted(
        torch.nonzero(foreign[item]).flatten().tolist(),
        key=lambda at: (float(own_share[at]), -float(other_share[item[at]]), at),
    )
    suspects = [
        Suspect(at, round(float(own_share[at]), 4), int(other[item[at]]), round(float(other_share[item[at]]), 4))
        for at in order
    ]
    outliers = [
        Outlier(at, float(far[at]))
        for at in sorted(torch.nonzero(far >= FAR).flatten().tolist(), key=lambda at: (-float(far[at]), at))
    ]
    group_counts, in_groups = _group_counts(groups, classes, rows)
    suspected, outlying = (
        torch.bincount(classes[[entry.position for entry in entries]], minlength=rows).tolist()
        for entries in (suspects, outliers)
    )
    cards = []
    for label in range(rows):
        mine = images.of_class(label)
        share = own_share[mine].nanmean() if len(mine) else torch.tensor(torch.nan)
        cards.append(
            ClassCard(
                index=label,
                label=images.labels[label],
                n=len(mine),
                distinct=len(contents[mine].unique()),
                n_eff=round(n_effective(len(mine), shares[label]), 2),
                close_pairs=shares[label],
                median_nearest=medians[label],
                near_duplicate_groups=group_counts[label],
                images_in_groups=in_groups[label],
                neighbor_label_share=None if torch.isnan(share) else round(float(share), 4),
                likely_mislabeled=suspected[label],
                outliers=outlying[label],
            )
        )
    return DataCard(images, described, seed, neighbors, tau, tau_from, cards, suspects, groups, outliers, own_share)


def _sample(positions: Tensor, seed: int) -> Tensor:
    if len(positions) <= SAMPLE:
        return positions
    return (
        positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:SAMPLE]].sort().values
    )


def _distances(points: Tensor) -> Tensor:
    """All distances of up to 1,000 points, float64; centered so that little cancels."""
    centered = (points - points.mean(0)).double()
    squares = centered.square().sum(1)
    return (squares[:, None] + squares - 2 * centered @ centered.T).clamp(min=0).sqrt()


def _median_nearest(points: Tensor, contents: Tensor) -> float | None:
    """The median distance to the nearest other picture; None if there is no other."""
    chosen = torch.from_numpy(np.unique(contents.numpy(), return_index=True)[1])
    if len(chosen) < 2:
        return None
    return float(_distances(points[chosen]).fill_diagonal_(torch.inf).min(1).values.median())


def _tau(medians: Sequence[float | None]) -> tuple[float, int | None]:
    """tau and the class that sets it; 0 if no class has two pictures, so that only equal pictures are near."""
    known = [value for value in medians if value is not None]
    if not known:
        return 0.0, None
    smallest = min(value for value in known if value >= TYPICAL * float(np.median(known)))
    return TAU_SHARE * smallest, medians.index(smallest)


def _close_pairs(points: Tensor, contents: Tensor, tau: float) -> float:
    """p: the share of pairs that are nearer than tau or the same picture."""
    if len(points) < 2:
        return 0.0
    close = (_distances(points) < tau) | (contents[:, None] == contents)
    return float(close.triu(1).sum()) / (len(points) * (len(points) - 1) / 2)


def _votes(index: Tensor, classes: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each item's neighbors: the share with its label, the most frequent other label, and that label's share."""
    own, other, other_share = [], [], []
    for chosen in torch.arange(len(index)).split(4096):
        valid = index[chosen] >= 0
        votes = torch.zeros(len(chosen), rows, dtype=torch.float64)
        votes.scatter_add_(1, classes[index[chosen].clamp(min=0)], valid.double())
        total = valid.sum(1).double()
        mine = classes[chosen][:, None]
        own.append(votes.gather(1, mine)[:, 0] / total)
        most = votes.scatter(1, mine, -1.0).max(1)
        other.append(most.indices)
        other_share.append(most.values.clamp(min=0) / total)
    return torch.cat(own), torch.cat(other), torch.cat(other_share)


def _far(distance: Tensor, classes: Tensor, groups: Tensor, rows: int) -> Tensor:
    """Mean distance to an item's neighbors over the median of its class; 0 if it cannot be known.

    Only the first item of a group counts in the median: near duplicates must not make every other image an outlier.
    """
    known = torch.isfinite(distance)
    mean = torch.where(known, distance, 0.0).sum(1) / known.sum(1).clamp(min=1)
    alone = torch.zeros(len(mean), dtype=torch.bool)
    alone[torch.from_numpy(np.unique(torch.stack([groups, classes], 1).numpy(), axis=0, return_index=True)[1])] = True
    result = torch.zeros(len(mean), dtype=torch.float64)
    for label in range(rows):
        mine = classes == label
        middle = float(mean[mine & alone].median()) if bool(mine.any()) else 0.0
        if middle > 0:
            result[mine] = mean[mine] / middle
    return result


def _groups(numbers: Tensor) -> list[list[int]]:
    """Positions of the images of each group of two and more, the largest first."""
    order = torch.argsort(numbers, stable=True)
    sizes = torch.unique_consecutive(numbers[order], return_counts=True)[1].tolist()
    groups = [part.tolist() for part in order.split(sizes) if len(part) > 1]
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def _group_counts(groups: Sequence[Sequence[int]], classes: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """By class: groups that hold at least two of its images, and its images in them."""
    counts, inside = [0] * rows, [0] * rows
    for group in groups:
        labels, sizes = classes[list(group)].unique(return_counts=True)
        for label, size in zip(labels.tolist(), sizes.tolist(), strict=True):
            if size > 1:
                counts[label] += 1
                inside[label] += size
    return counts, inside
