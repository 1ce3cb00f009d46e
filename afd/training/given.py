"""The settings of a trainer as somebody may have given them: what cannot be meant is named before anything starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afd.attacks.base import GradientAttack
from afd.errors import InputError, InputTypeError, number, whole
from afd.methods import Execution, Method

if TYPE_CHECKING:
    from afd.training.trainer import Trainer


def check_settings(trainer: Trainer) -> None:
    """Checks a trainer's settings, its model apart.

    Raises:
        InputTypeError: one is of a type that is not allowed.
        InputError: one is out of range, or misses another.
    """
    whole("epochs", trainer.epochs, 0)
    number("eps_warmup", trainer.eps_warmup, 0.0)
    whole("log_every", trainer.log_every, 1)
    whole("save_every", trainer.save_every, 0)
    whole("seed", trainer.seed, 0)
    _check_method(trainer.method)
    if not isinstance(trainer.execution, Execution):
        raise InputTypeError(f"execution is {_told(trainer.execution)}; it must be an afd.methods.Execution")
    for name in ("attack", "validation_attack"):
        check_factory(name, getattr(trainer, name))
    if not isinstance(trainer.callbacks, Sequence) or not all(map(callable, trainer.callbacks)):
        raise InputTypeError(f"callbacks is {_told(trainer.callbacks)}; it must be a list of functions of a report")
    if trainer.normalize is not None and not isinstance(trainer.normalize, bool):
        raise InputTypeError(f"normalize is {_told(trainer.normalize)}; it must be True, False or None")
    for name in ("folder", "resume"):
        value = getattr(trainer, name)
        if value is not None and not isinstance(value, str | Path):
            raise InputTypeError(f"{name} is {_told(value)}; it must be a path")
    if trainer.config is not None and not isinstance(trainer.config, Mapping):
        raise InputTypeError(f"config is {_told(trainer.config)}; it must be a dict")
    told = trainer.progress
    if isinstance(told, type) or not (told is None or all(hasattr(told, name) for name in ("began", "moved"))):
        raise InputTypeError(f"progress is {_told(told)}; it must be an object with the methods began and moved")
    if trainer.resume == "auto" and trainer.folder is None:
        raise InputError("resume is 'auto'; it needs a folder to look for checkpoints in")
    if trainer.resume == "auto" and trainer.overwrite:
        raise InputError(
            "resume is 'auto' and overwrite is True; the run in folder is gone on with or discarded, not both"
        )
    within = trainer.folder is not None and Path(str(trainer.resume)).parent.resolve() == Path(trainer.folder).resolve()
    if trainer.overwrite and trainer.resume is not None and within:
        raise InputError(f"resume is {trainer.resume}, which overwrite would discard; name another folder")


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


def _told(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    return f"the function {value.__name__}" if inspect.isfunction(value) else f"a {type(value).__name__}"
