"""CIFAR-10 and CIFAR-100 from either of their archives: the binary one, or the pickles of the Python one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afd.data import content, pickled
from afd.data.errors import DataError
from afd.data.fetch import Source, locate, which
from afd.data.images import Images
from afd.paths import check_target

SHAPE = (3, 32, 32)  # the red plane, then green, then blue, each row by row
PIXELS = 3 * 32 * 32
URL = "https://www.cs.toronto.edu/~kriz/"

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Layout:
    """How one CIFAR is laid out in its files, in both archives.

    Attributes:
        source: the binary files: records of `label_bytes` labels, the last one meant, then the pixels.
        pickled: the Python files, whose entry `label` holds the labels.
        records: images per file, in the order of the files; the last file is the test set.
    """

    source: Source
    pickled: Source
    num_classes: int
    label_bytes: int
    label: str
    records: tuple[int, ...]

    def read(self, root: Path, *, download: bool) -> tuple[Images, Images]:
        """Training and test images, 3x32x32."""
        check_target("data-root", root)
        source = which((self.source, self.pickled), root)
        paths = locate(source, root, download=download)
        read_one = self.read_file if source is self.source else self.read_pickle
        *train, test = [read_one(path, count) for path, count in zip(paths, self.records, strict=True)]
        return self.images(train), self.images([test])

    def read_file(self, path: Path, count: int) -> tuple[Bytes, Bytes]:
        """Pixels uint8 [count, 3072] and labels uint8 [count] of one binary file."""
        data = content.read(path)
        record = self.label_bytes + PIXELS
        if len(data) != count * record:
            expected = f"{count * record} ({count} records of {record})"
            raise DataError(f"{path} holds {len(data)} bytes; expected {expected}")
        records = np.frombuffer(data, dtype=np.uint8).reshape(count, record)
        labels = records[:, self.label_bytes - 1]
        content.check_labels(path, int(labels.max()), self.num_classes)
        return records[:, self.label_bytes :], labels

    def read_pickle(self, path: Path, count: int) -> tuple[Bytes, Bytes]:
        """The same of one Python file, of which nothing is run."""
        return pickled.read(path, count, PIXELS, self.label, self.num_classes)

    def images(self, files: list[tuple[Bytes, Bytes]]) -> Images:
        """One set, from pixels and labels of its files."""
        pixels, labels = (np.concatenate(parts) for parts in zip(*files, strict=True))
        return Images(
            torch.from_numpy(pixels).view(-1, *SHAPE),
            torch.from_numpy(labels.astype(np.int64)),
            scale=255.0,
            num_classes=self.num_classes,
            name=self.source.name,
        )


CIFAR10: Layout = Layout(
    source=Source(
        name="cifar10",
        files=(*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"),
        folders=("cifar-10-batches-bin",),
        url=URL,
        md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        instead="cifar-10-batches-py or cifar-10-python.tar.gz",
    ),
    pickled=Source(
        name="cifar10",
        files=(*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"),
        folders=("cifar-10-batches-py",),
        url=URL,
        md5={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    num_classes=10,
    label_bytes=1,
    label="labels",
    records=(10_000,) * 6,
)

CIFAR100: Layout = Layout(
    source=Source(
        name="cifar100",
        files=("train.bin", "test.bin"),
        folders=("cifar-100-binary",),
        url=URL,
        md5={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        instead="cifar-100-python or cifar-100-python.tar.gz",
    ),
    pickled=Source(
        name="cifar100",
        files=("train", "test"),
        folders=("cifar-100-python",),
        url=URL,
        md5={"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
    ),
    num_classes=100,
    label_bytes=2,  # the coarse label, then the fine one
    label="fine_labels",
    records=(50_000, 10_000),
)
