"""Image files as bytes: what they hold, found without decoding them, and their pixels, decoded and brought to a size.

JPEGs are decoded by simplejpeg (libjpeg-turbo, whose pixels are Pillow's, bit for bit, in less than half the time for
small images), and what that does not take by Pillow, as PNG and WebP are.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from afd.errors import in_a_line
from afd.installation import needed_by

with needed_by("reading images from files"):
    import simplejpeg
    from PIL import Image, UnidentifiedImageError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
JPEG = b"\xff\xd8"
PLAIN = ("YCbCr", "RGB", "Gray")  # kinds of JPEG whose pixels are the same by either library
DEEP = ("I", "I;16", "I;16B", "F")  # Pillow's modes of more than 8 bits, which RGB would cut off
# MPO is what Pillow calls a JPEG with more behind it, as many cameras write them
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
DEPTH = 24  # where a PNG says its bits a channel
LONGEST = 64  # an image that is so many times as long as wide is cut before it is resized
TAIL = 12  # bytes


class BadImageError(Exception):
    """A file holds no whole image; the message says why, and not which file."""


def size_of(file: Any) -> tuple[int, int]:
    """Height and width of the image that a file holds.

    Only its header and its end are read; where the end is none of its format's, all of it is decoded.

    Args:
        file: opened for reading bytes, at its beginning.

    Raises:
        BadImageError: it holds no whole image of 8 bits a channel in one of `FORMATS`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            found, kind = (image.height, image.width), str(image.format)
            _check_depth(image)
            length = file.seek(0, io.SEEK_END)
            if kind == "WEBP":
                file.seek(4)
                ended = int.from_bytes(file.read(4), "little") + 8 <= length  # as its own header says
            else:
                file.seek(max(0, length - TAIL))
                ended = bytes(file.read(TAIL)).rstrip(b"\0").endswith(ENDS[kind])
            if not ended:
                file.seek(0)
                decoded(file.read())
            return found
    except BadImageError:
        raise
    except Exception as error:  # whatever Pillow stumbles over in a damaged file
        raise BadImageError(_told(error)) from error


def decoded(content: bytes, least: int = 0) -> Pixels:
    """The pixels of an image file's content.

    What is not RGB is made so: grey, palettes, CMYK; transparency is left out, and so is the way that a camera was
    held (EXIF), as in torchvision's loader.

    Args:
        content: all bytes of the file.
        least: side below which a JPEG need not be decoded in full, but in 1/2, 1/4 or 1/8 of it; 0 for in full.

    Returns:
        uint8 [H, W, 3].

    Raises:
        BadImageError: it holds no whole image of 8 bits a channel in one of `FORMATS`.
    """
    if (pixels := _by_simplejpeg(content, least)) is not None:
        return pixels
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _in_colours(image)
    except BadImageError:
        raise
    except Exception as error:  # whatever Pillow stumbles over in a damaged file
        raise BadImageError(_told(error)) from error


def _by_simplejpeg(content: bytes, least: int) -> Pixels | None:
    """None where it is Pillow's to say, which takes more, and has the last word on what is damaged."""
    try:
        if content.startswith(JPEG) and simplejpeg.decode_jpeg_header(content)[2] in PLAIN:
            pixels: Pixels = simplejpeg.decode_jpeg(content, min_height=least, min_width=least)
            return pixels
    except ValueError:
        return None
    return None


def _told(error: Exception) -> str:
    return "it is no JPEG, PNG or WebP image" if isinstance(error, UnidentifiedImageError) else in_a_line(error)


def of_image(image: Any) -> Pixels:
    """The pixels of an image of Pillow's, as of `decoded`."""
    try:
        return _in_colours(image)
    except OSError as error:
        raise BadImageError(in_a_line(error)) from error


def _check_depth(image: Image.Image) -> None:
    """Raises BadImageError for more than 8 bits a channel, which RGB would cut off."""
    file = getattr(image, "fp", None)
    deep = image.mode in DEEP
    if image.format == "PNG" and file is not None:  # of colours, Pillow tells only what it makes of them
        place = file.tell()
        file.seek(0)
        deep |= bytes(file.read(DEPTH + 1))[DEPTH:] == b"\x10"
        file.seek(place)
    if deep:
        raise BadImageError(
            f"it is {f'a {image.format}' if image.format else 'an image'} of more than 8 bits a channel"
        )


def _in_colours(image: Image.Image) -> Pixels:
    _check_depth(image)
    image.load()  # numpy would make something else of what is cut short
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def fitted(pixels: Pixels, shorter: int, side: int) -> Pixels:
    """The square in the middle of an image, once its shorter side has a length (bilinear, without aliasing).

    Args:
        pixels: uint8 [H, W, 3].
        shorter: length of the shorter side, at least `side`.
        side: of the square.

    Returns:
        uint8 [side, side, 3].
    """
    pixels = _shortened(pixels)
    height, width = pixels.shape[:2]
    if min(height, width) != shorter:
        scale = shorter / min(height, width)
        size = max(shorter, round(width * scale)), max(shorter, round(height * scale))
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=None)
        pixels, (width, height) = np.asarray(resized), size
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _shortened(pixels: Pixels) -> Pixels:
    """The middle of an image that is very much longer than wide: resized as a whole it might take all memory."""
    height, width = pixels.shape[:2]
    most = LONGEST * min(height, width)
    if max(height, width) <= most:
        return pixels
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return pixels[top : top + most, left : left + most]
