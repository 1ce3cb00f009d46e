"""What an attack asks of a batch before it starts: one look at the values, so one wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError


def check_form(x: Tensor, y: Tensor) -> None:
    """Checks what can be known of images and labels without a look at their values.

    Raises:
        InputTypeError: x is not floating point, or y not int64.
        InputError: shapes or devices disagree.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise InputTypeError(f"x is {x.dtype}; an attack needs torch.float32 (or float64) images")
    if y.dtype != torch.int64:
        raise InputTypeError(f"y is {y.dtype}; labels must be torch.int64")
    if y.shape != x.shape[:1]:
        raise InputError(f"y has shape {list(y.shape)}; it must be [{x.shape[0]}], one label for each image")
    if y.device != x.device:
        raise InputError(f"y is on {y.device}; it must be on x's device, {x.device}")


def largest_label(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> int:
    """The largest of labels y, once the values of x and y are found to be allowed: one wait for the device.

    Raises:
        InputError: values outside bounds or not finite, negative labels.
    """
    lowest, highest = torch.aminmax(x)  # both NaN if any value is
    first, last = torch.aminmax(y)
    low, high, first_label, last_label = torch.stack([lowest.double(), highest.double(), first, last]).tolist()
    if not (bounds[0] <= low and high <= bounds[1]):
        raise InputError(f"x has values in [{low:g}, {high:g}]; images must be finite and in {list(bounds)}")
    if first_label < 0:
        raise InputError(f"y holds the label {int(first_label)}; labels must be >= 0")
    return int(last_label)


def check_batch(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> int:
    """Both of the checks above; returns the largest label (-1 for an empty batch)."""
    check_form(x, y)
    return largest_label(x, y, bounds) if x.numel() else -1


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can work with of one that was made in `torch.inference_mode`."""
    return tensor.clone() if tensor.is_inference() else tensor
