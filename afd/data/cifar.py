"""CIFAR-10 and CIFAR-100 from their binary archives: fixed-size records, and no pickle that could run code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from afd.data import content
from afd.data.errors import DataError
from afd.data.fetch import Source, locate
from afd.data.images import Images

SHAPE = (3, 32, 32)  # the red plane, then green, then blue, each row by row
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """How one CIFAR is laid out in its files: records of `label_bytes` labels, the last one meant, then the pixels."""

    source: Source
    num_classes: int
    label_bytes: int
    records: tuple[int, ...]
    """Records per file, in the order of `source.files`; the last file is the test set."""

    def read(self, root: Path, *, download: bool) -> tuple[Images, Images]:
        """Training and test images, 3x32x32."""
        paths = locate(self.source, root, download=download)
        *train, test = [self.read_file(path, count) for path, count in zip(paths, self.records, strict=True)]
        return self.images(train), self.images([test])

    def read_file(self, path: Path, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """The records of one file, uint8 [count, label_bytes + 3072]."""
        data = content.read(path)
        record = self.label_bytes + PIXELS
        if len(data) != count * record:
            expected = f"{count * record} ({count} records of {record})"
            raise DataError(f"{path} holds {len(data)} bytes; expected {expected}")
        records = np.frombuffer(data, dtype=np.uint8).reshape(count, record)
        content.check_labels(path, int(records[:, self.label_bytes - 1].max()), self.num_classes)
        return records

    def images(self, files: list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]) -> Images:
        """One set, from the records of its files."""
        pixels = np.concatenate([records[:, self.label_bytes :] for records in files])
        labels = np.concatenate([records[:, self.label_bytes - 1] for records in files]).astype(np.int64)
        return Images(
            torch.from_numpy(pixels).view(-1, *SHAPE),
            torch.from_numpy(labels),
            scale=255.0,
            num_classes=self.num_classes,
            name=self.source.name,
        )


CIFAR10: Layout = Layout(
    source=Source(
        name="cifar10",
        files=(*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"),
        folders=("cifar-10-batches-bin",),
        url="https://www.cs.toronto.edu/~kriz/",
        md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
    num_classes=10,
    label_bytes=1,
    records=(10_000,) * 6,
)

CIFAR100: Layout = Layout(
    source=Source(
        name="cifar100",
        files=("train.bin", "test.bin"),
        folders=("cifar-100-binary",),
        url="https://www.cs.toronto.edu/~kriz/",
        md5={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    ),
    num_classes=100,
    label_bytes=2,  # the coarse label, then the fine one
    records=(50_000, 10_000),
)
