"""The settings of a trainer: checked before anything starts, and as plain facts that a checkpoint compares."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afd import errors
from afd._version import __version__
from afd.attacks import AttackFactory, AttackSettings
from afd.attacks.base import GradientAttack
from afd.checkpoint import CheckpointError
from afd.deprecated import settings_of_today, trainer_attacks
from afd.errors import InputError, InputTypeError
from afd.methods import Execution, Method, Wrapper
from afd.methods.attacking import GivenAttack
from afd.nn import FeatureSplit
from afd.nn.classifier import MARKER
from afd.training.alarms import ON_ALARM
from afd.training.mixing import Mixing
from afd.training.schedules import BUFFERS
from afd.training.weights import SCALED, SCALED_FOR

BUILT = (
    "method", "schedule", "ema", "ema_warmup", "ema_buffers", "execution",
    "feature_layer", "normalize", "attack", "validation_attack", "folder", "on_alarm",
)  # fmt: skip
"""Settings that a trainer has built on when it was made: a change of one would be followed by nobody."""

FACTS = (
    "method", "epochs", "schedule", "lr_warmup", "eps_warmup", "ramps", "ema", "ema_warmup", "ema_buffers", "execution",
    "feature_layer", "normalize", "seed",
)  # fmt: skip
"""Settings that must be the same in the run that goes on, where no config says which."""

EARLIER = {"lr_warmup": 0.0, "ema_warmup": False, "ema_buffers": "averaged"}
"""What runs did whose checkpoints do not name these settings."""
OF_AVERAGES = ("ema_warmup", "ema_buffers")

# of a config: may change when resumed
FREE = {
    "out", "overwrite", "device", "resume", "weights", "save_every", "log_every", "data.root",
    "data.extra_data", "graph", "execution.graph", "on_alarm", "checkpoint_activations",
    "execution.checkpoint_activations",
}  # fmt: skip


def check_settings(given: Mapping[str, Any]) -> None:
    """Checks the settings of a trainer, by name, its model apart: what cannot be meant is named before anything starts.

    Raises:
        InputTypeError: one is of a type that is not allowed.
        InputError: one is out of range, or misses another.
    """
    errors.whole("epochs", given["epochs"], 0)
    errors.number("eps_warmup", given["eps_warmup"], 0.0)
    errors.number("lr_warmup", given["lr_warmup"], 0.0)
    _expect("ema_warmup", given["ema_warmup"], bool, "True or False")
    if given["ema"] is None and given["ema_buffers"] != "averaged":
        raise InputError(f"ema_buffers is {given['ema_buffers']!r}, but ema is None: there is no average that has them")
    errors.one_of("ema_buffers", given["ema_buffers"], BUFFERS)
    errors.whole("log_every", given["log_every"], 1)
    errors.whole("save_every", given["save_every"], 0)
    errors.whole("seed", given["seed"], 0)
    errors.one_of("on_alarm", given["on_alarm"], ON_ALARM)
    _check_method(given["method"])
    _expect("execution", given["execution"], Execution, "an afd.methods.Execution")
    _expect("mixing", given["mixing"], Mixing, "an afd.training.Mixing")
    for name in ("attack", "validation_attack"):
        check_factory(name, given[name])
    callbacks, progress = given["callbacks"], given["progress"]
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise InputTypeError(f"callbacks is {_told(callbacks)}; it must be a list of functions of a report")
    _expect("normalize", given["normalize"], bool | None, "True, False or None")
    for name in ("folder", "resume"):
        _expect(name, given[name], str | Path | None, "a path")
    _expect("config", given["config"], Mapping | None, "a dict")
    shows = progress is None or all(hasattr(progress, name) for name in ("began", "moved"))
    if isinstance(progress, type) or not shows:
        raise InputTypeError(f"progress is {_told(progress)}; it must be an object with the methods began and moved")
    _check_folder(given["folder"], given["resume"], given["overwrite"])


def _check_folder(folder: Path | str | None, resume: Path | str | None, overwrite: bool) -> None:
    if resume == "auto" and folder is None:
        raise InputError("resume is 'auto'; it needs a folder to look for checkpoints in")
    if resume == "auto" and overwrite:
        raise InputError(
            "resume is 'auto' and overwrite is True; the run in folder is gone on with or discarded, not both"
        )
    within = folder is not None and Path(str(resume)).parent.resolve() == Path(folder).resolve()
    if overwrite and resume is not None and within:
        raise InputError(f"resume is {resume}, which overwrite would discard; name another folder")


def _expect(name: str, value: Any, kind: Any, words: str) -> None:
    if not isinstance(value, kind):
        raise InputTypeError(f"{name} is {_told(value)}; it must be {words}")


def check_factory(name: str, factory: Any) -> None:
    """Raises InputTypeError unless a setting is an attack without its model, or None."""
    if isinstance(factory, GradientAttack):
        kind = type(factory).__name__
        raise InputTypeError(
            f"{name} is a {kind} that has its model already; give its settings alone, {kind}.partial(eps=...)"
        )
    if factory is not None and not callable(factory):
        raise InputTypeError(
            f"{name} is {_told(factory)}; it must be an attack without its model, such as PGD.partial(eps=...)"
        )


def _check_method(method: Any) -> None:
    if isinstance(method, type):
        raise InputTypeError(f"method is the class {method.__name__}; it must have settings: {method.__name__}(...)")
    if not isinstance(method, Method):
        raise InputTypeError(f"method is {_told(method)}; it must be a training method, such as AFD(...) or Natural()")
    errors.whole("repeats of the method", method.repeats, 1)


def _told(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    return f"the function {value.__name__}" if inspect.isfunction(value) else f"a {type(value).__name__}"


# --- As plain facts -------------------------------------------------------------------------------------------------


def built(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of a trainer that must stay as they are, in plain terms."""
    described: dict[str, Any] = describe({name: settings[name] for name in BUILT})
    return {**described, "folder": None if settings["folder"] is None else str(settings["folder"])}


