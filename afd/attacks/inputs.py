"""What an attack asks of a batch before it starts: one look at the values, so one wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError


def check_batch(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> int:
    """Checks images and labels; returns the largest label (-1 for an empty batch).

    Raises:
        InputTypeError: x is not floating point, or y not int64.
        InputError: shapes or devices disagree, values outside bounds or not finite, negative labels.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise InputTypeError(f"x is {x.dtype}; an attack needs torch.float32 (or float64) images in {list(bounds)}")
    if y.dtype != torch.int64:
        raise InputTypeError(f"y is {y.dtype}; labels must be torch.int64")
    if y.shape != x.shape[:1]:
        raise InputError(f"y has shape {list(y.shape)}; it must be [{x.shape[0]}], one label for each image")
    if y.device != x.device:
        raise InputError(f"y is on {y.device}; it must be on x's device, {x.device}")
    if x.numel() == 0:
        return -1
    lowest, highest = torch.aminmax(x)  # both NaN if any value is
    first, last = torch.aminmax(y)
    low, high, first_label, last_label = torch.stack([lowest.double(), highest.double(), first, last]).tolist()
    if not (bounds[0] <= low and high <= bounds[1]):
        raise InputError(f"x has values in [{low:g}, {high:g}]; images must be finite and in {list(bounds)}")
    if first_label < 0:
        raise InputError(f"y holds the label {int(first_label)}; labels must be >= 0")
    return int(last_label)
