"""Reading an exported ensemble: the manifest within the bounds that decuwatch holds it to, and every file by its
digest.

docs/ensemble-format.md describes each field. ``export`` reads what it has written through this reader as well.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from decuwatch_training.configuration import (
    FLAG,
    Rule,
    check_fields,
    each,
    either,
    given,
    number,
    only,
    shorten,
    whole,
)
from decuwatch_training.diffusion import FlowSchedule, schedule_of
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import read_json, sha256_file
from decuwatch_training.profile import FORMAT_1, FORMAT_2, check_profile

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")

OBJECT = given(Rule("an object", lambda found: isinstance(found, dict)))
LIST = Rule("a list", lambda found: isinstance(found, list))
TENSOR_NAME = given(Rule("1 to 256 characters", lambda found: isinstance(found, str) and 1 <= len(found) <= 256))
SIDE = given(whole(1, 1024))
PIXELS = given(whole(1, 8192))

MANIFEST = {
    "format": given(only(FORMAT_1, FORMAT_2)),
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
MANIFEST_2 = MANIFEST | {
    "posterior": given(either(only(0), whole(2, 64))),
    "judge": Rule("an object", lambda found: isinstance(found, dict)),
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
}
DIFFUSION: dict[str, dict[str, Rule]] = {
    "ddim": {
        "kind": only("ddim"),
        "train_timesteps": given(whole(1, 100_000)),
        "beta_schedule": given(only("scaled_linear", "linear", "squaredcos_cap_v2")),
        "beta_start": given(number(0, 1, beyond=True)),
        "beta_end": given(number(0, 1, beyond=True)),
        "prediction": given(only("epsilon", "v_prediction", "sample")),
        "timestep_spacing": given(only("leading", "trailing", "linspace", "compvis")),
        "steps_offset": given(whole(0, 99_999)),
        "set_alpha_to_one": given(FLAG),
    },
    "flow_match": {
        "kind": given(only("flow_match")),
        "train_timesteps": given(whole(1, 100_000)),
        "shift": given(number(0, 1000, beyond=True)),
        "use_dynamic_shifting": given(FLAG),
        "base_shift": given(number(-1000, 1000)),
        "max_shift": given(number(-1000, 1000)),
        "base_image_seq_len": given(whole(1, 2**31)),
        "max_image_seq_len": given(whole(1, 2**31)),
        "image_seq_len": given(whole(1, 2**31)),
        "time_shift_type": given(only("exponential", "linear")),
        "shift_terminal": given(number(0, 0.999999)),
        "prediction": given(only("velocity")),
        "timestep_spacing": given(only("linspace", "trailing")),
    },
}
"""Fields of the ``diffusion`` object, by its kind."""
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


COUNT = whole(0, 2**63 - 1)
SHARE = number(0, 1)
CLASS_2 = CLASS | {
    "draws": given(COUNT),
    "class_gap": number(0, 1e300, beyond=True),
    "data": Rule("an object", lambda found: isinstance(found, dict)),
}
DATA = {
    "images": given(COUNT),
    "distinct": given(COUNT),
    "n_eff": given(number(0, 1e300)),
    "near_duplicates": given(COUNT),
    "near_duplicate_groups": given(COUNT),
    "neighbor_label_share": given(either(only(None), SHARE)),
    "likely_mislabeled": given(COUNT),
    "outliers": given(COUNT),
}
JUDGE = {
    "input": TENSOR_NAME,
    "output": TENSOR_NAME,
    "channels": given(only(1, 3)),
    "height": PIXELS,
    "width": PIXELS,
    "range": given(
        Rule(
            "two numbers, the second above the first",
            lambda found: (
                isinstance(found, list)
                and len(found) == 2
                and all(type(value) in (int, float) and math.isfinite(value) for value in found)
                and found[0] < found[1]
            ),
        )
    ),
    "resize": given(only("none", "bilinear")),
    "outputs": given(each(whole(-1, 99_999))),
    "accuracy": given(each(either(only(None), SHARE))),
    "held_out": given(each(COUNT)),
    "least_accuracy": given(SHARE),
    "measured": given(Rule("a text", lambda found: isinstance(found, str))),
}
"""The manifest's ``judge``; the verb ``judge`` writes the same object to judge.json."""


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
        raise TrainingError(f"{where}: expected a JSON object with format {FORMAT_2!r}, found {shorten(manifest)}")
    if manifest.get("format") not in (FORMAT_1, FORMAT_2):
        raise TrainingError(f"{where}: format {shorten(manifest.get('format'))}: expected {FORMAT_1!r} or {FORMAT_2!r}")
    check_fields(manifest, MANIFEST if manifest["format"] == FORMAT_1 else MANIFEST_2, {}, where)
    for part, rules in PARTS.items():
        check_fields(manifest[part], rules, {}, f"{where}: {part}")
    kind = manifest["diffusion"].get("kind", "ddim")
    if kind not in DIFFUSION:
        raise TrainingError(f"{where}: diffusion: kind {shorten(kind)}: expected {' or '.join(DIFFUSION)}")
    check_fields(manifest["diffusion"], DIFFUSION[kind], {}, f"{where}: diffusion")
    for graph, rules in GRAPHS.items():
        check_fields(manifest["graph"][graph], rules, {}, f"{where}: graph.{graph}")
    _check_classes(manifest, where)
    _check_diffusion(manifest["diffusion"], f"{where}: diffusion")
    if "judge" in manifest:
        check_judge(manifest["judge"], len(manifest["classes"]), manifest["image"], f"{where}: judge")
    _check_profile(manifest, where)
    _check_files(manifest, path)
    return manifest


