"""Loading a batch as torch sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.ops import backend
from afd.ops.library import define
from afd.ops.loading import checks, native, reference


def _load_batch(
    pixels: Tensor,
    index: Tensor,
    draws: Tensor | None,
    scale: float,
    padding: int,
    flip: bool,
    channels_last: bool,
) -> Tensor:
    checks.load_batch(pixels, index, draws, scale, padding)
    out = _empty(pixels, index, draws, scale, padding, flip, channels_last)
    if not backend.serves_natively(out):
        out.copy_(reference.load_batch(pixels, index, draws, scale, padding, flip, channels_last))
    elif out.numel():
        index, draws = index.contiguous(), None if draws is None else draws.contiguous()
        native.load_batch(out, pixels, index, draws, scale, padding, flip, channels_last)
    return out


def _empty(pixels: Tensor, index: Tensor, *rest: Tensor | float | None) -> Tensor:
    layout = torch.channels_last if rest[-1] else torch.contiguous_format
    shape = (index.shape[0], *pixels.shape[1:])
    return torch.empty(shape, dtype=torch.float32, device=pixels.device, memory_format=layout)


define(
    "load_batch",
    "Tensor pixels, Tensor index, Tensor? draws, float scale, int padding, bool flip, bool channels_last",
    "Tensor",
    _load_batch,
    _empty,
)
