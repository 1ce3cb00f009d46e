"""The words of a command line, read by tyro: numbers as fractions too, and to a mistake one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any, get_args

from afd.errors import InputError
from afd.extras import needed_by

with needed_by("the command afd"):
    import tyro as tyro
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

BAR, ANSI = re.compile("[─-]{10,}"), re.compile(r"\x1b\[[0-9;]*m")
NUMBERS = tyro.constructors.ConstructorRegistry()


class UsageError(InputError):
    """Words that a command does not understand."""


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
    else:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|P/Q" if reader is fraction else "INT",
        instance_from_str=lambda words: reader(words[0]),
        is_instance=lambda value: value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)),
        str_from_instance=lambda value: [str(value) if value is None or reader is whole else f"{value:g}"],
    )


def parsed(kind: Any, command: str, words: Sequence[str], described: str | None) -> Any:
    """What the words of a command say, as an object of a kind, or what a function of that name returns.

    Raises:
        UsageError: they are not understood.
        SystemExit: they ask for help, which was shown.
    """
    marks = (tyro.conf.OmitArgPrefixes,)
    read = partial(tyro.cli, kind, prog=f"afd {command}", description=described, config=marks, registry=NUMBERS)
    return _read(read, words)


def show_commands(described: str, commands: Mapping[str, str], words: Sequence[str]) -> None:
    """Shows commands with what they are for; otherwise as `parsed`."""

    def named(text: str) -> Callable[[], None]:
        def command() -> None: ...

        command.__doc__ = text
        return command

    known = {name: named(text) for name, text in commands.items()}
    _read(partial(tyro.extras.subcommand_cli_from_dict, known, prog="afd", description=described), words)


def _read(read: Callable[..., Any], words: Sequence[str]) -> Any:
    said, options = io.StringIO(), tyro._experimental_options
    coloured = options["ansi_codes"]
    options["ansi_codes"] = coloured and not os.environ.get("NO_COLOR")
    try:
        with contextlib.redirect_stderr(said):
            made = read(args=list(words))
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UsageError(in_a_line(said.getvalue())) from None
    finally:
        options["ansi_codes"] = coloured
    sys.stderr.write(said.getvalue())
    return made


def in_a_line(box: str) -> str:
    """What stands in a box that tyro draws around a mistake: what is wrong, what may be meant, where to read more."""
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
