"""What tells a sound ensemble from one that silently agrees: measured by class, with a verdict.

An ensemble can be broken in ways that look like a model that knows everything: components that saw the same images, a
start so narrow that rare rows never part, training so short that every row is still at its start.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decuwatch_training.backbone import Backbone
from decuwatch_training.tables import TableSettings, TrainedTables

TIMESTEPS = (981, 801, 601, 401, 201)
"""Noise levels at which predictions are compared, of 1000 training timesteps."""
STILL_AT_START = 0.5
"""Above this share of the starts' disagreement, a best-sampled class was hardly trained."""
RARE_OVER_COMMON = 2.0
"""Under ``exposure`` or with an anchor, the rarest classes must disagree this many times as much as the best-sampled
ones."""
FEW_OVER_MANY = 10
"""A class counts as rarer if it has this many times fewer images."""
EXCESS = 0.1
"""A best-sampled row's held-out loss may exceed the fully trained row's by this share of it."""


@dataclass
class Diagnosis:
    """Per rotation and class what was measured, and what is wrong with it."""

    classes: list[list[dict[str, Any]]]
    findings: list[str] = field(default_factory=list)

    def table(self, labels: tuple[str, ...]) -> str:
        """A plain-text table, one line for each class of each rotation."""
        header = (
            f"{'class':<14}{'images':>8}{'updates':>9}{'moved':>8}"
            f"{'spread/start':>14}{'disagree':>10}{'of start':>9}{'excess loss':>13}"
        )
        lines = []
        for rotation, rows in enumerate(self.classes):
            lines.append(f"rotation {rotation}\n{header}")
            for row in rows:
                excess = "-" if row["excess_loss"] is None else f"{row['excess_loss']:+.5f}"
                images = (
                    f"{min(row['images'])}"
                    if min(row["images"]) == max(row["images"])
                    else f"{min(row['images'])}-{max(row['images'])}"
                )
                lines.append(
                    f"{labels[row['class']]:<14}{images:>8}{row['updates']:>9.1f}{row['moved']:>8.2f}"
                    f"{row['spread'] / row['start_spread']:>14.3f}"
                    f"{row['disagreement']:>10.2e}{row['disagreement'] / row['start_disagreement']:>9.3f}{excess:>13}"
                )
        return "\n".join(lines)


@torch.no_grad()
def diagnose(
    backbone: Backbone,
    trained: TrainedTables,
    held_out: Tensor,
    classes: Tensor,
    settings: TableSettings,
    images: int = 24,
    limit: int = 40,
    seed: int = 7,
) -> Diagnosis:
    """Measure every rotation, at most ``limit`` classes of each, spread evenly from the rarest to the best-sampled.

    ``held_out`` are scaled latents [n,C,H,W] with classes [n] that no table has seen.

    By class: mean updates of its rows; mean distance of a row from its start; mean distance between components' rows,
    now and at the start; mean squared difference of their predictions (per dimension), now and at the start; mean
    held-out loss in excess of the backbone's own row.
    """
    rotations, _, rows = trained.tables.shape[:3]
    device = next(backbone.denoiser.parameters()).device
    result: list[list[dict[str, Any]]] = []
    for rotation in range(rotations):
        measured = []
        counts = trained.images[rotation].float().mean(0)
        order = torch.argsort(counts, stable=True)
        picked = order[torch.linspace(0, rows - 2, min(limit, rows - 1)).round().long()].sort().values
        for label in picked.tolist():
            chosen = torch.nonzero(classes == label).flatten()[:images]
            clean = held_out[chosen].repeat(len(TIMESTEPS), 1, 1, 1)
            levels = [min(level, backbone.schedule.train_timesteps - 1) for level in TIMESTEPS]
            timestep = backbone.schedule.times(torch.tensor(levels).repeat_interleave(len(chosen)))
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + label))
            noisy = backbone.schedule.noisy(clean, noise, timestep)
            target = backbone.schedule.target(clean, noise, timestep)

            def predict(table_rows: Tensor, noisy: Tensor = noisy, timestep: Tensor = timestep) -> Tensor:
                """[m, T, D] -> [m, n, C, H, W]"""
                parts = [
                    backbone.denoiser(
                        noisy.to(device), timestep.to(device), row.expand(len(noisy), *row.shape).to(device)
                    ).cpu()
                    for row in table_rows
                ]
                return torch.stack(parts)

            now, then = trained.tables[rotation, :, label], trained.start[rotation, :, label]
            predictions = predict(now)
            loss = float((predictions - target).square().mean())
            reference = None
            if backbone.reference is not None:
                reference = float((predict(backbone.reference[label][None]) - target).square().mean())
            measured.append(
                {
                    "class": label,
                    "images": trained.images[rotation, :, label].tolist(),
                    "overlap": round(float(trained.overlap[rotation, label]), 4),
                    "updates": float(trained.updates[rotation, :, label].float().mean()),
                    "moved": float((now - then).flatten(1).norm(dim=1).mean()),
                    "spread": _spread(now.flatten(1)),
                    "start_spread": _spread(then.flatten(1)),
                    "disagreement": _disagreement(predictions),
                    "start_disagreement": _disagreement(predict(then)),
                    "held_out_loss": loss,
                    "reference_loss": reference,
                    "excess_loss": None if reference is None else loss - reference,
                }
            )
        result.append(measured)
    diagnosis = Diagnosis(result)
    for rotation, measured in enumerate(result):
        diagnosis.findings += [f"rotation {rotation}: {finding}" for finding in judge(measured, settings)]
    return diagnosis