def check_judge(judge: Mapping[str, Any], classes: int, image: Mapping[str, Any], where: str) -> None:
    """Raise TrainingError that names the first field that is out of its bounds.

    ``image`` is the manifest's object of that name.
    """
    check_fields(judge, JUDGE, {}, where)
    if judge["channels"] != image["channels"]:
        raise TrainingError(f"{where}: channels {judge['channels']}: expected the image's, {image['channels']}")
    size, given_size = (image["height"], image["width"]), (judge["height"], judge["width"])
    if judge["resize"] == "none" and given_size != size:
        raise TrainingError(f"{where}: resize 'none': expected height and width of the image, {size[0]} and {size[1]}")
    if max(judge["outputs"]) < 0 or max(judge["outputs"]) >= classes:
        raise TrainingError(f"{where}: outputs: expected indices of the {classes} classes, or -1, not all of them -1")
    for field in ("accuracy", "held_out"):
        if len(judge[field]) != classes:
            raise TrainingError(f"{where}: {field}: expected a number for each of the {classes} classes")
    for label, accuracy in enumerate(judge["accuracy"]):
        if accuracy is not None and label not in judge["outputs"]:
            raise TrainingError(f"{where}: accuracy[{label}] {accuracy}: expected null, since no output stands for it")


def _check_profile(manifest: Mapping[str, Any], where: str) -> None:
    parts = (manifest.get("posterior", 0), "judge" in manifest, manifest["format"])
    try:
        check_profile(manifest["profile"], schedule_of(manifest["diffusion"]), *parts)
    except TrainingError as err:
        raise TrainingError(f"{where}: {err}") from err


