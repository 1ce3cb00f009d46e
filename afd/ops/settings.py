"""Settings of an op: one number for the batch or one per sample, and how the schemas carry them."""

from __future__ import annotations

import operator
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from afd.errors import InputError, InputTypeError
from afd.ops.library import described

Setting = float | Tensor
Bounds = tuple[float, float]


def detached(x: Any) -> Any:
    """x as autograd's bystander: same memory, same version counter. Cheaper than entering no_grad."""
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def split(name: str, setting: Setting) -> tuple[float, Tensor | None]:
    """A setting as the pair the schemas carry: one number, or one per sample.

    Raises:
        InputTypeError: it is neither a number nor a tensor.
    """
    if type(setting) is float:
        return setting, None
    if isinstance(setting, Tensor):
        return 0.0, detached(setting)
    return number(name, setting, "a number, or a tensor with one for each sample"), None


def number(name: str, value: Any, allowed: str = "a number") -> float:
    """A real number of Python's or NumPy's as a float.

    Raises:
        InputTypeError: it is something else; True and False are no numbers.
        InputError: it is an integer beyond all floats.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{name} is {_kind(value)}; it must be {allowed}")
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(f"{name} is an integer that no float holds; it must be a finite number") from error


def integer(name: str, value: Any) -> int:
    """An integer of Python's or NumPy's.

    Raises:
        InputTypeError: it is something else; True and False are no numbers.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputTypeError(f"{name} is {_kind(value)}; it must be an integer")
    return operator.index(value)


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, bool | float) else described(value)


def box(bounds: Bounds) -> tuple[float, float]:
    """The lowest and highest value of an image.

    Raises:
        InputTypeError, InputError: `bounds` is not a pair of numbers.
    """
    if type(bounds) is tuple and len(bounds) == 2 and type(bounds[0]) is float and type(bounds[1]) is float:
        return bounds
    if not isinstance(bounds, tuple | list):
        raise InputTypeError(f"bounds are {described(bounds)}; they must be a pair of numbers (low, high)")
    if len(bounds) != 2:
        raise InputError(f"bounds are {len(bounds)} values; they must be a pair of numbers (low, high)")
    return number("the low bound", bounds[0]), number("the high bound", bounds[1])
