"""Attacks that somebody else wrote: how they are called, and what of their images is looked at."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from afd.errors import InputError, InputTypeError
from afd.ops import checks

BOUNDS = (0.0, 1.0)


def attacked_by(attack: Any, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """What an attack makes of a batch, of which it is given a copy; found to have the form of images like x, detached.

    Args:
        attack: (x, y, ...) -> images.
        x: images [N, ...]; not modified.
        y: labels [N]; not modified.
        settings: `seed` and `first_sample`, which it is called with.

    Raises:
        InputTypeError, InputError: what it returned is not like x; or it does not take the settings.
    """
    _check_takes(attack, x, y, settings)
    x_adv = attack(x.clone(), y.clone(), **settings)
    check_returned(x_adv, x)
    found: Tensor = x_adv.detach()
    return found


def check_returned(x_adv: Any, x: Tensor) -> None:
    """Checks the form of what an attack made of images x [N, ...].

    Raises:
        InputTypeError: it is no plain tensor, or has another dtype than x.
        InputError: it has another shape or device than x.
    """
    if not isinstance(x_adv, Tensor):
        raise InputTypeError(f"the attack returned a {type(x_adv).__name__}; it must return images like x")
    if x_adv.layout is not torch.strided or x_adv.is_quantized:
        raise InputTypeError(f"the attack returned a tensor of layout {x_adv.layout} or quantised; it must be plain")
    checks.iterate("what the attack returned", x_adv, x)


def check_values(x_adv: Tensor) -> None:
    """Checks the values that an attack made; waits for the device.

    Raises:
        InputError: there are some out of [0, 1], or not finite.
    """
    wrong = int((~inside(x_adv)).sum())
    if wrong:
        raise InputError(
            f"the attack returned {wrong} of {len(x_adv)} images out of [0, 1] or not finite; it must return "
            "images like x"
        )


def inside(x: Tensor, bounds: tuple[float, float] = BOUNDS) -> Tensor:
    """Whether all values of an image lie within bounds, bool [N] from images [N, ...]; false for NaN."""
    return ((x >= bounds[0]) & (x <= bounds[1])).flatten(1).all(1)


def _check_takes(attack: Any, x: Tensor, y: Tensor, settings: dict[str, Any]) -> None:
    """Raises InputTypeError if an attack cannot be called with the settings, as far as its signature says."""
    try:
        signature = inspect.signature(attack)
    except (TypeError, ValueError):  # compiled code has none
        return
    try:
        signature.bind(x, y, **settings)
    except TypeError as error:
        kind = getattr(attack, "__name__", type(attack).__name__)
        wanted = ", ".join(f"{name}=..." for name in settings)
        raise InputTypeError(f"the attack {kind} cannot be called as attack(x, y, {wanted}): {error}") from error
