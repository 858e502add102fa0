"""Writes a run directory as ``train`` does, from a run in memory."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from decuwatch_training.files import write_json
from decuwatch_training.train import Run


def save_run(run: Run, path: Path) -> None:
    """The files that load_run reads."""
    path.mkdir()
    save_file(
        {"tables": run.tables.contiguous(), "images": run.images.to(torch.int64).contiguous()},
        path / "tables.safetensors",
    )
    write_json(path / "run.json", {**run.record, "labels": list(run.labels)})
