"""What a data set asks for where the user says nothing: network, ball, epochs, and methods with such an attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afd.attacks import AttackSettings, PGDSettings, UnionSettings, attack_named
from afd.attacks.settings import STEP_OF
from afd.attacks.union import RADIUS_IN
from afd.errors import InputError
from afd.methods import Method
from afd.methods.registry import classes_of, made
from afd.nn.networks import own_width

STEPS = 10  # of a training attack that is not the method's own
LENGTHS = ("alpha", "start_scale")  # that follow the radius, where a method's attack has them


@dataclass(frozen=True)
class Preset:
    """What a data set asks for where the user says nothing.

    Attributes:
        model: network.
        width: of its first layer.
        eps: radius in Linf.
        epochs: passes over the training images, all repeats of a batch counted.
        augment: whether images are cropped and flipped at random.
        weight_decay: the least that methods which attack begin with. On CIFAR it moves robust accuracy by more than
            most methods differ by, and 5e-4 is better than the 1e-4 and 2e-4 of many released recipes (Pang et al.
            2021, "Bag of Tricks for Adversarial Training"): with less, a weak recipe is measured, and not the method.
    """

    model: str
    width: int
    eps: float
    epochs: int
    augment: bool
    weight_decay: float = 0.0


PRESETS = {
    "digits": Preset("convnet", width=32, eps=0.2, epochs=60, augment=False),
    "mnist": Preset("convnet", width=16, eps=0.3, epochs=10, augment=False),
    "cifar10": Preset("resnet18", width=64, eps=8 / 255, epochs=300, augment=True, weight_decay=5e-4),
    "cifar100": Preset("resnet18", width=64, eps=8 / 255, epochs=300, augment=True, weight_decay=5e-4),
    # of files: as CIFAR, and as ImageNet (RobustBench's radius; the decay of Salman et al. 2020)
    "small files": Preset("resnet18", width=64, eps=8 / 255, epochs=100, augment=True, weight_decay=5e-4),
    "large files": Preset("resnet50", width=64, eps=4 / 255, epochs=100, augment=True, weight_decay=1e-4),
}
SMALL = 64  # pixels of a side, up to which images are cropped after padding


def kind_of(data: str, image_size: int | None = None) -> str:
    """Under what name `PRESETS` has a data set: its own, or that of files of such a size.

    Args:
        data: its name, or ``folder:PATH`` or ``shards:PATTERN``.
        image_size: side of the images, where it is named.
    """
    if data in PRESETS:
        return data
    return "large files" if image_size is not None and image_size > SMALL else "small files"


# Radii that are usual besides: MNIST's of Tramèr & Boneh (2019), CIFAR's of RobustBench and Croce & Hein (2021); for
# large files ImageNet's (Croce & Hein 2022); those of digits are ours, so that a network that knows one ball alone is
# hurt in each
RADII = {
    ("digits", "L2"): 0.75, ("digits", "L1"): 2.0,
    ("mnist", "L2"): 2.0, ("mnist", "L1"): 10.0,
    ("cifar10", "L2"): 0.5, ("cifar10", "L1"): 12.0,
    ("cifar100", "L2"): 0.5, ("cifar100", "L1"): 12.0,
    ("small files", "L2"): 0.5, ("small files", "L1"): 12.0,
    ("large files", "L2"): 2.0, ("large files", "L1"): 255.0,
}  # fmt: skip


def width_for(data: str, model: str | None) -> int:
    """The width of a network that none was named for: the data set's for the paper's two, its own for any other."""
    own = None if model is None or ":" in model else own_width(model)
    return PRESETS[data].width if own is None else own


def radius(data: str, norm: str) -> float:
    """The radius that is usual for a data set.

    Raises:
        InputError: none is.
    """
    eps = PRESETS[data].eps if norm == "Linf" else RADII.get((data, norm))
    if eps is None:
        raise InputError(f"eps is missing; no radius is usual for {data} in {norm}")
    return eps


def method_for(
    data: str, name: str = "afd", *, optimizer: str | None = None, attack: str | None = None, norm: str | None = None,
    eps: float | None = None, radii: Mapping[str, float | None] | None = None,
) -> Method:  # fmt: skip
    """A method with its own defaults, but for what the data set asks for (`Preset`).

    That is the ball of its attack, and the least weight decay of methods that attack.

    Args:
        data: name of the data set.
        name: as in `afd.methods.registry`.
        optimizer: whose rates it takes, weight decay included; by default its own.
        attack: name of another attack than its own.
        norm: of the ball; by default the attack's own.
        eps: of the ball; by default the usual one.
        radii: of a union, by name, in the place of the usual ones; None leaves a ball out.

    Raises:
        InputError: there is no such method or attack, or no radius is usual in such a ball.
    """
    core = classes_of(name)[0]
    settings = {} if optimizer is None else {"optimizer": optimizer, **getattr(core, "rates", {}).get(optimizer, {})}
    method = made({"name": name, **settings})
    own = method.attack
    defaults: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(core)}
    own_ball = own is None and "eps" in defaults
    least = PRESETS[data].weight_decay
    rated = optimizer in getattr(core, "rates", {})
    if (own is not None or own_ball) and not rated and defaults.get("weight_decay", least) < least:
        settings["weight_decay"] = least
        method = made({"name": name, **settings})
    if own is None:
        radii = {"eps": radius(data, norm or "Linf") if eps is None else eps} if own_ball else {}
        return made({"name": name, **settings, **radii})
    kind = type(own) if attack is None else attack_named(attack)
    if kind is UnionSettings:
        settings["attack"] = _union_of(own, data, radii or {})
        return made({"name": name, **settings})
    norm = own.norm if norm is None else norm
    other_ball = norm != own.norm or PRESETS[data].eps != own.eps
    if kind is type(own) and not other_ball and eps is None:
        return method
    settings["attack"] = _attack_in(kind, own, norm, radius(data, norm) if eps is None else eps)
    return made({"name": name, **settings})


def _attack_in(kind: type[AttackSettings], own: AttackSettings, norm: str, eps: float) -> AttackSettings:
    """An attack in a ball: the method's own, its step size following the radius, or another one."""
    other = kind is not type(own)
    names = {one.name for one in dataclasses.fields(kind)}
    fitting: dict[str, Any] = (
        {"norm": norm, "eps": eps, "steps": STEPS}
        if other
        else {"norm": norm, "eps": eps, **{name: _in_proportion(name, own, norm, eps) for name in LENGTHS}}
    )
    changes = {name: value for name, value in fitting.items() if name in names}
    return kind(**changes) if other else dataclasses.replace(own, **changes)


