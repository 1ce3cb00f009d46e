"""The datasets by name, each split the same way: train, validation and test. Digits and MNIST are read here."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afd.data import cifar, fetch
from afd.data.fetch import Source, locate
from afd.data.images import Images
from afd.errors import DataError, InputError, one_of, whole
from afd.installation import needed_by


class Labelled(Protocol):
    """Labelled images, in memory or in files."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""

    def take(self, index: Tensor) -> Any:
        """Those at these positions."""


Kind = TypeVar("Kind", bound=Labelled)


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions that stay and positions held out, the held-out part drawn class by class.

    Args:
        labels: int64 [N].
        fraction: part of every class to hold out, in (0, 1), to the nearest image: at least one image of a class is
            held out and at least one stays, unless the class has a single image, which stays.
        seed: which draw; the same labels, fraction and seed give the same positions on every machine and version.

    Returns:
        Two int64 tensors of ascending positions, disjoint, together all of [0, N).
    """
    # NumPy promises that RandomState's streams never change; torch and newer NumPy generators do not. Were the split to
    # move, a saved model's validation score would be measured on its own training images.
    order = np.random.RandomState(seed).permutation(len(labels))
    classes = labels.cpu().numpy()[order]
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(classes):
        members = order[classes == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[:count]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def drawn_by_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Positions of `count` images, drawn class by class in proportion, ascending; of all where there are no more.

    Args:
        labels: int64 [N].
        count: of images, at least 1. Every class is among them if there are as many classes or fewer.
        seed: which draw, as for `stratified`; of two counts, the smaller one's images are among the larger one's.
    """
    order = np.random.RandomState(seed).permutation(len(labels))
    classes = labels.cpu().numpy()[order]
    share = np.zeros(len(labels))  # of its class that comes before an image
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        share[members] = np.arange(len(members)) / len(members)
    first = np.lexsort((classes, share))[:count]
    return torch.from_numpy(np.sort(order[first]))


def resolved(name: str) -> str:
    """The name of data, its path written out from the root of the file system, so that it means the same everywhere."""
    kind, _, place = name.partition(":")
    if f"{kind}:" not in FILES or not place or "://" in place:
        return name
    return f"{kind}:{os.path.normpath(Path(place).expanduser().absolute())}"


def short(name: str) -> str:
    """The name of data as titles have it: of files, the end of their path."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(FILES) else name


TEST_FRACTION = 0.2
TEST_SEED = 2021


def read_digits() -> tuple[Images, Images]:
    """Training and test images, 1797 in all; the bundle has no test set, so a fixed fifth of every class is one.

    Raises:
        ExtraMissingError: scikit-learn, which has them, is not installed.
    """
    with needed_by("the data set digits", "scikit-learn"):
        from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = torch.from_numpy(bundle.images).to(torch.uint8).unsqueeze(1)
    digits = Images(pixels, torch.from_numpy(bundle.target).to(torch.int64), scale=16.0, num_classes=10, name="digits")
    train, test = stratified(digits.labels, TEST_FRACTION, TEST_SEED)
    return digits.take(train), digits.take(test)


UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dims: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, plain or gzip-packed.

    Args:
        path: the file; a name that ends in .gz is unpacked.
        dims: the rank it must have: 3 for images [N, H, W], 1 for labels [N].

    Returns:
        Its values, uint8, in the shape its header states.

    Raises:
        DataError: it cannot be read, is of another type or rank, or is longer or shorter than its header states.
    """
    data = fetch.read_bytes(path)
    header = struct.Struct(f">{1 + dims}I")
    if len(data) < header.size:
        raise DataError(f"{path} holds {len(data)} bytes; expected at least the {header.size} bytes of an IDX header")
    magic, *shape = header.unpack_from(data)
    expected_magic = UNSIGNED_BYTE << 8 | dims
    if magic != expected_magic:
        raise DataError(f"{path} starts with magic number {magic:#010x}; expected {expected_magic:#010x}")
    expected = header.size + math.prod(shape)
    if len(data) != expected:
        raise DataError(f"{path} holds {len(data)} bytes; expected {expected} for the shape {shape} in its header")
    return np.frombuffer(data, dtype=np.uint8, offset=header.size).reshape(shape)


