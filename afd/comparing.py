"""The words of ``afd compare``: which entries there are, and what of ``afd train`` they and the comparison say."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from afd import installation
from afd.config import TrainConfig, ball_of
from afd.errors import InputError, count, fits, in_a_line
from afd.experiments.comparison.budget import seconds_in
from afd.experiments.comparison.record import RECORD, TABLE, Comparison, Entry, balls_of
from afd.experiments.comparison.report import WRITTEN
from afd.files import check_path, check_target
from afd.methods import METHODS, registry
from afd.methods.registry import classes_of
from afd.options import UsageError, base_of, last_value, method_in, options_of, parsed, train_config

if TYPE_CHECKING:
    from afd.process import Work

NAME = re.compile(r"[A-Za-z0-9+._-]+")  # of an entry, and so of its folder
# options of `afd train` that are the comparison's own
OURS = ("seed", "seeds", "epochs", "out", "overwrite", "config", "resume")
SETTINGS: dict[str, Any] = {  # of a table.toml
    "budget": str | None, "epochs": int | None, "passes": float | None, "seeds": tuple[int, ...], "images": int | None,
    "reference": str | None, "train": str,
}  # fmt: skip


@dataclass(frozen=True)
class CompareOptions:
    """Train several methods at one cost, measure them alike, and put them into one table.

    All other options are those of afd train, for every method that has them: --data mnist --width 8 --eps-warmup 2.
    """

    methods: str = ""
    """Methods of afd train, as natural,at,trades+awp: an entry of the table for each. Those that are named later join
    the table in --out. Variants of a method have names and options in --config."""
    budget: str | None = None
    """Time that adversarial training (at) may take here, such as 5m, 300s or 1h30m. It is measured once, as passes of
    the network, and all entries get as many of these, so that all train at the same cost. Training steps alone count:
    neither validation nor the attacks on the test images."""
    epochs: int | None = None
    """So many epochs for all entries instead of --budget."""
    seeds: tuple[int, ...] = ()
    """Seeds, as 0,1,2: a run of every entry for each. Default: 0."""
    images: int | None = None
    """Attack the first so many test images. Default: 1000, or all where there are fewer."""
    reference: str | None = None
    """The entry that all others are compared with, image by image. Default: at, or the first that attacks something."""
    config: Path | None = None
    """TOML file of a comparison, such as its table.toml, which says all of it; --out and --overwrite may go with it."""
    results: tuple[Path, ...] = ()
    """Put finished evaluations or comparisons side by side instead: their folders. Nothing is trained."""
    out: Path | None = None
    """Folder of the table and of all runs. Default: a new one, runs/compare/0001 and so on. A comparison that was
    stopped goes on when it is run again."""
    overwrite: bool = False
    """Discard another comparison that --out holds. The same one, to which methods may be added, is gone on with."""


def comparison_asked(words: Sequence[str], described: str | None) -> Work:
    """The work of ``afd compare``.

    Raises:
        UsageError, InputError: the words ask for none that can be done.
        SystemExit: they ask for help, which was shown.
    """
    own, shared = divided(words)
    options: CompareOptions = parsed(CompareOptions, "compare", own, described and CompareOptions.__doc__)
    if options.out is not None:
        check_target("out", options.out)
    if options.overwrite and options.out is None:
        raise InputError("overwrite is set, but out is not; the numbered folders are never overwritten")
    if options.results:
        return _of_results(options, shared)
    asked = _of_file(options, shared) if options.config is not None else _of_words(options, shared)
    for name, entry in asked.entries.items():
        for warning in entry.config.warnings():
            print(f"afd: warning: entry {name!r}: {warning}", file=sys.stderr)
    from afd.experiments.comparison import compare

    installation.require("tensorboard", "afd compare")
    if asked.timed.data.name == "digits":
        installation.require("sklearn", "the data set digits")
    return lambda: compare(asked, options.out, overwrite=options.overwrite)


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of ``afd compare`` that are its own, and those of ``afd train``."""
    ours = {one.name for one in dataclasses.fields(CompareOptions)}
    own, shared = list[str](), list[str]()
    for group in _groups(words):
        name = _named(group[0])
        known = name in ours or group[0] in ("-h", "--help") or name.removeprefix("no_") in ours
        (own if known else shared).extend(group)
    return own, shared


