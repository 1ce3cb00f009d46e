"""The words of ``afd compare``: which entries there are, and what of ``afd train`` they and the comparison say."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afd import installation
from afd.entries import grouped, made, option_in, split
from afd.errors import InputError, fits, in_a_line
from afd.experiments.comparison.record import Comparison, Record
from afd.files import check_path, check_target
from afd.options import UsageError, parsed

if TYPE_CHECKING:
    from afd.process import Work

SETTINGS: dict[str, Any] = {  # of a table.toml
    "budget": str | None, "epochs": int | None, "passes": float | None, "seeds": tuple[int, ...], "images": int | None,
    "reference": str | None, "train": str,
}  # fmt: skip
EXAMPLES = {
    "budget": '"5m"', "epochs": "12", "passes": "1.2e8", "seeds": "[0, 1, 2]", "images": "1000", "reference": '"at"',
    "train": '"--width 8"',
}  # fmt: skip


@dataclass(frozen=True)
class CompareOptions:
    """Train several methods at one cost, measure them alike, and put them into one table.

    All other options are those of afd train, for every method that has them: --data mnist --width 8 --eps-warmup 2.
    """

    methods: str = ""
    """Methods of afd train, as natural,at,trades+awp: an entry of the table for each. They are natural, at, trades,
    mart, alp, fgsm-rs, free, norm-penalty, llr, gat, nuat, jarn and afd, a wrapper behind them (+awp), and
    package.module:Class. Those that are named later join the table in --out. Variants of a method have names and
    options in --config."""
    budget: str | None = None
    """Time that adversarial training (at) may take here, such as 5m, 300s or 1h30m. It is measured once, as passes of
    the network, and all entries get as many of these, so that all train at the same cost. Training steps count, but
    neither validation nor the attacks on the test images do."""
    epochs: int | None = None
    """So many epochs for all entries instead of --budget."""
    seeds: tuple[int, ...] = ()
    """Seeds, as 0,1,2: a run of every entry for each. Default: 0."""
    images: int | None = None
    """Attack the first so many test images. Default: 1000, or all where there are fewer."""
    reference: str | None = None
    """The entry that all others are compared with, image by image. Default: that of the comparison in --out; in a new
    one the entry called at, or the first that attacks something where none is called so."""
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
    for group in grouped(words):
        name = option_in(group[0])
        known = name in ours or group[0] in ("-h", "--help") or name.removeprefix("no_") in ours
        (own if known else shared).extend(group)
    return own, shared


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
    others += [option_in(word) for word in shared if word.startswith("--")] or shared
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
        entries, shared, joins=_already(options.out, shared), budget=options.budget, epochs=options.epochs,
        seeds=options.seeds or (0,), images=options.images, reference=options.reference,
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
        return _of_table(found, options.out)
    except InputError as error:
        raise InputError(f"config is {path}: {error}") from error


def _of_table(found: Mapping[str, Any], out: Path | None) -> Comparison:
    table: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in found.items()}
    entries = table.pop("entries", None)
    if not isinstance(entries, Mapping):
        raise InputError('[entries] is missing; it has a line for each, such as at = "at" or mild = "trades --beta 1"')
    for name, value in table.items():
        if name not in SETTINGS:
            raise InputError(f"a comparison has no setting {name!r}; it has {', '.join(SETTINGS)} and [entries]")
        if not fits(value, SETTINGS[name]):
            raise InputError(f"{name} is {found[name]!r}; it must be as in {name} = {EXAMPLES[name]}")
    for name, words in entries.items():
        if not isinstance(words, str):
            raise InputError(f"entry {name!r} is {words!r}; it must be words of afd train, such as 'trades --beta 1'")
    if table.get("passes") is not None and table.get("budget") is None:
        raise InputError("passes is given without the budget that it was measured of")
    shared = split("train", table.pop("train", ""))
    return made(entries, shared, joins=_already(out, shared), **{"seeds": (0,), **table})


def _already(out: Path | None, shared: Sequence[str]) -> dict[str, str]:
    """The words of the entries, by name, of a comparison with these words for all that a folder holds."""
    record = None if out is None else Record.read(out)
    if record is None or record.content.get("train") != shlex.join(shared):
        return {}
    return {name: entry["words"] for name, entry in record.entries.items()}
