"""MNIST from its four IDX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from afd.data import content, idx
from afd.data.errors import DataError
from afd.data.fetch import Source, locate
from afd.data.images import Images

SOURCE = Source(
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


def read(root: Path, *, download: bool) -> tuple[Images, Images]:
    """Training and test images, 1x28x28."""
    train_images, train_labels, test_images, test_labels = locate(SOURCE, root, download=download)
    return pair(train_images, train_labels), pair(test_images, test_labels)


def pair(image_file: Path, label_file: Path) -> Images:
    """One set, from its image file and its label file."""
    pixels, labels = idx.read(image_file, dims=3), idx.read(label_file, dims=1)
    count, height, width = pixels.shape
    if (height, width) != (28, 28):
        raise DataError(f"{image_file} holds images of {height}x{width}; expected 28x28")
    if count != len(labels):
        raise DataError(f"{image_file} holds {count} images but {label_file} {len(labels)} labels; expected as many")
    if count == 0:
        raise DataError(f"{image_file} holds no images; expected at least one")
    content.check_labels(label_file, int(labels.max()), 10)
    return Images(
        torch.from_numpy(pixels.copy()).unsqueeze(1),
        torch.from_numpy(labels.astype(np.int64)),
        scale=255.0,
        num_classes=10,
        name="mnist",
    )
