"""Run by hand: what M = 5 components cost when they train together, against five runs of one component.

PYTHONPATH=training "$(training/setup)/bin/python" training/together.py BACKBONE
"""

import sys
import time
from pathlib import Path

import torch

from decuwatch_training.backbone import load_backbone
from decuwatch_training.loop import pick_device
from decuwatch_training.tables import TableSettings, train_tables


def main(path: Path) -> None:
    """Train both ways on random latents and print wall-clock and processor seconds."""
    device = pick_device()
    backbone = load_backbone(path).to(device)
    assert backbone.reference is not None
    classes = len(backbone.reference) - 1
    labels = tuple(str(index) for index in range(classes))
    latents, label = torch.randn(2000, *backbone.latent_shape), torch.arange(2000) % classes
    for batch in (1, 8, 32):
        settings = TableSettings(components=5, steps=40, batch=batch)
        figures = []
        for chosen in ([None], [(0, component) for component in range(5)]):
            wall, processor = time.monotonic(), time.process_time()
            for only in chosen:
                train_tables(backbone, latents, label, labels, settings, device=device, only=only)
            figures.append((time.monotonic() - wall, time.process_time() - processor))
        (wall, processor), (walls, processors) = figures
        print(
            f"{device.type}, {torch.get_num_threads()} threads, {batch} rows a table and step: together {wall:.1f} s "
            f"({processor:.1f} s of processor), ",
            end="",
        )
        print(f"five runs {walls:.1f} s ({processors:.1f} s): {walls / wall:.2f} times ({processors / processor:.2f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
