"""The words of a command line, and the options of ``afd train``, read from the dataclasses of a method and its attack.

``afd train METHOD --data mnist`` and ``afd train --data mnist METHOD`` say the same; METHOD is afd where none is named.
A setting of the method has its own name (``--beta``), one of its attack begins with attack (``--attack-steps``), but
for the ball and the step size (``--norm``, ``--eps``, ``--alpha``). Lists, functions and factories are no options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from afd import deprecated
from afd.attacks import ATTACKS, NORMS, AttackSettings, UnionSettings
from afd.attacks.settings import SIZES
from afd.attacks.union import RADIUS_IN
from afd.config import DataConfig, ModelConfig, RunConfig, TestConfig, TrainConfig, ball_of
from afd.data import check_data
from afd.errors import InputError, fraction, unboxed, whole_number
from afd.installation import needed_by
from afd.methods import METHODS, WRAPPERS, Method
from afd.methods.optimizers import OPTIMIZERS
from afd.methods.registry import attack_of, attributes, classes_of, described, known, made, options, spelled
from afd.presets import another, kind_of, method_for

with needed_by("the command afd"):
    import tyro as tyro
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

NUMBERS = tyro.constructors.ConstructorRegistry()


class UsageError(InputError):
    """Words that a command does not understand."""


@NUMBERS.primitive_rule
def number(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How an option that is a number, or may be left out, is read, and written in the help."""
    types = [one for one in get_args(kind.type) or (kind.type,) if one is not NoneType]
    optional = NoneType in get_args(kind.type)
    if types == [float]:
        reader: Callable[[str], float] = fraction
    elif types == [int]:
        reader = whole_number
    elif kind.type == tuple[int, ...]:  # as 0,1,2, too
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="INT,INT,...",
            instance_from_str=lambda words: tuple(map(whole_number, ",".join(words).split(","))),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [str(one) for one in value],
        )
    else:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|P/Q" if reader is fraction else "INT",
        instance_from_str=lambda words: None if optional and words[0].lower() == "none" else reader(words[0]),
        is_instance=lambda value: value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)),
        str_from_instance=lambda value: [str(value) if value is None or reader is whole_number else f"{value:g}"],
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
        raise UsageError(unboxed(said.getvalue())) from None
    finally:
        options["ansi_codes"] = coloured
    sys.stderr.write(said.getvalue())
    return made


# --- Options of a run -----------------------------------------------------------------------------------------------


PLAIN = {"norm", *SIZES}  # settings of an attack that are options by their own names
# what training sees to itself
OWN = {"targeted", "outputs", "bounds", "precision", "chunk_size", "validate", "fold_batchnorm", "seed"}
ATTACKS_OF = {"attack", "validation_attack"}
TAKEN = {one.name for kind in (RunConfig, DataConfig, ModelConfig) for one in dataclasses.fields(kind)}
TAKEN |= {"config", "data", "data_root", "model", "attack", "eval_steps", "method"}
Options = list[tuple[str, Any, Any]]  # as of `dataclasses.make_dataclass`


def train_config(words: Sequence[str], described_as: str | None, command: str = "train") -> TrainConfig:
    """The run that the words of ``afd train`` describe, on top of the file that --config names.

    Raises:
        UsageError, InputError: they describe none.
        SystemExit: they ask for help, which was shown.
    """
    words, name = method_in(deprecated.without_method_option(words, METHODS))
    if name is None and words and not words[0].startswith("-"):
        classes_of(words[0])  # which says that there is none, and which there are
    words = deprecated.train_words(words, name)
    base = base_of(words, name)
    if last_value(words, "seeds") is not None:
        if last_value(words, "seed") is not None:
            raise UsageError("seed and seeds are both given; name one of the two")
        base = dataclasses.replace(base, seed=0)  # that of the file
    try:
        found = parsed(options_of(base), command, words, _said(described_as, command))
    except UsageError as error:
        stray = re.match(r"Unrecognized options: ([^-\s,;][^\s,;]*)", str(error))
        if stray is not None:
            classes_of(stray[1])  # says that there is no such method
        raise
    return _config(found, base)


