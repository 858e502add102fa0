"""One image file as 8-bit pixels: the right ones, or a TrainingError that names the file.

Pillow opens more than it converts well. ``convert`` clips 16-bit, integer and floating-point images at 255, drops an
alpha channel, ignores color profiles and orientation, and takes the first of several frames. Here each of these is
carried out, or refused. What loses something is noted, so that a caller can say it.
"""

import functools
import io
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from decuwatch_training.errors import TrainingError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read, by content and not by suffix. Others run other programs, or have no signature."""

Image.init()  # Pillow would look for the rest of its plugins only if every format were allowed

MAX_PIXELS = 178_956_970
"""Of a file, and of the image that it is scaled to before it is cropped. Pillow's own limit."""

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation. 1 and values that EXIF does not define change nothing."""

SRGB_TOLERANCE = 2
"""A profile that moves no value by more than this, of 255, is sRGB in all but name and changes nothing."""

Color = tuple[int, int, int]


def read_picture(path: Path, size: int, channels: int, background: Color | None = None) -> tuple[np.ndarray, list[str]]:
    """The image as uint8 [channels, size, size], scaled and cropped to the centre, and what was lost or changed on the
    way.

    Transparent pixels take ``background``. Raises TrainingError of one line that names the file, whatever is wrong with
    it.
    """
    notes: list[str] = []
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TrainingError("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of metadata that it cannot read, and goes on without it
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # A file object, not a path: Pillow maps a path into memory, and confuses rows of TIFF that lie on their
            # side.
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as opened:
                image = fitted(eight_bits(opened, channels, background, notes), size, notes)
    except TrainingError as err:
        raise TrainingError(f"{shown(path)}: {err}") from err
    except Exception as err:  # Pillow's plugins raise whatever a broken file makes of them
        reason = " ".join(str(err).replace(str(path), "the file").split()) or type(err).__name__
        raise TrainingError(f"{shown(path)}: not an image that can be read: {reason}") from err
    array = np.asarray(image)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1)), notes


def shown(path: Path) -> str:
    """A path as one printable line: control characters and bytes that are not UTF-8 are escaped."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def eight_bits(opened: Image.Image, channels: int, background: Color | None, notes: list[str]) -> Image.Image:
    """The whole image, upright, in mode L (1 channel) or RGB (3 channels, sRGB)."""
    if 0 in opened.size or opened.width * opened.height > MAX_PIXELS:
        raise TrainingError(f"{opened.width} x {opened.height} pixels: expected 1 to {MAX_PIXELS:,} in all")
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":  # a photograph, followed by previews or depth maps of the same
        raise TrainingError(f"{frames} frames or pages: expected one image")
    opened.load()
    image = _opaque(_sixteen_bits(_upright(opened, notes), opened, notes), background, notes)
    image = _srgb(image, opened, notes)
    if channels == 3:
        return image.convert("RGB")
    if image.mode == "RGB" and np.ptp(np.asarray(image), axis=2).any():
        notes.append("color reduced to gray")
    return image.convert("L")


def _upright(opened: Image.Image, notes: list[str]) -> Image.Image:
    orientation = opened.getexif().get(ORIENTATION)
    if orientation not in UPRIGHT or opened.format == "TIFF":  # Pillow turns TIFF itself, when it loads the pixels
        return opened
    notes.append("turned upright by its EXIF orientation")
    image = opened.transpose(UPRIGHT[orientation])
    image.info = dict(opened.info)
    return image


