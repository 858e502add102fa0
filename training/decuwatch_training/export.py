"""Write the ensemble directory that decuwatch reads: unet.onnx, decoder.onnx, tables and one manifest for each
rotation.

Every graph is held against PyTorch before the directory takes its place; an export that fails leaves what stood there.
"""

import argparse
import platform
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
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
from decuwatch_training.branch import Requests, make_requests, profile_scores
from decuwatch_training.check import check_directory
from decuwatch_training.diffusion import Sampler
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import check_replaceable, read_json, sha256_file, staged_directory, write_json
from decuwatch_training.golden import write_golden
from decuwatch_training.graphs import DECODER_NAMES, OPSET, UNET_NAMES, export_decoder, export_unet
from decuwatch_training.imagerisk import Judge, image_risk, predicted_latents
from decuwatch_training.loop import pick_device
from decuwatch_training.manifest import NAME, TENSORS, TableSets, check_judge
from decuwatch_training.posterior import expected_gap
from decuwatch_training.profile import (
    DEFAULT_PROFILE,
    FORMAT_1,
    FORMAT_1_PROFILE,
    check_profile,
    format_of,
    measures_of,
)
from decuwatch_training.train import Run, image_shape_of, load_run

ORDER = (
    "format", "name", "files", "precision", "opset", "latent", "image", "context", "graph", "diffusion", "components",
    "posterior", "classes", "regime", "noise", "profile", "judge", "reference", "provenance", "diagnostics",
)  # fmt: skip
"""Fields of a manifest as they stand in the file."""
QUANTILES = (0.5, 0.9, 0.99, 0.999)
ENSEMBLE_FILES = (
    "ensemble.json",
    "rotation-*.json",
    "golden.json",
    "tables.safetensors",
    "tables-*.safetensors",
    *(f"{graph}.onnx{data}" for graph in ("unet", "decoder") for data in ("", ".data")),
    "judge.onnx",
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
    parser.add_argument("--members", type=int, help="how many of the run's members to export; defaults to all of them")
    parser.add_argument(
        "--producer-member", action="store_true", help="add the producer's table as one more, the last, member"
    )
    parser.add_argument(
        "--profile", type=Path, help="a scoring profile as JSON, as in the manifest; defaults to a first guess"
    )
    parser.add_argument("--judge", type=Path, help="the directory that judge wrote; without it, no image_risk")
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
    trained = chosen_members(trained, arguments.members, arguments.producer_member)
    judge = Verdicts.read(arguments.judge) if arguments.judge else None
    profile = read_json(arguments.profile) if arguments.profile else default_profile(trained, judge)
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
        judge,
    )
    size = sum(entry.stat().st_size for entry in arguments.out.iterdir())
    print(f"{arguments.out}: {len(trained.tables)} manifests, {size / 1e6:.1f} MB, checked against PyTorch")


def chosen_members(trained: Run, count: int | None, producer: bool) -> Run:
    """The run with its first ``count`` members (None: all), and after them, if ``producer``, the producer's table.

    Raises TrainingError if fewer than two members are left, or the run lacks what is asked for.
    """
    there = trained.tables.shape[1]
    least = 1 if producer else 2
    if count is not None and not least <= count <= there:
        raise TrainingError(f"--members {count}: expected {least} to {there}, the members of {trained.path}")
    tables, images = trained.tables[:, :count], trained.images[:, :count]
    if producer:
        if trained.producer is None:
            raise TrainingError(f"--producer-member: {trained.path} has no producer table; train anew")
        # Members and producer have as many images of each class: a member's are drawn from production's.
        tables = torch.cat([tables, trained.producer[:, None]], 1)
        images = torch.cat([images, images[:, :1]], 1)
    members = {"of_the_run": there if count is None else count, "producer": producer}
    return replace(trained, tables=tables, images=images, record=trained.record | {"members": members})


def manifest_name(rotation: int) -> str:
    """``ensemble.json`` for rotation 0, ``rotation-r.json`` for the others."""
    return "ensemble.json" if rotation == 0 else f"rotation-{rotation}.json"


@dataclass(frozen=True)
class Verdicts:
    """A judge to export: its graph and the manifest's object of that name."""

    graph: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Verdicts":
        """What the verb ``judge`` wrote. Raises TrainingError if a file is missing or not as it should be."""
        fields, graph = read_json(directory / "judge.json"), directory / "judge.onnx"
        if not isinstance(fields, dict):
            raise TrainingError(f"{directory / 'judge.json'}: expected an object, as judge writes it")
        if not graph.is_file():
            raise TrainingError(f"{graph}: no such file")
        return cls(graph, fields)


