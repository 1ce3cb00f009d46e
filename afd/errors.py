"""How afd words an error: the argument, what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable


def one_of(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{argument} is {value!r}; allowed are {', '.join(names)}")