def _groups(words: Iterable[str]) -> list[list[str]]:
    """Words by option: each with its values; what stands before the first option is a group without one."""
    found: list[list[str]] = []
    for word in words:
        if found and not (word.startswith("--") or word == "-h"):
            found[-1].append(word)
        else:
            found.append([word])
    return found


def _named(word: str) -> str:
    """The name of an option, as a field has it."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _of_results(options: CompareOptions, shared: Sequence[str]) -> Work:
    _check_alone("results", "with it go --out and --overwrite alone", options, shared)
    with installation.needed_by("afd compare"):
        from rich.console import Console
    from afd.experiments.comparison.results import compare_results

    return lambda: compare_results(options.results, options.out, options.overwrite, Console())


def _check_alone(option: str, told: str, options: CompareOptions, shared: Sequence[str]) -> None:
    """Raises UsageError if more than a folder goes with an option that says all."""
    allowed = (option, "out", "overwrite")
    others = [
        one.name
        for one in dataclasses.fields(options)
        if one.name not in allowed and getattr(options, one.name) != one.default
    ]
    others += [_named(word) for word in shared if word.startswith("--")] or shared
    if others:
        raise UsageError(f"{option} is given, and {others[0]} too; {told}")


def _of_words(options: CompareOptions, shared: Sequence[str]) -> Comparison:
    """What the options ask for."""
    names = [one.strip() for one in options.methods.split(",")] if options.methods.strip() else []
    if not names:
        raise UsageError("methods is missing; name them as --methods natural,at,trades, or a file with --config")
    if not all(names):
        raise UsageError(f"methods is {options.methods!r}, of which one is empty; name them as natural,at,trades")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"methods names {twice[0]} twice; variants of a method have names of their own in --config")
    entries = {name.replace(":", "."): name for name in names}
    return made(
        entries, shared, budget=options.budget, epochs=options.epochs, seeds=options.seeds or (0,),
        images=options.images, reference=options.reference,
    )  # fmt: skip


def _of_file(options: CompareOptions, shared: Sequence[str]) -> Comparison:
    """What the file of --config asks for.

    Raises:
        InputError: it cannot be read, or says what no comparison has.
    """
    path = options.config
    assert path is not None
    _check_alone("config", "the file says it, and --out goes with it", options, shared)
    check_path("config", path)
    if not path.is_file():
        raise InputError(f"config is {path}; there is no such file")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"config is {path}, which cannot be read: {in_a_line(error)}") from error
    try:
        return _of_table(found)
    except InputError as error:
        raise InputError(f"config is {path}: {error}") from error


def _of_table(found: Mapping[str, Any]) -> Comparison:
    table: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in found.items()}
    entries = table.pop("entries", None)
    if not isinstance(entries, Mapping):
        raise InputError('[entries] is missing; it has a line for each, such as at = "at" or mild = "trades --beta 1"')
    for name, value in table.items():
        if name not in SETTINGS:
            raise InputError(f"a comparison has no setting {name!r}; it has {', '.join(SETTINGS)} and [entries]")
        if not fits(value, SETTINGS[name]):
            raise InputError(f"{name} is {value!r}, a {type(value).__name__}; it must be like those of a table.toml")
    for name, words in entries.items():
        if not isinstance(words, str):
            raise InputError(f"entry {name!r} is {words!r}; it must be words of afd train, such as 'trades --beta 1'")
    if table.get("passes") is not None and table.get("budget") is None:
        raise InputError("passes is given without the budget that it was measured of")
    return made(entries, _split("train", table.pop("train", "")), **{"seeds": (0,), **table})


def _split(name: str, words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        raise InputError(f"{name} is {words!r}, which cannot be read: {error}") from error


# --- Entries ----------------------------------------------------------------------------------------------------------


def made(
    entries: Mapping[str, str], shared: Sequence[str], *, reference: str | None = None, **settings: Any
) -> Comparison:
    """A comparison whose entries are words of ``afd train``.

    Args:
        entries: by name: METHOD and options of its own, which count where they and `shared` differ.
        shared: options for every entry whose method has them; for whom one is left out is printed.
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
    _check_ours("the options for all", shared, (*OURS, "epoch_images") if by_budget else OURS)
    read = {name: _words(name, words) for name, words in entries.items()}
    known = {name: _options(method, [*shared, *own]) for name, (method, own) in read.items()}
    timed = train_config(["at", *_known(shared, _options("at", shared))], None).settled()
    for group in _groups(shared):
        if not any(_has(one, group[0]) for one in known.values()):
            train_config([next(iter(read.values()))[0], *group], None)  # says what is meant, perhaps
            raise UsageError(f"none of the methods takes {group[0]} from the options for all")
    _tell_left_out(shared, known)
    found = {}
    for name, (method, own) in read.items():
        try:
            config = train_config([method, *_known(shared, known[name]), *own], None).settled()
            if not by_budget:
                config = dataclasses.replace(config, epochs=settings["epochs"])
            found[name] = Entry(shlex.join([method, *own]), _alike(config, own, timed))
        except InputError as error:
            raise type(error)(f"entry {name!r}: {error}") from error
    return Comparison(found, timed, shlex.join(shared), reference=reference, **settings)


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


