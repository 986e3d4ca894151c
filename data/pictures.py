"""From an encoded image to pixels.

What is decoded is the first frame, turned as its EXIF orientation asks (as `datasets` shows it; the loaders of
torchvision and timm pass over the tag) and converted by Pillow: palettes to the colours they stand for, CMYK and YCbCr
to RGB, alpha dropped, bits to 0 and 255. Of 16-bit colour Pillow reads the upper 8 bits; 16-bit and floating-point
grey, whose range a file does not tell, is refused. So is a file of which a part is missing, and one of more pixels than
Pillow warns of: a few hundred bytes can ask for gigabytes. Only the formats below are tried: Pillow knows others, and
hands one of them, EPS, to another program to run.
"""

import io
import struct
from typing import Literal

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""As Pillow names them; its JPEG covers MPO too."""
MOST_PIXELS = 89_478_485
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})

Mode = Literal["L", "RGB"]

_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(encoded: bytes | memoryview, mode: Mode | None = None) -> Image.Image:
    """The upright image, in `mode` where one is given. ValueError says why it cannot be had, in a few words."""
    try:
        return _decode(encoded, mode)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # of any kind: Pillow's readers raise whatever the bytes make them stumble over
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _decode(encoded: bytes | memoryview, mode: Mode | None) -> Image.Image:
    stored = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = stored.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")
    if stored.mode not in GREY_MODES | COLOUR_MODES:
        raise ValueError(f"{stored.mode} pixels do not fit in 8 bits")
    stored.load()
    image = stored if mode is None or stored.mode == mode else stored.convert(mode)
    orientation = _orientation(stored)
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def _orientation(stored: Image.Image) -> int | None:
    """What the EXIF block says; None where there is none, or none that can be read: the pixels do not depend on it."""
    try:
        orientation = stored.getexif().get(_ORIENTATION)
    except (
        struct.error,
        LookupError,
        SyntaxError,
        TypeError,
        ValueError,
        OSError,
    ):  # what Pillow raises for broken ones
        return None
    return orientation if isinstance(orientation, int) else None
