"""What loading a batch asks of its arguments. No value is read where that would wait: on the CPU, indices are."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError

MOST_PADDING = 2**15


def load_batch(pixels: Tensor, index: Tensor, draws: Tensor | None, scale: float, padding: int) -> None:
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
    _numbers("index", index, None, pixels)
    if draws is not None:
        _numbers("draws", draws, len(pixels), pixels)
    if index.device.type == "cpu" and index.numel():
        low, high = (int(number) for number in index.aminmax())
        if low < 0 or high >= len(pixels):
            raise InputError(f"index holds {low if low < 0 else high}; the {len(pixels)} images are counted from 0")


def _numbers(name: str, numbers: Tensor, length: int | None, pixels: Tensor) -> None:
    if numbers.dtype != torch.int64:
        raise InputTypeError(f"{name} is {numbers.dtype}; it must be torch.int64")
    if numbers.dim() != 1 or length not in (None, len(numbers)):
        wanted = "[B]" if length is None else f"[{length}], one for each image"
        raise InputError(f"{name} has shape {list(numbers.shape)}; it must be {wanted}")
    if numbers.device != pixels.device:
        raise InputError(f"{name} is on {numbers.device}; it must be on pixels' device, {pixels.device}")
