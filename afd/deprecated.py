"""Spellings of earlier days: what they mean now, said with a DeprecationWarning. CHANGELOG.md lists them.

Tables and what reads them: whoever is asked by an old name passes it through here, and knows none itself.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from afd.errors import warn_caller

WITHOUT_EFFECT = {  # of `afd train --method natural`, which took every option of afd
    "loss", "schedule", "lr-discriminator", "lr-features", "discriminator-steps", "penalty", "attack", "attack-steps",
    "alpha", "eval-steps",
}  # fmt: skip


ATTACK_SETTINGS = {"piece": "chunk_size", "look": "validate", "fold": "fold_batchnorm"}
BENCH_OPTIONS = {"rounds": "repeats", "compare": "since"}
METHOD_SETTINGS = {"discriminator_rounds": "discriminator_steps"}
# settings of methods that checkpoints of earlier days do not have, with what was done then
ADDED = {"nesterov": False, "decay_norms": True, "layer_decay": None}
ADDED_TO_AFD: dict[str, float] = {"adversarial_weight": 0.0, "divergence_weight": 0.0}


class OldSpellingWarning(DeprecationWarning):
    """Something is said as in earlier days, which will not be understood for ever."""


# --- The command line -----------------------------------------------------------------------------------------------


def without_method_option(words: Sequence[str], methods: Collection[str]) -> list[str]:
    """The words of ``afd train`` with a method as the first of them instead of behind ``--method``.

    Somebody's own class may stand there as well as without it: the option warns where it names one of `methods`.
    """
    found, kept, words = None, [], list(words)
    while words:
        head, equals, value = words.pop(0).partition("=")
        if head != "--method" or not (equals or words):
            kept.append(f"{head}{equals}{value}")
            continue
        found = value if equals else words.pop(0)
    if found is None:
        return kept
    if found in methods:
        _old(f"--method {found} is now {found}: afd train {found} ...")
    return [found, *kept]


def train_words(words: Sequence[str], method: str | None) -> list[str]:
    """The words of ``afd train`` by today's names, but for options of AFD that natural training took no notice of."""
    words = [_option_of_today(word) if method in (None, "afd", "natural") else word for word in words]
    if method != "natural":
        return words
    kept: list[str] = []
    while words:
        word = words.pop(0)
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if not word.startswith("--") or name not in WITHOUT_EFFECT:
            kept.append(word)
            continue
        _old(f"--{name} has no effect on natural training; leave it out")
        if "=" not in word and words:
            words.pop(0)
    return kept


def _option_of_today(word: str) -> str:
    """A word by today's name, if it is an option that is a method's setting."""
    option, equals, value = word.partition("=")
    new = METHOD_SETTINGS.get(option.removeprefix("--").replace("-", "_"))
    if new is None or not option.startswith("--"):
        return word
    renamed = f"--{new.replace('_', '-')}"
    _old(f"{option} is now {renamed}")
    return f"{renamed}{equals}{value}"


def bench_words(words: Sequence[str]) -> list[str]:
    """The words of ``afd bench``, or of ``python -m afd.bench``, which takes options as key=value, in today's names."""
    name, *options = words or [""]
    if name in ("round", "step"):  # which timed afd alone
        _old(f"afd bench {name} is now afd bench methods --methods afd")
        name, options = "methods", ["--methods=afd", *options]
    for i, word in enumerate(options):
        option, equals, value = word.partition("=")
        new = BENCH_OPTIONS.get(option.removeprefix("--"))
        if new is not None and (option.startswith("--") or equals):
            renamed = f"--{new}" if option.startswith("--") else new
            options[i] = f"{renamed}{equals}{value}"
            _old(f"{option} is now {renamed}")
    return [name, *options] if words else []


def compared_words(words: Sequence[str]) -> list[str] | None:
    """The words of ``afd compare`` that those of ``afd evaluate --compare`` are now; None where they do not compare."""
    if not any(word.partition("=")[0] == "--compare" for word in words):
        return None
    _old("afd evaluate --compare is now afd compare --results")
    return [_with_option(word, "--compare", "--results") for word in words]


def _with_option(word: str, old: str, new: str) -> str:
    """A word with an option by its new name."""
    option, equals, value = word.partition("=")
    return f"{new}{equals}{value}" if option == old else word


# --- Settings -------------------------------------------------------------------------------------------------------


def understand(kind: type[Any], names: Mapping[str, str]) -> None:
    """Has a class of settings take them by earlier names as well: as arguments, and as attributes."""
    init = kind.__init__

    @functools.wraps(init)
    def __init__(self: Any, *positional: Any, **given: Any) -> None:  # noqa: N807
        init(self, *positional, **(today(given, names) if names.keys() & given.keys() else given))

    kind.__init__ = __init__
    for old, new in names.items():
        setattr(kind, old, _renamed(old, new))


def today(given: Mapping[str, Any], names: Mapping[str, str], own: Collection[str] = ()) -> dict[str, Any]:
    """Settings by today's names; one by its earlier name is somebody's word, and so counts where both are given.

    Args:
        given: settings, some of them perhaps by earlier names.
        names: today's, by the earlier ones.
        own: names that a class has itself, whatever they meant elsewhere.
    """
    earlier = {name: names[name] for name in given if name in names and name not in own}
    if earlier:
        _old("; ".join(f"{old}= is now {new}=" for old, new in earlier.items()))
    return {name: one for name, one in given.items() if name not in earlier} | {
        new: given[old] for old, new in earlier.items()
    }


