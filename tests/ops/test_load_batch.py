"""load_batch: a window of every image, pixel by pixel; native bit for bit against the reference; and the statistics."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afd import ops
from afd.ops import backend, loading, native

USABLE_ISAS = native._C.cpu.usable_isas() if native._C else []
BACKENDS = ["native", "reference"]


def load(which: str, pixels: Tensor, index: Tensor, **settings) -> Tensor:
    with backend.use(which):
        return ops.load_batch(pixels, index, **settings)


def bytes_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed))


def pixel_by_pixel(pixels: Tensor, index: Tensor, scale: float, drawn: Tensor, padding: int, flip: bool) -> np.ndarray:
    """The docstring, one pixel after the other, with exact quotients rounded once."""
    _, channels, height, width = pixels.shape
    out = np.zeros((len(index), channels, height, width), np.float32)
    span = 2 * padding + 1
    for b, number in enumerate(index.tolist()):
        choice = int(drawn[number]) % (2 * span * span)
        padded = np.pad(pixels[number].numpy(), ((0, 0), (padding, padding), (padding, padding)))
        top, left = divmod(choice // 2, span)
        window = padded[:, top : top + height, left : left + width]
        window = window[:, :, ::-1] if flip and choice % 2 else window
        for place, value in np.ndenumerate(window):
            out[b][place] = np.float32(Fraction(int(value)) / Fraction(scale))
    return out


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 35))


@pytest.mark.parametrize("which", BACKENDS)
@given(shape=shapes, padding=st.integers(0, 11), flip=st.booleans(), scale=st.sampled_from([255.0, 16.0, 1.5]))
def test_every_pixel(which, shape, padding, flip, scale):
    pixels, index, drawn = bytes_like(*shape), torch.tensor([0, shape[0] - 1, 0]), draws(shape[0], padding)
    got = load(which, pixels, index, scale=scale, draws=drawn, padding=padding, flip=flip)
    assert np.array_equal(got.numpy(), pixel_by_pixel(pixels, index, scale, drawn, padding, flip))


@given(
    shape=st.tuples(*[st.integers(0, 6)] * 3, st.integers(0, 40)),
    batch=st.integers(0, 9),
    padding=st.integers(0, 5) | st.just(70),
    flip=st.booleans(),
    drawn=st.sampled_from(["none", "positive", "negative"]),
    channels_last=st.booleans(),
)
def test_native_is_the_reference_bit_for_bit(device, shape, batch, padding, flip, drawn, channels_last):
    pixels = bytes_like(*shape).to(device)
    index = torch.randint(max(shape[0], 1), (batch if shape[0] else 0,)).to(device)
    sign = {"none": None, "positive": 1, "negative": -1}[drawn]
    settings = {
        "draws": None if sign is None else sign * draws(shape[0]).to(device),
        "padding": padding,
        "flip": flip,
        "channels_last": channels_last,
    }
    got, want = (load(which, pixels, index, **settings) for which in BACKENDS)
    assert torch.equal(got, want)
    assert got.stride() == want.stride()
    assert got.shape == (len(index), *shape[1:])


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("scale", [255, 16])
def test_scales_exactly(device, which, scale):
    ramp = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 4, 64)
    x = load(which, ramp, torch.tensor([0], device=device), scale=float(scale))
    assert x.flatten().tolist() == [float(np.float32(Fraction(value, scale))) for value in range(256)]


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 3, 32, 32), (2, 5, 3, 7)], ids=str)
def test_channels_last_is_a_layout_and_no_more(device, shape):
    pixels, index = bytes_like(*shape).to(device), torch.tensor([1, 0], device=device)
    settings = {"draws": draws(shape[0]).to(device), "padding": 2, "flip": True}
    plain, last = (load("native", pixels, index, channels_last=choice, **settings) for choice in (False, True))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_all_windows_occur_equally_often():
    count, padding = 162 * 100, 4
    image = torch.arange(1, 145, dtype=torch.uint8).view(1, 1, 12, 12)
    pixels = image.expand(count, 1, 12, 12).contiguous()
    out = load("native", pixels, torch.arange(count), scale=255.0, draws=draws(count), padding=padding, flip=True)
    _, counts = torch.unique(out.flatten(1), dim=0, return_counts=True)
    assert len(counts) == 162  # 81 windows and their mirror images, all different
    chi_squared = ((counts - 100.0).square() / 100).sum().item()
    assert chi_squared < 230  # 161 degrees of freedom: one in several thousand random generators would exceed this
    mirrored = out[:, 0, 6, 5] > out[:, 0, 6, 6]  # rows ascend unless mirrored; both lie inside of the image
    assert abs(mirrored.double().mean().item() - 0.5) < 4 * 0.5 / count**0.5


@pytest.mark.parametrize("which", BACKENDS)
def test_an_image_follows_its_own_draw(which):
    pixels, drawn = bytes_like(20, 3, 8, 8), draws(20)
    settings = {"draws": drawn, "padding": 4, "flip": True}
    whole = load(which, pixels, torch.arange(20), **settings)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([load(which, pixels, part, **settings) for part in order.split(7)]), whole[order])
    other = load(which, pixels, torch.arange(20), **(settings | {"draws": draws(20, 1)}))
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_instruction_sets_and_threads_change_no_bit(monkeypatch, isa, threads):
    pixels, index, drawn = bytes_like(9, 3, 31, 45), torch.arange(9).repeat(6), draws(9)
    want = load("reference", pixels, index, draws=drawn, padding=3, flip=True)
    monkeypatch.setattr(native, "_isa", native._ISAS.index(isa))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(load("native", pixels, index, draws=drawn, padding=3, flip=True), want)
        plain = load("native", pixels, index)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(plain, load("reference", pixels, index))


def test_strided_index_and_draws(device):
    pixels, index = bytes_like(6, 1, 5, 5).to(device), torch.tensor([5, 0, 3, 1], device=device)
    drawn = draws(12).to(device)
    got = load("native", pixels, index[::2], draws=drawn[::2], padding=2, flip=True)
    want = load("native", pixels, index[::2].clone(), draws=drawn[::2].clone(), padding=2, flip=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(device, channels_last):
    pixels, index, drawn = bytes_like(4, 3, 6, 5).to(device), torch.tensor([3, 0], device=device), draws(4).to(device)
    for given_draws in (drawn, None):
        args = (pixels, index, given_draws, 255.0, 2, True, channels_last)
        torch.library.opcheck(torch.ops.afd.load_batch.default, args)


PIXELS, INDEX = bytes_like(3, 1, 2, 2), torch.tensor([0, 2])


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pixels": PIXELS.float()}, TypeError, "pixels is torch.float32; it must be torch.uint8"),
        ({"pixels": PIXELS[0]}, ValueError, "pixels has shape [1, 2, 2]; it must be [N, C, H, W]"),
        ({"pixels": bytes_like(3, 1, 2, 4)[..., ::2]}, ValueError, "pixels has stride (8, 8, 4, 2); it must be contig"),
        ({"index": INDEX.int()}, TypeError, "index is torch.int32; it must be torch.int64"),
        ({"index": INDEX.view(1, 2)}, ValueError, "index has shape [1, 2]; it must be [B]"),
        ({"index": torch.tensor([0, 3])}, ValueError, "index holds 3; the 3 images are counted from 0"),
        ({"index": torch.tensor([0, -1])}, ValueError, "index holds -1; the 3 images are counted from 0"),
        ({"draws": draws(2)}, ValueError, "draws has shape [2]; it must be [3], one for each image"),
        ({"draws": draws(3).double()}, TypeError, "draws is torch.float64"),
        ({"scale": 0.0}, ValueError, "scale is 0.0; it must be in (0, 255]"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"padding": -1}, ValueError, "padding is -1; it must be in [0, 32768]"),
        ({"padding": 2**40}, ValueError, "padding is 1099511627776"),
    ],
)
def test_refuses(which, change, error, words):
    call = {"pixels": PIXELS, "index": INDEX} | change
    with pytest.raises(error, match=re.escape(words)):
        load(which, call.pop("pixels"), call.pop("index"), **call)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="index is on meta; it must be on pixels' device, cpu"):
        loading._check(PIXELS, INDEX.to("meta"), None, 255.0, 0)


# --- Only on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(7, 3, 32, 32), (7, 1, 28, 28), (5, 3, 7, 9), (3, 3, 33, 31), (3, 7, 2, 2049), (3, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gpu_and_cpu_agree_bit_for_bit(cuda, shape, channels_last):
    pixels, index, drawn = bytes_like(*shape), torch.tensor([2, 0, 1, 2]), draws(shape[0])
    settings = {"padding": 4, "flip": True, "channels_last": channels_last}
    there = load("native", pixels.to(cuda), index.to(cuda), draws=drawn.to(cuda), **settings)
    assert torch.equal(there.cpu(), load("native", pixels, index, draws=drawn, **settings))


@pytest.mark.gpu
@pytest.mark.parametrize("which", BACKENDS)
def test_on_a_gpu_a_position_out_of_range_shows(cuda, which):
    x = load(which, PIXELS.to(cuda), torch.tensor([0, 3, -1], device=cuda))
    assert x.isnan().flatten(1).all(1).tolist() == [False, True, True]
    assert not x[0].isnan().any()