def default_profile(trained: Run, judge: Verdicts | None) -> dict[str, Any]:
    """The recommended profile, without what the run or the missing judge cannot give."""
    if trained.producer is None:
        return FORMAT_1_PROFILE
    profile = dict(DEFAULT_PROFILE)
    if judge is None:
        del profile["image_risk"]
    if trained.posterior is None:
        profile["class_gap"] = profile["class_gap"] | {"tables": "members"}
    return profile


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
    judge: Verdicts | None = None,
    checked: bool = True,
) -> None:
    """Write, check, and only then rename into place; ``golden`` adds golden.json, which the Go tests read.

    The profile decides the format: one of format 1 leaves out what only format 2 has. ``checked`` is False for weights
    that only a GPU runs in reasonable time: the check takes ONNX Runtime's CPU provider.
    """
    older = format_of(profile) == FORMAT_1
    if older and judge is not None:
        raise TrainingError("--judge: an ensemble of format 1 has none; give a profile of format 2")
    posterior = 0 if older or trained.posterior is None else trained.posterior.shape[1]
    check_profile(profile, backbone.schedule, posterior, judge is not None)
    if not older and trained.producer is None:
        raise TrainingError(f"{trained.path}: the run has no producer table; train anew, or give a profile of format 1")
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
    image = {"channels": channels, "height": size, "width": size}
    if judge is not None:
        check_judge(judge.fields, len(trained.labels), image, str(judge.graph.with_name("judge.json")))
    with staged_directory(out, ENSEMBLE_FILES) as staged:
        tokens = trained.tables.shape[3]
        unet_files = export_unet(backbone, tokens, staged / "unet.onnx", precision)
        decoder_files = export_decoder(backbone, staged / "decoder.onnx", precision)
        graphs = {"unet": _entry(*unet_files), "decoder": _entry(*decoder_files)}
        if judge is not None:
            shutil.copyfile(judge.graph, staged / "judge.onnx")
            graphs["judge"] = _entry(staged / "judge.onnx")
        common = {
            "format": format_of(profile),
            "name": name,
            "files": graphs,
            "precision": precision,
            "opset": OPSET,
            "latent": dict(zip(("channels", "height", "width"), backbone.latent_shape, strict=True))
            | {"scale": backbone.scale, "shift": backbone.shift},
            "image": image,
            "context": {"tokens": tokens, "dim": backbone.context_dim},
            "graph": {"unet": UNET_NAMES, "decoder": DECODER_NAMES},
            "diffusion": backbone.schedule.manifest(),
            "noise": noise,
            "profile": profile,
        }
        for rotation in range(len(trained.tables)):
            sets = table_sets(trained, rotation, backbone.reference, older)
            manifest = _manifest(common, backbone, trained, rotation, sets, staged)
            if judge is not None:
                manifest["judge"] = judge.fields
            if reference_seeds:
                looked = None if "image_risk" not in profile else Judge.open(staged, manifest)
                manifest["reference"] = reference_scores(
                    backbone, sets, trained.images[rotation], profile, reference_seeds, looked
                )
            manifest["provenance"] = _provenance(trained, rotation, backbone_provenance)
            manifest["diagnostics"] = {
                "classes": {trained.labels[row["class"]]: row for row in trained.record["diagnostics"][rotation]},
                "findings": [
                    finding for finding in trained.record["findings"] if finding.startswith(f"rotation {rotation}:")
                ],
            }
            write_json(staged / manifest_name(rotation), {name: manifest[name] for name in ORDER if name in manifest})
        if checked:
            check_directory(staged, backbone)
        if golden:
            device = next(backbone.denoiser.parameters()).device
            write_golden(
                staged, lambda *inputs: backbone.denoiser(*(tensor.to(device) for tensor in inputs)).cpu(), "PyTorch"
            )


def table_sets(trained: Run, rotation: int, reference: Tensor | None, older: bool) -> TableSets:
    """What one manifest's tables file holds; ``older`` leaves out what only format 2 has."""
    if older:
        return TableSets(trained.tables[rotation], reference)
    extra = {
        name: None if tables is None else tables[rotation]
        for name, tables in (
            ("posterior", trained.posterior),
            ("producer", trained.producer),
            ("producers", trained.producers),
        )
    }
    return TableSets(trained.tables[rotation], reference, **extra)


def _manifest(
    common: dict[str, Any], backbone: Backbone, trained: Run, rotation: int, sets: TableSets, staged: Path
) -> dict[str, Any]:
    """One rotation's manifest as far as it does not depend on scores; writes its tables."""
    tables_file = staged / ("tables.safetensors" if rotation == 0 else f"tables-{rotation}.safetensors")
    save_file(_tensors(sets), tables_file)
    images = trained.images[rotation]
    classes: list[dict[str, Any]] = [
        {"label": label, "images": images[:, index].tolist()} for index, label in enumerate(trained.labels)
    ]
    manifest = common | {"files": common["files"] | {"tables": _entry(tables_file)}}
    manifest |= {"components": len(sets.members), "classes": classes, "regime": trained.record["settings"]["regime"]}
    if common["format"] == FORMAT_1:
        return manifest
    assert trained.draws is not None
    manifest["posterior"] = 0 if sets.posterior is None else len(sets.posterior)
    gaps = _expected_gaps(backbone, trained, rotation, common["profile"])
    for index, entry in enumerate(classes):
        entry["draws"] = int(trained.draws[rotation, index])
        if gaps:
            entry["class_gap"] = gaps[index]
        if trained.data is not None and trained.data[rotation][index]:
            entry["data"] = trained.data[rotation][index]
    return manifest