def settings_of_today(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of a run's settings, by the names that they have now; says nothing.

    Settings of somebody's own classes may have such names, too: those of afd's are known by what stands beside them.
    """
    found = {name: settings_of_today(one) if isinstance(one, Mapping) else one for name, one in run.items()}
    names = METHOD_SETTINGS if "lr_discriminator" in found else {}
    names |= ATTACK_SETTINGS if {"norm", "eps", "loss", "bounds"} <= found.keys() else {}
    added: dict[str, Any] = ADDED if "micro_batches" in found else {}
    added = added | (ADDED_TO_AFD if "lr_discriminator" in found else {})
    return added | {names.get(name, name): one for name, one in found.items()}


def _renamed(old: str, new: str) -> property:
    def read(self: Any) -> Any:
        _old(f"{type(self).__name__}.{old} is now {new}")
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        _old(f"{type(self).__name__}.{old} is now {new}")
        setattr(self, new, value)

    return property(read, write)


def trainer_attacks(named: Sequence[str]) -> None:
    """Says that ``Trainer(attack=)`` and the like are the method's own now."""
    _old(
        f"Trainer({', '.join(named)}) is deprecated; a method owns its attacks, e.g. "
        "AFD(attack=PGDSettings(eps=0.3), validation_attack='pgd-20')"
    )


def _old(message: str) -> None:
    warn_caller(message, OldSpellingWarning)


# --- Reports and files of training ----------------------------------------------------------------------------------

ATTRIBUTES = {  # of a class, by its name
    "IntervalReport": {"round": "global_step"},
    "EpochReport": {"round": "global_step"},
    "Position": {"round": "global_step"},
}
KEYS = {"round": "global_step", "rounds": "steps", "meter": "losses"}  # of logs and checkpoints


class OldAttributes:
    """Base of a class whose attributes had other names."""

    if not TYPE_CHECKING:  # which would take it for an answer to every name

        def __getattr__(self, name: str) -> Any:
            new = ATTRIBUTES.get(type(self).__name__, {}).get(name)
            if new is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            _old(f"{type(self).__name__}.{name} is now {new}")
            return getattr(self, new)


def with_new_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What lies in a log or checkpoint, whose keys may be those of earlier days."""
    return {KEYS.get(name, name): value for name, value in entry.items()}


# --- Modules --------------------------------------------------------------------------------------------------------

MODULES = {  # that were moved, by their names within afd
    "attacks.capture": "graphs",
    "attacks.fgsm": "attacks.pgd",
    "attacks.mim": "attacks.pgd",
    "attacks.watch": "attacks.diagnostics",
    "bench.agreement": "bench.attacks",
    "bench.passes": "passes",
    "bench.report": "bench.results",
    "data.augment": "data.images",
    "data.items": "data.images",
    "data.loader": "data.images",
    "evaluation.evaluate": "evaluation.folder",
    "evaluation.features": "evaluation.model",
    "evaluation.robustness": "metrics",
    "extras": "installation",
    "info": "ops.backend",
    "methods.awp": "methods.stepping",
    "methods.execution": "execution",
    "methods.free": "methods.stepping",
    "nn.build": "nn.networks",
    "nn.convnet": "nn.encoders",
    "nn.discriminator": "nn.spectral",
    "nn.resnet": "nn.encoders",
    "training.average": "training.schedules",
    "training.checkpoint": "checkpoint",
    "training.curves": "experiments.display",
    "training.distributed": "runtime",
    "training.experiment": "experiments.train",
    "training.keeper": "checkpoint",
    "training.loaders": "training.data",
    "training.logs": "training.callbacks",
    "training.progress": "experiments.display",
    "training.rebuild": "training.weights",
    "training.reports": "training.callbacks",
    "training.schedule": "training.schedules",
    "training.stream": "training.data",
    "training.warmup": "training.schedules",
}
RENAMED = {"evaluation.evaluate": {"evaluate": "evaluate_to_folder"}}  # what a module had, where that has a new name
NOW = {"evaluation.evaluate": "evaluation.measure"}  # where a function is that has a module's name today
NAMES = {  # that were moved, of modules that are still there
    "training.Result": "experiments.train",
    "training.train": "experiments.train",
}


def moved(module: str, name: str) -> Any:
    """What a module had, from where it is now: for the module's ``__getattr__``.

    Raises:
        AttributeError: it has never had that.
    """
    if f"{module}.{name}".removeprefix("afd.") in MODULES:
        return importlib.import_module(f"{module}.{name}")
    here = NAMES.get(f"{module}.{name}".removeprefix("afd."))
    if here is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _old(f"{module}.{name} is now in afd.{here}")
    return getattr(importlib.import_module(f"afd.{here}"), name)


class _Moved(MetaPathFinder, Loader):
    """Imports a module that was moved from where it is now."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        ours = name.startswith("afd.") and name.removeprefix("afd.") in MODULES
        return ModuleSpec(name, self) if ours else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix("afd.")
        here = f"afd.{MODULES[name]}"
        _old(f"{module.__name__} is now {here}")
        found = importlib.import_module(here)
        sys.modules[module.__name__] = _Namesake(name, found) if name in NOW else found


class _Namesake(ModuleType):
    """A module of earlier days that a function is called like today: it has what it had, and is called as that is."""

    def __init__(self, name: str, moved_to: ModuleType) -> None:
        super().__init__(f"afd.{name}", moved_to.__doc__)
        self._name, self._moved_to = name, moved_to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._moved_to, RENAMED[self._name].get(name, name))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        function = getattr(importlib.import_module(f"afd.{NOW[self._name]}"), self._name.rpartition(".")[2])
        return function(*arguments, **options)


sys.meta_path.append(_Moved())
