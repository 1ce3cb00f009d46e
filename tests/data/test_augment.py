"""Augmentation against the plain loop: every result is a window of the padded image, as it is or mirrored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from afd.data.images import CropAndFlip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2**62, (count,), generator=generator(seed))


def windows(image: torch.Tensor, padding: int) -> list[torch.Tensor]:
    """All windows of one padded image, then the same mirrored."""
    _, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    span = range(2 * padding + 1)
    crops = [padded[:, top : top + height, left : left + width] for top in span for left in span]
    return crops + [crop.flip(2) for crop in crops]


@given(
    batch=st.integers(0, 4),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_every_crop_is_a_window(batch: int, channels: int, height: int, width: int, padding: int, seed: int) -> None:
    x = torch.rand(batch, channels, height, width, generator=generator(seed))
    before = x.clone()
    out = CropAndFlip(padding=padding)(x, draws(batch, seed))
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert torch.equal(x, before)
    for image, cropped in zip(x, out, strict=True):
        assert any(torch.equal(cropped, window) for window in windows(image, padding))


def test_all_windows_occur_equally_often() -> None:
    count = 162 * 100
    image = torch.arange(1, 145, dtype=torch.float32).view(1, 12, 12)
    out = CropAndFlip()(image.expand(count, 1, 12, 12), draws(count))
    choices = torch.stack(windows(image, 4)).flatten(1)
    # Which of the 81 windows and their mirror images each result is: all 162 are different.
    matches = (out.flatten(1)[:, None, 70:76] == choices[None, :, 70:76]).all(dim=2)
    assert matches.sum(dim=1).eq(1).all()
    counts = matches.sum(dim=0).double()
    chi_squared = ((counts - 100) ** 2 / 100).sum()
    assert chi_squared < 230  # 161 degrees of freedom: one in several thousand random generators would exceed this
    assert abs(counts[:81].sum().item() / count - 0.5) < 4 * 0.5 / count**0.5


def test_an_image_follows_its_own_draw() -> None:
    x, drawn = torch.rand(16, 3, 32, 32, generator=generator()), draws(16, 1)
    whole = CropAndFlip()(x, drawn)
    assert torch.equal(torch.cat([CropAndFlip()(x[:5], drawn[:5]), CropAndFlip()(x[5:], drawn[5:])]), whole)
    assert not torch.equal(CropAndFlip()(x, draws(16, 2)), whole)


def test_layout_of_the_input_does_not_matter() -> None:
    x = torch.rand(8, 3, 16, 16, generator=generator())
    expected = CropAndFlip()(x, draws(8, 1))
    assert torch.equal(CropAndFlip()(x.to(memory_format=torch.channels_last), draws(8, 1)), expected)
    assert torch.equal(CropAndFlip()(x.transpose(2, 3).contiguous().transpose(2, 3), draws(8, 1)), expected)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[3, 8, 8\]; it must be \[B, C, H, W\]"):
        CropAndFlip()(torch.zeros(3, 8, 8), draws(3))
    with pytest.raises(ValueError, match="padding is -1"):
        CropAndFlip(padding=-1)(torch.zeros(1, 3, 8, 8), draws(1))
    with pytest.raises(ValueError, match=r"draws has shape \[2\]; it must be \[1\]"):
        CropAndFlip()(torch.zeros(1, 3, 8, 8), draws(2))
    with pytest.raises(TypeError, match=r"draws is torch\.float32"):
        CropAndFlip()(torch.zeros(1, 3, 8, 8), torch.rand(1))


@pytest.mark.gpu
def test_cuda_draws_the_same_crops(cuda: torch.device) -> None:
    x = torch.rand(64, 3, 32, 32, generator=generator())
    drawn = draws(64, 1)
    assert torch.equal(CropAndFlip()(x.to(cuda), drawn.to(cuda)).cpu(), CropAndFlip()(x, drawn))