def facts(settings: Mapping[str, Any], judging: Any, processes: int, network: nn.Module) -> dict[str, Any]:
    """What must be the same in the run that goes on.

    Args:
        settings: of the trainer.
        judging: the attack that it is validated by.
        processes: how many there are.
        network: that is trained.
    """
    run = settings["config"]
    if run is None:
        run = {name: settings[name] for name in FACTS}
        if settings["mixing"].active:  # as in checkpoints of the time when there was none
            run["mixing"] = settings["mixing"]
        if settings["attack"] is not None or settings["validation_attack"] is not None:  # instead of the method's own
            run["validation_attack"] = judging
    if isinstance(network, FeatureSplit):
        run = {**run, SCALED_FOR: SCALED[network.normalize]}
    described: dict[str, Any] = describe({"afd": __version__, "processes": processes, **run})
    return described


def completed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's `facts` mean: with the settings that it does not name, without those that mean nothing in it."""
    whole = {**EARLIER, **facts}
    without = OF_AVERAGES if whole.get("ema") is None else ()
    return {name: one for name, one in whole.items() if name not in without}


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


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


# --- Whose state it is ----------------------------------------------------------------------------------------------


def check_same_run(
    source: str, state: Mapping[str, Any], metadata: Mapping[str, Any], here: Mapping[str, Any], network: nn.Module
) -> bool:
    """Whether a run of which a state is goes on for more epochs than it had.

    Args:
        source: of the state, for messages.
        state: gets what those of earlier days do not say of scaled features.
        metadata: of the state.
        here: `facts` of the run that is to go on.
        network: of that.

    Raises:
        CheckpointError: it is another run's; the message says what differs.
    """
    if "method" not in metadata:
        raise CheckpointError(
            f"{source} is of an afd in which attacks were not their method's own; its run cannot be gone on with, but "
            "another may begin with its weights (--weights)"
        )
    run = dict(metadata["run"])
    if metadata.get("config") is None:
        _tell_what_was_scaled(source, state, run, network)
    grows = _grows(run.get("epochs"), here.get("epochs"))
    free = FREE | {"epochs"} if grows else FREE
    different = differences(completed(settings_of_today(run)), completed(here), free)
    if different:
        raise CheckpointError(f"{source} is of another run: {'; '.join(different)}")
    return grows


def _grows(there: Any, here: Any) -> bool:
    """Whether a run is to have more epochs than it had; fewer make it another run."""
    return isinstance(there, int) and isinstance(here, int) and here > there


def _tell_what_was_scaled(source: str, state: Mapping[str, Any], run: dict[str, Any], network: nn.Module) -> None:
    """Puts into a checkpoint of somebody's own model what those of earlier days do not say: which features were scaled.

    Raises:
        CheckpointError: they were scaled for their layer, too, which was the default, and are not here.
    """
    if not isinstance(network, FeatureSplit) or SCALED_FOR in run:
        return
    if run["normalize"] is False:
        run[SCALED_FOR] = SCALED[False]
        return
    if not network.normalize:
        raise CheckpointError(
            f"{source} is of a model that scaled its features to length 1 for its own layer "
            "as well, as was the default; go on from it with normalize=True"
        )
    run |= {"normalize": True, SCALED_FOR: SCALED[True]}
    name = f"{network.feature_layer}.{MARKER}".removeprefix(".")
    for weights in (state["model"], *([state["average"]["weights"]] if state["average"] else [])):
        weights[name] = torch.ones((), dtype=torch.bool)


# --- Attacks in the place of a method's own -------------------------------------------------------------------------


def overridden(
    method: Method, attack: AttackFactory | None, validation_attack: AttackFactory | None, seed: int
) -> tuple[Method, Any]:
    """A trainer's method, and the attack that it is validated by, where the trainer is given others.

    Args:
        method: with attacks of its own.
        attack: instead of its training attack, as a function of the model.
        validation_attack: likewise; where only `attack` is given, there is none.
        seed: of the method's own validation attack.
    """
    given = {"attack": attack, "validation_attack": validation_attack}
    named = [f"{name}=" for name, one in given.items() if one is not None]
    if not named:
        return method, method.judge(seed)
    trainer_attacks(named)
    if attack is not None and method.attack is not None:
        method = _against(method, attack if isinstance(attack, AttackSettings) else GivenAttack(attack))
    if validation_attack is not None:
        own = isinstance(validation_attack, AttackSettings)
        return method, validation_attack if own else GivenAttack(validation_attack, "validation_attack")
    return method, None if attack is not None else method.judge(seed)


def _against(method: Any, attack: Any) -> Any:
    if isinstance(method, Wrapper):
        return dataclasses.replace(method, method=_against(method.method, attack))
    return dataclasses.replace(method, attack=attack)