def _expected_gaps(backbone: Backbone, trained: Run, rotation: int, profile: dict[str, Any]) -> list[float]:
    """The closed form of each class; empty if the profile's class gap has none."""
    measure = measures_of(profile)["class_gap"]
    first = (measure.branch_step, measure.rollout_steps) == (0, 1)
    if measure.tables != "posterior" or not first or trained.laplace is None or profile["guidance_scale"] == 0:
        return []
    assert trained.producer is not None
    assert trained.worth is not None
    return [
        expected_gap(
            backbone,
            measure,
            profile["guidance_scale"],
            trained.producer[rotation, label],
            trained.laplace.root(float(trained.worth[rotation, label])),
        )
        for label in range(len(trained.labels))
    ]


def _provenance(trained: Run, rotation: int, backbone_provenance: dict[str, Any]) -> dict[str, Any]:
    chosen = {"members": trained.record["members"]} if "members" in trained.record else {}
    return chosen | {
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


def _entry(path: Path, *external: Path) -> dict[str, Any]:
    """A file of the manifest, and what a graph keeps beside it."""
    entry: dict[str, Any] = {"path": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)}
    return entry | {"external": [_entry(file) for file in external]} if external else entry


def _tensors(sets: TableSets) -> dict[str, Tensor]:
    """Each set under its name in the file: [..., K + 1, D] for one token, [..., K + 1, T, D] for several."""
    found = {TENSORS[name]: getattr(sets, name) for name in TENSORS}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    if sets.members.shape[2] == 1:
        tensors = {name: tensor.squeeze(-2) for name, tensor in tensors.items()}
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def reference_scores(
    backbone: Backbone,
    sets: TableSets,
    images: Tensor,
    profile: dict[str, Any],
    seeds: int,
    judge: Judge | None = None,
    batch: int = 64,
) -> dict[str, Any]:
    """Scores under ``profile`` of the classes with the most images: how large a score is if nothing is missing.

    images [M, K]. The seeds are not those that the evaluation uses. Image risk leaves out classes that the judge cannot
    tell.
    """
    device = next(backbone.denoiser.parameters()).device
    tables = {name: each.to(device) for name, each in sets.measured().items()}
    counts = images.float().mean(0)
    well_sampled = torch.nonzero(counts == counts.max()).flatten().tolist()
    requests = make_requests(well_sampled, seeds, len(sets.members), first_seed=1_000_000)
    parts: dict[str, list[Tensor]] = {name: [] for name in measures_of(profile)}
    for index in torch.arange(len(requests)).split(batch):
        part = Requests(requests.classes[index], requests.seeds[index], requests.carriers[index])
        latents = part.latents(backbone.latent_shape).to(device)
        scores = profile_scores(backbone.denoiser, backbone.schedule, tables, part, latents, profile)
        if judge is not None:
            scores["image_risk"] = _judged(backbone, tables["producer"][0], part.classes, latents, profile, judge)
        for measurement, values in scores.items():
            parts[measurement].append(values.cpu())
    result = {}
    for measurement, batches in parts.items():
        joined = torch.cat(batches).double()
        if len(joined):
            quantiles = {str(quantile): float(joined.quantile(quantile)) for quantile in QUANTILES}
            result[measurement] = {"n": len(joined), "mean": float(joined.mean()), "quantiles": quantiles}
    return result


@torch.no_grad()
def _judged(
    backbone: Backbone, table: Tensor, classes: Tensor, latents: Tensor, profile: dict[str, Any], judge: Judge
) -> Tensor:
    """Image risk of the requests whose class the judge can tell."""
    kept = torch.tensor([judge.can_tell(label) for label in classes.tolist()])
    if not bool(kept.any()):
        return torch.empty(0)
    measure = measures_of(profile)["image_risk"]
    sampler = Sampler(backbone.schedule, measure.steps, float(profile["guidance_scale"]))
    clean = predicted_latents(
        backbone.denoiser, sampler, table, classes[kept], latents[kept.to(latents.device)], measure.rollout_steps
    )
    image = backbone.autoencoder(clean / backbone.scale + backbone.shift)
    return image_risk(judge.probabilities(image.cpu()), classes[kept])
