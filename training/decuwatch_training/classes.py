"""Which folder of images is which class: the order of the classes is the meaning of an event's class index.

``--classes FILE`` fixes it: UTF-8 text with one class on each line, in index order, a folder's name and optionally a
tab and the label. Without it the folders are sorted, by number if every name is one.
"""

import itertools
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from decuwatch_training.errors import TrainingError
from decuwatch_training.picture import shown

IGNORED = ("thumbs.db", "desktop.ini")
"""Files of file managers, in any case; so are names that begin with a dot. Every other file must be an image."""

MAX_CLASSES = 100_000
MAX_LABEL = 128


@dataclass(frozen=True)
class ClassFolder:
    """One class: the folder of its images, and its label in events."""

    path: Path
    label: str


def is_ignored(path: Path) -> bool:
    """Whether a file or a folder belongs to the system and not to the data."""
    return path.name.startswith(".") or path.name.lower() in IGNORED


def entries_of(directory: Path) -> list[Path]:
    """What is in a directory and is not ignored, by name. Raises TrainingError if it cannot be listed."""
    try:
        return sorted(entry for entry in directory.iterdir() if not is_ignored(entry))
    except OSError as err:
        raise TrainingError(f"{shown(directory)}: cannot be listed: {err.strerror}") from err


def class_folders(directory: Path, listing: Path | None = None) -> list[ClassFolder]:
    """The classes in index order, as ``listing`` has them or by the folders' names.

    Raises TrainingError that names a folder or a line: for folders that differ in case, spelling of accents or leading
    zeros only, labels that a manifest cannot hold, images beside the folders, and a listing that does not name each
    folder once.
    """
    entries = entries_of(directory)
    folders = {entry.name: entry for entry in entries if entry.is_dir()}
    if not folders:
        raise TrainingError(f"{shown(directory)}: expected one folder of images a class, found no folder")
    for entry in entries:
        if entry.name not in folders and entry.suffix.lower() in Image.registered_extensions():
            raise TrainingError(
                f"{shown(entry)}: an image beside the folders of the classes; expected it in one of them"
            )
    if listing is None:
        chosen = [ClassFolder(folders[name], name) for name in _sorted(directory, list(folders))]
    else:
        chosen = _listed(listing, folders)
    _check_labels(chosen, exactly=listing is not None)
    return chosen


def _sorted(directory: Path, names: list[str]) -> list[str]:
    if not all(name.isascii() and name.isdigit() for name in names):
        return sorted(names)
    ordered = sorted(names, key=lambda name: (int(name), name))
    for first, second in itertools.pairwise(ordered):
        if int(first) == int(second):
            raise TrainingError(
                f"{shown(directory)}: the folders {first} and {second} are one number; rename one, or fix the classes "
                "with --classes"
            )
    return ordered


def _listed(listing: Path, folders: dict[str, Path]) -> list[ClassFolder]:
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise TrainingError(f"{shown(listing)}: expected UTF-8 text with a class on each line: {err}") from err
    if lines[-1] == "":
        lines.pop()
    chosen: list[ClassFolder] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name, tab, label = line.removesuffix("\r").partition("\t")
        where = f"{shown(listing)}: line {number}"
        if name not in folders:
            raise TrainingError(
                f"{where}: no folder {shown(Path(name))!r} in the data; expected FOLDER or FOLDER<tab>LABEL"
            )
        if name in seen:
            raise TrainingError(f"{where}: the folder {name!r} again, first on line {seen[name]}")
        seen[name] = number
        chosen.append(ClassFolder(folders[name], label if tab else name))
    missing = sorted(folders.keys() - seen.keys())
    if missing:
        raise TrainingError(
            f"{shown(listing)}: the folder {shown(Path(missing[0]))!r} is missing, and {len(missing) - 1} others"
        )
    return chosen


def _check_labels(classes: list[ClassFolder], exactly: bool) -> None:
    if len(classes) > MAX_CLASSES:
        raise TrainingError(f"{len(classes):,} classes: expected at most {MAX_CLASSES:,}")
    seen: dict[str, ClassFolder] = {}
    for entry in classes:
        label = entry.label
        if not 1 <= len(label) <= MAX_LABEL:
            raise TrainingError(
                f"{shown(entry.path)}: a label of {len(label)} characters, expected 1 to {MAX_LABEL}; --classes can "
                "name another"
            )
        if not label.isprintable():
            raise TrainingError(
                f"{shown(entry.path)}: the label {shown(Path(label))!r} has characters that cannot be printed; "
                "--classes can name another"
            )
        plain = label if exactly else unicodedata.normalize("NFC", label).casefold()
        if plain in seen:
            other = shown(seen[plain].path)
            raise TrainingError(
                f"{shown(entry.path)}: {other} has the label {label!r}, or one that differs in case or spelling only; "
                "see --classes"
            )
        seen[plain] = entry
