"""The evaluation's plots: densities of scores by bin, as in the paper, and quality against U-Net rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import gaussian_kde

from decuwatch_training.files import write_file
from decuwatch_training.quality import Cells

matplotlib.use("agg")
import matplotlib.pyplot as plt


def draw_densities(panels: Sequence[tuple[str, np.ndarray, Cells]], out: Path) -> None:
    """A panel for each setting: a kernel density of log10(score) for each bin."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (title, scores, cells) in zip(axes[0], panels, strict=True):
        logs = np.log10(np.maximum(scores, 1e-12))
        grid = np.linspace(logs.min() - 0.2, logs.max() + 0.2, 400)
        for size in cells.sizes:
            own = logs[cells.bins == size]
            if np.ptp(own) > 0:
                axis.plot(grid, gaussian_kde(own)(grid), label=f"{size:g} image{'' if size == 1 else 's'}")
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("log10 score")
        axis.set_yticks([])
        axis.legend(fontsize=7)
    _save(figure, out)


def draw_frontier(entries: Sequence[dict[str, Any]], out: Path) -> None:
    """Against rows. Left: AUROC of the second-largest bin. Right: Spearman of score and error in class and bin."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    kinds = {
        "first branched step": (
            "o",
            lambda e: len(e["branches"]) == 1 and e["branches"][0][1] == 1 and e["components"] > 3,
        ),
        "roll-out": ("s", lambda e: len(e["branches"]) == 1 and e["branches"][0][1] > 1 and e["components"] > 3),
        "sum over branch points": ("^", lambda e: len(e["branches"]) > 1),
        "three components": ("x", lambda e: e["components"] == 3),
    }
    nearest = list(entries[0]["against_largest"])[-1]
    chosen = [e for e in entries if e["estimator"] in ("mean-w2", "log mean-w2")]

    def class_level(entry: dict[str, Any]) -> float:
        return float(entry["against_largest"][nearest]["auroc"]["value"])

    labels = (f"AUROC, {nearest} v the largest bin", "Spearman within class and bin")
    for axis, quality, label in zip(axes, (class_level, request_quality), labels, strict=True):
        for name, (marker, belongs) in kinds.items():
            own = [e for e in chosen if belongs(e)]
            axis.scatter(
                [e["rows"] for e in own], [quality(e) for e in own], marker=marker, s=18, alpha=0.6, label=name
            )
        best = pareto(chosen, quality)
        if not best:  # request errors were not asked for
            axis.set_visible(False)
            continue
        axis.step([e["rows"] for e in best], [quality(e) for e in best], where="post", color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel("rows of U-Net work for one request")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    _save(figure, out)


def request_quality(entry: dict[str, Any]) -> float:
    """Spearman of score and error within class and bin; NaN if it was not measured, or every score is saturated."""
    value = entry["request_level"]["within"]["value"] if "request_level" in entry else None
    return float("nan") if value is None else float(value)


def pareto(entries: Sequence[dict[str, Any]], quality: Any) -> list[dict[str, Any]]:
    """The entries that no cheaper one equals, by rising rows."""
    best: list[dict[str, Any]] = []
    for entry in sorted((e for e in entries if np.isfinite(quality(e))), key=lambda e: (e["rows"], -quality(e))):
        if not best or quality(entry) > quality(best[-1]):
            best.append(entry)
    return best


def _save(figure: Any, out: Path) -> None:
    figure.tight_layout()
    write_file(out, lambda aside: figure.savefig(aside, format="png", dpi=90))
    plt.close(figure)