def _words(name: str, words: str) -> tuple[str, list[str]]:
    """The method of an entry, and the options of its own.

    Raises:
        InputError: it names no method that there is, its name is none, or an option is not its to say.
    """
    if not NAME.fullmatch(name) or name.startswith("."):
        raise InputError(f"an entry is called {name!r}; names of entries have letters, digits, and any of + - . _")
    if name in (RECORD, TABLE, *WRITTEN):
        raise InputError(f"an entry is called {name!r}, which is a file of the comparison's; call it otherwise")
    own, method = method_in(_split(f"entry {name!r}", words))
    if method is None:
        word = own[0] if own and not own[0].startswith("-") else ""
        raise InputError(
            f"the method of entry {name!r} is {word!r}; allowed are {', '.join(METHODS)}, with a wrapper as at+awp, "
            "and package.module:Class"
        )
    try:
        classes_of(method)
    except InputError as error:
        raise InputError(f"entry {name!r}: {error}") from error
    _check_ours(f"entry {name!r}", own, (*OURS, "epoch_images"))
    return method, own


def _check_ours(holder: str, words: Sequence[str], ours: Sequence[str]) -> None:
    """Raises InputError if words have options that are the comparison's own to say."""
    named = [_named(word) for word in words if word.startswith("--")]
    for option in ours:
        if option in named or f"no_{option}" in named:
            told = option.replace("_", "-")
            raise InputError(f"{holder} has --{told}, which is the comparison's own to say; leave it out there")


def _options(method: str, words: Sequence[str]) -> set[str]:
    """The names of all options for all that ``afd train METHOD`` has with such words.

    The steps of an attack are none for a method that is one of a single step: with more of them it were another.
    """
    base = base_of(words, method)
    assert base.method is not None
    without = {"eps_warmup"} if base.method.ball is None else set()  # which would have no effect
    if getattr(registry.made({"name": method}).attack, "steps", None) == 1:
        without |= {"attack_steps", "alpha"}
    return set(_named_in(options_of(base))) - without


def _named_in(kind: type[Any]) -> list[str]:
    """Names of options in a class for the parser, and in those that it holds."""
    found: list[str] = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if isinstance(hint, type) and is_dataclass(hint):
            found += _named_in(hint)
            continue
        told = [getattr(one, "name", None) for one in getattr(hint, "__metadata__", ())]
        found.append(next((one.replace("-", "_") for one in told if one), name))
    return found


def _has(options: set[str], word: str) -> bool:
    name = _named(word)
    return name in options or name.removeprefix("no_") in options


def _known(shared: Sequence[str], options: set[str]) -> list[str]:
    """Those of the words for all that a method has options for."""
    return [word for group in _groups(shared) if _has(options, group[0]) for word in group]


def _tell_left_out(shared: Sequence[str], known: Mapping[str, set[str]]) -> None:
    """Prints for whom an option is left out."""
    told = []
    for group in _groups(shared):
        without = [name for name, options in known.items() if not _has(options, group[0])]
        if without:
            told.append(f"{group[0].partition('=')[0]} ({', '.join(without)})")
    if told:
        print(f"left out where a method has no such option (or an attack of one step by design): {'; '.join(told)}")


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
        "normalize": network.normalize, "ball": ball, "eval-steps": config.method.validation_attack,
        "device": config.device,
    }  # fmt: skip