def draws_table(labels: tuple[str, ...], counts: Tensor, worth: Tensor, updates: Tensor, draws: Tensor) -> str:
    """Draws of each class's rows: images and n_eff [R, K], updates [R, M, K + 1], draws [R, 1 + Q, K + 1]."""
    lines = [f"{'class':<14}{'images':>8}{'n_eff':>9}{'member draws':>14}{'producer draws':>16}"]
    for rotation in range(len(counts)):
        lines.append(f"rotation {rotation}")
        for label, name in enumerate(labels):
            mean = float(updates[rotation, :, label].float().mean())
            lines.append(
                f"{name:<14}{int(counts[rotation, label]):>8}{float(worth[rotation, label]):>9.1f}{mean:>14.0f}"
                f"{int(draws[rotation, 0, label]) or '-':>16}"
            )
    return "\n".join(lines)


def draws_warnings(worth: Tensor, draws: Tensor) -> list[str]:
    """What the draws of the producer's rows cannot tell: n_eff and draws [R, K]; draws of 0 are unknown."""
    short = (draws > 0) & (worth > draws)
    if not bool(short.any()):
        return []
    rotation, label = (int(part) for part in torch.nonzero(short)[0])
    return [
        f"{int(short.sum())} rows of the producer had fewer draws than their class has different images, such as "
        f"{int(draws[rotation, label])} for {float(worth[rotation, label]):.0f}: a row cannot know more images than "
        "it was drawn, so classes beyond that many look alike; more --producer-steps tell them apart"
    ]


def judge(measured: list[dict[str, Any]], settings: TableSettings) -> list[str]:
    """What is wrong with one rotation's measurements; empty for a sound ensemble."""
    counts = [sum(row["images"]) / len(row["images"]) for row in measured]
    most = max(counts)
    common = [row for row, count in zip(measured, counts, strict=True) if count == most]
    rare = [row for row, count in zip(measured, counts, strict=True) if count == min(counts)]
    settled = _mean(common, "disagreement")
    begun = _mean(common, "start_disagreement")
    findings = []
    if settled > STILL_AT_START * begun:
        findings.append(
            f"the best-sampled classes still disagree by {settled / begun:.2f} of what their starts did (sound: below "
            f"{STILL_AT_START}): "
            "too few updates, or too low a rate; every class looks unknown"
        )
    excesses = [row["excess_loss"] / row["reference_loss"] for row in common if row["excess_loss"] is not None]
    if excesses and sum(excesses) / len(excesses) > EXCESS:
        findings.append(
            f"the best-sampled classes' held-out loss is {sum(excesses) / len(excesses):.0%} above the fully trained "
            f"rows' (sound: below {EXCESS:.0%}): "
            "too few updates"
        )
    by_class = settings.regime == "exposure" or settings.anchor > 0  # else rare classes may well agree on their images
    if by_class and min(counts) * FEW_OVER_MANY <= most:
        ratio = _mean(rare, "disagreement") / settled if settled > 0 else float("inf")
        if ratio < RARE_OVER_COMMON:
            findings.append(
                f"the rarest classes disagree {ratio:.2f} times as much as the best-sampled ones (sound: above "
                f"{RARE_OVER_COMMON:g}): "
                "their rows share their images or began too close together; what the ensemble does not know would look "
                "well known"
            )
    if settings.regime == "disagreement" and not settings.anchor and min(row["overlap"] for row in measured) > 0.99:
        findings.append(
            "all components saw the same images and drew classes equally often: they agree on them, right or wrong"
        )
    return findings


def _spread(rows: Tensor) -> float:
    """Mean Euclidean distance between two components' rows."""
    return float(torch.pdist(rows).mean())


def _disagreement(predictions: Tensor) -> float:
    """Mean squared difference of two components' predictions, per dimension: [m, n, ...] -> number."""
    return float(2 * predictions.double().var(dim=0, unbiased=True).mean())


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
