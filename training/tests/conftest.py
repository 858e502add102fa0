"""Small real parts that the tests share: a data set of patterns, a backbone that was really pretrained on it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decuwatch_training.backbone import Backbone, load_backbone
from decuwatch_training.data import DataSet, Images, read_data
from decuwatch_training.pretrain import PretrainSettings, pretrain, save_backbone
from decuwatch_training.tiny import tiny_backbone

torch.set_num_threads(1)  # the models are so small that a second thread costs more than it brings
LABELS = ("bars", "checks", "corner", "frame", "rows", "slope")


def pattern(index: int, generator: np.random.Generator) -> np.ndarray:
    """An 8x8 image of one of six classes, with some noise."""
    y, x = np.mgrid[0:8, 0:8]
    shift = int(generator.integers(2))
    pictures = (
        x // 2 % 2,
        (x + y) % 2,
        (x < 4) & (y < 4),
        (x == 0) | (x == 7) | (y == 0) | (y == 7),
        y // 2 % 2,
        x > y,
    )
    picture = np.roll(pictures[index].astype(float), shift, axis=1)
    return np.clip(picture * 200 + generator.normal(20, 15, (8, 8)), 0, 255).astype(np.uint8)


def patterns(count: int, seed: int) -> Images:
    """``count`` images of each class."""
    generator = np.random.default_rng(seed)
    pixels = np.stack([pattern(index, generator) for index in range(len(LABELS)) for _ in range(count)])
    classes = torch.arange(len(LABELS)).repeat_interleave(count)
    return Images(torch.from_numpy(pixels)[:, None], classes, LABELS, "patterns")


@pytest.fixture(scope="session")
def data() -> DataSet:
    return DataSet(patterns(300, 1), patterns(30, 2))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a class, ten PNG files each."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(3)
    for index, label in enumerate(LABELS):
        (root / label).mkdir()
        for position in range(10):
            Image.fromarray(pattern(index, generator)).save(root / label / f"{position}.png")
    return root


@pytest.fixture(scope="session")
def folder_data(folder: Path) -> DataSet:
    return read_data(folder, 8, 1)


@pytest.fixture
def random_backbone() -> Backbone:
    """Latents 2x4x4, images 1x8x8, D = 8, six classes, random weights."""
    return tiny_backbone(len(LABELS), 1, 5)


@pytest.fixture(scope="session")
def trained_directory(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory of a small backbone that knows the six classes: about a quarter of a minute of training."""
    out = tmp_path_factory.mktemp("pretrained") / "backbone"
    settings = PretrainSettings(
        autoencoder_steps=150,
        autoencoder_batch=64,
        autoencoder_channels=(16, 16),
        latent_channels=2,
        steps=400,
        batch=64,
        rate=3e-3,
        channels=(16, 16),
        context_dim=16,
    )
    backbone, record = pretrain(data.train, data.held_out, settings, out, 1000)
    save_backbone(backbone, data.train.labels, record, out)
    return out


@pytest.fixture
def trained_backbone(trained_directory: Path) -> Backbone:
    return load_backbone(trained_directory)
