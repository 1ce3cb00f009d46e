"""Image files as bytes: pixels as Pillow has them, sizes without decoding, and what is damaged."""

from __future__ import annotations

import io
import struct
import zlib

import image_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from afd.data import decoding
from afd.data.decoding import BadImageError

KINDS = [
    (".jpg", "RGB", {}),
    (".jpg", "RGB", {"subsampling": 0, "quality": 95}),
    (".jpg", "RGB", {"progressive": True, "quality": 30}),
    (".jpg", "L", {}),
    (".jpg", "CMYK", {}),
    (".png", "RGB", {}),
    (".png", "RGBA", {}),
    (".png", "L", {}),
    (".png", "P", {}),
    (".png", "1", {}),
    (".webp", "RGB", {"lossless": True}),
    (".webp", "RGBA", {}),
]


def of_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("ending", "mode", "saved"), KINDS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (17, 33), (40, 9)])
def test_pixels_are_those_of_pillow_and_the_size_is_known_without_them(ending, mode, saved, height, width):
    data = image_files.content(3, ending, height, width, mode, **saved)
    assert np.array_equal(decoding.decoded(data), of_pillow(data))
    assert decoding.size_of(io.BytesIO(data)) == (height, width)


def test_jpegs_come_from_the_faster_library(monkeypatch):
    data = image_files.content(3, ".jpg", 16, 16)
    monkeypatch.setattr(decoding.Image, "open", None)
    assert decoding.decoded(data).shape == (16, 16, 3)


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp"])
@given(cut=st.integers(0, 10_000))
def test_a_file_that_is_cut_short_is_found_before_it_is_decoded(ending, cut):
    data = image_files.content(5, ending, 24, 24)
    kept = data[: cut % (len(data) - 2)]
    try:
        found = decoding.decoded(kept)
    except BadImageError:
        with pytest.raises(BadImageError):
            decoding.size_of(io.BytesIO(kept))
    else:  # a PNG's pixels are whole before its last bytes, which are checksums
        assert ending == ".png"
        assert np.array_equal(found, of_pillow(data))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp"])
def test_bytes_behind_the_end_of_an_image_do_no_harm(ending):
    data = image_files.content(5, ending, 24, 24) + b"\0" * 40 + b"more"
    assert decoding.size_of(io.BytesIO(data)) == (24, 24)
    assert decoding.decoded(data).shape == (24, 24, 3)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff", b"GIF89a" + b"\0" * 50])
def test_what_is_no_image_is_said_to_be_none(data):
    for read in (decoding.decoded, lambda held: decoding.size_of(io.BytesIO(held))):
        with pytest.raises(BadImageError, match=r"\w"):
            read(data)


def test_sixteen_bits_are_not_cut_to_eight():
    file = io.BytesIO()
    Image.fromarray(np.full((6, 6), 1000, dtype=np.uint16)).save(file, "PNG")
    for read in (decoding.decoded, lambda held: decoding.size_of(io.BytesIO(held))):
        with pytest.raises(BadImageError, match="more than 8 bits"):
            read(file.getvalue())


def test_sixteen_bits_of_colour_are_not_cut_either():
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(2 * (1 + 2 * 6)))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(held)) + name + held + struct.pack(">I", zlib.crc32(name + held)) for name, held in chunks
    )
    for read in (decoding.decoded, lambda held: decoding.size_of(io.BytesIO(held))):
        with pytest.raises(BadImageError, match="more than 8 bits"):
            read(data)


def test_a_jpeg_with_more_behind_it_as_cameras_write_them_is_one():
    file = io.BytesIO()
    image_files.picture(1, 16, 24).save(file, "MPO", save_all=True, append_images=[image_files.picture(2, 16, 24)])
    assert decoding.size_of(io.BytesIO(file.getvalue())) == (16, 24)
    assert np.array_equal(decoding.decoded(file.getvalue()), of_pillow(file.getvalue()))


def test_a_strip_is_cut_before_it_is_resized():
    pixels = np.zeros((2, 60_000, 3), dtype=np.uint8)
    pixels[:, 29_990:30_010] = 255
    found = decoding.fitted(pixels, 224, 224)
    assert found.shape == (224, 224, 3)
    assert found.min() == 255


def test_a_large_jpeg_is_decoded_in_part_of_its_size_where_that_is_enough():
    data = image_files.content(1, ".jpg", 400, 640)
    assert decoding.decoded(data, least=50).shape == (50, 80, 3)
    assert decoding.decoded(data, least=100).shape == (100, 160, 3)
    assert 200 > decoding.decoded(data, least=101).shape[0] > 101
    assert decoding.decoded(data, least=500).shape == (400, 640, 3)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (20, 31), (31, 20), (9, 100), (8, 8), (5, 7)])
@pytest.mark.parametrize(("shorter", "side"), [(8, 8), (12, 8), (8, 5)])
def test_the_square_is_the_middle_of_the_resized_image(height, width, shorter, side):
    pixels = np.asarray(image_files.picture(2, height, width))
    found = decoding.fitted(pixels, shorter, side)
    scale = shorter / min(height, width)
    wide, high = max(shorter, round(width * scale)), max(shorter, round(height * scale))
    whole = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))
    top, left = (high - side) // 2, (wide - side) // 2
    assert np.array_equal(found, whole[top : top + side, left : left + side])
    assert found.shape == (side, side, 3)
