"""Loading a batch as its formula in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def load_batch(
    pixels: Tensor,
    index: Tensor,
    draws: Tensor | None,
    scale: float,
    padding: int,
    flip: bool,
    channels_last: bool,
) -> Tensor:
    """pixels[index], cropped and mirrored as draws[index] say, over scale; NaN where the index names no image."""
    named = (index >= 0) & (index < len(pixels))
    index = torch.where(named, index, 0)
    # index_select copies whole images; plain indexing would go pixel by pixel, twenty times slower on a CPU.
    chosen = pixels.index_select(0, index) if len(pixels) else pixels.new_zeros(len(index), *pixels.shape[1:])
    if draws is not None and len(draws):
        chosen = crop_and_flip(chosen, draws.index_select(0, index), padding, flip)
    # CUDA would turn a Python number as divisor into a multiplication by its rounded reciprocal, unlike the CPU.
    x = chosen.to(torch.float32).div_(torch.full((), scale, dtype=torch.float32, device=pixels.device))
    x = torch.where(named.view(-1, 1, 1, 1), x, torch.nan)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def crop_and_flip(x: Tensor, draws: Tensor, padding: int, flip: bool = True) -> Tensor:
    """One of the (2·padding + 1)² windows of each zero-padded image [B, C, H, W], mirrored half of the time.

    With d = draw mod 2·(2·padding + 1)², d // 2 numbers the window row by row, and an odd d mirrors it.
    """
    _, channels, height, width = x.shape
    draws = draws.unsqueeze(1) % (2 * (2 * padding + 1) ** 2)
    window, mirrored = draws // 2, draws % 2 == 1
    top, left = window // (2 * padding + 1), window % (2 * padding + 1)
    across = torch.arange(width, device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.where(mirrored & flip, across.flip(0), across)
    # Where each output pixel lies in its padded plane: crop and flip become one gather, the same for all channels.
    position = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    planes = F.pad(x, (padding,) * 4).flatten(2)
    return planes.gather(2, position.flatten(1).unsqueeze(1).expand(-1, channels, -1)).view(x.shape)
