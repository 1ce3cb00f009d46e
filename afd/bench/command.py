"""A benchmark without the parser of the command line: ``python -m afd.bench kernels sizes=cifar rounds=9``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from afd.bench.attacks import AttackBench
from afd.bench.discriminator import DiscriminatorBench
from afd.bench.kernels import KernelBench
from afd.bench.program import Benchmark, run
from afd.bench.rounds import RoundBench
from afd.errors import InputError, one_of
from afd.extras import needed_by

with needed_by("afd.bench"):
    from rich.console import Console

KINDS: tuple[type[Benchmark], ...] = (AttackBench, DiscriminatorBench, KernelBench, RoundBench)
BENCHES = {kind.name: kind for kind in KINDS}


def built(name: str, *words: str) -> Benchmark:
    """The benchmark of a name, its options given as key=value; of a key given twice, the last counts.

    Raises:
        InputError: an unknown name or key, or a value that is none of the option's type.
    """
    one_of("benchmark", name, BENCHES)
    hints: dict[str, Any] = get_type_hints(BENCHES[name])
    settings: dict[str, Any] = {}
    for key, _, text in (word.partition("=") for word in words):
        one_of(f"an option of {name}", key, [field.name for field in fields(BENCHES[name])])
        kind, *others = get_args(hints[key]) or (hints[key],)  # of a union with None, what is not None
        if isinstance(kind, str):  # one of a Literal's
            one_of(key, text, (kind, *others))
        settings[key] = text if isinstance(kind, str) else _value(key, text, kind)
    return BENCHES[name](**settings)


def _value(key: str, text: str, kind: Any) -> Any:
    if kind is Path and not text:
        raise InputError(f"{key} is ''; it must name a file or folder")
    try:
        return tuple(map(int, text.split(","))) if get_origin(kind) is tuple else kind(text)
    except ValueError as error:
        raise InputError(f"{key} is {text!r}; it must be of type {getattr(kind, '__name__', kind)}") from error


def asked() -> Callable[[], object]:
    """What the arguments of this process ask for."""
    return partial(run, built(*(sys.argv[1:] or [""])), Console())
