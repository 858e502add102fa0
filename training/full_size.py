"""Run by hand, once: the paper's full-size model (cin256-v2's configuration) with random weights.

Builds the U-Net and the first stage, counts parameters, takes one training step of the tables, exports the U-Net and
holds ONNX Runtime against PyTorch. Takes minutes and about 16 GB of memory on a CPU; prints one line for each figure.

    PYTHONPATH=training "$(training/setup)/bin/python" training/full_size.py DIRECTORY
"""

import resource
import sys
import time
from pathlib import Path

import torch

from decuwatch_training.check import _worst
from decuwatch_training.graphs import Graph, export_unet
from decuwatch_training.paper import paper_backbone
from decuwatch_training.tables import TableSettings, train_tables


def main(directory: Path) -> None:
    """Print what was measured."""
    begun = time.monotonic()

    def say(what: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{time.monotonic() - begun:7.1f} s  {peak:5.1f} GB at most  {what}", flush=True)

    torch.manual_seed(0)
    backbone = paper_backbone()
    say(
        f"U-Net: {backbone.parameter_count():,} parameters; first stage: "
        f"{sum(p.numel() for p in backbone.autoencoder.parameters()):,}"
    )
    labels = tuple(f"{index:04}" for index in range(1000))
    settings = TableSettings(components=2, steps=1, batch=1, rate=1e-5)
    begin = time.monotonic()
    trained = train_tables(backbone, torch.randn(1000, 3, 64, 64), torch.arange(1000), labels, settings)
    moved = int((trained.tables != trained.start).any(-1).sum())
    say(
        f"one training step of 2 tables, {trained.tables[0, 0].numel():,} parameters each: "
        f"{time.monotonic() - begin:.1f} s, {moved} rows moved"
    )
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    files = export_unet(backbone, 1, directory / "unet.onnx", "fp32")
    say(f"export: {time.monotonic() - begin:.1f} s, {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")
    latent, timestep, context = torch.randn(2, 3, 64, 64), torch.tensor([981, 1]), torch.randn(2, 1, 512)
    with torch.no_grad():
        wanted = backbone.denoiser(latent, timestep, context)
    del backbone
    graph = Graph(directory / "unet.onnx")
    begin = time.monotonic()
    found = graph(latent, timestep, context)
    say(f"ONNX Runtime: 2 rows in {time.monotonic() - begin:.1f} s, relative error {_worst(found, wanted):.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
