"""Write a spoiled copy of Fashion-MNIST for `make data-card`: 1,000 images a class, as one folder of PNG files each.

Of Trouser 400 files are exact copies of 10 images and 300 are shifted, noisy copies of 3 others. Of Coat 300 are images
of other classes.

    PYTHONPATH=training "$(training/setup)/bin/python" training/spoil.py FASHION_MNIST OUT
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from decuwatch_training.data import Images, read_fashion_mnist

COUNT = 1000
DUPLICATED, MISLABELED = 1, 4


def spoiled(images: Images, generator: np.random.Generator) -> list[tuple[str, str, np.ndarray]]:
    """Folder, name and pixels of every image of the copy. A name says what was done and the original's position."""
    pixels = images.pixels[:, 0].numpy()
    result = []
    for label, name in enumerate(images.labels):
        mine = images.of_class(label).numpy()
        positions = generator.choice(mine, COUNT, replace=False)
        entries = [("", int(at), pixels[at]) for at in positions]
        if label == DUPLICATED:
            entries[300:700] = [("copy", int(at), pixels[at]) for at in np.repeat(positions[:10], 40)]
            entries[700:] = [
                ("near", int(at), near_duplicate(pixels[at], generator)) for at in np.repeat(positions[10:13], 100)
            ]
        if label == MISLABELED:
            others = np.flatnonzero(images.classes.numpy() != label)
            entries[700:] = [("wrong", int(at), pixels[at]) for at in generator.choice(others, 300, replace=False)]
        folder = name.replace("/", " or ")
        result += [
            (folder, f"{position:04}-{kind or 'own'}-{at}.png", picture)
            for position, (kind, at, picture) in enumerate(entries)
        ]
    return result


def near_duplicate(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shifted by at most one pixel each way, with a little noise."""
    shifted = np.roll(picture, generator.integers(-1, 2, 2), (0, 1)).astype(float)
    return np.clip(shifted + generator.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


def main(source: Path, out: Path) -> None:
    """Write the copy; files of an earlier run are overwritten."""
    for folder, name, picture in spoiled(read_fashion_mnist(source).train, np.random.default_rng(1)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(out / folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
