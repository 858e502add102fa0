"""Write the ensemble directory that decuwatch reads: unet.onnx, decoder.onnx, tables and one manifest for each
rotation.

Every graph is held against PyTorch before the directory takes its place; an export that fails leaves what stood there.
"""

import argparse
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import onnx
import onnxruntime
import torch
from safetensors.torch import save_file
from torch import Tensor

from decuwatch_training import __version__
from decuwatch_training.backbone import Backbone, add_backbone_arguments, backbone_of
from decuwatch_training.branch import DEFAULT_PROFILE, check_profile, make_requests, profile_scores
from decuwatch_training.check import check_directory
from decuwatch_training.diffusion import Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import check_replaceable, read_json, sha256_file, staged_directory, write_json
from decuwatch_training.golden import write_golden
from decuwatch_training.graphs import DECODER_NAMES, OPSET, UNET_NAMES, export_decoder, export_unet
from decuwatch_training.loop import pick_device
from decuwatch_training.manifest import FORMAT, NAME
from decuwatch_training.train import Run, image_shape_of, load_run

QUANTILES = (0.5, 0.9, 0.99, 0.999)
ENSEMBLE_FILES = (
    "ensemble.json",
    "rotation-*.json",
    "golden.json",
    "tables.safetensors",
    "tables-*.safetensors",
    *(f"{graph}.onnx{data}" for graph in ("unet", "decoder") for data in ("", ".data")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train export``."""
    add_backbone_arguments(parser, "the backbone that the run was trained on")
    parser.add_argument("--run", type=Path, required=True, dest="run_directory", help="the directory that train wrote")
    parser.add_argument("--out", type=Path, required=True, help="the ensemble's directory")
    parser.add_argument(
        "--name",
        required=True,
        help="the model's name in events: a-z 0-9 - _, beginning with a letter, at most 64 characters",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of the graphs' weights; inputs and outputs are float32 in both",
    )
    parser.add_argument(
        "--noise",
        choices=("torch-cpu", "torch-cuda", "decuwatch"),
        default="torch-cpu",
        help="how producers draw the first latent",
    )
    parser.add_argument(
        "--profile", type=Path, help="a scoring profile, such as evaluate's profile.json; defaults to a first guess"
    )
    parser.add_argument(
        "--reference-seeds",
        type=int,
        default=100,
        help="requests of each well-sampled class behind the manifest's reference scores; 0: none",
    )
    parser.add_argument(
        "--golden",
        action="store_true",
        help="add golden.json, the numbers that the Go sampler is held against in its tests",
    )
    parser.add_argument("--force", action="store_true", help="export although train found the tables unsound")


def run(arguments: argparse.Namespace) -> None:
    """Export and check; the directory appears only when both succeeded."""
    check_replaceable(arguments.out, ENSEMBLE_FILES)
    backbone = backbone_of(arguments).to(pick_device())
    trained = load_run(arguments.run_directory, backbone)
    findings = trained.record["findings"]
    for finding in findings:
        print(f"WARNING: {finding}", file=sys.stderr)
    if findings and not arguments.force:
        raise TrainingError(
            f"{arguments.run_directory}: {len(findings)} findings say that the tables are unsound (above); train anew, "
            "or give --force"
        )
    profile = read_json(arguments.profile) if arguments.profile else DEFAULT_PROFILE
    backbone_record = arguments.backbone / "backbone.json"
    provenance = {"source": arguments.backbone.name}
    if backbone_record.exists():
        provenance = read_json(backbone_record).get("provenance")
        if not isinstance(provenance, dict):
            raise TrainingError(f"{backbone_record}: provenance: expected an object, as pretrain writes it")
    export_ensemble(
        backbone,
        trained,
        arguments.out,
        arguments.name,
        arguments.precision,
        arguments.noise,
        profile,
        arguments.reference_seeds,
        provenance,
        arguments.golden,
    )
    size = sum(entry.stat().st_size for entry in arguments.out.iterdir())
    print(f"{arguments.out}: {len(trained.tables)} manifests, {size / 1e6:.1f} MB, checked against PyTorch")


def manifest_name(rotation: int) -> str:
    """``ensemble.json`` for rotation 0, ``rotation-r.json`` for the others."""
    return "ensemble.json" if rotation == 0 else f"rotation-{rotation}.json"


def export_ensemble(
    backbone: Backbone,
    trained: Run,
    out: Path,
    name: str,
    precision: str,
    noise: str,
    profile: dict[str, Any],
    reference_seeds: int,
    backbone_provenance: dict[str, Any],
    golden: bool = False,
) -> None:
    """Write, check, and only then rename into place; ``golden`` adds golden.json, which the Go tests read."""
    check_profile(profile, backbone.schedule)
    if not NAME.fullmatch(name):
        raise TrainingError(f"--name {name!r}: expected 1 to 64 of a-z 0-9 - _, beginning with a letter")
    for label, count in Counter(trained.labels).items():
        if not 1 <= len(label) <= 128 or count > 1:
            raise TrainingError(f"class {label!r}: expected a label of its own of 1 to 128 characters")
    if reference_seeds and profile["eta"] != 0:
        raise TrainingError(
            f"profile.eta {profile['eta']}: reference scores are computed at eta 0; leave them out with "
            "--reference-seeds 0"
        )
    size, channels = image_shape_of(backbone)
    tokens = trained.tables.shape[3]
    with staged_directory(out, ENSEMBLE_FILES) as staged:
        unet_files = export_unet(backbone, tokens, staged / "unet.onnx", precision)
        decoder_files = export_decoder(backbone, staged / "decoder.onnx", precision)
        for rotation, tables in enumerate(trained.tables):
            tables_file = staged / ("tables.safetensors" if rotation == 0 else f"tables-{rotation}.safetensors")
            save_file(_tensors(tables, backbone.reference), tables_file)
            files = {"unet": _entry(*unet_files), "decoder": _entry(*decoder_files), "tables": _entry(tables_file)}
            manifest: dict[str, Any] = {
                "format": FORMAT,
                "name": name,
                "files": files,
                "precision": precision,
                "opset": OPSET,
                "latent": dict(zip(("channels", "height", "width"), backbone.latent_shape, strict=True))
                | {"scale": backbone.scale, "shift": backbone.shift},
                "image": {"channels": channels, "height": size, "width": size},
                "context": {"tokens": tokens, "dim": backbone.context_dim},
                "graph": {"unet": UNET_NAMES, "decoder": DECODER_NAMES},
                "diffusion": backbone.schedule.manifest(),
                "components": len(tables),
                "classes": [
                    {"label": label, "images": trained.images[rotation, :, index].tolist()}
                    for index, label in enumerate(trained.labels)
                ],
                "regime": trained.record["settings"]["regime"],
                "noise": noise,
                "profile": profile,
            }
            if reference_seeds:
                manifest["reference"] = reference_scores(
                    backbone, tables, trained.images[rotation], profile, reference_seeds
                )
            manifest["provenance"] = {
                "data": trained.record["data"],
                "folders": trained.record.get("folders", []),
                "rotation": rotation,
                "backbone": backbone_provenance,
                "backbone_sha256": trained.record["backbone_sha256"],
                "tables": trained.record["settings"],
                "tables_training": trained.record["training"],
                "versions": {
                    "decuwatch-training": __version__,
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "diffusers": diffusers.__version__,
                    "onnx": onnx.__version__,
                    "onnxruntime": onnxruntime.__version__,
                },
            }
            manifest["diagnostics"] = {
                "classes": {trained.labels[row["class"]]: row for row in trained.record["diagnostics"][rotation]},
                "findings": [
                    finding for finding in trained.record["findings"] if finding.startswith(f"rotation {rotation}:")
                ],
            }
            write_json(staged / manifest_name(rotation), manifest)
        check_directory(staged, backbone)
        if golden:
            device = next(backbone.denoiser.parameters()).device
            write_golden(
                staged, lambda *inputs: backbone.denoiser(*(tensor.to(device) for tensor in inputs)).cpu(), "PyTorch"
            )


def _entry(path: Path, *external: Path) -> dict[str, Any]:
    """A file of the manifest, and what a graph keeps beside it."""
    entry: dict[str, Any] = {"path": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)}
    return entry | {"external": [_entry(file) for file in external]} if external else entry


def _tensors(tables: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
    """[M, K + 1, D] for one token, [M, K + 1, T, D] for several; the reference table in the same form."""
    tensors = {"tables": tables} if reference is None else {"tables": tables, "reference": reference}
    if tables.shape[2] == 1:
        tensors = {name: tensor.squeeze(-2) for name, tensor in tensors.items()}
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def reference_scores(
    backbone: Backbone, tables: Tensor, images: Tensor, profile: dict[str, Any], seeds: int, batch: int = 64
) -> dict[str, Any]:
    """Scores under ``profile`` of the classes with the most images: how large a score is if nothing is missing.

    tables [M, K + 1, T, D], images [M, K]. The seeds are not those that the evaluation uses.
    """
    device = next(backbone.denoiser.parameters()).device
    counts = images.float().mean(0)
    well_sampled = torch.nonzero(counts == counts.max()).flatten().tolist()
    requests = make_requests(well_sampled, seeds, len(tables), first_seed=1_000_000)
    sampler = Sampler(backbone.schedule, profile["steps"], profile["guidance_scale"])
    parts: dict[str, list[Tensor]] = {"class_gap": [], "request_risk": []}
    for index in torch.arange(len(requests)).split(batch):
        part = type(requests)(requests.classes[index], requests.seeds[index], requests.carriers[index])
        scores = profile_scores(
            backbone.denoiser, sampler, tables.to(device), part, part.latents(backbone.latent_shape).to(device), profile
        )
        for measurement, values in scores.items():
            parts[measurement].append(values.cpu())
    result = {}
    for measurement, batches in parts.items():
        joined = torch.cat(batches).double()
        quantiles = {str(quantile): float(joined.quantile(quantile)) for quantile in QUANTILES}
        result[measurement] = {"n": len(joined), "mean": float(joined.mean()), "quantiles": quantiles}
    return result
