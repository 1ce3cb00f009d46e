"""Loading a batch: from a data set in memory to what a model takes, in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError
from afd.ops import backend, native, reference
from afd.ops.checks import integer, number
from afd.ops.library import call, define

MOST_PADDING = 2**15


def load_batch(
    pixels: Tensor,
    index: Tensor,
    *,
    scale: float = 255.0,
    draws: Tensor | None = None,
    padding: int = 0,
    flip: bool = False,
    channels_last: bool = False,
) -> Tensor:
    """Images chosen from a data set of bytes, cropped, mirrored and scaled to [0, 1], in one pass over them.

    With draws, each image becomes one of the (2 * padding + 1)^2 windows of its zero-padded self, and is mirrored half
    of the time if `flip`: the usual CIFAR augmentation. With ``d = draws[i] mod 2 (2 padding + 1)^2``, ``d // 2``
    numbers image i's window row by row, and an odd d mirrors it, so what becomes of an image depends on its own draw
    alone. Each value is ``pixel / scale``, correctly rounded: the same bits on every device.

    Args:
        pixels: the data set, uint8 [N, C, H, W], contiguous, values in [0, scale].
        index: which images, int64 [B], values in [0, N); repeats are allowed.
        scale: the pixel value that becomes 1, in (0, 255].
        draws: one for each image of the data set, int64 [N], uniform in a range far above the number of choices; None
            for the images as they are.
        padding: width of the zero border on each side.
        flip: whether images are mirrored.
        channels_last: lay out the batch channels-last.

    Returns:
        float32 [B, C, H, W]. On a GPU, where looking at the index would wait for it, a position out of range makes its
        image NaN.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes, devices or layouts that are not as described, scale or padding out of range; on the CPU also
            a position out of range.
    """
    settings = number("scale", scale), integer("padding", padding), flip, channels_last
    out: Tensor = call(torch.ops.afd.load_batch.default, pixels, index, draws, *settings)
    return out


def _check(pixels: Tensor, index: Tensor, draws: Tensor | None, scale: float, padding: int, *_: bool) -> None:
    """All that `afd.ops.load_batch` says of its arguments."""
    if pixels.dtype != torch.uint8:
        raise InputTypeError(f"pixels is {pixels.dtype}; it must be torch.uint8")
    if pixels.dim() != 4:
        raise InputError(f"pixels has shape {list(pixels.shape)}; it must be [N, C, H, W]")
    if not pixels.is_contiguous():
        raise InputError(f"pixels has stride {pixels.stride()}; it must be contiguous")
    if not 0 < scale <= 255:
        raise InputError(f"scale is {scale}; it must be in (0, 255]")
    if not 0 <= padding <= MOST_PADDING:
        raise InputError(f"padding is {padding}; it must be in [0, {MOST_PADDING}]")
    _check_numbers("index", index, None, pixels)
    if draws is not None:
        _check_numbers("draws", draws, len(pixels), pixels)
    if index.device.type == "cpu" and index.numel():
        low, high = (int(number) for number in index.aminmax())
        if low < 0 or high >= len(pixels):
            raise InputError(f"index holds {low if low < 0 else high}; the {len(pixels)} images are counted from 0")


def _check_numbers(name: str, numbers: Tensor, length: int | None, pixels: Tensor) -> None:
    if numbers.dtype != torch.int64:
        raise InputTypeError(f"{name} is {numbers.dtype}; it must be torch.int64")
    if numbers.dim() != 1 or length not in (None, len(numbers)):
        wanted = "[B]" if length is None else f"[{length}], one for each image"
        raise InputError(f"{name} has shape {list(numbers.shape)}; it must be {wanted}")
    if numbers.device != pixels.device:
        raise InputError(f"{name} is on {numbers.device}; it must be on pixels' device, {pixels.device}")


def _load_batch(*arguments: Any) -> Tensor:
    _check(*arguments)
    out = _empty(*arguments)
    if not backend.serves_natively(out):
        out.copy_(reference.load_batch(*arguments))
    elif out.numel():
        native.load_batch(out, *arguments)
    return out


def _empty(pixels: Tensor, index: Tensor, *rest: Tensor | float | None) -> Tensor:
    layout = torch.channels_last if rest[-1] else torch.contiguous_format
    shape = (index.shape[0], *pixels.shape[1:])
    return torch.empty(shape, dtype=torch.float32, device=pixels.device, memory_format=layout)


define(_load_batch, _empty, like=reference.load_batch)
