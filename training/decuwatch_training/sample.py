"""Draw a PNG grid: a row for each class with its count of images, a column for each component, from one seed.

With --reference the first column is the backbone's own fully trained table.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from decuwatch_training.diffusion import Sampler, first_latent, schedule_of
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import write_file
from decuwatch_training.graphs import Graph
from decuwatch_training.manifest import manifests_of, read_manifest, read_tables

matplotlib.use("agg")
import matplotlib.pyplot as plt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train sample``."""
    parser.add_argument(
        "ensemble", type=Path, help="an ensemble's directory (a grid for each of its manifests) or one manifest"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the PNG files, one named after each manifest"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first latent, the same in the whole grid")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance")
    parser.add_argument("--reference", action="store_true", help="begin with the backbone's own fully trained table")
    parser.add_argument("--classes", type=int, nargs="+", help="indices of the classes; defaults to the first 16")


def run(arguments: argparse.Namespace) -> None:
    """Write the grids."""
    paths = manifests_of(arguments.ensemble) if arguments.ensemble.is_dir() else [arguments.ensemble]
    for path in paths:
        out = arguments.out / f"{path.stem}.png"
        draw_grid(
            path, out, arguments.seed, arguments.steps, arguments.guidance, arguments.reference, arguments.classes
        )
        print(out)


@torch.no_grad()
def draw_grid(
    path: Path, out: Path, seed: int, steps: int, guidance: float, with_reference: bool, chosen: list[int] | None
) -> None:
    """One manifest's grid, by its ONNX graphs alone."""
    manifest = read_manifest(path)
    sets = read_tables(path.parent, manifest)
    tables, reference = sets.members, sets.reference
    if with_reference:
        if reference is None:
            raise TrainingError(f"{path}: the tables file has no tensor 'reference'")
        tables = torch.cat([reference[None], tables])
    labels = manifest["classes"]
    indices = chosen if chosen is not None else list(range(min(16, len(labels))))
    if any(not 0 <= index < len(labels) for index in indices):
        raise TrainingError(f"--classes {indices}: expected indices from 0 to {len(labels) - 1}")
    latent = manifest["latent"]
    shape = (latent["channels"], latent["height"], latent["width"])
    sampler = Sampler(schedule_of(manifest["diffusion"]), steps, guidance)
    unet, decoder = (
        Graph(path.parent / manifest["files"][part]["path"], manifest["graph"][part]) for part in ("unet", "decoder")
    )
    components = len(tables)
    start = first_latent(seed, shape).expand(len(indices) * components, *shape).contiguous()
    context = tables[:, indices].transpose(0, 1).flatten(0, 1)
    unconditional = tables[:, -1].repeat(len(indices), 1, 1)
    final = sampler.roll(unet, 0, sampler.count, start, context, unconditional)
    images = decoder(final / latent["scale"] + latent["shift"])
    titles = (["fully trained"] if with_reference else []) + [
        f"component {index}" for index in range(manifest["components"])
    ]
    rows = [f"{labels[index]['label']}\n{_count(labels[index]['images'])}" for index in indices]
    _plot(images.view(len(indices), components, *images.shape[1:]), rows, titles, out)


def _count(images: list[int]) -> str:
    low, high = min(images), max(images)
    return f"{low} image{'' if low == 1 else 's'}" if low == high else f"{low}-{high} images"


def _plot(images: Tensor, rows: list[str], columns: list[str], out: Path) -> None:
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(1.15 * len(columns) + 1.2, 1.0 * len(rows) + 0.4), squeeze=False
    )
    for row, label in enumerate(rows):
        for column, title in enumerate(columns):
            axis = axes[row][column]
            picture = pixels[row, column]
            axis.imshow(np.squeeze(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(title, fontsize=7)
            if column == 0:
                axis.set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    write_file(out, lambda aside: figure.savefig(aside, format="png", dpi=80))
    plt.close(figure)
