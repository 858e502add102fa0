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


def _save(figure: Any, out: Path) -> None:
    figure.tight_layout()
    write_file(out, lambda aside: figure.savefig(aside, format="png", dpi=90))
    plt.close(figure)
