"""Data sets are read and served alike whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ambient import MODES
from torch import Tensor

from afd.data import Batches, load
from afd.data.images import CropAndFlip

Write = Callable[..., Path]


def crop(pixels: Tensor, draws: Tensor) -> Tensor:
    return CropAndFlip(1)(pixels, draws)


def read_and_served(name: str, root: Path) -> list[Tensor]:
    """Everything that can be had of a data set: whole, by position, and in augmented batches."""
    splits = load(name, root, download=False)
    found = [splits.train.images(), splits.test.images(), splits.validation.labels]
    for kind in (torch.int32, torch.int64):
        index = torch.tensor([3, 0, 3], dtype=kind, device="cpu")
        found += [splits.test.images(index), splits.test.take(index).labels]
    nothing = splits.test.take(torch.zeros(0, dtype=torch.int64, device="cpu"))
    found += [nothing.images(), nothing.labels]
    for augment in (None, CropAndFlip(2), crop):
        for x, y in Batches(splits.train, 16, shuffle=augment is not None, augment=augment):
            found += [x, y]
    return found


@pytest.fixture
def roots(tmp_path: Path, write_mnist: Write, write_cifar: Write) -> dict[str, Path]:
    return {
        "digits": tmp_path,
        "mnist": write_mnist(tmp_path / "mnist"),
        "cifar10": write_cifar(tmp_path / "cifar10", "cifar10"),
        "cifar100": write_cifar(tmp_path / "cifar100", "cifar100"),
    }


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "cifar100"])
def test_a_data_set_is_the_same_in_every_mode(name: str, roots: dict[str, Path]) -> None:
    wanted = read_and_served(name, roots[name])
    assert len(wanted) > 10
    for mode, entered in MODES.items():
        with entered():
            found = read_and_served(name, roots[name])
        for one, other in zip(found, wanted, strict=True):
            assert one.device == other.device, mode
            assert one.dtype == other.dtype, mode
            assert torch.equal(one, other), mode


def test_what_is_loaded_in_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        images = load("digits").test
    weight = torch.zeros(64, 10, requires_grad=True)
    F.cross_entropy(images.images()[:20].flatten(1) @ weight, images.labels[:20]).backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_an_augmentation_that_counts_as_false_is_still_applied() -> None:
    class Inverted(list[int]):
        def __call__(self, pixels: Tensor, _: Tensor) -> Tensor:
            return 16 - pixels

    images = load("digits").test
    (served, _), *_ = Batches(images, len(images), augment=Inverted())
    assert torch.equal(served, (16 - images.pixels).float() / 16)
