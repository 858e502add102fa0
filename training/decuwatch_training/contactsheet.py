"""The data card as one HTML page with thumbnails: no script, loads nothing, light and dark, fits a phone."""

import base64
import io
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from decuwatch_training.datacard import DataCard
from decuwatch_training.files import write_file, write_json

THUMBNAIL = 64
CLASSES_SHOWN = 40
GROUPS_SHOWN = 24

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa); }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p, .note { color: var(--soft); max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { min-width: 7rem; overflow-wrap: anywhere; text-align: left; }
.sheet { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; width: 6rem; }
figure img {
  border: 1px solid var(--line); display: block; height: 6rem; image-rendering: pixelated; object-fit: contain;
  width: 6rem;
}
figcaption { font-size: .72rem; line-height: 1.25; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); display: block; }
"""


def write_card(card: DataCard, out: Path, show: int = 12) -> None:
    """Write datacard.json and datacard.html into a directory."""
    write_json(out / "datacard.json", card.document())
    page = contact_sheet(card, show)
    write_file(out / "datacard.html", lambda aside: aside.write_text(page, encoding="utf-8"))


def contact_sheet(card: DataCard, show: int = 12) -> str:
    """The page. ``show`` is the maximum number of images of one class or group; the JSON document has them all."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        "'unsafe-inline'\">",
        f"<title>Data card of {escape(card.images.source)}</title><style>{STYLE}</style></head><body>",
        f"<h1>Data card of {escape(card.images.source)}</h1>",
        f"<p>{len(card.images):,} images in {len(card.classes):,} classes, compared by "
        f"{escape(str(card.features['kind']))}. n_eff is the number of "
        "different images that a class amounts to. Own label is the share of the nearest neighbors that have the "
        "image's label.</p>",
        _table(card),
        *_mislabeled(card, show),
        *_near_duplicates(card, show),
        *_outliers(card, show),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _table(card: DataCard) -> str:
    names = ("class", "n", "distinct", "n_eff", "groups", "in groups", "own label", "mislabeled?", "outliers")
    lines = ['<div class="wide"><table><thead><tr>', *(f"<th>{name}</th>" for name in names), "</tr></thead><tbody>"]
    for row in card.classes:
        share = "-" if row.neighbor_label_share is None else f"{row.neighbor_label_share:.3f}"
        counts = (row.near_duplicate_groups, row.images_in_groups, share, row.likely_mislabeled, row.outliers)
        cells = (
            escape(row.label),
            f"{row.n:,}",
            f"{row.distinct:,}",
            f"{row.n_eff:,.1f}",
            *(str(value) for value in counts),
        )
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(lines) + "</tbody></table></div>"


def _mislabeled(card: DataCard, show: int) -> Iterable[str]:
    captions = {
        entry.position: f"looks like {card.images.labels[entry.other]}, {entry.other_share:.0%} of its neighbors"
        for entry in card.suspects
    }
    return _by_class(
        card, "Likely mislabeled", "Their neighbors agree on another label.", list(captions), captions.__getitem__, show
    )


def _outliers(card: DataCard, show: int) -> Iterable[str]:
    captions = {entry.position: f"{entry.ratio:.1f} times as far" for entry in card.outliers}
    return _by_class(
        card,
        "Outliers",
        "Far from every other image, against the median of their class.",
        list(captions),
        captions.__getitem__,
        show,
    )


def _by_class(
    card: DataCard, title: str, note: str, positions: list[int], caption: Callable[[int], str], show: int
) -> Iterable[str]:
    """A sheet for each class, the most afflicted class first."""
    yield f"<h2>{title}: {len(positions):,}</h2>"
    yield f'<p class="note">{note}</p>'
    by_class: dict[int, list[int]] = {}
    for position in positions:
        by_class.setdefault(int(card.images.classes[position]), []).append(position)
    ordered = sorted(by_class.items(), key=lambda item: (-len(item[1]), item[0]))
    for label, found in ordered[:CLASSES_SHOWN]:
        name, images = escape(card.images.labels[label]), card.classes[label].n
        yield f"<h3>{name}: {len(found):,} of {images:,}{_first(len(found), show)}</h3>"
        yield _sheet(card, [(position, caption(position)) for position in found[:show]])
    if len(ordered) > CLASSES_SHOWN:
        yield f"<p>{len(ordered) - CLASSES_SHOWN:,} more classes are in datacard.json.</p>"


def _near_duplicates(card: DataCard, show: int) -> Iterable[str]:
    yield f"<h2>Near duplicates: {len(card.groups):,} groups</h2>"
    yield (
        '<p class="note">A chain of images nearer than tau joins the images of a group. '
        "Groups with several labels come first.</p>"
    )
    labels = [card.labels_of(group) for group in card.groups]
    order = sorted(range(len(labels)), key=lambda at: len(labels[at]) < 2)
    for at in order[:GROUPS_SHOWN]:
        named = ", ".join(f"{escape(label)} {count:,}" for label, count in labels[at].items())
        yield f"<h3>{len(card.groups[at]):,} images: {named}{_first(len(card.groups[at]), show)}</h3>"
        yield _sheet(card, [(position, card.label(position)) for position in card.groups[at][:show]])
    if len(order) > GROUPS_SHOWN:
        yield f"<p>{len(order) - GROUPS_SHOWN:,} more groups are in datacard.json.</p>"


def _first(count: int, show: int) -> str:
    return f", the first {show}" if count > show else ""


def _sheet(card: DataCard, entries: list[tuple[int, str]]) -> str:
    figures = (
        f'<figure><img src="{_thumbnail(card, position)}" '
        f'alt=""><figcaption>{escape(card.file(position))}<span>{escape(text)}</span></figcaption></figure>'
        for position, text in entries
    )
    return '<div class="sheet">' + "".join(figures) + "</div>"


def _thumbnail(card: DataCard, position: int) -> str:
    pixels = card.images.pixels[position].numpy()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
