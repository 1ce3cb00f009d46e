"""Plain values that were read from a file: whether they are of a field's type, and fractions in them as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read is of a type, as far as that is made of plain ones; a whole number is a number."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if get_origin(hint) is Literal:
        return value in parts and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(one, parts[0]) for one in value)
    if hint is type(None) or hint is None:
        return value is None
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str)
    return isinstance(value, hint) if hint is bool else True


def in_words(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "a list" if get_origin(hint) is tuple else f"a {getattr(hint, '__name__', hint)}"


def numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, with fractions such as "8/255" as numbers."""
    found = {name: numbers(one) if isinstance(one, Mapping) else one for name, one in given.items()}
    return {name: [*map(_number, one)] if isinstance(one, list) else _number(one) for name, one in found.items()}


def _number(value: Any) -> Any:
    fraction = re.fullmatch(r"\s*([0-9.]+)\s*/\s*([0-9.]+)\s*", value) if isinstance(value, str) else None
    return value if fraction is None else float(fraction[1]) / float(fraction[2])
