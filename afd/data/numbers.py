"""Settings that are numbers: anything else is named as what it is, before it meets arithmetic."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from afd.errors import InputTypeError, at_least


def number(name: str, value: Any, least: float) -> None:
    """Checks a setting that is a number.

    Raises:
        InputTypeError: it is something else, a truth value included.
        InputError: it is below `least`, or not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a number")
    at_least(name, float(value), least)


def whole(name: str, value: Any, least: int) -> None:
    """Checks a setting that counts something.

    Raises:
        InputTypeError: it is no whole number.
        InputError: it is below `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a whole number")
    at_least(name, int(value), least)
