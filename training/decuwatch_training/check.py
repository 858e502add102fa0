"""Hold ONNX Runtime against PyTorch on an exported ensemble: digests, shapes, random rows, a whole DDIM trajectory.

Relative error is |a - b| / |b| over a row's values (Euclidean norms), the worst row counts; below 1e-4 in fp32. The
class gap of the posterior tables is measured and held against the manifest's expectation by class.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decuwatch_training.backbone import Backbone, add_backbone_arguments, backbone_of
from decuwatch_training.branch import contexts_of, make_requests, measured_means
from decuwatch_training.diffusion import Denoiser, Sampler, first_latent, schedule_of
from decuwatch_training.errors import TrainingError
from decuwatch_training.graphs import Graph
from decuwatch_training.manifest import TableSets, manifests_of, read_manifest, read_tables
from decuwatch_training.paide import estimate
from decuwatch_training.profile import measures_of

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest relative error of a row. fp16 carries 11 bits; its errors add up along a trajectory."""

GAP_SEEDS = 8
GAP_FACTOR = 3.0
"""A few posterior tables are a small sample of Sigma_c, and a wide Sigma_c leaves the range in which the closed form is
exact."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train check``."""
    parser.add_argument("ensemble", type=Path, help="the ensemble's directory")
    add_backbone_arguments(parser, "the backbone that it was exported from")


def run(arguments: argparse.Namespace) -> None:
    """Check every manifest of the directory and print the errors that were found."""
    backbone = backbone_of(arguments)
    for name, error in check_directory(arguments.ensemble, backbone).items():
        print(f"{name:<28} {error:.1e}")


def check_directory(directory: Path, backbone: Backbone, rows: int = 32) -> dict[str, float]:
    """Worst relative errors by what was compared. Raises TrainingError for the first that is out of tolerance."""
    errors: dict[str, float] = {}
    graphs: dict[str, Graph] = {}
    device = next(backbone.denoiser.parameters()).device
    backbone.to(torch.device("cpu"))
    try:
        for path in manifests_of(directory):
            manifest = read_manifest(path)
            sets = read_tables(directory, manifest)
            for part in ("unet", "decoder"):
                if part not in graphs:
                    graphs[part] = Graph(directory / manifest["files"][part]["path"], manifest["graph"][part])
            _check_class_gaps(graphs["unet"], manifest, sets, str(path))
            for name, error in _compare(graphs, backbone, manifest, sets.members, rows).items():
                label = f"{path.stem}: {name}"
                errors[label] = error
                tolerance = TOLERANCE[manifest["precision"]]
                if not error < tolerance:
                    raise TrainingError(
                        f"{directory}: {label}: relative error {error:.1e} between ONNX Runtime and PyTorch, expected "
                        f"below {tolerance:.0e}"
                    )
    finally:
        backbone.to(device)
    return errors


@torch.no_grad()
def _compare(
    graphs: dict[str, Graph], backbone: Backbone, manifest: dict[str, Any], tables: Tensor, rows: int
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    latent = torch.randn(rows, *backbone.latent_shape, generator=generator)
    index = torch.randint(backbone.schedule.train_timesteps, (rows,), generator=generator)
    timestep = backbone.schedule.times(index)
    table_rows = tables.flatten(0, 1)
    context = table_rows[torch.randint(len(table_rows), (rows,), generator=generator)]
    for count in (1, rows):
        wanted = backbone.denoiser(latent[:count], timestep[:count], context[:count])
        errors[f"U-Net, {count} rows"] = _worst(
            graphs["unet"](latent[:count], timestep[:count], context[:count]), wanted
        )
    steps = measures_of(manifest["profile"])["request_risk"].steps
    sampler = Sampler(backbone.schedule, steps, float(manifest["profile"]["guidance_scale"]))
    classes = torch.arange(len(manifest["classes"]))[:16]
    conditional, unconditional = contexts_of(tables, classes)
    start = torch.stack([first_latent(int(label), backbone.latent_shape) for label in classes])

    def final(denoise: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return sampler.roll(denoise, 0, sampler.count, start, conditional[:, 0], unconditional[:, 0])

    latents = final(backbone.denoiser)
    errors[f"trajectory, {sampler.count} steps"] = _worst(final(graphs["unet"]), latents)
    unscaled = latents / backbone.scale + backbone.shift
    errors["decoder"] = _worst(graphs["decoder"](unscaled), backbone.autoencoder(unscaled))
    return errors


def class_gap_ratios(denoise: Denoiser, manifest: dict[str, Any], sets: TableSets) -> dict[str, float]:
    """By class: the measured mean pairwise squared distance at the class gap's step over the expected one."""
    expected = {index: entry["class_gap"] for index, entry in enumerate(manifest["classes"]) if "class_gap" in entry}
    if not expected:
        return {}
    profile, measure = manifest["profile"], measures_of(manifest["profile"])["class_gap"]
    latent = manifest["latent"]
    shape = (latent["channels"], latent["height"], latent["width"])
    sampler = Sampler(schedule_of(manifest["diffusion"]), measure.steps, float(profile["guidance_scale"]))
    ratios = {}
    for label, wanted in expected.items():
        requests = make_requests([label], GAP_SEEDS, 1, first_seed=2_000_000)
        means = measured_means(
            denoise, sampler, sets.measured()[measure.tables], requests, requests.latents(shape), measure
        )
        ratios[manifest["classes"][label]["label"]] = float(estimate("mean-w2", means, 1.0).mean()) / wanted
    return ratios


def _check_class_gaps(graph: Graph, manifest: dict[str, Any], sets: TableSets, where: str) -> None:
    """Raise TrainingError for a class whose measured gap is far from the expected one."""
    for label, ratio in class_gap_ratios(graph, manifest, sets).items():
        if not 1 / GAP_FACTOR < ratio < GAP_FACTOR:
            raise TrainingError(
                f"{where}: class {label!r}: the measured class gap is {ratio:.3g} times the expected class_gap, "
                f"expected between 1/{GAP_FACTOR:g} and {GAP_FACTOR:g}"
            )


def _worst(found: Tensor, wanted: Tensor) -> float:
    """max over rows of |found - wanted| / |wanted|; infinite for another shape or a value that is not finite."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    found, wanted = found.flatten(1).double(), wanted.flatten(1).double()
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)).max())
