"""Data sets in somebody's own files: class folders or tar shards, found, checked and split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from afd.data.datasets import FILES, TEST_SEED, VALIDATION_SEED, Splits, stratified
from afd.data.shards import ShardSource, shards_by_part
from afd.data.sources import FolderSource, ListedSource, Source, class_folders, has_folders
from afd.data.stored import StoredImages, stored
from afd.errors import DataError, InputError, InputTypeError, number
from afd.files import check_source

TEST_SHARE = 0.2
TRAIN, VALIDATION, TEST = ("train", "training"), ("val", "valid", "validation"), ("test",)
LISTING = "val_annotations.txt"  # of Tiny-ImageNet


@dataclass(frozen=True)
class FileSettings:
    """How images in files are split, sized and read.

    Attributes:
        validation: share of the training images that are held out for validation, where none are there for that.
        test_share: share held out as test images, where none are there for that; None for `TEST_SHARE`.
        image_size: as in `stored`.
        resize: as in `stored`.
        bad: as in `stored`.
        workers: as in `stored`; None for the usual number.
    """

    validation: float = 0.1
    test_share: float | None = None
    image_size: int | None = None
    resize: int | None = None
    bad: Literal["error", "skip"] = "error"
    workers: int | None = None


def load_files(name: str, settings: FileSettings = FileSettings()) -> Splits[StoredImages]:
    """Training, validation and test images in files, all looked at.

    A folder holds class folders, or a folder ``train`` with them, and perhaps ``val`` and ``test``; shards say their
    part in their names. Where there are test images, but none for validation, a share of the training images is held
    out for that, class by class. Where there is one part beside the training images, called either, it is the test:
    nothing is to be chosen on it (so ImageNet's ``val``, and Tiny-ImageNet's, which lists its classes in a file, and
    whose ``test`` has none). Where there is neither, both are held out. Draws are the same on every machine.

    Args:
        name: ``folder:PATH`` or ``shards:PATTERN``.
        settings: how.

    Raises:
        DataError: there are no images, or they are not as described here; fewer than two classes; an image is damaged,
            and is not to be skipped; sizes differ, and none is named.
        InputError: a setting is out of range.
    """
    found = _parts(name, settings)
    train = _checked(found.train, settings)
    fewer = replace(settings, workers=None if settings.workers is None else min(settings.workers, train.workers))
    validation, test = (None if one is None else _checked(one, fewer, True) for one in (found.validation, found.test))
    for other in (validation, test):
        if other is not None and other.shape != train.shape:
            raise DataError(
                f"images of {other.name} are of {_told(other)}, and those of {train.name} of {_told(train)}; name one "
                "size for all by --image-size"
            )
    if test is None:
        share = TEST_SHARE if settings.test_share is None else settings.test_share
        train, test = _held_out(train, share, TEST_SEED)
    elif settings.test_share is not None:
        raise InputError(f"test-share is {settings.test_share}, but there are test images in {test.name}")
    if validation is None:
        train, validation = _held_out(train, settings.validation, VALIDATION_SEED)
    return Splits(train, validation, test)


def load_test_files(name: str, settings: FileSettings = FileSettings()) -> StoredImages:
    """The test images of `load_files` alone: of data that have some apart, no others are looked at.

    Raises:
        DataError, InputError: as of `load_files`.
    """
    test = _parts(name, settings).test
    return load_files(name, settings).test if test is None else _checked(test, settings, True)


def _parts(name: str, settings: FileSettings) -> _Parts:
    if not isinstance(name, str):
        raise InputTypeError(f"name is a {type(name).__name__}; it must be folder:PATH or shards:PATTERN")
    kind, _, place = name.partition(":")
    if f"{kind}:" not in FILES or not place:
        raise InputError(f"name is {name!r}; it must be folder:PATH or shards:PATTERN")
    for told, share in (("validation", settings.validation), ("test-share", settings.test_share)):
        if share is not None:
            number(told, share, 0)
            if not 0 < share < 1:
                raise InputError(f"{told} is {share}; it must be a share between 0 and 1")
    return _folder_parts(Path(place).expanduser()) if kind == "folder" else _shard_parts(place)


def _told(images: StoredImages) -> str:
    return "x".join(map(str, images.shape[1:]))


def _checked(source: Source, settings: FileSettings, other: bool = False) -> StoredImages:
    """A part's images, looked at; one beside the training images may have fewer than there are workers."""
    workers = settings.workers
    if workers is not None and other:
        workers = min(workers, len(source))
    return stored(
        source, image_size=settings.image_size, resize=settings.resize, bad=settings.bad, workers=workers
    )  # fmt: skip


def _held_out(images: StoredImages, share: float, seed: int) -> tuple[StoredImages, StoredImages]:
    rest, held = stratified(images.labels, share, seed)
    if not len(held):
        raise DataError(
            f"{images.name} has one image of each class, and none to spare for validation or test; give it folders "
            "for these"
        )
    return images.take(rest), replace(images.take(held), held_out=True)


@dataclass(frozen=True)
class _Parts:
    train: Source
    validation: Source | None = None
    test: Source | None = None


def _named(train: Source, validation: Source | None, test: Source | None) -> _Parts:
    """One part beside the training images is the test, whatever it is called."""
    if len(train.classes) < 2:
        raise DataError(f"{train.name} holds one class, {train.classes[0]}; there must be at least two")
    return _Parts(train, None, validation) if test is None else _Parts(train, validation, test)


# --- Folders --------------------------------------------------------------------------------------------------------


def _folder_parts(folder: Path) -> _Parts:
    check_source("data", folder)
    if not folder.is_dir():
        told = "is a file" if folder.exists() else "is not there"
        raise DataError(f"data is the folder {folder}, which {told}; name a folder of class folders")
    names = {one.lower(): folder / one for one in class_folders(folder)}

    def part(of: tuple[str, ...]) -> Path | None:
        return next((names[one] for one in of if one in names), None)

    inside = part(TRAIN)
    if inside is not None and not has_folders(inside):  # it holds images, and so is a class of that name
        return _named(FolderSource(folder), None, None)
    if inside is None:
        if others := [names[one].name for one in (*VALIDATION, *TEST) if one in names and has_folders(names[one])]:
            raise DataError(f"{folder} holds {' and '.join(others)}, but no train; there must be training images")
        return _named(FolderSource(folder), None, None)
    train = FolderSource(inside)
    validation, test = part(VALIDATION), part(TEST)
    listing = None if validation is None else validation / LISTING
    if validation is not None and listing is not None and listing.is_file():
        return _named(train, ListedSource(validation / "images", listing, train.classes), None)
    return _named(train, *(None if one is None else FolderSource(one, train.classes) for one in (validation, test)))


# --- Shards ---------------------------------------------------------------------------------------------------------


def _shard_parts(pattern: str) -> _Parts:
    by_part = shards_by_part(pattern, {"train": TRAIN, "validation": VALIDATION, "test": TEST})
    if "train" not in by_part:
        raise DataError(
            f"data is the shards {pattern}, all of which are named {' or '.join(by_part)}; none is to train"
        )
    train = ShardSource(by_part["train"])
    parts = [ShardSource(by_part[one], train.classes) if one in by_part else None for one in ("validation", "test")]
    return _named(train, *parts)
