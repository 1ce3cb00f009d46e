"""MNIST: the real files where they are, and what is said about files that are not whole."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afd.data import DataError, datasets, load

Write = Callable[..., Path]
HEADER = 16


def test_real_mnist(real_data: Path) -> None:
    train, test = datasets.read_mnist(real_data, download=False)
    assert train.pixels.shape == (60_000, 1, 28, 28)
    assert test.pixels.shape == (10_000, 1, 28, 28)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    mean = train.pixels.sum(dtype=torch.int64).item() / train.pixels.numel() / 255
    assert mean == pytest.approx(0.1307, abs=1e-4)


def test_real_mnist_splits(real_data: Path) -> None:
    splits = load("mnist", real_data, download=False)
    assert len(splits.train) + len(splits.validation) == 60_000
    assert len(splits.test) == 10_000
    assert torch.bincount(splits.validation.labels).tolist() == [592, 674, 596, 613, 584, 542, 592, 626, 585, 595]
    again = load("mnist", real_data, download=False)
    assert torch.equal(splits.validation.pixels, again.validation.pixels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_finds_the_files(tmp_path: Path, write_mnist: Write, folder: str, suffix: str) -> None:
    write_mnist(tmp_path / folder, suffix)
    splits = load("mnist", str(tmp_path), download=False)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 20)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
    train, _ = datasets.read_mnist(tmp_path, download=False)
    assert np.array_equal(train.pixels.squeeze(1).numpy(), pixels)
    assert train.labels.tolist() == [i % 10 for i in range(40)]


def test_plain_and_packed_may_mix(tmp_path: Path, write_mnist: Write) -> None:
    write_mnist(tmp_path)
    images = tmp_path / "t10k-images-idx3-ubyte"
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images.read_bytes()))
    images.unlink()
    assert len(load("mnist", tmp_path, download=False).test) == 20


@pytest.mark.parametrize("length", [0, 1, 3, 4, 15, 16, 17, 28 * 28, 40 * 784 + 15])
def test_truncated(tmp_path: Path, write_mnist: Write, length: int) -> None:
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte holds {length} bytes; expected .*\d+"):
        load("mnist", tmp_path, download=False)


def test_too_long(tmp_path: Path, write_mnist: Write) -> None:
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte holds 29 bytes; expected 28 for the shape \[20\]"):
        load("mnist", tmp_path, download=False)


def test_bad_magic(tmp_path: Path, write_mnist: Write) -> None:
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(b"\x00\x00\x0d\x03" + path.read_bytes()[4:])
    with pytest.raises(DataError, match="starts with magic number 0x00000d03; expected 0x00000803"):
        load("mnist", tmp_path, download=False)


@given(position=st.integers(0, HEADER - 1), flip=st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_header_byte_is_told(tmp_path: Path, write_mnist: Write, position: int, flip: int) -> None:
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[position] ^= flip
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte .*expected"):
        load("mnist", tmp_path, download=False)


def test_other_image_size(tmp_path: Path, write_mnist: Write, write_idx: Write) -> None:
    write_idx(write_mnist(tmp_path) / "train-images-idx3-ubyte", np.zeros((40, 14, 56)))
    with pytest.raises(DataError, match="holds images of 14x56; expected 28x28"):
        load("mnist", tmp_path, download=False)


def test_counts_disagree(tmp_path: Path, write_mnist: Write, write_idx: Write) -> None:
    write_idx(write_mnist(tmp_path) / "train-labels-idx1-ubyte", np.zeros(39))
    with pytest.raises(DataError, match=r"images-idx3-ubyte holds 40 images but .*labels-idx1-ubyte 39 labels"):
        load("mnist", tmp_path, download=False)


def test_no_images(tmp_path: Path, write_mnist: Write, write_idx: Write) -> None:
    write_idx(write_mnist(tmp_path) / "train-images-idx3-ubyte", np.zeros((0, 28, 28)))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(0))
    with pytest.raises(DataError, match="train-images-idx3-ubyte holds no images"):
        load("mnist", tmp_path, download=False)


def test_label_eleven(tmp_path: Path, write_mnist: Write, write_idx: Write) -> None:
    write_idx(write_mnist(tmp_path) / "t10k-labels-idx1-ubyte", np.r_[np.zeros(19), 11])
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte holds label 11; expected labels 0 to 9"):
        load("mnist", tmp_path, download=False)


@pytest.mark.parametrize("length", [0, 1, 9, 10, 200, -8, -1])
def test_truncated_gzip(tmp_path: Path, write_mnist: Write, length: int) -> None:
    path = write_mnist(tmp_path, ".gz") / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz "):
        load("mnist", tmp_path, download=False)


def test_not_gzip_at_all(tmp_path: Path, write_mnist: Write) -> None:
    path = write_mnist(tmp_path, ".gz") / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"<html>503 Service Unavailable</html>")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is not a whole gzip file \(Not a gzipped file"):
        load("mnist", tmp_path, download=False)


@given(share=st.floats(0, 1), flip=st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupt_gzip_is_told_or_harmless(tmp_path: Path, write_mnist: Write, share: float, flip: int) -> None:
    path = write_mnist(tmp_path, ".gz") / "t10k-images-idx3-ubyte.gz"
    _, whole = datasets.read_mnist(tmp_path, download=False)
    data = bytearray(path.read_bytes())
    data[round(share * (len(data) - 1))] ^= flip
    path.write_bytes(data)
    told = ""
    try:
        _, found = datasets.read_mnist(tmp_path, download=False)
    except DataError as error:
        told, found = str(error), whole
    assert path.name in told or not told
    assert torch.equal(found.pixels, whole.pixels)


def test_unreadable(tmp_path: Path, write_mnist: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte cannot be read: .*Permission denied"):
        load("mnist", tmp_path, download=False)
