"""A run's settings as plain facts, so that a checkpoint can say which of them another run changed."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from afd.methods.attacking import GivenAttack


def describe(value: Any) -> Any:
    """`value` in terms of JSON: dataclasses and mappings by field, functions and classes by name."""
    if (isinstance(value, (str, int, float, bool)) and not isinstance(value, np.generic)) or value is None:
        return value
    if isinstance(value, Tensor | np.generic | np.ndarray):
        return describe(value.tolist())
    if isinstance(value, GivenAttack):
        return describe(value.factory)
    if isinstance(value, functools.partial):
        return {"name": describe(value.func), **describe(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"name": type(value).__name__, **describe(fields)}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def differences(saved: Mapping[str, Any], here: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """What is not the same and not among `free`, e.g. "attack.eps is 0.2 there and 0.3 here", one each."""
    left, right = dict(_flat(saved)), dict(_flat(here))
    absent = "not set"
    return [
        f"{name} is {left.get(name, absent)} there and {right.get(name, absent)} here"
        for name in sorted((left.keys() | right.keys()) - set(free))
        if _differ(left.get(name, absent), right.get(name, absent))
    ]


def _differ(one: Any, other: Any) -> bool:
    """Whether two values do, of which a NaN is like any other."""
    return bool(one != other) and repr(one) != repr(other)


def commit() -> str | None:
    """The commit this package is checked out from, or None for an installed one.

    "-dirty" follows it where sources have local changes; results that were written meanwhile do not count.
    """

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    here = Path(__file__)
    tracked = git("ls-files", "--error-unmatch", here.name)  # a virtual environment may lie in some other repository
    if tracked is None:
        return None
    changed = git("status", "--porcelain", "--", str(here.parents[1]), str(here.parents[2] / "csrc"))
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found
