"""Augmentation of whole batches: every image gets its own crop and flip, in a handful of tensor operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.errors import InputError, InputTypeError


def crop_and_flip(x: Tensor, draws: Tensor, padding: int = 4) -> Tensor:
    """A random crop of the zero-padded image, then a horizontal flip half of the time: the usual CIFAR augmentation.

    Each image is replaced by one of the (2 * padding + 1)^2 windows of its own size, all equally likely.

    Args:
        x: images [B, C, H, W], any dtype and device.
        draws: int64 [B] on the device of x, uniform in [0, 2^62): one for each image, which settles its crop and flip.
        padding: width of the zero border on each side, at least 0.

    Returns:
        A new tensor like x.
    """
    if x.dim() != 4:
        raise InputError(f"x has shape {list(x.shape)}; it must be [B, C, H, W]")
    if padding < 0:
        raise InputError(f"padding is {padding}; it must be at least 0")
    if draws.dtype != torch.int64:
        raise InputTypeError(f"draws is {draws.dtype}; it must be torch.int64")
    if draws.shape != x.shape[:1]:
        raise InputError(f"draws has shape {list(draws.shape)}; it must be [{len(x)}], one for each image")
    _, channels, height, width = x.shape
    draws = draws.unsqueeze(1) % (2 * (2 * padding + 1) ** 2)
    window, flip = draws // 2, draws % 2 == 1
    top, left = window // (2 * padding + 1), window % (2 * padding + 1)

    across = torch.arange(width, device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.where(flip, across.flip(0), across)
    # Where each output pixel lies in its padded plane: crop and flip become one gather, the same for all channels.
    position = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    planes = F.pad(x, (padding,) * 4).flatten(2)
    return planes.gather(2, position.flatten(1).unsqueeze(1).expand(-1, channels, -1)).view(x.shape)
