"""Bad input gets an error that says which file and what was expected of it."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decuwatch_training.backbone import Backbone
from decuwatch_training.cli import main
from decuwatch_training.data import read_data
from decuwatch_training.errors import TrainingError
from decuwatch_training.export import export_ensemble
from decuwatch_training.loop import Progress
from decuwatch_training.profile import FORMAT_1_PROFILE
from decuwatch_training.tables import TableSettings, train_tables
from decuwatch_training.tiny import tiny_run
from decuwatch_training.train import kept_latents, load_run
from tests.conftest import LABELS, patterns
from tests.runs import save_run


def test_folders_are_read(folder: Path) -> None:
    data = read_data(folder, 8, 1)
    assert data.train.labels == LABELS
    assert data.counts() == [9] * 6
    assert len(data.held_out) == 6
    assert data.train.scaled().min() >= -1
    assert data.train.scaled().max() <= 1
    assert read_data(folder, 4, 3).train.shape == (3, 4, 4)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere: expected a directory"):
        read_data(tmp_path / "nowhere")


def test_a_directory_without_folders(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="found no folder"):
        read_data(tmp_path)


def test_a_class_without_images(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "bars").symlink_to(folder / "bars")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="empty: a class without images"):
        read_data(tmp_path, 8, 1)


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_text("not an image")
    with pytest.raises(TrainingError, match=r"x\.png: not an image"):
        read_data(tmp_path, 8, 1)


def test_fashion_mnists_format(tmp_path: Path) -> None:
    for prefix, count in (("train", 3), ("t10k", 2)):
        images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
        header = bytes((0, 0, 8, 3)) + b"".join(int(value).to_bytes(4, "big") for value in (count, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = bytes((0, 0, 8, 1)) + count.to_bytes(4, "big")
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(range(count))))
    data = read_data(tmp_path)
    assert data.train.pixels.shape == (3, 1, 32, 32)
    assert data.train.pixels[1, 0, 2, 2:30].tolist() == [value % 256 for value in range(784, 812)]
    assert data.train.classes.tolist() == [0, 1, 2]
    assert data.train.labels[9] == "Ankle boot"
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03"))
    with pytest.raises(TrainingError, match="expected an IDX file"):
        read_data(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 1}, "--components 1: expected 2 to 64"),
        ({"bins": (1, 2), "rotations": 3}, "--rotations 3: expected at most the number of bins"),
        ({"bins": (1, 500)}, "has 20 images, its bin in rotation 0 asks for 500"),
        ({"start_spread": 0.0}, "--start-spread"),
    ],
)
def test_settings_out_of_bounds(random_backbone: Backbone, settings: dict[str, object], message: str) -> None:
    images = patterns(20, 1)
    with pytest.raises(TrainingError, match=message):
        train_tables(
            random_backbone, torch.zeros(len(images), 2, 4, 4), images.classes, images.labels, TableSettings(**settings)
        )  # type: ignore[arg-type]


def test_tables_that_do_not_fit(random_backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_run(tiny_run(random_backbone, 3, 1), path)
    assert load_run(path, random_backbone).tables.shape == (1, 3, 7, 1, 8)
    file = path / "tables.safetensors"
    tensors = load_file(file)
    tensors["tables"][0, 1, 2, 0, 3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(
        TrainingError, match=r"tables\.safetensors: 1 values are not finite, the first at \[0, 1, 2, 0, 3\]"
    ):
        load_run(path, random_backbone)
    save_file({**tensors, "tables": tensors["tables"][..., :4].contiguous()}, file)
    with pytest.raises(TrainingError, match=r"tables of shape .*, expected \[rotations, components, 7, tokens, 8\]"):
        load_run(path, random_backbone)
    file.write_bytes(b"broken")
    with pytest.raises(TrainingError, match=r"tables\.safetensors: expected the tables of a run"):
        load_run(path, random_backbone)


def test_a_record_that_lacks_something(random_backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_run(tiny_run(random_backbone, 3, 1), path)
    (path / "run.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"run\.json: backbone_sha256 is missing"):
        load_run(path, random_backbone)
    save_run(tiny_run(random_backbone, 3, 1), tmp_path / "half")
    file = tmp_path / "half" / "tables.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "tables": tensors["tables"].half()}, file)
    with pytest.raises(TrainingError, match=r"tables of torch\.float16 .* expected float32"):
        load_run(tmp_path / "half", random_backbone)


def test_latents_that_were_kept_are_checked(random_backbone: Backbone, tmp_path: Path) -> None:
    images = patterns(2, 1)
    wanted = kept_latents(random_backbone, "digest", images, tmp_path / "backbone")
    assert torch.equal(kept_latents(random_backbone, "digest", images, tmp_path / "backbone"), wanted)
    (file,) = (tmp_path / "backbone.latents").iterdir()
    for broken in (wanted[1:], wanted * float("nan"), wanted.double()):
        save_file({"latents": broken.contiguous()}, file)
        with pytest.raises(TrainingError, match="expected 12 finite latents of shape"):
            kept_latents(random_backbone, "digest", images, tmp_path / "backbone")


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        Progress("tables", 0, 10).loss(float("nan"))


def test_a_name_that_readers_refuse(random_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--name 'My Model': expected"):
        export_ensemble(
            random_backbone,
            tiny_run(random_backbone, 3, 1),
            tmp_path / "out",
            "My Model",
            "fp32",
            "torch-cpu",
            FORMAT_1_PROFILE,
            0,
            {},
        )
    assert not (tmp_path / "out").exists()


def test_tables_of_another_backbone(random_backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_run(tiny_run(random_backbone, 3, 1), path)
    with torch.no_grad():
        next(random_backbone.denoiser.parameters()).add_(1)
    with pytest.raises(TrainingError, match="trained on another backbone"):
        load_run(path, random_backbone)


def test_the_command_line_prints_errors_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "--backbone", str(tmp_path / "none"), "--data", str(tmp_path), "--out", str(tmp_path / "run")])
        == 1
    )
    printed = capsys.readouterr().err
    assert (
        printed == f"decuwatch-train train: {tmp_path / 'none'}: no such backbone; "
        "expected a diffusers directory or a CompVis checkpoint\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["train"])
    assert caught.value.code == 2
