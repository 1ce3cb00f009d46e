"""Images: what it refuses, and that scaling to [0, 1] is the exact quotient."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch

from afd.data import Images


def some(count: int = 6, **changes: object) -> Images:
    generator = torch.Generator().manual_seed(0)
    fields: dict[str, object] = {
        "pixels": torch.randint(256, (count, 3, 4, 5), generator=generator).to(torch.uint8),
        "labels": torch.arange(count) % 4,
        "scale": 255.0,
        "num_classes": 4,
        "name": "some",
    }
    return Images(**(fields | changes))  # type: ignore[arg-type]


def test_knows_its_size() -> None:
    images = some()
    assert len(images) == 6
    assert images.shape == (3, 4, 5)
    assert images.device == torch.device("cpu")
    assert repr(images) == "Images(some: 6 of 3x4x5, 4 classes, on cpu)"


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        some().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixels": torch.zeros(6, 3, 4, 5)}, TypeError, "pixels is torch.float32"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, TypeError, "labels is torch.int32"),
        ({"pixels": torch.zeros(6, 4, 5, dtype=torch.uint8)}, ValueError, r"pixels has shape \[6, 4, 5\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels has shape \[5\].*must be \[6\]"),
        ({"labels": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, r"labels has shape \[6, 1\]"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 0])}, ValueError, r"labels run from 0 to 4; they must be in \[0, 4\)"),
        ({"labels": torch.tensor([0, 1, -1, 3, 2, 0])}, ValueError, "labels run from -1 to 3"),
        ({"labels": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "labels is on meta"),
        ({"num_classes": 0}, ValueError, "num_classes is 0"),
        ({"scale": 0.0}, ValueError, "scale is 0.0"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"scale": 256.0}, ValueError, "scale is 256.0"),
        ({"scale": 16.0}, ValueError, "pixels reach 25[0-5]; scale allows 16.0"),
    ],
)
def test_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        some(**changes)


def test_no_images_are_images_too() -> None:
    images = some(0)
    assert len(images) == 0
    assert images.images().shape == (0, 3, 4, 5)


@pytest.mark.parametrize("scale", [255, 16])
def test_scales_exactly(scale: int) -> None:
    values = torch.arange(scale + 1, dtype=torch.uint8)
    images = Images(values.view(-1, 1, 1, 1), torch.zeros(len(values), dtype=torch.int64), float(scale), 1, "ramp")
    x = images.images()
    assert x.dtype == torch.float32
    assert x.min() == 0.0
    assert x.max() == 1.0
    # np.float32 rounds the exact quotient once, to nearest.
    assert x.flatten().tolist() == [float(np.float32(Fraction(value, scale))) for value in range(scale + 1)]


def test_takes_in_order_with_repeats() -> None:
    images, index = some(), torch.tensor([4, 0, 4], dtype=torch.int32)
    taken = images.take(index)
    assert torch.equal(taken.pixels, images.pixels[[4, 0, 4]])
    assert taken.labels.tolist() == [0, 0, 0]
    assert (taken.scale, taken.num_classes, taken.name) == (images.scale, images.num_classes, images.name)
    assert torch.equal(taken.images(), images.images(index))


def test_take_refuses_what_is_not_positions() -> None:
    with pytest.raises(TypeError, match=r"index is torch\.bool"):
        some().take(torch.ones(6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"index is torch\.bool"):
        some().images(torch.ones(6, dtype=torch.bool))
    with pytest.raises(IndexError):
        some().take(torch.tensor([6]))


def test_reading_images_changes_nothing() -> None:
    images = some()
    before = images.pixels.clone()
    images.images().zero_()
    assert torch.equal(images.pixels, before)


@pytest.mark.gpu
def test_scales_to_the_same_bits_on_cuda(cuda: torch.device) -> None:
    ramp = Images(
        torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(256, dtype=torch.int64), 255.0, 1, "ramp"
    )
    moved = ramp.to(cuda)
    assert moved.device.type == "cuda"
    assert torch.equal(moved.images().cpu(), ramp.images())
    assert torch.equal(moved.take(torch.tensor([3, 1])).images().cpu(), ramp.images()[[3, 1]])
