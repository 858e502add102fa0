"""Training images: the user's own folders, or Fashion-MNIST in its own file format."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from decuwatch_training.errors import TrainingError

FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Images:
    """``pixels`` uint8 [n, C, H, W] with ``classes`` int64 [n], indices into ``labels``."""

    pixels: Tensor
    classes: Tensor
    labels: tuple[str, ...]
    source: str

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

    def counts(self) -> list[int]:
        """Training images of each class."""
        return [int(count) for count in torch.bincount(self.train.classes, minlength=len(self.train.labels))]


def read_data(path: Path, size: int = 32, channels: int = 3, held_out: float = 0.1) -> DataSet:
    """Read a directory: Fashion-MNIST's four files, or one folder of images a class.

    ``size``, ``channels`` and ``held_out`` are for folders: images are scaled so that the shorter side has ``size``
    pixels, cropped to the centre, and every ``1 / held_out``-th image of a class is held out. Raises TrainingError for
    a missing directory, a class without images or a file that is no image.
    """
    if not path.is_dir():
        raise TrainingError(f"{path}: expected a directory with one folder of images a class, or Fashion-MNIST's files (Debian: dataset-fashion-mnist)")
    if (path / "train-images-idx3-ubyte.gz").exists():
        return read_fashion_mnist(path)
    return read_folders(path, size, channels, held_out)


def read_fashion_mnist(path: Path) -> DataSet:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 images of 28x28, padded to 32x32."""
    parts = []
    for prefix in ("train", "t10k"):
        pixels = _read_idx(path / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
        classes = _read_idx(path / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
        if len(pixels) != len(classes):
            raise TrainingError(f"{path}: {len(pixels)} {prefix} images but {len(classes)} labels")
        padding = (32 - pixels.shape[1]) // 2
        padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))[:, None]
        parts.append(Images(torch.from_numpy(padded), torch.from_numpy(classes.astype(np.int64)), FASHION_MNIST_LABELS, "fashion-mnist"))
    return DataSet(*parts)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes: magic 0x0000080d, d big-endian sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as err:
        raise TrainingError(f"{path}: no such file; Debian's package dataset-fashion-mnist has it") from err
    except (OSError, EOFError) as err:
        raise TrainingError(f"{path}: expected a gzipped IDX file: {err}") from err
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise TrainingError(f"{path}: expected an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = tuple(int(value) for value in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - header != int(np.prod(shape)):
        raise TrainingError(f"{path}: expected {int(np.prod(shape))} values for shape {shape}, found {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def read_folders(path: Path, size: int, channels: int, held_out: float) -> DataSet:
    """One folder a class, in the order of their names; the folder's name is the label."""
    if channels not in (1, 3):
        raise TrainingError(f"channels {channels}: expected 1 or 3")
    if not 0 < held_out < 1:
        raise TrainingError(f"held-out share {held_out}: expected more than 0 and less than 1")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise TrainingError(f"{path}: expected one folder of images a class, found no folder")
    every = max(2, round(1 / held_out))
    pixels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    classes: tuple[list[int], list[int]] = ([], [])
    for index, folder in enumerate(folders):
        names = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
        if not names:
            raise TrainingError(f"{folder}: a class without images; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        for position, name in enumerate(names):
            part = 1 if position % every == every - 1 else 0
            pixels[part].append(_read_image(name, size, channels))
            classes[part].append(index)
    labels = tuple(folder.name for folder in folders)
    if not classes[1]:
        raise TrainingError(f"{path}: no class has the {every} images that holding out {held_out:g} of them takes")
    train, rest = (
        Images(torch.from_numpy(np.stack(images)), torch.tensor(indices), labels, str(path.name)) for images, indices in zip(pixels, classes, strict=True)
    )
    return DataSet(train, rest)


def _read_image(path: Path, size: int, channels: int) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
            scale = size / min(image.size)
            image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            array = np.asarray(image.crop((left, top, left + size, top + size)))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as err:
        raise TrainingError(f"{path}: not an image that can be read: {err}") from err
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
