"""How numbers are written on a command line: 0.3 or 8/255, and lists of whole ones as 0,1,2."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

from afd.extras import needed_by

with needed_by("the command afd"):
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

NUMBERS = tyro.constructors.ConstructorRegistry()


def fraction(text: str) -> float:
    """A number written as "0.3" or "8/255".

    Raises:
        ValueError: it is neither.
    """
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{text!r} is neither a number such as 0.3 nor a fraction such as 8/255") from None


def whole(text: str) -> int:
    """A number written as "3".

    Raises:
        ValueError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no whole number") from None


@NUMBERS.primitive_rule
def number(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How an option that is a number, or may be left out, is read, and written in the help."""
    types = [one for one in get_args(kind.type) or (kind.type,) if one is not NoneType]
    if types == [float]:
        reader: Callable[[str], float] = fraction
    elif types == [int]:
        reader = whole
    elif kind.type == tuple[int, ...]:  # as 0,1,2, too
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="INT,INT,...",
            instance_from_str=lambda words: tuple(whole(one) for one in ",".join(words).split(",") if one),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [str(one) for one in value],
        )
    else:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|P/Q" if reader is fraction else "INT",
        instance_from_str=lambda words: reader(words[0]),
        is_instance=lambda value: value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)),
        str_from_instance=lambda value: [str(value) if value is None or reader is whole else f"{value:g}"],
    )
