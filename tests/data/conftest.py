"""Files as a dataset's authors would have written them, small; and a world without a network."""

from __future__ import annotations

import gzip
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from afd.data import cifar, datasets

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real datasets, for the tests that want them."""
    repository = Path(__file__).parents[2]
    root = Path(os.environ.get("AFD_DATA_ROOT") or repository.parent / "shared" / "data")
    if not (root / "mnist").is_dir():
        pytest.skip(f"no mnist/ in {root}; set AFD_DATA_ROOT to a folder that has it")
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt at a connection fails, as on a machine without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def write_idx() -> Write:
    """Writes an array of bytes as an IDX file; packed, if the name ends in .gz."""

    def write(path: Path, values: np.ndarray) -> Path:
        data = idx_bytes(values.astype(np.uint8))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data, compresslevel=1) if path.suffix == ".gz" else data)
        return path

    return write


@pytest.fixture
def write_mnist(write_idx: Write) -> Write:
    """Writes a small MNIST: 40 training and 20 test images, four and two of each digit."""

    def write(folder: Path, suffix: str = "") -> Path:
        draw = np.random.default_rng(0)
        for part, count in (("train", 40), ("t10k", 20)):
            write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", draw.integers(0, 256, (count, 28, 28)))
            write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
        return folder

    return write


SMALL = {
    "cifar10": replace(cifar.CIFAR10, records=(20,) * 6),
    "cifar100": replace(cifar.CIFAR100, records=(300, 200)),
}


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, cifar.Layout]:
    """Makes `load` expect a few records per file instead of ten thousand and more."""
    for name, layout in SMALL.items():
        monkeypatch.setitem(datasets.READERS, name, layout.read)
    return SMALL


@pytest.fixture
def write_cifar(small_cifar: dict[str, cifar.Layout]) -> Write:
    """Writes a small CIFAR. Image i of a file has label i mod classes, and planes filled with i, i + 1 and i + 2."""

    def write(folder: Path, name: str) -> Path:
        layout = small_cifar[name]
        folder.mkdir(parents=True, exist_ok=True)
        for file, count in zip(layout.source.files, layout.records, strict=True):
            with (folder / file).open("wb") as stream:
                for i in range(count):
                    fine = i % layout.num_classes
                    coarse = bytes([fine % 20]) if layout.label_bytes == 2 else b""
                    planes = b"".join(bytes([(i + plane) % 256]) * 1024 for plane in range(3))
                    stream.write(coarse + bytes([fine]) + planes)
        return folder

    return write
