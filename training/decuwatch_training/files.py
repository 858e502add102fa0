"""Writing files so that a reader sees the old one or the whole new one, and naming them by digest."""

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from decuwatch_training.errors import TrainingError


def sha256_file(path: Path) -> str:
    """The file's SHA-256 in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a path beside ``path``, flush it to disk and rename it into place.

    When ``write`` fails, or the disk is full, ``path`` keeps its former content and nothing is left beside it.
    Raises TrainingError for a full disk; other errors pass through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    aside = Path(name)
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)
        aside.replace(path)
    except BaseException as err:
        aside.unlink(missing_ok=True)
        if is_disk_full(err):
            raise TrainingError(f"{path}: no space left on the disk; what stood there before is untouched") from err
        raise


def is_disk_full(err: BaseException) -> bool:
    """Whether ``err`` says that the disk or the quota is full. torch and safetensors only say so in their text."""
    if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(err)
    return any(
        part in text
        for part in ("No space left", "os error 28", "unexpected pos", "PytorchStreamWriter failed writing")
    )


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinities are refused with ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises TrainingError that names the file if it is missing or broken, or has a key twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except FileNotFoundError as err:
        raise TrainingError(f"{path}: no such file") from err
    except (ValueError, RecursionError) as err:  # ValueError: broken JSON, broken UTF-8, and what the hook refuses
        raise TrainingError(f"{path}: expected a JSON document: {err}") from err


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; plain readers keep the last of keys that come twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return result


def check_replaceable(target: Path, owned: Sequence[str]) -> None:
    """Raise TrainingError unless ``target`` is missing, empty, or holds nothing but an earlier result of the same
    command.

    ``owned`` has a pattern for each file that the command writes, relative to ``target``. An earlier result has the
    first of them, and each of its files matches a pattern.
    """
    if target.exists() and not target.is_dir():
        raise TrainingError(f"{target}: a file, expected a directory to write")
    names = sorted(
        str(path.relative_to(target)) for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    if names and owned[0] not in names:
        raise TrainingError(
            f"{target}: has files but no {owned[0]}, so it is not an earlier result; give a new or an empty directory"
        )
    for name in names:
        if not any(fnmatch.fnmatchcase(name, each) and name.count("/") == each.count("/") for each in owned):
            raise TrainingError(f"{target}: {name} would be lost; move it, or give another directory")


@contextlib.contextmanager
def staged_directory(target: Path, owned: Sequence[str]) -> Iterator[Path]:
    """A fresh directory beside ``target`` that replaces it if the block ends without an error, and is removed
    otherwise.

    A reader never sees a half-written ``target``. Raises TrainingError for a full disk, and for a ``target`` with files
    of somebody else (see ``check_replaceable``), before the block and again before it is replaced.
    """
    target = target.absolute()
    check_replaceable(target, owned)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield staged
        staged.chmod(0o755)
        for entry in staged.rglob("*"):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        check_replaceable(target, owned)
        if target.exists():
            former = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.former."))
            target.rename(former / target.name)
            staged.rename(target)
            shutil.rmtree(former)
        else:
            staged.rename(target)
    except BaseException as err:
        shutil.rmtree(staged, ignore_errors=True)
        if is_disk_full(err):
            raise TrainingError(f"{target}: no space left on the disk; what stood there before is untouched") from err
        raise
