"""Entries of a comparison: words of ``afd train``, alike in all that a comparison is not of."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from afd.config import TrainConfig, ball_of
from afd.errors import InputError, count
from afd.experiments.comparison.budget import seconds_in
from afd.experiments.comparison.record import RECORD, TABLE, Comparison, Entry, balls_of
from afd.experiments.comparison.report import WRITTEN
from afd.methods import METHODS, registry
from afd.methods.registry import classes_of
from afd.options import UsageError, base_of, last_value, method_in, options_of, train_config

NAME = re.compile(r"[A-Za-z0-9+._-]+")  # of an entry, and so of its folder
LONGEST = 100  # of these names
# options of `afd train` that are the comparison's own
OURS = ("seed", "seeds", "epochs", "out", "overwrite", "config", "resume")


def made(
    entries: Mapping[str, str],
    shared: Sequence[str],
    *,
    joins: Mapping[str, str] | None = None,
    reference: str | None = None,
    **settings: Any,
) -> Comparison:
    """A comparison whose entries are words of ``afd train``.

    Args:
        entries: by name: METHOD and options of its own, which count where they and `shared` differ.
        shared: options for every entry whose method has them.
        joins: words of the entries, by name, that these join; what one of them takes may be said for all.
        reference: the entry that others are paired with; it is looked for when the record is there.
        settings: of `Comparison`, besides.

    Raises:
        InputError: there is no such method or option; a name is no name of a folder; an entry differs from the others
            in what must be the same in all, or says what the comparison says.
    """
    _check_settings(**settings)
    if not entries:
        raise InputError("entries is empty; a comparison needs at least one")
    by_budget = settings.get("epochs") is None
    if method_in(shared)[1] is not None:
        raise UsageError(f"{method_in(shared)[1]} is named beside the options for all; methods are named by --methods")
    _check_ours("the options for all have", shared, (*OURS, "epoch_images") if by_budget else OURS)
    read = {name: _words(name, words) for name, words in entries.items()}
    _check_apart(read)
    if reference is not None and reference not in {**(joins or {}), **read}:
        names = ", ".join({**(joins or {}), **read})
        raise InputError(f"reference is {reference!r}; allowed are the entries {names}")
    known = {name: _options(method, [*shared, *own]) for name, (method, own) in read.items()}
    of_at = _options("at", shared)
    timed = train_config(["at", *_known(shared, of_at)], None).settled()
    for group in grouped(shared):
        if not any(_has(one, group[0]) for one in (*known.values(), of_at, *_options_there(joins or {}, shared))):
            train_config([next(iter(read.values()))[0], *group], None)  # says what is meant, perhaps
            raise UsageError(f"none of the methods takes {group[0]} from the options for all")
    found = {}
    for name, (method, own) in read.items():
        try:
            config = train_config([method, *_known(shared, known[name]), *own], None).settled()
            if not by_budget:
                config = dataclasses.replace(config, epochs=settings["epochs"])
            found[name] = Entry(shlex.join([method, *own]), _alike(config, own, timed))
        except InputError as error:
            raise type(error)(f"entry {name!r}: {error}") from error
    left_out = _left_out(shared, known)
    return Comparison(found, timed, shlex.join(shared), reference=reference, left_out=left_out, **settings)


def _check_settings(
    budget: str | None = None, epochs: int | None = None, passes: float | None = None, seeds: Sequence[int] = (0,),
    images: int | None = None,
) -> None:  # fmt: skip
    """Raises InputError unless a comparison can be of these settings."""
    if budget is None and epochs is None:
        raise UsageError("budget is missing; say what each method may cost, as --budget 5m, or name --epochs")
    if budget is not None and epochs is not None:
        raise UsageError(f"budget is {budget} and epochs is {epochs}; name one of the two")
    if budget is not None:
        seconds_in(budget)
    for name, value in (("epochs", epochs), ("images", images)):
        if value is not None:
            count(name, value, 1)
    if passes is not None and not 0 < passes < float("inf"):
        raise InputError(f"passes is {passes}; it must be a number above 0")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'none'}; each must be named, and once")
    for seed in seeds:
        if not 0 <= seed < 2**62:
            raise InputError(f"one of the seeds is {seed}; it must be in [0, 2**62)")


def _check_apart(names: Iterable[str]) -> None:
    """Raises InputError if two names are one where a file system takes small letters for large ones."""
    known: dict[str, str] = {}
    for name in names:
        if (other := known.setdefault(name.lower(), name)) != name:
            raise InputError(f"entries are called {other!r} and {name!r}, which some file systems take for one name")


def _words(name: str, words: str) -> tuple[str, list[str]]:
    """The method of an entry, and the options of its own.

    Raises:
        InputError: it names no method that there is, its name is none, or an option is not its to say.
    """
    if not NAME.fullmatch(name) or name.startswith("."):
        raise InputError(f"an entry is called {name!r}; names of entries have letters, digits, and any of + - . _")
    if len(name) > LONGEST:
        raise InputError(f"an entry is called {name[:20]!r}..., {len(name)} letters; at most {LONGEST} are allowed")
    if name.lower() in (RECORD, TABLE, *WRITTEN):
        raise InputError(f"an entry is called {name!r}, which is a file of the comparison's; call it otherwise")
    own, method = method_in(split(f"entry {name!r}", words))
    if method is None:
        word = own[0] if own and not own[0].startswith("-") else ""
        raise InputError(
            f"the method of entry {name!r} is {word!r}; allowed are {', '.join(METHODS)}, with a wrapper as at+awp, "
            f"and package.module:Class{_perhaps(word)}"
        )
    try:
        classes_of(method)
    except InputError as error:
        raise InputError(f"entry {name!r}: {error}") from error
    _check_ours(f"entry {name!r} has", own, (*OURS, "epoch_images"))
    return method, own


def _perhaps(word: str) -> str:
    """What somebody may have meant by the name of no method: a choice of one of its settings, or another name."""
    method, _, choice = word.partition("-")
    if method in METHODS:
        for setting, hint in get_type_hints(METHODS[method]).items():
            if choice in get_args(hint):
                words = f"{method} --{setting.replace('_', '-')} {choice}"
                return f'; perhaps you meant an entry of --config, {word} = "{words}"'
    near = get_close_matches(word, METHODS, 1)
    return f"; perhaps you meant {near[0]}" if near else ""


def _check_ours(holds: str, words: Sequence[str], ours: Sequence[str]) -> None:
    """Raises InputError if words have options that are the comparison's own to say."""
    said = [option_in(word) for word in words if word.startswith("--")]
    for option in ours:
        if option in said or f"no_{option}" in said:
            instead = "name --seeds instead" if option == "seed" else "leave it out there"
            told = option.replace("_", "-")
            raise InputError(f"{holds} --{told}, which is the comparison's own to say; {instead}")


