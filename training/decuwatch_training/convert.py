"""Convert a Lightning checkpoint to safetensors without running any code that it holds.

Published latent-diffusion checkpoints keep objects of the training program beside their weights, which torch's safe
reader refuses. Here each of their classes is replaced by an empty one, so that nothing of the file is imported or
called; only the tensors of ``state_dict`` are written.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from decuwatch_training.configuration import shorten
from decuwatch_training.errors import TrainingError
from decuwatch_training.files import write_file
from decuwatch_training.weights import tensors_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train convert``."""
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file that torch.save wrote")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")


def run(arguments: argparse.Namespace) -> None:
    """Write the tensors and print what was left out."""
    path, out = arguments.checkpoint, arguments.out
    if out.suffix != ".safetensors":
        raise TrainingError(f"{out}: expected a name that ends in .safetensors")
    if not path.is_file():
        raise TrainingError(f"{path}: no such checkpoint")
    try:
        classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        with torch.serialization.safe_globals([(_empty_class(name), name) for name in classes]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises UnpicklingError, RuntimeError, ValueError and others for a broken file
        raise TrainingError(
            f"{path}: cannot be read without running code in it: "
            f"{shorten(str(err).splitlines()[0] if str(err) else err)}"
        ) from err
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors_of(loaded, path).items()}
    write_file(out, lambda aside: save_file(tensors, aside))
    left = f"; left out objects of {', '.join(classes)}" if classes else ""
    print(f"{out}: {len(tensors)} tensors{left}")


def _empty_class(name: str) -> Any:
    """A class that takes any arguments and any state and ignores them; a plain dictionary if it is a dictionary."""

    def take(self: Any, *arguments: Any, **settings: Any) -> None:
        """Ignore what the checkpoint gives."""

    def dictionary(cls: Any, *arguments: Any) -> dict[Any, Any]:
        """The unpickler fills plain dictionaries only."""
        return {}

    called = name.rpartition(".")[2]
    return type(
        called,
        (),
        {"__new__": dictionary} if called.lower().endswith("dict") else {"__init__": take, "__setstate__": take},
    )
