"""scikit-learn's 8x8 digits: real handwriting that needs no download, for tests and first steps."""

from __future__ import annotations

import torch

from afd.data.images import Images
from afd.data.split import stratified
from afd.extras import needed_by

TEST_FRACTION = 0.2
TEST_SEED = 2021


def read() -> tuple[Images, Images]:
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