def _options(method: str, words: Sequence[str]) -> set[str]:
    """The names of all options for all that ``afd train METHOD`` has with such words.

    The steps of an attack are none for a method that is one of a single step: with more of them it were another.
    """
    base = base_of(words, method)
    assert base.method is not None
    without = {"eps_warmup"} if base.method.ball is None else set()  # which would have no effect
    if getattr(registry.made({"name": method}).attack, "steps", None) == 1:
        without |= {"attack_steps", "alpha"}
    return set(_names_in(options_of(base))) - without


def _names_in(kind: type[Any]) -> list[str]:
    """Names of options in a class for the parser, and in those that it holds."""
    found: list[str] = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if isinstance(hint, type) and is_dataclass(hint):
            found += _names_in(hint)
            continue
        told = [getattr(one, "name", None) for one in getattr(hint, "__metadata__", ())]
        found.append(next((one.replace("-", "_") for one in told if one), name))
    return found


def _has(options: set[str], word: str) -> bool:
    name = option_in(word)
    return name in options or name.removeprefix("no_") in options


def _known(shared: Sequence[str], options: set[str]) -> list[str]:
    """Those of the words for all that a method has options for."""
    return [word for group in grouped(shared) if _has(options, group[0]) for word in group]


def _options_there(entries: Mapping[str, str], shared: Sequence[str]) -> Iterator[set[str]]:
    """Those of entries of words."""
    for name, words in entries.items():
        own, method = method_in(split(f"entry {name!r}", words))
        if method is not None:
            yield _options(method, [*shared, *own])


def _left_out(shared: Sequence[str], known: Mapping[str, set[str]]) -> dict[str, tuple[str, ...]]:
    """The entries that an option for all is left out for, by option."""
    names = (group[0] for group in grouped(shared))
    found = {
        name.partition("=")[0]: tuple(entry for entry, options in known.items() if not _has(options, name))
        for name in names
    }
    return {name: entries for name, entries in found.items() if entries}


def _alike(config: TrainConfig, own: Sequence[str], timed: TrainConfig) -> TrainConfig:
    """An entry's run, in the ball of the comparison where its method has none.

    Raises:
        InputError: it differs in what must be the same in all entries, or costs more where an alarm undoes steps.
    """
    assert config.method is not None
    if config.on_alarm == "rollback":
        raise InputError(
            "on-alarm is rollback, which takes undone steps once more, so that the cost is another; in a comparison it "
            "is warn, stop or off"
        )
    said = any(last_value(own, option) is not None for option in ("norm", "eps", "union"))
    if ball_of(config.method) is None and not said:
        config = dataclasses.replace(config, test=timed.test)
    for setting, here in _of_all(config).items():
        there = _of_all(timed)[setting]
        if here != there and not (setting == "eval-steps" and here is None):
            raise InputError(
                f"{setting} is {here}, and {there} for the others; data, network, first weights, ball, validation and "
                "precision are the same in all entries"
            )
    return config


def _of_all(config: TrainConfig) -> dict[str, Any]:
    """What must be the same in all entries, by option."""
    assert config.method is not None
    chosen, network = config.data, config.model
    ball = ", ".join(f"{norm} {eps}" for norm, eps in balls_of(config).items())
    return {
        "data": chosen.name, "data-root": chosen.root, "validation": chosen.validation, "limit": chosen.limit,
        "augment": chosen.augment, "extra-data": chosen.extra_data, "extra-share": chosen.extra_share,
        "epoch-images": chosen.epoch_images, "weights": config.weights, "precision": config.precision,
        "model": network.name, "width": network.width, "activation": network.activation,
        "normalize": network.normalize, "input-stats": network.input_stats, "new-head": network.new_head,
        "freeze": network.freeze, "drop-path": network.drop_path, "ball": ball,
        "eval-steps": config.method.validation_attack, "device": config.device,
    }  # fmt: skip


# --- Words ------------------------------------------------------------------------------------------------------------


def grouped(words: Iterable[str]) -> list[list[str]]:
    """Words by option: each with its values; what stands before the first option is a group without one."""
    found: list[list[str]] = []
    for word in words:
        if found and not (word.startswith("--") or word == "-h"):
            found[-1].append(word)
        else:
            found.append([word])
    return found


def option_in(word: str) -> str:
    """The name of an option, as a field has it."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def split(name: str, words: str) -> list[str]:
    """The words of a line, as a shell reads them.

    Raises:
        InputError: it cannot be read; `name` is what it is called.
    """
    try:
        return shlex.split(words)
    except ValueError as error:
        raise InputError(f"{name} is {words!r}, which cannot be read: {error}") from error