def method_in(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words but for the one that names the method, and that one.

    Raises:
        UsageError: two words name one.
    """
    flags = {_option(name) for kind in (RunConfig, DataConfig, ModelConfig) for name in _flags(kind)}
    flags |= {_option(f"attack_{name}") for kind in ATTACKS.values() for name in _flags(kind)}
    flags |= {_option(name) for kind in (*METHODS.values(), *WRAPPERS.values()) for name in _flags(kind)}
    places = []
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        value = before.startswith("--") and "=" not in before and before.removeprefix("--no-").strip("-") not in flags
        said = not word.startswith("-") and "=" not in word and not word[:1].isdigit()  # beta=0:5, 128:1 are no methods
        if said and known(word) and not value:
            places.append(place)
    if len(places) > 1:
        raise UsageError(f"two methods are named, {words[places[0]]} and {words[places[1]]}; see afd train --help")
    if not places:
        return list(words), None
    return [word for place, word in enumerate(words) if place != places[0]], words[places[0]]


def _flags(kind: type[Any]) -> Iterator[str]:
    """The fields of a class that are options without a value."""
    hints = get_type_hints(kind)
    return (one.name for one in dataclasses.fields(kind) if hints[one.name] is bool)


def base_of(words: Sequence[str], name: str | None) -> TrainConfig:
    """What holds where no option says otherwise: the file's run, else the data set's and the method's defaults."""
    file = last_value(words, "config")
    base = TrainConfig() if file is None else TrainConfig.read(Path(file))
    data = _data_of(words, base)
    own, norm, eps = base.method, last_value(words, "norm"), last_value(words, "eps")
    optimizer, attack = last_value(words, "optimizer"), last_value(words, "attack")
    if own is None or name not in (None, spelled(own)):
        given = _radius(eps)
        known_norm = norm if norm in NORMS else None
        ball = base.test if own is None else ball_of(own) or base.test
        base = dataclasses.replace(base, test=ball)
        radii = _radii(words)
        if file is not None and last_value(words, "data") is None:  # the file's ball stays
            if ball.eps is not None:
                given = ball.eps if given is None and known_norm in (None, ball.norm) else given
                known_norm = known_norm or ball.norm
            elif ball.union is not None and attack in (None, "union"):
                of_file = UnionSettings.written(ball.union)
                attack, radii = "union", {**{name: of_file[name] for name in RADIUS_IN.values()}, **radii}
        chosen: dict[str, Any] = {
            "optimizer": optimizer if optimizer in OPTIMIZERS else None,
            "norm": known_norm,
            "eps": given,
            "radii": radii,
        }
        own = method_for(data, name or "afd", attack=attack if attack in ATTACKS else None, **chosen)
    elif attack in ATTACKS and own.attack is not None and ATTACKS[attack] is not type(own.attack):
        own = made(described(own) | {"attack": {"name": attack, **another(own.attack, attack, data, _radii(words))}})
    if isinstance(own.attack, UnionSettings) and norm is not None:
        raise UsageError(
            f"norm is {norm}, but the attack is a union, which takes the radius of each of its balls: eps (Linf), "
            "eps-l2, eps-l1"
        )
    return dataclasses.replace(base, method=own, test=ball_of(own) or base.test)


def _data_of(words: Sequence[str], base: TrainConfig) -> str:
    """Under what name `PRESETS` has the data set that the words name; the parser says what is wrong with a size."""
    size = last_value(words, "image-size")
    side = int(size) if size is not None and size.isdecimal() else base.data.image_size
    return kind_of(check_data(last_value(words, "data") or base.data.name), side)


def _radii(words: Sequence[str]) -> dict[str, float | None]:
    """The radii of a union that the words name, by name; None is of a ball that is left out."""
    named = {name: last_value(words, _option(name)) for name in RADIUS_IN.values()}
    told = {name: word for name, word in named.items() if word is not None}
    found = {name: _radius(word) for name, word in told.items()}
    return {name: one for name, one in found.items() if one is not None or told[name].lower() == "none"}


def _radius(text: str | None) -> float | None:
    """A number that stands in the place of the usual radius; the parser says what is wrong with another word."""
    try:
        value = None if text is None else fraction(text)
    except ValueError:
        return None
    return value if value is not None and 0 <= value < float("inf") else None


def last_value(words: Sequence[str], option: str) -> str | None:
    """What the words give to an option, if they name it; of several, the last."""
    found = None
    for place, word in enumerate(words):
        head, equals, value = word.partition("=")
        if head.replace("_", "-") == f"--{option}":
            found = value if equals else (words[place + 1] if place + 1 < len(words) else None)
    return found


# --- Classes for the parser -----------------------------------------------------------------------------------------


def options_of(base: TrainConfig) -> type[Any]:
    """A class whose fields are the options of a run like `base`, with its values as defaults."""
    assert base.method is not None
    attack, method = base.method.attack, base.method
    groups: Options = [
        ("data", DataConfig, _default(base.data)),
        ("model", ModelConfig, _default(base.model)),
        _group("method", _method_options(method)),
    ]
    if isinstance(attack, AttackSettings):
        groups.append(_group("attack", list(_attack_options(method, attack))))
    elif ball_of(method) is None:
        groups.append(("test", TestConfig, _default(base.test)))
    else:  # it attacks by itself
        groups.append(_group("validation", list(_validation_options(method))))
    hints = get_type_hints(RunConfig, include_extras=True)
    run = [(one.name, hints[one.name], getattr(base, one.name)) for one in dataclasses.fields(RunConfig)]
    file = Annotated[Path | None, tyro.conf.arg(help="TOML file of a run, such as its run.toml; options change it.")]
    return dataclasses.make_dataclass(
        "TrainOptions",
        [
            *run,
            ("config", file, None),
            *groups,
        ],
        bases=(RunConfig,),
        frozen=True,
    )


def _group(name: str, fields: Options) -> tuple[str, Any, Any]:
    kind = dataclasses.make_dataclass(name, fields, frozen=True)
    return name, kind, dataclasses.field(default_factory=kind)


def _default(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def _method_options(method: Method) -> Options:
    found: Options = []
    taken = TAKEN | PLAIN if isinstance(method.attack, AttackSettings) else TAKEN
    for one, value in options(method):
        if one.name not in ATTACKS_OF:
            spelled_so = f"method_{one.name}" if one.name in taken else one.name
            found += _field(one.name, spelled_so, _holder(method, one.name), value)
    return found


def _attack_options(method: Method, attack: AttackSettings) -> Iterator[tuple[str, Any, Any]]:
    name = next(name for name, kind in ATTACKS.items() if kind is type(attack))
    told = tyro.conf.arg(name="attack", help="The attack to train against.")
    yield "attack", Annotated[Literal[tuple(ATTACKS)], told], name
    hidden = OWN | {"norm"} if isinstance(attack, UnionSettings) else OWN
    for one in dataclasses.fields(attack):
        if one.name not in hidden:
            spelled = one.name if one.name in PLAIN else f"attack_{one.name}"
            yield from _field(one.name, spelled, type(attack), getattr(attack, one.name))
    yield from _validation_options(method)


def _validation_options(method: Method) -> Iterator[tuple[str, Any, Any]]:
    steps = _pgd_steps(method.validation_attack)
    if steps is not None:
        told = tyro.conf.arg(name="eval-steps", help="Steps of the PGD that validates, in the ball of the attack.")
        yield "eval_steps", Annotated[int, told], steps


def _field(name: str, spelled: str, kind: type[Any], value: Any) -> Options:
    """A field as an option, if the parser can read one of its type."""
    hint = _readable(get_type_hints(kind)[name])
    if hint is None or callable(value):
        return []
    told = tyro.conf.arg(name=_option(spelled), help=attributes(kind).get(name, ""))
    return [(name, Annotated[hint, told], value)]


def _readable(hint: Any) -> Any:
    """The part of a type that can be written as a word; None if there is none."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for one in get_args(hint) if (part := _readable(one)) is not None]
        wanted = [one for one in parts if one is not type(None)]
        return Union[tuple(parts)] if wanted else None  # noqa: UP007
    words = hint in (int, float, str, bool, type(None)) or get_origin(hint) is Literal
    return hint if words else None


def _holder(method: Any, name: str) -> type[Any]:
    """The class, of a method or of the wrappers around it, that has a field."""
    own = name in {one.name for one in dataclasses.fields(method)}
    return type(method) if own else _holder(method.method, name)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _said(described_as: str | None, command: str) -> str:
    methods, wrappers = ", ".join(METHODS), ", ".join(WRAPPERS)
    around = f" A wrapper goes behind it: METHOD+WRAPPER ({wrappers})." if wrappers else ""
    return (
        f"{described_as}\n\nafd {command} [METHOD] [OPTIONS]: METHOD is one of {methods} (default: afd), or a class of "
        f"your own as package.module:Class; its options are shown by afd {command} METHOD --help.{around}"
    )


# --- And back ---------------------------------------------------------------------------------------------------------


def _config(found: Any, base: TrainConfig) -> TrainConfig:
    """The run that was read."""
    assert base.method is not None
    method = described(base.method) | vars(found.method)
    test = getattr(found, "test", base.test)
    told = getattr(found, "attack", None) or getattr(found, "validation", None)
    attack = {} if told is None else dict(vars(told))
    steps = attack.pop("eval_steps", None)
    if hasattr(found, "attack"):
        with _of_the_attack():
            own = base.method.attack
            method["attack"] = attack_of(method["attack"] | {"name": attack.pop("attack")} | attack, own)
    if steps is not None:
        method["validation_attack"] = f"pgd-{steps}"
    run = {one.name: getattr(found, one.name) for one in dataclasses.fields(RunConfig)}
    own = made(method)
    return TrainConfig(**run, data=found.data, model=found.model, method=own, test=ball_of(own) or test)


@contextmanager
def _of_the_attack() -> Iterator[None]:
    """Inside, an error about a setting of the attack names its option."""
    try:
        yield
    except InputError as error:
        name, blank, rest = str(error).partition(" ")
        error.args = (str(error) if name in PLAIN else f"{_option(f'attack_{name}')}{blank}{rest}",)
        raise


def _pgd_steps(validation: Any) -> int | None:
    named = re.fullmatch(r"pgd-(\d+)", validation) if isinstance(validation, str) else None
    return None if named is None else int(named[1])
