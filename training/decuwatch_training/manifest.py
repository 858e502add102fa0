"""Reading an exported ensemble: the manifest within the bounds that decuwatch holds it to, and every file by its
digest.

docs/ensemble-format.md describes each field. ``export`` reads what it has written through this reader as well.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from decuwatch_training.branch import check_profile
from decuwatch_training.configuration import FLAG, Rule, check_fields, given, number, only, shorten, whole
from decuwatch_training.diffusion import NoiseSchedule
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import read_json, sha256_file

FORMAT = "decuwatch-ensemble/1"
NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")

OBJECT = given(Rule("an object", lambda found: isinstance(found, dict)))
LIST = Rule("a list", lambda found: isinstance(found, list))
TENSOR_NAME = given(Rule("1 to 256 characters", lambda found: isinstance(found, str) and 1 <= len(found) <= 256))
SIDE = given(whole(1, 1024))
PIXELS = given(whole(1, 8192))

MANIFEST = {
    "format": given(only(FORMAT)),
    "name": given(
        Rule(
            "1 to 64 of a-z 0-9 - _, beginning with a letter",
            lambda found: isinstance(found, str) and NAME.fullmatch(found) is not None,
        )
    ),
    "files": OBJECT,
    "precision": given(only("fp32", "fp16")),
    "opset": given(whole(13, 22)),
    "latent": OBJECT,
    "image": OBJECT,
    "context": OBJECT,
    "graph": OBJECT,
    "diffusion": OBJECT,
    "components": given(whole(2, 64)),
    "classes": given(
        Rule("a list of 1 to 100000 objects", lambda found: isinstance(found, list) and 1 <= len(found) <= 100_000)
    ),
    "regime": given(only("exposure", "disagreement")),
    "noise": given(only("torch-cpu", "torch-cuda", "decuwatch")),
    "profile": OBJECT,
    "reference": Rule("an object", lambda found: isinstance(found, dict)),
    "provenance": OBJECT,
    "diagnostics": OBJECT,
}
FILES = {"unet": OBJECT, "decoder": OBJECT, "tables": OBJECT}
FILE = {
    "path": given(
        Rule(
            "the name of a file in the same directory",
            lambda found: (
                isinstance(found, str)
                and 1 <= len(found) <= 255
                and found not in (".", "..")
                and not set("/\\\0") & set(found)
            ),
        )
    ),
    "size": given(whole(1, 2**63 - 1)),
    "sha256": given(
        Rule(
            "64 lower-case hexadecimal digits",
            lambda found: isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) is not None,
        )
    ),
}
PARTS: dict[str, dict[str, Rule]] = {
    "latent": {
        "channels": SIDE,
        "height": SIDE,
        "width": SIDE,
        "scale": given(number(0, 1e300, beyond=True)),
        "shift": given(number(-1e300, 1e300)),
    },
    "image": {"channels": given(only(1, 3)), "height": PIXELS, "width": PIXELS},
    "context": {"tokens": SIDE, "dim": given(whole(1, 8192))},
    "graph": {"unet": OBJECT, "decoder": OBJECT},
    "diffusion": {
        "train_timesteps": given(whole(1, 100_000)),
        "beta_schedule": given(only("scaled_linear", "linear", "squaredcos_cap_v2")),
        "beta_start": given(number(0, 1, beyond=True)),
        "beta_end": given(number(0, 1, beyond=True)),
        "prediction": given(only("epsilon", "v_prediction", "sample")),
        "timestep_spacing": given(only("leading", "trailing", "linspace", "compvis")),
        "steps_offset": given(whole(0, 99_999)),
        "set_alpha_to_one": given(FLAG),
    },
}
GRAPHS = {
    "unet": dict.fromkeys(("latent", "timestep", "context", "output"), TENSOR_NAME),
    "decoder": dict.fromkeys(("latent", "output"), TENSOR_NAME),
}
CLASS = {
    "label": given(
        Rule("a text of 1 to 128 characters", lambda found: isinstance(found, str) and 1 <= len(found) <= 128)
    ),
    "images": given(
        Rule(
            "a list of whole numbers, none negative",
            lambda found: isinstance(found, list) and all(type(count) is int and count >= 0 for count in found),
        )
    ),
}


def manifests_of(directory: Path) -> list[Path]:
    """``ensemble.json`` and its rotations. Raises TrainingError if there is none."""
    first = directory / "ensemble.json"
    if not first.is_file():
        raise TrainingError(f"{first}: no such manifest")
    return [first, *sorted(directory.glob("rotation-*.json"))]


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose fields are in their bounds and whose files are beside it, each with its size and digest.

    Raises TrainingError that names the file and the field.
    """
    manifest = read_json(path)
    where = str(path)
    if not isinstance(manifest, dict):
        raise TrainingError(f"{where}: expected a JSON object with format {FORMAT!r}, found {shorten(manifest)}")
    if manifest.get("format") != FORMAT:
        raise TrainingError(f"{where}: format {shorten(manifest.get('format'))}: expected {FORMAT!r}")
    check_fields(manifest, MANIFEST, {}, where)
    for part, rules in PARTS.items():
        check_fields(manifest[part], rules, {}, f"{where}: {part}")
    for graph, rules in GRAPHS.items():
        check_fields(manifest["graph"][graph], rules, {}, f"{where}: graph.{graph}")
    _check_classes(manifest, where)
    _check_diffusion(manifest["diffusion"], f"{where}: diffusion")
    try:
        check_profile(manifest["profile"], NoiseSchedule(**manifest["diffusion"]))
    except TrainingError as err:
        raise TrainingError(f"{where}: {err}") from err
    _check_files(manifest, path)
    return manifest


