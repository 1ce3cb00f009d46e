"""Tests of the networks of timm, torchvision and Hugging Face, with these libraries themselves: make test-models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from afd.data import Images, Splits

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this room carry the mark; none of it imports a library before it runs."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.models)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


def images(count: int, shape: tuple[int, int, int], classes: int = 10) -> Images:
    """Noise, with labels."""
    drawn = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=drawn)
    return Images(pixels, torch.arange(count) % classes, 255.0, classes, "noise")


@pytest.fixture
def noise():
    """Data of 16 training, 8 validation and 8 test images of a shape."""

    def made(shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> Splits:
        return Splits(images(16, shape, classes), images(8, shape, classes), images(8, shape, classes))

    return made
