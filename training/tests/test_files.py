"""What stood there before survives whatever goes wrong."""

import errno
import re
from pathlib import Path

import pytest
import torch

from decuwatch_training.checkpoint import load_checkpoint, save_checkpoint
from decuwatch_training.cli import main
from decuwatch_training.errors import TrainingError
from decuwatch_training.export import ENSEMBLE_FILES
from decuwatch_training.files import is_disk_full, staged_directory, write_file, write_json
from decuwatch_training.pretrain import BACKBONE_FILES
from decuwatch_training.train import RUN_FILES


def full(_: Path) -> None:
    """A real ENOSPC from the kernel."""
    with Path("/dev/full").open("wb") as file:
        file.write(b"x" * 100_000)


def test_a_full_disk_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TrainingError, match=r"value\.json: no space left"):
        write_file(path, full)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_a_full_disk_is_recognised(tmp_path: Path) -> None:
    # Only Python's own writer is given /dev/full: a library that writes aside and renames would replace the device.
    with pytest.raises(OSError, match="No space left") as caught:
        full(tmp_path)
    assert is_disk_full(caught.value)
    for text in (
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598",
    ):
        assert is_disk_full(RuntimeError(text))
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"settings": {}, "step": 1})
    monkeypatch.setattr(Path, "write_bytes", lambda *_: full(path))
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: no space left"):
        save_checkpoint(path, {"settings": {}, "step": 2, "tables": torch.zeros(100_000)})
    state = load_checkpoint(path, {})
    assert state is not None
    assert state["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "ensemble"

    def write_half() -> None:
        with staged_directory(target, ["one"]) as staged:
            (staged / "one").write_text("1")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert list(tmp_path.iterdir()) == []
    for value in ("1", "2"):
        with staged_directory(target, ["one"]) as staged:
            (staged / "one").write_text(value)
    with pytest.raises(TrainingError, match="no space left"), staged_directory(target, ["one"]) as staged:
        full(staged)
    assert (target / "one").read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ensemble"]


COMMANDS = {
    "pretrain": (["--data", "missing"], BACKBONE_FILES),
    "train": (["--data", "missing", "--backbone", "missing"], RUN_FILES),
    "export": (["--backbone", "missing", "--run", "missing", "--name", "tiny"], ENSEMBLE_FILES),
    "tiny": ([], ENSEMBLE_FILES),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["notes.txt"], "has files but no"),
        (["FIRST", "notes.txt"], "notes.txt would be lost"),
        (["FIRST", "images/FIRST"], "images/.* would be lost"),
        (["FIRST", ".git/config"], ".git/config would be lost"),
    ],
)
def test_files_of_others_are_never_replaced(
    command: str, names: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, owned = COMMANDS[command]
    out = tmp_path / "out"
    for name in (name.replace("FIRST", owned[0]) for name in names):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = sorted(out.rglob("*"))
    assert main([command, *arguments, "--out", str(out)]) == 1
    assert re.search(expected, capsys.readouterr().err)
    assert sorted(out.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_comes_while_the_command_runs_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with staged_directory(tmp_path / "out", ["one"]) as staged:
            (staged / "one").write_text("1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(TrainingError, match="has files but no one"):
        write()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "value.json", {"score": float("nan")})
    assert list(tmp_path.iterdir()) == []
