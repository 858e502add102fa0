"""Image files written byte by byte, so that what they hold is known without an image library."""

import itertools
import struct
import zlib
from collections.abc import Sequence

import numpy as np


def png(samples: np.ndarray, color_type: int, depth: int, extra: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG of samples [H, W, channels]; ``extra`` chunks stand before the pixels."""
    height, width, channels = samples.shape
    rows = []
    for row in samples:
        if depth == 16:
            packed = row.astype(">u2").tobytes()
        elif depth == 8:
            packed = row.astype(np.uint8).tobytes()
        else:
            bits = "".join(f"{value:0{depth}b}" for value in row[:, 0].tolist())
            bits += "0" * (-len(bits) % 8)
            packed = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
        rows.append(b"\0" + packed)
    assert channels == {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(
    content: bytes,
    size: tuple[int, int],
    bits: Sequence[int],
    photometric: int,
    sample_format: int = 1,
    extra: int | None = None,
    orientation: int = 1,
) -> bytes:
    """An uncompressed little-endian TIFF of one strip; ``extra`` is ExtraSamples."""
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [size[0]]),
        257: (4, [size[1]]),
        258: (3, list(bits)),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [0]),
        274: (3, [orientation]),
        277: (3, [len(bits)]),
        278: (4, [size[1]]),
        279: (4, [len(content)]),
        339: (3, [sample_format] * len(bits)),
    }
    if extra is not None:
        tags[338] = (3, [extra])
    directory_size = 2 + 12 * len(tags) + 4
    spill = b""
    spill_at = 8 + directory_size
    spilled = {tag: len(values) * {3: 2, 4: 4}[kind] > 4 for tag, (kind, values) in tags.items()}
    total = sum(len(values) * 2 for tag, (_, values) in tags.items() if spilled[tag])
    tags[273] = (4, [spill_at + total])
    entries = b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if spilled[tag]:
            entries += struct.pack("<HHII", tag, kind, len(values), spill_at + len(spill))
            spill += packed
        else:
            entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + spill + content


def bmp24(rgb: np.ndarray) -> bytes:
    """A BMP of 24 bits, bottom row first."""
    height, width, _ = rgb.shape
    rows = b"".join(row[:, ::-1].astype(np.uint8).tobytes().ljust((3 * width + 3) // 4 * 4, b"\0") for row in rgb[::-1])
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(rows), 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 14 + 40 + len(rows), 0, 0, 54) + header + rows


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows, after EXIF 2.32: the tag says on which sides row 0 and column 0 belong."""
    rows, columns = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    height, width = stored.shape[:2]
    turned = orientation >= 5
    shape = (width, height) if turned else (height, width)
    out = np.zeros((*shape, *stored.shape[2:]), stored.dtype)
    for y, x in itertools.product(range(height), range(width)):
        at = [0, 0]
        for side, distance in (
            (rows, y),
            (columns, x),
        ):  # how far the pixel lies from the side of row 0 and of column 0
            axis = 0 if side in ("top", "bottom") else 1
            at[axis] = distance if side in ("top", "left") else shape[axis] - 1 - distance
        out[at[0], at[1]] = stored[y, x]
    return out
