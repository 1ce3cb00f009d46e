"""Small images in files, as somebody's own data: class folders and tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}


def picture(number: int, height: int = 8, width: int = 8, mode: str = "RGB") -> Image.Image:
    """An image of blocks of 4 pixels, another for each number."""
    blocks = np.random.default_rng(number).integers(256, size=(-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    pixels = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
    return Image.fromarray(pixels).convert(mode)


def content(number: int, ending: str = ".png", height: int = 8, width: int = 8, mode: str = "RGB", **saved) -> bytes:
    """The bytes of a file of that image."""
    file = io.BytesIO()
    picture(number, height, width, mode).save(file, FORMATS[ending], **saved)
    return file.getvalue()


def write(path: Path, *arguments, **settings) -> Path:
    """A file of an image, in the format that its name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(*arguments, ending=path.suffix.lower(), **settings))
    return path


def folder(root: Path, parts: Mapping[str, int], classes=CLASSES, ending: str = ".png", **settings) -> Path:
    """Class folders with so many images a class, in each of the parts; "" is the folder itself."""
    number = 0
    for part, count in parts.items():
        for name in classes:
            for place in range(count):
                write(root / part / name / f"{place:03d}{ending}", number, **settings)
                number += 1
    return root


def shard(path: Path, first: int, count: int, label=lambda number: str(number % 3), ending=".jpg", told=".cls") -> Path:
    """A tar shard of so many images, beginning with a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            named = label(number)
            text = json.dumps({"label": named}) if told == ".json" else named
            for suffix, held in ((ending, content(number, ending)), (told, text.encode())):
                member = tarfile.TarInfo(f"{number:06d}{suffix}")
                member.size = len(held)
                archive.addfile(member, io.BytesIO(held))
    return path
