"""The datasets by name, each split the same way: train, validation and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from afd.data import cifar, digits, fetch, mnist
from afd.data.images import Images
from afd.data.numbers import whole
from afd.data.split import drawn, stratified
from afd.errors import InputError, one_of

VALIDATION_SEED, LIMIT_SEED = 6621, 6622

READERS: dict[str, Callable[..., tuple[Images, Images]]] = {
    "mnist": mnist.read,
    "cifar10": cifar.CIFAR10.read,
    "cifar100": cifar.CIFAR100.read,
}

NAMES = ("digits", *READERS)


@dataclass(frozen=True)
class Splits:
    """The three parts of a dataset; no image is in two.

    Attributes:
        train: what a model learns from.
        validation: cut from the training data, to choose checkpoints and settings by.
        test: the dataset's own test set, to report from and for nothing else.
    """

    train: Images
    validation: Images
    test: Images

    def limited(self, limit: int | None) -> Splits:
        """The same with at most so many images in each part, drawn class by class and the same everywhere.

        Raises:
            InputError, InputTypeError: `limit` is no whole number of at least 1.
        """
        if limit is None:
            return self
        whole("limit", limit, 1)
        parts = (self.train, self.validation, self.test)
        return Splits(*(part.take(drawn(part.labels, limit, LIMIT_SEED)) for part in parts))


def load(
    name: str,
    root: str | Path | None = None,
    *,
    validation: float = 0.1,
    limit: int | None = None,
    download: bool = True,
) -> Splits:
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
        train, test = digits.read()
    else:
        folder = fetch.default_root() if root is None else Path(root).expanduser()
        train, test = READERS[name](folder, download=download)
    rest, held = stratified(train.labels, validation, VALIDATION_SEED)
    return Splits(train.take(rest), train.take(held), test).limited(limit)