MNIST = Source(
    name="mnist",
    files=(
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ),
    folders=("mnist", "MNIST/raw"),
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    md5={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)


def read_mnist(root: Path, *, download: bool) -> tuple[Images, Images]:
    """Training and test images, 1x28x28."""
    train_images, train_labels, test_images, test_labels = locate(MNIST, root, download=download)
    return read_pair(train_images, train_labels), read_pair(test_images, test_labels)


def read_pair(image_file: Path, label_file: Path) -> Images:
    """One set, from its image file and its label file."""
    pixels, labels = read_idx(image_file, dims=3), read_idx(label_file, dims=1)
    count, height, width = pixels.shape
    if (height, width) != (28, 28):
        raise DataError(f"{image_file} holds images of {height}x{width}; expected 28x28")
    if count != len(labels):
        raise DataError(f"{image_file} holds {count} images but {label_file} {len(labels)} labels; expected as many")
    if count == 0:
        raise DataError(f"{image_file} holds no images; expected at least one")
    fetch.check_labels(label_file, int(labels.max()), 10)
    return Images(
        torch.from_numpy(pixels.copy()).unsqueeze(1),
        torch.from_numpy(labels.astype(np.int64)),
        scale=255.0,
        num_classes=10,
        name="mnist",
    )


VALIDATION_SEED, LIMIT_SEED = 6621, 6622

READERS: dict[str, Callable[..., tuple[Images, Images]]] = {
    "mnist": read_mnist,
    "cifar10": cifar.CIFAR10.read,
    "cifar100": cifar.CIFAR100.read,
}

NAMES = ("digits", *READERS)
FILES = ("folder:", "shards:")  # how data in somebody's own files are named


def check_data(name: str) -> str:
    """The name of data, found to be one.

    Raises:
        InputError: it is none.
    """
    if name not in NAMES and not (name.startswith(FILES) and name.partition(":")[2]):
        raise InputError(f"data is {name!r}; allowed are {', '.join(NAMES)}, folder:PATH, shards:PATTERN")
    return name


@dataclass(frozen=True)
class Splits(Generic[Kind]):
    """The three parts of a dataset, in memory or in files; no image is in two.

    Attributes:
        train: what a model learns from.
        validation: cut from the training data, to choose checkpoints and settings by.
        test: the dataset's own test set, to report from and for nothing else.
    """

    train: Kind
    validation: Kind
    test: Kind

    def limited(self, limit: int | None) -> Splits[Kind]:
        """The same with at most so many images in each part, drawn class by class and the same everywhere.

        Raises:
            InputError, InputTypeError: `limit` is no whole number of at least 1.
        """
        if limit is None:
            return self
        whole("limit", limit, 1)
        parts = (self.train, self.validation, self.test)
        return Splits(*(part.take(drawn_by_class(part.labels, limit, LIMIT_SEED)) for part in parts))


def load(
    name: str,
    root: str | Path | None = None,
    *,
    validation: float = 0.1,
    limit: int | None = None,
    download: bool = True,
) -> Splits[Images]:
    """Reads a dataset from its files, fetching them first if need be.

    Validation images are drawn from the training data, class by class and with a fixed seed: the same on every machine.

    Args:
        name: "digits" (comes with scikit-learn, 1x8x8), "mnist" (1x28x28), "cifar10" or "cifar100" (3x32x32).
        root: the folder with the files, or with the folder they unpack to (`mnist`, `MNIST/raw`,
            `cifar-10-batches-bin`, `cifar-100-binary`, or CIFAR's Python archives `cifar-10-batches-py`,
            `cifar-100-python`, of which no code is run); None for the user's cache folder. Digits ignore it.
        validation: part of the training data to hold out as validation split, in (0, 1).
        limit: the most images of each split, drawn class by class from what it would be without; None for all.
        download: whether missing files may be fetched, by checksum, into `root`.

    Returns:
        The three splits, in CPU memory.

    Raises:
        InputError: the name is unknown, `validation` is not in (0, 1), or `limit` is below 1.
        DataError: files are missing and cannot be fetched, or are corrupt.
    """
    one_of("name", name, NAMES)
    if not 0 < validation < 1:
        raise InputError(f"validation is {validation}; it must be in (0, 1)")
    if limit is not None:
        whole("limit", limit, 1)
    if name == "digits":
        train, test = read_digits()
    else:
        folder = fetch.default_root() if root is None else Path(root).expanduser()
        train, test = READERS[name](folder, download=download)
    rest, held = stratified(train.labels, validation, VALIDATION_SEED)
    return Splits(train.take(rest), train.take(held), test).limited(limit)