def _sixteen_bits(image: Image.Image, opened: Image.Image, notes: list[str]) -> Image.Image:
    """The high byte of 16-bit gray, as Pillow does for 16-bit color. Integers and floats have no agreed range."""
    if image.mode == "F":
        raise TrainingError("floating-point pixels have no agreed range: expected 8 or 16 bits")
    if image.mode == "I" and opened.format != "PPM":  # PPM's are scaled to 0 to 65535 by their own maximum
        raise TrainingError("signed or 32-bit integer pixels have no agreed range: expected 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    tags = getattr(opened, "tag_v2", {})
    bits, photometric = tags.get(258, (16,)), tags.get(262, 1)
    if bits != (16,) or photometric != 1:
        raise TrainingError(
            f"TIFF of {bits[0]} bits a sample and photometric interpretation {photometric}: expected 8 bits, or 16 "
            "with black at 0"
        )
    notes.append("reduced from 16 to 8 bits")
    values = np.asarray(image).astype(np.uint32)
    gray = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _opaque(image: Image.Image, background: Color | None, notes: list[str]) -> Image.Image:
    if not image.has_transparency_data:
        return image
    transparent = image.info.get("transparency")
    if image.mode == "La" or (isinstance(transparent, tuple) and max(transparent) > 255):
        raise TrainingError(
            f"transparency of mode {image.mode} with {transparent!r}: expected an alpha channel of 8 bits"
        )
    rgba = image.convert("RGBA")
    alpha = np.asarray(rgba.getchannel("A")).astype(np.uint32)[..., None]
    color = rgba.convert("RGB")
    color.info = {}
    if alpha.min() == 255:
        return color
    if background is None:
        raise TrainingError(
            "transparent pixels: expected none, or --background with the color that your model was trained on"
        )
    notes.append("laid on the background")
    mixed = (np.asarray(color) * alpha + np.array(background, np.uint32) * (255 - alpha) + 127) // 255
    return Image.fromarray(mixed.astype(np.uint8))


def _srgb(image: Image.Image, opened: Image.Image, notes: list[str]) -> Image.Image:
    """Mode L or RGB: an embedded profile is applied, colors without one are sRGB already."""
    profile = opened.info.get("icc_profile")
    if image.mode == "CMYK" and opened.format in ("JPEG", "MPO") and "adobe" not in opened.info:
        raise TrainingError("CMYK JPEG without an Adobe marker: nothing says whether 0 or 255 is full ink")
    if image.mode == "LAB" and profile:
        raise TrainingError("color profile in a Lab image: expected none")
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "PA", "RGBX", "YCbCr", "LAB"):
        image = image.convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        raise TrainingError(f"mode {image.mode}: expected gray, color, a palette, CMYK, YCbCr or Lab")
    if not profile:
        if image.mode == "CMYK":
            notes.append("CMYK without a profile taken as (1 - ink)(1 - black)")
            image = image.convert("RGB")
        return image
    space, transforms = _transforms(profile)
    if image.mode == "L" and space == "RGB":
        image = image.convert("RGB")
    if image.mode not in transforms:
        raise TrainingError(f"color profile for {space} in an image of mode {image.mode}")
    transform = transforms[image.mode]
    if transform is None:
        return image
    notes.append("converted to sRGB by its color profile")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@functools.lru_cache(maxsize=64)
def _transforms(content: bytes) -> tuple[str, dict[str, ImageCms.ImageCmsTransform | None]]:
    """The profile's color space, and the transform of an image's mode to sRGB; None if the profile is sRGB itself."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = profile.profile.xcolor_space.strip()
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space)
        if mode is None:
            return space, {}
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError) as err:
        raise TrainingError(f"color profile that cannot be read: {err}") from err
    if mode == "CMYK":
        return space, {mode: transform}
    levels = np.arange(256, dtype=np.uint8)
    if mode == "L":
        grid = levels[None]
    else:
        axis = levels[::15]
        grid = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(1, -1, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform)).astype(int)
    same = np.abs(moved - (grid[..., None] if mode == "L" else grid)).max() <= SRGB_TOLERANCE
    return space, {mode: None if same else transform}


def fitted(image: Image.Image, size: int, notes: list[str]) -> Image.Image:
    """Scaled with a bicubic filter so that the shorter side has ``size`` pixels, and cropped to the centre."""
    scale = size / min(image.size)
    scaled = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise TrainingError(
            f"{image.width} x {image.height} pixels: too narrow to be scaled to a shorter side of {size}"
        )
    if scale < 1:
        notes.append("scaled down")
    if scale > 1:
        notes.append("scaled up")
    if scaled != (size, size):
        notes.append("cropped")
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
