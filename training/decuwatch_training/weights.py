"""Reading checkpoints: tensors and nothing else, and every one of them into its place in the model.

Nothing is ever unpickled freely: ``.ckpt`` and ``.bin`` files go through torch's weights-only reader.
"""

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from decuwatch_training.configuration import shorten
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import read_json

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What float32 holds exactly."""
STEM = "diffusion_pytorch_model"
LOSSLESS_VARIANTS = ("fp32", "fp16", "bf16")
"""Variants that store the same weights in another way. Others (ema, non_ema) are other weights."""
NOT_WEIGHTS = ("optimizer_states", "callbacks", "lr_schedulers", "loops", "hyper_parameters")
"""What Lightning keeps in a checkpoint beside the weights."""


def read_state_dict(path: Path, what: str = "tensors") -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.ckpt`` or ``.bin`` file. Raises TrainingError that names the file."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as err:
            raise TrainingError(f"{path}: expected {what} in a safetensors file: {shorten(str(err))}") from err
    try:
        with warnings.catch_warnings():  # of the pickle's protocol; what comes out is checked tensor by tensor
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as err:  # torch raises UnpicklingError, RuntimeError, EOFError and others for a broken file
        target = shlex.quote(str(path.with_suffix(".safetensors")))
        raise TrainingError(
            f"{path}: expected a checkpoint that holds tensors only ({what}), since code in one is never run; if it is "
            "a Lightning checkpoint, "
            f"convert it to safetensors: decuwatch-train convert {shlex.quote(str(path))} {target}"
        ) from err
    return tensors_of(loaded, path)


def tensors_of(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The one dictionary of tensors of a loaded checkpoint, its own or the one under ``state_dict``."""
    if not isinstance(loaded, dict):
        raise TrainingError(
            f"{path}: expected a dictionary of tensors, or one under 'state_dict'; found "
            f"{shorten(type(loaded).__name__)}"
        )
    state = loaded
    if "state_dict" in loaded:
        state = loaded["state_dict"]
        for name, value in loaded.items():
            held = isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())
            if held and name not in ("state_dict", *NOT_WEIGHTS):
                raise TrainingError(
                    f"{path}: holds tensors under {name!r} beside 'state_dict'; save those that you mean as safetensors"
                )
    if not isinstance(state, dict) or not state:
        raise TrainingError(f"{path}: expected a dictionary of tensors, or one under 'state_dict'")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TrainingError(f"{path}: {shorten(name)} is a {type(tensor).__name__}, expected a tensor")
    return dict(state)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_folder(folder: Path, what: str) -> tuple[dict[str, Tensor], Path]:
    """The weights of one part of a diffusers directory, and the file that they came from.

    As diffusers does, a sharded checkpoint comes first, then one file of safetensors, then ``.bin``. Without any of
    them the one variant that there is (``.fp16.safetensors``) is taken. Raises TrainingError that names the file.
    """
    plain = [
        folder / f"{STEM}{ending}" for ending in (".safetensors.index.json", ".bin.index.json", ".safetensors", ".bin")
    ]
    found = [file for file in plain if file.is_file()]
    indexes = [file for file in found if file.suffix == ".json"]
    if indexes and len(found) > 1:
        raise TrainingError(f"{folder}: holds {' and '.join(file.name for file in found)}, expected one of them")
    if not found:
        found = _variants(folder)
    file = found[0]
    return (_read_shards(file, what) if file.suffix == ".json" else read_state_dict(file, what)), file


def _variants(folder: Path) -> list[Path]:
    names = {}
    for file in sorted(folder.glob(f"{STEM}.*")):
        for ending in (".safetensors", ".bin"):
            if file.name.endswith(ending):
                names[file] = file.name.removeprefix(f"{STEM}.").removesuffix(ending)
            if file.name.startswith(f"{STEM}{ending}.index.") and file.suffix == ".json":
                names[file] = file.name.removeprefix(f"{STEM}{ending}.index.").removesuffix(".json")
    variants = {file: name for file, name in names.items() if name and "-of-" not in name}
    safe = {file: name for file, name in variants.items() if ".safetensors" in file.name} or variants
    lossless = [file for file, name in safe.items() if name in LOSSLESS_VARIANTS]
    if len(safe) == 1 and lossless:
        return lossless
    there = ", ".join(file.name for file in safe) or "none"
    raise TrainingError(
        f"{folder}: expected {STEM}.safetensors; variants found: {there}; rename the one that production uses to it"
    )


def _read_shards(index: Path, what: str) -> dict[str, Tensor]:
    """All shards of an index; each tensor once, and in the shard that the index says."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(shard, str) and Path(shard).name == shard for shard in places.values())
    ):
        raise TrainingError(f"{index}: weight_map: expected the name of a file in the same directory for every tensor")
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        for name, tensor in read_state_dict(index.with_name(shard), what).items():
            if places.get(name) != shard:
                raise TrainingError(
                    f"{index}: weight_map: {name} is in {shard}, the index says {places.get(name, 'nothing of it')}"
                )
            weights[name] = tensor
    for name, shard in places.items():
        if name not in weights:
            raise TrainingError(f"{index}: weight_map: {name} is not in {shard}")
    return weights


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor], path: Path, part: str) -> None:
    """Load every weight. Raises TrainingError if one is missing, left over, NaN, or has another shape or type."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    shared = {name: tensor for name, tensor in weights.items() if name in expected}
    wrong = [
        f"{name} {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in shared.items()
        if tensor.shape != expected[name].shape
    ]
    types = [
        f"{name} {_type(tensor)}, expected {', '.join(_name(kind) for kind in FLOATS)}"
        for name, tensor in shared.items()
        if tensor.dtype not in FLOATS
    ]
    for problem, names in (
        ("lacks", missing),
        ("has besides", extra),
        ("has in another shape", wrong),
        ("has in another type", types),
    ):
        if names:
            raise TrainingError(f"{path}: the {part} {problem} {len(names)} tensors, the first: {names[0]}")
    check_all_finite(shared, path)
    model.load_state_dict(shared)


def check_all_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise TrainingError that names the first tensor with a NaN or an infinity."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"{path}: {name} holds {int((~torch.isfinite(tensor)).sum())} values that are not finite"
            )


def _type(tensor: Tensor) -> str:
    return _name(tensor.dtype)


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
