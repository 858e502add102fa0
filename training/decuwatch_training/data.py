"""Training images: the user's own folders, or Fashion-MNIST in its own file format."""

import argparse
import gzip
import math
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from decuwatch_training.classes import class_folders, entries_of
from decuwatch_training.errors import TrainingError
from decuwatch_training.picture import Color, read_picture, shown

FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MAX_IDX_BYTES = 1 << 30


@dataclass(frozen=True)
class Images:
    """``pixels`` uint8 [n, C, H, W] with ``classes`` int64 [n], indices into ``labels``."""

    pixels: Tensor
    classes: Tensor
    labels: tuple[str, ...]
    source: str
    files: tuple[str, ...] = ()
    """The file of each image within the data's directory, printable; empty for images made in memory."""

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def scaled(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The chosen images as float32 in [-1, 1]."""
        return self.pixels[index].float() / 127.5 - 1.0

    def of_class(self, index: int) -> Tensor:
        """Positions of the images of one class, in order."""
        return torch.nonzero(self.classes == index).flatten()


@dataclass(frozen=True)
class DataSet:
    """Training images, and held-out ones that no table and no backbone has seen."""

    train: Images
    held_out: Images
    folders: tuple[str, ...] = ()
    """Names of the folders in the order of the classes; empty for Fashion-MNIST."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """What was lost or changed when the images were read, and in how many of them."""

    def describe(self) -> list[str]:
        """Lines to print: the classes by index, if the index is not obvious, and what happened to the images."""
        held_out = torch.bincount(self.held_out.classes, minlength=len(self.train.labels)).tolist()
        lines = []
        for index, (label, count, rest) in enumerate(zip(self.train.labels, self.counts(), held_out, strict=True)):
            folder = self.folders[index] if self.folders else label
            named = "" if folder == label else f" (folder {folder})"
            lines.append(f"class {index}: {label}{named}, {count} + {rest} held-out images")
        for index, folder in enumerate(self.folders):
            if folder.isascii() and folder.isdigit() and int(folder) != index and self.train.labels[index] == folder:
                lines.append(
                    f"WARNING: class index {index} is the folder {folder}; in events the index {index} and the label "
                    f"{folder!r} mean it"
                )
        total = len(self.train) + len(self.held_out)
        lines += [f"images: {count:,} of {total:,} {change}" for change, count in self.changes.items()]
        return lines

    def together(self) -> Images:
        """All images, the held-out ones last."""
        train, rest = self.train, self.held_out
        pixels, classes = torch.cat([train.pixels, rest.pixels]), torch.cat([train.classes, rest.classes])
        return Images(pixels, classes, train.labels, train.source, train.files + rest.files)

    def counts(self) -> list[int]:
        """Training images of each class."""
        return [int(count) for count in torch.bincount(self.train.classes, minlength=len(self.train.labels))]


def read_data(
    path: Path,
    size: int = 32,
    channels: int = 3,
    held_out: float | None = 0.1,
    listing: Path | None = None,
    background: Color | None = None,
) -> DataSet:
    """Read a directory: Fashion-MNIST's four files, or one folder of images a class.

    The other arguments are for folders: images are scaled so that the shorter side has ``size`` pixels, cropped to the
    centre, and every ``1 / held_out``-th image of a class is held out (None: no image is); ``listing`` fixes the
    classes, ``background`` is laid under transparent pixels. Raises TrainingError for a missing directory, a class
    without images or a file that is not read as it should be.
    """
    if not path.is_dir():
        raise TrainingError(
            f"{path}: expected a directory with one folder of images a class, or Fashion-MNIST's files (Debian: "
            "dataset-fashion-mnist)"
        )
    if (path / "train-images-idx3-ubyte.gz").exists():
        if listing is not None:
            raise TrainingError(
                f"--classes {shown(listing)}: the classes of Fashion-MNIST are fixed; expected folders of images"
            )
        return read_fashion_mnist(path)
    return read_folders(path, size, channels, held_out, listing, background)


def read_fashion_mnist(path: Path) -> DataSet:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 images of 28x28, padded to 32x32."""
    parts = []
    for prefix in ("train", "t10k"):
        pixels = _read_idx(path / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
        classes = _read_idx(path / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
        if len(pixels) != len(classes) or not len(classes):
            raise TrainingError(
                f"{path}: {len(pixels)} {prefix} images but {len(classes)} labels, expected as many, and at least 1"
            )
        if pixels.shape[1:] != (28, 28):
            raise TrainingError(
                f"{path}: {prefix} images of {pixels.shape[1]} x {pixels.shape[2]} pixels, expected 28 x 28"
            )
        if classes.max() >= len(FASHION_MNIST_LABELS):
            raise TrainingError(
                f"{path}: {prefix} label {classes.max()}, expected 0 to {len(FASHION_MNIST_LABELS) - 1}"
            )
        padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None]
        files = tuple(f"{prefix}-images-idx3-ubyte.gz[{position}]" for position in range(len(classes)))
        parts.append(
            Images(
                torch.from_numpy(padded),
                torch.from_numpy(classes.astype(np.int64)),
                FASHION_MNIST_LABELS,
                "fashion-mnist",
                files,
            )
        )
    return DataSet(parts[0], parts[1])


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes: magic 0x0000080d, d big-endian sizes, the values."""
    header = 4 + 4 * dimensions
    try:
        with gzip.open(path) as file:
            start = file.read(header)
            if len(start) < header or start[:4] != bytes((0, 0, 8, dimensions)):
                raise TrainingError(f"{path}: expected an IDX file of unsigned bytes with {dimensions} dimensions")
            shape = tuple(int(value) for value in np.frombuffer(start, ">u4", dimensions, 4))
            wanted = math.prod(shape)
            if wanted > MAX_IDX_BYTES:
                raise TrainingError(f"{path}: {wanted:,} values for shape {shape}, expected at most {MAX_IDX_BYTES:,}")
            content = file.read(wanted + 1)
    except FileNotFoundError as err:
        raise TrainingError(f"{path}: no such file; Debian's package dataset-fashion-mnist has it") from err
    except (OSError, EOFError, zlib.error) as err:
        raise TrainingError(f"{path}: expected a gzipped IDX file: {err}") from err
    if len(content) != wanted:
        raise TrainingError(
            f"{path}: expected {wanted} values for shape {shape}, found "
            f"{'more' if len(content) > wanted else len(content)}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


def read_folders(
    path: Path,
    size: int,
    channels: int,
    held_out: float | None,
    listing: Path | None = None,
    background: Color | None = None,
) -> DataSet:
    """One folder a class, see ``class_folders``. Every file in one is read as an image, or refused by name."""
    if channels not in (1, 3):
        raise TrainingError(f"channels {channels}: expected 1 or 3")
    if held_out is not None and not 0 < held_out < 1:
        raise TrainingError(f"held-out share {held_out}: expected more than 0 and less than 1")
    folders = class_folders(path, listing)
    every = 0 if held_out is None else max(2, round(1 / held_out))
    pixels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    classes: tuple[list[int], list[int]] = ([], [])
    read: tuple[list[str], list[str]] = ([], [])
    notes: Counter[str] = Counter()
    for index, folder in enumerate(folders):
        files = entries_of(folder.path)
        if not files:
            raise TrainingError(f"{shown(folder.path)}: a class without images")
        for position, file in enumerate(files):
            if file.is_dir():
                raise TrainingError(f"{shown(file)}: a folder inside the folder of a class, expected images only")
            part = 1 if every and position % every == every - 1 else 0
            array, changes = read_picture(file, size, channels, background)
            pixels[part].append(array)
            classes[part].append(index)
            read[part].append(shown(file.relative_to(path)))
            notes.update(changes)
    if every and not classes[1]:
        raise TrainingError(
            f"{shown(path)}: no class has the {every} images that holding out {held_out:g} of them takes"
        )
    labels = tuple(folder.label for folder in folders)
    names = tuple(folder.path.name for folder in folders)
    nothing = np.empty((0, channels, size, size), np.uint8)
    train, rest = (
        Images(
            torch.from_numpy(np.stack(images) if images else nothing),
            torch.tensor(indices, dtype=torch.int64),
            labels,
            str(path.name),
            tuple(files),
        )
        for images, indices, files in zip(pixels, classes, read, strict=True)
    )
    return DataSet(train, rest, names, dict(sorted(notes.items())))


def background_color(text: str) -> Color:
    """The argument of --background: a CSS name or #rrggbb. Raises argparse's error for anything else."""
    try:
        color = ImageColor.getcolor(text, "RGB")
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a color: expected white, black, another CSS name or #rrggbb"
        ) from err
    red, green, blue = cast(Color, color)
    return red, green, blue


def add_data_arguments(parser: argparse.ArgumentParser, name: str = "--data") -> None:
    """The arguments ``name`` (required), --classes and --background: what ``read_data`` reads, and how."""
    required: dict[str, Any] = {"required": True} if name.startswith("-") else {}
    parser.add_argument(
        name, type=Path, **required, help="a directory: one folder of images a class, or Fashion-MNIST's files"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        help="a text file that fixes the classes: a folder's name on each line, or folder, tab and label",
    )
    parser.add_argument(
        "--background",
        type=background_color,
        help="color under transparent pixels, such as white or #808080; none: refuse them",
    )
