"""The radius of an attack, exactly: 8/255 is not 0.031, and a result says which of the two it used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import pairwise
from typing import Self

from afd.errors import InputError

LARGEST = 1e9  # no image of floats is so far from another, and what is larger may be no float


@dataclass(frozen=True, order=True)
class Epsilon:
    """A radius >= 0 in units of the image, kept as the fraction that was asked for.

    Attributes:
        exact: the radius.
    """

    exact: Fraction

    @classmethod
    def of(cls, value: str | float | Fraction) -> Self:
        """A radius from "8/255", "0.3", or a number (a float is read as the decimal that prints it).

        Raises:
            InputError: it is none of these, negative or not finite.
        """
        try:
            exact = value if isinstance(value, Fraction) else _fraction(str(value))
        except (ValueError, ZeroDivisionError):
            raise InputError(f"eps is {value!r}; it must be a number such as 0.3 or a fraction such as 8/255") from None
        if exact < 0:
            raise InputError(f"eps is {value}; it must be at least 0")
        if exact > LARGEST:
            raise InputError(f"eps is {value}; it must be at most {LARGEST:g}, in units of the image")
        return cls(exact)

    def __float__(self) -> float:
        return float(self.exact)

    def __str__(self) -> str:
        digits = f"{float(self.exact):.6g}"
        if Fraction(digits) == self.exact:
            return digits
        levels = self.exact * 255
        return f"{levels}/255" if levels.denominator == 1 else str(self.exact)

    def as_json(self) -> dict[str, str | float]:
        """The exact fraction, the float that the attack used, and how it is printed."""
        return {"fraction": str(self.exact), "float": float(self), "text": str(self)}


def _fraction(text: str) -> Fraction:
    """Of "0.3", "8/255" or "0.5/255".

    Raises:
        ValueError, ZeroDivisionError: it is none of these, or of too many digits to compute with.
    """
    top, slash, bottom = text.partition("/")
    return _exact(top) / _exact(bottom) if slash else _exact(top)


def _exact(text: str) -> Fraction:
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError(text) from None
    if not number.is_finite() or abs(number.adjusted()) > 5000 or len(text) > 5000:
        raise ValueError(text)
    return Fraction(number)


def ascending(values: Iterable[str | float | Fraction | Epsilon]) -> tuple[Epsilon, ...]:
    """Radii in strictly ascending order.

    Raises:
        InputError: there are none, one is not a radius, or one is not larger than the one before.
    """
    radii = tuple(value if isinstance(value, Epsilon) else Epsilon.of(value) for value in values)
    if not radii:
        raise InputError("eps is empty; it needs at least one radius")
    for before, after in pairwise(radii):
        if after <= before:
            listed = " ".join(map(str, radii))
            raise InputError(f"eps is {listed}; radii must ascend, and {after} does not exceed {before}")
    return radii
