"""Checkpoints: a training loop's whole state in one file, written aside and renamed, read without unpickling code."""

import io
from pathlib import Path
from typing import Any

import torch

from decuwatch_training.errors import TrainingError
from decuwatch_training.files import write_file

CHECKPOINT_FILE = "checkpoint.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path`` by ``state``; when that fails (a full disk) the former checkpoint stands."""
    buffer = io.BytesIO()  # written by Python, whose errors say when the disk is full; torch's own writer does not
    torch.save(state, buffer)
    write_file(path, lambda aside: aside.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state saved under the same ``settings``, or None without a checkpoint.

    Raises TrainingError when the file is broken or was written under other settings.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises UnpicklingError, RuntimeError, EOFError and others for a broken file
        raise TrainingError(f"{path}: not a checkpoint that can be read; delete it to begin anew: {err}") from err
    if not isinstance(state, dict) or "settings" not in state:
        raise TrainingError(f"{path}: expected a checkpoint with its settings")
    former = state["settings"]
    differing = sorted(name for name in settings.keys() | former.keys() if settings.get(name) != former.get(name))
    if differing:
        name = differing[0]
        raise TrainingError(
            f"{path}: this run was begun with {name} = {former.get(name)!r}, not {settings.get(name)!r}; repeat its "
            "arguments to go on, or choose another --out"
        )
    return state
