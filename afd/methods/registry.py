"""Training methods by name, and what is written of one: a new method is its class and a line here.

A name is one of `METHODS`, with wrappers of `WRAPPERS` behind it (``trades+awp``), or a class of somebody's own as
``package.module:Class``.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from inspect import isabstract
from pathlib import Path
from typing import Any, get_type_hints

from afd.attacks.settings import ATTACKS, AttackSettings, attack_named
from afd.deprecated import METHOD_SETTINGS, today
from afd.errors import InputError, InputTypeError, fits, in_a_line, in_words
from afd.methods.adversarial import ALP, AT, FGSMRS, MART, TRADES, Natural, NormPenalty
from afd.methods.afd import AFD
from afd.methods.base import Method, check_declared
from afd.methods.jarn import JARN
from afd.methods.regularized import GAT, LLR, NuAT
from afd.methods.stepping import AWP, Free
from afd.methods.supervised import Wrapper

METHODS: dict[str, type[Method]] = {
    "natural": Natural,
    "at": AT,
    "trades": TRADES,
    "mart": MART,
    "alp": ALP,
    "fgsm-rs": FGSMRS,
    "free": Free,
    "norm-penalty": NormPenalty,
    "llr": LLR,
    "gat": GAT,
    "nuat": NuAT,
    "jarn": JARN,
    "afd": AFD,
}
WRAPPERS: dict[str, type[Wrapper]] = {"awp": AWP}


def known(name: str) -> bool:
    """Whether a name is of a method and wrappers that are registered, or has the form of somebody's own class."""
    core, *around = name.split("+")
    return (":" in core or core in METHODS) and all(":" in one or one in WRAPPERS for one in around)


def classes_of(name: str) -> list[type[Any]]:
    """The method's class, and those of the wrappers around it from the inside out.

    Raises:
        InputError: there is no such method, or no such wrapper.
        InputTypeError: the class of somebody's own is no training method.
    """
    core, *around = name.split("+")
    found = [_class(core, METHODS, Method, "method")]
    if issubclass(found[0], Wrapper):
        raise InputError(f"method is {name!r}, but {core} is a wrapper around a method; write at+{core}")
    found += [_class(one, WRAPPERS, Wrapper, "wrapper") for one in around]
    names = [field.name for kind in found for field in fields(kind) if field.name != "method"]
    if "name" in names:
        raise InputError(f"method is {name!r}, which has a setting 'name'; that is the method's own")
    for own in names:
        if names.count(own) > 1:
            raise InputError(f"method is {name!r}, of which two have a setting {own!r}; put them together in Python")
    return found


def spelled(method: Method) -> str:
    """The name of a method."""
    if isinstance(method, Wrapper):
        return f"{spelled(method.method)}+{_name(type(method), WRAPPERS)}"
    return _name(type(method), METHODS)


def options(method: Method) -> Iterator[tuple[Field[Any], Any]]:
    """The fields of a method and of its wrappers with their values, but for the method inside of a wrapper."""
    if isinstance(method, Wrapper):
        yield from options(method.method)
    for field in fields(method):  # type: ignore[arg-type]
        if not (isinstance(method, Wrapper) and field.name == "method"):
            yield field, getattr(method, field.name)