def files_of(manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file that the manifest names, after its field."""
    for part, entry in manifest["files"].items():
        yield f"files.{part}", entry
        for index, external in enumerate(entry.get("external", [])):
            yield f"files.{part}.external[{index}]", external


def inputs_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 in hex of what latents and scores depend on, without the name, the profile and the provenance."""
    digests = [entry["sha256"] for _, entry in files_of(manifest)]
    names = ("latent", "context", "diffusion", "components", "classes", "posterior", "judge")
    fields = {name: manifest[name] for name in names if name in manifest}
    text = json.dumps([digests, fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_classes(manifest: Mapping[str, Any], where: str) -> None:
    labels = set()
    for index, entry in enumerate(manifest["classes"]):
        at = f"{where}: classes[{index}]"
        if not isinstance(entry, dict):
            raise TrainingError(f"{at}: expected an object, found {shorten(entry)}")
        check_fields(entry, CLASS if manifest["format"] == FORMAT_1 else CLASS_2, {}, at)
        if "data" in entry:
            check_fields(entry["data"], DATA, {}, f"{at}: data")
        if len(entry["images"]) != manifest["components"]:
            raise TrainingError(f"{at}: images: expected a number for each of the {manifest['components']} components")
        if entry["label"] in labels:
            raise TrainingError(f"{at}: label {shorten(entry['label'])}: expected one that no class before it has")
        labels.add(entry["label"])


def _check_diffusion(diffusion: Mapping[str, Any], where: str) -> None:
    if diffusion.get("kind") == "flow_match":
        if not diffusion["base_image_seq_len"] < diffusion["max_image_seq_len"]:
            raise TrainingError(
                f"{where}: base_image_seq_len {diffusion['base_image_seq_len']}: expected less than max_image_seq_len"
            )
        linear = diffusion["use_dynamic_shifting"] and diffusion["time_shift_type"] == "linear"
        if linear and FlowSchedule(**diffusion).mu <= 0:
            raise TrainingError(f"{where}: image_seq_len {diffusion['image_seq_len']}: expected a positive mu there")
        return
    if not diffusion["beta_start"] < diffusion["beta_end"] < 1:
        raise TrainingError(
            f"{where}: beta_start {diffusion['beta_start']}: expected less than beta_end, and that less than 1"
        )
    if not diffusion["steps_offset"] < diffusion["train_timesteps"]:
        raise TrainingError(f"{where}: steps_offset {diffusion['steps_offset']}: expected less than train_timesteps")
    if diffusion["timestep_spacing"] == "compvis" and (diffusion["steps_offset"] != 1 or diffusion["set_alpha_to_one"]):
        raise TrainingError(f"{where}: timestep_spacing 'compvis': expected steps_offset 1 and set_alpha_to_one false")


def _check_files(manifest: Mapping[str, Any], path: Path) -> None:
    wanted = FILES | {"judge": OBJECT} if "judge" in manifest else FILES
    files = check_fields(manifest["files"], wanted, {}, f"{path}: files")
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


@dataclass(frozen=True)
class TableSets:
    """The tables of one manifest, each [K + 1, T, D]; sets of several have a first dimension for them."""

    members: Tensor
    reference: Tensor | None = None
    """The backbone's own table."""
    posterior: Tensor | None = None
    producer: Tensor | None = None
    producers: Tensor | None = None
    """Further trainings of the producer's kind, for evaluation only."""

    def measured(self) -> dict[str, Tensor]:
        """The sets [M, K + 1, T, D] that a profile may name, the producer as a set of one."""
        producer = None if self.producer is None else self.producer[None]
        named = {"members": self.members, "posterior": self.posterior, "producer": producer}
        return {name: tables for name, tables in named.items() if tables is not None}


TENSORS = {"members": "tables"} | {name: name for name in ("reference", "posterior", "producer", "producers")}
"""Names in tables.safetensors by field of TableSets."""


def read_tables(directory: Path, manifest: Mapping[str, Any]) -> TableSets:
    """The tables of one manifest, shapes and values checked. Raises TrainingError that names the file."""
    file = directory / manifest["files"]["tables"]["path"]
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as err:
        raise TrainingError(f"{file}: expected the ensemble's tables: {shorten(str(err))}") from err
    rows, tokens, dim = len(manifest["classes"]) + 1, manifest["context"]["tokens"], manifest["context"]["dim"]
    table = [rows, dim] if tokens == 1 else [rows, tokens, dim]
    counts = {"tables": [manifest["components"]], "reference": []}
    required = {"tables"}
    if manifest["format"] == FORMAT_2:
        extra = len(tensors["producers"]) if "producers" in tensors and tensors["producers"].dim() else 0
        counts |= {"producer": [], "producers": [max(1, extra)]}
        if manifest["posterior"]:
            counts["posterior"] = [manifest["posterior"]]
            required |= {"posterior", "producer"}
        if "image_risk" in manifest["profile"]:
            required.add("producer")
    for name in sorted(required - tensors.keys()):
        raise TrainingError(f"{file}: expected a tensor {name!r}")
    for name, tensor in tensors.items():
        if name not in counts:
            raise TrainingError(f"{file}: {shorten(name)}: expected the tensors {', '.join(counts)} alone")
        if list(tensor.shape) != counts[name] + table:
            raise TrainingError(f"{file}: {name} of shape {list(tensor.shape)}, expected {counts[name] + table}")
        if tensor.dtype != torch.float32:
            raise TrainingError(f"{file}: {name} of {tensor.dtype}, expected torch.float32")
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"{file}: {name} holds a value that is not finite")
    shaped = {name: tensor.view(*counts[name], rows, tokens, dim) for name, tensor in tensors.items()}
    return TableSets(**{field: shaped[name] for field, name in TENSORS.items() if name in shaped})
