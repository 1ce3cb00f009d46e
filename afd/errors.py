"""How afd words an error: the argument, what was given, what is allowed; and checks of plain values.

The CLI prints these without a traceback.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

MOST = 2**31 - 1  # of what counts something
BAR, ANSI = re.compile("[─-]{10,}"), re.compile(r"\x1b\[[0-9;]*m")


class AfdError(Exception):
    """Something a user can mend: input, data files, checkpoints."""


class InputError(AfdError, ValueError):
    """An argument has a value that is not allowed."""


class InputTypeError(AfdError, TypeError):
    """An argument has a type or dtype that is not allowed."""


class ModelError(AfdError, RuntimeError):
    """A model does what no attack or training can use."""


class ModelWarning(UserWarning):
    """A figure was made, but what it says about the model may be worth nothing."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns where the user's code called afd, however deep inside of it the reason was found."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "afd":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def one_of(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of `allowed`."""
    names = list(allowed)
    if value not in names:
        raise InputError(f"{argument} is {value!r}; allowed are {', '.join(names)}")


def at_least(argument: str, value: float, least: float) -> None:
    """Raises InputError unless `value` is a finite number >= least."""
    if not ((isinstance(value, int) or math.isfinite(value)) and value >= least):
        raise InputError(f"{argument} is {value}; it must be a finite number >= {least}")


def count(argument: str, value: int, least: int) -> None:
    """Raises InputError unless `value` is in [least, 2**31): what counts something, and more than anybody waits for."""
    at_least(argument, value, least)
    if value > MOST:
        raise InputError(f"{argument} is {value}; it must be at most {MOST}")


def in_levels(length: float) -> str:
    """The question whether a length was thought of in grey levels, where it may have been."""
    return f"; did you mean {length:g}/255?" if 1 <= length <= 255 else ""


def in_a_line(error: BaseException, longest: int = 300) -> str:
    """What an error says, without line breaks, cut where it grows long."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= longest else f"{said[:longest]}…"


def unboxed(box: str) -> str:
    """A box that tyro draws around a mistake, in a line: what is wrong, what may be meant, where to read more."""
    plain = [ANSI.sub("", row) for row in box.splitlines()]
    framed = [row.strip("│") for row in plain if row.startswith("│")]
    rows = [" ".join(row.split()) for row in framed or plain]  # a terminal without these letters has no frame
    parts = [part.strip().split("\n") for part in BAR.split("\n".join(rows))]
    first, *others = parts if framed else parts[1:]  # but the title as a part of its own
    told = [" ".join(first).removeprefix("Error parsing ").rstrip(". ")]
    if "Got errors: " in told[0]:  # of each type that the option may have; the last says most
        option, last = told[0].partition(":")[0], told[0].rpartition(" - ")[2].rpartition(">: ")[2]
        told[0] = re.sub(r"\[/?bold\]", "", f"{option}: {last}")
    for title, *more in others:
        if title.startswith("Perhaps you meant"):
            told.append(" ".join([title, *more[:1]]).replace("Perhaps you meant: ", "perhaps you meant "))
        elif title.startswith("Available"):
            told.append(title[0].lower() + title[1:])
        elif more_is_at := re.search(r"afd[a-z ]* --help", title):
            told.append(f"see {more_is_at[0]}")
    return "; ".join(told)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device has no more memory; the CPU's allocator has no error class of its own."""
    said = any(words in str(error) for words in ("DefaultCPUAllocator", "not enough memory"))
    own = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return own or (isinstance(error, RuntimeError) and said)


class DataError(AfdError, OSError):
    """A data file is missing, cannot be fetched, or does not hold what its format promises."""


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


# --- Values that were read from a file ------------------------------------------------------------------------------


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


def look_up(values: Any, *names: str) -> Any:
    """What stands in nested dicts under these names; None where one of them is missing, or no dict.

    A run's own config may hold anything under the names that `afd train` uses.
    """
    found: Any = values
    for name in names:
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def without_fractions(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, with fractions such as "8/255" as numbers."""
    found = {name: without_fractions(one) if isinstance(one, Mapping) else one for name, one in given.items()}
    return {name: [*map(_number, one)] if isinstance(one, list) else _number(one) for name, one in found.items()}


def _number(value: Any) -> Any:
    fraction = re.fullmatch(r"\s*([0-9.]+)\s*/\s*([0-9.]+)\s*", value) if isinstance(value, str) else None
    return value if fraction is None else float(fraction[1]) / float(fraction[2])


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


def whole_number(text: str) -> int:
    """A number written as "3".

    Raises:
        ValueError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no whole number") from None