def attributes(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say first of its fields, under "Attributes:"."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        section = re.search(r"Attributes:\n((?:[ ]{8}.*\n|\s*\n)+)", f"{one.__doc__ or ''}\n")
        for entry in re.finditer(r"^ {8}(\w+): ((?:.*)(?:\n {10,}.*)*)", section[1] if section else "", re.MULTILINE):
            text = " ".join(entry[2].split())
            sentence = re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")
            first = sentence[:1].upper() if sentence[:1].isascii() else sentence[:1]
            found[entry[1]] = f"{first}{sentence[1:]}."
    return found


def described(method: Method) -> dict[str, Any]:
    """A method as a flat dict: its name, its settings, its attacks as dicts of their own; `made` reads it."""
    return {"name": spelled(method)} | {field.name: _plain(value) for field, value in options(method)}


def made(description: Mapping[str, Any]) -> Method:
    """The method that a dict describes; what it leaves out is the class's default.

    Raises:
        InputError: it names no method, or a setting that the method has not.
        InputTypeError: the class of somebody's own is no training method.
    """
    settings = dict(description)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"the method's name is {name!r}; allowed are {', '.join(METHODS)} and package.module:Class")
    core, *around = classes_of(name)
    settings = today(settings, METHOD_SETTINGS, {field.name for kind in (core, *around) for field in fields(kind)})
    for kind in (core, *around):
        for field in fields(kind):
            if isinstance(settings.get(field.name), Mapping) and field.name != "optimizers":
                settings[field.name] = attack_of(settings[field.name], field.default)
    _check_types((core, *around), settings, name)
    try:
        method: Method = core(**_taken(core, settings))
        for wrapper in around:
            method = wrapper(method, **_taken(wrapper, settings))
    except TypeError as error:  # of a class that wants more, or has an __init__ of its own
        raise InputError(f"the method {name} cannot be made: {in_a_line(error)}") from error
    if settings:
        raise InputError(f"the method {name} has no setting {', '.join(map(repr, settings))}")
    return method


def _check_types(kinds: Iterable[type[Any]], settings: Mapping[str, Any], name: str) -> None:
    """Raises InputError where a value is of another type than the method's setting."""
    for kind in kinds:
        hints = get_type_hints(kind)
        for one in (one.name for one in fields(kind) if one.name in settings):
            value = settings[one]
            if not fits(tuple(value) if isinstance(value, list) else value, hints[one]):
                told = f"{one} is {value!r}, a {type(value).__name__}"
                raise InputError(f"{told}; the method {name} has {in_words(hints[one])} there")


def _taken(kind: type[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that a class has, taken out."""
    return {field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings}


def attack_of(description: Mapping[str, Any], default: Any = None) -> AttackSettings:
    """The attack that a dict describes by its name and settings; what it leaves out is the default's, if that is one.

    Raises:
        InputError: there is no such attack, or it has no such setting, or not of that value.
    """
    given = dict(description)
    kind: Any = attack_named(str(given.pop("name", "pgd")))
    settings = kind.named(given)
    if type(default) is kind:
        settings = {**default} | settings
    made_of: AttackSettings = kind(
        **{name: tuple(one) if isinstance(one, list) else one for name, one in settings.items()}
    )
    return made_of


def _plain(value: Any) -> Any:
    """A setting in words and numbers where it is an attack's; any other as it is."""
    if isinstance(value, AttackSettings):
        name = next(name for name, kind in ATTACKS.items() if kind is type(value))
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"name": name} | {field: one for field, one in own.items() if not callable(one)}
    return value


def _name(kind: type[Any], registered: Mapping[str, type[Any]]) -> str:
    own = next((name for name, one in registered.items() if one is kind), None)
    return own or f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str, registered: Mapping[str, type[Any]], base: type[Any], told: str) -> type[Any]:
    module, colon, path = name.partition(":")
    if colon and not all(part.isidentifier() for part in f"{module}.{path}".split(".")):
        raise InputError(f"{told} is {name!r}; somebody's own class is written package.module:Class")
    if not colon:
        if name not in registered:
            allowed = ", ".join(registered) or "none"
            raise InputError(f"{told} is {name!r}; allowed are {allowed} and somebody's own as package.module:Class")
        return registered[name]
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the class may lie beside the user
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever somebody's own module raises
        raise InputError(f"{told} is {name!r}, which cannot be imported: {in_a_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, base) and is_dataclass(found) and not isabstract(found)):
        raise InputTypeError(f"{told} is {name!r}; it must be a class of afd.methods.{base.__name__}")
    check_declared(found)
    return found
