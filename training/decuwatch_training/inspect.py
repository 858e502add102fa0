"""Say what the images of each class are worth, and which files to look at: duplicates, wrong labels, outliers.

Prints a table, and with --out writes datacard.json and datacard.html, a contact sheet. Images are compared by the
latents of
--backbone if it is given, else by their pixels, averaged down to 16 x 16.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from decuwatch_training.backbone import Backbone, add_backbone_arguments, backbone_of
from decuwatch_training.contactsheet import write_card
from decuwatch_training.data import Images, add_data_arguments, read_data
from decuwatch_training.datacard import NEIGHBORS, data_card, pixel_features
from decuwatch_training.errors import TrainingError
from decuwatch_training.loop import pick_device
from decuwatch_training.train import image_shape_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``decuwatch-train inspect``."""
    add_data_arguments(parser, "images")
    add_backbone_arguments(parser, "compare images by its latents", required=False)
    parser.add_argument("--out", type=Path, help="directory of datacard.json and datacard.html")
    parser.add_argument(
        "--size", type=int, default=64, help="side to which images are scaled; with --backbone it is the backbone's"
    )
    parser.add_argument("--neighbors", type=int, default=NEIGHBORS, help="nearest neighbors whose labels are compared")
    parser.add_argument(
        "--tau", type=float, help="distance below which two images are near duplicates; none: from the data"
    )
    parser.add_argument("--show", type=int, default=12, help="images of a class or a group on the contact sheet")
    parser.add_argument("--seed", type=int, default=1, help="of the sample of 1,000 images of a larger class")


def run(arguments: argparse.Namespace) -> None:
    """Read all images, compare them, print and write the card."""
    for name, least in (("size", 1), ("neighbors", 1), ("show", 1), ("tau", 0)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise TrainingError(f"--{name} {value}: expected at least {least}")
    backbone = backbone_of(arguments).to(pick_device()) if arguments.backbone else None
    size, channels = (arguments.size, 3) if backbone is None else image_shape_of(backbone)
    data = read_data(arguments.images, size, channels, None, arguments.classes, arguments.background)
    for line in data.describe():
        if not line.startswith("class "):
            print(line, file=sys.stderr if line.startswith("WARNING") else sys.stdout)
    images = data.together()
    if backbone is None:
        features, described = pixel_features(images), {"kind": "pixels"}
    else:
        if images.shape != (channels, size, size):
            raise TrainingError(
                f"{arguments.images}: images of shape {list(images.shape)}, the backbone's autoencoder takes "
                f"{[channels, size, size]}"
            )
        features, described = encode(backbone, images), {"kind": "latents", "backbone_sha256": backbone.digest()}
    card = data_card(images, features, described, arguments.seed, arguments.neighbors, arguments.tau, progress=True)
    print(card.table())
    if arguments.out:
        write_card(card, arguments.out, arguments.show)
        print(
            f"{arguments.out / 'datacard.html'}: the files to look at; {arguments.out / 'datacard.json'} lists all of "
            "them"
        )


def encode(backbone: Backbone, images: Images, batch: int = 512) -> Tensor:
    """The images' latents, encoded once. Raises TrainingError if one is not finite."""
    parts = [
        backbone.encode(images.scaled(index))
        for index in tqdm(torch.arange(len(images)).split(batch), desc="latents", unit="batch", mininterval=1.0)
    ]
    latents = torch.cat(parts)
    if not bool(torch.isfinite(latents).all()):
        raise TrainingError(f"the autoencoder gives latents that are not finite for images of {images.source}")
    return latents
