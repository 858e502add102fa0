"""Evaluate the data card on spoiled classes, where counts mislead: `make evaluate-spoiled`. Needs no U-Net rows.

Each class of Fashion-MNIST, 1,000 images, is spoiled in turn in each of four ways. The numbers are AUROCs of the 10
spoiled classes against the same 10 classes when all are clean, by what is known of a class. Within the spoiled class,
AUROC of its wrong images against the others, by the share of their neighbors that have their label. Intervals are 95%,
from resampling classes.

    PYTHONPATH=training "$(training/setup)/bin/python" training/spoiled.py FASHION_MNIST OUT [BACKBONE]
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from decuwatch_training.backbone import load_backbone
from decuwatch_training.data import Images, read_fashion_mnist
from decuwatch_training.datacard import DataCard, data_card, pixel_features
from decuwatch_training.files import write_json
from decuwatch_training.quality import auroc
from spoil import near_duplicate

COUNT = 1000
WRONG_SHARE, HIDDEN_SHARE = 0.3, 0.01
REPLICATES = 2000

Spoiler = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""(the class's pictures [n, H, W], pictures of all other classes in order) -> spoiled pictures, which are wrong."""


def exact_duplicates(
    own: np.ndarray, others: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """100 copies of each of 10 images."""
    return np.repeat(own[:10], len(own) // 10, axis=0), np.zeros(len(own), bool)


def near_duplicates(
    own: np.ndarray, others: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shifted, noisy copies of one image."""
    return np.stack([near_duplicate(own[0], generator) for _ in own]), np.zeros(len(own), bool)


def mislabeled(own: np.ndarray, others: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three images in ten are of other classes."""
    return _with_wrong(own, generator.choice(others, round(WRONG_SHARE * len(own)), replace=False))


def hidden_mode(own: np.ndarray, others: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image in a hundred is of one other class."""
    one = others.reshape(-1, *own.shape)[generator.integers(len(others) // len(own))]
    return _with_wrong(own, generator.choice(one, round(HIDDEN_SHARE * len(own)), replace=False))


SPOILERS: dict[str, Spoiler] = {
    "exact duplicates": exact_duplicates,
    "near duplicates": near_duplicates,
    "30% mislabeled": mislabeled,
    "hidden 1% mode": hidden_mode,
}
SCORES: dict[str, Callable[[DataCard, int], float]] = {
    "count": lambda card, label: -card.classes[label].n,
    "n_eff": lambda card, label: -card.classes[label].n_eff,
    "own label": lambda card, label: -(card.classes[label].neighbor_label_share or 0.0),
    "likely mislabeled": lambda card, label: card.classes[label].likely_mislabeled,
}


def _with_wrong(own: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = len(own) - len(wrong)
    return np.concatenate([own[:kept], wrong]), np.arange(len(own)) >= kept


def evaluate(images: Images, features: Callable[[Images], Tensor], count: int = COUNT, seed: int = 1) -> dict[str, Any]:
    """AUROCs by way of spoiling, with ``count`` images of each class; it takes twice as many."""
    generator = np.random.default_rng(seed)
    classes = range(len(images.labels))
    drawn = [generator.choice(images.of_class(label).numpy(), 2 * count, replace=False) for label in classes]
    clean = [images.pixels[positions[:count], 0].numpy() for positions in drawn]
    spare = [images.pixels[positions[count:], 0].numpy() for positions in drawn]  # wrong images are nobody's copies

    def card_of(pictures: list[np.ndarray]) -> DataCard:
        pixels = torch.from_numpy(np.concatenate(pictures))[:, None]
        labels = torch.arange(len(pictures)).repeat_interleave(count)
        made = Images(pixels, labels, images.labels, "spoiled")
        return data_card(made, features(made), {"kind": "spoiled"})

    reference = card_of(clean)
    result: dict[str, Any] = {}
    for name, spoil in SPOILERS.items():
        scores: dict[str, list[float]] = {score: [] for score in SCORES}
        inside, left = [], []
        for label in tqdm(classes, desc=name, unit="class", mininterval=1.0):
            others = np.concatenate([spare[other] for other in classes if other != label])
            spoiled, wrong = spoil(clean[label], others, generator)
            card = card_of([spoiled if other == label else clean[other] for other in classes])
            for score, value in SCORES.items():
                scores[score].append(value(card, label))
            left.append(card.classes[label].n_eff)
            if wrong.any():
                own = -card.own_share[card.images.of_class(label)].numpy()
                inside.append(auroc(own[wrong], own[~wrong]))
        result[name] = {
            "n_eff": [min(left), max(left)],
            "class": {
                score: _classes(np.array(values), np.array([SCORES[score](reference, label) for label in classes]))
                for score, values in scores.items()
            },
            "image": _mean(np.array(inside)) if inside else None,
        }
    return result


def _classes(spoiled: np.ndarray, clean: np.ndarray) -> list[float]:
    """AUROC of spoiled classes against clean ones, and its interval."""
    generator = np.random.default_rng(0)
    pairs = generator.integers(len(spoiled), size=(REPLICATES, 2, len(spoiled)))
    drawn = [auroc(spoiled[one], clean[other]) for one, other in pairs]
    return [auroc(spoiled, clean), *np.quantile(drawn, (0.025, 0.975)).tolist()]


def _mean(values: np.ndarray) -> list[float]:
    drawn = np.random.default_rng(0).choice(values, (REPLICATES, len(values))).mean(1)
    return [float(values.mean()), *np.quantile(drawn, (0.025, 0.975)).tolist()]


def table(result: dict[str, Any]) -> str:
    """The AUROCs as Markdown."""

    def cell(estimate: list[float] | None) -> str:
        return "-" if estimate is None else "{:.2f} [{:.2f}, {:.2f}]".format(*estimate)

    lines = ["| | " + " | ".join(result) + " |", "|---|" + "---|" * len(result)]
    for score in SCORES:
        lines.append(
            f"| class, by {score} | " + " | ".join(cell(each["class"][score]) for each in result.values()) + " |"
        )
    lines.append("| image, by own label | " + " | ".join(cell(each["image"]) for each in result.values()) + " |")
    ranges = ["{:.0f} to {:.0f}".format(*each["n_eff"]) for each in result.values()]
    return "\n".join([*lines, f"| n_eff of the spoiled class | {' | '.join(ranges)} |"])


def main(source: Path, out: Path, backbone: Path | None = None) -> None:
    """Print the table and write spoiled.json."""
    features: Callable[[Images], Tensor] = pixel_features
    if backbone is not None:
        network = load_backbone(backbone)

        def latents(images: Images) -> Tensor:
            return torch.cat([network.encode(images.scaled(index)) for index in torch.arange(len(images)).split(512)])

        features = latents
    result = evaluate(read_fashion_mnist(source).train, features)
    write_json(out / "spoiled.json", result)
    print(table(result))


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
