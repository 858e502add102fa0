"""Every mode and format becomes the right 8-bit array, or is refused by file name."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from decuwatch_training.errors import TrainingError
from decuwatch_training.picture import MAX_PIXELS, read_picture, shown
from tests.files import bmp24, png, tiff, upright

SIDE = 8
SEED = 20240712
RANDOM = np.random.default_rng(SEED)
GRAY = RANDOM.integers(0, 256, (SIDE, SIDE, 1)).astype(np.uint8)
RGB = RANDOM.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
ALPHA = RANDOM.integers(0, 256, (SIDE, SIDE, 1)).astype(np.uint8)
OPAQUE = np.full_like(ALPHA, 255)
WIDE = RANDOM.integers(0, 65536, (SIDE, SIDE, 1)).astype(np.uint16)
WIDE_RGB = RANDOM.integers(0, 65536, (SIDE, SIDE, 3)).astype(np.uint16)
PALETTE = RANDOM.integers(0, 256, (16, 3)).astype(np.uint8)
INDEX = RANDOM.integers(0, 16, (SIDE, SIDE, 1)).astype(np.uint8)
BACKGROUND = (10, 200, 90)


def read(path: Path, content: bytes, channels: int = 3, background: tuple[int, int, int] | None = None) -> np.ndarray:
    path.write_bytes(content)
    array, _ = read_picture(path, SIDE, channels, background)
    assert array.dtype == np.uint8
    assert array.shape == (channels, SIDE, SIDE)
    return array.transpose(1, 2, 0)


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R BT.601."""
    return (rgb.astype(float) @ np.array([0.299, 0.587, 0.114]))[..., None]


