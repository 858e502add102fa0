"""Which folder is which class, and that every file in one is read or refused by name."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decuwatch_training.backbone import Backbone
from decuwatch_training.cli import main
from decuwatch_training.data import DataSet, read_data
from decuwatch_training.errors import TrainingError
from decuwatch_training.pretrain import save_backbone


def folders(root: Path, names: list[str], images: int = 4) -> Path:
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for position in range(images):
            Image.fromarray(np.full((8, 8), 10 * index, np.uint8)).save(root / name / f"{position}.png")
    return root


def read(root: Path, listing: Path | None = None) -> DataSet:
    return read_data(root, 8, 1, 0.25, listing)


def test_folders_of_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    data = read(folders(tmp_path, ["0", "1", "2", "10"]))
    assert data.train.labels == data.folders == ("0", "1", "2", "10")
    assert [int(data.train.pixels[data.train.of_class(index)[0]].max()) for index in range(4)] == [0, 10, 20, 30]
    assert data.describe()[:4] == [
        f"class {index}: {name}, 3 + 1 held-out images" for index, name in enumerate(("0", "1", "2", "10"))
    ]
    assert (
        data.describe()[4]
        == "WARNING: class index 3 is the folder 10; in events the index 3 and the label '10' mean it"
    )


def test_other_folders_are_sorted_as_text(tmp_path: Path) -> None:
    assert read(folders(tmp_path, ["10", "9", "b", "A"])).train.labels == ("10", "9", "A", "b")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", "01"], "the folders 01 and 1 are one number"),
        (["Cat", "cat"], "cat: .*Cat has the label 'cat', or one that differs in case"),
        (["caf\u00e9", "cafe\u0301"], "differs in case or spelling only"),
        (["x" * 129], "a label of 129 characters, expected 1 to 128"),
        (["a\nb"], r"a\\nb: the label .* characters that cannot be printed"),
        ([os.fsdecode(b"caf\xe9")], r"caf\\xe9: the label"),
    ],
)
def test_names_that_cannot_be_classes(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        read(folders(tmp_path, names))
    assert "\n" not in str(caught.value)


def test_a_listing_fixes_order_and_labels(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", ["0", "1", "n02", "n10"])
    listing = tmp_path / "classes.txt"
    listing.write_bytes(b"\xef\xbb\xbfn10\tdog\r\n1\r\nn02\tCafe\r\n0\tcafe\r\n")
    data = read(root, listing)
    assert data.train.labels == ("dog", "1", "Cafe", "cafe")
    assert data.folders == ("n10", "1", "n02", "0")
    assert data.describe()[0] == "class 0: dog (folder n10), 3 + 1 held-out images"
    for text, message in [
        ("0\n1\nn02\n", "the folder 'n10' is missing"),
        ("0\n1\nn02\nn10\n0\n", "line 5: the folder '0' again, first on line 1"),
        ("0\n1\n\nn02\nn10\n", "line 3: no folder"),
        ("0\n1\nn02\nn11\n", "line 4: no folder 'n11'"),
        ("0\tsame\n1\tsame\nn02\nn10\n", "has the label 'same'"),
        ("0\t\n1\nn02\nn10\n", "a label of 0 characters"),
    ]:
        listing.write_text(text)
        with pytest.raises(TrainingError, match=message):
            read(root, listing)
    with pytest.raises(TrainingError, match=r"nowhere: expected UTF-8 text"):
        read(root, tmp_path / "nowhere")
    listing.write_bytes(b"caf\xe9\n")
    with pytest.raises(TrainingError, match=r"classes\.txt: expected UTF-8 text"):
        read(root, listing)


def test_every_file_of_a_class_is_read_or_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", ["a", "b"])
    for name in ("x.tif", "y.TIFF", "z", "photo.jpeg.bak"):
        Image.new("L", (8, 8)).save(root / "a" / name, format="TIFF")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png"):
        (root / "a" / name).write_bytes(b"not an image")
    (root / "b" / "linked.png").symlink_to(root / "a" / "0.png")
    (root / "c").symlink_to(root / "b")
    data = read(root)
    assert len(data.train) + len(data.held_out) == 8 + 5 + 5
    (root / "README.md").write_text("not an image")
    assert read(root).train.labels == ("a", "b", "c")
    (root / "stray.tif").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"stray\.tif: an image beside the folders"):
        read(root)
    (root / "stray.tif").unlink()
    (root / "a" / "notes.txt").write_text("not an image")
    with pytest.raises(TrainingError, match=r"notes\.txt: not an image"):
        read(root)
    (root / "a" / "notes.txt").unlink()
    (root / "a" / "nested").mkdir()
    with pytest.raises(TrainingError, match="nested: a folder inside the folder of a class"):
        read(root)


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(int(side).to_bytes(4, "big") for side in values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 30, 30)), np.zeros(2), "train images of 30 x 30 pixels, expected 28 x 28"),
        (np.zeros((2, 64, 28)), np.zeros(2), "train images of 64 x 28 pixels"),
        (np.zeros((2, 28, 28)), np.array([0, 10]), "train label 10, expected 0 to 9"),
        (np.zeros((0, 28, 28)), np.zeros(0), "0 train images but 0 labels, expected as many, and at least 1"),
        (np.zeros((2, 28, 28)), np.zeros(3), "2 train images but 3 labels"),
    ],
)
def test_idx_files_of_another_data_set(tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str) -> None:
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    with pytest.raises(TrainingError, match=message):
        read_data(tmp_path)


def test_broken_idx_files(tmp_path: Path) -> None:
    good, file = idx(np.zeros((2, 28, 28))), tmp_path / "train-images-idx3-ubyte.gz"
    broken = bytearray(good)
    broken[12:20] = b"\xff" * 8
    header = bytes((0, 0, 8, 3)) + b"\xff" * 12
    floats = gzip.compress(bytes((0, 0, 13, 3)) + bytes(12))
    for content in (
        b"",
        good[:-12],
        bytes(broken),
        gzip.compress(header),
        floats,
        gzip.compress(gzip.decompress(good) + b"\0"),
    ):
        file.write_bytes(content)
        with pytest.raises(TrainingError, match=r"train-images-idx3-ubyte\.gz: "):
            read_data(tmp_path)
    with pytest.raises(TrainingError, match="classes of Fashion-MNIST are fixed"):
        read_data(tmp_path, listing=tmp_path / "classes.txt")


def test_train_stores_the_classes_and_prints_them(
    random_backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["0", "1", "2", "3", "4", "10"]
    root = folders(tmp_path / "images", names)
    save_backbone(random_backbone, tuple(names), {}, tmp_path / "backbone")
    words = [
        "train",
        "--backbone",
        tmp_path / "backbone",
        "--data",
        root,
        "--held-out",
        "0.5",
        "--out",
        tmp_path / "run",
        "--steps",
        "1",
        "--components",
        "2",
        "--producers",
        "0",
    ]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr()
    assert "class 5: 10, 2 + 2 held-out images" in printed.out
    assert "WARNING: class index 5 is the folder 10" in printed.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["labels"] == record["folders"] == names
    listing = tmp_path / "classes.txt"
    listing.write_text("10\n0\n1\n2\n3\n4\n")
    assert main([str(word) for word in [*words, "--classes", listing]]) == 1
    assert "backbone.json: class 0 of the backbone is '0', of the data '10'" in capsys.readouterr().err
    assert torch.equal(read(root, listing).train.classes.unique(), torch.arange(6))