def _in_proportion(name: str, own: AttackSettings, norm: str, eps: float) -> float | None:
    """A length of an attack with another radius, in proportion; None, for a rule, of many steps in another norm."""
    length: Any = getattr(own, name, None)
    many = norm != own.norm and getattr(own, "steps", 0) != 1
    return None if length is None or many or not own.eps else float(length * eps / own.eps)


def another(own: AttackSettings, attack: str, data: str, radii: Mapping[str, float | None]) -> AttackSettings:
    """Another attack than a run's own, by name, with what both have; radii as in `method_for`."""
    if attack_named(attack) is UnionSettings:
        known = {RADIUS_IN[own.norm]: float(own.eps)} if own.norm in RADIUS_IN else {}
        return _union_of(own, data, {**known, **radii})
    taken = {one.name for one in dataclasses.fields(attack_named(attack))}
    values = {name: value for name, value in {**own}.items() if name in taken}
    if values.get("eps", 0.0) is None:  # of a union
        values["eps"] = radius(data, "Linf")
    return attack_named(attack)(**values)


def _union_of(own: AttackSettings, data: str, radii: Mapping[str, float | None]) -> UnionSettings:
    """A union of balls, attacked as a method's own attack does where that is a PGD; radii as in `method_for`."""
    taken: dict[str, Any] = {
        field: radii[field] if field in radii else radius(data, norm) for norm, field in RADIUS_IN.items()
    }
    if isinstance(own, PGDSettings):
        shared = {one.name for one in dataclasses.fields(PGDSettings)} - {"norm", "eps", "alpha", "targeted"}
        taken |= {name: own[name] for name in shared}
        if own.norm == "Linf" and taken["eps"] is not None:
            taken |= {name: _in_proportion(name, own, "Linf", taken["eps"]) for name in LENGTHS}
        steps = {norm: name for norm, name in RADIUS_IN.items() if norm != "Linf" and taken[name] is not None}
        taken |= {STEP_OF[name]: _in_proportion("alpha", own, norm, taken[name]) for norm, name in steps.items()}
    return UnionSettings(**taken)