def files_of(manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file that the manifest names, after its field."""
    for part in FILES:
        entry = manifest["files"][part]
        yield f"files.{part}", entry
        for index, external in enumerate(entry.get("external", [])):
            yield f"files.{part}.external[{index}]", external


def inputs_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 in hex of what latents and scores depend on, without the name, the profile and the provenance."""
    digests = [entry["sha256"] for _, entry in files_of(manifest)]
    fields = {name: manifest[name] for name in ("latent", "context", "diffusion", "components", "classes")}
    text = json.dumps([digests, fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_classes(manifest: Mapping[str, Any], where: str) -> None:
    labels = set()
    for index, entry in enumerate(manifest["classes"]):
        at = f"{where}: classes[{index}]"
        if not isinstance(entry, dict):
            raise TrainingError(f"{at}: expected an object, found {shorten(entry)}")
        check_fields(entry, CLASS, {}, at)
        if len(entry["images"]) != manifest["components"]:
            raise TrainingError(f"{at}: images: expected a number for each of the {manifest['components']} components")
        if entry["label"] in labels:
            raise TrainingError(f"{at}: label {shorten(entry['label'])}: expected one that no class before it has")
        labels.add(entry["label"])


def _check_diffusion(diffusion: Mapping[str, Any], where: str) -> None:
    if not diffusion["beta_start"] < diffusion["beta_end"] < 1:
        raise TrainingError(
            f"{where}: beta_start {diffusion['beta_start']}: expected less than beta_end, and that less than 1"
        )
    if not diffusion["steps_offset"] < diffusion["train_timesteps"]:
        raise TrainingError(f"{where}: steps_offset {diffusion['steps_offset']}: expected less than train_timesteps")
    if diffusion["timestep_spacing"] == "compvis" and (diffusion["steps_offset"] != 1 or diffusion["set_alpha_to_one"]):
        raise TrainingError(f"{where}: timestep_spacing 'compvis': expected steps_offset 1 and set_alpha_to_one false")


def _check_files(manifest: Mapping[str, Any], path: Path) -> None:
    files = check_fields(manifest["files"], FILES, {}, f"{path}: files")
    for part, entry in files.items():
        check_fields(entry, FILE if part == "tables" else FILE | {"external": LIST}, {}, f"{path}: files.{part}")
    named = set()
    for field, entry in files_of(manifest):
        if not isinstance(entry, dict):
            raise TrainingError(f"{path}: {field}: expected an object, found {shorten(entry)}")
        if ".external" in field:
            check_fields(entry, FILE, {}, f"{path}: {field}")
        if entry["path"] in named:
            raise TrainingError(f"{path}: {field}: path {shorten(entry['path'])}: expected a file that is named once")
        named.add(entry["path"])
        file = path.parent / entry["path"]
        if not file.is_file():
            raise TrainingError(f"{file}: no such file; {path.name} names it as {field}")
        if file.stat().st_size != entry["size"] or sha256_file(file) != entry["sha256"]:
            raise TrainingError(f"{file}: size or SHA-256 is not what {path.name} says")


def read_tables(directory: Path, manifest: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Tables [M, K + 1, T, D] and the reference table [K + 1, T, D] of one manifest, shapes and values checked."""
    file = directory / manifest["files"]["tables"]["path"]
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as err:
        raise TrainingError(f"{file}: expected the ensemble's tables: {shorten(str(err))}") from err
    rows, tokens, dim = len(manifest["classes"]) + 1, manifest["context"]["tokens"], manifest["context"]["dim"]
    row = [dim] if tokens == 1 else [tokens, dim]
    shapes = {"tables": [manifest["components"], rows, *row], "reference": [rows, *row]}
    if "tables" not in tensors:
        raise TrainingError(f"{file}: expected a tensor 'tables'")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise TrainingError(f"{file}: {shorten(name)}: expected the tensors 'tables' and 'reference' alone")
        if list(tensor.shape) != shapes[name]:
            raise TrainingError(f"{file}: {name} of shape {list(tensor.shape)}, expected {shapes[name]}")
        if tensor.dtype != torch.float32:
            raise TrainingError(f"{file}: {name} of {tensor.dtype}, expected torch.float32")
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"{file}: {name} holds a value that is not finite")
    reference = tensors.get("reference")
    table = tensors["tables"].view(manifest["components"], rows, tokens, dim)
    return table, None if reference is None else reference.view(rows, tokens, dim)