def over(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """``color`` laid on the background."""
    share = alpha.astype(float) / 255
    return color * share + np.array(BACKGROUND) * (1 - share)


def ink(cmyk: np.ndarray) -> np.ndarray:
    cmyk = cmyk.astype(float)
    return (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255


def cie_lab(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D50 to sRGB, by the formulas of ICC.1 and IEC 61966-2-1."""
    lightness, a, b = (
        lab[..., 0].astype(float) * 100 / 255,
        lab[..., 1].astype(np.int8).astype(float),
        lab[..., 2].astype(np.int8).astype(float),
    )
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array([0.9642, 1.0, 0.8249])
    to_linear = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(xyz @ to_linear.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


CMYK = RANDOM.integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)
LAB = np.stack(
    [np.full((SIDE, SIDE), 160, np.uint8), *RANDOM.integers(-20, 20, (2, SIDE, SIDE)).astype(np.int8).view(np.uint8)],
    -1,
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PLTE = (b"PLTE", PALETTE.tobytes())
SIZE = (SIDE, SIDE)
TWELVE = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in (WIDE.reshape(-1, 2) >> 4).tolist())

# Name, file, its right RGB array, and by how much a value may differ.
RIGHT: list[tuple[str, bytes, np.ndarray, float]] = [
    *(
        (
            f"PNG gray {depth} bits",
            png(GRAY >> (8 - depth), 0, depth),
            (GRAY >> (8 - depth)) * (255 // (2**depth - 1)),
            0,
        )
        for depth in (1, 2, 4, 8)
    ),
    ("PNG gray 16 bits", png(WIDE, 0, 16), WIDE >> 8, 0),
    ("PNG gray 16 bits, 8 of them repeated", png(GRAY.astype(np.uint16) * 257, 0, 16), GRAY, 0),
    ("PNG RGB", png(RGB, 2, 8), RGB, 0),
    ("PNG RGB 16 bits", png(WIDE_RGB, 2, 16), WIDE_RGB >> 8, 0),
    *(
        (
            f"PNG palette {depth} bits",
            png(INDEX & (2**depth - 1), 3, depth, [PLTE]),
            PALETTE[INDEX[..., 0] & (2**depth - 1)],
            0,
        )
        for depth in (1, 2, 4, 8)
    ),
    ("PNG palette, opaque tRNS", png(INDEX, 3, 8, [PLTE, (b"tRNS", b"\xff" * 16)]), PALETTE[INDEX[..., 0]], 0),
    ("PNG gray and alpha, opaque", png(np.concatenate([GRAY, OPAQUE], -1), 4, 8), GRAY, 0),
    ("PNG RGBA, opaque", png(np.concatenate([RGB, OPAQUE], -1), 6, 8), RGB, 0),
    (
        "PNG RGBA 16 bits, opaque",
        png(np.concatenate([WIDE_RGB, np.full_like(WIDE, 65535)], -1), 6, 16),
        WIDE_RGB >> 8,
        0,
    ),
    ("PGM", b"P5 8 8 255\n" + GRAY.tobytes(), GRAY, 0),
    ("PGM 16 bits", b"P5 8 8 65535\n" + WIDE.astype(">u2").tobytes(), WIDE >> 8, 0),
    ("PGM of maximum 15", b"P5 8 8 15\n" + INDEX.tobytes(), INDEX * 17, 0),
    ("PBM", b"P4 8 8\n" + np.packbits(GRAY[..., 0] >> 7).tobytes(), (1 - (GRAY >> 7)) * 255, 0),
    ("PPM", b"P6 8 8 255\n" + RGB.tobytes(), RGB, 0),
    ("BMP", bmp24(RGB), RGB, 0),
    ("TIFF gray", tiff(GRAY.tobytes(), SIZE, [8], 1), GRAY, 0),
    ("TIFF gray, white at 0", tiff(GRAY.tobytes(), SIZE, [8], 0), 255 - GRAY, 0),
    ("TIFF bilevel", tiff(np.packbits(GRAY[..., 0] >> 7).tobytes(), SIZE, [1], 1), (GRAY >> 7) * 255, 0),
    ("TIFF gray 16 bits", tiff(WIDE.tobytes(), SIZE, [16], 1), WIDE >> 8, 0),
    ("TIFF RGB", tiff(RGB.tobytes(), SIZE, [8] * 3, 2), RGB, 0),
    ("TIFF RGB 16 bits", tiff(WIDE_RGB.tobytes(), SIZE, [16] * 3, 2), WIDE_RGB >> 8, 0),
    (
        "TIFF RGB and an unspecified sample",
        tiff(np.concatenate([RGB, ALPHA], -1).tobytes(), SIZE, [8] * 4, 2, extra=0),
        RGB,
        0,
    ),
    ("TIFF CMYK", tiff(CMYK.tobytes(), SIZE, [8] * 4, 5), ink(CMYK), 1),
    ("TIFF Lab", tiff(LAB.tobytes(), SIZE, [8] * 3, 8), cie_lab(LAB), 4),
    (
        "GIF",
        saved(Image.fromarray(RGB).quantize(64), format="GIF"),
        np.asarray(Image.fromarray(RGB).quantize(64).convert("RGB")),
        0,
    ),
    ("WebP lossless", saved(Image.fromarray(RGB), format="WEBP", lossless=True, exact=True), RGB, 0),
    ("JPEG 2000 lossless", saved(Image.fromarray(RGB), format="JPEG2000"), RGB, 0),
    ("JPEG gray", saved(Image.fromarray(np.full(SIZE, 77, np.uint8)), format="JPEG"), np.full((*SIZE, 1), 77), 2),
    (
        "JPEG",
        saved(Image.new("RGB", SIZE, (200, 40, 90)), format="JPEG", quality=95),
        np.full((*SIZE, 3), (200, 40, 90)),
        3,
    ),
    (
        "JPEG CMYK of Adobe",
        saved(Image.new("CMYK", SIZE, (10, 200, 40, 30)), format="JPEG", quality=95),
        ink(np.full((*SIZE, 4), (10, 200, 40, 30))),
        3,
    ),
    (
        "AVIF",
        saved(Image.new("RGB", SIZE, (200, 40, 90)), format="AVIF", quality=95),
        np.full((*SIZE, 3), (200, 40, 90)),
        4,
    ),
]


@pytest.mark.parametrize(
    ("content", "wanted", "tolerance"), [case[1:] for case in RIGHT], ids=[case[0] for case in RIGHT]
)
def test_the_right_pixels(tmp_path: Path, content: bytes, wanted: np.ndarray, tolerance: float) -> None:
    color = np.broadcast_to(wanted, (SIDE, SIDE, 3)).astype(float)
    assert np.abs(read(tmp_path / "x.any", content) - color).max() <= max(tolerance, 0.5)
    gray = wanted if wanted.shape[-1] == 1 else luma(color)
    assert np.abs(read(tmp_path / "x.any", content, channels=1) - gray).max() <= tolerance + (
        0 if wanted.shape[-1] == 1 else 1
    )


def test_what_saved_the_gif_is_exact_too(tmp_path: Path) -> None:
    """Sixteen colors, written as a GIF's own palette."""
    image = Image.fromarray(INDEX[..., 0]).convert("P")
    image.putpalette(PALETTE.tobytes())
    assert (read(tmp_path / "x.gif", saved(image, format="GIF")) == PALETTE[INDEX[..., 0]]).all()


KEY = int(INDEX[0, 0, 0])
TRANSPARENT: list[tuple[str, bytes, np.ndarray]] = [
    ("PNG gray and alpha", png(np.concatenate([GRAY, ALPHA], -1), 4, 8), over(GRAY, ALPHA)),
    ("PNG RGBA", png(np.concatenate([RGB, ALPHA], -1), 6, 8), over(RGB, ALPHA)),
    (
        "PNG palette of alphas",
        png(INDEX, 3, 8, [PLTE, (b"tRNS", bytes(range(0, 256, 16)))]),
        over(PALETTE[INDEX[..., 0]], INDEX * 16),
    ),
    (
        "PNG palette, one clear",
        png(INDEX, 3, 8, [PLTE, (b"tRNS", b"\xff" * KEY + b"\0")]),
        over(PALETTE[INDEX[..., 0]], np.where(INDEX == KEY, 0, 255)),
    ),
    (
        "PNG gray key",
        png(INDEX * 17, 0, 8, [(b"tRNS", struct.pack(">H", KEY * 17))]),
        over(INDEX * 17, np.where(INDEX == KEY, 0, 255)),
    ),
    (
        "PNG RGB key",
        png(RGB, 2, 8, [(b"tRNS", struct.pack(">HHH", *RGB[0, 0]))]),
        over(RGB, np.where((RGB[0, 0] == RGB).all(-1, keepdims=True), 0, 255)),
    ),
    (
        "PNG gray 16 bits key",
        png(WIDE, 0, 16, [(b"tRNS", struct.pack(">H", int(WIDE[0, 0, 0])))]),
        over(WIDE >> 8, np.where(WIDE[0, 0] == WIDE, 0, 255)),
    ),
    (
        "TIFF RGB and alpha",
        tiff(np.concatenate([RGB, ALPHA], -1).tobytes(), SIZE, [8] * 4, 2, extra=2),
        over(RGB, ALPHA),
    ),
    (
        "WebP",
        saved(Image.fromarray(np.concatenate([RGB, ALPHA], -1)), format="WEBP", lossless=True, exact=True),
        over(RGB, ALPHA),
    ),
]


@pytest.mark.parametrize(
    ("content", "wanted"), [case[1:] for case in TRANSPARENT], ids=[case[0] for case in TRANSPARENT]
)
def test_transparency_is_laid_on_a_background_or_refused(tmp_path: Path, content: bytes, wanted: np.ndarray) -> None:
    with pytest.raises(TrainingError, match=r"x\.any: transparent pixels: expected none, or --background"):
        read(tmp_path / "x.any", content)
    assert np.abs(read(tmp_path / "x.any", content, background=BACKGROUND) - wanted).max() <= 1
    gray = luma(np.broadcast_to(wanted, (SIDE, SIDE, 3)))
    assert np.abs(read(tmp_path / "x.any", content, 1, BACKGROUND) - gray).max() <= 1.5


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", SIZE, (40 * index, 10, 20)) for index in range(count)]


def without_adobe(content: bytes) -> bytes:
    """The same JPEG without its APP14 segment."""
    at = content.index(b"\xff\xee")
    length = struct.unpack(">H", content[at + 2 : at + 4])[0]
    return content[:at] + content[at + 2 + length :]


def png_bomb() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    whole = png(np.zeros((1, 1, 1), np.uint8), 0, 8)
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def icc(profile: bytes) -> bytes:
    """A PNG of RGB with a profile."""
    return png(RGB, 2, 8, [(b"iCCP", b"x\0\0" + zlib.compress(profile))])


REFUSED: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "not an image"),
    ("text", b"a,b,c\n", "not an image"),
    (
        "TIFF of floats",
        tiff(RANDOM.random((SIDE, SIDE)).astype("<f4").tobytes(), SIZE, [32], 1, 3),
        "floating-point pixels have no agreed range",
    ),
    ("TIFF of NaN", tiff(np.full(SIZE, np.nan, "<f4").tobytes(), SIZE, [32], 1, 3), "floating-point pixels"),
    ("TIFF of signed 16 bits", tiff(WIDE.tobytes(), SIZE, [16], 1, 2), "signed or 32-bit integer pixels"),
    ("TIFF of 32 bits", tiff(WIDE.astype("<u4").tobytes(), SIZE, [32], 1), "signed or 32-bit integer pixels"),
    ("TIFF of signed 32 bits", tiff(WIDE.astype("<i4").tobytes(), SIZE, [32], 1, 2), "signed or 32-bit integer pixels"),
    ("TIFF of 12 bits", tiff(TWELVE, SIZE, [12], 1), "TIFF of 12 bits"),
    (
        "TIFF of 16 bits, white at 0",
        tiff(WIDE.tobytes(), SIZE, [16], 0),
        "TIFF of 16 bits a sample and photometric interpretation 0",
    ),
    (
        "TIFF of two pages",
        saved(frames(2)[0], format="TIFF", save_all=True, append_images=frames(2)[1:]),
        "2 frames or pages",
    ),
    (
        "GIF of three frames",
        saved(frames(3)[0], format="GIF", save_all=True, append_images=frames(3)[1:]),
        "3 frames or pages",
    ),
    (
        "WebP of two frames",
        saved(frames(2)[0], format="WEBP", save_all=True, append_images=frames(2)[1:]),
        "2 frames or pages",
    ),
    (
        "PNG of two frames",
        saved(frames(2)[0], format="PNG", save_all=True, append_images=frames(2)[1:]),
        "2 frames or pages",
    ),
    ("PPM of floats", b"Pf\n8 8\n-1.0\n" + np.ones(SIZE, "<f4").tobytes(), "floating-point"),
    ("PPM without pixels", b"P6 0 0 255\n", "not an image|pixels: expected"),
    (
        "CMYK JPEG without Adobe's marker",
        without_adobe(saved(Image.new("CMYK", SIZE), format="JPEG")),
        "CMYK JPEG without an Adobe marker",
    ),
    ("PNG bomb", png_bomb(), "exceeds limit of 178956970 pixels"),
    ("PPM bomb", b"P6 60000 60000 255\n", "exceeds limit of 178956970 pixels"),
    ("a needle", b"P5 1 8000000 255\n" + bytes(8_000_000), "too narrow"),
    ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
    ("ICO", saved(Image.new("RGB", (16, 16)), format="ICO"), "not an image"),
    ("TGA", saved(Image.new("RGB", (16, 16)), format="TGA"), "not an image"),
    ("profile that is none", icc(b"nonsense"), "color profile that cannot be read"),
    (
        "RGB profile in CMYK",
        saved(Image.new("CMYK", SIZE), format="JPEG", icc_profile=SRGB),
        "color profile for RGB in an image of mode CMYK",
    ),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_has_no_right_pixels_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    for channels in (1, 3):
        with pytest.raises(TrainingError, match=message) as caught:
            read(tmp_path / "x.png", content, channels, BACKGROUND)
        assert "x.png: " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("dangling", "loop", "pipe", "folder"):
        with pytest.raises(TrainingError, match=rf"{name}\.png: not a"):
            read_picture(tmp_path / f"{name}.png", SIDE, 3)


def wide_profile() -> bytes:
    """An RGB profile whose red and green primaries change places: the matrix columns of sRGB's own profile, swapped."""
    content = bytearray(SRGB)
    count = struct.unpack(">I", content[128:132])[0]
    places = {bytes(content[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    content[red + 4 : red + 12], content[green + 4 : green + 12] = (
        content[green + 4 : green + 12],
        content[red + 4 : red + 12],
    )
    return bytes(content)


def test_color_profiles_are_applied(tmp_path: Path) -> None:
    for format, options in {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}}.items():
        same = saved(Image.fromarray(RGB), format=format, icc_profile=SRGB, **options)
        assert (read(tmp_path / "x", same) == RGB).all(), format
        swapped = saved(Image.fromarray(RGB), format=format, icc_profile=wide_profile(), **options)
        assert np.abs(read(tmp_path / "x", swapped).astype(int) - RGB[..., [1, 0, 2]]).max() <= 2, format
        gray = saved(Image.fromarray(GRAY[..., 0]), format=format, icc_profile=SRGB, **options)
        assert (read(tmp_path / "x", gray, 1) == GRAY).all(), format


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_every_exif_orientation(tmp_path: Path, format: str, orientation: int) -> None:
    stored = np.kron(np.arange(20, 236, 13.5).reshape(4, 4), np.ones((16, 16))).astype(np.uint8)
    image = Image.fromarray(np.stack([stored] * 3, -1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "MPO": {"save_all": True, "append_images": [image]}}.get(
        format, {"quality": 95}
    )
    path = tmp_path / "x"
    path.write_bytes(saved(image, format=format, exif=exif, **options))
    array, notes = read_picture(path, 64, 1)
    assert np.abs(array[0].astype(int) - upright(stored, orientation)).mean() <= (
        3 if format in ("JPEG", "MPO", "AVIF") else 0.5
    )
    if format in ("PNG", "JPEG", "WEBP"):
        assert ("turned upright by its EXIF orientation" in notes) == (orientation != 1)


def test_orientation_comes_before_the_crop(tmp_path: Path) -> None:
    """Stored lying on its side: the crop takes the middle of what a viewer shows."""
    stored = RANDOM.integers(0, 256, (8, 24)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.fromarray(stored), format="PNG", exif=exif))
    array, notes = read_picture(path, 8, 1)
    assert (array[0] == upright(stored, 6)[8:16]).all()
    assert notes == ["turned upright by its EXIF orientation", "cropped"]
    path.write_bytes(tiff(stored.tobytes(), (24, 8), [8], 1, orientation=8))
    assert (read_picture(path, 8, 1)[0][0] == upright(stored, 8)[8:16]).all()


def test_what_is_lost_is_noted(tmp_path: Path) -> None:
    def notes(content: bytes, channels: int = 3, background: tuple[int, int, int] | None = None) -> list[str]:
        (tmp_path / "x").write_bytes(content)
        return read_picture(tmp_path / "x", SIDE, channels, background)[1]

    assert notes(png(RGB, 2, 8)) == []
    assert notes(png(RGB, 2, 8), 1) == ["color reduced to gray"]
    assert notes(png(WIDE, 0, 16)) == ["reduced from 16 to 8 bits"]
    assert notes(png(np.concatenate([RGB, ALPHA], -1), 6, 8), 3, BACKGROUND) == ["laid on the background"]
    assert notes(tiff(CMYK.tobytes(), SIZE, [8] * 4, 5)) == ["CMYK without a profile taken as (1 - ink)(1 - black)"]
    assert notes(png(np.kron(GRAY, np.ones((2, 3, 1), int)), 0, 8)) == ["scaled down", "cropped"]
    assert notes(png(GRAY[:4, :4], 0, 8)) == ["scaled up"]


def samples() -> dict[str, bytes]:
    image = Image.fromarray(RANDOM.integers(0, 256, (24, 20, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {name: saved(image, format=name, exif=exif) for name in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")}
    return found | {name: saved(image, format=name) for name in ("BMP", "PPM", "JPEG2000")} | {
        "GIF": saved(image.quantize(32), format="GIF"),
        "TIFF packed": saved(image, format="TIFF", compression="tiff_lzw"),
        "JPEG progressive": saved(image, format="JPEG", progressive=True),
    }  # fmt: skip


def outcome(path: Path, content: bytes) -> np.ndarray | None:
    """The array, or None if it was refused in one line that names the file. Anything else fails the test."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            array, _ = read_picture(path, SIDE, 3, BACKGROUND)
        except TrainingError as err:
            if not str(err).startswith(f"{path}: ") or "\n" in str(err):
                raise AssertionError(f"not one line that names the file: {err}") from err
            return None
    assert (array.dtype, array.shape) == (np.uint8, (3, SIDE, SIDE))
    return array


def test_a_file_cut_short_is_refused_or_loses_nothing(tmp_path: Path) -> None:
    cases = refused = 0
    for name, content in samples().items():
        whole = outcome(tmp_path / "x", content)
        assert whole is not None, name
        lengths = sorted(
            {*range(0, len(content), max(1, len(content) // 60)), *range(max(0, len(content) - 20), len(content))}
        )
        for length in lengths:
            cases += 1
            found = outcome(tmp_path / "x", content[:length])
            refused += found is None
            assert found is None or (found == whole).all(), f"{name}, {length} of {len(content)} bytes"
    print(f"{cases} files cut short, {refused} refused")


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    generator, cases, refused = np.random.default_rng(SEED), 0, 0
    for content in samples().values():
        for _ in range(60):
            broken = bytearray(content)
            for at in generator.integers(0, min(len(broken), 400), generator.integers(1, 5)):
                broken[at] = generator.integers(0, 256)
            cases += 1
            refused += outcome(tmp_path / "x", bytes(broken)) is None
    print(f"seed {SEED}: {cases} broken files, {refused} refused")


def test_names_are_printed_on_one_line() -> None:
    assert shown(Path(os.fsdecode(b"a\nb\xff\x1b.png"))) == r"a\nb\xff\x1b.png"
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == MAX_PIXELS
